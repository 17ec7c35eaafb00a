"""Batch norm, DLIF and 2x2 average pooling in one pass: what calls the kernels, whichever they are.

Forward reads the input twice in training (statistics, then the pass itself) and once otherwise;
neither the normalised tensor nor, with pooling, the spikes ever exist.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sj_robust.ops.bn_dlif import cpp, triton_launch
from sj_robust.ops.bn_dlif.layer import Kernels, Layer, StageConfig, dense, memory_format
from sj_robust.ops.bn_dlif.norm import BatchNorm
from sj_robust.ops.dlif.config import state_dtype
from sj_robust.ops.registration import differentiates_by_functorch
from sj_robust.ops.surrogate import Surrogate

__all__ = [
    "KERNELS",
    "StageGradients",
    "StageOutputs",
    "backward",
    "forward",
    "room_for_gradients",
    "room_for_outputs",
    "unsupported_reason",
]

KERNELS: dict[str, Kernels] = {"cpp": cpp, "triton": triton_launch}
"""Backends that run a call in one pass."""


class StageOutputs(NamedTuple):
    """Spikes or their means, last potential, potentials and currents if asked for; moments as in
    :class:`Layer`.
    """

    spike_seq: Tensor
    v: Tensor
    v_seq: Tensor | None
    current: Tensor | None
    moments: Tensor | None


class StageGradients(NamedTuple):
    """Gradients of x, of weight and bias together [2, C] in float64, of the gain and of the first
    potential.
    """

    x: Tensor | None
    norm: Tensor | None
    input_gain: Tensor
    v_init: Tensor | None


def unsupported_reason(
    backend: str,
    x_seq: Tensor,
    norm: BatchNorm | None,
    surrogate: Surrogate,
    average_pool: bool = False,
) -> str | None:
    """Why this call cannot run in one pass of a backend, or None."""
    if x_seq.numel() == 0:
        return "x_seq is empty"
    reason = KERNELS[backend].unsupported_reason(x_seq, surrogate)
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


def room_for_outputs(
    x: Tensor,
    T: int,
    stage: StageConfig,
    moments: Tensor | None,
    *,
    store_v_seq: bool,
    store_current: bool,
) -> StageOutputs:
    """Outputs of T steps like those of ``x``, to be filled."""
    dtype = state_dtype(x)
    return StageOutputs(
        spike_seq=stage.steps(x, T, x.dtype, pooled=stage.average_pool),
        v=stage.step(x, dtype),
        v_seq=stage.steps(x, T, dtype) if store_v_seq else None,
        current=stage.steps(x, T, dtype) if store_current else None,
        moments=moments,
    )


def forward(
    x: Tensor,
    input_gain: Tensor,
    v_init: Tensor | None,
    stage: StageConfig,
    *,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    store_v_seq: bool,
    store_current: bool,
) -> StageOutputs:
    """Run the kernels on T steps ``x``, or on one that stands for all of them."""
    kernels, T = KERNELS[stage.backend], len(input_gain)
    layer = Layer(_over_time(x, T), stage.neuron, stage.planes(x))
    if stage.statistics is not None:
        moments = kernels.moments(
            layer,
            weight=weight,
            bias=bias,
            running_mean=running_mean,
            running_var=running_var,
            eps=stage.eps,
        )
        layer = layer._replace(moments=moments)
    outputs = room_for_outputs(
        x, T, stage, layer.moments, store_v_seq=store_v_seq, store_current=store_current
    )
    kernels.forward(
        layer,
        input_gain=input_gain,
        v_init=v_init,
        spike_seq=outputs.spike_seq,
        v_last=outputs.v,
        v_seq=outputs.v_seq,
        current_seq=outputs.current,
    )
    return outputs


def room_for_gradients(
    x: Tensor, input_gain: Tensor, stage: StageConfig, *, needs_x: bool, needs_v_init: bool
) -> StageGradients:
    """Gradients to be filled, without that of the norm."""
    needs_x = needs_x or stage.statistics is None
    return StageGradients(
        x=stage.steps(x, len(x), x.dtype) if needs_x else None,
        norm=None,
        input_gain=torch.empty_like(input_gain),
        v_init=stage.step(x, state_dtype(x)) if needs_v_init else None,
    )


def backward(
    x: Tensor,
    input_gain: Tensor,
    v_init: Tensor | None,
    moments: Tensor | None,
    stage: StageConfig,
    *,
    grad_spike_seq: Tensor | None,
    grad_v: Tensor | None,
    grad_v_seq: Tensor | None,
    grad_current: Tensor | None,
    needs_x: bool,
    needs_v_init: bool,
) -> StageGradients:
    """Gradients of what :func:`forward` took."""
    kernels, T, layout = KERNELS[stage.backend], len(input_gain), stage.layout
    layer = Layer(_over_time(x, T), stage.neuron, stage.planes(x), moments)
    found = room_for_gradients(x, input_gain, stage, needs_x=needs_x, needs_v_init=needs_v_init)
    if grad_spike_seq is None:
        grad_spike_seq = stage.steps(x, T, x.dtype, pooled=stage.average_pool).zero_()
    given = {
        "input_gain": input_gain,
        "v_init": v_init,
        "grad_spike_seq": dense(grad_spike_seq, layout),
        "grad_v_last": None if grad_v is None else grad_v.contiguous(memory_format=layout),
        "grad_v_seq": None if grad_v_seq is None else dense(grad_v_seq, layout),
        "grad_current_seq": None if grad_current is None else dense(grad_current, layout),
    }
    of_neurons = {"grad_input_gain": found.input_gain, "grad_v_init": found.v_init}
    if moments is None:
        kernels.backward(layer, **given, **of_neurons, grad_x_seq=found.x)
        return found
    # the gradient of one step that stands for all is the sum over time, in the dtype of potentials
    total = None
    if len(x) < T and found.x is not None:
        is_state = x.dtype == state_dtype(x)
        total = found.x if is_state else stage.steps(x, 1, state_dtype(x))
    # mean and variance of a batch depend on x, so its gradient needs the sums first
    of_batch = stage.statistics == "batch"
    sums = moments.new_empty(2, layer.planes.channels)
    kernels.backward(
        layer,
        **given,
        **of_neurons,
        grad_x_seq=None if of_batch or len(x) < T else found.x,
        grad_x_total=total,
        channel_sums=sums,
    )
    count = layer.x_seq.numel() // layer.planes.channels if of_batch else None
    grad_norm, slopes = kernels.finish(sums, moments, stage.eps, count)
    if total is not None:
        if slopes is not None:
            _add_slopes(total, x, T, moments, slopes)
        return found._replace(norm=grad_norm, x=total.to(x.dtype))
    if slopes is not None and found.x is not None:
        kernels.backward(layer, slopes, **given, grad_x_seq=found.x)
    return found._replace(norm=grad_norm)


def _add_slopes(total: Tensor, x: Tensor, T: int, moments: Tensor, slopes: Tensor) -> None:
    """Add the share of mean and variance, which is the same at every step."""
    mean = moments[0].to(total.dtype)
    slope, constant = slopes.to(total.dtype)
    shape = -1, *[1] * (x.ndim - 3)
    total.addcmul_(x, (T * slope).view(shape)).add_((T * (constant - slope * mean)).view(shape))


def _over_time(x: Tensor, T: int) -> Tensor:
    """The sequence itself, or its one step repeated without a copy."""
    return x if len(x) == T else x.expand(T, *x.shape[1:])
