"""HoSNN: thresholds that pull the potential back to its usual value."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from sj_robust.core.host import within_backward
from sj_robust.defences.node import PerNeuron, SteppedNode, check_decay
from sj_robust.ops.recurrence import charge, reset

__all__ = ["HomeostaticNode"]


class HomeostaticNode(SteppedNode, PerNeuron):
    """LIF neuron whose threshold follows the error of its potential (the TA-LIF of HoSNN).
    阈值自适应（稳态）LIF 神经元。

    Equation, with ``decay = 1 - 1 / tau`` and the signature u, the potential that the neuron
    usually has at this step::

        h[t] = decay * v[t-1] + x[t]   (+ (1 - decay) * v_reset for a hard reset)
        th[t] = th[t-1] + |rate| * (h[t] - u[t])       th[-1] = v_threshold
        s[t] = 1 if h[t] >= th[t] else 0
        v[t] = (1 - s[t]) * h[t] + s[t] * v_reset      (v_reset None: h[t] - s[t] * th[t])

    A potential raised by a perturbation raises the threshold, and a lowered one lowers it.
    ``rate`` [*], a parameter that starts at ``1 / tau_v``, and the signature [T, *] have one value
    per neuron; the first forward determines their shapes. With ``rate`` 0 it is LIF.

    Differences from the paper: there, the signature is that of a LIF network trained beforehand on
    clean images; here, it is the running mean of the neuron's own h over all training images, like
    the statistics of batch norm, so that one training is enough. Until the first batch in training
    mode the threshold does not move. Its code clips the rate to stay above 0 and defines its own
    gradient of the rate; here the gradient is that of the equation.

    Shapes and states: see :class:`SteppedNode`; ``th`` is also a state.

    Args:
        T: Number of time steps of a sequence.
        tau: Membrane time constant in steps, > 1; 5 in the paper.
        tau_v: Time constant of the threshold in steps, > 0; 5 in the paper's code for CIFAR-10, 1.5
            for MNIST. ``math.inf`` is LIF.
        momentum: Weight of a new batch in the signature, in [0, 1]; 0 keeps the loaded signature.
        **arguments: Those of :class:`SteppedNode`.

    Raises:
        ValueError: If an argument is out of range.
        RuntimeError: If a sequence is longer than T, samples do not have the shape of the rates, or
            activation checkpointing runs it again in training.

    Source: Geng and Li, "HoSNNs: Adversarially-Robust Homeostatic Spiking Neural Networks with
        Adaptive Firing Thresholds" (TMLR 2025, arXiv 2308.10373), and its code.

    Examples:
        >>> node = HomeostaticNode(T=4, tau=2.0)
        >>> _ = node.train()(torch.full((4, 3, 5), 0.6))  # fires as LIF and takes note
        >>> node.signature[:2, 0]
        tensor([0.6000, 0.9000])
        >>> node.reset()
        >>> node.eval()(torch.full((4, 1, 5), 0.6))[:, 0, 0].detach()
        tensor([0., 0., 1., 0.])
    """

    T: int
    th: Tensor | float
    usual: "_Signature"

    def __init__(
        self,
        T: int,
        tau: float = 5.0,
        *,
        tau_v: float = 5.0,
        momentum: float = 0.1,
        **arguments: Any,
    ) -> None:
        """Build the neuron; see the class."""
        super().__init__(**arguments)
        if T < 1:
            raise ValueError(f"T must be >= 1, the number of time steps of a sequence, got {T}")
        if not tau_v > 0:
            raise ValueError(f"tau_v must be > 0, got {tau_v}; math.inf is LIF")
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum must be in [0, 1], got {momentum}")
        self.T = T
        self.tau = float(tau)
        self.decay = check_decay(tau)
        self.tau_v = float(tau_v)
        self.rate = UninitializedParameter()
        self.usual = _Signature(T, momentum)
        self.register_memory("th", self.v_threshold)

    @property
    def signature(self) -> Tensor:
        """The usual potential before the reset at every step, [T, *]."""
        return self.usual.mean

    def step(self, x: Tensor, states: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
        """See the class."""
        v, time_step, th = states
        if time_step >= self.T:
            raise RuntimeError(
                f"HomeostaticNode has T={self.T} time steps, but step {time_step + 1} was asked "
                "for: call functional.reset_net(net) before every new sequence, or build the "
                "neuron with a larger T"
            )
        self.materialize("rate", tuple(x.shape[1:]), 1.0 / self.tau_v, x)
        h = charge(v, x, decay=self.decay, gain=1.0, v_reset=self.v_reset)
        error = self.usual(h, time_step)
        rate = self.rate.abs().to(h.dtype)
        th = th + rate * error
        spike = self.surrogate_function(h - th)
        fired = spike.detach() if self.detach_reset else spike
        v = reset(h, fired, v_threshold=th, v_reset=self.v_reset)
        return spike, (v, time_step + 1, th)

    def extra_repr(self) -> str:
        """Parameters shown by ``print``."""
        return f"T={self.T}, tau={self.tau}, tau_v={self.tau_v}, {super().extra_repr()}"


_NOTED_IN: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Tensor]] = weakref.WeakKeyDictionary()
"""The buffer in which a signature took note of its last batch: no part of the network, or one that
was trained would be another than the one that is loaded from its weights.
"""


class _Signature(PerNeuron):
    """Running mean of the potentials of every neuron and step, and how far others lie from it.

    It is a module of its own because a classifier puts the neurons of SpikingJelly 0.0.0.0.14, and
    nothing else, in training mode where it needs a gradient.
    """

    T: int
    per_step = ("mean", "batches")
    mean: Tensor
    batches: Tensor

    def __init__(self, T: int, momentum: float) -> None:
        super().__init__()
        self.T = T
        self.momentum = momentum
        self.register_buffer("mean", None)
        self.register_buffer("batches", torch.zeros(T, dtype=torch.int64))

    def forward(self, h: Tensor, t: int) -> Tensor:
        """``h - u[t]``, 0 where nothing was noted before.

        Raises:
            RuntimeError: If activation checkpointing runs it again, with a mean that has moved.
        """
        shape = (self.T, *h.shape[1:])
        self.materialize("mean", shape, 0.0, h)
        known = self.batches[t] > 0
        usual = self.mean[t].to(h.dtype)
        error = torch.where(known, h - usual, 0.0)
        if self.training and self.momentum > 0 and len(h) > 0:
            self._check_is_first_run()
            batch = h.detach().mean(0)
            self._note(batch, t, known)
        return error

    def _check_is_first_run(self) -> None:
        if torch.compiler.is_compiling():
            return
        if not within_backward():
            _NOTED_IN[self] = weakref.ref(self.batches)
            return
        noted_in = _NOTED_IN.get(self)
        if noted_in is not None and noted_in() is self.batches:
            raise RuntimeError(
                "a HomeostaticNode in training runs again inside a backward pass, as activation "
                "checkpointing does, after its signature has taken note of this batch: threshold "
                "and gradient would be others. Leave it out of what is checkpointed, set "
                "momentum=0, or use SpikingJelly 2.x's memopt.checkpoint_module, which works on "
                "copies of the buffers"
            )

    @torch.no_grad()
    def _note(self, h: Tensor, t: int, known: Tensor) -> None:
        share = torch.where(known, self.momentum, 1.0)
        change = h - self.mean[t]
        self.mean[t] += share * change
        self.batches[t] += 1

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}"
