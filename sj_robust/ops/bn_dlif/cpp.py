"""Batch norm, DLIF and 2x2 average pooling with the compiled kernels."""

import torch
from torch import Tensor

from sj_robust.ops.bn_dlif.config import (
    Layer,
    NormTensors,
    StageGradients,
    StageOutputGradients,
    StageOutputs,
)
from sj_robust.ops.dlif import cpp
from sj_robust.ops.dlif.config import is_repeated, state_dtype

__all__ = ["backward", "finish", "forward", "moments"]


def moments(layer: Layer, norm: NormTensors, eps: float) -> Tensor:
    """Mean, variance, scale and offset of the batch norm per channel, [4, C] in float64."""
    weight, bias, running_mean, running_var = norm
    if running_mean is None or running_var is None:
        mean, variance = _statistics(layer)
    else:
        mean, variance = running_mean.double(), running_var.double()
    inverse_std = (variance + eps).rsqrt()
    scale = inverse_std if weight is None else weight.double() * inverse_std
    offset = -mean * scale if bias is None else bias.double() - mean * scale
    return torch.stack((mean, variance, scale, offset))


def forward(layer: Layer, outputs: StageOutputs) -> None:
    """Compute the outputs, in place."""
    cpp.run(
        "forward",
        layer.inputs,
        layer.planes,
        s=outputs.spike_seq,
        v=outputs.v,
        v_seq=outputs.v_seq,
        current=outputs.current,
        **_per_channel(layer),
    )


def backward(
    layer: Layer,
    grads: StageOutputGradients,
    found: StageGradients,
    slopes: Tensor | None = None,
) -> None:
    """Compute the gradients ``found`` from those of the outputs, in place."""
    of_slopes = {}
    if layer.moments is not None:
        if slopes is None:
            slopes = layer.moments.new_zeros(2, layer.planes.channels)
        slope, constant = slopes.to(state_dtype(layer.inputs.x_seq)).unbind(0)
        of_slopes = {"slope": slope, "constant": constant}
    cpp.run(
        "backward",
        layer.inputs,
        layer.planes,
        gs=grads.spike_seq,
        gv=grads.v,
        gvs=grads.v_seq,
        g_current=grads.current,
        gx=found.x,
        g_total=found.x_total,
        channel_sums=found.channel_sums,
        gain_grad=found.input_gain,
        gv_init=found.v_init,
        **_per_channel(layer),
        **of_slopes,
    )


def finish(
    sums: Tensor, moments: Tensor, eps: float, count: int | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of weight and bias, [2, C], from the channel sums; and the slopes [2, C] by which
    the statistics of a batch of ``count`` values per channel change the gradient of ``x``.

    ``count`` and the slopes are None for running statistics.
    """
    inverse_std = (moments[1] + eps).rsqrt()
    grad_norm = torch.stack((sums[1] * inverse_std, sums[0]))
    if count is None:
        return grad_norm, None
    slope = -moments[2] * inverse_std.square() * sums[1] / count
    constant = -moments[2] * sums[0] / count
    return grad_norm, torch.stack((slope, constant))


def _per_channel(layer: Layer) -> dict[str, Tensor]:
    if layer.moments is None:
        return {}
    moments = layer.moments.to(state_dtype(layer.inputs.x_seq))
    mean, _, scale, offset = moments.unbind(0)
    return {"mean": mean, "scale": scale, "offset": offset}


def _statistics(layer: Layer) -> tuple[Tensor, Tensor]:
    """Mean and variance per channel of this batch, in float64."""
    x_seq = layer.inputs.x_seq
    channels = layer.planes.channels
    # any value near the mean makes the sums free of cancellation: take the first of every channel
    first = x_seq[0, 0].reshape(channels, -1)[:, 0]
    near = first.to(state_dtype(x_seq)).contiguous()
    sums = x_seq.new_empty(2, channels, dtype=torch.float64)
    steps = x_seq[:1] if is_repeated(x_seq) else x_seq
    inputs = layer.inputs._replace(x_seq=steps)
    cpp.run("statistics", inputs, layer.planes, mean=near, channel_sums=sums)
    count = steps.numel() // channels
    distance = sums[0] / count
    variance = (sums[1] / count - distance.square()).clamp_(min=0.0)
    return near.double() + distance, variance
