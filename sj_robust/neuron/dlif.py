"""DLIF as a SpikingJelly neuron."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, fx, nn

from sj_robust import ops
from sj_robust.core.checks import (
    check_count,
    check_number,
    check_surrogate,
    check_tau,
    of_other_steps,
)
from sj_robust.core.host import (
    is_counted,
    lif_multi_step,
    neuron,
    potential_at_reset,
    start_from,
    surrogate,
    within_backward,
)
from sj_robust.ops.dlif import operator as dlif
from sj_robust.ops.dlif.config import HOST_NAMES, Outputs, state_dtype

__all__ = ["DLIFNode", "Gradient", "Spiking", "describe_surrogate"]


@runtime_checkable
class Spiking(Protocol):
    """A surrogate that says whether its values are spikes, as SpikingJelly's do."""

    spiking: bool


class Gradient(Protocol):
    """Another backward pass of a neuron for the same spikes, as a gradient estimator has it.

    ``forward`` runs the neuron's own forward pass, which moves its state on; it is called once.
    """

    def multi_step(self, x_seq: Tensor, forward: Callable[[], Tensor]) -> Tensor:
        """Spikes [T, N, *] of ``forward`` with a gradient to the currents ``x_seq`` [T, N, *]."""

    def single_step(self, x: Tensor, forward: Callable[[], Tensor]) -> Tensor:
        """Spikes [N, *] of ``forward`` with a gradient to the current ``x`` [N, *]."""


class DLIFNode(neuron.BaseNode):
    """LIF neuron with a learnable input gain per time step (DLIF).
    每个时间步带可学习输入增益的 LIF 神经元。

    Equation, for t = 0 .. T-1, with ``decay = 1 - 1 / tau``::

        h[t] = decay * v[t-1] + input_gain[t] * x[t]   (+ (1 - decay) * v_reset for a hard reset)
        s[t] = 1 if h[t] >= v_threshold else 0
        v[t] = (1 - s[t]) * h[t] + s[t] * v_reset      (v_reset None: h[t] - s[t] * v_threshold)

    With all gains equal to 1 this is ``LIFNode(tau, decay_input=False)``; with all gains equal to
    1/tau it is ``LIFNode(tau, decay_input=True)``; with ``tau=math.inf`` it is IF. The gain follows
    the sequence, not the call: chunks and single steps continue where the last call stopped, and
    ``functional.reset_net`` returns to ``input_gain[0]``.

    Shapes: ``x_seq`` [T, N, *] in step mode ``"m"``, [N, *] in ``"s"``. State: ``v`` [N, *] in
    float32 (float64 for float64 inputs) and ``time_step``, the number of steps since the reset;
    neither is in ``state_dict``.

    Args:
        T: Number of time steps of a sequence, which is the number of gains.
        tau: Membrane time constant in steps, > 1; ``math.inf`` for no leak.
        v_threshold: Firing threshold.
        v_reset: Potential after a spike; None subtracts the threshold instead (soft reset).
        surrogate_function: A SpikingJelly surrogate, or any differentiable function of ``h -
            v_threshold``, which the slow ``reference`` runs unless it is an ``nn.Module`` without
            learned parameters; None builds ``PiecewiseQuadratic(alpha=1.0)``, the triangle of the
            paper.
        detach_reset: Whether the reset is detached from the gradient.
        step_mode: ``"m"`` or ``"s"``.
        backend: A name listed by :func:`sj_robust.ops.available_backends`; ``"spikingjelly"`` for
            SpikingJelly 2.x's own LIF operator; or ``"auto"``, which picks the fastest backend that
            can run, or SpikingJelly's while its ``op_counter`` is counting; :meth:`chosen_backend`
            returns the choice.
        store_v_seq: Whether the potentials after every reset are kept in ``v_seq``.
        input_gain_init: Initial value of every gain.
        v_init: Potential before the first step; None is ``v_reset``, or 0 for a soft reset. Half a
            threshold makes the number of spikes of a neuron without leak a rounded mean current.

    Raises:
        TypeError: If ``tau`` is not a number, threshold or reset is a tensor with a gradient or
            several values, or ``surrogate_function`` is a class or cannot be called.
        ValueError: If an argument is out of range or the backend is unknown.
        RuntimeError: If a named backend is not available, or, at run time, if a sequence is longer
            than T.

    Source: Ding et al., "Robust Stable Spiking Neural Networks", ICML 2024.

    Examples:
        >>> node = DLIFNode(T=4, tau=2.0)
        >>> node(torch.full((4, 1), 0.6)).detach().flatten()
        tensor([0., 0., 1., 0.])
        >>> node.reset()
    """

    v: Tensor | float
    v_seq: Tensor | None
    time_step: int
    gradient: Gradient | None = None

    per_step = ("input_gain",)
    """Parameters with a row per time step; ``set_time_steps`` asks every module for them."""

    def __init__(
        self,
        T: int,
        tau: float = 100.0,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: Callable[[Tensor], Tensor] | None = None,
        detach_reset: bool = False,
        step_mode: str = "m",
        backend: str = "auto",
        store_v_seq: bool = False,
        input_gain_init: float = 1.0,
        v_init: float | None = None,
    ) -> None:
        """Build the neuron; see the class."""
        v_threshold = _number("v_threshold", v_threshold)
        v_reset = _number("v_reset", v_reset)
        check_count("T", T, remedy="it comes before tau, as in DLIFNode(T=4, tau=2.0)")
        check_tau(tau)
        check_number("v_threshold", v_threshold)
        if v_reset is not None:
            check_number("v_reset", v_reset, remedy="None is a soft reset")
        check_number("input_gain_init", input_gain_init)
        if v_init is not None:
            check_number("v_init", v_init)
        check_surrogate(surrogate_function)
        super().__init__(
            v_threshold=float(v_threshold),
            v_reset=None if v_reset is None else float(v_reset),
            surrogate_function=surrogate_function or surrogate.PiecewiseQuadratic(alpha=1.0),
            detach_reset=bool(detach_reset),
            step_mode=step_mode,
            store_v_seq=store_v_seq,
        )
        self.tau = float(tau)
        self.backend = backend
        self.input_gain = nn.Parameter(torch.full((T,), float(input_gain_init)))
        self.register_memory("time_step", 0)
        if v_init is not None:
            start_from(self, float(v_init))

    @property
    def T(self) -> int:  # noqa: N802  # the field's name for the number of time steps
        """Number of time steps of a sequence."""
        return self.input_gain.shape[0]

    @property
    def decay(self) -> float:
        """Fraction of the potential kept per step, ``1 - 1 / tau``."""
        return 1.0 - 1.0 / self.tau

    @property
    def supported_backends(self) -> tuple[str, ...]:
        """Backend names that ``functional.set_backend`` of SpikingJelly 0.0.0.0.14 may set."""
        return (*dlif.BACKENDS, "spikingjelly")

    @property
    def backend(self) -> str:
        """Backend name as given; setting it checks that the backend exists and is available."""
        return self._backend

    @backend.setter
    def backend(self, value: str) -> None:
        if value not in self.supported_backends:
            raise ValueError(
                f"backend must be one of {self.supported_backends}, got {value!r}; 'auto' uses "
                "the fastest one that runs"
            )
        if value != "spikingjelly":
            dlif.check_backend(value)
        elif lif_multi_step is None:
            raise RuntimeError(
                "backend='spikingjelly' needs SpikingJelly 2.x, whose LIF operator it is; use "
                "backend='auto'"
            )
        self._backend = value

    def chosen_backend(self, x_seq: Tensor) -> str:
        """Name of the implementation that would run on ``x_seq``."""
        if self._uses_host():
            return "spikingjelly"
        return dlif.choose_backend(self.backend, x_seq, self._surrogate())

    def extra_repr(self) -> str:
        """Parameters shown by ``print``."""
        return (
            f"T={self.T}, tau={self.tau}, v_threshold={self.v_threshold}, v_reset={self.v_reset}, "
            f"v_init={potential_at_reset(self)}, detach_reset={self.detach_reset}, "
            f"step_mode={self.step_mode}, backend={self.backend}"
        )

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        """Spikes [T, N, *] for input currents [T, N, *]; advances the state."""
        if self.gradient is None:
            return self._advance(x_seq)
        return self.gradient.multi_step(x_seq, partial(self._advance, x_seq))

    def single_step_forward(self, x: Tensor) -> Tensor:
        """Spikes [N, *] for the input current [N, *] of the next step; advances the state."""
        if self.gradient is None:
            return self._advance_one(x)
        return self.gradient.single_step(x, partial(self._advance_one, x))

    def _advance(self, x_seq: Tensor, operator: Callable[..., Outputs] | None = None) -> Tensor:
        """Spikes of a sequence, or what another operator makes of it; moves the state on."""
        time_step = self.time_step
        self._note_call(x_seq, time_step)
        spike_seq, self.v, self.time_step, v_seq = self._run(
            x_seq, self.v, time_step, self.store_v_seq, operator
        )
        if self.store_v_seq:
            self.v_seq = v_seq
        return spike_seq

    def _advance_one(self, x: Tensor) -> Tensor:
        x_seq = x.unsqueeze(0)
        time_step = self.time_step
        self._note_call(x_seq, time_step)
        spike_seq, v, self.time_step, _ = self._run(x_seq, self.v, time_step, False)
        self.v = v
        if self.store_v_seq:
            v_step = v.unsqueeze(0)
            self.v_seq = v_step if self.v_seq is None else torch.cat((self.v_seq, v_step))
        return spike_seq.squeeze(0)

    # SpikingJelly 2.x's explicit-state contract: pure functions of inputs and states, for memory
    # optimisation and ``to_functional_forward``.

    def materialize_states(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], step_mode: str
    ) -> tuple[Any, ...]:
        """The potential as a tensor with the shape of one step, and the time step."""
        x = inputs[0][0] if step_mode == "m" else inputs[0]
        v, time_step = states
        return _potential(v, x), time_step

    def multi_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """Multi-step forward that leaves the module's own state alone."""
        spike_seq, v, time_step, _ = self._run(inputs[0], states[0], states[1], False)
        return (spike_seq,), (v, time_step)

    def single_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """Single-step forward that leaves the module's own state alone."""
        spike_seq, v, time_step, _ = self._run(inputs[0].unsqueeze(0), states[0], states[1], False)
        return (spike_seq.squeeze(0),), (v, time_step)

    def detach(self) -> None:
        """Cut the state from the graph, for truncated back-propagation through time."""
        if isinstance(self.v, Tensor):
            self.v = self.v.detach()
        if self.store_v_seq and self.v_seq is not None:
            self.v_seq = self.v_seq.detach()

    _reached: int = 0  # time step after the last call outside a backward pass

    def _note_call(self, x_seq: Tensor, time_step: int) -> None:
        if isinstance(x_seq, fx.Proxy):
            raise TypeError(
                "a DLIFNode cannot be traced by torch.fx, as SpikingJelly's export_to_nir does, "
                "since its gain depends on the time step: call sj_robust.neuron.dlif_to_lif(net) "
                "first, which takes constant gains, or name DLIFNode as a leaf of the tracer; "
                "torch.export traces it with any gains"
            )
        if torch.compiler.is_compiling():  # a graph would hold the time at which it was made
            return
        if not within_backward():
            # past nn.Module's way of setting, which takes as long as a launch
            self.__dict__["_reached"] = time_step + x_seq.shape[0]
        elif time_step >= max(self._reached, 1):
            raise RuntimeError(
                "a DLIFNode runs again inside a backward pass, as activation checkpointing does, "
                f"at step {time_step}, where its sequence ended: gains and potential would be "
                "those of later steps. Call functional.reset_net(net) at the beginning of the "
                "function that is checkpointed and run the whole sequence inside, or use "
                "SpikingJelly 2.x's memopt.checkpoint_module, which brings the states back"
            )

    def _run(
        self,
        x_seq: Tensor,
        v: Tensor | float,
        time_step: int,
        store_v_seq: bool,
        operator: Callable[..., Outputs] | None = None,
    ) -> tuple[Tensor, Tensor, int, Tensor | None]:
        """Advance explicit states over ``x_seq`` with the gains that belong to these steps.

        None runs the neuron alone; another operator takes what :func:`_alone` takes.
        """
        v_threshold = _number("v_threshold", self.v_threshold)
        v_reset = _number("v_reset", self.v_reset)
        gain: Tensor = self.input_gain
        end = time_step + x_seq.shape[0]
        if end > gain.shape[0]:
            raise RuntimeError(self._too_long(tuple(x_seq.shape), time_step))
        if (
            x_seq.shape[0] < gain.shape[0]
        ):  # a slice of the whole takes as long as the call of a kernel
            gain = gain[time_step:end]
        if self._uses_host():
            spike_seq, v_end, v_seq = self._run_host(
                x_seq, gain, _potential(v, x_seq[0]), store_v_seq
            )
            return spike_seq, v_end, end, v_seq
        from_reset = not isinstance(v, Tensor) and v == (v_reset or 0.0)
        operator = _alone if operator is None else operator
        spike_seq, v_end, v_seq = operator(
            x_seq,
            gain,
            None if from_reset else _potential(v, x_seq[0]),
            decay=self.decay,
            v_threshold=v_threshold,
            v_reset=v_reset,
            surrogate=self._surrogate(),
            detach_reset=self.detach_reset,
            store_v_seq=store_v_seq,
            backend=self.backend,
        )
        return spike_seq, v_end, end, v_seq

    def _too_long(self, shape: tuple[int, ...], time_step: int) -> str:
        """What is wrong with a sequence that goes beyond the last gain."""
        if time_step:
            return (
                f"DLIFNode has T={self.T} time steps, but step {time_step + shape[0]} was asked "
                f"for ({time_step} taken since the last reset): call functional.reset_net(net) "
                "before every new sequence, or build the neuron with a larger T"
            )
        return (
            f"DLIFNode has T={self.T} time steps, but its input of shape {shape} has {shape[0]}: "
            "a network in step mode 'm' takes [T, N, *], time first. Exchange the dimensions of "
            "[N, T, *] with x.transpose(0, 1), repeat one image over time with "
            f"x.expand({self.T}, *x.shape), call functional.set_step_mode(net, 'm') once the "
            f"network is built, or build the neuron with T={shape[0]}"
        )

    def _uses_host(self) -> bool:
        """Whether SpikingJelly's own operator runs: by name, or because SpikingJelly counts
        operators.
        """
        return self.backend == "spikingjelly" or (self.backend == "auto" and is_counted())

    def _run_host(
        self, x_seq: Tensor, gain: Tensor, v: Tensor, store_v_seq: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """SpikingJelly's own LIF operator on the scaled input, in state precision."""
        assert lif_multi_step is not None  # the setter of backend refuses the name otherwise
        current = x_seq.to(v.dtype) * gain.to(v.dtype).view(-1, *[1] * (x_seq.ndim - 1))
        spike_seq, v_end, v_seq = lif_multi_step(
            current,
            v,
            self.tau,
            False,
            self.v_threshold,
            self.v_reset,
            self.surrogate_function,
            self.detach_reset,
            store_v_seq,
        )
        return spike_seq.to(x_seq.dtype), v_end, v_seq

    def _surrogate(self) -> ops.Surrogate:
        return describe_surrogate(self.surrogate_function)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        *rest: Any,
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        errors: list[str] = rest[-1]
        key = f"{prefix}input_gain"
        saved = state_dict.get(key)
        if saved is not None and saved.ndim == 1 and saved.shape != self.input_gain.shape:
            errors.append(of_other_steps(key, len(saved), self.T))
        elif key in missing:
            missing[missing.index(key)] = _MissingGain(key, self.T)

    def __deepcopy__(self, memo: dict[int, Any]) -> "DLIFNode":
        if any(
            isinstance(value, Tensor) and value.grad_fn is not None
            for value in self._memories.values()
        ):
            raise RuntimeError(
                "a DLIFNode cannot be copied while its membrane potential belongs to the graph "
                "of a sequence: call functional.reset_net(net) before copy.deepcopy(net)"
            )
        # By the usual protocol, which a gradient estimator in force shadows in the instance.
        reduced: Any = self.__reduce_ex__(4)
        make, arguments, state, *_ = reduced
        duplicate: DLIFNode = make(*arguments)
        memo[id(self)] = duplicate
        duplicate.__setstate__(copy.deepcopy(state, memo))
        return duplicate

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise RuntimeError(
            "nn.DataParallel copies a network in every forward and loses the neurons' states: "
            "use torch.nn.parallel.DistributedDataParallel (torchrun or accelerate launch)"
        )


def _alone(x_seq: Tensor, gain: Tensor, v_init: Tensor | None, **constants: Any) -> Outputs:
    """The operator of a neuron that nothing runs together with."""
    return ops.dlif_multi_step(x_seq, gain, v_init, **constants)


_COMPILED_SURROGATES = {getattr(surrogate, name, None): kind for kind, name in HOST_NAMES.items()}


def describe_surrogate(function: Any) -> ops.Surrogate:
    """A SpikingJelly surrogate, or any function, as the kernels know it. 描述替代函数。"""
    kind = _COMPILED_SURROGATES.get(type(function))
    if (
        kind is None or not function.spiking or isinstance(function.alpha, Tensor)
    ):  # which may be learned
        return ops.Surrogate("custom", function=function)
    return ops.Surrogate(kind, alpha=function.alpha)


class _MissingGain(str):
    """Key of a gain that weights lack; torch's message, which formats it, has the remedy too.

    It is no error by itself, since torch tells a module nothing of ``load_state_dict(...,
    strict=False)``.
    """

    def __new__(cls, key: str, T: int) -> "_MissingGain":
        missing = super().__new__(cls, key)
        missing.T = T
        return missing

    T: int

    def __format__(self, spec: str) -> str:
        return (
            f"{self!s}: the weights are those of a network without DLIF neurons; load them into "
            f"a network of their own neurons, and then call replace_neurons(net, T={self.T})"
        )


def _number(name: str, level: Any) -> Any:
    """A threshold or reset as a number, or None; a tensor of one element is taken for it."""
    if not isinstance(level, Tensor):
        return level
    if level.requires_grad or level.numel() != 1:
        raise TypeError(
            f"{name} of a DLIFNode must be a number, which gets no gradient, got a tensor of shape "
            f"{tuple(level.shape)}, requires_grad={level.requires_grad}; learn its input_gain, "
            "which scales the current"
        )
    return float(level)


def _potential(v: Tensor | float, x: Tensor) -> Tensor:
    """The potential as a tensor in the shape of one step ``x``, in state precision and on its
    device.
    """
    dtype = state_dtype(x)
    if not isinstance(v, Tensor):
        return torch.full_like(x, v, dtype=dtype)
    if v.shape != x.shape:
        raise RuntimeError(
            f"the neuron's state has shape {tuple(v.shape)}, but one step of the input has "
            f"{tuple(x.shape)}: call functional.reset_net(net) before a batch of another size"
        )
    return v.to(x.device, dtype)
