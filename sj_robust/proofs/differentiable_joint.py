"""Joint bounds that training can follow: chains, windows and counts with surrogate gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sj_robust.neuron.charging import Neuron
from sj_robust.proofs.bounds import BoundedRun
from sj_robust.proofs.joint import JointRun, OverTime, window_weights
from sj_robust.proofs.rules import Bounds
from sj_robust.proofs.spiking import Interval, RealSpiking
from sj_robust.proofs.trains import Trains, possible_trains
from sj_robust.proofs.windows import Memory, SpikeTrains

__all__ = ["DifferentiableJointRun"]

_GAP = 1e-9
"""Relative difference that float64's rounding stays below."""

_MOST = 128
"""Trains of a layer in training; with more of them windows are used."""


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
        self.memories = {name: Memory(trains) for name, trains in self.trains.items()}

    def spikes(self, neuron: Neuron, x_seq: Interval) -> Interval:
        """See :class:`BoundedRun`."""
        name = neuron.name
        memory = self.memories[name]
        trains = self.trains[name]
        first = trains.steps
        current = self._current(self.stages[-1])
        for low, high in zip(current.low, current.high, strict=True):
            memory.currents.append(Interval(low, high))
        trains.shape = current.low.shape[1:]
        spiking = RealSpiking(neuron, self.layers[name], self.surrogate_width)
        trains.chain_of = None
        if self.over_time.kinds[name] == "constant":
            trains.chain_of = _chain_of(spiking, memory)
        if trains.chain_of is None:
            sums = self._sums(spiking, memory, slice(None))
            windows = _Windows(spiking, trains, sums)
            for t in range(first, len(memory.currents)):
                windows.step(t)
        trains.total = len(memory.currents)
        self.stages.clear()  # which hold the run
        if name in self.over_time.counted:  # nobody asks for single spikes
            nothing = torch.zeros_like(current.low)
            return Interval(nothing, nothing + 1)
        every = torch.eye(trains.total, dtype=current.low.dtype, device=current.low.device)
        return trains.bounds(every[first:])

    def lead(self, logits: Bounds, y: Tensor) -> Tensor:
        """See :class:`BoundedRun`."""
        if not self.over_time.counts or logits.origin is None:
            return BoundedRun.lead(self, logits, y)
        return self._lead_of_counts(logits, y)


class DifferentiableTrains(SpikeTrains):
    """The trains of a spiking layer with a graph.

    Attributes:
        sure: By step t and first step a of the window, whether there is a spike for sure, [t + 1,
            M] of 0 and 1, with the surrogate's derivative.
        possible: Whether there may be one, likewise.
        charged: By t and a, bounds of the potential above rest, [M].
        shape: Of a step, [N, *].
        chain_of: Bounds [F, M] of the sums that weights [F, T] give, of a constant current.
        total: Time steps so far.
    """

    def __init__(self) -> None:
        """No step yet."""
        super().__init__()
        self.sure: list[Tensor] = []
        self.possible: list[Tensor] = []
        self.charged: list[list[Interval]] = []
        self.soft = _AfterSpikes()
        self.shape: torch.Size = torch.Size()
        self.chain_of: Callable[[Tensor], Interval] | None = None
        self.total = 0

    @property
    def steps(self) -> int:
        """Time steps so far."""
        return self.total

    def bounds(self, weights: Tensor) -> Interval:
        """See :class:`SpikeTrains`."""
        if self.chain_of is not None:
            found = self.chain_of(weights)
        else:
            least = self._over_paths(weights, torch.minimum)
            most = self._over_paths(weights, torch.maximum)
            found = Interval(least, most)
        return found.each(lambda end: end.view(-1, *self.shape))

    def _over_paths(self, weights: Tensor, better: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The dynamic program of :class:`SpikeTrains`, with products in the place of cases."""
        steps = weights.shape[1]
        neurons = self.sure[0].shape[1]
        rest = self.sure[0].new_zeros(steps + 1, len(weights), neurons)
        for t in reversed(range(steps)):
            fire = weights[:, t, None] + rest[t + 1]
            stay = rest[: t + 1]
            best = better(fire.expand_as(stay), stay)
            possible = self.possible[t].unsqueeze(1)
            sure = self.sure[t].unsqueeze(1)
            rest = stay + possible * (best - stay) + sure * (fire - best)
        return rest[0]


class _AfterSpikes:
    """What spikes leave where the reset is soft.

    Attributes:
        reached: By first step a of the window, whether the last reset can have been before a, [M].
        starts: By a, bounds of the potential above rest that a spike at a - 1 left.
        counts: By a, bounds of the discounted number of spikes before a.
    """

    def __init__(self) -> None:
        """Nothing has happened."""
        self.reached: list[Tensor] = []
        self.starts: list[Interval] = []
        self.counts: list[Interval] = []

    def begin(self, like: Tensor) -> None:
        """Before the first step."""
        nothing = torch.zeros_like(like)
        zero = Interval(nothing, nothing)
        self.reached.append(torch.ones_like(like, dtype=torch.bool))
        self.starts.append(zero)
        self.counts.append(zero)


class _Windows:
    """The cases of a layer's steps, from bounds of its sums; see :class:`WindowedSpiking`."""

    def __init__(
        self,
        spiking: RealSpiking,
        trains: DifferentiableTrains,
        sums: dict[tuple[int, int], Interval],
    ) -> None:
        self.spiking = spiking
        self.trains = trains
        self.sums = sums
        self.decay = spiking.charging.decay
        self.threshold = spiking.threshold - spiking.rest

    def step(self, t: int) -> None:
        """Whether there is a spike at t, for every window that ends there."""
        trains = self.trains
        if t == 0:
            trains.soft.begin(self.sums[0, 0].low)
        charged = [self._charged(t, a) for a in range(t + 1)]
        low = torch.stack([one.low for one in charged])
        high = torch.stack([one.high for one in charged])
        sure = self.spiking.spike(low - self.threshold)
        possible = self.spiking.spike(high - self.threshold)
        trains.charged.append(charged)
        trains.sure.append(sure)
        trains.possible.append(possible)
        if self.spiking.soft:
            self._spiked(low, high, sure.detach() > 0, possible.detach() > 0)

    def _charged(self, t: int, a: int) -> Interval:
        """Bounds of the potential at t above rest if the last reset was before a."""
        sums = self.sums.get((a, t))
        if sums is None:  # then the one at t - 1 is known
            before = self.trains.charged[t - 1][a]
            step = self.sums[t, t]
            silent = before.high.clamp(max=self.threshold)
            return Interval(self.decay * before.low + step.low, self.decay * silent + step.high)
        low = sums.low
        high = sums.high
        if self.spiking.soft and a:
            start = self.trains.soft.starts[a]
            kept = self.decay ** (t - a + 1)
            low = low + kept * start.low
            high = high + kept * start.high
        for k in range(a + 1, t + 1):
            since = self.sums.get((k, t))
            if since is not None:
                silent = self.trains.charged[k - 1][a].high.clamp(max=self.threshold)
                most = self.decay ** (t - k + 1) * silent + since.high
                high = torch.minimum(high, most)
        if self.spiking.soft and a and (0, t) in self.sums:
            whole = self.sums[0, t]
            first = self.threshold * self.trains.soft.counts[a].low
            second = self.threshold * self.trains.soft.counts[a].high
            low = torch.maximum(low, whole.low - torch.maximum(first, second))
            high = torch.minimum(high, whole.high - torch.minimum(first, second))
        return Interval(low, high)

    def _spiked(self, low: Tensor, high: Tensor, sure: Tensor, possible: Tensor) -> None:
        """What a spike at this step leaves to later ones; soft resets."""
        soft = self.trains.soft
        decay = self.spiking.charging.decay_value
        reached = torch.stack(soft.reached)
        least = torch.where(reached, low, torch.inf).amin(0)
        most = torch.where(reached, high, -torch.inf).amax(0)
        start = Interval(least.clamp(min=self.threshold), most)
        soft.starts.append(start.each(lambda end: end - self.threshold))
        fires = reached & possible
        some = fires.any(0)
        fewer = torch.stack([count.low for count in soft.counts])
        more = torch.stack([count.high for count in soft.counts])
        fewer = torch.where(fires, fewer, torch.inf).amin(0)
        more = torch.where(fires, more, -torch.inf).amax(0)
        counted = Interval(torch.where(some, fewer + 1, 0.0), torch.where(some, more + 1, 0.0))
        soft.counts.append(counted)
        soft.counts = [count.times(decay) for count in soft.counts]
        soft.reached = [*(reached & ~sure), some]


@dataclass(frozen=True)
class _Gates:
    """The currents I at which a train turns into another one, where ``scale I + shift = 0``.

    Attributes:
        scale: Slope of the potential that meets the threshold there, without its sign, [G].
        shift: What is left of that potential above the threshold, with the slope's sign, [G].
        before: Number of the last train below.
        after: Number of the first train above; those between them need that very current.
    """

    scale: Tensor
    shift: Tensor
    before: Tensor
    after: Tensor

    @classmethod
    def between(cls, spikes: Tensor, spiking: RealSpiking) -> "_Gates":
        """Of neighbouring trains [J, T]: the first step in which they differ decides."""
        before = spikes[:-1]
        number = torch.arange(spikes.shape[1])
        end = (before != spikes[1:]).long().argmax(1)
        earlier = before * (number < end.unsqueeze(1))
        start = torch.zeros_like(end)
        if not spiking.soft:
            start = (earlier * (number + 1)).amax(1).long()
        windows = torch.stack([start, end], 1)
        slope = window_weights(spiking, windows, spikes.shape[1]).sum(1)
        left = slope.new_full(slope.shape, spiking.rest - spiking.threshold)
        if spiking.soft:
            age = (end.unsqueeze(1) - number).clamp(min=0)
            discounts = torch.as_tensor(spiking.charging.decay) ** age
            left = left - spiking.threshold * (discounts * earlier).sum(1)
        sign = torch.where(slope < 0, -1.0, 1.0)
        train = torch.arange(len(before))
        every = cls(sign * slope, sign * left, train, train + 1)
        return every if slope.requires_grad else every._joined()

    def _joined(self) -> "_Gates":
        """One gate for all that open at the same current."""
        known = torch.stack([self.scale, self.shift], 1)
        alike = torch.isclose(known[1:], known[:-1], rtol=_GAP, atol=0.0).all(1)
        begins = torch.cat([alike.new_ones(1), ~alike])
        ends = torch.cat([~alike, alike.new_ones(1)])
        return _Gates(self.scale[begins], self.shift[begins], self.before[begins], self.after[ends])


def _chain_of(spiking: RealSpiking, memory: Memory) -> Callable[[Tensor], Interval] | None:
    """Bounds of sums over the trains of a constant current; None if there are too many trains."""
    current = memory.currents[-1].each(torch.flatten)
    like = current.low
    trains = possible_trains(
        spiking,
        len(memory.currents),
        largest=float(current.size().detach().max()),
        error=0.0,
        device=like.device,
    )
    if trains is None or len(trains.spikes) > _MOST:
        return None
    gates = _Gates.between(trains.spikes.cpu(), spiking)
    spikes = trains.spikes.to(like)
    chains = _Chains.of(trains, current)

    def bounds(weights: Tensor) -> Interval:
        ends: tuple[Tensor, Tensor] = _ChainSums.apply(  # type: ignore[no-untyped-call]  # torch's
            current.low,
            current.high,
            gates.scale.to(like),
            gates.shift.to(like),
            weights @ spikes[:, : weights.shape[1]].T,
            gates,
            chains,
            spiking.derivative,
        )
        return Interval(*ends)

    return bounds


class _Chains(NamedTuple):
    """Chains first..last of M neurons, those that are equal one after the other.

    Attributes:
        order: Numbers of the neurons, chain by chain [M].
        chain: Number of each neuron's chain, ``first * J + last``, in their own order [M].
        first: Of every chain that occurs.
        last: Likewise.
        counts: Neurons that have it.
    """

    order: Tensor
    chain: Tensor
    first: Tensor
    last: Tensor
    counts: list[int]

    @classmethod
    def of(cls, trains: Trains, current: Interval) -> "_Chains":
        found = trains.chain(current.each(lambda end: end.detach().double()))
        number = len(trains.spikes)
        chain = found.first * number + torch.maximum(found.first, found.last)
        ordered, order = chain.sort()
        present, counts = torch.unique_consecutive(ordered, return_counts=True)
        return cls(order, chain, present // number, present % number, counts.tolist())


class _ChainSums(torch.autograd.Function):
    """Least and largest of the values of the trains first..last, [F, M] each.

    Equation, with a and b the numbers of gates that are open at the lower and the upper current,
    and f(a, b) the least value of the trains a..b, or that of a if a > b::

        f(a, b) = f(0, b) + sum_j open[j] (f(after[j], b) - f(before[j], b))
                = f(a, 0) + sum_j open[j] (f(a, after[j]) - f(a, before[j]))

    in which the gradient takes the surrogate's derivative for that of a gate; the largest value
    likewise, with that of b if a > b.
    """

    @staticmethod
    def forward(
        ctx: Any,
        low: Tensor,
        high: Tensor,
        scale: Tensor,
        shift: Tensor,
        values: Tensor,
        gates: _Gates,
        chains: _Chains,
        derivative: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The bounds, for currents [M] and values [F, J]."""
        least, most = _ranges(values)
        ctx.save_for_backward(low, high, scale, shift, values, least, most)
        ctx.chains, ctx.derivative = chains, derivative
        ctx.before, ctx.after = gates.before, gates.after
        least, most = (table.flatten(1).index_select(1, chains.chain) for table in (least, most))
        return least, most

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradients of currents, gates and values."""
        low, high, scale, shift, values, least, most = ctx.saved_tensors
        chains: _Chains = ctx.chains
        order = chains.order
        tables = torch.cat([least, most])
        ordered = torch.cat(grads).index_select(1, order)
        before, after = ctx.before, ctx.after
        below = tables[:, after][:, :, chains.last] - tables[:, before][:, :, chains.last]
        above = tables[:, chains.first][:, :, after] - tables[:, chains.first][:, :, before]
        moves = torch.cat([below, above.transpose(1, 2)], 1).permute(2, 1, 0).contiguous()
        gates = len(scale)
        opened = torch.empty(2 * gates, len(order), dtype=low.dtype, device=low.device)
        start = 0
        for move, count in zip(moves, chains.counts, strict=True):
            part = slice(start, start + count)
            torch.mm(move, ordered[:, part], out=opened[:, part])
            start += count
        d_scale = torch.zeros_like(scale)
        d_shift = torch.zeros_like(shift)
        found = []
        for current, slopes in zip((low, high), torch.split(opened, gates), strict=True):
            here = current[order]
            z = torch.addcmul(shift.unsqueeze(1), scale.unsqueeze(1), here)
            slopes *= ctx.derivative(z)
            found.append(torch.empty_like(current).index_copy_(0, order, scale @ slopes))
            d_scale += slopes @ here
            d_shift += slopes.sum(1)
        d_values = None
        if ctx.needs_input_grad[4]:
            d_values = _to_values(values, chains, ordered)
        return found[0], found[1], d_scale, d_shift, d_values, None, None, None


def _ranges(values: Tensor) -> tuple[Tensor, Tensor]:
    """f(a, b) of least and largest values, [F, J, J]; see :class:`_ChainSums`."""
    number = values.shape[1]
    least = []
    most = []
    for a in range(number):
        own = values[:, a : a + 1].expand(-1, a)
        least.append(torch.cat([own, values[:, a:].cummin(1).values], 1))
        most.append(torch.cat([values[:, :a], values[:, a:].cummax(1).values], 1))
    return torch.stack(least, 1), torch.stack(most, 1)


def _to_values(values: Tensor, chains: _Chains, ordered: Tensor) -> Tensor:
    """Gradients of the trains whose values are the least and the largest ones."""
    found = torch.zeros_like(values)
    parts = torch.split(ordered, chains.counts, 1)
    totals = torch.stack([part.sum(1, keepdim=True) for part in parts])
    ends = zip(chains.first.tolist(), chains.last.tolist(), totals, strict=True)
    for first, last, total in ends:
        low, high = total.chunk(2)
        some = values[:, first : last + 1]
        found.scatter_add_(1, some.argmin(1, keepdim=True) + first, low)
        found.scatter_add_(1, some.argmax(1, keepdim=True) + first, high)
    return found
