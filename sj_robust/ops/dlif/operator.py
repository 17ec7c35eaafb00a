"""The operator ``torch.ops.sj_robust.dlif``, its backward pass, the backends that run it, and how
operators are registered with torch.

A kernel reads memory, which a tracer's tensors do not have. So every call goes through torch's
registry, which knows the shapes of its outputs, its gradient and how to run it over a batch of
calls (vmap). Under autocast an operator takes every tensor as it is: the currents in any dtype,
potentials in float32.
"""

import functools
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sj_robust.ops.dlif import cpp, cupy_launch, eager, reference, triton_launch
from sj_robust.ops.dlif.config import (
    DLIFConfig,
    InputGradients,
    Inputs,
    OutputGradients,
    Outputs,
    Surrogate,
    check_arguments,
    state_dtype,
)

__all__ = [
    "BACKENDS",
    "CONSTANTS",
    "Implementation",
    "Operator",
    "available_backends",
    "backward",
    "check_backend",
    "check_call",
    "checked",
    "choose_backend",
    "define",
    "differentiates_by_functorch",
    "dlif_multi_step",
    "failing_reason",
    "forward",
    "have_memory",
    "in_functorch",
    "in_onnx_export",
    "is_traced",
    "present",
    "room_for_gradients",
    "room_for_outputs",
    "saved_tensors",
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
        return _run(inputs, store_v_seq=store_v_seq, backend=name)
    order = _memory_order(x_seq)
    inputs = Inputs(
        x_seq=x_seq.permute(order).contiguous(),
        input_gain=input_gain,
        v_init=None if v_init is None else v_init.permute([dim - 1 for dim in order[1:]]),
        config=config,
    )
    spike_seq, v, v_seq = _run(inputs, store_v_seq=store_v_seq, backend=name)
    inverse = [order.index(dim) for dim in range(x_seq.ndim)]
    return Outputs(
        spike_seq=spike_seq.permute(inverse),
        v=v.permute([dim - 1 for dim in inverse[1:]]),
        v_seq=None if v_seq is None else v_seq.permute(inverse),
    )


def _run(inputs: Inputs, *, store_v_seq: bool, backend: str) -> Outputs:
    """Run a backend on contiguous currents [T, *]."""
    spike_seq, v, v_seq = _dlif(
        inputs.x_seq,
        inputs.input_gain,
        inputs.v_init,
        **inputs.config.arguments,
        store_v_seq=store_v_seq,
        backend=backend,
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


def implementation(name: str) -> Implementation:
    """The implementation of a name."""
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


# untyped in torch
_library: Any = torch.library.Library("sj_robust", "FRAGMENT")  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Operator:
    """An operator of torch's registry.

    Attributes:
        overload: It, as torch knows it.
        kernel: What it runs on tensors that have memory: they by position, constants by keyword.
            An output that a call does not have may be None.
        gradient: How autograd goes through it. Its forward takes what to run, the tensors and the
            constants in a dictionary.
    """

    overload: Any
    kernel: Callable[..., Any]
    gradient: type[torch.autograd.Function] | None

    def __call__(self, *tensors: Tensor | None, **constants: Any) -> Any:
        """Call it; where torch would end at the kernel anyway, without asking it, which takes 15 to
        30 us.
        """
        if not have_memory(tensors):
            return self.overload(*tensors, **constants)
        if self.gradient is None:
            return self.kernel(*tensors, **constants)
        return _apply(self.gradient, self.kernel, tensors, constants)


def define(
    schema: str,
    *,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    in_graph: Callable[..., Any] | None = None,
    gradient: type[torch.autograd.Function] | None = None,
) -> Operator:
    """An operator ``sj_robust::name`` for every device; vmap runs it once for every sample of the
    batch.

    ``torch.library.register_autograd`` is not used for the gradient: in every call it asks for the
    default of every argument, which takes 30 to 80 us.

    Args:
        schema: Name and signature: tensors by position, constants by keyword. An output that a
            call does not have is an empty tensor.
        kernel: See :class:`Operator`.
        fake: Tensors of the shapes, strides and dtypes of its outputs.
        in_graph: The kernel for calls of torch's registry, which checks the tensors, since the
            graph may have been made elsewhere, and returns every output; None for ``kernel``.
        gradient: See :class:`Operator`; None for an operator without one.
    """
    name = schema.partition("(")[0]
    qualified = f"sj_robust::{name}"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, in_graph or kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    overload = getattr(torch.ops.sj_robust, name).default

    def over_batch(
        info: Any, in_dims: tuple[int | None, ...], *tensors: Any, **constants: Any
    ) -> tuple[Any, ...]:
        samples = []
        for i in range(info.batch_size):
            pairs = zip(tensors, in_dims, strict=True)
            sample = [t if dim is None else t.select(dim, i) for t, dim in pairs]
            samples.append(overload(*sample, **constants))
        outputs = tuple(torch.stack(parts) for parts in zip(*samples, strict=True))
        return outputs, (0,) * len(outputs)

    torch.library.register_vmap(qualified, over_batch, lib=_library)
    if gradient is None:
        return Operator(overload, kernel, None)

    def below_autograd(*tensors: Tensor | None, **constants: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():  # torch has no public name for it
            return overload(*tensors, **constants)

    def with_graph(*tensors: Tensor | None, **constants: Any) -> Any:
        return _apply(gradient, below_autograd, tensors, constants)

    _library.impl(name, with_graph, "Autograd")
    return Operator(overload, kernel, gradient)


def _apply(
    gradient: type[torch.autograd.Function],
    run: Callable[..., Any],
    tensors: tuple[Tensor | None, ...],
    constants: dict[str, Any],
) -> Any:
    return gradient.apply(run, *tensors, constants)  # type: ignore[no-untyped-call]  # torch's


def saved_tensors(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
    """Tensors that a forward pass saved for its backward pass of these gradients, which is
    differentiable once.

    Raises:
        RuntimeError: If a graph of the backward pass is wanted, the gradients are a batch of
            ``torch.autograd.grad(..., is_grads_batched=True)``, or the saved tensors were freed by
            an earlier backward pass.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "DLIF is differentiable once: create_graph=True would silently lose the second "
            "derivative; set backend='reference' on the neurons to differentiate twice"
        )
    is_batched = torch._C._functorch.is_legacy_batchedtensor  # torch has no public way to ask
    if any(gradient is not None and is_batched(gradient) for gradient in gradients):
        raise RuntimeError(
            "DLIF takes no batch of gradients (is_grads_batched=True, or vectorize=True of "
            "torch.autograd.functional): set backend='reference' on the neurons"
        )
    try:
        return ctx.saved_tensors  # type: ignore[no-any-return]  # ctx has no public type
    except RuntimeError as error:
        if "freed" not in str(error):  # such as a tensor that was changed in place
            raise
        raise RuntimeError(
            "backward reached a DLIF step whose graph was already freed: the membrane potential "
            "still belongs to an earlier sequence. Call functional.reset_net(net) before every "
            "new sequence, or functional.detach_net(net) between the chunks of one sequence"
        ) from error


def present(outputs: Iterable[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """Outputs as an operator returns them: an empty tensor for none."""
    return tuple(like.new_empty(0) if one is None else one for one in outputs)


# What torch has no public way to ask for; every release since 2.8 answers.


def in_functorch() -> bool:
    """Whether a transform of ``torch.func`` is at work, such as vmap."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def differentiates_by_functorch() -> bool:
    """Whether one of them differentiates, as ``torch.func.grad`` does."""
    if not in_functorch():
        return False
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    levels = retrieve_all_functorch_interpreters()
    return any(level.key().name in ("Grad", "Jvp") for level in levels)


def in_onnx_export() -> bool:
    """Whether torch writes an ONNX model, which can hold torch's own operators alone."""
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    return traced and torch.onnx.is_in_onnx_export()


def is_traced() -> bool:
    """Whether a call becomes part of what runs later or elsewhere, or over a batch of calls."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    if torch._C._get_tracing_state() is not None:
        return True
    from torch.fx.experimental.proxy_tensor import get_proxy_mode  # whoever records has loaded it

    return get_proxy_mode() is not None


def have_memory(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether tensors hold what is in their memory, and nobody traces what is done with them."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None:
        return False
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or tensor.is_neg():
            return False
        if tensor._is_zerotensor() or torch._is_functional_tensor(tensor):
            return False
    return True


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
    **constants: Any,
) -> Outputs:
    inputs = _inputs(x_seq, input_gain, v_init, constants)
    return forward(implementation(backend), inputs, store_v_seq)


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
    return backward(implementation(backend), inputs, grads, needs_v_init)


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


_CALL = f"{CONSTANTS}, str backend"
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
