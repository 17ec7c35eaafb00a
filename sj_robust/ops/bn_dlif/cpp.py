"""Batch norm, DLIF and 2x2 average pooling through the compiled kernels of this package; see
:class:`sj_robust.ops.bn_dlif.layer.Kernels`.
"""

import torch
from torch import Tensor

from sj_robust.ops.bn_dlif.layer import Layer
from sj_robust.ops.dlif import cpp
from sj_robust.ops.dlif.config import is_repeated, state_dtype
from sj_robust.ops.dlif.cpp import unsupported_reason

__all__ = ["backward", "finish", "forward", "moments", "unsupported_reason"]


def moments(
    layer: Layer,
    *,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
) -> Tensor:
    """See :class:`sj_robust.ops.bn_dlif.layer.Kernels`."""
    if running_mean is None or running_var is None:
        mean, variance = _statistics(layer)
    else:
        mean, variance = running_mean.double(), running_var.double()
    inverse_std = (variance + eps).rsqrt()
    scale = inverse_std if weight is None else weight.double() * inverse_std
    offset = -mean * scale if bias is None else bias.double() - mean * scale
    return torch.stack((mean, variance, scale, offset))


def forward(
    layer: Layer,
    *,
    input_gain: Tensor,
    v_init: Tensor | None,
    spike_seq: Tensor,
    v_last: Tensor,
    v_seq: Tensor | None,
    current_seq: Tensor | None,
) -> None:
    """See :class:`sj_robust.ops.bn_dlif.layer.Kernels`."""
    function, per_channel = "dlif_forward", {}
    if layer.moments is not None:
        _, _, scale, offset = layer.moments.to(state_dtype(layer.x_seq)).unbind(0)
        function, per_channel = "bn_dlif_forward", {"scale": scale, "offset": offset}
    cpp.run(
        function,
        layer.x_seq,
        layer.config,
        layer.planes,
        gain=input_gain,
        v_init=v_init,
        s=spike_seq,
        v=v_last,
        v_seq=v_seq,
        current=current_seq,
        **per_channel,
    )


def backward(
    layer: Layer,
    slopes: Tensor | None = None,
    *,
    input_gain: Tensor,
    v_init: Tensor | None,
    grad_spike_seq: Tensor,
    grad_v_last: Tensor | None,
    grad_v_seq: Tensor | None,
    grad_current_seq: Tensor | None,
    grad_x_seq: Tensor | None,
    grad_x_total: Tensor | None = None,
    channel_sums: Tensor | None = None,
    grad_input_gain: Tensor | None = None,
    grad_v_init: Tensor | None = None,
) -> None:
    """See :class:`sj_robust.ops.bn_dlif.layer.Kernels`."""
    function, per_channel = "dlif_backward", {}
    if layer.moments is not None:
        function, per_channel = "bn_dlif_backward", _per_channel(layer.moments, slopes, layer.x_seq)
    cpp.run(
        function,
        layer.x_seq,
        layer.config,
        layer.planes,
        gain=input_gain,
        v_init=v_init,
        gs=grad_spike_seq,
        gv=grad_v_last,
        gvs=grad_v_seq,
        g_current=grad_current_seq,
        gx=grad_x_seq,
        g_total=grad_x_total,
        channel_sums=channel_sums,
        gain_grad=grad_input_gain,
        gv_init=grad_v_init,
        **per_channel,
    )


def finish(
    sums: Tensor, moments: Tensor, eps: float, count: int | None
) -> tuple[Tensor, Tensor | None]:
    """See :class:`sj_robust.ops.bn_dlif.layer.Kernels`."""
    inverse_std = (moments[1] + eps).rsqrt()
    grad_norm = torch.stack((sums[1] * inverse_std, sums[0]))
    if count is None:
        return grad_norm, None
    slope = -moments[2] * inverse_std.square() * sums[1] / count
    return grad_norm, torch.stack((slope, -moments[2] * sums[0] / count))


def _per_channel(moments: Tensor, slopes: Tensor | None, x_seq: Tensor) -> dict[str, Tensor]:
    dtype = state_dtype(x_seq)
    mean, _, scale, offset = moments.to(dtype).unbind(0)
    if slopes is None:
        slopes = moments.new_zeros(2, moments.shape[1])
    slope, constant = slopes.to(dtype).unbind(0)
    return {
        "mean": mean,
        "scale": scale,
        "offset": offset,
        "slope": slope,
        "constant": constant,
    }


def _statistics(layer: Layer) -> tuple[Tensor, Tensor]:
    """Mean and variance per channel of this batch, in float64."""
    x_seq, planes = layer.x_seq, layer.planes
    # any value near the mean makes the sums free of cancellation: take the first of every channel
    near = x_seq[0, 0].reshape(planes.channels, -1)[:, 0].to(state_dtype(x_seq)).contiguous()
    sums = x_seq.new_empty(2, planes.channels, dtype=torch.float64)
    steps = x_seq[:1] if is_repeated(x_seq) else x_seq
    cpp.run("bn_statistics", steps, layer.config, planes, mean=near, channel_sums=sums)
    count = steps.numel() // planes.channels
    distance = sums[0] / count
    return near.double() + distance, (sums[1] / count - distance.square()).clamp_(min=0.0)
