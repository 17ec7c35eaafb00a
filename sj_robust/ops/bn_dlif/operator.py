"""``torch.ops.sj_robust.bn_dlif`` and its backward pass, by which every call in one pass reaches
its kernels.

Only the input and a few numbers per channel are saved for backward.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sj_robust.ops.bn_dlif import one_pass
from sj_robust.ops.bn_dlif.layer import StageConfig, dense, memory_format
from sj_robust.ops.bn_dlif.norm import BatchNorm
from sj_robust.ops.bn_dlif.one_pass import StageOutputs
from sj_robust.ops.bn_dlif.repeated import repeated_step
from sj_robust.ops.dlif import operator as dlif
from sj_robust.ops.dlif.config import Inputs, is_repeated
from sj_robust.ops.registration import (
    define,
    or_empty,
    saved_tensors,
)

__all__ = ["multi_step"]


def multi_step(
    inputs: Inputs,
    norm: BatchNorm | None,
    *,
    average_pool: bool,
    store_v_seq: bool,
    store_current: bool,
    backend: str,
) -> StageOutputs:
    """Spikes or their means, last potential and, if asked for, all potentials and the neurons'
    currents.

    The currents [T, N, C, *], those behind the batch norm, are in the dtype of the potentials.
    """
    x_seq, v_init = inputs.x_seq, inputs.v_init
    layout = memory_format(x_seq)
    assert layout is not None  # see one_pass.unsupported_reason
    stage = StageConfig(
        neuron=inputs.config,
        statistics=_statistics(norm),
        eps=0.0 if norm is None else norm.eps,
        average_pool=average_pool,
        channels_last=layout == torch.channels_last,
        backend=backend,
    )
    is_running = stage.statistics == "running"
    x = x_seq
    if norm is not None and (step := repeated_step(x_seq)) is not None:
        x = step  # whose gradient is the sum over time
    elif not is_repeated(x_seq):  # as a first layer's current, which is computed once
        x = dense(x_seq, layout)
    outputs = StageOutputs(
        *_bn_dlif(
            x,
            None if norm is None else norm.weight,
            None if norm is None else norm.bias,
            inputs.input_gain,
            None if v_init is None else v_init.contiguous(memory_format=layout),
            norm.running_mean if norm is not None and is_running else None,
            norm.running_var if norm is not None and is_running else None,
            **stage.arguments,
            store_v_seq=store_v_seq,
            store_current=store_current,
        )
    )
    if norm is not None and outputs.moments is not None and stage.statistics == "batch":
        _update(norm, outputs.moments, x_seq.numel() // x_seq.shape[2])
    return outputs._replace(
        v_seq=outputs.v_seq if store_v_seq else None,
        current=outputs.current if store_current else None,
    )


def _statistics(norm: BatchNorm | None) -> str | None:
    if norm is None:
        return None
    return "batch" if norm.use_batch_statistics else "running"


def _update(norm: BatchNorm, moments: Tensor, values: int) -> None:
    """Running statistics, from those of a batch with so many values per channel."""
    # Through .data, since torch's own batch norm leaves their version alone too: the graph of an
    # earlier pass, which names them without using them, stays good.
    mean, variance = moments[0], moments[1] * (values / (values - 1))
    for running, value in ((norm.running_mean, mean), (norm.running_var, variance)):
        if running is not None:
            running.data.copy_((1 - norm.momentum) * running.double() + norm.momentum * value)


class _BatchNormDLIF(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[..., tuple[Tensor, ...]],
        x_seq: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        input_gain: Tensor,
        v_init: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        call: dict[str, Any],
    ) -> tuple[Tensor, ...]:
        outputs = run(x_seq, weight, bias, input_gain, v_init, running_mean, running_var, **call)
        moments = outputs[-1]
        has_norm = call["statistics"] is not None
        ctx.save_for_backward(x_seq, input_gain, v_init, moments if has_norm else None)
        ctx.mark_non_differentiable(moments)
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.weight_dtype = None if weight is None else weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return outputs

    @staticmethod
    def backward(
        ctx: Any,
        grad_spike_seq: Tensor | None,
        grad_v: Tensor | None,
        grad_v_seq: Tensor | None,
        grad_current: Tensor | None,
        _: None,
    ) -> tuple[Tensor | None, ...]:
        x_seq, input_gain, v_init, moments = saved_tensors(ctx)
        _, needs_x, needs_weight, needs_bias, _, needs_v_init, *_ = ctx.needs_input_grad
        call = dict(ctx.call)
        has_v_seq, has_current = call.pop("store_v_seq"), call.pop("store_current")
        grad_x, grad_norm, grad_gain, grad_v_init = _bn_dlif_backward(
            grad_spike_seq,
            grad_v,
            grad_v_seq if has_v_seq else None,
            grad_current if has_current else None,
            x_seq,
            input_gain,
            v_init,
            moments,
            needs_x=needs_x,
            needs_v_init=needs_v_init,
            **call,
        )
        return (
            None,
            grad_x if needs_x else None,
            grad_norm[0].to(ctx.weight_dtype) if needs_weight else None,
            grad_norm[1].to(ctx.bias_dtype) if needs_bias else None,
            grad_gain,
            grad_v_init if needs_v_init else None,
            None,
            None,
            None,
        )


def _forward(
    x_seq: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    input_gain: Tensor,
    v_init: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    store_v_seq: bool,
    store_current: bool,
    **constants: Any,
) -> tuple[Tensor, ...]:
    stage = StageConfig.of(**constants)
    dlif.check_call(stage.backend, stage.neuron, x_seq, input_gain, v_init)
    outputs = one_pass.forward(
        _in_order(x_seq, stage),
        input_gain.contiguous(),
        None if v_init is None else v_init.contiguous(memory_format=stage.layout),
        stage,
        weight=weight,
        bias=bias,
        running_mean=running_mean,
        running_var=running_var,
        store_v_seq=store_v_seq,
        store_current=store_current,
    )
    return tuple(or_empty(output, x_seq) for output in outputs)


def _forward_fake(
    x_seq: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    input_gain: Tensor,
    v_init: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    store_v_seq: bool,
    store_current: bool,
    **constants: Any,
) -> tuple[Tensor, ...]:
    stage, moments = StageConfig.of(**constants), None
    if stage.statistics is not None:
        moments = x_seq.new_empty(4, x_seq.shape[2], dtype=torch.float64)
    outputs = one_pass.room_for_outputs(
        x_seq,
        input_gain.shape[0],
        stage,
        moments,
        store_v_seq=store_v_seq,
        store_current=store_current,
    )
    return tuple(or_empty(output, x_seq) for output in outputs)


def _backward(
    grad_spike_seq: Tensor | None,
    grad_v: Tensor | None,
    grad_v_seq: Tensor | None,
    grad_current: Tensor | None,
    x_seq: Tensor,
    input_gain: Tensor,
    v_init: Tensor | None,
    moments: Tensor | None,
    *,
    needs_x: bool,
    needs_v_init: bool,
    **constants: Any,
) -> tuple[Tensor, ...]:
    stage = StageConfig.of(**constants)
    dlif.check_call(stage.backend, stage.neuron, x_seq, input_gain, v_init)
    found = one_pass.backward(
        _in_order(x_seq, stage),
        input_gain.contiguous(),
        None if v_init is None else v_init.contiguous(memory_format=stage.layout),
        moments,
        stage,
        grad_spike_seq=grad_spike_seq,
        grad_v=grad_v,
        grad_v_seq=grad_v_seq,
        grad_current=grad_current,
        needs_x=needs_x,
        needs_v_init=needs_v_init,
    )
    return tuple(or_empty(gradient, x_seq) for gradient in found)


def _backward_fake(
    grad_spike_seq: Tensor | None,
    grad_v: Tensor | None,
    grad_v_seq: Tensor | None,
    grad_current: Tensor | None,
    x_seq: Tensor,
    input_gain: Tensor,
    v_init: Tensor | None,
    moments: Tensor | None,
    *,
    needs_x: bool,
    needs_v_init: bool,
    **constants: Any,
) -> tuple[Tensor, ...]:
    found = one_pass.room_for_gradients(
        x_seq,
        input_gain,
        StageConfig.of(**constants),
        needs_x=needs_x,
        needs_v_init=needs_v_init,
    )
    if moments is not None:
        found = found._replace(norm=moments.new_empty(2, x_seq.shape[2]))
    return tuple(or_empty(gradient, x_seq) for gradient in found)


def _in_order(x_seq: Tensor, stage: StageConfig) -> Tensor:
    """As it must lie in memory, which a graph need not keep."""
    if is_repeated(x_seq) and x_seq[0].is_contiguous(memory_format=stage.layout):
        return x_seq
    return dense(x_seq, stage.layout)


_CALL = (
    f"{dlif.CONSTANTS}, str? statistics, float eps, bool average_pool, bool channels_last, str "
    "backend"
)
_bn_dlif = define(
    "bn_dlif(Tensor x_seq, Tensor? weight, Tensor? bias, Tensor input_gain, Tensor? v_init, "
    f"Tensor? running_mean, Tensor? running_var, *, {_CALL}, bool store_v_seq, bool "
    "store_current) -> (Tensor spike_seq, Tensor v, Tensor v_seq, Tensor current, Tensor moments)",
    kernel=_forward,
    fake=_forward_fake,
    gradient=_BatchNormDLIF,
)
_bn_dlif_backward = define(
    "bn_dlif_backward(Tensor? grad_spike_seq, Tensor? grad_v, Tensor? grad_v_seq, Tensor? "
    "grad_current, Tensor x_seq, Tensor input_gain, Tensor? v_init, Tensor? moments, *, "
    f"{_CALL}, bool needs_x, bool needs_v_init) -> (Tensor grad_x, Tensor grad_norm, Tensor "
    "grad_input_gain, Tensor grad_v_init)",
    kernel=_backward,
    fake=_backward_fake,
)
