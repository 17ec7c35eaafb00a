"""The reference of batch norm and pooling around DLIF: the definition of correct results."""

from torch import Tensor
from torch.nn import functional as F

from sj_robust.ops.bn_dlif.config import BatchNorm

__all__ = ["normalise", "pool"]


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
