"""Batch norm and DLIF in one pass on the CPU, through the compiled kernels of this package.

Forward reads the input twice in training (statistics, then the pass itself) and once otherwise; the normalised tensor
never exists. Only the input and a few numbers per channel are saved for backward.
"""

from typing import Any

import torch
from torch import Tensor

from sj_robust.ops.bn_dlif.norm import BatchNorm
from sj_robust.ops.dlif import cpp
from sj_robust.ops.dlif.autograd import output_gradients, saved_tensors
from sj_robust.ops.dlif.config import DLIFConfig, Inputs, Outputs
from sj_robust.ops.surrogate import Surrogate

__all__ = ["multi_step", "unsupported_reason"]


def unsupported_reason(x_seq: Tensor, norm: BatchNorm, surrogate: Surrogate) -> str | None:
    """Why this call cannot run here, or None."""
    reason = cpp.unsupported_reason(x_seq, surrogate)
    if reason is not None:
        return reason
    if x_seq.dtype not in (torch.float32, torch.float64):
        return f"batch norm and DLIF in one pass know float32 and float64, got {x_seq.dtype}"
    if x_seq.numel() == 0:
        return "x_seq is empty"
    if not x_seq[0].is_contiguous():
        return "batch norm and DLIF in one pass need time steps that are contiguous"
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        if tensor is not None and (tensor.dtype != x_seq.dtype or tensor.device != x_seq.device):
            return f"the batch norm is {tensor.dtype} on {tensor.device}, x_seq {x_seq.dtype} on {x_seq.device}"
    return None


def multi_step(inputs: Inputs, norm: BatchNorm, store_v_seq: bool) -> Outputs:
    """Spikes, last potential and, if asked for, all potentials; see ``reference.multi_step``."""
    x_seq, *others, config = inputs
    outputs: Outputs = _BatchNormDLIF.apply(  # type: ignore[no-untyped-call]  # torch's apply
        x_seq.contiguous(), norm.weight, norm.bias, *others, norm, config, store_v_seq
    )
    return outputs


class _BatchNormDLIF(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_seq: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        input_gain: Tensor,
        v_init: Tensor | None,
        norm: BatchNorm,
        config: DLIFConfig,
        store_v_seq: bool,
    ) -> Outputs:
        shape = x_seq.shape
        ctx.config, ctx.use_batch_statistics = config, norm.use_batch_statistics
        ctx.channels, ctx.plane = shape[2], shape[3:].numel()
        flat = x_seq.view(shape[0], -1)
        mean, inverse_std = _statistics(ctx, flat, norm)
        scale = inverse_std if weight is None else weight.double() * inverse_std
        offset = -mean * scale if bias is None else bias.double() - mean * scale
        dtype = x_seq.dtype
        mean_, scale_, offset_ = mean.to(dtype), scale.to(dtype), offset.to(dtype)
        ctx.save_for_backward(x_seq, input_gain, v_init, mean_, inverse_std, scale_, offset_)
        ctx.set_materialize_grads(False)
        spike_seq, v = torch.empty_like(x_seq), torch.empty_like(x_seq[0])
        v_seq = torch.empty_like(x_seq) if store_v_seq else None
        tensors = {"scale": scale_, "offset": offset_, "gain": input_gain, "v_init": v_init}
        _run("bn_dlif_forward", ctx, flat, {**tensors, "s": spike_seq, "v": v, "v_seq": v_seq})
        return spike_seq, v, v_seq

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x_seq, input_gain, v_init, mean, inverse_std, scale, offset = saved_tensors(ctx)
        grads = output_gradients(x_seq, *output_grads)
        flat = x_seq.view(x_seq.shape[0], -1)
        sums = x_seq.new_empty(ctx.channels, 2, dtype=torch.float64)
        slope, constant = torch.zeros_like(scale), torch.zeros_like(scale)
        grad_gain = torch.empty_like(input_gain)
        grad_v_init = torch.empty_like(v_init) if ctx.needs_input_grad[4] else None
        grad_x = torch.empty_like(x_seq) if ctx.needs_input_grad[0] else None
        tensors = {
            "scale": scale, "offset": offset, "mean": mean, "slope": slope, "constant": constant, "channel_sums": sums,
            "gain": input_gain, "v_init": v_init, "gs": grads.spike_seq, "gv": grads.v, "gvs": grads.v_seq,
            "gain_grad": grad_gain, "gv_init": grad_v_init,
        }  # fmt: skip
        if ctx.use_batch_statistics:  # mean and variance depend on x, so its gradient needs the sums first
            _run("bn_dlif_backward", ctx, flat, tensors)
            count = x_seq.numel() // ctx.channels
            slope.copy_(-scale.double() * inverse_std.square() * sums[:, 1] / count)
            constant.copy_(-scale.double() * sums[:, 0] / count)
            if grad_x is not None:
                done = dict.fromkeys(("channel_sums", "gain_grad", "gv_init"))
                _run("bn_dlif_backward", ctx, flat, {**tensors, "gx": grad_x, **done})
        else:
            _run("bn_dlif_backward", ctx, flat, {**tensors, "gx": grad_x})
        grad_weight = (sums[:, 1] * inverse_std).to(x_seq.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = sums[:, 0].to(x_seq.dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, grad_gain, grad_v_init, None, None, None


def _run(function: str, ctx: Any, flat: Tensor, tensors: dict[str, Tensor | None]) -> None:
    cpp.run(function, flat, ctx.config, tensors, ctx.channels, ctx.plane)


def _statistics(ctx: Any, flat: Tensor, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) per channel, in float64; updates the running statistics."""
    if not norm.use_batch_statistics:
        assert norm.running_mean is not None and norm.running_var is not None  # BatchNorm checks  # noqa: PT018
        return norm.running_mean.to(torch.float64, copy=True), (norm.running_var.double() + norm.eps).rsqrt()
    # any value near the mean makes the sums free of cancellation: take the first of every channel
    near = flat[0, : ctx.channels * ctx.plane : ctx.plane].contiguous()
    sums = flat.new_empty(ctx.channels, 2, dtype=torch.float64)
    _run("bn_statistics", ctx, flat, {"mean": near, "channel_sums": sums})
    count = flat.numel() // ctx.channels
    distance = sums[:, 0] / count
    mean = near.double() + distance
    variance = (sums[:, 1] / count - distance.square()).clamp_(min=0.0)
    # Through .data, since torch's own batch norm leaves their version alone too: the graph of an earlier pass, which
    # names them without using them, stays good.
    if norm.running_mean is not None:
        norm.running_mean.data.mul_(1 - norm.momentum).add_(norm.momentum * mean)
    if norm.running_var is not None:
        norm.running_var.data.mul_(1 - norm.momentum).add_(norm.momentum * variance * (count / (count - 1)))
    return mean, (variance + norm.eps).rsqrt()
