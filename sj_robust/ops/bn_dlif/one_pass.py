"""Calls the kernels of batch norm, DLIF and pooling in one pass.

Forward reads the input twice in training (statistics, then the pass itself) and once otherwise;
neither the normalised tensor nor, with pooling, the spikes ever exist.
"""

from torch import Tensor

from sj_robust.ops.bn_dlif import cpp, triton_launch
from sj_robust.ops.bn_dlif.layer import (
    Kernels,
    Layer,
    NormTensors,
    StageConfig,
    StageGradients,
    StageOutputGradients,
    StageOutputs,
    memory_format,
)
from sj_robust.ops.bn_dlif.norm import BatchNorm
from sj_robust.ops.dlif.config import Inputs, state_dtype
from sj_robust.ops.registration import differentiates_by_functorch
from sj_robust.ops.surrogate import Surrogate

__all__ = ["KERNELS", "backward", "forward", "unsupported_reason"]

KERNELS: dict[str, Kernels] = {"cpp": cpp, "triton": triton_launch}
"""Backends that run a call in one pass."""


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


def forward(
    inputs: Inputs,
    norm: NormTensors,
    stage: StageConfig,
    *,
    store_v_seq: bool,
    store_current: bool,
) -> tuple[StageOutputs, Tensor | None]:
    """Outputs and moments of T steps, or of one that stands for all of them."""
    kernels = KERNELS[stage.backend]
    x = inputs.x_seq
    T = len(inputs.input_gain)
    layer = Layer(_over_time(inputs), stage.planes(x))
    if stage.statistics is not None:
        moments = kernels.moments(layer, norm, stage.eps)
        layer = Layer(layer.inputs, layer.planes, moments)
    outputs = stage.room_for_outputs(x, T, store_v_seq=store_v_seq, store_current=store_current)
    kernels.forward(layer, outputs)
    return outputs, layer.moments


def backward(
    inputs: Inputs,
    moments: Tensor | None,
    stage: StageConfig,
    grads: StageOutputGradients,
    *,
    needs_x: bool,
    needs_v_init: bool,
) -> tuple[StageGradients, Tensor | None]:
    """Gradients of x, gain and first potential; those of weight and bias [2, C] in float64."""
    kernels = KERNELS[stage.backend]
    x = inputs.x_seq
    T = len(inputs.input_gain)
    layer = Layer(_over_time(inputs), stage.planes(x), moments)
    found = stage.room_for_gradients(x, T, needs_x=needs_x, needs_v_init=needs_v_init)
    if moments is None:
        kernels.backward(layer, grads, found)
        return found, None
    # the gradient of one step that stands for all is the sum over time, in the dtype of potentials
    is_once = len(x) < T
    total = stage.steps(x, 1, state_dtype(x)) if is_once and needs_x else None
    # mean and variance of a batch depend on x, so its gradient needs the sums first
    of_batch = stage.statistics == "batch"
    sums = moments.new_empty(2, layer.planes.channels)
    first = found._replace(
        x=None if of_batch or is_once else found.x, x_total=total, channel_sums=sums
    )
    kernels.backward(layer, grads, first)
    count = layer.inputs.x_seq.numel() // layer.planes.channels if of_batch else None
    grad_norm, slopes = kernels.finish(sums, moments, stage.eps, count)
    if total is not None:
        if slopes is not None:
            _add_slopes(total, x, T, moments, slopes)
        return found._replace(x=total.to(x.dtype)), grad_norm
    if slopes is not None and found.x is not None:
        kernels.backward(layer, grads, StageGradients(x=found.x), slopes)
    return found, grad_norm


def _add_slopes(total: Tensor, x: Tensor, T: int, moments: Tensor, slopes: Tensor) -> None:
    """Add the share of mean and variance, which is the same at every step."""
    mean = moments[0].to(total.dtype)
    slope, constant = slopes.to(total.dtype)
    shape = -1, *[1] * (x.ndim - 3)
    slope_of_all = (T * slope).view(shape)
    constant_of_all = (T * (constant - slope * mean)).view(shape)
    total.addcmul_(x, slope_of_all).add_(constant_of_all)


def _over_time(inputs: Inputs) -> Inputs:
    """With one step repeated without a copy, where it stands for all."""
    x, T = inputs.x_seq, len(inputs.input_gain)
    if len(x) == T:
        return inputs
    return inputs._replace(x_seq=x.expand(T, *x.shape[1:]))
