"""Batch norm and pooling around a neuron whose backward pass stands apart, with gradients at the price of their values.

On a CPU the backward passes of torch's own take longer than the layers: ten times for the average, and that of batch
norm sums for the gradients of weight and bias, which nobody asks for.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sj_robust.ops.bn_dlif.norm import BatchNorm
from sj_robust.ops.bn_dlif.repeated import repeated_step
from sj_robust.ops.dlif.config import state_dtype

__all__ = ["normalise_by_running", "pool", "pools"]


def normalise_by_running(x_seq: Tensor, norm: BatchNorm) -> Tensor:
    """Batch norm of [T, N, C, *] with its running statistics: one factor and one offset per channel."""
    mean, variance = norm.running_mean, norm.running_var
    assert isinstance(mean, Tensor), "BatchNorm sees to it"
    assert isinstance(variance, Tensor), "as above"
    dtype = state_dtype(x_seq)
    scale = (variance.to(dtype) + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    offset = -mean * scale if norm.bias is None else norm.bias - mean * scale
    scale, offset = (value.to(dtype).view(-1, *[1] * (x_seq.ndim - 3)) for value in (scale, offset))
    step = repeated_step(x_seq)
    y_seq = ((x_seq if step is None else step) * scale).add_(offset).to(x_seq.dtype)
    return y_seq.expand(x_seq.shape)


def pools(spike_seq: Any) -> bool:
    """Whether :func:`pool` is for this call; any other is torch's, with its messages."""
    is_sequence = isinstance(spike_seq, Tensor) and spike_seq.ndim == 5
    return is_sequence and spike_seq.device.type == "cpu" and min(spike_seq.shape[3:]) > 1


def pool(spike_seq: Tensor) -> Tensor:
    """Average over 2x2 neurons of [T, N, C, H, W]; the values of ``reference.pool`` for spikes."""
    pooled: Tensor = _Pool.apply(spike_seq)  # type: ignore[no-untyped-call]  # torch's apply
    return pooled


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spike_seq: Tensor) -> Tensor:
        ctx.shape = spike_seq.shape
        quarters = _quarters(spike_seq)
        total = next(quarters) + next(quarters)
        for quarter in quarters:
            total += quarter
        return total.mul_(0.25)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        height, width = ctx.shape[-2:]
        room = grad.new_zeros if height % 2 or width % 2 else grad.new_empty
        grad_spike_seq, share = room(ctx.shape), grad * 0.25
        for quarter in _quarters(grad_spike_seq):
            quarter.copy_(share)
        return grad_spike_seq


def _quarters(seq: Tensor) -> Iterator[Tensor]:
    """Upper left, upper right, lower left and lower right of every 2x2; a last odd row or column is left out."""
    height, width = (size - size % 2 for size in seq.shape[-2:])
    return (seq[..., row:height:2, column:width:2] for row in (0, 1) for column in (0, 1))
