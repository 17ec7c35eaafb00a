"""Intervals of operations that are no affine maps, and how far float32 can be from them."""

from collections.abc import Callable

import torch
from torch import Tensor

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
    if _not_negative(a) and _not_negative(b):
        found = Interval(a.low * b.low, a.high * b.high)
    else:
        corners = torch.stack([a.low * b.low, a.low * b.high, a.high * b.low, a.high * b.high])
        found = Interval(corners.amin(0), corners.amax(0))
    if not rounded:
        return found
    return found.widened(within_float32(gamma(2) * found.size() + SMALLEST))


def matmul(a: Interval, b: Interval, *, rounded: bool) -> Interval:
    """Of matrix products [*, n, k] @ [*, k, m].

    Equation: of values >= 0, such as spikes, the products of the ends; otherwise, with centres c
    and radii r (Rump, 1999)::

        c_a c_b -+ (|c_a| r_b + r_a |c_b| + r_a r_b)
    """
    if _not_negative(a) and _not_negative(b):
        found = Interval(a.low @ b.low, a.high @ b.high)
    else:
        centre_a, radius_a = (a.high + a.low) / 2, (a.high - a.low) / 2
        centre_b, radius_b = (b.high + b.low) / 2, (b.high - b.low) / 2
        spread = (centre_a.abs() + radius_a) @ radius_b + radius_a @ centre_b.abs()
        centre = centre_a @ centre_b
        found = Interval(centre - spread, centre + spread)
    if not rounded:
        return found
    terms = a.low.shape[-1] + 2
    size = a.size() @ b.size()
    return found.widened(within_float32(gamma(terms) * size + terms * SMALLEST))


def chosen(where: Interval, a: Interval, b: Interval) -> Interval:
    """Of ``a`` where the first value is 1, and of ``b`` where it is 0."""
    both = Interval(torch.minimum(a.low, b.low), torch.maximum(a.high, b.high))
    sure, never = where.low > 0.5, where.high < 0.5
    low = torch.where(sure, a.low, torch.where(never, b.low, both.low))
    high = torch.where(sure, a.high, torch.where(never, b.high, both.high))
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
    powers = x.each(lambda end: (end - x.high.amax(dim, keepdim=True)).exp())
    low = powers.low / (powers.low + _sum_of_others(powers.high, dim))
    high = powers.high / (powers.high + _sum_of_others(powers.low, dim))
    found = Interval(low.nan_to_num(0.0), high.nan_to_num(1.0))
    if not rounded:
        return found
    terms = x.low.shape[dim] + 128  # differences up to 104 are rounded in the exponent
    return found.widened(gamma(terms) * found.size() + terms * SMALLEST)


def _sum_of_others(x: Tensor, dim: int) -> Tensor:
    """For each value the sum of the others, without a difference that would round."""
    before = x.cumsum(dim).roll(1, dim)
    after = x.flip(dim).cumsum(dim).roll(1, dim).flip(dim)
    first = torch.arange(x.shape[dim], device=x.device) == 0
    first = first.view(-1, *[1] * (-1 - dim if dim < 0 else x.ndim - 1 - dim))
    return before.masked_fill(first, 0.0) + after.masked_fill(first.flip(0), 0.0)


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
    lowest = torch.minimum(torch.maximum(torch.zeros_like(x.low), deviation.low), deviation.high)
    squares = Interval(lowest.square(), deviation.size().square())
    others = squares.each(lambda end: _sum_of_others(end, -1))
    spread = torch.zeros_like(others.low)
    if rounded:  # of the variance, also as a difference of mean squares
        spread = 4.0 * gamma(2 * n + _TERMS) * x.size().square().sum(-1, keepdim=True)
    fewest, most = (others.low - spread).clamp(min=0.0), others.high + spread

    def value(d: Tensor, towards_zero: Tensor) -> Tensor:
        rest = torch.where(towards_zero, most, fewest)
        variance = ((d.square() + rest) / n + eps).clamp(min=eps)
        return d / variance.sqrt()

    ends = Interval(
        value(deviation.low, deviation.low > 0), value(deviation.high, deviation.high < 0)
    )
    exact = Interval(factor, factor)
    found = product(ends, exact, rounded=False).each(lambda end: end + shift)
    if not rounded:
        return found
    largest = x.size() + x.size().mean(-1, keepdim=True)
    inverse = ((fewest / n).clamp(min=0.0) + eps).rsqrt()
    size = largest * inverse * factor.abs() + shift.abs()
    return found.widened(within_float32(gamma(n + 2 * _TERMS) * size + SMALLEST))


def _not_negative(x: Interval) -> bool:
    return bool((x.low >= 0).all())


def steps(x: Interval) -> Interval:
    """Of a step, 1 where the value is >= 0."""
    return x.each(lambda end: (end >= 0).to(end.dtype))
