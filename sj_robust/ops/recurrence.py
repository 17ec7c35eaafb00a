"""One time step of a spiking neuron in plain torch, in three parts.

Equation::

    h[t] = decay * v[t-1] + gain[t] * x[t]   (+ (1 - decay) * v_reset for a hard reset)
    s[t] = 1 if h[t] >= v_threshold else 0
    v[t] = (1 - s[t]) * h[t] + s[t] * v_reset      hard reset
    v[t] = h[t] - s[t] * v_threshold               soft reset (v_reset None)

It is IF at decay 1, LIF at decay 1 - 1 / tau with gain 1 / tau or 1, and DLIF with a gain per step.
"""

from collections.abc import Callable

from torch import Tensor

__all__ = ["charge", "fire", "reset"]


def charge(
    v: Tensor | float,
    x: Tensor,
    *,
    decay: float | Tensor,
    gain: float | Tensor,
    v_reset: float | None,
) -> Tensor:
    """Potential before firing, ``decay * v + gain * x (+ (1 - decay) * v_reset)``.

    Args:
        v: Potential after the step before, [*] or one number.
        x: Input current [*].
        decay: Fraction of the potential kept.
        gain: Gain of the current.
        v_reset: Potential after a spike, to which the decay leads; None for a soft reset.
    """
    h = decay * v + gain * x
    return h + (1.0 - decay) * v_reset if v_reset else h


def fire(
    h: Tensor, v_threshold: float | Tensor, spike: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Spikes, 1 where ``h >= v_threshold`` and 0 elsewhere, in the dtype of ``h``.

    Args:
        h: Potential before firing [*].
        v_threshold: Threshold.
        spike: The step of ``h - v_threshold`` with a surrogate gradient; None has no gradient.
    """
    if spike is None:
        return (h >= v_threshold).to(h.dtype)
    return spike(h - v_threshold)


def reset(
    h: Tensor, spike: Tensor, *, v_threshold: float | Tensor, v_reset: float | None
) -> Tensor:
    """Potential after firing, ``(1 - s) * h + s * v_reset``, or ``h - s * v_threshold``.

    Args:
        h: Potential before firing [*].
        spike: Spikes [*]; detached ones leave the reset out of the gradient.
        v_threshold: Threshold.
        v_reset: Potential after a spike; None for a soft reset.
    """
    if v_reset is None:
        return h - spike * v_threshold
    return (1.0 - spike) * h + spike * v_reset
