"""The spike trains that bounds leave a spiking layer, and bounds of weighted sums over them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sj_robust.neuron.charging import Neuron
from sj_robust.proofs.rounding import reset_rounding
from sj_robust.proofs.spiking import Float32Spiking, Interval, LayerBounds
from sj_robust.proofs.trains import Chain

__all__ = ["KEPT", "Memory", "SpikeTrains", "Steps", "WindowedSpiking", "stacked", "weighted_sums"]

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
    """A spike at step t if the last reset was before step a, [N, *].

    Attributes:
        sure: Whether there is one for sure.
        possible: Whether there may be one.
        high: Largest charged potential.
    """

    sure: Tensor
    possible: Tensor
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
        cases: By step t and first step a of the window, a <= t.
        chain: Trains of a constant current.
    """

    def __init__(self) -> None:
        """No step yet."""
        self.spikes: list[Interval] = []
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
            apart = weighted_sums(weights, packed.spikes.each(lambda end: end[:, index]))
            if packed.chain is not None:
                joint = packed.chain.bounds(weights)
            else:
                joint = _over_paths(weights, packed)
            low[:, index] = torch.maximum(joint.low, apart.low)
            high[:, index] = torch.minimum(joint.high, apart.high)
        shape = self.spikes[0].low.shape
        sums = Interval(low, high)
        return sums.each(lambda end: end.view(-1, *shape))

    def _packed_steps(self, steps: int) -> _Packed:
        if self._packed is None or len(self._packed.sure) != steps:
            spikes = stacked(self.spikes[:steps]).each(lambda end: end.flatten(1))
            undecided = (spikes.low < spikes.high).any(0)
            index = undecided.nonzero().squeeze(1)
            sure = []
            possible = []
            for step in self.cases[:steps]:
                sure.append([case.sure.flatten()[index] for case in step])
                possible.append([case.possible.flatten()[index] for case in step])
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
        charged: Bounds of every step's potential before firing.
        reached: By first step a of the window, whether the last reset can have been before a.
        starts: By a, bounds of the potential that a spike at a - 1 left above rest; soft resets.
        discounts: By a, bounds of the discounted number of spikes before a; soft resets.
        drift: How far float32's potential can be from the charge equation.
        error: How far float32's current can be from the exact one, at most.
    """

    trains: SpikeTrains = field(default_factory=SpikeTrains)
    currents: list[Interval] = field(default_factory=list)
    charged: list[Interval] = field(default_factory=list)
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


class WindowedSpiking(Float32Spiking):
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
        layer: What earlier calls left, and this one leaves.
        memory: Likewise, of windows and trains.
        sums: Bounds of S by (a, t), [N, *]; windows without one have the bounds of the step.
        error: How far float32's current can be from the exact one, [steps of this call, N, *].
        known: Bounds of the spikes of this call, [steps, N, *], from elsewhere.
    """

    def __init__(
        self,
        neuron: Neuron,
        layer: LayerBounds,
        *,
        memory: Memory,
        sums: dict[tuple[int, int], Interval],
        error: Tensor,
        known: Interval | None = None,
    ) -> None:
        """See the class."""
        super().__init__(neuron, layer)
        self.memory = memory
        self.sums = sums
        self.error = error
        self.known = known
        self.first = layer.steps
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
            case = self._case(t, charged)
            found.add(charged, case, reached)
            cases.append(case)
        fires = h.low.clamp(min=self.below)
        silent = h.high.clamp(max=self.above)
        low = torch.where(found.sure, fires, h.low)
        high = torch.where(found.possible, h.high, silent)
        h = Interval(low.maximum(found.low), high.minimum(found.high))
        spikes = Interval(
            low=found.sure.to(h.low.dtype),
            high=found.possible.to(h.low.dtype),
        )
        memory.trains.spikes.append(spikes)
        memory.charged.append(h)
        self._remember(h, cases, found.possible)
        return h, spikes

    def _charged(self, t: int, a: int, h: Interval) -> Interval:
        """Bounds of the potential at t if the last reset was before a; ``h`` whenever it was."""
        sums = self.sums.get((a, t))
        if sums is None:
            return h
        memory = self.memory
        drift = memory.drift
        rest = self.rest
        low = sums.low + rest - drift
        high = sums.high + rest + drift
        if self.soft:
            start = memory.starts[a]
            kept = self.decay ** (t - a + 1)
            low = low + kept * start.low
            high = high + kept * start.high
        for k in range(a + 1, t + 1):
            since = self.sums.get((k, t))
            if since is None:
                continue
            before = memory.trains.cases[k - 1][a]
            silent = before.high.clamp(max=self.above) - rest
            kept = self.decay ** (t - k + 1)
            most = kept * silent + since.high + rest + drift
            high = torch.minimum(high, most)
        if self.soft and (0, t) in self.sums:
            whole = self._after_spikes(t, a)
            low = torch.maximum(low, whole.low)
            high = torch.minimum(high, whole.high)
        low = torch.maximum(low, h.low)
        high = torch.minimum(high, h.high)
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

    def _case(self, t: int, charged: Interval) -> Case:
        """Whether the neuron fires."""
        sure = charged.low >= self.above
        possible = charged.high >= self.below
        if self.known is not None:
            step = t - self.first
            sure = sure | (self.known.low[step] > 0)
            possible = possible & (self.known.high[step] > 0)
        return Case(sure, possible, charged.high)

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
