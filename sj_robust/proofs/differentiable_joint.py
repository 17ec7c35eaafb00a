"""Joint bounds that training can follow: chains, windows and counts with surrogate gradients."""

import torch
from torch import Tensor

from sj_robust.neuron.charging import Neuron
from sj_robust.ops.trains.config import Windows
from sj_robust.ops.trains.operator import joint_sums, trained_reason
from sj_robust.ops.trains.reference import Spiking, differentiable_sums
from sj_robust.proofs.bounds import BoundedRun
from sj_robust.proofs.differentiable_chains import DifferentiableChain, trained
from sj_robust.proofs.joint import JointRun, OverTime
from sj_robust.proofs.opened import counts
from sj_robust.proofs.rules import Bounds
from sj_robust.proofs.spiking import Interval, RealSpiking
from sj_robust.proofs.windows import KEPT, SpikeTrains

__all__ = ["DifferentiableJointRun"]


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
        trains.total = steps
        trains.spiking = spiking
        if trains.chain_of_all is None:
            known = 1 + max((t for _, t in memory.summed), default=-1)
            sums = self._all_sums(spiking, slice(None), first=known)
            trains.sums = sums.low, sums.high
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

    def centred(self, weights: Tensor) -> Interval:
        """See :class:`SpikeTrains`."""
        if self.chain_of_all is None:
            return super().centred(weights)
        found = self.chain_of_all.bounds(weights, self.backend, centred=True)
        return found.each(lambda end: end.view(-1, *self.shape))

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
        reason = trained_reason(weights, surrogate, self.windows)
        if self.backend == "reference" or spiking.soft or reason is not None:
            neuron = Spiking(threshold, spiking.soft, spiking.spike)
            return differentiable_sums(self.sums, weights, powers, neuron, self.windows)
        return joint_sums(self.sums, weights, powers, trained(spiking), self.windows)
