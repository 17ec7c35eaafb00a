"""The spike trains that bounds leave a spiking layer, and bounds of weighted sums over them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sj_robust.neuron.charging import Neuron
from sj_robust.proofs.rounding import reset_rounding
from sj_robust.proofs.spiking import Float32Spiking, Interval, LayerBounds
from sj_robust.proofs.trains import Chain

__all__ = ["KEPT", "Memory", "SpikeTrains", "Steps", "WindowedSpiking", "weighted_sums"]

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
    low, high = parts.low.flatten(1), parts.high.flatten(1)
    least = up @ low + down @ high
    most = up @ high + down @ low
    return Interval(least.view(-1, *shape), most.view(-1, *shape))


class Steps:
    """Values that are bounded step by step, [T, N, *], such as those of a max pooling."""

    def __init__(self, values: Interval) -> None:
        """Of all steps."""
        self.values = values

    def bounds(self, weights: Tensor) -> Interval:
        """Bounds of ``sum_t weights[f, t] x[t]``, [F, N, *]."""
        steps = weights.shape[1]
        return weighted_sums(weights, Interval(self.values.low[:steps], self.values.high[:steps]))


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
        low: 1 for a sure spike, [T, M].
        high: 1 for a possible one.
        index: Numbers of those neurons among the M.
        sure: By step and first step of the window, of these neurons.
        possible: Likewise.
        chain: Of these neurons, if there is one.
    """

    low: Tensor
    high: Tensor
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
        low = weights @ packed.low
        high = low.clone()
        index = packed.index
        if index.numel():
            apart = weighted_sums(weights, Interval(packed.low[:, index], packed.high[:, index]))
            if packed.chain is not None:
                joint = packed.chain.bounds(weights)
            else:
                joint = _over_paths(weights, packed)
            low[:, index] = torch.maximum(joint.low, apart.low)
            high[:, index] = torch.minimum(joint.high, apart.high)
        shape = self.spikes[0].low.shape
        return Interval(low.view(-1, *shape), high.view(-1, *shape))

    def _packed_steps(self, steps: int) -> _Packed:
        if self._packed is None or len(self._packed.low) != steps:
            low = torch.stack([step.low for step in self.spikes[:steps]]).flatten(1)
            high = torch.stack([step.high for step in self.spikes[:steps]]).flatten(1)
            index = (low < high).any(0).nonzero().squeeze(1)
            cases = self.cases[:steps]
            self._packed = _Packed(
                low=low,
                high=high,
                index=index,
                sure=[[case.sure.flatten()[index] for case in step] for step in cases],
                possible=[[case.possible.flatten()[index] for case in step] for step in cases],
                chain=None if self.chain is None else self.chain.at(index),
            )
        return self._packed


def _over_paths(weights: Tensor, packed: _Packed) -> Interval:
    """The dynamic program of :class:`SpikeTrains`."""
    weighted = weights.any(0).nonzero()
    steps = int(weighted.max()) + 1 if len(weighted) else 0
    ends = []
    for better in (torch.minimum, torch.maximum):
        nothing = weights.new_zeros(len(weights), packed.index.numel())
        rest = [nothing] * (steps + 1)
        for t in reversed(range(steps)):
            fire = weights[:, t].unsqueeze(1) + rest[t + 1]
            for a in range(t + 1):
                either = torch.where(packed.sure[t][a], fire, better(fire, rest[a]))
                rest[a] = torch.where(packed.possible[t][a], either, rest[a])
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
        memory.drift = self.decay * memory.drift + abs(gain) * self.error[t - self.first] + error
        if t == 0:
            nothing = torch.zeros_like(h.low)
            memory.reached.append(torch.ones_like(h.low, dtype=torch.bool))
            memory.starts.append(Interval(nothing, nothing))
            memory.discounts.append(Interval(nothing, nothing))
        sure = torch.ones_like(h.low, dtype=torch.bool)
        possible = torch.zeros_like(sure)
        lowest = torch.full_like(h.low, torch.inf)
        highest = -lowest
        cases = []
        for a in range(t + 1):
            charged = self._charged(t, a, h)
            case = self._case(t, charged)
            reached = memory.reached[a]
            lowest = torch.where(reached, torch.minimum(lowest, charged.low), lowest)
            highest = torch.where(reached, torch.maximum(highest, charged.high), highest)
            sure = sure & (case.sure | ~reached)
            possible = possible | (case.possible & reached)
            cases.append(case)
        h = Interval(
            torch.maximum(lowest, torch.where(sure, h.low.clamp(min=self.below), h.low)),
            torch.minimum(highest, torch.where(possible, h.high, h.high.clamp(max=self.above))),
        )
        self._remember(h, cases, possible)
        spikes = Interval(sure.to(h.low.dtype), possible.to(h.low.dtype))
        memory.trains.spikes.append(spikes)
        memory.charged.append(h)
        return h, spikes

    def _charged(self, t: int, a: int, h: Interval) -> Interval:
        """Bounds of the potential at t if the last reset was before a; ``h`` whenever it was."""
        if (a, t) not in self.sums:
            return h
        memory = self.memory
        rest = self.rest
        drift = memory.drift
        low = self.sums[a, t].low + (rest - drift)
        high = self.sums[a, t].high + (rest + drift)
        if self.soft:
            kept = self.decay ** (t - a + 1)
            low = low + kept * memory.starts[a].low
            high = high + kept * memory.starts[a].high
        for k in range(a + 1, t + 1):
            if (k, t) in self.sums:
                silent = memory.trains.cases[k - 1][a].high.clamp(max=self.above) - rest
                since = self.sums[k, t].high + (rest + drift)
                high = torch.minimum(high, self.decay ** (t - k + 1) * silent + since)
        if self.soft and (0, t) in self.sums:
            fired = memory.discounts[a]
            lost = self.threshold * fired.low, self.threshold * fired.high
            whole = self.sums[0, t]
            low = torch.maximum(low, whole.low - torch.maximum(*lost) - drift)
            high = torch.minimum(high, whole.high - torch.minimum(*lost) + drift)
        return Interval(torch.maximum(low, h.low), torch.minimum(high, h.high))

    def _case(self, t: int, charged: Interval) -> Case:
        """Whether the neuron fires."""
        sure = charged.low >= self.above
        possible = charged.high >= self.below
        if self.known is not None:
            sure = sure | (self.known.low[t - self.first] > 0)
            possible = possible & (self.known.high[t - self.first] > 0)
        return Case(sure, possible, charged.high)

    def _remember(self, h: Interval, cases: list[Case], possible: Tensor) -> None:
        """What this step leaves to later ones."""
        memory = self.memory
        memory.trains.cases.append(cases)
        memory.drift = memory.drift + reset_rounding(h.size(), self.rest, self.threshold)
        if self.soft:
            self._remember_soft(h, cases, possible)
        for a, case in enumerate(cases):
            memory.reached[a] = memory.reached[a] & ~case.sure
        memory.reached.append(possible)

    def _remember_soft(self, h: Interval, cases: list[Case], possible: Tensor) -> None:
        memory = self.memory
        fired = h.low.clamp(min=self.below) - self.threshold
        memory.starts.append(Interval(fired, h.high - self.threshold))
        least = torch.full_like(h.low, torch.inf)
        most = -least
        for a, case in enumerate(cases):
            before = memory.discounts[a]
            fires = case.possible & memory.reached[a]
            least = torch.where(fires, torch.minimum(least, before.low), least)
            most = torch.where(fires, torch.maximum(most, before.high), most)
            memory.discounts[a] = Interval(self.decay * before.low, self.decay * before.high)
        least = torch.where(possible, self.decay * (least + 1), 0.0)
        most = torch.where(possible, self.decay * (most + 1), 0.0)
        memory.discounts.append(Interval(least, most))
