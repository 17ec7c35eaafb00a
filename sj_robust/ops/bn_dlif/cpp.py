"""Batch norm, DLIF and 2x2 average pooling in one pass on the CPU, through the compiled kernels of this package.

Forward reads the input twice in training (statistics, then the pass itself) and once otherwise; neither the normalised
tensor nor, with pooling, the spikes ever exist. Only the input and a few numbers per channel are saved for backward.
"""

from typing import Any

import torch
from torch import Tensor

from sj_robust.ops.bn_dlif.norm import BatchNorm
from sj_robust.ops.bn_dlif.repeated import repeated_step
from sj_robust.ops.dlif import cpp
from sj_robust.ops.dlif.autograd import saved_tensors
from sj_robust.ops.dlif.config import DLIFConfig, Inputs, state_dtype
from sj_robust.ops.surrogate import Surrogate

__all__ = ["multi_step", "unsupported_reason"]


def unsupported_reason(
    x_seq: Tensor, norm: BatchNorm | None, surrogate: Surrogate, average_pool: bool = False
) -> str | None:
    """Why this call cannot run here, or None."""
    reason = cpp.unsupported_reason(x_seq, surrogate)
    if reason is not None:
        return reason
    if x_seq.numel() == 0:
        return "x_seq is empty"
    if _memory_format(x_seq) is None:
        return "one pass needs time steps that are contiguous or channels last, without gaps"
    if average_pool and (x_seq.ndim != 5 or min(x_seq.shape[3:]) < 2):
        return f"pooling needs x_seq [T, N, C, H, W] with planes of 2x2 or more, got {tuple(x_seq.shape)}"
    for tensor in () if norm is None else (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        dtypes = (x_seq.dtype, state_dtype(x_seq))
        if tensor is not None and (tensor.dtype not in dtypes or tensor.device != x_seq.device):
            return f"the batch norm is {tensor.dtype} on {tensor.device}, x_seq {x_seq.dtype} on {x_seq.device}"
    return None


def multi_step(
    inputs: Inputs, norm: BatchNorm | None, average_pool: bool, store_v_seq: bool, store_current: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Spikes or their means, last potential and, if asked for, all potentials and the neurons' currents.

    The currents [T, N, C, *], those behind the batch norm, are in the dtype of the potentials.
    """
    x_seq, input_gain, v_init, config = inputs
    layout = _memory_format(x_seq)
    assert layout is not None  # see unsupported_reason
    T = len(x_seq)
    if norm is not None and (step := repeated_step(x_seq)) is not None:
        x_seq = step  # whose gradient is the sum over time
    elif not cpp.is_repeated(x_seq):  # as a first layer's current, which is computed once
        x_seq = _dense(x_seq, layout)
    weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
    v_init = None if v_init is None else v_init.contiguous(memory_format=layout)
    outputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None] = _Stage.apply(  # type: ignore[no-untyped-call]  # torch's apply
        x_seq, weight, bias, input_gain, v_init, norm, average_pool, config, store_v_seq, store_current, layout, T
    )
    return outputs


class _Stage(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_seq: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        input_gain: Tensor,
        v_init: Tensor | None,
        norm: BatchNorm | None,
        average_pool: bool,
        config: DLIFConfig,
        store_v_seq: bool,
        store_current: bool,
        layout: torch.memory_format,
        T: int,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        step = x_seq
        x_seq = _over_time(step, T)
        height, width = x_seq.shape[3:] if x_seq.ndim == 5 else (x_seq.shape[3:].numel(), 1)
        ctx.planes = cpp.Planes(x_seq.shape[2], height, width, layout == torch.channels_last, average_pool)
        ctx.config, ctx.layout, ctx.norm, ctx.T = config, layout, norm, T
        dtype = state_dtype(x_seq)
        per_channel: dict[str, Tensor | None] = {}
        mean_ = inverse_std = scale_ = offset_ = None
        if norm is not None:
            mean, inverse_std = _statistics(ctx, x_seq, norm)
            scale = inverse_std if weight is None else weight.double() * inverse_std
            offset = -mean * scale if bias is None else bias.double() - mean * scale
            mean_, scale_, offset_ = mean.to(dtype), scale.to(dtype), offset.to(dtype)
            per_channel = {"scale": scale_, "offset": offset_}
        ctx.save_for_backward(step, input_gain, v_init, mean_, inverse_std, scale_, offset_)
        ctx.set_materialize_grads(False)
        spike_seq = _room(x_seq, layout, x_seq.dtype, pooled=average_pool)
        v = torch.empty_like(x_seq[0], dtype=dtype)
        v_seq = _room(x_seq, layout, dtype) if store_v_seq else None
        current = _room(x_seq, layout, dtype) if store_current else None
        tensors = {"gain": input_gain, "v_init": v_init, "s": spike_seq, "v": v, "v_seq": v_seq, "current": current}
        cpp.run("dlif_forward" if norm is None else "bn_dlif_forward", x_seq, config, tensors | per_channel, ctx.planes)
        return spike_seq, v, v_seq, current

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        step, input_gain, v_init, mean, inverse_std, scale, offset = saved_tensors(ctx)
        x_seq = _over_time(step, ctx.T)
        gs, gv, gvs, g_current = output_grads
        if gs is None:
            gs = _room(x_seq, ctx.layout, x_seq.dtype, pooled=ctx.planes.pool).zero_()
        grad_gain = torch.empty_like(input_gain)
        grad_v_init = torch.empty_like(v_init) if ctx.needs_input_grad[4] else None
        needs_grad_x = ctx.needs_input_grad[0] or ctx.norm is None
        once = len(step) < ctx.T  # then the gradient is the sum over time, in the dtype of the potentials
        grad_x = _room(step, ctx.layout, state_dtype(step) if once else step.dtype) if needs_grad_x else None
        tensors: dict[str, Tensor | None] = {
            "gain": input_gain,
            "v_init": v_init,
            "gs": _dense(gs, ctx.layout),
            "gv": None if gv is None else gv.contiguous(memory_format=ctx.layout),
            "gvs": None if gvs is None else _dense(gvs, ctx.layout),
            "g_current": None if g_current is None else _dense(g_current, ctx.layout),
            "gain_grad": grad_gain,
            "gv_init": grad_v_init,
        }
        if ctx.norm is None:
            cpp.run("dlif_backward", x_seq, ctx.config, {**tensors, "gx": grad_x}, ctx.planes)
            return grad_x, None, None, grad_gain, grad_v_init, *[None] * 7
        sums = x_seq.new_empty(2, ctx.planes.channels, dtype=torch.float64)
        slope, constant = torch.zeros_like(scale), torch.zeros_like(scale)
        tensors |= {"scale": scale, "offset": offset, "mean": mean, "slope": slope, "constant": constant}
        tensors["channel_sums"] = sums
        if ctx.norm.use_batch_statistics or once:  # mean and variance depend on x, so its gradient needs the sums first
            cpp.run("bn_dlif_backward", x_seq, ctx.config, tensors | {"g_total": grad_x if once else None}, ctx.planes)
        if ctx.norm.use_batch_statistics:
            count = x_seq.numel() // ctx.planes.channels
            slope.copy_(-scale.double() * inverse_std.square() * sums[1] / count)
            constant.copy_(-scale.double() * sums[0] / count)
            if grad_x is not None and not once:
                done = dict.fromkeys(("channel_sums", "gain_grad", "gv_init"))
                cpp.run("bn_dlif_backward", x_seq, ctx.config, {**tensors, "gx": grad_x, **done}, ctx.planes)
        elif not once:
            cpp.run("bn_dlif_backward", x_seq, ctx.config, {**tensors, "gx": grad_x}, ctx.planes)
        if once and grad_x is not None:
            if ctx.norm.use_batch_statistics:  # their share is the same at every step
                slope, constant = (
                    ctx.T * value.view(-1, *[1] * (step.ndim - 3)) for value in (slope, constant - slope * mean)
                )
                grad_x.addcmul_(step, slope).add_(constant)
            grad_x = grad_x.to(step.dtype)
        grad_weight = (sums[1] * inverse_std).to(ctx.norm.weight.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = sums[0].to(ctx.norm.bias.dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, grad_gain, grad_v_init, *[None] * 7


def _memory_format(x_seq: Tensor) -> torch.memory_format | None:
    """The order in which every step lies in memory without gaps, if it is one that the kernel knows."""
    for layout in (torch.contiguous_format, torch.channels_last) if x_seq.ndim == 5 else (torch.contiguous_format,):
        if x_seq[0].is_contiguous(memory_format=layout):
            return layout
    return None


def _dense(x_seq: Tensor, layout: torch.memory_format) -> Tensor:
    """The sequence without gaps, every step in this order; the same tensor where it is that already."""
    if layout == torch.contiguous_format:
        return x_seq.contiguous()
    return x_seq.flatten(0, 1).contiguous(memory_format=layout).view(x_seq.shape)


def _over_time(x_seq: Tensor, T: int) -> Tensor:
    """The sequence itself, or its one step repeated without a copy."""
    return x_seq if len(x_seq) == T else x_seq.expand(T, *x_seq.shape[1:])


def _room(x_seq: Tensor, layout: torch.memory_format, dtype: torch.dtype, *, pooled: bool = False) -> Tensor:
    """A sequence of the shape of ``x_seq``, or of the means of its 2x2 neurons."""
    T, N, C, *plane = x_seq.shape
    plane = [size // 2 for size in plane] if pooled else plane
    return torch.empty(T * N, C, *plane, dtype=dtype, memory_format=layout).view(T, N, C, *plane)


def _statistics(ctx: Any, x_seq: Tensor, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) per channel, in float64; updates the running statistics."""
    if not norm.use_batch_statistics:
        assert norm.running_mean is not None and norm.running_var is not None  # BatchNorm checks  # noqa: PT018
        return norm.running_mean.to(torch.float64, copy=True), (norm.running_var.double() + norm.eps).rsqrt()
    # any value near the mean makes the sums free of cancellation: take the first of every channel
    near = x_seq[0, 0].reshape(ctx.planes.channels, -1)[:, 0].to(state_dtype(x_seq)).contiguous()
    sums = x_seq.new_empty(2, ctx.planes.channels, dtype=torch.float64)
    steps = x_seq[:1] if cpp.is_repeated(x_seq) else x_seq
    cpp.run("bn_statistics", steps, ctx.config, {"mean": near, "channel_sums": sums}, ctx.planes)
    count = steps.numel() // ctx.planes.channels
    distance = sums[0] / count
    mean = near.double() + distance
    variance = (sums[1] / count - distance.square()).clamp_(min=0.0)
    # Through .data, since torch's own batch norm leaves their version alone too: the graph of an earlier pass, which
    # names them without using them, stays good.
    values = x_seq.numel() // ctx.planes.channels
    unbiased = variance * (values / (values - 1))
    for running, value in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        if running is not None:
            running.data.copy_((1 - norm.momentum) * running.double() + norm.momentum * value)
    return mean, (variance + norm.eps).rsqrt()
