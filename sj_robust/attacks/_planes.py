"""Frames of event counts as binary frames with more channels, so that one search serves both."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["each_on_its_own", "in_unary", "summed", "taking_planes"]


def in_unary(x: Tensor) -> tuple[Tensor, int]:
    """Frames [N, T, C, H, W] with planes instead of channels, and how many: plane k of a value is 1
    where the value is above k. One plane more than needed holds an event that is added. Binary
    frames are their only plane.
    """
    if not x.numel() or float(x.max()) <= 1:
        return x, 1
    planes = int(x.max()) + 1
    return torch.cat([(x > k).to(x.dtype) for k in range(planes)], 2), planes


def each_on_its_own(x: Tensor) -> tuple[Tensor, int]:
    """The same for moves in time: every event of a pixel and polarity has a plane of its own, so
    that none is in the way of another.
    """
    if not x.numel() or float(x.max()) <= 1:
        return x, 1
    until = x.cumsum(1)
    planes = int(until.max())
    found = [((until > k) & (until - x <= k)).to(x.dtype) for k in range(planes)]
    return torch.cat(found, 2), planes


def summed(frames: Tensor, planes: int) -> Tensor:
    """The numbers of events of frames in planes."""
    if planes == 1:
        return frames
    N, T, channels, *size = frames.shape
    return frames.view(N, T, planes, channels // planes, *size).sum(2)


def taking_planes(model: Callable[[Tensor], Tensor], planes: int) -> Callable[[Tensor], Tensor]:
    """A model of frames as one of frames in planes."""
    return model if planes == 1 else lambda frames: model(summed(frames, planes))
