"""Rounding errors of float32, for sums in any order."""

from typing import Any

from torch import Tensor

__all__ = [
    "SLACK",
    "SMALLEST",
    "NoBoundsError",
    "charge_rounding",
    "gamma",
    "reset_rounding",
    "threshold_rounding",
    "within_float32",
]

_UNIT = 2.0**-24
"""Largest relative error of one rounding to nearest in float32."""

SMALLEST = 2.0**-126
"""Below it float32 may flush to zero: the error that one operation can add whatever its values
are.
"""

_LARGEST_ERROR = 2.0**76
"""No more is rounded off a sum whose terms are below 2**100, far from float32's largest number of
2**128.
"""

SLACK = 1.000001
"""Covers float64's own rounding, which is smaller than float32's by 2**29."""


class NoBoundsError(NotImplementedError):
    """An operation of the network of which no bounds are known. 无法给出上下界的运算。"""


def gamma(terms: int) -> float:
    """Relative error of a float32 sum of so many products, in any order."""
    return SLACK * terms * _UNIT / (1.0 - terms * _UNIT)


def charge_rounding(size: Any) -> Any:
    """How far float32's charged potential can be from the exact one, for terms that sum up to
    ``size`` in absolute value.
    """
    return gamma(16) * size + 16 * SMALLEST


def threshold_rounding(threshold: float) -> float:
    """How far float32's threshold can be from the exact one."""
    return _UNIT * abs(threshold)


def reset_rounding(size: Any, rest: float, threshold: float) -> Any:
    """How far float32's potential after the reset can be from the exact one, for potentials up to
    ``size``.
    """
    return gamma(4) * (size + abs(rest) + abs(threshold)) + 4 * SMALLEST


def within_float32(error: Tensor) -> Tensor:
    """An error that is at least 2**-24 of all that was summed, if that is finite in float32."""
    if error.numel() and not float(error.amax()) <= _LARGEST_ERROR:
        raise NoBoundsError("values that are not finite, or may be beyond 1e30")
    return error
