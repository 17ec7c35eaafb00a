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
from sj_robust.ops.dlif.config import DLIFConfig, Inputs, Surrogate, check_arguments, state_dtype
from sj_robust.ops.dlif.operator import (
    check_backend,
    differentiates_by_functorch,
    dlif_multi_step,
    have_memory,
    in_onnx_export,
    unavailable_reason,
)

__all__ = [
    "batch_norm_dlif_multi_step",
    "can_pool",
    "check_call",
    "in_one_pass",
    "normalise",
    "pool",
    "runs_in_one_pass",
    "unsupported_reason",
]


def batch_norm_dlif_multi_step(
    x_seq: Tensor,
    norm: BatchNorm | None,
    input_gain: Tensor,
    v_init: Tensor | None = None,
    *,
    average_pool: bool = False,
    decay: float,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    surrogate: Surrogate | None = None,
    detach_reset: bool = False,
    store_v_seq: bool = False,
    store_current: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor | None, *tuple[Tensor, ...]]:
    """Run batch norm, one layer of DLIF neurons and 2x2 average pooling over a sequence.

    Equation: ``y = weight * (x - mean) / sqrt(var + eps) + bias`` per channel, mean and variance
    over time, batch and space; then DLIF on y, see :func:`sj_robust.ops.dlif_multi_step`; then
    ``torch.nn.functional.avg_pool2d(s, 2)``.

    Args:
        x_seq: Input, [T, N, C, *], floating point.
        norm: The batch norm, or None for none; its running statistics are updated when it uses
            those of the batch.
        input_gain: Learnable gain per step, [T].
        v_init: Potential before the first step, [N, C, *]; None is ``v_reset``, or 0 for soft
            reset.
        average_pool: Whether the spikes [T, N, C, H, W] are averaged over 2x2 neurons, stride 2,
            without padding.
        decay: Fraction of the potential kept per step, in (0, 1].
        v_threshold: Firing threshold.
        v_reset: Potential after a spike; None subtracts the threshold instead.
        surrogate: Surrogate of the spike; None is the triangle of width 1.
        detach_reset: Whether the reset is left out of the gradient.
        store_v_seq: Whether the potential after every reset is returned too.
        store_current: Whether the neurons' currents, which are those behind the batch norm, are
            returned as well.
        backend: ``"cpp"`` runs all in one pass by the compiled kernel, and so does ``"auto"``
            where it can. Any other name of ``BACKENDS`` runs torch's batch norm, DLIF with that
            backend and torch's pooling.

    Returns:
        Spikes [T, N, C, *] or their means [T, N, C, H // 2, W // 2], last potential [N, C, *] and
        potentials [T, N, C, *] or None; and the currents [T, N, C, *] if they are asked for. In one
        pass what lies between is not rounded to the dtype of ``x_seq``.

    Raises:
        ValueError: If a shape does not fit or the named kernel cannot run this call in one pass.
        RuntimeError: If the named backend is not available on this machine.

    Source: Ioffe & Szegedy (2015); Ding et al. (ICML 2024).

    Examples:
        >>> import torch
        >>> norm = BatchNorm(None, None, None, None, use_batch_statistics=True)
        >>> x = torch.tensor([-1.0, 3.0]).view(1, 2, 1)
        >>> batch_norm_dlif_multi_step(x, norm, torch.ones(1), decay=0.5, v_threshold=0.5)[
        ...     0
        ... ].flatten()
        tensor([0., 1.])
    """
    surrogate = surrogate or Surrogate()
    check_call(x_seq, norm, input_gain, v_init)
    if average_pool and x_seq.ndim != 5:
        raise ValueError(
            f"average_pool needs x_seq [T, N, C, H, W], got shape {tuple(x_seq.shape)}"
        )
    if backend == "cpp":
        check_backend(backend)
        reason = unsupported_reason(x_seq, norm, surrogate, average_pool)
        if reason is not None:
            raise ValueError(f"backend='cpp' cannot run this call: {reason}; use backend='auto'")
    if backend == "cpp" or runs_in_one_pass(x_seq, norm, surrogate, average_pool, backend):
        outputs = in_one_pass(
            x_seq,
            norm,
            input_gain,
            v_init,
            config=DLIFConfig(decay, v_threshold, v_reset, surrogate, detach_reset),
            average_pool=average_pool,
            store_v_seq=store_v_seq,
            store_current=store_current,
        )
        found = outputs.spike_seq, outputs.v, outputs.v_seq
        return found if outputs.current is None else (*found, outputs.current)
    currents = x_seq if norm is None else reference.normalise(x_seq, norm)
    spike_seq, v, v_seq = dlif_multi_step(
        currents,
        input_gain,
        v_init,
        decay=decay,
        v_threshold=v_threshold,
        v_reset=v_reset,
        surrogate=surrogate,
        detach_reset=detach_reset,
        store_v_seq=store_v_seq,
        backend=backend,
    )
    spike_seq = reference.pool(spike_seq) if average_pool else spike_seq
    return (spike_seq, v, v_seq, currents) if store_current else (spike_seq, v, v_seq)


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
    if backend not in ("auto", "cpp") or in_onnx_export() or unavailable_reason("cpp") is not None:
        return False
    return unsupported_reason(x_seq, norm, surrogate, average_pool) is None


def unsupported_reason(
    x_seq: Tensor,
    norm: BatchNorm | None,
    surrogate: Surrogate,
    average_pool: bool = False,
) -> str | None:
    """Why this call cannot run in one pass, or None."""
    if x_seq.numel() == 0:
        return "x_seq is empty"
    reason = cpp.unsupported_reason(x_seq, surrogate)
    if reason is not None:
        return reason
    if differentiates_by_functorch():
        return "torch.func.grad and its like differentiate plain torch alone"
    if memory_format(x_seq) is None:
        return "one pass needs time steps that are contiguous or channels last, without gaps"
    if average_pool and (x_seq.ndim != 5 or min(x_seq.shape[3:]) < 2):
        return (
            "pooling needs x_seq [T, N, C, H, W] with planes of 2x2 or more, got "
            f"{tuple(x_seq.shape)}"
        )
    if norm is None:
        return None
    dtypes = x_seq.dtype, state_dtype(x_seq)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        if tensor is not None and (tensor.dtype not in dtypes or tensor.device != x_seq.device):
            return (
                f"the batch norm is {tensor.dtype} on {tensor.device}, x_seq {x_seq.dtype} on "
                f"{x_seq.device}"
            )
    return None


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


def check_call(
    x_seq: Tensor, norm: BatchNorm | None, input_gain: Tensor, v_init: Tensor | None
) -> None:
    """Tensors of a call have shapes that belong together."""
    if x_seq.ndim < 3 or x_seq.shape[0] == 0:
        raise ValueError(f"x_seq must be [T, N, C, *] with T >= 1, got shape {tuple(x_seq.shape)}")
    check_arguments(x_seq, input_gain, v_init)
    if norm is None:
        return
    of_norm = {
        "weight": norm.weight,
        "bias": norm.bias,
        "running_mean": norm.running_mean,
        "running_var": norm.running_var,
    }
    for name, tensor in of_norm.items():
        if tensor is not None and tensor.shape != x_seq.shape[2:3]:
            raise ValueError(f"{name} must be [C] = [{x_seq.shape[2]}], got {tuple(tensor.shape)}")
    per_channel = x_seq.shape[0] * x_seq.shape[1] * x_seq.shape[3:].numel()
    if norm.use_batch_statistics and per_channel == 1:
        raise ValueError(
            "batch statistics need more than one value per channel, got shape "
            f"{tuple(x_seq.shape)}; use running statistics (eval mode) or a larger batch"
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
