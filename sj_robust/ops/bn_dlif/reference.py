"""Batch norm as torch computes it, then DLIF as written in the paper: the definition of correct."""

from torch import Tensor
from torch.nn import functional as F

from sj_robust.ops.bn_dlif.norm import BatchNorm
from sj_robust.ops.dlif import reference
from sj_robust.ops.dlif.config import DLIFConfig

__all__ = ["multi_step", "normalise"]


def multi_step(
    x_seq: Tensor, norm: BatchNorm, input_gain: Tensor, v_init: Tensor | None, config: DLIFConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise over all time steps and samples, then run the neurons; differentiable by autograd alone.

    Args:
        x_seq: Input, [T, N, C, *].
        norm: The batch norm; running statistics are updated as ``torch.nn.functional.batch_norm`` does.
        input_gain: Gain per step, [T].
        v_init: Potential before the first step, [N, C, *], or None for the reset potential.
        config: Constants of the neuron.

    Returns:
        Spikes [T, N, C, *], last potential [N, C, *], potential after every reset [T, N, C, *].

    Source: Ioffe & Szegedy (2015) for batch norm; Ding et al. (ICML 2024) for DLIF.
    """
    return reference.multi_step(normalise(x_seq, norm), input_gain, v_init, config)


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
