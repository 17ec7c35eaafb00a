"""DLIF forward and back-propagation through time in float64 numpy, derived by hand and independent of the package."""

from dataclasses import dataclass

import numpy as np


@dataclass
class Result:
    h: np.ndarray
    spikes: np.ndarray
    potentials: np.ndarray
    grad_x: np.ndarray
    grad_gain: np.ndarray
    grad_v_init: np.ndarray


def surrogate_derivative(kind: str, alpha: float, z: np.ndarray) -> np.ndarray:
    if kind == "triangle":
        return np.maximum(0.0, alpha - alpha**2 * np.abs(z))
    if kind == "atan":
        return (alpha / 2) / (1 + (np.pi / 2 * alpha * z) ** 2)
    if kind == "sigmoid":
        s = 1 / (1 + np.exp(-alpha * z))
        return alpha * s * (1 - s)
    raise ValueError(kind)


def dlif_bptt(
    x: np.ndarray,
    gain: np.ndarray,
    v_init: np.ndarray,
    *,
    decay: float,
    v_threshold: float,
    v_reset: float | None,
    kind: str,
    alpha: float,
    detach_reset: bool,
    grad_spikes: np.ndarray,
    grad_v: np.ndarray,
    grad_potentials: np.ndarray,
) -> Result:
    """x [T, ...], gain [T], v_init [...]; grad_v belongs to the last potential, grad_potentials to all of them."""
    T = x.shape[0]
    h, spikes, potentials = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    before = v_init
    for t in range(T):
        h[t] = decay * before + gain[t] * x[t]
        if v_reset is not None:
            h[t] += (1 - decay) * v_reset
        spikes[t] = h[t] >= v_threshold
        if v_reset is None:
            potentials[t] = h[t] - v_threshold * spikes[t]
        else:
            potentials[t] = np.where(spikes[t] == 1, v_reset, h[t])
        before = potentials[t]

    grad_x, grad_gain = np.zeros_like(x), np.zeros(T)
    carry = grad_v.copy()
    for t in reversed(range(T)):
        after_reset = carry + grad_potentials[t]
        derivative = surrogate_derivative(kind, alpha, h[t] - v_threshold)
        reset_by_spike = 0.0
        if not detach_reset:
            reset_by_spike = -v_threshold if v_reset is None else v_reset - h[t]
        kept = 1.0 if v_reset is None else 1 - spikes[t]
        grad_h = grad_spikes[t] * derivative + after_reset * (kept + reset_by_spike * derivative)
        grad_x[t] = grad_h * gain[t]
        grad_gain[t] = (grad_h * x[t]).sum()
        carry = grad_h * decay
    return Result(h, spikes, potentials, grad_x, grad_gain, carry)


def away_from_threshold(h: np.ndarray, v_threshold: float, margin: float) -> np.ndarray:
    """Where |h - threshold| > margin at this step and at every earlier one, so that no rounding can flip a spike."""
    return np.logical_and.accumulate(np.abs(h - v_threshold) > margin, axis=0)
