"""Bounds that hold together over time: of spike trains and counts, not of single spikes."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sj_robust.neuron.charging import Neuron
from sj_robust.ops.trains.config import Currents, StepBounds, Windows
from sj_robust.ops.trains.reference import bounded_steps
from sj_robust.proofs.bounds import BoundedRun, LayerCall
from sj_robust.proofs.changes import Changes, changed_sums, share_frames
from sj_robust.proofs.maps import Maps
from sj_robust.proofs.moves import Shifts
from sj_robust.proofs.neurons import counts
from sj_robust.proofs.program import Operation, Program, Value
from sj_robust.proofs.rounding import SLACK, charge_rounding
from sj_robust.proofs.spiking import Centred, Float32Spiking, Interval, SpikingBounds
from sj_robust.proofs.structure import (
    ReadCall,
    Structure,
    are_same,
    are_steps,
    by_step,
    in_layout,
)
from sj_robust.proofs.values import Bounds, bounds_of, reshaped
from sj_robust.proofs.windows import (
    KEPT,
    ListedTrains,
    Memory,
    SpikeTrains,
    Steps,
    check_finite,
    constants_of,
    in_float32,
    kept_steps,
    possible_trains,
    stacked,
    weighted_sums,
)

__all__ = ["JointRun", "MappedSums", "OverTime"]

_ELEMENTS = 2**22
"""Elements of the windows of all layers that a run holds."""


_Kind = Literal["constant", "steps"]


class OverTime:
    """How the affine maps of a network treat time, found out by runs on random leaves.
    网络的仿射映射如何处理时间。

    The current of a spiking layer is ``"constant"``, one number for all steps, or in step t the
    same map ``x[t] = A s[t] + b`` of earlier spikes (``"steps"``). The logits are of counts if they
    are a function of the images and of means over all steps. Whatever else a current or the logits
    are, such as the sum of an image and spikes, is bounded step by step.

    Attributes:
        kinds: ``"constant"``, ``"steps"`` or None by layer.
        steps: Time steps of each layer, over all its calls.
        counts: Whether the logits are of counts.
        counted: Layers of which nothing but the counts is asked.
        stepwise: Layers, and the output, that get bounds of single steps, with the reason.
        images: Number of images that a run holds in memory.

    Args:
        maps: The affine maps of the network.
        T: Time steps.
    """

    def __init__(self, maps: Maps, T: int) -> None:
        """Read the program; see the class."""
        self.neurons = maps.neurons
        self.T = T
        self.maps = maps
        self._structure = maps.structure()
        self._framed: Structure | None = None
        *calls, output = self._structure.calls
        self.counts = output.is_of_counts(T)
        self.steps = dict.fromkeys(maps.neurons, 0)
        for call in calls:
            if call.by is not None:
                self.steps[call.by] += len(call.step)
        self.kinds: dict[str, _Kind | None] = {}
        self.stepwise = tuple(self._find_kinds(calls))
        asked = frozenset().union(*[call.leaves for call in calls])
        self.counted = set(maps.neurons) if self.counts else set()
        for call in calls:
            if call.leaf in asked:
                self.counted.discard(str(call.by))
        windows = min(T, KEPT) + 1
        self.images = max(1, 2 * _ELEMENTS // (self._structure.elements * windows))
        self._trains: dict[tuple[str, int, float, float], ListedTrains | None] = {}

    def _find_kinds(self, every: list[ReadCall]) -> Iterator[str]:
        """Fill ``kinds``; gives what has bounds of single steps, with the reason."""
        pooled = {call.leaf for call in every if call.by is None}
        for name in self.neurons:
            calls = [call for call in every if call.by == name]
            if not calls:
                continue
            before = frozenset().union(*[call.leaves for call in calls])
            kind = _kind(calls)
            if kind == "steps" and not _run_together(calls, self._structure.steps_of_leaf):
                self.kinds[name] = None
                yield f"{name}: it takes other numbers of time steps per call than what it gets"
                continue
            self.kinds[name] = kind
            if before & pooled:
                yield f"{name}: after a maximum, a product or another function"
            elif self.kinds[name] is None and before != {0}:
                yield f"{name}: its current is no map of spikes of one step"
        if not self.counts:
            yield "the output: it is no map of counts"

    def is_frame_by_frame(self, name: str) -> bool:
        """Whether the current of a layer in step t is the same map of frame t, but for its shift,
        for all t; asked of event frames [N, T, *].
        """
        if self._framed is None:
            self._framed = self.maps.structure(framed=True)
        calls = [call for call in self._framed.calls if call.by == name]
        steps = sum(len(call.step) for call in calls)
        return (
            steps == self.maps.frame.shape[0]
            and all(call.leaves == {0} for call in calls)
            and are_steps(calls)
        )

    def trains(
        self, spiking: SpikingBounds, T: int, *, current: Interval, error: float
    ) -> ListedTrains | None:
        """The trains of a layer for constant currents and errors up to the next powers of two."""
        largest = _power_of_two(float(current.size().max()))
        error = _power_of_two(error)
        key = (spiking.neuron.name, T, largest, error)
        if key not in self._trains:
            device = current.low.device
            self._trains[key] = possible_trains(
                spiking, T, largest=largest, error=error, device=device
            )
        return self._trains[key]


class JointRun(BoundedRun):
    """A run whose layers bound sums over time of spikes, beside every spike alone.

    A layer's bounds are never wider than those of :class:`BoundedRun`, with which they are
    intersected.

    Args:
        neurons: Neurons of known dynamics by name.
        samples: Number of samples.
        over_time: How the network treats time.
    """

    def __init__(
        self,
        neurons: dict[str, Neuron],
        samples: int,
        *,
        over_time: OverTime,
        **given: Any,
    ) -> None:
        """Nothing has run yet; ``given`` is what a :class:`BoundedRun` may be told."""
        super().__init__(neurons, samples, **given)
        self.over_time = over_time
        self.layer_calls: list[LayerCall] = []
        self.memories = {name: Memory(SpikeTrains(Windows(KEPT))) for name in neurons}
        self.changes: dict[str, list[Changes]] = {name: [] for name in neurons}
        """What changed events can do to the current of each step so far."""
        self.sources: list[SpikeTrains | Steps | None] = []
        """What gives bounds of sums over time of each leaf; None for the images."""

    def leaf(self, values: Interval, batch_dim: int) -> Bounds:
        """See :class:`BoundedRun`."""
        by = None if self.operation is None else self.operation.func
        if self.operation is None:
            self.sources.append(None)
        elif isinstance(by, Neuron) and counts(by) is None:
            self.sources.append(self.memories[by.name].trains)
        else:
            in_time = partial(by_step, samples=self.samples, batch_dim=batch_dim)
            self.sources.append(Steps(values.each(in_time)))
        return super().leaf(values, batch_dim)

    @torch.no_grad()
    def spikes(self, neuron: Neuron, x_seq: Interval) -> Interval:
        """See :class:`BoundedRun`."""
        if counts(neuron) is not None:  # integers are bounded step by step
            return super().spikes(neuron, x_seq)
        name = neuron.name
        memory = self.memories[name]
        layer = self.layers[name]
        call = self.layer_calls[-1]
        first = memory.trains.steps
        spiking = Float32Spiking(neuron, layer)
        current = self._current(call)
        error = by_step(call.current.error, self.samples, call.batch_dim)
        memory.currents += current.steps()
        memory.rounded += x_seq.steps()
        memory.errors += error
        memory.error = max(memory.error, float(error.max()))
        self.changes[name] += self._changes(call, len(error))
        if self.has_chain(spiking):
            memory.known += self._chain(spiking, memory).steps()
        found = self._bounded(spiking, memory)
        shape = current.low.shape[1:]
        steps = kept_steps(found, shape)[first:]
        for step in steps:
            memory.steps.append(step)
            memory.trains.spikes.append(step.spikes)
            layer.undecided.append(float(step.spikes.width().sum()))
            width = step.h.width().square().sum()
            layer.width.append(float(width))
        layer.neurons = shape.numel()
        layer.steps += len(steps)
        return stacked([step.spikes for step in steps])

    def _bounded(self, spiking: Float32Spiking, memory: Memory) -> StepBounds:
        """Bounds of all steps so far, [T, M], from the start on."""
        trains = memory.trains
        constants = constants_of(spiking, len(memory.currents))
        x = _rows(memory.rounded)
        errors = torch.stack([error.flatten() for error in memory.errors])
        if spiking.head_start:
            constants = replace(constants, gains=(1.0, *constants.gains[1:]))
            x, errors = _with_head_start(spiking, x, errors)
        check_finite(x, constants)
        currents = Currents(low=x.low, high=x.high)
        if memory.known:
            known = _rows(memory.known)
            currents = replace(currents, known_low=known.low, known_high=known.high)
        found = bounded_steps(currents, constants, trains.windows)
        if trains.steps == 0:
            trains.open = self.windowed(spiking.neuron.name, found)
        if not trains.open.numel():
            return found
        some = trains.open
        sums = self._all_sums(spiking, some, first=trains.steps)
        of_some = {}
        for name, part in vars(currents).items():
            if part is not None:
                of_some[name] = part.index_select(1, some)
        with_sums = Currents(
            **of_some,
            error=errors.index_select(1, some),
            sums_low=sums.low,
            sums_high=sums.high,
        )
        tighter = bounded_steps(with_sums, constants, trains.windows)
        trains.sure_cases = tighter.sure_cases
        trains.possible_cases = tighter.possible_cases
        for name, part in vars(found).items():
            if part.numel():
                part.index_copy_(1, some, getattr(tighter, name))
        return found

    def windowed(self, name: str, found: StepBounds) -> Tensor:
        """Numbers of the neurons that get windows: those with an undecided spike, or all of them
        if more calls follow.
        """
        undecided = (found.sure != found.possible).any(0)
        if len(found.sure) < self.over_time.steps[name]:
            undecided = torch.ones_like(undecided)
        return undecided.nonzero().squeeze(1)

    def lead(self, logits: Bounds, y: Tensor) -> Tensor:
        """See :class:`BoundedRun`; the smaller of it and of what spike counts give, for each
        class.
        """
        alone = super().lead(logits, y)
        if not self.over_time.counts:
            return alone
        return torch.minimum(alone, self._lead_of_counts(logits, y))

    def _reached(self, call: LayerCall) -> None:
        self.layer_calls.append(replace(call, current=call.current.same()))

    def _current(self, call: LayerCall) -> Interval:
        """Bounds of a current in exact arithmetic, [steps, N, *]."""
        x = call.current
        exact = Interval(x.least, x.most)
        in_time = partial(by_step, samples=self.samples, batch_dim=call.batch_dim)
        return exact.each(in_time)

    def _sums(self, dynamics: SpikingBounds, some: Tensor | slice, *, first: int) -> Interval:
        """Bounds of the sums of every window that ends in a step from the first one on, for some
        of the neurons, [W, O]: as :meth:`Windows.listed` has them. One step alone has those of its
        current.
        """
        name = dynamics.neuron.name
        memory = self.memories[name]
        steps = len(memory.currents)

        def chosen(end: Tensor) -> Tensor:
            return end.flatten()[some]

        currents = [current.each(chosen) for current in memory.currents]
        like = currents[0].low
        gains = [_as_double(dynamics.tensor_gain_at(t)) for t in range(first, steps)]
        gain = torch.stack(gains).to(like)
        listed = memory.trains.windows.listed(steps)
        longer = [[a, t] for a, t in listed if a < t and t >= first]
        if not longer:
            return _multiples(gain, stacked(currents[first:]))
        weights = window_weights(dynamics, torch.tensor(longer), steps)
        weights = weights.to(like)
        kind = self.over_time.kinds[name]
        if kind == "constant":
            factors = weights.sum(1)
            repeated = currents[-1].each(lambda end: end.expand(len(factors), -1))
            sums = _multiples(factors, repeated)
        elif kind == "steps":
            mapped = self._through(weights, some)
            return self._joined(gain, currents[first:], mapped)
        else:
            sums = self._sums_of_events(name, weights, currents, chosen)
        single = stacked(currents[first:])
        return _together(_multiples(gain, single), sums)

    def _joined(self, gain: Tensor, currents: list[Interval], longer: "MappedSums") -> Interval:
        """Sums of single steps, of so many gains, and of longer windows."""
        single = _multiples(gain, stacked(currents))
        return _together(single, longer.ends(rounded=self.rounded))

    def _sums_of_events(
        self,
        name: str,
        weights: Tensor,
        currents: list[Interval],
        chosen: Callable[[Tensor], Tensor],
    ) -> Interval:
        """Bounds of sums of a current's steps; with one budget for all steps if events change."""
        changes = [step.moved(chosen, apart=False) for step in self.changes[name]]
        if len(changes) != len(currents):
            return weighted_sums(weights, stacked(currents))
        if self._are_moved(name):
            moved = self._moved_sums(weights, chosen)
        elif not isinstance(changes[0], Shifts) and self._have_one_budget(name, changes):
            moved = changed_sums(weights, changes)
        else:
            return weighted_sums(weights, stacked(currents))
        return _with_one_budget(weights, currents, changes, moved)

    def _are_moved(self, name: str) -> bool:
        """Whether events are moved in time and sums over time have one budget for them; if not,
        the result says so.
        """
        if self.changed is None or not isinstance(self.changed.changes, Shifts):
            return False
        if self.differentiable:  # training counts the budget of each step
            return False
        if self.over_time.is_frame_by_frame(name):
            return True
        self.apart[name] = "its current in a time step is not the same map of one frame in all"
        return False

    def _moved_sums(
        self, weights: Tensor, chosen: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """How far sums over time can rise and fall if events are moved, of some of the neurons.

        What moves do to a sum stands in the place of a frame and goes through the map of the
        frames: as many sums at a time as the call has steps.
        """
        assert self.changed is not None
        entering = self.changed.changes
        assert isinstance(entering, Shifts)
        call = self.layer_calls[-1]
        program, _ = self._map_to_current()
        frames = self.changed.centre.shape[1]
        steps = len(by_step(call.current.radius, self.samples, call.batch_dim))
        first = weights.shape[1] - steps
        every = F.pad(weights, (0, frames - weights.shape[1]))
        nothing = torch.zeros_like(self.changed.radius)
        rises: list[Tensor] = []
        falls: list[Tensor] = []
        for some in torch.split(every, steps):
            places = every.new_zeros(frames, frames)
            places[first : first + len(some)] = some
            exact = self._other_run()
            exact.rounded = False
            shifts = entering.over_time(places)
            entered = Bounds(nothing, nothing, run=exact, changes=shifts)
            found = _mapped(program, {None: entered}).changes
            assert found is not None
            raised = by_step(found.raised(), self.samples, call.batch_dim)
            lowered = by_step(found.lowered(), self.samples, call.batch_dim)
            rises += map(chosen, raised[: len(some)])
            falls += map(chosen, lowered[: len(some)])
        return torch.stack(rises), torch.stack(falls)

    def _all_sums(self, dynamics: SpikingBounds, some: Tensor | slice, *, first: int) -> Interval:
        """The same of all windows so far, those of earlier calls among them."""
        memory = self.memories[dynamics.neuron.name]
        listed = memory.trains.windows.listed(len(memory.currents))
        new = [(a, t) for a, t in listed if t >= first]
        sums = self._sums(dynamics, some, first=first)
        if dynamics.head_start:
            sums = _from_the_start(dynamics, sums, torch.tensor(new))
        memory.sums.append(sums)
        memory.summed += new
        if len(memory.sums) == 1:
            return memory.sums[0]
        every = _together(*memory.sums)
        row = {window: number for number, window in enumerate(memory.summed)}
        numbers = [row[window] for window in listed]
        order = torch.tensor(numbers, device=every.low.device)
        return every.each(lambda end: end[order])

    def _changes(self, call: LayerCall, steps: int) -> list[Changes]:
        """What changed events can do in the steps of a call; nothing where it is not known."""
        changes = call.current.changes
        if changes is None:
            return []

        def step(part: Tensor, t: int) -> Tensor:
            return by_step(part, self.samples, call.batch_dim)[t]

        return [changes.moved(partial(step, t=t), apart=False) for t in range(steps)]

    def _have_one_budget(self, name: str, changes: list[Changes]) -> bool:
        """Whether the steps of a layer's current can have one budget of changed events; if not,
        the result says so.
        """
        shared = share_frames(changes)
        if shared:
            self.apart[name] = "an event changes its current in several steps"
        return not shared

    def _map_to(self, value: Value) -> tuple[Program, list[int]]:
        """What leads from leaves to a value of the program, and the numbers of these leaves."""
        begins = {leaf.operation: number for number, leaf in enumerate(self.leaves)}
        program = self.program.behind(begins, value)
        numbers = [begins[operation] for operation in program.needed if operation in begins]
        return program, [*([0] if program.takes_input else []), *numbers]

    def _map_to_current(self) -> tuple[Program, list[int]]:
        """The same of the current of the layer that is called now."""
        assert self.operation is not None
        return self._map_to(self.operation.values[0])

    def _other_run(self) -> BoundedRun:
        """One in which operations run again."""
        other = BoundedRun(self.neurons, self.samples, differentiable=self.differentiable)
        other.dtype = self.dtype
        return other

    def _lead_of_counts(self, logits: Bounds, y: Tensor) -> Tensor:
        """What the bounds of spike counts give."""
        program, numbers = self._map_to(self.program.output)
        means = self._other_run()
        leaves = {}
        begun: dict[int, Bounds] = {}
        for number in numbers:
            leaves[self.leaves[number].operation] = self._mean_leaf(number, means, begun)
        found = _mapped(program, leaves)
        joint = Bounds(found.centre, found.radius, logits.error, means)
        return means.lead(joint, y)

    def _mean_leaf(self, number: int, means: BoundedRun, begun: dict[int, Bounds]) -> Bounds:
        """The mean over time of a leaf in the place of all its steps; one for all calls of a layer,
        which ``begun`` keeps.
        """
        leaf = self.leaves[number]
        source = self.sources[number]
        if source is None:
            with torch.set_grad_enabled(self.differentiable):
                ends = Interval(leaf.centre - leaf.radius, leaf.centre + leaf.radius)
            return means.leaf(ends, leaf.batch_dim)
        if id(source) not in begun:
            T = self.over_time.T
            shares = leaf.centre.new_full((1, T), 1.0 / T)
            with torch.set_grad_enabled(self.differentiable):
                mean = source.bounds(shares)
            first_row = mean.each(lambda end: end[0])
            begun[id(source)] = means.leaf(first_row, 0)
        mean_of_each = begun[id(source)]
        shape = by_step(leaf.radius, self.samples, leaf.batch_dim).shape

        def placed(part: Tensor) -> Tensor:
            return in_layout(part.expand(shape), leaf.batch_dim)

        return Bounds(placed(mean_of_each.centre), placed(mean_of_each.radius), run=means)

    def has_chain(self, dynamics: SpikingBounds) -> bool:
        """Whether a layer's trains are those of a constant current from rest on."""
        is_constant = self.over_time.kinds[dynamics.neuron.name] == "constant"
        return is_constant and not dynamics.head_start

    def _chain(self, dynamics: SpikingBounds, memory: Memory) -> Interval:
        """Spikes [steps of this call, N, *] of the trains that a constant current can cause."""
        memory.trains.chain = None
        current = memory.currents[-1]
        T = len(memory.currents)
        first = memory.trains.steps
        shape = (T - first, *current.low.shape)
        trains = self.over_time.trains(
            dynamics,
            T,
            current=current.widened(memory.error),
            error=memory.error,
        )
        if trains is None:
            nothing = current.low.new_zeros(shape)
            return Interval(nothing, nothing + 1)
        chain = trains.chain(current.each(torch.flatten))
        memory.trains.chain = chain
        every = torch.eye(T, dtype=torch.float64, device=current.low.device)
        spikes = chain.bounds(every[first:])
        return spikes.each(lambda end: end.view(shape))

    def _through(self, weights: Tensor, some: Tensor | slice = slice(None)) -> "MappedSums":
        """Bounds of weighted sums of the current's steps, from those of earlier spikes, of some of
        the neurons: [F, O].

        The map of a step is the same for sums of steps, but for its shift, which counts
        ``sum_t weights[f, t]`` times. As many sums as the call has steps take the steps' places; a
        sum without weights is the shift alone.
        """
        call = self.layer_calls[-1]
        program, numbers = self._map_to_current()
        steps = len(by_step(call.current.radius, self.samples, call.batch_dim))
        places = steps * (len(weights) // steps + 1)
        without = weights.new_zeros(places - len(weights), weights.shape[1])
        padded = torch.cat([weights, without])
        exact = self._other_run()
        exact.rounded = False
        exact.narrow = self.rounded and self.dtype == torch.float32
        leaves = {}
        for number in numbers:
            leaves[number] = self._weighted(number, padded, exact, steps)

        def chosen(part: Tensor) -> Tensor:
            # in float32 the ends would be rounded once more
            rows = by_step(part, self.samples, call.batch_dim).flatten(1)
            return rows[:, some].to(weights)

        centres = []
        radii = []
        for turn in range(places // steps):
            taken = {self.leaves[number].operation: one[turn] for number, one in leaves.items()}
            found = _mapped(program, taken)
            centres.append(chosen(found.centre))
            radii.append(chosen(found.radius))
        return MappedSums(
            centre=torch.cat(centres),
            radius=torch.cat(radii),
            shares=weights.sum(1) - 1.0,
        )

    def _weighted(self, number: int, weights: Tensor, run: BoundedRun, steps: int) -> list[Bounds]:
        """Bounds of weighted sums of a leaf's steps, so many at a time in the steps' place; zeros
        for images, which have no weight in this map.
        """
        leaf = self.leaves[number]
        source = self.sources[number]
        if source is None:
            nothing = torch.zeros_like(leaf.radius)
            if run.narrow:
                nothing = nothing.float()
            return [Bounds(nothing, nothing, run=run)] * (len(weights) // steps)
        if run.narrow:
            sums = in_float32(source.bounds(weights), SLACK)
        else:
            sums = source.centred(weights)
            if self.rounded:
                sums = Centred(sums.centre, SLACK * sums.radius)
        found = []
        centres = torch.split(sums.centre, steps)
        radii = torch.split(sums.radius, steps)
        for centre, radius in zip(centres, radii, strict=True):
            laid_centre = in_layout(centre, leaf.batch_dim)
            laid_radius = in_layout(radius, leaf.batch_dim)
            assert laid_radius.shape == leaf.radius.shape  # see _run_together
            found.append(Bounds(laid_centre, laid_radius, run=run))
        return found


def _mapped(program: Program, leaves: dict[Operation | None, Bounds]) -> Bounds:
    """What a program makes of leaves, by the operations that give them; None is the input."""

    def apply(operation: Operation, args: Any, kwargs: Any) -> Any:
        if operation in leaves:
            return reshaped(leaves[operation], operation.shape)
        return bounds_of(operation.func, *args, **kwargs)

    found: Bounds = program.run(leaves.get(None), apply)
    return found


@dataclass(frozen=True)
class MappedSums:
    """Sums over time behind the map of a step, the last of which have no weights.

    Attributes:
        centre: Middle of the sums with the map's shift once, [places, O].
        radius: How far they can be from it.
        shares: How often the shift counts beyond that, [F].
    """

    centre: Tensor
    radius: Tensor
    shares: Tensor

    def ends(self, *, rounded: bool) -> Interval:
        """Bounds of the F sums with weights; those of the shift have a radius if that rounds."""
        number = len(self.shares)
        shares = self.shares.unsqueeze(1)
        middle = torch.addcmul(self.centre[:number], shares, self.centre[-1:])
        width = self.radius[:number]
        if rounded:
            width = torch.addcmul(width, shares.abs(), self.radius[-1:])
        return Interval(middle - width, middle + width)


def _together(*parts: Interval) -> Interval:
    """The rows of all parts."""
    low = torch.cat([part.low for part in parts])
    high = torch.cat([part.high for part in parts])
    return Interval(low, high)


def _rows(steps: list[Interval]) -> Interval:
    """Steps [N, *] as [T, M]."""
    return stacked(steps).each(lambda end: end.flatten(1))


def _kind(calls: list[ReadCall]) -> _Kind | None:
    """How a layer's current depends on time; see :class:`OverTime`."""
    if any(call.form.shape[1:] != calls[0].form.shape[1:] for call in calls):
        return None
    if are_same(calls):
        return "constant"
    return "steps" if are_steps(calls) and not any(call.mixed for call in calls) else None


def _run_together(calls: list[ReadCall], steps_of_leaf: dict[int, int]) -> bool:
    """Whether every call of a layer has as many steps as each leaf but the images that it depends
    on, so that sums of the leaf's steps can stand in their place.
    """
    numbers = [(len(call.step), call.leaves - {0}) for call in calls]
    return all(steps_of_leaf[leaf] == steps for steps, leaves in numbers for leaf in leaves)


def _power_of_two(value: float) -> float:
    """The next larger one; 0 for 0, such as the error of a current that is the image itself."""
    return math.ldexp(1.0, math.frexp(value)[1]) if value else 0.0


def window_weights(dynamics: SpikingBounds, windows: Tensor, steps: int) -> Tensor:
    """Weight of every step's current in the potential at the end of each window (a, t), [W, steps],
    with the graph of the neuron's gains and decay.
    """
    charging = dynamics.charging
    gains = []
    for k in range(steps):
        gain = dynamics.tensor_gain_at(k)
        gains.append(_as_double(gain))
    decay = _as_double(charging.decay)
    number = torch.arange(steps)
    first = windows[:, :1]
    age = windows[:, 1:] - number
    inside = (age >= 0) & (number >= first)
    kept = decay ** age.clamp(min=0)
    return inside * kept * torch.stack(gains)


def _from_the_start(dynamics: SpikingBounds, sums: Interval, windows: Tensor) -> Interval:
    """Sums of windows (a, t) with what is left of the potential before the first step."""
    kept = _as_double(dynamics.charging.decay) ** (windows[:, 1] + 1) * (windows[:, 0] == 0)
    left = (dynamics.initial - dynamics.rest) * kept.unsqueeze(1).to(sums.low)
    return Interval(sums.low + left, sums.high + left)


def _with_head_start(
    spiking: Float32Spiking, x: Interval, errors: Tensor
) -> tuple[Interval, Tensor]:
    """Currents and their errors, both [T, M], of a neuron that starts at rest and has a gain of 1
    in the first step, if it charges there what this one does, with what float32 rounds of it.
    """
    gain = spiking.gain_at(0)
    charged = _multiples(errors.new_tensor([gain]), Interval(x.low[:1], x.high[:1]))
    rounded = charge_rounding(charged.size() + abs(spiking.initial) + abs(spiking.rest))
    low = charged.low + spiking.head_start - rounded
    high = charged.high + spiking.head_start + rounded
    first_error = abs(gain) * errors[:1] + rounded
    every = Interval(torch.cat([low, x.low[1:]]), torch.cat([high, x.high[1:]]))
    return every, torch.cat([first_error, errors[1:]])


def _with_one_budget(
    weights: Tensor,
    currents: list[Interval],
    changes: list[Changes],
    moved: tuple[Tensor, Tensor],
) -> Interval:
    """Bounds of sums of a current's steps, which rise and fall by so much if one budget of changed
    events is for all steps.
    """
    rises, falls = moved
    centres = []
    for x, step in zip(currents, changes, strict=True):
        centres.append(x.low + step.lowered())
    centre = torch.tensordot(weights, torch.stack(centres), 1)
    return Interval(centre - falls, centre + rises)


def _as_double(value: float | Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).cpu()


def _multiples(factors: Tensor, values: Interval) -> Interval:
    """Bounds of every factor times its values, [F, O] each; a negative one swaps the ends."""
    scales = factors.unsqueeze(1)
    swapped = scales < 0
    low = values.low
    high = values.high
    if swapped.any():
        low = torch.where(swapped, values.high, values.low)
        high = torch.where(swapped, values.low, values.high)
    return Interval(scales * low, scales * high)
