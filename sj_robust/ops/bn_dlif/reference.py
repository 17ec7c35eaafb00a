"""The reference of batch norm, DLIF and pooling: the definition of correct results."""

from torch import Tensor
from torch.nn import functional as F

from sj_robust.ops.bn_dlif.config import BatchNorm
from sj_robust.ops.dlif import reference
from sj_robust.ops.dlif.config import Inputs

__all__ = ["multi_step", "normalise", "pool"]


def multi_step(
    inputs: Inputs, norm: BatchNorm | None, average_pool: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise over all time steps and samples, run the neurons, pool; differentiable by autograd
    alone.

    Args:
        inputs: What the neurons take, their currents being the input of batch norm, [T, N, C, *].
        norm: The batch norm, or None for none; running statistics are updated as
            ``torch.nn.functional.batch_norm`` does.
        average_pool: Whether the spikes [T, N, C, H, W] are averaged over 2x2 neurons; a last odd
            row or column is left out.

    Returns:
        Spikes [T, N, C, *] or their means [T, N, C, H // 2, W // 2], last potential [N, C, *],
        potential after every reset [T, N, C, *].

    Source: Ioffe & Szegedy (2015) for batch norm; Ding et al. (ICML 2024) for DLIF.
    """
    if norm is not None:
        inputs = inputs._replace(x_seq=normalise(inputs.x_seq, norm))
    spike_seq, v, v_seq = reference.multi_step(inputs)
    return pool(spike_seq) if average_pool else spike_seq, v, v_seq


def normalise(x_seq: Tensor, norm: BatchNorm) -> Tensor:
    """Batch norm over time, batch and space of [T, N, C, *]; updates the running statistics."""
    y_seq = F.batch_norm(
        x_seq.flatten(0, 1),
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        norm.use_batch_statistics,
        norm.momentum,
        norm.eps,
    )
    return y_seq.view(x_seq.shape)


def pool(spike_seq: Tensor) -> Tensor:
    """Average over 2x2 neurons of [T, N, C, H, W]."""
    pooled = F.avg_pool2d(spike_seq.flatten(0, 1), 2)
    return pooled.view(*spike_seq.shape[:2], *pooled.shape[1:])
