"""Proofs by linear relaxation, and by branch and bound over undecided spikes."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

import torch
from torch import Tensor

from sj_robust.proofs.joint import JointRun, OverTime
from sj_robust.proofs.moves import EVENTS, Events
from sj_robust.proofs.relaxation import Decision, Lower, Maps, RelaxedRun, raised

__all__ = ["Prover", "inside_ball", "leads"]

_TURNS = 20
"""Turns of gradient ascent on the slopes."""

_STEPS = 20
"""Steps down the network's own gradient, from the corners of the first bounds."""

_PARTS = 16
"""Parts of a box that are bounded together."""


@dataclass
class Prover:
    """Tighter bounds than intervals of the lead of the right class, and the search for images that
    break it.

    Attributes:
        logits: The network that runs, images to logits.
        maps: The affine maps between its leaves.
        eps: Linf radius, or what may happen to event frames.
        over_time: How the network treats time, if joint bounds of the potentials are to be known.
    """

    logits: Callable[[Tensor], Tensor]
    maps: Maps
    eps: float | Events
    over_time: OverTime | None = None

    def crown(self, images: Tensor, labels: Tensor) -> Tensor:
        """Lower bound of the right class's lead, [N]: slopes are raised for whom the first ones do
        not do.
        """
        run = self.run(images)
        classes = run.error.shape[1]
        rows = torch.arange(len(images), device=labels.device).repeat_interleave(classes - 1)
        weights = leads(labels, classes).flatten(0, 1)
        found = self._in_parts(run, rows, weights, 0)
        weak = (found <= 0).nonzero().squeeze(1)
        if len(weak):
            found[weak] = torch.maximum(
                found[weak], self._in_parts(run, rows[weak], weights[weak], _TURNS)
            )
        return found.view(len(images), -1).amin(1)

    def bab(self, image: Tensor, label: Tensor, time_limit: float) -> tuple[float, Tensor | None]:
        """Lower bound of the lead of one image [1, *], or an image of its box that is classified
        wrong.

        The box is cut by assuming a spike or ruling it out, the one first whose relaxation is
        loosest; the part with the lowest bound comes next. Every bound's worst corner is tried on
        the network.
        """
        end = time.monotonic() + time_limit
        run = self.run(image)
        weights, root, broken = self.rivals(run, image, label)
        if broken is not None:
            return -torch.inf, broken
        if bool((root > 0).all()):
            return float(root.min()), None
        if time.monotonic() < end - time_limit / 2:
            run = self.run(image, maps=self.maps, end=end - time_limit / 2)
        lead = min((value for value in root.tolist() if value > 0), default=torch.inf)
        for k in root.argsort(descending=True).tolist():
            if not root[k] > 0:  # NaN proves nothing
                bound, broken = self._branched(run, image, label, weights[k], end)
                if broken is not None:
                    return -torch.inf, broken
                if not bound > 0:
                    return float(root.min()), None
                lead = min(lead, bound)
        return lead, None

    def run(self, images: Tensor, **known: Any) -> RelaxedRun:
        """Bounds of every potential; ``known`` is what a :class:`RelaxedRun` may be told beside
        joint bounds.
        """
        if self.over_time is not None and "known" not in known:
            joint = JointRun(self.maps.neurons, len(images), over_time=self.over_time)
            self.maps.bounded(joint, images, self.eps)
            known["known"] = joint.stages
        run = RelaxedRun(self.maps.neurons, len(images), **known)
        run.error = self.maps.bounded(run, images, self.eps).error
        return run

    def rivals(
        self, run: RelaxedRun, image: Tensor, label: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Weights and lower bounds of the lead over every rival, and an image that :meth:`broken`
        found.
        """
        weights = leads(label, run.error.shape[1])[0]
        rows = torch.zeros(len(weights), dtype=torch.long, device=image.device)
        found = raised(self.maps, run, rows, weights, rounds=_TURNS)
        return weights, found.value, self.broken(found, image, label, descend=True)

    def broken(
        self, found: Lower, image: Tensor, label: Tensor, *, descend: bool = False
    ) -> Tensor | None:
        """An image [1, *] of the box that the network gets wrong, if the corners of the bounds lead
        to one.

        With ``descend`` the corners go down the network's own gradient of the lead for some steps.
        """
        points = self.lowest(image, found.weights)
        labels = label.expand(len(points))
        for _ in range(_STEPS if descend else 1):
            points.requires_grad_(descend)
            with torch.set_grad_enabled(descend):
                logits = self.logits(points)
            if bool((wrong := logits.argmax(1) != labels).any()):
                return points.detach()[wrong][:1]
            if not logits.requires_grad:  # not asked for, or the network has none
                return None
            right = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
            rival = logits.scatter(1, labels.unsqueeze(1), -torch.inf).amax(1)
            (slope,) = torch.autograd.grad((right - rival).sum(), points, allow_unused=True)
            if slope is None:
                return None
            points = self.lower(image, points.detach(), slope.nan_to_num())
        return None

    def points(self, images: Tensor) -> Iterator[Tensor]:
        """A corner and a random point of the ball of each image, and the images themselves."""
        generator = torch.Generator().manual_seed(0)
        if isinstance(self.eps, EVENTS):
            for _ in range(2):
                yield self.eps.drawn(images, generator)
            yield images
            return
        share = torch.rand(images.shape, generator=generator, dtype=torch.float64).to(images.device)
        for direction in (2.0 * share.round() - 1.0, 2.0 * share - 1.0):
            yield inside_ball(images, images.double() + self.eps * direction, self.eps)
        yield images

    def lowest(self, image: Tensor, weights: Tensor) -> Tensor:
        """The points [R, *] of the ball of an image [1, *] whose sums with weights are least."""
        if isinstance(self.eps, EVENTS):
            return self.eps.lowest(image, weights).to(image.dtype)
        return inside_ball(image, image.double() - self.eps * weights.sign(), self.eps)

    def lower(self, image: Tensor, points: Tensor, slopes: Tensor) -> Tensor:
        """Points of the ball a step down from these; of frames those that the slopes point to."""
        if isinstance(self.eps, EVENTS):
            return self.eps.lowest(image, slopes).to(image.dtype)
        return inside_ball(image, points.double() - self.eps / 4 * slopes.sign(), self.eps)

    def solution(self, image: Tensor, values: Tensor) -> Tensor:
        """The point of the ball next to the values that a program has found."""
        if isinstance(self.eps, EVENTS):
            return values.round().to(image.dtype)
        return inside_ball(image, values, self.eps)

    def _branched(
        self, root: RelaxedRun, image: Tensor, label: Tensor, weights: Tensor, end: float
    ) -> tuple[float, Tensor | None]:
        """Lower bound of one rival's distance, by branch and bound, or what breaks the image."""
        waiting: list[tuple[float, int, tuple[Decision, ...]]] = [(-torch.inf, 0, ())]
        lowest, count = torch.inf, 1
        while waiting:
            if time.monotonic() > end:
                return min(lowest, min(0.0, waiting[0][0])), None
            parts = [heappop(waiting)[2] for _ in range(min(_PARTS, len(waiting)))]
            rows = torch.arange(len(parts), device=image.device)
            run = self.run(
                image.expand(len(parts), *image.shape[1:]), known=root.stages, decisions=parts
            )
            found = raised(self.maps, run, rows, weights.expand(len(parts), -1), rounds=_TURNS)
            if (broken := self.broken(found, image, label)) is not None:
                return -torch.inf, broken
            for row, decisions in enumerate(parts):
                value = torch.inf if bool(run.empty[row]) else float(found.value[row])
                if value > 0:
                    lowest = min(lowest, value)
                    continue
                spike = _loosest(run, found, row)
                if spike is None:  # all spikes are decided, and still rounding leaves it open
                    return min(value, 0.0), None
                for fires in (False, True):
                    heappush(waiting, (value, count, (*decisions, (*spike, fires))))
                    count += 1
        return lowest, None

    def _in_parts(self, run: RelaxedRun, rows: Tensor, weights: Tensor, turns: int) -> Tensor:
        size = self.maps.rows_that_fit()
        return torch.cat(
            [
                raised(
                    self.maps, run, rows[i : i + size], weights[i : i + size], rounds=turns
                ).value.detach()
                for i in range(0, len(rows), size)
            ]
        )


def inside_ball(images: Tensor, points: Tensor, eps: float) -> Tensor:
    """Points in the precision of images [N, *] that are in the ball of each and in [0, 1]; one
    image may have several.
    """
    centre = images.double()
    rounded = points.clamp(centre - eps, centre + eps).clamp(0, 1).to(images.dtype)
    outside = (rounded.double() - centre).abs() > eps
    inward = torch.nextafter(rounded, images.expand_as(rounded))
    return torch.where(outside, inward, rounded)


def leads(labels: Tensor, classes: int) -> Tensor:
    """Weights on the logits that give the right class's lead over every other one, [N, classes - 1,
    classes].
    """
    every = torch.eye(classes, dtype=torch.float64, device=labels.device)
    leads = every[labels].unsqueeze(1) - every
    return leads[every[labels] == 0].view(len(labels), classes - 1, classes)


def _loosest(run: RelaxedRun, found: Lower, row: int) -> tuple[int, int, int] | None:
    """The undecided spike whose relaxation leaves the largest gap: stage, step and number."""
    best, spike = -1.0, None
    for (stage, t), gaps in found.gaps.items():
        step = run.stages[stage].steps[t]
        undecided = (step.quiet & step.fires)[row].flatten()
        open_gaps = gaps[row].flatten().masked_fill(~undecided, -1.0)
        gap, neuron = open_gaps.max(0)
        if float(gap) > best:
            best, spike = float(gap), (stage, t, int(neuron))
    return spike
