"""Batch norm, DLIF and 2x2 average pooling through the compiled kernels of this package; see
``stage.py``.
"""

import torch
from torch import Tensor

from sj_robust.ops.dlif import cpp
from sj_robust.ops.dlif.config import DLIFConfig, Planes, Tensors, is_repeated, state_dtype
from sj_robust.ops.dlif.cpp import unsupported_reason

__all__ = ["backward", "finish", "forward", "moments", "unsupported_reason"]


def moments(
    x_seq: Tensor, config: DLIFConfig, planes: Planes, norm: tuple[Tensor | None, ...], eps: float
) -> Tensor:
    """See :class:`sj_robust.ops.bn_dlif.stage.Kernels`."""
    weight, bias, running_mean, running_var = norm
    if running_mean is None or running_var is None:
        mean, variance = _statistics(x_seq, config, planes)
    else:
        mean, variance = running_mean.double(), running_var.double()
    inverse_std = (variance + eps).rsqrt()
    scale = inverse_std if weight is None else weight.double() * inverse_std
    offset = -mean * scale if bias is None else bias.double() - mean * scale
    return torch.stack((mean, variance, scale, offset))


def forward(
    x_seq: Tensor, config: DLIFConfig, planes: Planes, moments: Tensor | None, tensors: Tensors
) -> None:
    """See :class:`sj_robust.ops.bn_dlif.stage.Kernels`."""
    if moments is None:
        cpp.run("dlif_forward", x_seq, config, tensors, planes)
        return
    _, _, scale, offset = moments.to(state_dtype(x_seq)).unbind(0)
    cpp.run("bn_dlif_forward", x_seq, config, {**tensors, "scale": scale, "offset": offset}, planes)


def backward(
    x_seq: Tensor,
    config: DLIFConfig,
    planes: Planes,
    moments: Tensor | None,
    slopes: Tensor | None,
    tensors: Tensors,
) -> None:
    """See :class:`sj_robust.ops.bn_dlif.stage.Kernels`."""
    if moments is None:
        cpp.run("dlif_backward", x_seq, config, tensors, planes)
        return
    mean, _, scale, offset = moments.to(state_dtype(x_seq)).unbind(0)
    slope, constant = (
        (moments.new_zeros(2, planes.channels) if slopes is None else slopes)
        .to(mean.dtype)
        .unbind(0)
    )
    per_channel = {
        "scale": scale,
        "offset": offset,
        "mean": mean,
        "slope": slope,
        "constant": constant,
    }
    cpp.run("bn_dlif_backward", x_seq, config, {**tensors, **per_channel}, planes)


def finish(
    sums: Tensor, moments: Tensor, eps: float, count: int | None
) -> tuple[Tensor, Tensor | None]:
    """See :class:`sj_robust.ops.bn_dlif.stage.Kernels`."""
    inverse_std = (moments[1] + eps).rsqrt()
    grad_norm = torch.stack((sums[1] * inverse_std, sums[0]))
    if count is None:
        return grad_norm, None
    slope = -moments[2] * inverse_std.square() * sums[1] / count
    return grad_norm, torch.stack((slope, -moments[2] * sums[0] / count))


def _statistics(x_seq: Tensor, config: DLIFConfig, planes: Planes) -> tuple[Tensor, Tensor]:
    """Mean and variance per channel of this batch, in float64."""
    # any value near the mean makes the sums free of cancellation: take the first of every channel
    near = x_seq[0, 0].reshape(planes.channels, -1)[:, 0].to(state_dtype(x_seq)).contiguous()
    sums = x_seq.new_empty(2, planes.channels, dtype=torch.float64)
    steps = x_seq[:1] if is_repeated(x_seq) else x_seq
    cpp.run("bn_statistics", steps, config, {"mean": near, "channel_sums": sums}, planes)
    count = steps.numel() // planes.channels
    distance = sums[0] / count
    return near.double() + distance, (sums[1] / count - distance.square()).clamp_(min=0.0)
