"""Batch norm and 2x2 average pooling around a neuron with a replaced forward.

On a CPU torch's own take several times as long for the gradient: batch norm in evaluation mode also
sums those of weight and bias, whether they are needed or not, and average pooling goes through
memory value by value.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from sj_robust.ops.bn_dlif import reference
from sj_robust.ops.bn_dlif.norm import BatchNorm
from sj_robust.ops.bn_dlif.repeated import repeated_step

__all__ = ["can_pool", "normalise", "pool"]


def normalise(x_seq: Tensor, norm: BatchNorm) -> Tensor:
    """``reference.normalise`` within rounding; with running statistics one factor and one offset
    per channel.
    """
    mean, variance = norm.running_mean, norm.running_var
    if norm.use_batch_statistics or not _is_for(x_seq):
        return reference.normalise(x_seq, norm)
    assert mean is not None  # BatchNorm has checked it
    assert variance is not None
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    offset = -mean * scale
    if norm.bias is not None:
        offset = offset + norm.bias
    shape = -1, *[1] * (x_seq.ndim - 3)
    step = repeated_step(x_seq)
    x = x_seq if step is None else step
    current = (x * scale.view(shape)).add_(offset.view(shape))
    if step is None:
        return current
    return current.repeat(len(x_seq), *[1] * (x_seq.ndim - 1))


def can_pool(spike_seq: Any) -> bool:
    """Whether :func:`pool` is for this call; any other is torch's, with its messages."""
    if not isinstance(spike_seq, Tensor) or spike_seq.ndim != 5 or not _is_for(spike_seq):
        return False
    return min(spike_seq.shape[3:]) > 1 and spike_seq.is_contiguous()


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


def _is_for(seq: Tensor) -> bool:
    return (
        _is_plain(seq) and seq.device.type == "cpu" and seq.dtype in (torch.float32, torch.float64)
    )


def _is_plain(seq: Tensor) -> bool:
    """Whether a tensor has memory, and nobody traces what is done with it."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None:
        return False
    return type(seq) is Tensor and not torch._is_functional_tensor(seq)


def _quarters(seq: Tensor) -> Iterator[Tensor]:
    """Upper left, upper right, lower left and lower right of every 2x2; a last odd row or column is
    left out.
    """
    height = seq.shape[-2] // 2 * 2
    width = seq.shape[-1] // 2 * 2
    for row, column in product((0, 1), (0, 1)):
        yield seq[..., row:height:2, column:width:2]
