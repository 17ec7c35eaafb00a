"""Joint bounds that training can follow: chains, windows and counts with surrogate gradients."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sj_robust.neuron.charging import Neuron
from sj_robust.proofs.bounds import BoundedRun
from sj_robust.proofs.differentiable_chains import DifferentiableChain
from sj_robust.proofs.joint import JointRun, OverTime
from sj_robust.proofs.opened import counts
from sj_robust.proofs.rules import Bounds
from sj_robust.proofs.spiking import Interval, RealSpiking
from sj_robust.proofs.windows import Memory, SpikeTrains, stacked

__all__ = ["DifferentiableJointRun"]

_Better = Callable[[Tensor, Tensor], Tensor]


class DifferentiableJointRun(JointRun):
    """A run of joint bounds in real arithmetic, with a graph to the weights. 可微的联合上下界。

    Spikes are numbers, 0 or 1, with the derivative of the surrogate: whether a current is above
    the one at which a train turns into the next, and whether the potential of a window is above
    the threshold. As with ``detach_reset``, the reset passes no gradient on.

    Args:
        neurons: Neurons of known dynamics by name.
        samples: Number of samples.
        over_time: How the network treats time.
        surrogate_width: Width of the derivatives in units of the neurons' own.
    """

    def __init__(
        self,
        neurons: dict[str, Neuron],
        samples: int,
        *,
        over_time: OverTime,
        surrogate_width: float = 1.0,
    ) -> None:
        """Nothing has run yet."""
        super().__init__(
            neurons,
            samples,
            over_time=over_time,
            differentiable=True,
            surrogate_width=surrogate_width,
        )
        self.trains = {name: DifferentiableTrains() for name in neurons}
        for name, trains in self.trains.items():
            self.memories[name] = Memory(trains)

    def spikes(self, neuron: Neuron, x_seq: Interval) -> Interval:
        """See :class:`BoundedRun`."""
        if counts(neuron) is not None:
            return super().spikes(neuron, x_seq)
        name = neuron.name
        memory = self.memories[name]
        trains = self.trains[name]
        first = trains.steps
        current = self._current(self.stages[-1])
        memory.currents += current.steps()
        steps = len(memory.currents)
        trains.shape = current.low.shape[1:]
        spiking = RealSpiking(neuron, self.layers[name], self.surrogate_width)
        trains.chain_of_all = None
        if self.over_time.kinds[name] == "constant":
            constant = memory.currents[-1].each(torch.flatten)
            trains.chain_of_all = DifferentiableChain.of(spiking, steps, constant)
        if trains.chain_of_all is None:
            known = len(trains.windows)  # fewer than there are steps if there was a chain so far
            sums = self._sums(spiking, slice(None), first=known)
            windows = _Windows(spiking, trains, memory, sums)
            for t in range(known, steps):
                windows.step(t)
        trains.total = steps
        self.stages.clear()  # which hold the run
        if name in self.over_time.counted:  # nobody asks for single spikes
            nothing = torch.zeros_like(current.low)
            return Interval(nothing, nothing + 1)
        every = torch.eye(steps).to(current.low)
        return trains.bounds(every[first:])

    def lead(self, logits: Bounds, y: Tensor) -> Tensor:
        """See :class:`BoundedRun`."""
        if not self.over_time.counts or logits.origin is None:
            return BoundedRun.lead(self, logits, y)
        return self._lead_of_counts(logits, y)


@dataclass(frozen=True)
class _Cases:
    """What can happen at step t, by the first step a of the window, [t + 1, M].

    Attributes:
        sure: Whether there is a spike for sure, 0 or 1, with the surrogate's derivative.
        possible: Whether there may be one, likewise.
        low: Smallest potential above rest.
        high: Largest.
    """

    sure: Tensor
    possible: Tensor
    low: Tensor
    high: Tensor


class DifferentiableTrains(SpikeTrains):
    """The trains of a spiking layer with a graph.

    Attributes:
        windows: Cases by step; none if there is a chain.
        shape: Of a step, [N, *].
        chain_of_all: Of a constant current.
        total: Time steps so far.
    """

    def __init__(self) -> None:
        """No step yet."""
        super().__init__()
        self.windows: list[_Cases] = []
        self.shape = torch.Size()
        self.chain_of_all: DifferentiableChain | None = None
        self.total = 0

    @property
    def steps(self) -> int:
        """Time steps so far."""
        return self.total

    def bounds(self, weights: Tensor) -> Interval:
        """See :class:`SpikeTrains`."""
        if self.chain_of_all is not None:
            found = self.chain_of_all.bounds(weights)
        else:
            least = self._over_paths(weights, torch.minimum)
            most = self._over_paths(weights, torch.maximum)
            found = Interval(least, most)
        return found.each(lambda end: end.view(-1, *self.shape))

    def _over_paths(self, weights: Tensor, better: _Better) -> Tensor:
        """The dynamic program of :class:`SpikeTrains`, with products in the place of cases."""
        steps = weights.shape[1]
        like = self.windows[0].sure
        rest = like.new_zeros(steps + 1, len(weights), like.shape[1])
        for t in reversed(range(steps)):
            cases = self.windows[t]
            sure = cases.sure.unsqueeze(1)
            possible = cases.possible.unsqueeze(1)
            fire = weights[:, t, None] + rest[t + 1]
            stay = rest[: t + 1]
            best = better(fire.expand_as(stay), stay)
            gained = possible * (best - stay)
            forced = sure * (fire - best)
            rest = stay + gained + forced
        return rest[0]


class _Windows:
    """The cases of a layer's steps, from bounds of its sums; see :class:`WindowedSpiking`."""

    def __init__(
        self,
        spiking: RealSpiking,
        trains: DifferentiableTrains,
        memory: Memory,
        sums: dict[tuple[int, int], Interval],
    ) -> None:
        self.spiking = spiking
        self.trains = trains
        self.memory = memory
        self.sums = sums
        self.decay = spiking.charging.decay
        self.threshold = spiking.threshold - spiking.rest

    def step(self, t: int) -> None:
        """Whether there is a spike at t, for every window that ends there."""
        trains = self.trains
        if t == 0:
            self.memory.begin(self.sums[0, 0].low)
        charged = stacked([self._charged(t, a) for a in range(t + 1)])
        cases = _Cases(
            sure=self.spiking.spike(charged.low - self.threshold),
            possible=self.spiking.spike(charged.high - self.threshold),
            low=charged.low,
            high=charged.high,
        )
        trains.windows.append(cases)
        if self.spiking.soft:
            self._remember_soft(cases)

    def _charged(self, t: int, a: int) -> Interval:
        """Bounds of the potential at t above rest if the last reset was before a."""
        sums = self.sums.get((a, t))
        if sums is None:
            return self._since(t, a, t, self.sums[t, t])
        soft = self.spiking.soft and a > 0
        low = sums.low
        high = sums.high
        if soft:
            start = self.memory.starts[a]
            kept = self.decay ** (t - a + 1)
            low = low + kept * start.low
            high = high + kept * start.high
        for k in range(a + 1, t + 1):
            since = self.sums.get((k, t))
            if since is not None:
                window = self._since(t, a, k, since)
                high = torch.minimum(high, window.high)
        whole = self.sums.get((0, t))
        if soft and whole is not None:
            count = self.memory.discounts[a]
            first = self.threshold * count.low
            second = self.threshold * count.high
            least = whole.low - torch.maximum(first, second)
            most = whole.high - torch.minimum(first, second)
            return Interval(low, high).within(Interval(least, most))
        return Interval(low, high)

    def _since(self, t: int, a: int, k: int, since: Interval) -> Interval:
        """Bounds of the same from the potential at k - 1, where there was no spike, and what was
        charged since.
        """
        before = self.trains.windows[k - 1]
        kept = self.decay ** (t - k + 1)
        silent = before.high[a].clamp(max=self.threshold)
        low = kept * before.low[a] + since.low
        high = kept * silent + since.high
        return Interval(low, high)

    def _remember_soft(self, cases: _Cases) -> None:
        """Potential and number of spikes after a spike at this step; the number has no graph."""
        memory = self.memory
        sure = cases.sure.detach() > 0
        possible = cases.possible.detach() > 0
        reached = torch.stack(memory.reached)
        low = torch.where(reached, cases.low, torch.inf)
        high = torch.where(reached, cases.high, -torch.inf)
        least = low.amin(0)
        most = high.amax(0)
        fired = Interval(least.clamp(min=self.threshold), most)
        memory.starts.append(fired.each(lambda end: end - self.threshold))
        fires = reached & possible
        some = fires.any(0)
        counts = stacked(memory.discounts)
        lows = torch.where(fires, counts.low, torch.inf)
        highs = torch.where(fires, counts.high, -torch.inf)
        fewer = lows.amin(0) + 1
        more = highs.amax(0) + 1
        counted = Interval(fewer, more)
        memory.discounts.append(counted.each(lambda end: torch.where(some, end, 0.0)))
        decay = self.spiking.charging.decay_value
        memory.discounts = [count.times(decay) for count in memory.discounts]
        memory.reached = [*(reached & ~sure), some]
