"""DLIF as written in the paper, one time step after the other: the definition of correct."""

import torch
from torch import Tensor

from sj_robust.ops.dlif.config import Inputs, initial_potential, state_dtype

__all__ = ["multi_step"]


def multi_step(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Charge, fire and reset for every step; differentiable by autograd alone, any surrogate.

    Equation, for t = 0 .. T-1::

        h[t] = decay * v[t-1] + input_gain[t] * x[t]   (+ (1 - decay) * v_reset for a hard reset)
        s[t] = spike(h[t] - v_threshold)
        v[t] = (1 - s[t]) * h[t] + s[t] * v_reset      hard reset
        v[t] = h[t] - s[t] * v_threshold               soft reset (v_reset None)

    Returns:
        Spikes [T, *], last potential [*], potential after every reset [T, *].

    Source: Ding et al. (ICML 2024), equations of the DLIF neuron.
    """
    x_seq, input_gain, v_init, config = inputs
    dtype = state_dtype(x_seq)
    v = initial_potential(x_seq, config) if v_init is None else v_init
    spike_seq, v_seq = [], []
    for x, gain in zip(x_seq.unbind(0), input_gain.unbind(0), strict=True):
        h = v * config.decay + x.to(dtype) * gain
        if config.leak_current:
            h = h + config.leak_current
        spike = config.surrogate.spike(h - config.v_threshold)
        reset_spike = spike.detach() if config.detach_reset else spike
        if config.v_reset is None:
            v = h - reset_spike * config.v_threshold
        else:
            v = (1 - reset_spike) * h + reset_spike * config.v_reset
        spike_seq.append(spike.to(x_seq.dtype))
        v_seq.append(v)
    return torch.stack(spike_seq), v, torch.stack(v_seq)
