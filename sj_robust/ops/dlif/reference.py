"""The reference of DLIF, one time step after the other: the definition of correct results."""

import torch
from torch import Tensor

from sj_robust.ops.dlif.config import Inputs, initial_potential, state_dtype
from sj_robust.ops.recurrence import charge, fire, reset

__all__ = ["multi_step"]


def multi_step(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Charge, fire and reset for every step; differentiable by autograd alone, any surrogate.

    Equation: that of :mod:`sj_robust.ops.recurrence` with ``input_gain[t]``, for t = 0 .. T-1.

    Returns:
        Spikes [T, *], last potential [*], potential after every reset [T, *].

    Source: Ding et al. (ICML 2024), equations of the DLIF neuron.
    """
    x_seq, input_gain, v_init, config = inputs
    dtype = state_dtype(x_seq)
    v_reset = config.v_reset
    v = initial_potential(x_seq, config) if v_init is None else v_init
    spike_seq = []
    v_seq = []
    for x, gain in zip(x_seq.unbind(0), input_gain.unbind(0), strict=True):
        h = charge(v, x.to(dtype), decay=config.decay, gain=gain, v_reset=v_reset)
        spike = fire(h, config.v_threshold, config.surrogate.spike)
        reset_spike = spike.detach() if config.detach_reset else spike
        v = reset(h, reset_spike, v_threshold=config.v_threshold, v_reset=v_reset)
        spike_seq.append(spike.to(x_seq.dtype))
        v_seq.append(v)
    return torch.stack(spike_seq), v, torch.stack(v_seq)
