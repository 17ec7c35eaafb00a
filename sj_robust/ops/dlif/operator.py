"""The operator ``torch.ops.sj_robust.dlif`` and its backward pass."""

from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from sj_robust.ops.dlif import backends
from sj_robust.ops.dlif.backends import implementation, unavailable_reason
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
    present,
    saved_tensors,
)
from sj_robust.ops.surrogate import Surrogate

__all__ = ["CONSTANTS", "check_call", "checked", "multi_step"]

CONSTANTS = (
    "float decay, float v_threshold, float? v_reset, str surrogate, float alpha, bool detach_reset"
)
"""Schema of :attr:`DLIFConfig.arguments`."""


def multi_step(
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
) -> Callable[..., tuple[Tensor, ...]]:
    """A kernel for calls of torch's registry: tensors are checked, since a graph may have been made
    elsewhere and get any, and every output is there. Calls of this package are checked before.

    Args:
        kernel: It takes ``x_seq``, ``input_gain`` and ``v_init`` in this order among its tensors.
        check_shapes: Refuses these three if they do not belong together; None checks no shapes, as
            where one step of ``x_seq`` may stand for all.
    """
    first = list(signature(kernel).parameters).index("x_seq")

    def in_graph(*tensors: Any, **call: Any) -> tuple[Tensor, ...]:
        x_seq, input_gain, v_init = tensors[first : first + 3]
        if check_shapes is not None:
            check_shapes(x_seq, input_gain, v_init)
        surrogate = Surrogate.named(call["surrogate"], call["alpha"])
        check_call(call["backend"], surrogate, x_seq, input_gain, v_init)
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
    return backends.forward(implementation(backend, threads_per_block), inputs, store_v_seq)


def _forward_fake(
    x_seq: Tensor, *states: Tensor | None, store_v_seq: bool, **constants: Any
) -> tuple[Tensor, ...]:
    return present(backends.room_for_outputs(x_seq, store_v_seq), x_seq)


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
    return backends.backward(found, inputs, grads, needs_v_init)


def _backward_fake(
    grad_spike_seq: Tensor | None,
    grad_v: Tensor | None,
    grad_v_seq: Tensor | None,
    x_seq: Tensor,
    *states: Tensor | None,
    needs_v_init: bool,
    **constants: Any,
) -> tuple[Tensor, ...]:
    return present(backends.room_for_gradients(x_seq, needs_v_init), x_seq)


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
