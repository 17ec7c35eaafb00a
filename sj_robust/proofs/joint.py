"""Bounds that hold together over time: of spike trains and counts, not of single spikes."""

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sj_robust.neuron.charging import Neuron
from sj_robust.proofs.bounds import BoundedRun
from sj_robust.proofs.changes import Changes, changed_sums, share_frames
from sj_robust.proofs.relaxation import Maps, Stage, Step, Trace
from sj_robust.proofs.rounding import SLACK
from sj_robust.proofs.rules import Bounds, Pooling, leaves_of, replayed
from sj_robust.proofs.spiking import Float32Spiking, Interval, Spiking
from sj_robust.proofs.trains import Trains, possible_trains
from sj_robust.proofs.windows import (
    KEPT,
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
    """

    by: str | None
    first: int
    batch_dim: int
    current: Tensor
    leaves: set[int]


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
        self._steps = dict.fromkeys(neurons, 0)
        self._values: dict[str, Tensor] = {}
        self._generator = torch.Generator().manual_seed(0)

    def _reached(self, x: Bounds, batch_dim: int, by: Neuron | Pooling) -> None:
        name = by.name if isinstance(by, Neuron) else None
        first = 0 if name is None else self._steps[name]
        current = by_step(x.centre.detach(), 1, batch_dim)
        self.calls.append(_Call(name, first, batch_dim, current, leaves_of(x.origin)))
        if name is None:
            self.pooled.add(len(self.leaves))
        else:
            self._steps[name] += len(current)

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
        drawn = torch.randn(like.shape, generator=self._generator, dtype=torch.float64)
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
        shifts: b of a layer whose kind is ``"steps"``, [1, *].
        counts: Whether the logits are of counts.
        stepwise: Layers, and the output, that get bounds of single steps, with the reason.
        images: Number of images that a run holds in memory.

    Args:
        maps: The affine maps of the network.
        T: Time steps.
    """

    def __init__(self, maps: Maps, T: int) -> None:
        """Run the network; see the class."""
        generator = torch.Generator().manual_seed(1)
        factors = torch.rand(max(_FACTORS, T), generator=generator, dtype=torch.float64)
        factors = (0.5 + factors).to(maps.frame.device)
        trace, logits = _traced(maps, factors)
        _, mean_logits = _traced(maps, factors[:T].mean().expand(factors.shape))
        self.neurons = maps.neurons
        self.T = T
        self.counts = _alike(logits, mean_logits)
        self.kinds: dict[str, _Kind | None] = {}
        self.shifts: dict[str, Tensor] = {}
        reasons: dict[str, str] = {}
        for name in maps.neurons:
            calls: list[_Call] = []
            shifts: list[Tensor] = []
            before: set[int] = set()
            for number, call in enumerate(trace.calls):
                if call.by == name:
                    calls.append(call)
                    shifts.append(by_step(maps.shift(number, 1), 1, call.batch_dim))
                    before |= call.leaves
            if not calls:
                continue
            self.kinds[name] = _kind(calls, shifts, factors)
            self.shifts[name] = shifts[0][0]
            if before & trace.pooled:
                reasons[name] = "behind a max pooling or ReLU"
            elif self.kinds[name] is None and before != {0}:
                reasons[name] = "its current is no map of spikes of one step"
        if not self.counts:
            reasons["the output"] = "it is no map of counts"
        self.stepwise = tuple(f"{name}: {reason}" for name, reason in reasons.items())
        size = sum(leaf.centre.numel() for leaf in trace.leaves)
        self.images = max(1, 2 * _ELEMENTS // (size * (min(T, KEPT) + 1)))
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

    windowed: ClassVar[type[WindowedSpiking]] = WindowedSpiking
    """A call of a spiking layer."""

    def __init__(self, neurons: dict[str, Neuron], samples: int, *, over_time: OverTime) -> None:
        """Nothing has run yet."""
        super().__init__(neurons, samples)
        self.over_time = over_time
        self.stages: list[Stage] = []
        """What a relaxation starts from."""
        self.memories = {name: Memory() for name in neurons}
        self.changes: dict[str, list[Changes]] = {name: [] for name in neurons}
        """What changed events can do to the current of each step so far."""
        self.sources: list[SpikeTrains | Steps | None] = []
        """What gives bounds of sums over time of each leaf; None for the images."""
        self._by: Neuron | Pooling | None = None

    def leaf(self, values: Interval, batch_dim: int) -> Bounds:
        """See :class:`BoundedRun`."""
        if self._by is None:
            self.sources.append(None)
        elif isinstance(self._by, Neuron):
            self.sources.append(self.memories[self._by.name].trains)
        else:
            steps = values.each(lambda end: by_step(end, self.samples, batch_dim))
            self.sources.append(Steps(steps))
        return super().leaf(values, batch_dim)

    @torch.no_grad()
    def spikes(self, neuron: Neuron, x_seq: Interval) -> Interval:
        """See :class:`BoundedRun`."""
        name = neuron.name
        memory = self.memories[name]
        layer = self.layers[name]
        stage = self.stages[-1]
        first = layer.steps
        current, error = self._current(stage)
        for low, high in zip(current.low, current.high, strict=True):
            memory.currents.append(Interval(low, high))
        self.changes[name] += self._changes(stage, len(error))
        memory.error = max(memory.error, float(error.max()))
        dynamics = Float32Spiking(neuron, layer)
        known = None
        if self.over_time.kinds[name] == "constant":
            known = self._chain(dynamics, memory)
        spiking = self.windowed(
            neuron,
            layer,
            memory=memory,
            sums=self._sums(dynamics, memory),
            error=error,
            known=known,
        )
        spikes = spiking.run(x_seq)
        for t in range(first, layer.steps):
            h = memory.charged[t]
            gain = dynamics.gain_at(t)
            step = Step(gain, h.low, h.high, error[t - first])
            stage.steps.append(step)
        return spikes

    def windows(self, first: int, total: int) -> list[tuple[int, int]]:
        """Windows (a, t) of the steps first..total - 1 that are bounded by sums."""
        found = []
        for t in range(first, total):
            found += [(a, t) for a in range(t + 1) if a == 0 or t - a < KEPT]
        return found

    def lead(self, logits: Bounds, y: Tensor) -> Tensor:
        """See :class:`BoundedRun`; the smaller of it and of what spike counts give, for each
        class.
        """
        alone = super().lead(logits, y)
        origin = logits.origin
        if not self.over_time.counts or origin is None:
            return alone
        means = BoundedRun(self.neurons, self.samples)
        means.dtype = self.dtype
        leaves = {}
        for number in sorted(leaves_of(origin)):
            leaf = self.leaves[number]
            leaves[number] = means.leaf(self._mean(number), leaf.batch_dim)
        found = replayed(origin, leaves)
        joint = Bounds(found.centre, found.radius, logits.error, means)
        return torch.minimum(alone, means.lead(joint, y))

    def holds(self, name: str, spikes: Tensor) -> bool:
        """Whether counts and random sums over time of a layer's spikes [T, N, *] are within their
        bounds.
        """
        generator = torch.Generator().manual_seed(len(spikes))
        random = torch.randn(_SUMS, len(spikes), generator=generator, dtype=torch.float64)
        random[0] = 1.0
        weights = random.to(spikes.device)
        bounds = self.memories[name].trains.bounds(weights)
        sums = (weights @ spikes.double().flatten(1)).view(bounds.low.shape)
        return bounds.widened(_GAP * len(spikes)).holds(sums)

    def _reached(self, x: Bounds, batch_dim: int, by: Neuron | Pooling) -> None:
        stage = Stage(len(self.leaves), x.same(), batch_dim)
        self.stages.append(stage)
        self._by = by

    def _current(self, stage: Stage) -> tuple[Interval, Tensor]:
        """Bounds of a current in exact arithmetic, and float32's error, [steps, N, *]."""
        x = stage.current
        stepwise = partial(by_step, samples=self.samples, batch_dim=stage.batch_dim)
        return Interval(stepwise(x.least), stepwise(x.most)), stepwise(x.error)

    def _sums(self, dynamics: Spiking, memory: Memory) -> dict[tuple[int, int], Interval]:
        """Bounds of the sums of every window that ends in this call; one step alone has those of
        its current.
        """
        name = dynamics.neuron.name
        first = memory.trains.steps
        currents = memory.currents
        found = {}
        longer = []
        for a, t in self.windows(first, len(currents)):
            if a == t:
                gain = currents[t].low.new_tensor([dynamics.gain_at(t)])
                charge = _multiples(gain, currents[t])
                found[a, t] = charge.each(lambda end: end[0])
            else:
                longer.append((a, t))
        if not longer:
            return found
        weights = _weights(dynamics, longer, len(currents))
        weights = weights.to(currents[0].low.device)
        kind = self.over_time.kinds[name]
        if kind == "constant":
            sums = _multiples(weights.sum(1), currents[-1])
        elif kind == "steps":
            sums = self._through(weights, self.over_time.shifts[name])
        else:
            sums = weighted_sums(weights, stacked(currents))
            sums = self._with_one_budget(weights, name, sums)
        for window, low, high in zip(longer, sums.low, sums.high, strict=True):
            found[window] = Interval(low, high)
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

    def _with_one_budget(self, weights: Tensor, name: str, sums: Interval) -> Interval:
        """Bounds of sums of a current's steps, if one budget of changed events is for all steps."""
        steps = self.changes[name]
        if len(steps) < weights.shape[1]:
            return sums
        if share_frames(steps):
            self.apart[name] = "an event changes its current in several steps"
            return sums
        rises, falls = changed_sums(weights, steps)
        currents = self.memories[name].currents
        centres = [x.low + step.lowered() for x, step in zip(currents, steps, strict=True)]
        centre = torch.tensordot(weights, torch.stack(centres), 1)
        return Interval(centre - falls, centre + rises)

    @torch.no_grad()
    def _mean(self, number: int) -> Interval:
        """Bounds of a leaf in the mean over time, in the place of all its steps."""
        leaf = self.leaves[number]
        source = self.sources[number]
        centre = leaf.centre.detach()
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

    def _through(self, weights: Tensor, shift: Tensor) -> Interval:
        """Bounds of weighted sums of the current's steps, [F, N, *], from those of earlier spikes.

        The map of a step is the same for sums of steps, but for its shift, which counts
        ``sum_t weights[f, t]`` times. As many sums as the call has steps take the steps' places.
        """
        stage = self.stages[-1]
        origin = stage.current.origin
        assert origin is not None
        steps = len(self._current(stage)[1])
        exact = BoundedRun(self.neurons, self.samples)
        exact.dtype = self.dtype
        exact.rounded = False
        low = []
        high = []
        for some in torch.split(weights, steps):
            missing = steps - len(some)
            padded = torch.cat([some, some[-1:].expand(missing, -1)])
            leaves = {}
            for number in leaves_of(origin):
                leaves[number] = self._weighted_leaf(number, padded, exact)
            found = replayed(origin, leaves)
            sums, _ = self._current(Stage(stage.leaf, found, stage.batch_dim))
            more = some.sum(1) - 1.0
            moved = column(more, shift) * shift
            low.append(sums.low[: len(some)] + moved)
            high.append(sums.high[: len(some)] + moved)
        return Interval(torch.cat(low), torch.cat(high))

    def _weighted_leaf(self, number: int, weights: Tensor, run: BoundedRun) -> Bounds:
        """Weighted sums of a leaf's steps in the place of the steps."""
        leaf = self.leaves[number]
        source = self.sources[number]
        if source is None:  # images, which have no weight in this map
            nothing = torch.zeros_like(leaf.radius)
            return Bounds(nothing, nothing, run=run)
        sums = source.bounds(weights)
        centre = (sums.low + sums.high) / 2
        radius = SLACK * (sums.high - sums.low) / 2
        return Bounds(
            in_layout(centre, leaf.batch_dim),
            in_layout(radius, leaf.batch_dim),
            run=run,
        )


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


def _weights(dynamics: Spiking, windows: list[tuple[int, int]], steps: int) -> Tensor:
    """Weight of every step's current in the potential at the end of each window."""
    decay = dynamics.charging.decay_value
    found = torch.zeros(len(windows), steps, dtype=torch.float64)
    gains = [dynamics.gain_at(k) for k in range(steps)]
    for row, (a, t) in enumerate(windows):
        for k in range(a, t + 1):
            found[row, k] = decay ** (t - k) * gains[k]
    return found


def _multiples(factors: Tensor, values: Interval) -> Interval:
    """Bounds of every factor times the values, [F, *]."""
    scales = column(factors, values.low)
    first = scales * values.low
    second = scales * values.high
    return Interval(torch.minimum(first, second), torch.maximum(first, second))
