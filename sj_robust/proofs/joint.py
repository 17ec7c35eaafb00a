"""Bounds that hold together over time: of spike trains and counts, not of single spikes."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from sj_robust.neuron.charging import Neuron
from sj_robust.proofs.bounds import BoundedRun
from sj_robust.proofs.changes import Changes, changed_sums, share_frames
from sj_robust.proofs.opened import counts
from sj_robust.proofs.relaxation import Maps, Stage, Step, Trace
from sj_robust.proofs.rounding import SLACK
from sj_robust.proofs.rules import Bounds, Function, leaves_of, replayed
from sj_robust.proofs.spiking import Float32Spiking, Interval, Spiking
from sj_robust.proofs.trains import Trains, possible_trains
from sj_robust.proofs.windows import (
    KEPT,
    KeptSpiking,
    KeptStep,
    Memory,
    SpikeTrains,
    Steps,
    WindowedSpiking,
    stacked,
    weighted_sums,
)

__all__ = ["JointRun", "OverTime"]

_GAP = 1e-9
"""Relative difference that float64's rounding stays below; another map in another step does not."""

_FACTORS = 4096
"""Random numbers, one for each step of a layer; more steps begin anew."""

_SUMS = 4
"""Sums over time that are held against their bounds at a point."""

_ELEMENTS = 2**22
"""Elements of the windows of all layers that a run holds."""


_Kind = Literal["constant", "steps"]


def by_step(part: Tensor, samples: int, batch_dim: int) -> Tensor:
    """What the network lays out with its samples in ``batch_dim`` as [steps, N, *]."""
    if batch_dim == -1:
        return part.view(-1, samples, *part.shape[1:])
    return part if batch_dim == 1 else part.unsqueeze(0)


def in_layout(part: Tensor, batch_dim: int) -> Tensor:
    """The inverse of :func:`by_step`."""
    if batch_dim == -1:
        return part.flatten(0, 1)
    return part if batch_dim == 1 else part.squeeze(0)


def column(numbers: Tensor, like: Tensor) -> Tensor:
    """Numbers [F] as [F, 1, ..., 1], to be multiplied by values such as these."""
    return numbers.view(-1, *[1] * like.ndim)


@dataclass(frozen=True)
class _Call:
    """A call of a spiking layer or a max pooling in a trace.

    Attributes:
        by: Name of the layer; None for a max pooling.
        first: Time steps of the layer before this call.
        batch_dim: Of what reaches it.
        current: What reaches it, [steps, 1, *].
        leaves: Numbers of the leaves that it depends on.
        leaf: Number of the leaf that begins.
    """

    by: str | None
    first: int
    batch_dim: int
    current: Tensor
    leaves: set[int]
    leaf: int


class _TimedTrace(Trace):
    """A run on one sample in which a leaf has, in step t, ``factors[t]`` times random values that
    are the same for all steps.
    """

    def __init__(self, neurons: dict[str, Neuron], factors: Tensor) -> None:
        super().__init__(neurons, 1, torch.zeros_like)
        self.rounded = False
        self.factors = factors
        self.calls: list[_Call] = []
        self.pooled: set[int] = set()
        self.steps = dict.fromkeys(neurons, 0)
        self._values: dict[str, Tensor] = {}
        self._generator = torch.Generator().manual_seed(0)

    def _reached(self, x: Bounds, batch_dim: int, by: Neuron | Function) -> None:
        name = by.name if isinstance(by, Neuron) and counts(by) is None else None
        first = 0 if name is None else self.steps[name]
        centre = x.centre.detach()
        call = _Call(
            by=name,
            first=first,
            batch_dim=batch_dim,
            current=by_step(centre, 1, batch_dim),
            leaves=leaves_of(x.origin),
            leaf=len(self.leaves),
        )
        self.calls.append(call)
        if name is None:
            self.pooled.add(len(self.leaves))
        else:
            self.steps[name] += len(call.current)

    def leaf(self, values: Interval, batch_dim: int) -> Bounds:
        like = values.low
        if not self.leaves:
            drawn = self._drawn(like)
            return BoundedRun.leaf(self, Interval(drawn, drawn), batch_dim)
        call = self.calls[-1]
        steps = by_step(like, 1, batch_dim)
        one = self._drawn(steps[0])
        if call.by is not None:
            one = self._values.setdefault(call.by, one)
        factors = _factors_of(self.factors, call.first, len(steps))
        value = in_layout(column(factors, one) * one, batch_dim)
        return BoundedRun.leaf(self, Interval(value, value), batch_dim)

    def _drawn(self, like: Tensor) -> Tensor:
        drawn = torch.randn(
            like.shape,
            generator=self._generator,
            dtype=torch.float64,
        )
        return drawn.to(like.device)


class OverTime:
    """How the affine maps of a network treat time, found out by runs on random leaves.
    网络的仿射映射如何处理时间。

    Equation: the current of a spiking layer is ``"constant"``, one number for all steps, or in
    step t the same map ``x[t] = A s[t] + b`` of earlier spikes (``"steps"``). With random leaves
    ``s[t] = f[t] s`` and a random image, where f[t] are random numbers, these are::

        x[t] = x[0]   and   (x[t] - b[t]) / f[t] = (x[0] - b[0]) / f[0],   b[t] = b[0]

    The logits are of counts if they are the same for ``s[t] = mean(f) s``. Whatever else a current
    or the logits are, such as the sum of an image and spikes, is bounded step by step.

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
        """Run the network; see the class."""
        generator = torch.Generator().manual_seed(1)
        drawn = torch.rand(
            max(_FACTORS, T),
            generator=generator,
            dtype=torch.float64,
        )
        factors = drawn.to(maps.frame.device) + 0.5
        mean = factors[:T].mean()
        trace, logits = _traced(maps, factors)
        _, mean_logits = _traced(maps, mean.expand_as(factors))
        self.neurons = maps.neurons
        self.T = T
        self.counts = _alike(logits, mean_logits)
        self.steps = trace.steps
        self.kinds: dict[str, _Kind | None] = {}
        reasons: dict[str, str] = {}
        for name in maps.neurons:
            calls: list[_Call] = []
            shifts: list[Tensor] = []
            before: set[int] = set()
            for number, call in enumerate(trace.calls):
                if call.by == name:
                    calls.append(call)
                    shift = maps.shift(number, 1)
                    shifts.append(by_step(shift, 1, call.batch_dim))
                    before |= call.leaves
            if not calls:
                continue
            self.kinds[name] = _kind(calls, shifts, factors)
            if before & trace.pooled:
                reasons[name] = "behind a maximum, a product or another function"
            elif self.kinds[name] is None and before != {0}:
                reasons[name] = "its current is no map of spikes of one step"
        if not self.counts:
            reasons["the output"] = "it is no map of counts"
        self.stepwise = tuple(f"{name}: {reason}" for name, reason in reasons.items())
        asked: set[int] = set()
        for call in trace.calls:
            asked |= call.leaves
        self.counted = set(maps.neurons) if self.counts else set()
        for call in trace.calls:
            if call.leaf in asked:
                self.counted.discard(str(call.by))
        size = sum(leaf.centre.numel() for leaf in trace.leaves)
        windows = min(T, KEPT) + 1
        self.images = max(1, 2 * _ELEMENTS // (size * windows))
        self._trains: dict[tuple[str, int, float, float], Trains | None] = {}

    def trains(self, spiking: Spiking, T: int, *, current: Interval, error: float) -> Trains | None:
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
        self.stages: list[Stage] = []
        """What a relaxation starts from."""
        self.memories = {name: Memory() for name in neurons}
        self.changes: dict[str, list[Changes]] = {name: [] for name in neurons}
        """What changed events can do to the current of each step so far."""
        self.sources: list[SpikeTrains | Steps | None] = []
        """What gives bounds of sums over time of each leaf; None for the images."""
        self._by: Neuron | Function | None = None

    def leaf(self, values: Interval, batch_dim: int) -> Bounds:
        """See :class:`BoundedRun`."""
        if self._by is None:
            self.sources.append(None)
        elif isinstance(self._by, Neuron) and counts(self._by) is None:
            memory = self.memories[self._by.name]
            self.sources.append(memory.trains)
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
        stage = self.stages[-1]
        first = layer.steps
        current = self._current(stage)
        error = by_step(stage.current.error, self.samples, stage.batch_dim)
        memory.currents += current.steps()
        self.changes[name] += self._changes(stage, len(error))
        largest = float(error.max())
        memory.error = max(memory.error, largest)
        known = None
        if self.over_time.kinds[name] == "constant":
            known = self._chain(Float32Spiking(neuron, layer), memory)
        alone = KeptSpiking(neuron, layer, known=known)
        alone.run(x_seq)
        if first == 0:
            memory.trains.open = self._open(name, alone.steps)
        steps = alone.steps
        if memory.trains.open.numel():
            steps = self._with_windows(alone, x_seq, error)
        for t, step in enumerate(steps, first):
            memory.steps.append(step)
            memory.trains.spikes.append(step.spikes)
            undecided = step.spikes.width().sum()
            width = step.h.width().square().sum()
            layer.undecided[t] = float(undecided)
            layer.width[t] = float(width)
            relaxed = Step(
                gain=alone.gain_at(t),
                lower=step.h.low,
                upper=step.h.high,
                error=error[t - first],
            )
            stage.steps.append(relaxed)
        layer.v = steps[-1].v
        return stacked([step.spikes for step in steps])

    def _open(self, name: str, steps: list[KeptStep]) -> Tensor:
        """Numbers of the neurons that get windows: those with an undecided spike, or all of them
        if more calls follow.
        """
        spikes = stacked([step.spikes for step in steps])
        undecided = spikes.width().any(0).flatten()
        if len(steps) < self.over_time.steps[name]:
            undecided = torch.ones_like(undecided)
        return undecided.nonzero().squeeze(1)

    def _with_windows(self, alone: KeptSpiking, x_seq: Interval, error: Tensor) -> list[KeptStep]:
        """The steps of a call in which the open neurons have the bounds of windows."""
        memory = self.memories[alone.neuron.name]
        some = memory.trains.open
        known = alone.known

        def open_ones(part: Tensor) -> Tensor:
            return part.flatten(1)[:, some]

        spiking = WindowedSpiking(
            alone.neuron,
            memory=memory,
            sums=self._sums(alone, some, first=memory.trains.steps),
            error=open_ones(error),
            known=None if known is None else known.each(open_ones),
        )
        spiking.run(x_seq.each(open_ones))
        pairs = zip(alone.steps, spiking.steps, strict=True)
        return [step.with_others(some, tighter) for step, tighter in pairs]

    def windows(self, first: int, total: int) -> list[tuple[int, int]]:
        """Windows (a, t) of the steps first..total - 1 that are bounded by sums."""
        found = []
        for t in range(first, total):
            latest = max(1, t - KEPT + 1)
            found.append((0, t))
            found += [(a, t) for a in range(latest, t + 1)]
        return found

    def lead(self, logits: Bounds, y: Tensor) -> Tensor:
        """See :class:`BoundedRun`; the smaller of it and of what spike counts give, for each
        class.
        """
        alone = super().lead(logits, y)
        if not self.over_time.counts or logits.origin is None:
            return alone
        return torch.minimum(alone, self._lead_of_counts(logits, y))

    def holds(self, name: str, spikes: Tensor) -> bool:
        """Whether counts and random sums over time of a layer's spikes [T, N, *] are within their
        bounds.
        """
        if counts(self.neurons[name]) is not None:
            return True
        generator = torch.Generator().manual_seed(len(spikes))
        random = torch.randn(
            _SUMS,
            len(spikes),
            generator=generator,
            dtype=torch.float64,
        )
        random[0] = 1.0
        weights = random.to(spikes.device)
        bounds = self.memories[name].trains.bounds(weights)
        flat = spikes.double().flatten(1)
        sums = weights @ flat
        wider = bounds.widened(_GAP * len(spikes))
        return wider.holds(sums.view(bounds.low.shape))

    def _reached(self, x: Bounds, batch_dim: int, by: Neuron | Function) -> None:
        stage = Stage(len(self.leaves), x.same(), batch_dim)
        self.stages.append(stage)
        self._by = by

    def _current(self, stage: Stage) -> Interval:
        """Bounds of a current in exact arithmetic, [steps, N, *]."""
        x = stage.current
        exact = Interval(x.least, x.most)
        in_time = partial(by_step, samples=self.samples, batch_dim=stage.batch_dim)
        return exact.each(in_time)

    def _sums(
        self, dynamics: Spiking, some: Tensor | slice, *, first: int
    ) -> dict[tuple[int, int], Interval]:
        """Bounds [O] of the sums of every window that ends in a step from the first one on, for
        some of the neurons; one step alone has those of its current.
        """
        name = dynamics.neuron.name

        def chosen(end: Tensor) -> Tensor:
            return end.flatten()[some]

        currents = [current.each(chosen) for current in self.memories[name].currents]
        steps = len(currents)
        like = currents[0].low
        found = {}
        longer = []
        for a, t in self.windows(first, steps):
            if a < t:
                longer.append([a, t])
                continue
            gain = torch.as_tensor(dynamics.tensor_gain_at(t)).to(like)
            charge = _multiples(gain.view(1), currents[t])
            found[a, t] = charge.each(lambda end: end[0])
        if not longer:
            return found
        weights = window_weights(dynamics, torch.tensor(longer), steps)
        weights = weights.to(like)
        kind = self.over_time.kinds[name]
        if kind == "constant":
            sums = _multiples(weights.sum(1), currents[-1])
        elif kind == "steps":
            all_of_them = self._through(weights)
            sums = all_of_them.each(lambda end: end.flatten(1)[:, some])
        else:
            changes = [step.moved(chosen, apart=False) for step in self.changes[name]]
            if len(changes) == steps and self._have_one_budget(name, changes):
                sums = _with_one_budget(weights, currents, changes)
            else:
                sums = weighted_sums(weights, stacked(currents))
        for window, of_one in zip(longer, sums.steps(), strict=True):
            a, t = window
            found[a, t] = of_one
        return found

    def _changes(self, stage: Stage, steps: int) -> list[Changes]:
        """What changed events can do in the steps of a call; nothing where it is not known."""
        changes = stage.current.changes
        if changes is None:
            return []
        stepwise = partial(by_step, samples=self.samples, batch_dim=stage.batch_dim)

        def step(part: Tensor, t: int) -> Tensor:
            return stepwise(part)[t]

        return [changes.moved(partial(step, t=t), apart=False) for t in range(steps)]

    def _have_one_budget(self, name: str, changes: list[Changes]) -> bool:
        """Whether the steps of a layer's current can have one budget of changed events; if not,
        the result says so.
        """
        shared = share_frames(changes)
        if shared:
            self.apart[name] = "an event changes its current in several steps"
        return not shared

    def _other_run(self) -> BoundedRun:
        """One in which the calls behind bounds run again."""
        other = BoundedRun(self.neurons, self.samples, differentiable=self.differentiable)
        other.dtype = self.dtype
        return other

    def _lead_of_counts(self, logits: Bounds, y: Tensor) -> Tensor:
        """What the bounds of spike counts give."""
        origin = logits.origin
        assert origin is not None
        means = self._other_run()
        leaves = {}
        with torch.set_grad_enabled(self.differentiable):
            numbers = sorted(leaves_of(origin))
            ends = {number: self._mean(number) for number in numbers}
        for number, mean in ends.items():
            batch_dim = self.leaves[number].batch_dim
            leaves[number] = means.leaf(mean, batch_dim)
        found = replayed(origin, leaves)
        joint = Bounds(found.centre, found.radius, logits.error, means)
        return means.lead(joint, y)

    def _mean(self, number: int) -> Interval:
        """Bounds of a leaf in the mean over time, in the place of all its steps."""
        leaf = self.leaves[number]
        source = self.sources[number]
        centre = leaf.centre
        if source is None:
            return Interval(centre - leaf.radius, centre + leaf.radius)
        T = self.over_time.T
        weights = centre.new_full((1, T), 1.0 / T)
        mean = source.bounds(weights)
        shape = by_step(centre, self.samples, leaf.batch_dim).shape
        every = mean.each(lambda end: end.expand(shape))
        return every.each(lambda end: in_layout(end, leaf.batch_dim))

    def _chain(self, dynamics: Spiking, memory: Memory) -> Interval:
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

    def _through(self, weights: Tensor) -> Interval:
        """Bounds of weighted sums of the current's steps, [F, N, *], from those of earlier spikes.

        The map of a step is the same for sums of steps, but for its shift, which counts
        ``sum_t weights[f, t]`` times. As many sums as the call has steps take the steps' places; a
        sum without weights is the shift alone.
        """
        stage = self.stages[-1]
        origin = stage.current.origin
        assert origin is not None
        steps = len(by_step(stage.current.radius, self.samples, stage.batch_dim))
        number = len(weights)
        places = steps * (number // steps + 1)
        without = weights.new_zeros(places - number, weights.shape[1])
        padded = torch.cat([weights, without])
        exact = self._other_run()
        exact.rounded = False
        exact.narrow = self.rounded and self.dtype == torch.float32
        leaves = {}
        for number_of_leaf in leaves_of(origin):
            leaves[number_of_leaf] = self._weighted(number_of_leaf, padded)
        low = []
        high = []
        for start in range(0, places, steps):
            some = slice(start, start + steps)
            taken = {}
            for leaf, sums in leaves.items():
                taken[leaf] = self._weighted_leaf(leaf, sums, some, exact)
            found = replayed(origin, taken)
            # in float32 the ends would be rounded once more
            wide = Bounds(found.centre.to(weights), found.radius.to(weights), run=exact)
            sums = self._current(Stage(stage.leaf, wide, stage.batch_dim))
            low.append(sums.low)
            high.append(sums.high)
        every = Interval(torch.cat(low), torch.cat(high))
        asked = every.each(lambda end: end[:number])
        shift = every.each(lambda end: end[-1])
        moved = _multiples(weights.sum(1) - 1.0, shift)
        return asked.plus(moved)

    def _weighted(self, number: int, weights: Tensor) -> Interval | None:
        """Bounds of weighted sums of a leaf's steps, [F, N, *]; None for images, which have no
        weight in this map.
        """
        source = self.sources[number]
        return None if source is None else source.bounds(weights)

    def _weighted_leaf(
        self, number: int, sums: Interval | None, some: slice, run: BoundedRun
    ) -> Bounds:
        """Some of the sums in the place of the steps of a leaf."""
        leaf = self.leaves[number]
        if sums is None:
            nothing = torch.zeros_like(leaf.radius)
            if run.narrow:
                nothing = nothing.float()
            return Bounds(nothing, nothing, run=run)
        low = in_layout(sums.low[some], leaf.batch_dim)
        high = in_layout(sums.high[some], leaf.batch_dim)
        centre = (low + high) / 2
        radius = (high - low) / 2
        if self.rounded:
            radius = SLACK * radius
        if run.narrow:
            rounded = centre.float()
            lost = (centre - rounded).abs()
            wider = SLACK * (radius + lost)
            centre = rounded
            radius = wider.float()
        return Bounds(centre, radius, run=run)


def _traced(maps: Maps, factors: Tensor) -> tuple[_TimedTrace, Tensor]:
    """A run with these factors, and its logits."""
    trace = _TimedTrace(maps.neurons, factors)
    zeros = maps.frame.new_zeros(1, *maps.frame.shape)
    logits = maps.bounded(trace, zeros, 0.0)
    return trace, logits.centre.detach()


def _kind(calls: list[_Call], shifts: list[Tensor], factors: Tensor) -> _Kind | None:
    """How a layer's current depends on time; see :class:`OverTime`."""
    reference = calls[0].current[:1]
    if any(call.current.shape[1:] != reference.shape[1:] for call in calls):
        return None
    currents = torch.cat([call.current for call in calls])
    if _alike(currents, reference.expand_as(currents)):
        return "constant"
    shift = torch.cat(shifts)
    scales = _factors_of(factors, 0, len(currents))
    own = (currents - shift) / column(scales, currents[0])
    same_map = _alike(own, own[:1].expand_as(own))
    same_shift = _alike(shift, shift[:1].expand_as(shift))
    return "steps" if same_map and same_shift else None


def _factors_of(factors: Tensor, first: int, steps: int) -> Tensor:
    numbers = torch.arange(first, first + steps, device=factors.device)
    return factors[numbers % len(factors)]


def _alike(a: Tensor, b: Tensor) -> bool:
    size = float(b.abs().max()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=_GAP, atol=_GAP * size)


def _power_of_two(value: float) -> float:
    """The next larger one; 0 for 0, such as the error of a current that is the image itself."""
    return math.ldexp(1.0, math.frexp(value)[1]) if value else 0.0


def window_weights(dynamics: Spiking, windows: Tensor, steps: int) -> Tensor:
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


def _with_one_budget(weights: Tensor, currents: list[Interval], changes: list[Changes]) -> Interval:
    """Bounds of sums of a current's steps, if one budget of changed events is for all steps."""
    rises, falls = changed_sums(weights, changes)
    centres = [x.low + step.lowered() for x, step in zip(currents, changes, strict=True)]
    centre = torch.tensordot(weights, torch.stack(centres), 1)
    return Interval(centre - falls, centre + rises)


def _as_double(value: float | Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).cpu()


def _multiples(factors: Tensor, values: Interval) -> Interval:
    """Bounds of every factor times the values, [F, *]; a negative one swaps the ends."""
    scales = column(factors, values.low)
    swapped = scales < 0
    low = torch.where(swapped, values.high, values.low)
    high = torch.where(swapped, values.low, values.high)
    return Interval(scales * low, scales * high)
