"""Entry point of batch norm, DLIF and pooling, in one pass or apart.

Around a neuron with a replaced forward, batch norm and 2x2 average pooling run apart by the
functions below: on a CPU torch's own take several times as long for the gradient. Batch norm in
evaluation mode also sums those of weight and bias, whether they are needed or not, and average
pooling goes through memory value by value.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from sj_robust.ops.bn_dlif import operator, reference
from sj_robust.ops.bn_dlif.config import BatchNorm, StageOutputs, memory_format, repeated_step
from sj_robust.ops.dlif import cpp
from sj_robust.ops.dlif.config import DLIFConfig, Inputs, Surrogate, state_dtype
from sj_robust.ops.dlif.operator import (
    differentiates_by_functorch,
    have_memory,
    in_onnx_export,
    unavailable_reason,
)

__all__ = [
    "can_pool",
    "in_one_pass",
    "normalise",
    "pool",
    "runs_in_one_pass",
]


def runs_in_one_pass(
    x_seq: Tensor,
    norm: BatchNorm | None,
    surrogate: Surrogate,
    average_pool: bool = False,
    backend: str = "auto",
) -> bool:
    """Whether the compiled kernel runs this call in one pass.

    Args:
        x_seq: Input, [T, N, C, *].
        norm: The batch norm, or None for none.
        surrogate: Surrogate of the spike.
        average_pool: Whether a pooling belongs to the call.
        backend: A name of ``BACKENDS``.

    Examples:
        >>> import torch
        >>> norm = BatchNorm(None, None, None, None, use_batch_statistics=True)
        >>> custom = Surrogate("custom", function=torch.sigmoid)
        >>> runs_in_one_pass(torch.zeros(2, 3, 4), norm, custom)
        False
    """
    if backend not in ("auto", "cpp") or in_onnx_export() or differentiates_by_functorch():
        return False
    if unavailable_reason("cpp") or cpp.unsupported_reason(x_seq, surrogate):
        return False
    if x_seq.numel() == 0 or memory_format(x_seq) is None:
        return False
    if average_pool and (x_seq.ndim != 5 or min(x_seq.shape[3:]) < 2):
        return False
    return norm is None or all(
        tensor is None or _is_per_channel(tensor, x_seq)
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    )


def _is_per_channel(tensor: Tensor, x_seq: Tensor) -> bool:
    """Whether the kernel can read it as one value per channel."""
    is_read = tensor.dtype in (x_seq.dtype, state_dtype(x_seq)) and tensor.device == x_seq.device
    return is_read and tensor.shape == x_seq.shape[2:3]


def in_one_pass(
    x_seq: Tensor,
    norm: BatchNorm | None,
    input_gain: Tensor,
    v_init: Tensor | None,
    *,
    config: DLIFConfig,
    average_pool: bool,
    store_v_seq: bool,
    store_current: bool,
) -> StageOutputs:
    """What the compiled kernel makes of a call that was checked."""
    dtype = state_dtype(x_seq)
    v_init = None if v_init is None else v_init.to(dtype)
    return operator.multi_step(
        Inputs(x_seq, input_gain.to(dtype), v_init, config),
        norm,
        average_pool=average_pool,
        store_v_seq=store_v_seq,
        store_current=store_current,
    )


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
    dtypes = torch.float32, torch.float64
    return have_memory((seq,)) and seq.device.type == "cpu" and seq.dtype in dtypes


def _quarters(seq: Tensor) -> Iterator[Tensor]:
    """Upper left, upper right, lower left and lower right of every 2x2; a last odd row or column is
    left out.
    """
    height = seq.shape[-2] // 2 * 2
    width = seq.shape[-1] // 2 * 2
    for row, column in product((0, 1), (0, 1)):
        yield seq[..., row:height:2, column:width:2]
