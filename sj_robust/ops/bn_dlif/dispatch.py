"""Entry point of batch norm, DLIF and pooling, which chooses the implementation."""

from torch import Tensor

from sj_robust.ops.bn_dlif import one_pass, operator, reference
from sj_robust.ops.bn_dlif.layer import StageOutputs
from sj_robust.ops.bn_dlif.norm import BatchNorm
from sj_robust.ops.dlif.backends import failing_reason
from sj_robust.ops.dlif.config import (
    DLIFConfig,
    Inputs,
    check_arguments,
    state_dtype,
)
from sj_robust.ops.dlif.dispatch import check_backend, dlif_multi_step
from sj_robust.ops.registration import in_onnx_export
from sj_robust.ops.surrogate import Surrogate

__all__ = [
    "batch_norm_dlif_multi_step",
    "check_call",
    "fused_kernels",
    "in_one_pass",
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
        backend: ``"cpp"`` is the compiled kernel and ``"triton"`` the one for CUDA; ``"auto"``
            takes the one that :func:`fused_kernels` names. Any other name of ``BACKENDS`` runs
            torch's batch norm, DLIF with that backend and torch's pooling.

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
    if backend in one_pass.KERNELS:
        kernels: str | None = check_backend(backend)
        reason = one_pass.unsupported_reason(backend, x_seq, norm, surrogate, average_pool)
        if reason is not None:
            raise ValueError(
                f"backend={backend!r} cannot run this call: {reason}; use backend='auto'"
            )
    else:
        kernels = fused_kernels(x_seq, norm, surrogate, average_pool, backend)
    if kernels is not None:
        outputs = in_one_pass(
            x_seq,
            norm,
            input_gain,
            v_init,
            config=DLIFConfig(decay, v_threshold, v_reset, surrogate, detach_reset),
            average_pool=average_pool,
            store_v_seq=store_v_seq,
            store_current=store_current,
            kernels=kernels,
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


_ON = {"cpu": "cpp", "cuda": "triton"}  # what ``"auto"`` runs in one pass


def fused_kernels(
    x_seq: Tensor,
    norm: BatchNorm | None,
    surrogate: Surrogate,
    average_pool: bool = False,
    backend: str = "auto",
) -> str | None:
    """The backend that runs this call in one pass, None for none.

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
        >>> fused_kernels(torch.zeros(2, 3, 4), norm, custom) is None
        True
    """
    name = _ON.get(x_seq.device.type) if backend == "auto" else backend
    if name is None or name not in one_pass.KERNELS:
        return None
    if in_onnx_export() or failing_reason(name) is not None:
        return None
    reason = one_pass.unsupported_reason(name, x_seq, norm, surrogate, average_pool)
    return name if reason is None else None


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
    kernels: str,
) -> StageOutputs:
    """What the backend of :func:`fused_kernels` makes of a call that was checked."""
    dtype = state_dtype(x_seq)
    v_init = None if v_init is None else v_init.to(dtype)
    return operator.multi_step(
        Inputs(x_seq, input_gain.to(dtype), v_init, config),
        norm,
        average_pool=average_pool,
        store_v_seq=store_v_seq,
        store_current=store_current,
        backend=kernels,
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
