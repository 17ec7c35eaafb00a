"""Batch norm as torch computes it, then DLIF as written in the paper: the definition of correct."""

from torch import Tensor
from torch.nn import functional as F

from sj_robust.ops.bn_dlif.norm import BatchNorm
from sj_robust.ops.dlif import reference
from sj_robust.ops.dlif.config import Inputs

__all__ = ["multi_step", "normalise"]


def multi_step(inputs: Inputs, norm: BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise over all time steps and samples, then run the neurons; differentiable by autograd alone.

    Args:
        inputs: What the neurons take, their currents being the input of batch norm, [T, N, C, *].
        norm: The batch norm; running statistics are updated as ``torch.nn.functional.batch_norm`` does.

    Returns:
        Spikes [T, N, C, *], last potential [N, C, *], potential after every reset [T, N, C, *].

    Source: Ioffe & Szegedy (2015) for batch norm; Ding et al. (ICML 2024) for DLIF.
    """
    return reference.multi_step(inputs._replace(x_seq=normalise(inputs.x_seq, norm)))


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
