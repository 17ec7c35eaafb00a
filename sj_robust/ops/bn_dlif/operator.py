"""The operator ``torch.ops.sj_robust.bn_dlif`` and its backward pass.

Forward reads the input twice in training (statistics, then the pass itself) and once otherwise;
neither the normalised tensor nor, with pooling, the spikes ever exist. Only the input and a few
numbers per channel are saved for backward.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sj_robust.ops.bn_dlif import cpp
from sj_robust.ops.bn_dlif.config import (
    BatchNorm,
    Layer,
    NormTensors,
    StageConfig,
    StageGradients,
    StageOutputGradients,
    StageOutputs,
    dense,
    memory_format,
    repeated_step,
)
from sj_robust.ops.dlif import operator as dlif
from sj_robust.ops.dlif.config import DLIFConfig, Inputs, is_repeated, state_dtype
from sj_robust.ops.dlif.operator import define, present, saved_tensors

__all__ = ["multi_step"]


def multi_step(
    inputs: Inputs,
    norm: BatchNorm | None,
    *,
    average_pool: bool,
    store_v_seq: bool,
    store_current: bool,
) -> StageOutputs:
    """Spikes or their means, last potential and, if asked for, all potentials and the neurons'
    currents.

    The currents [T, N, C, *], those behind the batch norm, are in the dtype of the potentials.
    """
    x_seq, v_init = inputs.x_seq, inputs.v_init
    layout = memory_format(x_seq)
    assert layout is not None  # see dispatch.unsupported_reason
    stage = StageConfig(
        statistics=_statistics(norm),
        eps=0.0 if norm is None else norm.eps,
        average_pool=average_pool,
        channels_last=layout == torch.channels_last,
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
    stage, layer = _layer(x_seq, input_gain, v_init, constants)
    if stage.statistics is not None:
        layer = layer._replace(moments=cpp.moments(layer, NormTensors(*norm), stage.eps))
    outputs = stage.room_for_outputs(
        x_seq, len(input_gain), store_v_seq=store_v_seq, store_current=store_current
    )
    cpp.forward(layer, outputs)
    return *outputs, layer.moments


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
    stage, layer = _layer(x_seq, input_gain, v_init, constants)
    layer = layer._replace(moments=moments)
    layout, T = stage.layout, len(input_gain)
    if grad_spike_seq is None:
        grad_spike_seq = stage.steps(x_seq, T, x_seq.dtype, pooled=stage.average_pool).zero_()
    grads = StageOutputGradients(
        spike_seq=dense(grad_spike_seq, layout),
        v=None if grad_v is None else grad_v.contiguous(memory_format=layout),
        v_seq=None if grad_v_seq is None else dense(grad_v_seq, layout),
        current=None if grad_current is None else dense(grad_current, layout),
    )
    found = stage.room_for_gradients(x_seq, T, needs_x=needs_x, needs_v_init=needs_v_init)
    if moments is None:
        cpp.backward(layer, grads, found)
        return found.x, found.input_gain, found.v_init, None
    # the gradient of one step that stands for all is the sum over time, in the dtype of potentials
    is_once = len(x_seq) < T
    total = stage.steps(x_seq, 1, state_dtype(x_seq)) if is_once and needs_x else None
    # mean and variance of a batch depend on x, so its gradient needs the sums first
    of_batch = stage.statistics == "batch"
    sums = moments.new_empty(2, layer.planes.channels)
    first = found._replace(
        x=None if of_batch or is_once else found.x, x_total=total, channel_sums=sums
    )
    cpp.backward(layer, grads, first)
    count = layer.inputs.x_seq.numel() // layer.planes.channels if of_batch else None
    grad_norm, slopes = cpp.finish(sums, moments, stage.eps, count)
    grad_x = found.x
    if total is not None:
        if slopes is not None:
            _add_slopes(total, x_seq, T, moments, slopes)
        grad_x = total.to(x_seq.dtype)
    elif slopes is not None and grad_x is not None:
        cpp.backward(layer, grads, StageGradients(x=grad_x), slopes)
    return grad_x, found.input_gain, found.v_init, grad_norm


def _add_slopes(total: Tensor, x: Tensor, T: int, moments: Tensor, slopes: Tensor) -> None:
    """Add the share of mean and variance, which is the same at every step."""
    mean = moments[0].to(total.dtype)
    slope, constant = slopes.to(total.dtype)
    shape = -1, *[1] * (x.ndim - 3)
    slope_of_all = (T * slope).view(shape)
    constant_of_all = (T * (constant - slope * mean)).view(shape)
    total.addcmul_(x, slope_of_all).add_(constant_of_all)


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
    statistics: str | None, eps: float, average_pool: bool, channels_last: bool, **neuron: Any
) -> tuple[StageConfig, DLIFConfig]:
    return StageConfig(statistics, eps, average_pool, channels_last), DLIFConfig.of(**neuron)


def _layer(
    x_seq: Tensor, input_gain: Tensor, v_init: Tensor | None, constants: dict[str, Any]
) -> tuple[StageConfig, Layer]:
    """What kernels take, as it must lie in memory, which a graph need not keep; one step that
    stands for all of them is repeated without a copy.
    """
    stage, config = _configs(**constants)
    layout, T = stage.layout, len(input_gain)
    if not (is_repeated(x_seq) and x_seq[0].is_contiguous(memory_format=layout)):
        x_seq = dense(x_seq, layout)
    planes = stage.planes(x_seq)
    if len(x_seq) != T:
        x_seq = x_seq.expand(T, *x_seq.shape[1:])
    v_init = None if v_init is None else v_init.contiguous(memory_format=layout)
    return stage, Layer(Inputs(x_seq, input_gain.contiguous(), v_init, config), planes)


_CALL = f"{dlif.CONSTANTS}, str? statistics, float eps, bool average_pool, bool channels_last"
_bn_dlif = define(
    "bn_dlif(Tensor x_seq, Tensor input_gain, Tensor? v_init, Tensor? weight, Tensor? bias, "
    f"Tensor? running_mean, Tensor? running_var, *, {_CALL}, bool store_v_seq, bool "
    "store_current) -> (Tensor spike_seq, Tensor v, Tensor v_seq, Tensor current, Tensor moments)",
    kernel=_forward,
    in_graph=dlif.checked(_forward, backend="cpp"),
    fake=_forward_fake,
    gradient=_BatchNormDLIF,
)
_bn_dlif_backward = define(
    "bn_dlif_backward(Tensor? grad_spike_seq, Tensor? grad_v, Tensor? grad_v_seq, Tensor? "
    "grad_current, Tensor x_seq, Tensor input_gain, Tensor? v_init, Tensor? moments, *, "
    f"{_CALL}, bool needs_x, bool needs_v_init) -> (Tensor grad_x, Tensor grad_input_gain, Tensor "
    "grad_v_init, Tensor grad_norm)",
    kernel=_backward,
    in_graph=dlif.checked(_backward, backend="cpp"),
    fake=_backward_fake,
)
