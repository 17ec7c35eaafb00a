"""DLIF for autograd: one node for tensors with memory, and operators of torch's registry for all
that torch traces.

A kernel reads memory, which a tracer's tensors do not have. ``torch.ops.sj_robust.dlif`` and its
backward pass stand for the kernels in a graph: torch knows the shapes of their outputs, their
gradient and how to run them over a batch of calls (vmap). Under autocast they take every tensor as
it is: the currents in any dtype, potentials in float32.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sj_robust.ops.dlif.backends import Implementation, implementation, unavailable_reason
from sj_robust.ops.dlif.config import (
    DLIFConfig,
    Inputs,
    OutputGradients,
    Outputs,
    check_arguments,
    state_dtype,
)

__all__ = [
    "CONSTANTS",
    "DLIFFunction",
    "define",
    "differentiates_by_functorch",
    "in_functorch",
    "in_onnx_export",
    "is_plain",
    "is_recorded",
    "output_gradients",
    "registered",
    "saved_tensors",
]


class DLIFFunction(torch.autograd.Function):
    """Runs an implementation; saves its inputs and nothing else, differentiable once.

    ``operator`` is the name of a backend that is a kernel, and its block size: its gradients may
    have no memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_seq: Tensor,
        input_gain: Tensor,
        v_init: Tensor | None,
        config: DLIFConfig,
        implementation: Implementation,
        operator: tuple[str, int | None] | None,
        store_v_seq: bool,
    ) -> Outputs:
        """Forward pass over all steps."""
        ctx.save_for_backward(x_seq, input_gain, v_init)
        ctx.config, ctx.implementation, ctx.operator = config, implementation, operator
        ctx.set_materialize_grads(False)
        return implementation.forward(Inputs(x_seq, input_gain, v_init, config), store_v_seq)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Back-propagation through time."""
        x_seq, input_gain, v_init = saved_tensors(ctx)
        inputs = Inputs(x_seq, input_gain, v_init, ctx.config)
        needs_v_init = ctx.needs_input_grad[2]
        if ctx.operator is None or is_plain(*grads):
            given = output_gradients(x_seq, *grads)
            found = ctx.implementation.backward(inputs, given, needs_v_init)
        else:
            found = _registered_backward(grads, inputs, needs_v_init, ctx.operator)
        return *found, None, None, None, None


def saved_tensors(ctx: Any) -> tuple[Any, ...]:
    """Tensors that a forward pass saved for its backward pass, which is differentiable once.

    Raises:
        RuntimeError: If a graph of the backward pass is wanted, or the saved tensors were freed by
            an earlier one.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "DLIF is differentiable once: create_graph=True would silently lose the second "
            "derivative; set backend='reference' on the neurons to differentiate twice"
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


def output_gradients(
    x_seq: Tensor, spike_seq: Tensor | None, v: Tensor | None, v_seq: Tensor | None
) -> OutputGradients:
    """Gradients as autograd hands them over, contiguous and those of the spikes written out."""
    return OutputGradients(
        torch.zeros_like(x_seq) if spike_seq is None else spike_seq.contiguous(),
        None if v is None else v.contiguous(),
        None if v_seq is None else v_seq.contiguous(),
    )


# What torch has no public way to ask for; every release since 2.8 answers.


def in_functorch() -> bool:
    """Whether a transform of ``torch.func`` is at work, such as vmap."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def differentiates_by_functorch() -> bool:
    """Whether one of them differentiates, as ``torch.func.grad`` does."""
    if not in_functorch():
        return False
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    return any(
        level.key().name in ("Grad", "Jvp") for level in retrieve_all_functorch_interpreters()
    )


def in_onnx_export() -> bool:
    """Whether torch writes an ONNX model, which can hold torch's own operators alone."""
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    return traced and torch.onnx.is_in_onnx_export()


def is_recorded() -> bool:
    """Whether ``make_fx`` or ``torch.export`` makes a graph that runs later, with gradients or
    without; plain torch that writes with ``out=`` has none.
    """
    if torch.compiler.is_exporting():
        return True
    if torch.compiler.is_dynamo_compiling():
        return False
    from torch.fx.experimental.proxy_tensor import get_proxy_mode  # whoever records has loaded it

    return get_proxy_mode() is not None


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether tensors have memory, hold what is in it, and nobody traces what is done with them."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None:
        return False
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
            return False
        if tensor._is_zerotensor() or tensor.is_neg() or torch._is_functional_tensor(tensor):
            return False
    return True


# The registration. Outputs that a call does not have are empty tensors.

CONSTANTS = (
    "float decay, float v_threshold, float? v_reset, str surrogate, float alpha, bool detach_reset"
)
"""Schema of :attr:`DLIFConfig.arguments`."""
_BACKEND = "str backend, int? threads_per_block"
# untyped in torch
_library: Any = torch.library.Library("sj_robust", "FRAGMENT")  # type: ignore[no-untyped-call]


def define(name: str, schema: str, *, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """An operator ``sj_robust::name`` for every device; vmap runs it once for every sample of the
    batch.
    """
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    qualified = f"sj_robust::{name}"
    torch.library.register_fake(qualified, fake, lib=_library)
    operator = getattr(torch.ops.sj_robust, name).default

    def over_batch(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, ...]:
        samples = [
            operator(
                *(
                    a if dim is None else a.select(dim, i)
                    for a, dim in zip(arguments, in_dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        ]
        outputs = tuple(torch.stack(parts) for parts in zip(*samples, strict=True))
        return outputs, (0,) * len(outputs)

    torch.library.register_vmap(qualified, over_batch, lib=_library)
    return operator


def define_gradient(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> None:
    """How autograd goes through an operator of :func:`define`."""
    torch.library.register_autograd(
        f"sj_robust::{name}", backward, setup_context=setup_context, lib=_library
    )


def or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """The tensor, or an empty one for none."""
    return like.new_empty(0) if tensor is None else tensor


def check_graph(backend: str, config: DLIFConfig, x_seq: Tensor, *states: Tensor | None) -> None:
    """Refuse what a kernel would misread: a graph may have been made elsewhere, and get any
    tensors.
    """
    for tensor in states:
        if tensor is not None and (
            tensor.dtype != state_dtype(x_seq) or tensor.device != x_seq.device
        ):
            raise ValueError(
                f"gains and potentials of {x_seq.dtype} currents on {x_seq.device} must be "
                f"{state_dtype(x_seq)} there, got {tensor.dtype} on {tensor.device}"
            )
    reason = unavailable_reason(backend) or implementation(backend).unsupported_reason(
        x_seq, config.surrogate
    )
    if reason is not None:
        raise ValueError(
            f"the graph was made for backend={backend!r}, which cannot run this call: {reason}"
        )


def _call(backend: str, threads: int | None, *arguments: Any) -> tuple[Any, Inputs]:
    """The implementation and its inputs."""
    x_seq, input_gain, v_init, *constants = arguments
    config = DLIFConfig.of(*constants)
    check_arguments(x_seq, input_gain, v_init)
    check_graph(backend, config, x_seq, input_gain, v_init)
    v_init = None if v_init is None else v_init.contiguous()
    return implementation(backend, threads), Inputs(
        x_seq.contiguous(), input_gain.contiguous(), v_init, config
    )


def _forward_kernel(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *given, store_v_seq, backend, threads = arguments
    found, inputs = _call(backend, threads, *given)
    spike_seq, v, v_seq = found.forward(inputs, store_v_seq)
    return spike_seq, v, or_empty(v_seq, v)


def _forward_fake(
    x_seq: Tensor, input_gain: Tensor, v_init: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, store_v_seq, _, _ = rest
    dtype = state_dtype(x_seq)
    v_seq = x_seq.new_empty(x_seq.shape if store_v_seq else (0,), dtype=dtype)
    return x_seq.new_empty(x_seq.shape), x_seq.new_empty(x_seq.shape[1:], dtype=dtype), v_seq


def _backward_kernel(
    grad_spike_seq: Tensor | None, grad_v: Tensor | None, grad_v_seq: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *given, needs_v_init, backend, threads = arguments
    found, inputs = _call(backend, threads, *given)
    grads = output_gradients(inputs.x_seq, grad_spike_seq, grad_v, grad_v_seq)
    grad_x, grad_gain, grad_v_init = found.backward(inputs, grads, needs_v_init)
    return grad_x, grad_gain, or_empty(grad_v_init, grad_gain)


def _backward_fake(
    _gs: Any,
    _gv: Any,
    _gvs: Any,
    x_seq: Tensor,
    input_gain: Tensor,
    v_init: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *_, needs_v_init, _, _ = rest
    grad_v_init = x_seq.new_empty(
        x_seq.shape[1:] if needs_v_init else (0,), dtype=state_dtype(x_seq)
    )
    return x_seq.new_empty(x_seq.shape), input_gain.new_empty(input_gain.shape), grad_v_init


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_seq, input_gain, v_init, *constants, store_v_seq, backend, threads = inputs
    ctx.save_for_backward(x_seq, input_gain, v_init)
    ctx.config, ctx.operator, ctx.store_v_seq = (
        DLIFConfig.of(*constants),
        (backend, threads),
        store_v_seq,
    )
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    x_seq, input_gain, v_init = saved_tensors(ctx)
    inputs = Inputs(x_seq, input_gain, v_init, ctx.config)
    grads = grads if ctx.store_v_seq else (*grads[:2], None)
    found = _registered_backward(grads, inputs, ctx.needs_input_grad[2], ctx.operator)
    return *found, *[None] * 9


_TENSORS = "Tensor x_seq, Tensor input_gain, Tensor? v_init"
_dlif = define(
    "dlif",
    f"({_TENSORS}, {CONSTANTS}, bool store_v_seq, {_BACKEND}) -> (Tensor spike_seq, Tensor v, "
    "Tensor v_seq)",
    kernel=_forward_kernel,
    fake=_forward_fake,
)
_dlif_backward = define(
    "dlif_backward",
    f"(Tensor? grad_spike_seq, Tensor? grad_v, Tensor? grad_v_seq, {_TENSORS}, {CONSTANTS}, bool "
    f"needs_v_init, {_BACKEND}) -> (Tensor grad_x_seq, Tensor grad_input_gain, Tensor "
    "grad_v_init)",
    kernel=_backward_kernel,
    fake=_backward_fake,
)
define_gradient("dlif", _backward, _setup_context)


def registered(inputs: Inputs, store_v_seq: bool, operator: tuple[str, int | None]) -> Outputs:
    """A call through torch's registry, with the backend and block size that run it."""
    *tensors, config = inputs
    spike_seq, v, v_seq = _dlif(*tensors, *config.arguments, store_v_seq, *operator)
    return spike_seq, v, v_seq if store_v_seq else None


def _registered_backward(
    grads: tuple[Tensor | None, ...],
    inputs: Inputs,
    needs_v_init: bool,
    operator: tuple[str, int | None],
) -> tuple[Tensor, Tensor, Tensor | None]:
    *tensors, config = inputs
    grad_x, grad_gain, grad_v_init = _dlif_backward(
        *grads, *tensors, *config.arguments, needs_v_init, *operator
    )
    return grad_x, grad_gain, grad_v_init if needs_v_init else None
