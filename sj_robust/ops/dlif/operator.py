"""The operator ``torch.ops.sj_robust.dlif``, its backward pass, and the backends that run it."""

import functools
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor

from sj_robust.ops.dlif import cpp, cupy_launch, eager, reference, triton_launch
from sj_robust.ops.dlif.config import (
    DLIFConfig,
    InputGradients,
    Inputs,
    OutputGradients,
    Outputs,
    check_arguments,
    state_dtype,
)
from sj_robust.ops.registration import (
    define,
    differentiates_by_functorch,
    in_onnx_export,
    is_traced,
    present,
    saved_tensors,
)
from sj_robust.ops.surrogate import Surrogate

__all__ = [
    "BACKENDS",
    "CONSTANTS",
    "Implementation",
    "available_backends",
    "backward",
    "check_backend",
    "check_call",
    "checked",
    "choose_backend",
    "dlif_multi_step",
    "failing_reason",
    "forward",
    "room_for_gradients",
    "room_for_outputs",
    "unavailable_reason",
]

BACKENDS = ("auto", "reference", "eager", "torch", "cpp", "cupy", "triton")
"""Names of backends; ``"auto"`` chooses, ``"torch"`` is another name of ``"eager"``."""
_ALIASES = {"torch": "eager"}
_TRIANGLE = Surrogate()
_KERNELS: dict[str, Any] = {"cpp": cpp, "cupy": cupy_launch, "triton": triton_launch}
_CUDA_KERNELS = ("cupy", "triton")  # the fastest first
_FASTEST_FIRST = {"cpu": ("cpp", "eager"), "cuda": (*_CUDA_KERNELS, "eager")}
CONSTANTS = (
    "float decay, float v_threshold, float? v_reset, str surrogate, float alpha, bool detach_reset"
)
"""Schema of :attr:`DLIFConfig.arguments`."""


class Implementation(Protocol):
    """What a backend provides, for contiguous tensors [T, *] and [*]."""

    def unsupported_reason(self, x_seq: Tensor, surrogate: Surrogate) -> str | None:
        """Why this call cannot run here, or None."""

    def forward(self, inputs: Inputs, outputs: Outputs) -> None:
        """Fill the outputs that are there."""

    def backward(self, inputs: Inputs, grads: OutputGradients, found: InputGradients) -> None:
        """Fill the gradients that are there."""


def dlif_multi_step(
    x_seq: Tensor,
    input_gain: Tensor,
    v_init: Tensor | None = None,
    *,
    decay: float,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    surrogate: Surrogate | None = None,
    detach_reset: bool = False,
    store_v_seq: bool = False,
    backend: str = "auto",
    threads_per_block: int | None = None,
) -> Outputs:
    """Run one layer of DLIF neurons over a sequence.

    Equation: ``h[t] = decay * v[t-1] + input_gain[t] * x[t]`` (plus ``(1 - decay) * v_reset`` for a
    hard reset), ``s[t] = h[t] >= v_threshold``, then ``v[t] = (1 - s[t]) * h[t] + s[t] * v_reset``
    or, for ``v_reset=None``, ``v[t] = h[t] - s[t] * v_threshold``.

    Args:
        x_seq: Input currents, [T, N, *], floating point.
        input_gain: Learnable gain per step, [T].
        v_init: Potential before the first step, [N, *]; None means ``v_reset``, or 0 for a soft
            reset.
        decay: Fraction of the potential kept per step, in (0, 1].
        v_threshold: Firing threshold.
        v_reset: Potential after a spike; None subtracts the threshold instead.
        surrogate: Surrogate of the spike; None means the triangle of width 1.
        detach_reset: Whether the reset is detached from the gradient.
        store_v_seq: Whether the potential after every reset is also returned.
        backend: A name listed by :func:`available_backends`, or ``"auto"``, which uses the fastest
            one that can run the call.
        threads_per_block: Block size of the CUDA kernel, only used by ``"cupy"``; None lets the
            kernel choose it.

    Returns:
        Spikes [T, N, *] in the dtype of ``x_seq``, last potential [N, *] and potentials [T, N, *]
        or None; potentials are float64 for float64 inputs and float32 otherwise.

    Raises:
        TypeError: If ``x_seq`` is not floating point.
        ValueError: If a shape does not fit, the backend is unknown, or it cannot run this call.
        RuntimeError: If the named backend is not available on this machine.

    Source: Ding et al. (ICML 2024), the DLIF neuron.

    Examples:
        >>> spikes, v, _ = dlif_multi_step(
        ...     torch.full((3, 1), 0.6), torch.tensor([1.0, 1.0, 2.0]), decay=0.5
        ... )
        >>> spikes.flatten(), v
        (tensor([0., 0., 1.]), tensor([0.]))
    """
    check_arguments(x_seq, input_gain, v_init)
    config = DLIFConfig(decay, v_threshold, v_reset, surrogate or _TRIANGLE, detach_reset)
    dtype = state_dtype(x_seq)
    input_gain = input_gain.to(dtype)
    v_init = None if v_init is None else v_init.to(dtype)
    name = choose_backend(backend, x_seq, config.surrogate)
    inputs = Inputs(x_seq, input_gain, v_init, config)
    if name == "reference":  # which needs no backward pass of its own
        spike_seq, v, potentials = reference.multi_step(inputs)
        return Outputs(spike_seq, v, potentials if store_v_seq else None)
    if x_seq.is_contiguous():
        return _run(
            inputs, store_v_seq=store_v_seq, backend=name, threads_per_block=threads_per_block
        )
    order = _memory_order(x_seq)
    inputs = Inputs(
        x_seq=x_seq.permute(order).contiguous(),
        input_gain=input_gain,
        v_init=None if v_init is None else v_init.permute([dim - 1 for dim in order[1:]]),
        config=config,
    )
    spike_seq, v, v_seq = _run(
        inputs, store_v_seq=store_v_seq, backend=name, threads_per_block=threads_per_block
    )
    inverse = [order.index(dim) for dim in range(x_seq.ndim)]
    return Outputs(
        spike_seq=spike_seq.permute(inverse),
        v=v.permute([dim - 1 for dim in inverse[1:]]),
        v_seq=None if v_seq is None else v_seq.permute(inverse),
    )


def _run(
    inputs: Inputs, *, store_v_seq: bool, backend: str, threads_per_block: int | None
) -> Outputs:
    """Run a backend on contiguous currents [T, *]; a kernel for CUDA reads the block size."""
    spike_seq, v, v_seq = _dlif(
        inputs.x_seq,
        inputs.input_gain,
        inputs.v_init,
        **inputs.config.arguments,
        store_v_seq=store_v_seq,
        backend=backend,
        threads_per_block=threads_per_block,
    )
    return Outputs(spike_seq, v, v_seq if store_v_seq else None)


def choose_backend(backend: str, x_seq: Tensor, surrogate: Surrogate) -> str:
    """Name of the implementation that ``backend`` means for this input, never ``"auto"``.

    Args:
        backend: Name in :data:`BACKENDS`.
        x_seq: Input, [T, N, *].
        surrogate: Surrogate of the spike.

    Raises:
        ValueError: If the name is unknown or the named backend cannot run this input.
        RuntimeError: If the named backend is not available on this machine.

    Examples:
        >>> choose_backend("torch", torch.zeros(4, 2), Surrogate())
        'eager'
    """
    name = check_backend(backend)
    if name == "auto":
        for candidate in _FASTEST_FIRST.get(x_seq.device.type, ("eager",)):
            if (
                failing_reason(candidate) is None
                and _unsupported_reason(candidate, x_seq, surrogate) is None
            ):
                if (x_seq.device.type, candidate) == ("cuda", "eager"):
                    _warn_of_missing_kernels()
                return candidate
        return "reference"
    reason = _unsupported_reason(name, x_seq, surrogate)
    if reason is not None:
        raise ValueError(f"backend={backend!r} cannot run this call: {reason}; use backend='auto'")
    return name


def check_backend(backend: str) -> str:
    """The name without its alias, if the backend is known and available.

    Args:
        backend: Name in :data:`BACKENDS`.

    Raises:
        ValueError: If the name is unknown.
        RuntimeError: If the backend is not available on this machine, with what is missing.

    Examples:
        >>> check_backend("torch")
        'eager'
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    name = _ALIASES.get(backend, backend)
    reason = unavailable_reason(name)
    if reason is not None:
        raise RuntimeError(f"backend={backend!r} is not available: {reason}; or use backend='auto'")
    return name


def available_backends() -> dict[str, str]:
    """Every backend, with "available" or the reason why it is not available on this machine.

    Examples:
        >>> available_backends()["eager"]
        'available'
    """
    names = [name for name in BACKENDS if name != "auto" and name not in _ALIASES]
    return {name: failing_reason(name) or "available" for name in names}


def _warn_of_missing_kernels() -> None:
    """Say once that a GPU gets plain torch, with more than a hundred launches a layer, because no
    kernel is there.
    """
    reasons = {name: failing_reason(name) for name in _CUDA_KERNELS}
    if (
        None not in reasons.values() and torch.cuda.is_available()
    ):  # else no kernel runs this call, or no GPU does
        _warn("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))


# see below
_warn_of_missing_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _warn(reasons: str) -> None:
    text = (
        "DLIF runs on the GPU by backend='eager', which is slow, since no kernel is available "
        f"there: {reasons}"
    )
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def _unsupported_reason(name: str, x_seq: Tensor, surrogate: Surrogate) -> str | None:
    if name == "reference":
        return None
    if in_onnx_export():
        return "an ONNX model holds torch's own operators alone, which is backend='reference'"
    if differentiates_by_functorch():
        return (
            "torch.func.grad, vjp and the like differentiate only plain torch; use "
            "backend='reference'"
        )
    if surrogate.kind == "custom" and is_traced():
        return (
            "the surrogate is a Python function, which kernels support neither in graphs of "
            "torch's tracers nor under torch.func.vmap; use backend='reference'"
        )
    reason: str | None = implementation(name).unsupported_reason(x_seq, surrogate)
    return reason


def _memory_order(x_seq: Tensor) -> list[int]:
    """Dimensions as they lie in memory, time first, so that channels-last inputs are not copied."""
    strides = x_seq.stride()
    return [0, *sorted(range(1, x_seq.ndim), key=lambda dim: (-strides[dim], dim))]


def unavailable_reason(name: str) -> str | None:
    """What keeps a backend from running on this machine, or None. It touches no GPU."""
    reason: str | None = _KERNELS[name].unavailable_reason() if name in _KERNELS else None
    return reason


def failing_reason(name: str) -> str | None:
    """As :func:`unavailable_reason`, but a kernel for a GPU is tried, once and in no CUDA graph's
    capture.
    """
    reason = unavailable_reason(name)
    if reason is not None or name not in _CUDA_KERNELS or not torch.cuda.is_available():
        return reason
    return None if torch.cuda.is_current_stream_capturing() else _failure(name)


@functools.cache
def _failure(name: str) -> str | None:
    """What goes wrong with one neuron on the current GPU: a compiler, header or library may be
    missing.
    """
    with ThreadPoolExecutor(1) as thread:  # where no tracer of torch is at work
        try:
            device = torch.device("cuda", torch.cuda.current_device())
            found = thread.submit(_spikes_of_one_neuron, name, device).result()
        except torch.OutOfMemoryError:  # which says nothing of the kernel
            raise
        except Exception as error:  # of a compiler that a kernel needs, or of the driver
            text = " ".join(str(error).split())
            return f"a first call failed with {type(error).__name__}: {text}"
    if found == [0.0, 1.0]:
        return None
    return f"a first call gave the spikes {found} instead of [0.0, 1.0]"


def _spikes_of_one_neuron(name: str, device: torch.device) -> list[float]:
    x_seq = torch.tensor([[0.5], [0.75]], device=device)
    gain = torch.ones(2, device=device)
    config = DLIFConfig(
        decay=0.5,
        v_threshold=1.0,
        v_reset=0.0,
        surrogate=Surrogate(),
        detach_reset=False,
    )
    outputs = forward(_KERNELS[name], Inputs(x_seq, gain, None, config), store_v_seq=False)
    spikes: list[float] = outputs.spike_seq.flatten().tolist()
    return spikes


# As torch.compiler.assume_constant_result does, which loads the compiler: it need not look into
# these functions.
unavailable_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]
failing_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def implementation(name: str, threads_per_block: int | None = None) -> Implementation:
    """The implementation of a name; only ``"cupy"`` reads the block size."""
    if name == "cupy" and threads_per_block is not None:
        return cupy_launch.Launcher(threads_per_block=threads_per_block)
    found: Implementation = _KERNELS.get(name, eager)
    return found


def forward(backend: Implementation, inputs: Inputs, store_v_seq: bool) -> Outputs:
    """Outputs of a backend."""
    outputs = room_for_outputs(inputs.x_seq, store_v_seq)
    backend.forward(inputs, outputs)
    return outputs


def room_for_outputs(x_seq: Tensor, store_v_seq: bool) -> Outputs:
    """Outputs to be filled."""
    dtype, new = state_dtype(x_seq), functools.partial(torch.empty, device=x_seq.device)
    return Outputs(
        spike_seq=new(x_seq.shape, dtype=x_seq.dtype),
        v=new(x_seq.shape[1:], dtype=dtype),
        v_seq=new(x_seq.shape, dtype=dtype) if store_v_seq else None,
    )


def backward(
    backend: Implementation, inputs: Inputs, grads: OutputGradients, needs_v_init: bool
) -> InputGradients:
    """Gradients by a backend."""
    found = room_for_gradients(inputs.x_seq, needs_v_init)
    backend.backward(inputs, grads, found)
    return found


def room_for_gradients(x_seq: Tensor, needs_v_init: bool) -> InputGradients:
    """Gradients to be filled."""
    dtype, new = state_dtype(x_seq), functools.partial(torch.empty, device=x_seq.device)
    return InputGradients(
        x_seq=new(x_seq.shape, dtype=x_seq.dtype),
        input_gain=new(x_seq.shape[:1], dtype=dtype),
        v_init=new(x_seq.shape[1:], dtype=dtype) if needs_v_init else None,
    )


def check_call(backend: str, surrogate: Surrogate, x_seq: Tensor, *states: Tensor | None) -> None:
    """Refuse what a kernel would misread: a graph may have been made elsewhere, and get any
    tensors.
    """
    dtype, device = state_dtype(x_seq), x_seq.device
    for tensor in states:
        if tensor is not None and (tensor.dtype != dtype or tensor.device != device):
            raise ValueError(
                f"gains and potentials of {x_seq.dtype} currents on {device} must be {dtype} "
                f"there, got {tensor.dtype} on {tensor.device}"
            )
    reason = unavailable_reason(backend)
    if reason is None:
        reason = implementation(backend).unsupported_reason(x_seq, surrogate)
    if reason is not None:
        raise ValueError(
            f"the graph was made for backend={backend!r}, which cannot run this call: {reason}"
        )


def checked(
    kernel: Callable[..., Iterable[Tensor | None]],
    check_shapes: Callable[..., None] | None = None,
    backend: str | None = None,
) -> Callable[..., tuple[Tensor, ...]]:
    """A kernel for calls of torch's registry: tensors are checked, since a graph may have been made
    elsewhere and get any, and every output is there. Calls of this package are checked before.

    Args:
        kernel: It takes ``x_seq``, ``input_gain`` and ``v_init`` in this order among its tensors.
        check_shapes: Refuses these three if they do not belong together; None checks no shapes, as
            where one step of ``x_seq`` may stand for all.
        backend: The one that runs it; None for the one that the call names.
    """
    first = list(signature(kernel).parameters).index("x_seq")

    def in_graph(*tensors: Any, **call: Any) -> tuple[Tensor, ...]:
        x_seq, input_gain, v_init = tensors[first : first + 3]
        if check_shapes is not None:
            check_shapes(x_seq, input_gain, v_init)
        surrogate = Surrogate.named(call["surrogate"], call["alpha"])
        check_call(backend or call["backend"], surrogate, x_seq, input_gain, v_init)
        return present(kernel(*tensors, **call), x_seq)

    return in_graph


class _DLIF(torch.autograd.Function):
    """Saves what the operator takes and nothing else; differentiable once."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[..., tuple[Tensor | None, ...]],
        x_seq: Tensor,
        input_gain: Tensor,
        v_init: Tensor | None,
        call: dict[str, Any],
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(x_seq, input_gain, v_init)
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.surrogate = Surrogate.named(call["surrogate"], call["alpha"])  # kept alive till then
        return run(x_seq, input_gain, v_init, **call)

    @staticmethod
    def backward(
        ctx: Any, grad_spike_seq: Tensor | None, grad_v: Tensor | None, grad_v_seq: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x_seq, input_gain, v_init = saved_tensors(ctx, grad_spike_seq, grad_v, grad_v_seq)
        call = dict(ctx.call)
        has_v_seq = call.pop("store_v_seq")
        needs_v_init = ctx.needs_input_grad[3]
        grad_x, grad_gain, grad_v_init = _dlif_backward(
            grad_spike_seq,
            grad_v,
            grad_v_seq if has_v_seq else None,
            x_seq,
            input_gain,
            v_init,
            needs_v_init=needs_v_init,
            **call,
        )
        return None, grad_x, grad_gain, grad_v_init if needs_v_init else None, None


def _forward(
    x_seq: Tensor,
    input_gain: Tensor,
    v_init: Tensor | None,
    *,
    store_v_seq: bool,
    backend: str,
    threads_per_block: int | None,
    **constants: Any,
) -> Outputs:
    inputs = _inputs(x_seq, input_gain, v_init, constants)
    return forward(implementation(backend, threads_per_block), inputs, store_v_seq)


def _forward_fake(
    x_seq: Tensor, *states: Tensor | None, store_v_seq: bool, **constants: Any
) -> tuple[Tensor, ...]:
    return present(room_for_outputs(x_seq, store_v_seq), x_seq)


def _backward(
    grad_spike_seq: Tensor | None,
    grad_v: Tensor | None,
    grad_v_seq: Tensor | None,
    x_seq: Tensor,
    input_gain: Tensor,
    v_init: Tensor | None,
    *,
    needs_v_init: bool,
    backend: str,
    threads_per_block: int | None,
    **constants: Any,
) -> InputGradients:
    inputs = _inputs(x_seq, input_gain, v_init, constants)
    if grad_spike_seq is None:
        grad_spike_seq = torch.zeros_like(inputs.x_seq)
    grads = OutputGradients(
        spike_seq=grad_spike_seq.contiguous(),
        v=None if grad_v is None else grad_v.contiguous(),
        v_seq=None if grad_v_seq is None else grad_v_seq.contiguous(),
    )
    found = implementation(backend, threads_per_block)
    return backward(found, inputs, grads, needs_v_init)


def _backward_fake(
    grad_spike_seq: Tensor | None,
    grad_v: Tensor | None,
    grad_v_seq: Tensor | None,
    x_seq: Tensor,
    *states: Tensor | None,
    needs_v_init: bool,
    **constants: Any,
) -> tuple[Tensor, ...]:
    return present(room_for_gradients(x_seq, needs_v_init), x_seq)


def _inputs(
    x_seq: Tensor, input_gain: Tensor, v_init: Tensor | None, constants: dict[str, Any]
) -> Inputs:
    """What a backend takes, without gaps in memory."""
    config = DLIFConfig.of(**constants)
    v_init = None if v_init is None else v_init.contiguous()
    return Inputs(x_seq.contiguous(), input_gain.contiguous(), v_init, config)


_CALL = f"{CONSTANTS}, str backend, int? threads_per_block"
_dlif = define(
    f"dlif(Tensor x_seq, Tensor input_gain, Tensor? v_init, *, {_CALL}, bool store_v_seq) -> "
    "(Tensor spike_seq, Tensor v, Tensor v_seq)",
    kernel=_forward,
    in_graph=checked(_forward, check_arguments),
    fake=_forward_fake,
    gradient=_DLIF,
)
_dlif_backward = define(
    "dlif_backward(Tensor? grad_spike_seq, Tensor? grad_v, Tensor? grad_v_seq, Tensor x_seq, "
    f"Tensor input_gain, Tensor? v_init, *, {_CALL}, bool needs_v_init) -> (Tensor grad_x_seq, "
    "Tensor grad_input_gain, Tensor grad_v_init)",
    kernel=_backward,
    in_graph=checked(_backward, check_arguments),
    fake=_backward_fake,
)
