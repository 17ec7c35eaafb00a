"""Bounds on how far a perturbation of the spikes can move the membrane potential, and what they do not cover."""

from sj_robust.stability.gain import l2_gain, l2_gain_limit, neuron_gains, peak_gain, printed_gain, time_operator

__all__ = ["l2_gain", "l2_gain_limit", "neuron_gains", "peak_gain", "printed_gain", "time_operator"]
