"""Projection onto the intersection of a ball and the box [0, 1]."""

from typing import Literal

import torch
from torch import Tensor

from sj_robust.core.broadcast import along

__all__ = ["linf_bounds", "project_l2"]

Norm = Literal["Linf", "L2"]

_SAME_SIZE_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def linf_bounds(x: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """Smallest and largest image within ``eps`` of ``x`` and within [0, 1].

    Equation: ``lower = max(x - eps, 0)``, ``upper = min(x + eps, 1)``, rounded towards ``x``:
    measured in float64 or in the dtype of ``x``, no element is farther away than ``eps``, without
    any tolerance. (Rounding to the nearest would leave the ball by half a unit in the last place.)

    Args:
        x: Images [N, ...] in [0, 1], any floating dtype.
        eps: Radius, >= 0.

    Returns:
        ``lower`` and ``upper``, each in shape, dtype and device of ``x``.

    Source: Linf ball of Ding et al. (ICML 2024), section 5.

    Examples:
        >>> linf_bounds(torch.tensor([[0.125, 0.5]]), eps=0.25)
        (tensor([[0.0000, 0.2500]]), tensor([[0.3750, 0.7500]]))
    """
    radius = _round_down(eps, x.dtype)
    exact = x.double()
    lowest = (exact - radius).clamp(min=0)
    highest = (exact + radius).clamp(max=1)
    lower = _round_towards(x, lowest, limit=radius)
    upper = _round_towards(x, highest, limit=radius)
    return lower, upper


def project_l2(x_adv: Tensor, x: Tensor, *, eps: float) -> Tensor:
    """Image within L2 distance ``eps`` of ``x`` per sample and within [0, 1].

    Equation: ``clamp(x + d * min(1, eps / ||d||), 0, 1)`` with ``d = x_adv - x``. The clamp brings
    every element closer to ``x``, so that the result is within both bounds. It is rounded towards
    ``x``: measured in float64 the distance is at most ``eps * (1 + 1e-12)``.

    Args:
        x_adv: Images to project, in shape and dtype of ``x``.
        x: Centres [N, ...] in [0, 1].
        eps: Radius, >= 0.

    Source: Madry et al. (ICLR 2018), projected gradient descent, for the L2 ball.

    Examples:
        >>> project_l2(torch.tensor([[0.5, 1.5]]), torch.tensor([[0.5, 0.5]]), eps=0.25)
        tensor([[0.5000, 0.7500]])
    """
    centre = x.double()
    delta = x_adv.double() - centre
    length = per_sample(l2_norm(delta), delta)
    length = length.clamp(min=eps if eps > 0 else 1.0)  # shorter ones keep their length
    delta = delta * (eps / length)
    target = (centre + delta).clamp(0, 1)
    return _round_towards(x, target, limit=delta.abs())


def l2_norm(x: Tensor) -> Tensor:
    """L2 norm of every sample, [N], in float64: squares of float32 neither underflow nor overflow
    there.
    """
    flat = x.double().flatten(1)
    norm: Tensor = torch.linalg.vector_norm(flat, dim=1)
    return norm


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """One value per sample, [N], in a shape that broadcasts over ``x`` [N, ...]."""
    return along(values, 0, x.ndim)


def wide(x: Tensor) -> Tensor:
    """Images in float64 if they are in it, else in float32, so that a search does not compute in
    half precision.
    """
    return x if x.dtype == torch.float64 else x.float()


def direction(grad: Tensor, norm: Norm) -> Tensor:
    """Steepest ascent of unit length per sample; 0 for a zero gradient."""
    if norm == "Linf":
        return grad.sign()
    length = per_sample(l2_norm(grad), grad)
    length = torch.where(length > 0, length, 1.0)
    unit = grad.double() / length
    return unit.to(grad.dtype)


def _round_towards(x: Tensor, target: Tensor, *, limit: Tensor | float) -> Tensor:
    """Float64 ``target`` in the dtype of ``x``; where rounding took it farther from ``x`` than
    ``limit``, the neighbouring number that is closer to ``x``.
    """
    rounded = target.to(x.dtype)
    back = x.double() - rounded.double()
    too_far = back.abs() > limit
    # The bits of a number >= 0, read as an integer, plus 1 are those of the next larger number of
    # its dtype, and minus 1 those of the next smaller one.
    integer = _SAME_SIZE_INTEGER[x.element_size()]
    bits = rounded.view(integer)
    towards_x = back.sign().to(integer)
    bits = torch.where(too_far, bits + towards_x, bits)
    return bits.view(x.dtype)


def _round_down(eps: float, dtype: torch.dtype) -> float:
    """Largest number of ``dtype`` that is not above ``eps``."""
    nearest = torch.tensor(eps, dtype=dtype)
    if float(nearest) > eps:
        nearest = torch.nextafter(nearest, torch.zeros_like(nearest))
    return float(nearest)
