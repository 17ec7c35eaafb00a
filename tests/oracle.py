"""DLIF forward and back-propagation through time in float64 numpy, derived by hand and independent
of the package.
"""

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


DERIVATIVES = {
    "triangle": lambda alpha, z: np.maximum(0.0, alpha - alpha**2 * np.abs(z)),
    "atan": lambda alpha, z: (alpha / 2) / (1 + (np.pi / 2 * alpha * z) ** 2),
    "sigmoid": lambda alpha, z: alpha / (2 + 2 * np.cosh(alpha * z)),
    "rectangle": lambda alpha, z: np.where(np.abs(z) <= 1 / alpha, alpha / 2, 0.0),
    "exponential": lambda alpha, z: alpha / 2 * np.exp(-alpha * np.abs(z)),
    "gaussian": lambda alpha, z: alpha * np.exp(-((alpha * z) ** 2) / 2) / np.sqrt(2 * np.pi),
    "soft_sign": lambda alpha, z: 1 / (2 * alpha * (1 / alpha + np.abs(z)) ** 2),
    "super_spike": lambda alpha, z: alpha / (1 + np.abs(z)) ** 2,
    "erf": lambda alpha, z: alpha / np.sqrt(np.pi) * np.exp(-((alpha * z) ** 2)),
    "straight_through": lambda alpha, z: np.ones_like(z),
}


def surrogate_derivative(kind: str, alpha: float, z: np.ndarray) -> np.ndarray:
    return DERIVATIVES[kind](alpha, z)


def dlif_forward(
    x: np.ndarray,
    gain: np.ndarray,
    v_init: np.ndarray,
    *,
    decay: float,
    v_threshold: float,
    v_reset: float | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """h, spikes and potentials after the reset [T, ...]."""
    h = np.zeros_like(x)
    spikes = np.zeros_like(x)
    potentials = np.zeros_like(x)
    before = v_init
    for t in range(len(x)):
        h[t] = decay * before + gain[t] * x[t]
        if v_reset is not None:
            h[t] += (1 - decay) * v_reset
        spikes[t] = h[t] >= v_threshold
        if v_reset is None:
            potentials[t] = h[t] - v_threshold * spikes[t]
        else:
            potentials[t] = np.where(spikes[t] == 1, v_reset, h[t])
        before = potentials[t]
    return h, spikes, potentials


def dlif_backward(
    h: np.ndarray,
    spikes: np.ndarray,
    slopes: np.ndarray,
    *,
    decay: float,
    v_threshold: float,
    v_reset: float | None,
    detach_reset: bool,
    grad_spikes: np.ndarray,
    grad_v: np.ndarray | float = 0.0,
    grad_potentials: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of h [T, ...] and of the first potential; ``slopes`` are the surrogate's."""
    grad_h = np.zeros_like(h)
    carry = grad_v
    for t in reversed(range(len(h))):
        after_reset = carry if grad_potentials is None else carry + grad_potentials[t]
        reset_by_spike = 0.0
        if not detach_reset:
            reset_by_spike = -v_threshold if v_reset is None else v_reset - h[t]
        kept = 1.0 if v_reset is None else 1 - spikes[t]
        grad_h[t] = grad_spikes[t] * slopes[t] + after_reset * (kept + reset_by_spike * slopes[t])
        carry = grad_h[t] * decay
    return grad_h, carry


def dlif_bptt(
    x: np.ndarray,
    gain: np.ndarray,
    v_init: np.ndarray,
    *,
    kind: str,
    alpha: float,
    detach_reset: bool,
    grad_spikes: np.ndarray,
    grad_v: np.ndarray,
    grad_potentials: np.ndarray,
    **dynamics: float | None,
) -> Result:
    """x [T, ...], gain [T], v_init [...]; grad_v belongs to the last potential, grad_potentials to
    all of them.
    """
    h, spikes, potentials = dlif_forward(x, gain, v_init, **dynamics)
    slopes = surrogate_derivative(kind, alpha, h - dynamics["v_threshold"])
    grads = {"grad_spikes": grad_spikes, "grad_v": grad_v, "grad_potentials": grad_potentials}
    grad_h, grad_v_init = dlif_backward(
        h, spikes, slopes, detach_reset=detach_reset, **grads, **dynamics
    )
    grad_x = grad_h * gain.reshape(-1, *(1 for _ in v_init.shape))
    return Result(
        h, spikes, potentials, grad_x, (grad_h * x).reshape(len(x), -1).sum(1), grad_v_init
    )


def away_from_threshold(h: np.ndarray, v_threshold: float, margin: float) -> np.ndarray:
    """Where |h - threshold| > margin at this step and at every earlier one, so that no rounding can
    flip a spike.
    """
    return np.logical_and.accumulate(np.abs(h - v_threshold) > margin, axis=0)
