"""Confidence intervals of accuracies and of their differences."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev

__all__ = [
    "difference_interval",
    "extent",
    "paired_difference_interval",
    "repeated_interval",
    "wilson_interval",
]

_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution
_T = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
)  # of Student's, from one degree of freedom on


def wilson_interval(count: float, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share. 威尔逊置信区间。

    Equation: ``(p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)`` with ``p =
    count / total``, ``n = total`` and ``z = 1.96``; unlike the normal interval it stays in [0, 1]
    and has a width at shares of 0 and 1.

    Args:
        count: Number of hits.
        total: Number of trials, >= 1.

    Raises:
        ValueError: If ``count`` is not from 0 to ``total``, or there are no trials.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference" (JASA
        1927).

    Examples:
        >>> low, high = wilson_interval(5, 10)
        >>> round(low, 3), round(high, 3)
        (0.237, 0.763)
    """
    _check(count, total)
    share, spread = count / total, _Z * _Z / total
    middle = (share + spread / 2) / (1 + spread)
    variance = share * (1 - share) / total + spread / (4 * total)
    half = _Z * math.sqrt(variance) / (1 + spread)
    # At a share of 0 or 1 the end is that share exactly, which rounding would miss.
    return (0.0 if count == 0 else middle - half, 1.0 if count == total else middle + half)


def difference_interval(
    count: int, total: int, other_count: int, other_total: int
) -> tuple[float, float]:
    """95 % interval of ``other_count / other_total - count / total``, measured on different images.
    独立样本差的区间。

    Equation: from Wilson's intervals (l, u) of both shares, ``d - sqrt((p2 - l2)^2 + (u1 - p1)^2)``
    and ``d + sqrt((u2 - p2)^2 + (p1 - l1)^2)`` around ``d = p2 - p1``.

    Source: Newcombe, "Interval estimation for the difference between independent proportions"
        (1998), method 10.
    """
    low, high = wilson_interval(count, total)
    other_low, other_high = wilson_interval(other_count, other_total)
    share, other = count / total, other_count / other_total
    return (
        other - share - math.hypot(other - other_low, high - share),
        other - share + math.hypot(other_high - other, share - low),
    )


def paired_difference_interval(gained: int, lost: int, total: int) -> tuple[float, float]:
    """95 % interval of a difference of two shares of the same images. 配对样本差的区间。

    Equation: ``d -+ z sqrt(b + c - (b - c)^2 / n) / n`` with ``d = (b - c) / n`` after adding 1/2
    to each of the four cells, so ``b = gained + 1/2`` (hits for the second alone), ``c = lost +
    1/2`` (for the first alone) and ``n = total + 2``; clipped to [-1, 1].

    Source: Agresti and Min, "Simple improved confidence intervals for comparing matched
        proportions" (2005).

    Examples:
        >>> low, high = paired_difference_interval(0, 0, 98)
        >>> round(low, 4), round(high, 4)
        (-0.0196, 0.0196)
    """
    _check(gained + lost, total)
    size = total + 2
    difference = (gained - lost) / size
    variance = gained + lost + 1 - (gained - lost) ** 2 / size
    half = _Z * math.sqrt(variance) / size
    return max(-1.0, difference - half), min(1.0, difference + half)


def repeated_interval(counts: Sequence[int], total: int) -> tuple[float, float]:
    """95 % interval of a mean share over draws, each measured on the same images.
    多次抽样平均比例的区间。

    Equation: around the mean share p, ``p - sqrt((p - l)^2 + e^2)`` and ``p + sqrt((u - p)^2 +
    e^2)``, clipped to [0, 1], with Wilson's interval (l, u) of p on ``total`` images and ``e = t s
    / sqrt(D)``: Student's interval of D shares of standard deviation s. So it covers other images
    and other draws.

    Source: the combination of intervals of Newcombe (1998), method 10.

    Examples:
        >>> repeated_interval([5], 10) == wilson_interval(5, 10)
        True
        >>> low, high = repeated_interval([50, 60, 55], 100)
        >>> round(low, 3), round(high, 3)
        (0.392, 0.706)
    """
    share, draws = fmean(counts) / total, len(counts)
    low, high = wilson_interval(fmean(counts), total)
    spread = 0.0
    if draws > 1:
        freedom = draws - 1
        quantile = _Z * (1 + 1.3 / freedom)
        if freedom <= len(_T):
            quantile = _T[freedom - 1]
        spread = quantile * stdev(counts) / total / math.sqrt(draws)
    return max(0.0, share - math.hypot(share - low, spread)), min(
        1.0, share + math.hypot(high - share, spread)
    )


def extent(value: float, count: int | None, total: int | None) -> str:
    """A value as tables show it, such as ``0.125, 3 of 24 images, 95 % CI 0.0434 to 0.31``.
    数值的文本形式。
    """
    if count is None or total is None:
        return f"{value:.3g}"
    low, high = wilson_interval(count, total)
    return f"{value:.3g}, {count} of {total} images, 95 % CI {low:.3g} to {high:.3g}"


def _check(count: float, total: int) -> None:
    if total < 1:
        raise ValueError(f"total must be >= 1, got {total}: a share of no images is undefined")
    if not 0 <= count <= total:
        raise ValueError(f"count must be from 0 to {total}, got {count}")
