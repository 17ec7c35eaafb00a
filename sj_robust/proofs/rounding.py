"""Rounding errors of float32, for sums in any order, and what is no more than float64's."""

from typing import Any

from torch import Tensor

__all__ = [
    "FLOAT64_GAP",
    "LEAST_SHARE",
    "SLACK",
    "SMALLEST",
    "NoBoundsError",
    "charge_rounding",
    "gamma",
    "is_rounding",
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


LEAST_SHARE = 1e-3
"""Share of the largest element that the size of any other one is taken for, where sizes are only
guessed: sums of many terms may cancel.
"""

FLOAT64_GAP = 1e-9
"""Relative difference that float64's rounding stays below; a part that is missing does not."""


class NoBoundsError(NotImplementedError):
    """An operation of the network of which no bounds are known. 无法给出上下界的运算。"""

    where = ""
    """Name of the module in or behind which it stands, if that is known."""


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


def is_rounding(gap: Tensor, size: Tensor) -> bool:
    """Whether differences of float64 runs are no more than rounding, each for its own element.
    是否只是舍入误差。

    A part that is missing, or another map, makes more. A tolerance for all elements together would
    hide a small logit beside one that a mask moves by 1e9.

    Args:
        gap: The differences.
        size: Sums of absolute values that rounding is relative to, broadcast.

    Examples:
        >>> import torch
        >>> is_rounding(torch.tensor([1e-12, 1.0]), torch.tensor([1.0, 1e10]))
        True
        >>> is_rounding(torch.tensor([0.1, 0.0]), torch.tensor([1.0, 1e10]))
        False
    """
    return bool((gap.abs() <= FLOAT64_GAP * size).all())  # NaN is none
