"""The spike trains that bounds leave a spiking layer, and bounds of weighted sums over them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sj_robust.neuron.charging import Neuron
from sj_robust.proofs.rounding import reset_rounding
from sj_robust.proofs.spiking import Float32Spiking, Interval, LayerBounds
from sj_robust.proofs.trains import Chain

__all__ = [
    "KEPT",
    "KeptSpiking",
    "KeptStep",
    "Memory",
    "SpikeTrains",
    "Steps",
    "WindowedSpiking",
    "stacked",
    "weighted_sums",
]

KEPT = 8
"""Windows of a step that are bounded by sums: the shortest ones, and the one without any reset. The
others have the bounds of the step alone, so that the cost is linear in the number of steps.
"""


def weighted_sums(weights: Tensor, parts: Interval) -> Interval:
    """Bounds of ``sum_t weights[f, t] x[t]`` if every step is bounded alone: [F, *] for parts
    [T, *].
    """
    up = weights.clamp(min=0)
    down = weights.clamp(max=0)
    shape = parts.low.shape[1:]
    flat = parts.each(lambda end: end.flatten(1))
    least = up @ flat.low + down @ flat.high
    most = up @ flat.high + down @ flat.low
    sums = Interval(least, most)
    return sums.each(lambda end: end.view(-1, *shape))


class Steps:
    """Values that are bounded step by step, [T, N, *], such as those of a max pooling."""

    def __init__(self, values: Interval) -> None:
        """Of all steps."""
        self.values = values

    def bounds(self, weights: Tensor) -> Interval:
        """Bounds of ``sum_t weights[f, t] x[t]``, [F, N, *]."""
        steps = weights.shape[1]
        return weighted_sums(weights, self.values.each(lambda end: end[:steps]))


@dataclass(frozen=True)
class Case:
    """A spike at step t if the last reset was before step a, [O] of the open neurons.

    Attributes:
        sure: Whether there is one for sure.
        possible: Whether there may be one.
        low: Smallest charged potential.
        high: Largest one.
    """

    sure: Tensor
    possible: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class _Packed:
    """Spikes of the first steps, and the neurons of which some are undecided.

    Attributes:
        spikes: Bounds of all spikes, [T, M].
        index: Numbers of those neurons among the M.
        sure: By step and first step of the window, of these neurons.
        possible: Likewise.
        chain: Of these neurons, if there is one.
    """

    spikes: Interval
    index: Tensor
    sure: list[list[Tensor]]
    possible: list[list[Tensor]]
    chain: Chain | None


class SpikeTrains:
    """The trains of a spiking layer: paths through the cases stay and fire, over the last reset.
    脉冲层可能的脉冲序列。

    Equation, for weights w, with ``rest[T] = 0`` and the bounds at ``rest[0]`` before the first
    step, t falling::

        fire = w[t] + rest[t + 1],   stay = rest[a]
        rest[a] = stay if there can be no spike, fire if it is sure, else min (max) of both

    If the current is the same in every step, trains are those of its :class:`Chain`.

    Attributes:
        spikes: Bounds of the spikes of every step so far.
        open: Numbers of the neurons that have cases, [O]; the spikes of the others are decided.
        cases: By step t and first step a of the window, a <= t.
        chain: Trains of a constant current.
    """

    def __init__(self) -> None:
        """No step yet."""
        self.spikes: list[Interval] = []
        self.open = torch.empty(0, dtype=torch.int64)
        self.cases: list[list[Case]] = []
        self.chain: Chain | None = None
        self._packed: _Packed | None = None

    @property
    def steps(self) -> int:
        """Time steps so far."""
        return len(self.spikes)

    def bounds(self, weights: Tensor) -> Interval:
        """Bounds of ``sum_t weights[f, t] s[t]``, [F, N, *], of the steps that have weights."""
        packed = self._packed_steps(weights.shape[1])
        index = packed.index
        low = weights @ packed.spikes.low
        high = low.clone()
        if index.numel():
            spikes = packed.spikes.each(lambda end: end[:, index])
            apart = weighted_sums(weights, spikes)
            if packed.chain is not None:
                joint = packed.chain.bounds(weights)
            else:
                joint = _over_paths(weights, packed)
            tighter = joint.within(apart)
            low[:, index] = tighter.low
            high[:, index] = tighter.high
        shape = self.spikes[0].low.shape
        sums = Interval(low, high)
        return sums.each(lambda end: end.view(-1, *shape))

    def _packed_steps(self, steps: int) -> _Packed:
        if self._packed is None or len(self._packed.spikes.low) != steps:
            spikes = stacked(self.spikes[:steps])
            spikes = spikes.each(lambda end: end.flatten(1))
            undecided = spikes.width().any(0)
            among = undecided[self.open].nonzero().squeeze(1)
            index = self.open[among]
            sure = []
            possible = []
            for step in self.cases[:steps]:
                sure.append([case.sure[among] for case in step])
                possible.append([case.possible[among] for case in step])
            chain = self.chain
            if chain is not None:
                chain = chain.at(index)
            self._packed = _Packed(spikes, index, sure, possible, chain)
        return self._packed


def stacked(steps: Sequence[Interval]) -> Interval:
    """Bounds of several steps as those of one tensor."""
    low = torch.stack([step.low for step in steps])
    high = torch.stack([step.high for step in steps])
    return Interval(low, high)


def _over_paths(weights: Tensor, packed: _Packed) -> Interval:
    """The dynamic program of :class:`SpikeTrains`."""
    weighted = weights.any(0).nonzero()
    steps = int(weighted.max()) + 1 if len(weighted) else 0
    ends = []
    for better in (torch.minimum, torch.maximum):
        nothing = weights.new_zeros(len(weights), packed.index.numel())
        rest = [nothing] * (steps + 1)
        for t in reversed(range(steps)):
            fire = weights[:, t, None] + rest[t + 1]
            windows = zip(packed.sure[t], packed.possible[t], strict=True)
            for a, (sure, possible) in enumerate(windows):
                stay = rest[a]
                either = torch.where(sure, fire, better(fire, stay))
                rest[a] = torch.where(possible, either, stay)
        ends.append(rest[0])
    return Interval(ends[0], ends[1])


@dataclass
class Memory:
    """What the calls of a layer leave each other.

    Attributes:
        trains: The trains so far.
        currents: Bounds in exact arithmetic of every step's current, [N, *].
        steps: What every step gave, [N, *].
        layer: Of the open neurons alone, as what follows: [O] each.
        reached: By first step a of the window, whether the last reset can have been before a.
        starts: By a, bounds of the potential that a spike at a - 1 left above rest; soft resets.
        discounts: By a, bounds of the discounted number of spikes before a; soft resets.
        drift: How far float32's potential can be from the charge equation.
        error: How far float32's current can be from the exact one, at most.
    """

    trains: SpikeTrains = field(default_factory=SpikeTrains)
    currents: list[Interval] = field(default_factory=list)
    steps: list["KeptStep"] = field(default_factory=list)
    layer: LayerBounds = field(default_factory=LayerBounds)
    reached: list[Tensor] = field(default_factory=list)
    starts: list[Interval] = field(default_factory=list)
    discounts: list[Interval] = field(default_factory=list)
    drift: Tensor | float = 0.0
    error: float = 0.0

    def begin(self, like: Tensor) -> None:
        """Before the first step there is one window, and nothing has happened."""
        nothing = torch.zeros_like(like)
        zero = Interval(nothing, nothing)
        self.reached.append(torch.ones_like(like, dtype=torch.bool))
        self.starts.append(zero)
        self.discounts.append(zero)


@dataclass(frozen=True)
class KeptStep:
    """Bounds of one step of a layer.

    Attributes:
        h: Of the charged potential.
        spikes: Of the spikes.
        v: Of the potential after the reset.
    """

    h: Interval
    spikes: Interval
    v: Interval

    def with_others(self, index: Tensor, other: "KeptStep") -> "KeptStep":
        """The step in which some of the neurons have the bounds of another one."""
        return KeptStep(
            h=_with_others(self.h, index, other.h),
            spikes=_with_others(self.spikes, index, other.spikes),
            v=_with_others(self.v, index, other.v),
        )


def _with_others(values: Interval, index: Tensor, others: Interval) -> Interval:
    flat = values.each(torch.flatten)
    low = flat.low.index_copy(0, index, others.low)
    high = flat.high.index_copy(0, index, others.high)
    shape = values.low.shape
    return Interval(low, high).each(lambda end: end.view(shape))


class KeptSpiking(Float32Spiking):
    """A call of a spiking layer that keeps the bounds of its steps, and may know some spikes.

    Args:
        neuron: The neuron.
        layer: What earlier calls left, and this one leaves.
        known: Bounds of the spikes of this call, [steps, N, *], from elsewhere.
    """

    def __init__(
        self, neuron: Neuron, layer: LayerBounds, *, known: Interval | None = None
    ) -> None:
        """See the class."""
        super().__init__(neuron, layer)
        self.known = known
        self.first = layer.steps
        self.steps: list[KeptStep] = []
        self._decided: tuple[Interval, Interval]

    def step(self, v: Interval, x: Interval) -> tuple[Interval, Interval]:
        """See :class:`Spiking`."""
        after, spikes = super().step(v, x)
        h, _ = self._decided
        self.steps.append(KeptStep(h, spikes, after))
        return after, spikes

    def decided(self, h: Interval, error: Tensor, gain: float) -> tuple[Interval, Interval]:
        """See :class:`Float32Spiking`."""
        sure, possible = self._fires(h)
        self._decided = self._clamped(h, sure, possible)
        return self._decided

    def _fires(self, h: Interval) -> tuple[Tensor, Tensor]:
        """Whether there is a spike in the present step for sure, and whether there may be one."""
        sure = h.low >= self.above
        possible = h.high >= self.below
        if self.known is None:
            return sure, possible
        step = self.layer.steps - self.first
        known = self.known.each(lambda end: end[step] > 0)
        return sure | known.low, possible & known.high

    def _clamped(self, h: Interval, sure: Tensor, possible: Tensor) -> tuple[Interval, Interval]:
        """Potential and spikes that agree with each other."""
        fired = h.low.clamp(min=self.below)
        silent = h.high.clamp(max=self.above)
        low = torch.where(sure, fired, h.low)
        high = torch.where(possible, h.high, silent)
        spikes = Interval(sure, possible)
        return Interval(low, high), spikes.each(lambda end: end.to(low.dtype))


class WindowedSpiking(KeptSpiking):
    """A call of a spiking layer that bounds its potential by sums over time as well.

    Equation, for the potential h at step t above rest, if there was a reset just before a (or
    a = 0) and none since, S the charges since then, and theta the threshold above rest::

        S[a, t] = sum_k lambda^(t-k) p[k] x[k],   k in a..t
        h = lambda^(t-a+1) v[a-1] + S[a, t],      v[a-1] = 0 after a hard reset, else h[a-1] - theta
        h <= lambda^(t-k+1) min(h_hi[a, k-1], theta) + S_hi[k, t]    for a < k <= t: silent at k-1
        h = S[0, t] - theta Q,                    Q the discounted number of spikes, if soft

    S_hi is of the sum as it is: one that is cut off at the threshold would be too small where the
    potential at k-1 is negative.

    Args:
        neuron: The neuron.
        memory: What earlier calls left of windows and trains, and this one leaves.
        sums: Bounds of S by (a, t), [O]; windows without one go on from the step before.
        error: How far float32's current can be from the exact one, [steps of this call, O].
        known: Bounds of the spikes of this call, [steps, O], from elsewhere.
    """

    def __init__(
        self,
        neuron: Neuron,
        *,
        memory: Memory,
        sums: dict[tuple[int, int], Interval],
        error: Tensor,
        known: Interval | None = None,
    ) -> None:
        """See the class."""
        super().__init__(neuron, memory.layer, known=known)
        self.memory = memory
        self.sums = sums
        self.error = error
        self.decay = self.charging.decay_value

    def decided(self, h: Interval, error: Tensor, gain: float) -> tuple[Interval, Interval]:
        """See :class:`Float32Spiking`."""
        memory = self.memory
        t = self.layer.steps
        of_current = abs(gain) * self.error[t - self.first]
        memory.drift = self.decay * memory.drift + of_current + error
        if t == 0:
            memory.begin(h.low)
        found = _AnyWindow(h)
        cases = []
        for a, reached in enumerate(memory.reached):
            charged = self._charged(t, a, h)
            case = self._case(charged)
            found.add(charged, case, reached)
            cases.append(case)
        h, spikes = self._clamped(h, found.sure, found.possible)
        h = h.within(Interval(found.low, found.high))
        self._decided = h, spikes
        self._remember(h, cases, found.possible)
        return h, spikes

    def _charged(self, t: int, a: int, h: Interval) -> Interval:
        """Bounds of the potential at t if the last reset was before a; ``h`` whenever it was."""
        memory = self.memory
        drift = memory.drift
        rest = self.rest
        low = h.low
        high = h.high
        sums = self.sums.get((a, t))
        if sums is not None:
            above_zero = sums.each(lambda end: end + rest)
            charge = above_zero.widened(drift)
            if self.soft:
                kept = self.decay ** (t - a + 1)
                start = memory.starts[a].times(kept)
                charge = charge.plus(start)
            low = torch.maximum(low, charge.low)
            high = torch.minimum(high, charge.high)
        for k in range(a + 1, t + 1):
            since = self.sums.get((k, t))
            if since is None:
                continue
            before = memory.trains.cases[k - 1][a]
            kept = self.decay ** (t - k + 1)
            silent = before.high.clamp(max=self.above) - rest
            most = kept * silent + since.high + rest + drift
            high = torch.minimum(high, most)
            if sums is None:
                least = kept * (before.low - rest) + since.low + rest - drift
                low = torch.maximum(low, least)
        if self.soft and (0, t) in self.sums:
            whole = self._after_spikes(t, a)
            low = torch.maximum(low, whole.low)
            high = torch.minimum(high, whole.high)
        return Interval(low, high)

    def _after_spikes(self, t: int, a: int) -> Interval:
        """Bounds of the potential from all charges and the number of spikes before a."""
        memory = self.memory
        fired = memory.discounts[a]
        whole = self.sums[0, t].widened(memory.drift)
        first = self.threshold * fired.low
        second = self.threshold * fired.high
        least = torch.minimum(first, second)
        most = torch.maximum(first, second)
        return Interval(whole.low - most, whole.high - least)

    def _case(self, charged: Interval) -> Case:
        """Whether the neuron fires."""
        sure, possible = self._fires(charged)
        return Case(sure, possible, charged.low, charged.high)

    def _remember(self, h: Interval, cases: list[Case], possible: Tensor) -> None:
        """What this step leaves to later ones."""
        memory = self.memory
        memory.trains.cases.append(cases)
        rounded = reset_rounding(h.size(), self.rest, self.threshold)
        memory.drift = memory.drift + rounded
        if self.soft:
            self._remember_soft(h, cases, possible)
        for a, case in enumerate(cases):
            memory.reached[a] = memory.reached[a] & ~case.sure
        memory.reached.append(possible)

    def _remember_soft(self, h: Interval, cases: list[Case], possible: Tensor) -> None:
        """Potential and number of spikes after a spike at this step."""
        memory = self.memory
        low = h.low.clamp(min=self.below)
        start = Interval(low - self.threshold, h.high - self.threshold)
        memory.starts.append(start)
        least = torch.full_like(h.low, torch.inf)
        most = -least
        for a, case in enumerate(cases):
            fired = memory.discounts[a]
            fires = case.possible & memory.reached[a]
            fewer = torch.minimum(least, fired.low)
            more = torch.maximum(most, fired.high)
            least = torch.where(fires, fewer, least)
            most = torch.where(fires, more, most)
            memory.discounts[a] = fired.times(self.decay)
        least = torch.where(possible, least + 1, 0.0)
        most = torch.where(possible, most + 1, 0.0)
        counted = Interval(least, most)
        memory.discounts.append(counted.times(self.decay))


class _AnyWindow:
    """What holds whenever the last reset was: the union over the windows that are reached.

    Attributes:
        low: Smallest charged potential.
        high: Largest.
        sure: Whether there is a spike in every window.
        possible: Whether there may be one in some.
    """

    def __init__(self, like: Interval) -> None:
        """No window yet."""
        self.low = torch.full_like(like.low, torch.inf)
        self.high = -self.low
        self.sure = torch.ones_like(like.low, dtype=torch.bool)
        self.possible = torch.zeros_like(self.sure)

    def add(self, charged: Interval, case: Case, reached: Tensor) -> None:
        """A window, where it is reached."""
        low = torch.minimum(self.low, charged.low)
        high = torch.maximum(self.high, charged.high)
        self.low = torch.where(reached, low, self.low)
        self.high = torch.where(reached, high, self.high)
        self.sure &= case.sure | ~reached
        self.possible |= case.possible & reached
