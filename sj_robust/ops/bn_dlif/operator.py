"""The operator ``torch.ops.sj_robust.bn_dlif`` and its backward pass.

Only the input and a few numbers per channel are saved for backward.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sj_robust.ops.bn_dlif import one_pass
from sj_robust.ops.bn_dlif.layer import (
    NormTensors,
    StageConfig,
    StageOutputGradients,
    StageOutputs,
    dense,
    memory_format,
)
from sj_robust.ops.bn_dlif.norm import BatchNorm
from sj_robust.ops.bn_dlif.repeated import repeated_step
from sj_robust.ops.dlif import operator as dlif
from sj_robust.ops.dlif.config import DLIFConfig, Inputs, is_repeated
from sj_robust.ops.registration import define, present, saved_tensors

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
        statistics=_statistics(norm),
        eps=0.0 if norm is None else norm.eps,
        average_pool=average_pool,
        channels_last=layout == torch.channels_last,
        backend=backend,
    )
    of_norm = NormTensors(None, None, None, None)
    if norm is not None:
        of_norm = NormTensors(norm.weight, norm.bias, norm.running_mean, norm.running_var)
        if norm.use_batch_statistics:
            of_norm = NormTensors(norm.weight, norm.bias, None, None)
    x = x_seq
    if norm is not None and (step := repeated_step(x_seq)) is not None:
        x = step  # whose gradient is the sum over time
    elif not is_repeated(x_seq):  # as a first layer's current, which is computed once
        x = dense(x_seq, layout)
    spike_seq, v, v_seq, current, moments = _bn_dlif(
        x,
        inputs.input_gain,
        None if v_init is None else v_init.contiguous(memory_format=layout),
        *of_norm,
        **inputs.config.arguments,
        **stage.arguments,
        store_v_seq=store_v_seq,
        store_current=store_current,
    )
    if norm is not None and norm.use_batch_statistics:
        _update(norm, moments, x_seq.numel() // x_seq.shape[2])
    return StageOutputs(
        spike_seq=spike_seq,
        v=v,
        v_seq=v_seq if store_v_seq else None,
        current=current if store_current else None,
    )


def _statistics(norm: BatchNorm | None) -> str | None:
    if norm is None:
        return None
    return "batch" if norm.use_batch_statistics else "running"


def _update(norm: BatchNorm, moments: Tensor, values: int) -> None:
    """Running statistics, from those of a batch with so many values per channel."""
    # Through .data, since torch's own batch norm leaves their version alone too: the graph of an
    # earlier pass, which names them without using them, stays good.
    mean = moments[0]
    variance = moments[1] * (values / (values - 1))
    for running, value in ((norm.running_mean, mean), (norm.running_var, variance)):
        if running is not None:
            kept = (1 - norm.momentum) * running.double()
            running.data.copy_(kept + norm.momentum * value)


class _BatchNormDLIF(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[..., tuple[Tensor | None, ...]],
        x_seq: Tensor,
        input_gain: Tensor,
        v_init: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        call: dict[str, Any],
    ) -> tuple[Tensor | None, ...]:
        outputs = run(x_seq, input_gain, v_init, weight, bias, running_mean, running_var, **call)
        moments = outputs[-1]
        has_norm = call["statistics"] is not None
        ctx.save_for_backward(x_seq, input_gain, v_init, moments if has_norm else None)
        if moments is not None:
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
        x_seq, input_gain, v_init, moments = saved_tensors(
            ctx, grad_spike_seq, grad_v, grad_v_seq, grad_current
        )
        _, needs_x, _, needs_v_init, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        call = dict(ctx.call)
        has_v_seq, has_current = call.pop("store_v_seq"), call.pop("store_current")
        grad_x, grad_gain, grad_v_init, grad_norm = _bn_dlif_backward(
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
            grad_gain,
            grad_v_init if needs_v_init else None,
            grad_norm[0].to(ctx.weight_dtype) if needs_weight else None,
            grad_norm[1].to(ctx.bias_dtype) if needs_bias else None,
            None,
            None,
            None,
        )


def _forward(
    x_seq: Tensor,
    input_gain: Tensor,
    v_init: Tensor | None,
    *norm: Tensor | None,
    store_v_seq: bool,
    store_current: bool,
    **constants: Any,
) -> tuple[Tensor | None, ...]:
    stage, config = _configs(**constants)
    inputs = _inputs(x_seq, input_gain, v_init, stage, config)
    outputs, moments = one_pass.forward(
        inputs, NormTensors(*norm), stage, store_v_seq=store_v_seq, store_current=store_current
    )
    return *outputs, moments


def _forward_fake(
    x_seq: Tensor,
    input_gain: Tensor,
    *others: Tensor | None,
    store_v_seq: bool,
    store_current: bool,
    **constants: Any,
) -> tuple[Tensor, ...]:
    stage, _ = _configs(**constants)
    outputs = stage.room_for_outputs(
        x_seq, input_gain.shape[0], store_v_seq=store_v_seq, store_current=store_current
    )
    moments = None
    if stage.statistics is not None:
        moments = x_seq.new_empty(4, x_seq.shape[2], dtype=torch.float64)
    return present((*outputs, moments), x_seq)


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
) -> tuple[Tensor | None, ...]:
    stage, config = _configs(**constants)
    inputs = _inputs(x_seq, input_gain, v_init, stage, config)
    layout, T = stage.layout, len(input_gain)
    if grad_spike_seq is None:
        grad_spike_seq = stage.steps(x_seq, T, x_seq.dtype, pooled=stage.average_pool).zero_()
    grads = StageOutputGradients(
        spike_seq=dense(grad_spike_seq, layout),
        v=None if grad_v is None else grad_v.contiguous(memory_format=layout),
        v_seq=None if grad_v_seq is None else dense(grad_v_seq, layout),
        current=None if grad_current is None else dense(grad_current, layout),
    )
    found, grad_norm = one_pass.backward(
        inputs, moments, stage, grads, needs_x=needs_x, needs_v_init=needs_v_init
    )
    return found.x, found.input_gain, found.v_init, grad_norm


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
    stage, _ = _configs(**constants)
    found = stage.room_for_gradients(
        x_seq, input_gain.shape[0], needs_x=needs_x, needs_v_init=needs_v_init
    )
    grad_norm = None if moments is None else moments.new_empty(2, x_seq.shape[2])
    return present((found.x, found.input_gain, found.v_init, grad_norm), x_seq)


@functools.lru_cache
def _configs(
    statistics: str | None,
    eps: float,
    average_pool: bool,
    channels_last: bool,
    backend: str,
    **neuron: Any,
) -> tuple[StageConfig, DLIFConfig]:
    stage = StageConfig(statistics, eps, average_pool, channels_last, backend)
    return stage, DLIFConfig.of(**neuron)


def _inputs(
    x_seq: Tensor,
    input_gain: Tensor,
    v_init: Tensor | None,
    stage: StageConfig,
    config: DLIFConfig,
) -> Inputs:
    """What kernels take, as it must lie in memory, which a graph need not keep."""
    layout = stage.layout
    if not (is_repeated(x_seq) and x_seq[0].is_contiguous(memory_format=layout)):
        x_seq = dense(x_seq, layout)
    v_init = None if v_init is None else v_init.contiguous(memory_format=layout)
    return Inputs(x_seq, input_gain.contiguous(), v_init, config)


_CALL = (
    f"{dlif.CONSTANTS}, str? statistics, float eps, bool average_pool, bool channels_last, str "
    "backend"
)
_bn_dlif = define(
    "bn_dlif(Tensor x_seq, Tensor input_gain, Tensor? v_init, Tensor? weight, Tensor? bias, "
    f"Tensor? running_mean, Tensor? running_var, *, {_CALL}, bool store_v_seq, bool "
    "store_current) -> (Tensor spike_seq, Tensor v, Tensor v_seq, Tensor current, Tensor moments)",
    kernel=_forward,
    in_graph=dlif.checked(_forward),
    fake=_forward_fake,
    gradient=_BatchNormDLIF,
)
_bn_dlif_backward = define(
    "bn_dlif_backward(Tensor? grad_spike_seq, Tensor? grad_v, Tensor? grad_v_seq, Tensor? "
    "grad_current, Tensor x_seq, Tensor input_gain, Tensor? v_init, Tensor? moments, *, "
    f"{_CALL}, bool needs_x, bool needs_v_init) -> (Tensor grad_x, Tensor grad_input_gain, Tensor "
    "grad_v_init, Tensor grad_norm)",
    kernel=_backward,
    in_graph=dlif.checked(_backward),
    fake=_backward_fake,
)
