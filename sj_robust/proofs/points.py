"""Points of a ball that are tried on the network itself."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sj_robust.proofs.moves import EVENTS, Events

__all__ = ["Points"]

_STEPS = 20
"""Steps down the network's own gradient of a lead."""


@dataclass(frozen=True)
class Points:
    """Points of the balls of images, and the search among them for one that breaks its image.
    球内的测试点。

    Attributes:
        logits: The network that runs, images to logits.
        eps: Linf radius, or what may happen to event frames.
    """

    logits: Callable[[Tensor], Tensor]
    eps: float | Events

    def broken(self, image: Tensor, label: Tensor) -> Tensor | None:
        """A point of the ball of one image [1, *] that the network gets wrong; None if none was
        found.

        For every rival class one point goes down the network's own gradient of the lead over it.
        """
        with torch.no_grad():
            classes = self.logits(image).shape[1]
        every = torch.arange(classes, device=label.device)
        rivals = every[every != label].unsqueeze(1)

        def lead(points: Tensor) -> Tensor:
            logits = self.logits(points)
            return (logits[:, label] - logits.gather(1, rivals)).sum()

        points = image.expand(len(rivals), *image.shape[1:])
        for _ in range(_STEPS):
            slope = _slope(lead, points)
            if slope is None:
                break
            points = self.lower(image, points, slope.nan_to_num())
            with torch.no_grad():
                is_wrong = self.logits(points).argmax(1) != label
            if is_wrong.any():
                return points[is_wrong][:1]
        return None

    def lower(self, image: Tensor, points: Tensor, slopes: Tensor) -> Tensor:
        """Points of the ball a step down from these; of frames those that the slopes point to."""
        if isinstance(self.eps, EVENTS):
            return self.eps.lowest(image, slopes).to(image.dtype)
        step = self.eps / 4 * slopes.sign()
        return inside_ball(image, points.double() - step, self.eps)

    def solution(self, image: Tensor, values: Tensor) -> Tensor:
        """The point of the ball next to the values that a program has found."""
        if isinstance(self.eps, EVENTS):
            return values.round().to(image.dtype)
        return inside_ball(image, values, self.eps)


def _slope(value: Callable[[Tensor], Tensor], images: Tensor) -> Tensor | None:
    """Gradient of a value at the images, if it has one; none if autograd fails, as where weights
    are written to in the forward.
    """
    points = images.detach().clone().requires_grad_()
    try:
        with torch.enable_grad():
            found = value(points)
        if not found.requires_grad:
            return None
        (slope,) = torch.autograd.grad(found, points, allow_unused=True)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError:
        return None
    return slope


def inside_ball(images: Tensor, points: Tensor, eps: float) -> Tensor:
    """Points in the precision of images [N, *] that are in the ball of each and in [0, 1]; one
    image may have several.
    """
    centre = images.double()
    inside = points.clamp(centre - eps, centre + eps).clamp(0, 1)
    rounded = inside.to(images.dtype)
    outside = (rounded.double() - centre).abs() > eps
    inward = torch.nextafter(rounded, images.expand_as(rounded))
    return torch.where(outside, inward, rounded)
