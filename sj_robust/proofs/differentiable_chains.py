"""Chains of the trains that a constant current can cause, with surrogate gradients: the first layer
of joint bounds in training.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sj_robust.ops.trains import cpp
from sj_robust.ops.trains.config import (
    BoundsBackend,
    ChainGates,
    ChainPlaces,
    Trained,
    Windows,
)
from sj_robust.proofs.joint import window_weights
from sj_robust.proofs.rounding import FLOAT64_GAP
from sj_robust.proofs.spiking import Centred, Interval, RealSpiking
from sj_robust.proofs.windows import ListedTrains, possible_trains

__all__ = ["ChainSums", "Chains", "DifferentiableChain", "Gates"]

_MOST = 128
"""Trains of a layer in training; with more of them windows are used."""


@dataclass(frozen=True)
class Gates:
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
    def between(cls, spikes: Tensor, spiking: RealSpiking) -> "Gates":
        """Of neighbouring trains [J, T]: the first step in which they differ decides."""
        steps = spikes.shape[1]
        number = torch.arange(steps)
        lower = spikes[:-1]
        differ = (lower != spikes[1:]).long()
        end = differ.argmax(1)
        earlier = lower * (number < end.unsqueeze(1))
        start = torch.zeros_like(end)
        if not spiking.soft:
            resets = earlier * (number + 1)
            start = resets.amax(1).long()
        windows = torch.stack([start, end], 1)
        slope = window_weights(spiking, windows, steps).sum(1)
        height = spiking.rest - spiking.threshold
        left = slope.new_full(slope.shape, height)
        if spiking.soft:
            age = end.unsqueeze(1) - number
            decay = torch.as_tensor(spiking.charging.decay)
            kept = decay ** age.clamp(min=0)
            fired = (kept * earlier).sum(1)
            left = left - spiking.threshold * fired
        sign = torch.where(slope < 0, -1.0, 1.0)
        train = torch.arange(len(lower))
        every = cls(sign * slope, sign * left, train, train + 1)
        return every if slope.requires_grad else every._joined()

    def _joined(self) -> "Gates":
        """One gate for all that open at the same current."""
        known = torch.stack([self.scale, self.shift], 1)
        alike = torch.isclose(known[1:], known[:-1], rtol=FLOAT64_GAP, atol=0.0)
        same = alike.all(1)
        end = same.new_ones(1)
        begins = torch.cat([end, ~same])
        ends = torch.cat([~same, end])
        return Gates(
            scale=self.scale[begins],
            shift=self.shift[begins],
            before=self.before[begins],
            after=self.after[ends],
        )


@dataclass(frozen=True)
class Chains:
    """Chains first..last of M neurons, the neurons in the order of their chains.

    Attributes:
        order: Numbers of the neurons, chain by chain, [M].
        chain: ``first * J + last`` of each neuron, in the neurons' own order, [M].
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
    def of(cls, trains: ListedTrains, current: Interval) -> "Chains":
        """Of currents [M]."""
        first, last = ends_of(trains, current)
        number = len(trains.spikes)
        chain = first * number + last
        ordered, order = chain.sort()
        present, counts = torch.unique_consecutive(ordered, return_counts=True)
        return cls(
            order=order,
            chain=chain,
            first=present // number,
            last=present % number,
            counts=counts.tolist(),
        )


def ends_of(trains: ListedTrains, current: Interval) -> tuple[Tensor, Tensor]:
    """Numbers of the first and the last train that currents [M] can cause."""
    exact = current.each(lambda end: end.detach().double())
    found = trains.chain(exact)
    return found.first, torch.maximum(found.first, found.last)


class DifferentiableChain:
    """The trains of a layer whose current is the same in every step.

    Args:
        spiking: The neuron.
        trains: Those that its currents can cause, in all time steps so far.
        current: Of the neurons, [M].
    """

    def __init__(self, spiking: RealSpiking, trains: ListedTrains, current: Interval) -> None:
        """See the class."""
        like = current.low
        gates = Gates.between(trains.spikes.cpu(), spiking)
        self.spiking = spiking
        self.trains = trains
        self.current = current
        self.spikes = trains.spikes.to(like)
        self.derivative = spiking.derivative
        self.gates = Gates(
            scale=gates.scale.to(like),
            shift=gates.shift.to(like),
            before=gates.before.to(like.device),
            after=gates.after.to(like.device),
        )

    @cached_property
    def chains(self) -> "Chains":
        """The neurons in the order of their chains."""
        return Chains.of(self.trains, self.current)

    @cached_property
    def ends(self) -> tuple[Tensor, Tensor]:
        """Numbers of the first and the last train of every neuron."""
        return ends_of(self.trains, self.current)

    @classmethod
    def of(
        cls, spiking: RealSpiking, steps: int, current: Interval
    ) -> "DifferentiableChain | None":
        """The trains that currents [M] can cause in so many steps; None if they are too many."""
        largest = float(current.size().detach().max())
        device = current.low.device
        trains = possible_trains(spiking, steps, largest=largest, error=0.0, device=device)
        if trains is None or len(trains.spikes) > _MOST:
            return None
        return cls(spiking, trains, current)

    def bounds(self, weights: Tensor, backend: BoundsBackend = "auto") -> Interval:
        """Least and largest ``sum_t weights[f, t] s[t]``, [F, M]."""
        return Interval(*self._sums(weights, backend, centred=False))

    def centred(self, weights: Tensor, backend: BoundsBackend = "auto") -> Centred:
        """The middle between them and half of their distance."""
        return Centred(*self._sums(weights, backend, centred=True))

    def _sums(
        self, weights: Tensor, backend: BoundsBackend, *, centred: bool
    ) -> tuple[Tensor, Tensor]:
        steps = weights.shape[1]
        values = weights @ self.spikes[:, :steps].T
        surrogate = self.spiking.neuron.surrogate
        reason = cpp.unsupported_reason(weights, surrogate, Windows(0))
        compiled = reason is None and backend != "reference"
        apply: Any = CompiledChainSums.apply if compiled else ChainSums.apply
        current = self.current
        gates = self.gates
        found: tuple[Tensor, Tensor] = apply(
            current.low, current.high, gates.scale, gates.shift, values, self, centred
        )
        return found


class ChainSums(torch.autograd.Function):
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
        of: DifferentiableChain,
        centred: bool,
    ) -> tuple[Tensor, Tensor]:
        """The bounds, for currents [M] and values [F, J]."""
        least, most = _begun(ctx, (low, high, scale, shift, values), centred)
        ctx.chains = of.chains
        ctx.derivative = of.derivative
        ctx.before = of.gates.before
        ctx.after = of.gates.after
        chain = of.chains.chain
        low_sums = least.flatten(1).index_select(1, chain)
        high_sums = most.flatten(1).index_select(1, chain)
        return low_sums, high_sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradients of currents, gates and values."""
        low, high, scale, shift, values, least, most = ctx.saved_tensors
        chains: Chains = ctx.chains
        ordered = torch.cat(grads).index_select(1, chains.order)
        tables = torch.cat([least, most])
        moves = _moves(tables, ctx.before, ctx.after, chains)
        opened = _opened(moves, ordered, chains.counts)
        below, above = opened.chunk(2)
        at_low = _GateGradients.of(low, below, scale, shift, chains, ctx.derivative)
        at_high = _GateGradients.of(high, above, scale, shift, chains, ctx.derivative)
        d_values = _of_values(ctx, grads, values, chains)
        return (
            at_low.current,
            at_high.current,
            at_low.scale + at_high.scale,
            at_low.shift + at_high.shift,
            d_values,
            None,
            None,
        )


def _begun(ctx: Any, given: tuple[Tensor, ...], centred: bool) -> tuple[Tensor, Tensor]:
    """Ranges of all trains, or their centres and radii; what the backward pass needs is kept.

    ``given`` are the currents at both ends, scale and shift of the gates, and the values.
    """
    first, second = ranges(given[-1])
    if centred:
        centre = (first + second) / 2
        radius = (second - first) / 2
        first = centre
        second = radius
    ctx.centred = centred
    ctx.save_for_backward(*given, first, second)
    return first, second


def _of_values(
    ctx: Any, grads: tuple[Tensor, ...], values: Tensor, chains: Chains
) -> Tensor | None:
    """Gradient of the values [F, J], if it is asked for."""
    if not ctx.needs_input_grad[4]:
        return None
    first, second = grads
    of_least = first
    of_most = second
    if ctx.centred:
        of_least = (first - second) / 2
        of_most = (first + second) / 2
    found = torch.zeros_like(values)
    number = torch.arange(len(chains.first), device=values.device)
    counts = torch.tensor(chains.counts, device=values.device)
    chain = number.repeat_interleave(counts)
    for grad, place in zip((of_least, of_most), places(values), strict=True):
        ordered = grad.index_select(1, chains.order)
        nothing = grad.new_zeros(len(grad), len(number))
        sums = nothing.index_add_(1, chain, ordered)
        found.scatter_add_(1, place[:, chains.first, chains.last], sums)
    return found


class CompiledChainSums(torch.autograd.Function):
    """The same by the compiled kernel, neuron by neuron."""

    @staticmethod
    def forward(
        ctx: Any,
        low: Tensor,
        high: Tensor,
        scale: Tensor,
        shift: Tensor,
        values: Tensor,
        of: DifferentiableChain,
        centred: bool,
    ) -> tuple[Tensor, Tensor]:
        """The bounds, for currents [M] and values [F, J]."""
        least, most = _begun(ctx, (low, high, scale, shift, values), centred)
        ctx.of = of
        first, last = of.ends
        least_by_chain = least.movedim(0, 2).contiguous()
        most_by_chain = most.movedim(0, 2).contiguous()
        return cpp.chain_sums(first, last, (least_by_chain, most_by_chain))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradients of currents, gates and values."""
        low, high, scale, shift, values, least, most = ctx.saved_tensors
        of: DifferentiableChain = ctx.of
        before = of.gates.before
        after = of.gates.after
        tables = torch.cat([least, most])
        first, last = of.ends
        gates = ChainGates(
            low=low.contiguous(),
            high=high.contiguous(),
            first=first,
            last=last,
            scale=scale.contiguous(),
            shift=shift.contiguous(),
            to_last=(tables[:, after] - tables[:, before]).permute(2, 1, 0),
            from_first=(tables[:, :, after] - tables[:, :, before]).permute(1, 2, 0),
        )
        given = (grads[0].contiguous(), grads[1].contiguous())
        places_of = None
        if ctx.needs_input_grad[4]:
            of_least, of_most = places(values)
            places_of = ChainPlaces(of_least.movedim(0, 2), of_most.movedim(0, 2), ctx.centred)
        found = cpp.chain_sums_backward(given, gates, trained(of.spiking), places_of)
        return *found, None, None


def trained(spiking: RealSpiking) -> Trained:
    """What a kernel has to know of a neuron."""
    surrogate = spiking.neuron.surrogate
    return Trained(
        threshold=spiking.threshold - spiking.rest,
        surrogate=surrogate.kind,
        alpha=surrogate.alpha,
        width=spiking.surrogate_width,
    )


def ranges(values: Tensor) -> tuple[Tensor, Tensor]:
    """f(a, b) of least and largest values, [F, J, J]; see :class:`ChainSums`."""
    upto, before = _from_each(values)
    first = values.unsqueeze(2).expand(upto.shape)
    least_behind = upto.masked_fill(before, torch.inf).cummin(2).values
    most_behind = upto.masked_fill(before, -torch.inf).cummax(2).values
    least = torch.where(before, first, least_behind)
    most = torch.where(before, upto, most_behind)
    return least, most


def places(values: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the trains with these values for a <= b, [F, J, J]."""
    upto, before = _from_each(values)
    least = upto.masked_fill(before, torch.inf).cummin(2).indices
    most = upto.masked_fill(before, -torch.inf).cummax(2).indices
    return least, most


def _from_each(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values by b for every a, [F, J, J], and whether b < a, [J, J]."""
    J = values.shape[1]
    number = torch.arange(J, device=values.device)
    is_before = number < number.unsqueeze(1)
    return values.unsqueeze(1).expand(-1, J, -1), is_before


def _moves(tables: Tensor, before: Tensor, after: Tensor, chains: Chains) -> Tensor:
    """By chain, what a gate changes that opens at the lower current, and at the upper one, [chains,
    2 G, 2 F].
    """
    to_last = tables[:, :, chains.last]
    below = to_last[:, after] - to_last[:, before]
    from_first = tables[:, chains.first].transpose(1, 2)
    above = from_first[:, after] - from_first[:, before]
    moves = torch.cat([below, above], 1)
    return moves.permute(2, 1, 0).contiguous()


def _opened(moves: Tensor, ordered: Tensor, counts: list[int]) -> Tensor:
    """Gradients of all gates of all neurons, [2 G, M], from those of the sums."""
    found = ordered.new_empty(moves.shape[1], ordered.shape[1])
    start = 0
    for move, count in zip(moves, counts, strict=True):
        part = slice(start, start + count)
        torch.mm(move, ordered[:, part], out=found[:, part])
        start += count
    return found


@dataclass(frozen=True)
class _GateGradients:
    """Gradients that go through gates at one end of the currents."""

    current: Tensor
    scale: Tensor
    shift: Tensor

    @classmethod
    def of(
        cls,
        current: Tensor,
        opened: Tensor,
        scale: Tensor,
        shift: Tensor,
        chains: Chains,
        derivative: Callable[[Tensor], Tensor],
    ) -> "_GateGradients":
        """For currents [M] and gradients of open gates [G, M], those in the order of chains."""
        here = current[chains.order]
        z = torch.addcmul(shift.unsqueeze(1), scale.unsqueeze(1), here)
        slopes = opened * derivative(z)
        d_current = torch.empty_like(current)
        d_current[chains.order] = scale @ slopes
        return cls(d_current, slopes @ here, slopes.sum(1))
