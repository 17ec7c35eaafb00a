"""Proofs by linear relaxation, and by branch and bound over undecided spikes."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

import torch
from torch import Tensor

from sj_robust.core.host import first_argument
from sj_robust.neuron.charging import Neuron
from sj_robust.proofs.joint import JointRun, OverTime
from sj_robust.proofs.moves import EVENTS, Events
from sj_robust.proofs.relaxation import Decision, Lower, Maps, RelaxedRun, raised

__all__ = ["Prover", "Rivals", "Searched", "inside_ball", "leads"]

_TURNS = 20
"""Turns of gradient ascent on the slopes."""

_STEPS = 20
"""Steps down the network's own gradient, from the corners of the first bounds."""

_PARTS = 16
"""Parts of a box that are taken at a time."""

_TOGETHER = 64
"""Parts of all boxes that are bounded together."""

_GRADIENT = 3
"""Back-substitutions that one with its gradient is worth."""

_OPERATIONS_PER_SECOND = 1e10
"""Work of a core; see :meth:`sj_robust.proofs.relaxation.Maps.work`."""

Spike = tuple[int, int, int]
"""Stage, step and number of the neuron in the layer."""


@dataclass(frozen=True)
class Rivals:
    """Bounds of the lead over every other class.

    Attributes:
        weights: Weights on the logits that give it, [N, K, classes].
        bounds: Its lower bounds, [N, K].
        broken: Images [1, *] of the boxes that are classified wrong, by number.
    """

    weights: Tensor
    bounds: Tensor
    broken: dict[int, Tensor]


@dataclass(frozen=True)
class Searched:
    """Lower bounds of the right class's lead, [N], and images [1, *] of the boxes that are
    classified wrong, by number.
    """

    lead: Tensor
    broken: dict[int, Tensor]


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
        every = torch.arange(len(images), device=labels.device)
        rows = every.repeat_interleave(classes - 1)
        weights = leads(labels, classes).flatten(0, 1)
        found = self._in_parts(run, rows, weights, 0)
        weak = (found <= 0).nonzero().squeeze(1)
        if len(weak):
            again = self._in_parts(run, rows[weak], weights[weak], _TURNS)
            found[weak] = torch.maximum(found[weak], again)
        return found.view(len(images), -1).amin(1)

    def bab(self, images: Tensor, labels: Tensor, time_limit: float) -> Searched:
        """Lower bounds of the right class's lead, or images of the boxes that are classified wrong.

        A box is cut by assuming a spike or ruling it out, the one first whose relaxation is
        loosest; the part with the lowest bound comes next. Parts of all images are bounded
        together. Every bound's worst corner is tried on the network.

        An image has as much work as a core does in the time, counted in back-substitutions, so that
        its result depends neither on the others nor on how busy the machine is. Half of it may go
        into the potentials of the whole box.
        """
        budget = max(1, int(time_limit * _OPERATIONS_PER_SECOND / self.maps.work()))
        run = self.run(images)
        rivals = self.rivals(run, images, labels)
        found = Searched(rivals.bounds.amin(1), dict(rivals.broken))
        open_ones = []
        for n in range(len(images)):
            proved = found.lead[n] > 0  # NaN proves nothing
            if n not in found.broken and not proved:
                open_ones.append(n)
        if not open_ones:
            return found
        some = torch.tensor(open_ones, device=images.device)
        images = images[some]
        labels = labels[some]
        run = self.run(images, maps=self.maps, most=budget // 4)  # each from below and from above
        parts_of_each = budget // (2 * _TURNS * _GRADIENT)
        searches = []
        for place, n in enumerate(open_ones):
            search = _Search(
                number=place,
                weights=rivals.weights[n],
                bounds=rivals.bounds[n],
                parts=parts_of_each,
            )
            searches.append(search)
        parts = _next_parts(searches)
        while parts:
            size = min(_TOGETHER, self.maps.rows_that_fit())
            for start in range(0, len(parts), size):
                self._bound(run, images, labels, parts[start : start + size])
            parts = _next_parts(searches)
        for search, n in zip(searches, open_ones, strict=True):
            if search.broken is not None:
                found.broken[n] = search.broken
            elif not search.failed:
                found.lead[n] = search.lead
        return found

    def run(self, images: Tensor, **known: Any) -> RelaxedRun:
        """Bounds of every potential; ``known`` is what a :class:`RelaxedRun` may be told beside
        joint bounds.
        """
        if self.over_time is not None and "known" not in known:
            joint = JointRun(self.maps.neurons, len(images), over_time=self.over_time)
            self.maps.bounded(joint, images, self.eps)
            known["known"] = joint.stages
        run = RelaxedRun(self.maps.neurons, len(images), **known)
        self.maps.tell_layouts(run)
        run.error = self.maps.bounded(run, images, self.eps).error
        return run

    def rivals(self, run: RelaxedRun, images: Tensor, labels: Tensor) -> Rivals:
        """Lower bounds of the lead over every rival, and images that :meth:`broken` found."""
        weights = leads(labels, run.error.shape[1])
        rows = torch.arange(len(images), device=images.device)
        rows = rows.repeat_interleave(weights.shape[1])
        parts = weights.flatten(0, 1)
        bounds = torch.empty(len(rows), dtype=torch.float64, device=images.device)
        broken: dict[int, Tensor] = {}
        size = self.maps.rows_that_fit()
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            found = raised(self.maps, run, rows[part], parts[part], rounds=_TURNS)
            bounds[part] = found.value
            wrong_ones = self.broken(found, images, labels, rows[part], descend=True)
            for n, point in wrong_ones.items():
                broken.setdefault(n, point)
        return Rivals(weights, bounds.view(len(images), -1), broken)

    def broken(
        self,
        found: Lower,
        images: Tensor,
        labels: Tensor,
        rows: Tensor,
        *,
        descend: bool = False,
    ) -> dict[int, Tensor]:
        """Images [1, *] of the boxes that the network gets wrong, by number, where the corners of
        the bounds of ``rows``, numbers of images, lead to one.

        With ``descend`` the corners go down the network's own gradient of the lead for some steps.
        """
        wrong_ones: dict[int, Tensor] = {}
        points = self.lowest(images[rows], found.weights)
        for _ in range(_STEPS if descend else 1):
            points.requires_grad_(descend)
            with torch.set_grad_enabled(descend):
                logits = self.logits(points)
            y = labels[rows]
            is_wrong = logits.argmax(1) != y
            for row in is_wrong.nonzero().squeeze(1).tolist():
                point = points.detach()[row : row + 1]
                wrong_ones.setdefault(int(rows[row]), point)
            if not logits.requires_grad:  # not asked for, or the network has none
                break
            label = y.unsqueeze(1)
            right = logits.gather(1, label).squeeze(1)
            rival = logits.scatter(1, label, -torch.inf).amax(1)
            total = (right - rival).sum()
            (slope,) = torch.autograd.grad(total, points, allow_unused=True)
            left = [k for k, n in enumerate(rows.tolist()) if n not in wrong_ones]
            if slope is None or not left:
                break
            rows = rows[left]
            slopes = slope[left].nan_to_num()
            points = self.lower(images[rows], points.detach()[left], slopes)
        return wrong_ones

    def points(self, images: Tensor) -> Iterator[Tensor]:
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

    def along_currents(self, images: Tensor) -> Iterator[Tensor]:
        """For one neuron in the first and one in the last call of every spiking layer, the corners
        to which its current falls and rises; none where there is no gradient.

        In a random corner the parts of such a sum cancel one another.
        """
        generator = torch.Generator().manual_seed(0)

        def currents(points: Tensor) -> list[Tensor]:
            found: list[Tensor] = []
            with _noted_currents(self.maps.neurons.values()) as noted:
                self.logits(points)
            for calls in noted:
                first_and_last = calls if len(calls) < 2 else [calls[0], calls[-1]]
                for rows in first_and_last:
                    number = torch.randint(rows.shape[1], (1,), generator=generator)
                    found.append(rows[:, int(number)].sum())
            return found

        for slope in _slopes(currents, images):
            yield self.lowest(images, slope)
            yield self.lowest(images, -slope)

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

    def _bound(
        self, root: RelaxedRun, images: Tensor, labels: Tensor, parts: list["_Part"]
    ) -> None:
        """Bound parts of boxes, and pass the results to their searches."""
        numbers = [part.search.number for part in parts]
        rows = torch.tensor(numbers, device=images.device)
        run = self.run(
            images[rows],
            known=root.stages,
            parts_of=rows,
            decisions=[part.decisions for part in parts],
        )
        every = torch.arange(len(parts), device=images.device)
        of_rivals = [part.search.weights[part.search.rival] for part in parts]
        weights = torch.stack(of_rivals)
        found = raised(self.maps, run, every, weights, rounds=_TURNS)
        broken = self.broken(found, images, labels, rows)
        values = found.value.masked_fill(run.empty, torch.inf).tolist()
        spikes = _loosest(run, found)
        for part, value, spike in zip(parts, values, spikes, strict=True):
            part.search.learn(part, value, spike)
        for number, point in broken.items():
            for part in parts:
                if part.search.number == number:
                    part.search.broken = point

    def _in_parts(self, run: RelaxedRun, rows: Tensor, weights: Tensor, turns: int) -> Tensor:
        """Bounds of rows, as many at a time as fit."""
        size = self.maps.rows_that_fit()
        values = []
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            found = raised(self.maps, run, rows[part], weights[part], rounds=turns)
            values.append(found.value.detach())
        return torch.cat(values)


def _next_parts(searches: list["_Search"]) -> list["_Part"]:
    """The parts that all searches ask for next."""
    parts = []
    for search in searches:
        parts += search.next_ones()
    return parts


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


@contextmanager
def _noted_currents(neurons: Iterable[Neuron]) -> Iterator[list[list[Tensor]]]:
    """Context in which the currents of spiking layers are noted, call by call, as [N, values]."""
    noted: list[list[Tensor]] = []
    with ExitStack() as stack:
        for neuron in neurons:
            calls: list[Tensor] = []
            noted.append(calls)

            def note(
                module: Any, args: Any, kwargs: dict[str, Any], calls: list[Tensor] = calls
            ) -> None:
                x = first_argument(args, kwargs)
                calls.append(x.movedim(1 if module.step_mode == "m" else 0, 0).flatten(1))

            hook = neuron.module.register_forward_pre_hook(note, with_kwargs=True)
            stack.callback(hook.remove)
        yield noted


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


def leads(labels: Tensor, classes: int) -> Tensor:
    """Weights on the logits that give the right class's lead over every other one, [N, classes - 1,
    classes].
    """
    every = torch.eye(classes, dtype=torch.float64, device=labels.device)
    right = every[labels]
    leads = right.unsqueeze(1) - every
    return leads[right == 0].view(len(labels), classes - 1, classes)


def _loosest(run: RelaxedRun, found: Lower) -> list[Spike | None]:
    """For every row the undecided spike whose relaxation leaves the largest gap; None if there is
    none.
    """
    steps = list(found.gaps)
    if not steps:
        return [None] * len(found.value)
    gaps = []
    neurons = []
    for stage, t in steps:
        step = run.stages[stage].steps[t]
        undecided = step.quiet & step.fires
        gap_of_undecided = found.gaps[stage, t].masked_fill(~undecided, -1.0)
        gap, neuron = gap_of_undecided.flatten(1).max(1)
        gaps.append(gap)
        neurons.append(neuron)
    largest, place = torch.stack(gaps).max(0)
    of_steps = torch.stack(neurons)
    of_place = of_steps.gather(0, place.unsqueeze(0)).squeeze(0)
    spikes: list[Spike | None] = []
    rows = zip(largest.tolist(), place.tolist(), of_place.tolist(), strict=True)
    for gap, number, neuron in rows:
        stage, t = steps[number]
        spikes.append((stage, t, neuron) if gap >= 0 else None)
    return spikes


@dataclass(frozen=True)
class _Part:
    """A part of the box of an image: that of some decisions on spikes."""

    search: "_Search"
    decisions: tuple[Decision, ...]


class _Search:
    """Branch and bound on one image, rival by rival, the one that is closest to its proof first.

    Attributes:
        number: Number of the image.
        weights: Weights of the lead over every rival, [K, classes].
        rival: The one that is searched.
        lead: Lower bound of the lead over the rivals that are proved.
        failed: Whether the work was not enough, or rounding leaves a part open.
        broken: An image of the box that is classified wrong.
        left: Parts that may still be bounded.
    """

    def __init__(self, number: int, weights: Tensor, bounds: Tensor, parts: int) -> None:
        self.number = number
        self.weights = weights
        values = bounds.tolist()
        proved = [value for value in values if value > 0]
        self.lead = min(proved, default=torch.inf)
        order = bounds.argsort(descending=True).tolist()
        self._rivals = [k for k in order if not values[k] > 0]  # NaN proves nothing
        self.failed = False
        self.broken: Tensor | None = None
        self.left = parts
        self._asked = 0
        self._count = 0
        self._waiting: list[tuple[float, int, tuple[Decision, ...]]] = []
        self._next_rival()

    @property
    def done(self) -> bool:
        """Whether the search is finished."""
        return self.failed or self.broken is not None or not self._rivals

    def next_ones(self) -> list[_Part]:
        """The parts with the lowest bounds; none if the search is done."""
        if self.done:
            return []
        number = min(_PARTS, self.left, len(self._waiting))
        if not number:
            self.failed = True
        self.left -= number
        self._asked = number
        parts = []
        for _ in range(number):
            _, _, decisions = heappop(self._waiting)
            parts.append(_Part(self, decisions))
        return parts

    def learn(self, part: _Part, value: float, spike: Spike | None) -> None:
        """Record the bound of a part, and split it at a spike if it is not proved."""
        self._asked -= 1
        if value > 0:
            self.lead = min(self.lead, value)
        elif spike is None:  # all spikes are decided, and still rounding leaves it open
            self.failed = True
        else:
            for fires in (False, True):
                self._wait(value, (*part.decisions, Decision(*spike, fires)))
        if not self._asked and not self._waiting:
            self._rivals.pop(0)
            self._next_rival()

    def _next_rival(self) -> None:
        if self._rivals:
            self.rival = self._rivals[0]
            self._wait(-torch.inf, ())

    def _wait(self, value: float, decisions: tuple[Decision, ...]) -> None:
        heappush(self._waiting, (value, self._count, decisions))
        self._count += 1
