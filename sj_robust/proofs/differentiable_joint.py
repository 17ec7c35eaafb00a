"""Joint bounds that training can follow: chains, windows and counts with surrogate gradients."""

from typing import Any

import torch
from torch import Tensor

from sj_robust.neuron.charging import Neuron
from sj_robust.ops.trains.config import Windows
from sj_robust.ops.trains.cpp import joint_sums, unsupported_reason
from sj_robust.ops.trains.reference import Spiking, differentiable_sums
from sj_robust.proofs.bounds import BoundedRun
from sj_robust.proofs.differentiable_chains import DifferentiableChain, trained
from sj_robust.proofs.joint import JointRun, MappedSums, OverTime
from sj_robust.proofs.neurons import counts
from sj_robust.proofs.rules import Bounds
from sj_robust.proofs.spiking import Centred, Interval, RealSpiking
from sj_robust.proofs.structure import by_step, in_layout
from sj_robust.proofs.windows import KEPT, SpikeTrains

__all__ = ["DifferentiableJointRun", "WindowSums"]


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
        self.trains = {name: DifferentiableTrains(Windows(KEPT)) for name in neurons}
        for name, trains in self.trains.items():
            self.memories[name].trains = trains

    def _leaf_behind(self, neuron: Neuron, x: Bounds, batch_dim: int) -> Bounds:
        """See :class:`BoundedRun`; spikes are asked for by centre and radius, as leaves have
        them.
        """
        if counts(neuron) is not None:
            return super()._leaf_behind(neuron, x, batch_dim)
        self.sources.append(self.trains[neuron.name])
        spikes = self._spikes(neuron).each(lambda part: in_layout(part, batch_dim))
        return self.leaf_around(spikes.centre, spikes.radius, batch_dim)

    def _spikes(self, neuron: Neuron) -> Centred:
        """The spikes of a call."""
        name = neuron.name
        memory = self.memories[name]
        trains = self.trains[name]
        first = trains.steps
        current = self._current(self.layer_calls[-1])
        memory.currents += current.steps()
        steps = len(memory.currents)
        trains.shape = current.low.shape[1:]
        spiking = RealSpiking(neuron, self.layers[name], self.surrogate_width)
        trains.chain_of_all = None
        if self.has_chain(spiking):
            constant = memory.currents[-1].each(torch.flatten)
            trains.chain_of_all = DifferentiableChain.of(spiking, steps, constant)
        trains.total = steps
        trains.spiking = spiking
        if trains.chain_of_all is None:
            ends = [t for _, t in memory.summed]
            known = 1 + max(ends, default=-1)
            sums = self._all_sums(spiking, slice(None), first=known)
            trains.sums = sums.low, sums.high
        self.layer_calls.clear()
        if name in self.over_time.counted:  # nobody asks for single spikes
            half = torch.full_like(current.low, 0.5)
            return Centred(half, half)
        every = torch.eye(steps).to(current.low)
        return trains.centred(every[first:])

    def _joined(self, gain: Tensor, currents: list[Interval], longer: MappedSums) -> Interval:
        """See :class:`JointRun`; the graph of all sums is one node."""
        call = self.layer_calls[-1]
        x = call.current
        centre = by_step(x.centre, self.samples, call.batch_dim).flatten(1)
        radius = by_step(x.radius, self.samples, call.batch_dim).flatten(1)
        if x.changes is not None or len(centre) != len(currents):
            return super()._joined(gain, currents, longer)
        low, high = WindowSums.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
            gain, centre, radius, longer.shares, longer.centre, longer.radius
        )
        return Interval(low, high)

    def lead(self, logits: Bounds, y: Tensor) -> Tensor:
        """See :class:`BoundedRun`."""
        if not self.over_time.counts:
            return BoundedRun.lead(self, logits, y)
        return self._lead_of_counts(logits, y)


class WindowSums(torch.autograd.Function):
    """Bounds of the sums of single steps and of longer windows by row, [W, M].

    Equation, with p the gains of the steps, c -+ r their currents, C -+ R the sums behind the map
    of a step with its shift b = C[-1] once, and n how often it counts beyond that::

        p c -+ |p| r,   C + n b -+ R
    """

    @staticmethod
    def forward(
        ctx: Any,
        gain: Tensor,
        centre: Tensor,
        radius: Tensor,
        shares: Tensor,
        mapped: Tensor,
        width: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Smallest and largest sums, for currents [T, M] and mapped sums [places, M]."""
        ctx.save_for_backward(gain, centre, radius, shares, mapped[-1])
        ctx.places = len(mapped)
        T, M = centre.shape
        number = len(shares)
        low = centre.new_empty(T + number, M)
        high = torch.empty_like(low)
        scales = gain.unsqueeze(1)
        middle = scales * centre
        half = scales.abs() * radius
        torch.sub(middle, half, out=low[:T])
        torch.add(middle, half, out=high[:T])
        middle = torch.addcmul(mapped[:number], shares.unsqueeze(1), mapped[-1:])
        half = width[:number]
        torch.sub(middle, half, out=low[T:])
        torch.add(middle, half, out=high[T:])
        return low, high

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradients of all six."""
        gain, centre, radius, shares, shift = ctx.saved_tensors
        T = len(gain)
        number = len(shares)
        middle = grads[0] + grads[1]
        half = grads[1] - grads[0]
        scales = gain.unsqueeze(1)
        d_gain = None
        if ctx.needs_input_grad[0]:
            of_radius = _dots(half[:T], radius)
            d_gain = _dots(middle[:T], centre) + gain.sign() * of_radius
        d_mapped = centre.new_zeros(ctx.places, centre.shape[1])
        d_mapped[:number] = middle[T:]
        torch.mv(middle[T:].T, shares, out=d_mapped[-1])
        d_width = torch.zeros_like(d_mapped)
        d_width[:number] = half[T:]
        d_shares = middle[T:] @ shift if ctx.needs_input_grad[3] else None
        d_centre = scales * middle[:T]
        return d_gain, d_centre, scales.abs() * half[:T], d_shares, d_mapped, d_width


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Product of each row of one with that of the other."""
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).flatten()


class DifferentiableTrains(SpikeTrains):
    """The trains of a spiking layer with a graph.

    Attributes:
        spiking: The neuron.
        sums: Smallest and largest sums of every window by row, [W, M]; None if there is a chain.
        shape: Of a step, [N, *].
        chain_of_all: Of a constant current.
        total: Time steps so far.
    """

    def __init__(self, windows: Windows) -> None:
        """No step yet."""
        super().__init__(windows)
        self.spiking: RealSpiking | None = None
        self.sums: tuple[Tensor, Tensor] | None = None
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
            found = self.chain_of_all.bounds(weights, self.backend)
        else:
            found = Interval(*self._over_paths(weights))
        return found.each(lambda end: end.view(-1, *self.shape))

    def centred(self, weights: Tensor) -> Centred:
        """See :class:`SpikeTrains`."""
        if self.chain_of_all is None:
            return super().centred(weights)
        found = self.chain_of_all.centred(weights, self.backend)
        return found.each(lambda part: part.view(-1, *self.shape))

    def _over_paths(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The dynamic program, by the compiled kernel where it can."""
        assert self.spiking is not None
        assert self.sums is not None
        spiking = self.spiking
        missing = self.total - weights.shape[1]
        if missing:
            weights = torch.nn.functional.pad(weights, (0, missing))
        decay = torch.as_tensor(spiking.charging.decay).to(weights)
        powers = decay ** torch.arange(self.total + 1, device=weights.device)
        threshold = spiking.threshold - spiking.rest
        surrogate = spiking.neuron.surrogate
        reason = unsupported_reason(weights, surrogate, self.windows)
        if self.backend == "reference" or spiking.soft or reason is not None:
            neuron = Spiking(threshold, spiking.soft, spiking.spike)
            return differentiable_sums(self.sums, weights, powers, neuron, self.windows)
        return joint_sums(self.sums, weights, powers, trained(spiking), self.windows)
