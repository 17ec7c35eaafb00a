"""Intervals of operations that are not affine, with the error of float32."""

from collections.abc import Callable

import torch
from torch import Tensor

from sj_robust.core.broadcast import along
from sj_robust.proofs.rounding import SMALLEST, gamma, within_float32
from sj_robust.proofs.spiking import Interval

__all__ = [
    "BESIDE",
    "MONOTONE",
    "VALLEYS",
    "chosen",
    "matmul",
    "monotone",
    "normalised",
    "product",
    "softmax",
    "steps",
    "valley",
]

Function = Callable[[Tensor], Tensor]

_TERMS = 16
"""Roundings that cover one evaluation of a function in float32; libraries promise two or three."""

MONOTONE = ["relu", "relu6", "hardtanh", "clamp", "clip", "clamp_min", "clamp_max"]
MONOTONE += ["leaky_relu", "sigmoid", "tanh", "exp", "elu", "softplus"]
"""Functions of one value that never fall."""

BESIDE = {"sigmoid": 1.0, "elu": 1.0, "softplus": 1.0}
"""Size of what float32 adds to the value, and rounds with it."""

_EXACT = ["relu", "relu6", "hardtanh", "clamp", "clip", "clamp_min", "clamp_max", "abs"]
"""Functions that round nothing."""

VALLEYS = {
    "abs": 0.0,
    "square": 0.0,
    "silu": -1.2784645427610738,
    "gelu": -0.7517915246935645,
}
"""Functions that fall up to a point and rise behind it, with the point."""


def monotone(x: Interval, function: Function, name: str, *, rounded: bool) -> Interval:
    """Of a function that never falls: its values at both ends.

    Args:
        x: The values that it is called with.
        function: The function.
        name: Its name, as in :data:`MONOTONE`.
        rounded: Whether to add what float32 rounds.

    Examples:
        >>> x = Interval(torch.tensor([-1.0]), torch.tensor([2.0]))
        >>> found = monotone(x, torch.relu, "relu", rounded=True)
        >>> float(found.low), float(found.high)
        (0.0, 2.0)
    """
    found = x.each(function)
    return found if not rounded else found.widened(_function_rounding(found, name))


def valley(x: Interval, function: Function, name: str, *, rounded: bool) -> Interval:
    """Of a function of :data:`VALLEYS`: its lowest point if that is inside, and the higher end."""
    lowest = torch.full_like(x.low, VALLEYS[name])
    inside = torch.minimum(torch.maximum(lowest, x.low), x.high)
    ends = x.each(function)
    found = Interval(function(inside), torch.maximum(ends.low, ends.high))
    if not rounded:
        return found
    error = _function_rounding(found, name)
    return found.widened(within_float32(error + gamma(_TERMS) * x.size()))


def _function_rounding(found: Interval, name: str) -> Tensor:
    """How far float32's value of a function can be from the exact one."""
    if name in _EXACT:
        return torch.zeros_like(found.low)
    size = found.size() + BESIDE.get(name, 0.0)
    return within_float32(gamma(_TERMS) * size + _TERMS * SMALLEST)


def product(a: Interval, b: Interval, *, rounded: bool) -> Interval:
    """Of products of two values: the smallest and the largest of the four corners.

    Examples:
        >>> a = Interval(torch.tensor([-1.0]), torch.tensor([2.0]))
        >>> b = Interval(torch.tensor([-3.0]), torch.tensor([1.0]))
        >>> found = product(a, b, rounded=False)
        >>> float(found.low), float(found.high)
        (-6.0, 3.0)
    """
    lowest = a.low * b.low
    highest = a.high * b.high
    if _not_negative(a) and _not_negative(b):
        found = Interval(lowest, highest)
    else:
        crossed = [a.low * b.high, a.high * b.low]
        corners = torch.stack([lowest, *crossed, highest])
        found = Interval(corners.amin(0), corners.amax(0))
    if not rounded:
        return found
    error = gamma(2) * found.size() + SMALLEST
    return found.widened(within_float32(error))


def matmul(a: Interval, b: Interval, *, rounded: bool) -> Interval:
    """Of matrix products [*, n, k] @ [*, k, m].

    Equation: of values >= 0, such as spikes, the products of the ends; otherwise, with centres c
    and radii r (Rump, 1999)::

        c_a c_b -+ (|c_a| r_b + r_a |c_b| + r_a r_b)
    """
    if _not_negative(a) and _not_negative(b):
        found = Interval(a.low @ b.low, a.high @ b.high)
    else:
        centre_a = (a.high + a.low) / 2
        centre_b = (b.high + b.low) / 2
        radius_a = (a.high - a.low) / 2
        radius_b = (b.high - b.low) / 2
        largest_a = centre_a.abs() + radius_a
        spread = largest_a @ radius_b + radius_a @ centre_b.abs()
        centre = centre_a @ centre_b
        found = Interval(centre - spread, centre + spread)
    if not rounded:
        return found
    terms = a.low.shape[-1] + 2
    size = a.size() @ b.size()
    error = gamma(terms) * size + terms * SMALLEST
    return found.widened(within_float32(error))


def chosen(where: Interval, a: Interval, b: Interval) -> Interval:
    """Of ``a`` where the first value is 1, and of ``b`` where it is 0."""
    lower = torch.minimum(a.low, b.low)
    higher = torch.maximum(a.high, b.high)
    sure = where.low > 0.5
    never = where.high < 0.5
    low_unless_sure = torch.where(never, b.low, lower)
    high_unless_sure = torch.where(never, b.high, higher)
    low = torch.where(sure, a.low, low_unless_sure)
    high = torch.where(sure, a.high, high_unless_sure)
    return Interval(low, high)


def softmax(x: Interval, dim: int, *, rounded: bool) -> Interval:
    """Of a softmax: a value is largest if it is as high and all others as low as they can be.

    Equation::

        e^u_i / (e^u_i + sum_{j != i} e^l_j)   and   e^l_i / (e^l_i + sum_{j != i} e^u_j)

    Examples:
        >>> x = Interval(torch.zeros(2).double(), torch.tensor([0.0, 1.0]).double())
        >>> found = softmax(x, 0, rounded=False)
        >>> [round(value, 3) for value in (*found.low.tolist(), *found.high.tolist())]
        [0.269, 0.5, 0.5, 0.731]
    """
    largest = x.high.amax(dim, keepdim=True)
    powers = x.each(lambda end: (end - largest).exp())
    others = powers.each(lambda end: _sum_of_others(end, dim))
    low = powers.low / (powers.low + others.high)
    high = powers.high / (powers.high + others.low)
    found = Interval(low.nan_to_num(0.0), high.nan_to_num(1.0))
    if not rounded:
        return found
    terms = x.low.shape[dim] + 128  # differences up to 104 are rounded in the exponent
    error = gamma(terms) * found.size() + terms * SMALLEST
    return found.widened(error)


def _sum_of_others(x: Tensor, dim: int) -> Tensor:
    """For each value the sum of the others, without a difference that would round."""
    before = x.cumsum(dim).roll(1, dim)
    reversed_sums = x.flip(dim).cumsum(dim)
    after = reversed_sums.roll(1, dim).flip(dim)
    number = torch.arange(x.shape[dim], device=x.device)
    is_first = along(number == 0, dim % x.ndim, x.ndim)
    last = len(number) - 1
    is_last = along(number == last, dim % x.ndim, x.ndim)
    return before.masked_fill(is_first, 0.0) + after.masked_fill(is_last, 0.0)


def normalised(
    x: Interval, deviation: Interval, eps: float, factor: Tensor, shift: Tensor, *, rounded: bool
) -> Interval:
    """Of ``d / sqrt(mean(d**2) + eps) * factor + shift`` for deviations d of groups [*, n] from
    their means.

    Equation: with R the sum of squares of the others, the value ``d / sqrt((d**2 + R) / n + eps)``
    rises with d, and moves towards zero as R grows. It is never above sqrt(n - 1).

    Args:
        x: The values, [*, n].
        deviation: Their differences from the mean of the group.
        eps: What stands beside the variance, > 0.
        factor: Of the result, broadcast.
        shift: Of the result, broadcast.
        rounded: Whether to add what float32 rounds.
    """
    n = x.low.shape[-1]
    nearest_to_zero = torch.zeros_like(x.low).clamp(deviation.low, deviation.high)
    squares = Interval(nearest_to_zero.square(), deviation.size().square())
    others = squares.each(lambda end: _sum_of_others(end, -1))
    spread = torch.zeros_like(others.low)
    if rounded:  # of the variance, also as a difference of mean squares
        sum_of_squares = x.size().square().sum(-1, keepdim=True)
        spread = 4.0 * gamma(2 * n + _TERMS) * sum_of_squares
    fewest = (others.low - spread).clamp(min=0.0)
    most = others.high + spread

    def value(d: Tensor, towards_zero: Tensor) -> Tensor:
        rest = torch.where(towards_zero, most, fewest)
        mean_square = (d.square() + rest) / n
        variance = (mean_square + eps).clamp(min=eps)
        return d / variance.sqrt()

    low = value(deviation.low, deviation.low > 0)
    high = value(deviation.high, deviation.high < 0)
    exact = Interval(factor, factor)
    scaled = product(Interval(low, high), exact, rounded=False)
    found = scaled.each(lambda end: end + shift)
    if not rounded:
        return found
    size = x.size()
    largest = size + size.mean(-1, keepdim=True)
    smallest_variance = (fewest / n).clamp(min=0.0)
    largest_inverse = (smallest_variance + eps).rsqrt()
    largest_value = largest * largest_inverse * factor.abs() + shift.abs()
    error = gamma(n + 2 * _TERMS) * largest_value + SMALLEST
    return found.widened(within_float32(error))


def _not_negative(x: Interval) -> bool:
    """Whether no value can be below 0."""
    return bool((x.low >= 0).all())


def steps(x: Interval) -> Interval:
    """Of a step, 1 where the value is >= 0."""
    return x.each(lambda end: (end >= 0).to(end.dtype))
