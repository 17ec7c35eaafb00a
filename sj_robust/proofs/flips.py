"""Balls of binary event frames: at most k changed values."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sj_robust.proofs.changes import Changes
from sj_robust.proofs.spiking import Interval

__all__ = ["Flips"]


@dataclass(frozen=True)
class Flips:
    """Binary event frames [N, T, *] of which at most ``budget`` values are changed, 0 to 1 or 1
    to 0. 至多翻转若干事件的球。

    Attributes:
        budget: Number of changes; in training it may lie between two integers.

    Examples:
        >>> x = torch.tensor([[[1.0, 0.0, 1.0]]])
        >>> Flips(2).lowest(x, torch.tensor([[[1.0, -3.0, -2.0]]]))
        tensor([[[0., 1., 1.]]])
    """

    budget: float

    def box(self, frames: Tensor) -> Interval:
        """An interval of every value around the frames that holds what it may change to."""
        return Interval(frames - 1, frames + 1)

    def changes(self, frames: Tensor, *, summed: bool) -> Changes:
        """What each value can change by; ``summed`` keeps no single changes behind the first
        map.
        """
        steps = torch.arange(frames.shape[1], device=frames.device)
        shape = (1, -1, *[1] * (frames.ndim - 2))
        return Changes(
            self.budget,
            up=(1 - frames,),
            down=(frames,),
            frame=steps.view(shape).expand(frames.shape),
            apart=True,
            summed=summed,
        )

    def falls(self, frames: Tensor, weights: Tensor) -> Tensor:
        """How far a change of each value lowers sums with weights [R, T, *] of frames [1, T, *]."""
        return (weights * (2 * frames - 1)).clamp(min=0)

    def lowest(self, frames: Tensor, weights: Tensor) -> Tensor:
        """The frames of the ball whose sum with the weights is least; frames may be one for several
        rows of weights.
        """
        frames = frames.expand(weights.shape)
        falls = (weights * (2 * frames - 1)).flatten(1)
        values, places = falls.topk(min(int(self.budget), falls.shape[1]), 1)
        chosen = torch.zeros_like(falls).scatter(1, places, (values > 0).to(falls.dtype))
        return torch.where(chosen.view_as(weights) > 0, 1 - frames, frames)

    def drawn(self, frames: Tensor, generator: torch.Generator) -> Tensor:
        """Frames with as many changes as the budget allows, at random places."""
        drawn = torch.rand(frames.shape, generator=generator, dtype=torch.float64)
        return self.lowest(frames, drawn.to(frames.device) * (2 * frames - 1)).to(frames.dtype)
