"""Points of a ball that are tried on the network itself."""

from collections.abc import Callable, Iterator
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

        def lead(points: Tensor) -> list[Tensor]:
            logits = self.logits(points)
            leads = logits[:, label] - logits.gather(1, rivals)
            return [leads.sum()]

        points = image.expand(len(rivals), *image.shape[1:])
        for _ in range(_STEPS):
            slope = next(_slopes(lead, points), None)
            if slope is None:
                break
            points = self.lower(image, points, slope.nan_to_num())
            with torch.no_grad():
                is_wrong = self.logits(points).argmax(1) != label
            if is_wrong.any():
                return points[is_wrong][:1]
        return None

    def drawn(self, images: Tensor) -> Iterator[Tensor]:
        """A corner and a random point of the ball of each image, and the images themselves."""
        generator = torch.Generator().manual_seed(0)
        if isinstance(self.eps, EVENTS):
            for _ in range(2):
                yield self.eps.drawn(images, generator)
            yield images
            return
        drawn = torch.rand(images.shape, generator=generator, dtype=torch.float64)
        share = drawn.to(images.device)
        corner = 2.0 * share.round() - 1.0
        between = 2.0 * share - 1.0
        for direction in (corner, between):
            yield inside_ball(images, images.double() + self.eps * direction, self.eps)
        yield images

    def against_lead(self, images: Tensor) -> Iterator[Tensor]:
        """Of each image's ball the corner to which its lead falls; none without a gradient."""

        def lead(points: Tensor) -> list[Tensor]:
            first, second = self.logits(points).topk(2, dim=1).values.unbind(1)
            return [(first - second).sum()]

        for slope in _slopes(lead, images):
            yield self.lowest(images, slope)

    def lowest(self, image: Tensor, weights: Tensor) -> Tensor:
        """The points [R, *] of the balls of images [R, *], or of one, whose sums with weights are
        least.
        """
        if isinstance(self.eps, EVENTS):
            return self.eps.lowest(image, weights).to(image.dtype)
        corner = image.double() - self.eps * weights.sign()
        return inside_ball(image, corner, self.eps)

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


def _slopes(values: Callable[[Tensor], list[Tensor]], images: Tensor) -> Iterator[Tensor]:
    """Gradients of values at the images, of those that have one; none if autograd fails, as where
    weights are written to in the forward.
    """
    points = images.detach().clone().requires_grad_()
    try:
        with torch.enable_grad():
            found = [value for value in values(points) if value.requires_grad]
        for value in found:
            (slope,) = torch.autograd.grad(value, points, retain_graph=True, allow_unused=True)
            if slope is not None:
                yield slope
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError:
        return


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
