"""Radii such as 8/255."""

import math
import struct
from collections.abc import Iterable
from typing import Any, SupportsFloat

__all__ = ["Radii", "eps_text", "parse_eps", "parse_radii", "plain_eps"]

Radii = str | SupportsFloat | Iterable[str | SupportsFloat]
"""A radius, or several of a curve."""


def eps_text(eps: float) -> str:
    """A radius as text that :func:`parse_eps` reads back equal: an integer, a short decimal or
    255ths. 半径的文本形式。

    Args:
        eps: The radius.

    Examples:
        >>> eps_text(8 / 255), eps_text(0.1), eps_text(1 / 3), eps_text(20)
        ('8/255', '0.1', '85/255', '20')
    """
    if eps < 2**53 and eps == int(eps):
        return str(int(eps))
    for text in (f"{eps:.4g}", f"{eps * 255:.4g}/255"):
        if parse_eps(text) == eps:
            return text
    return repr(float(eps))


def plain_eps(eps: float) -> float:
    """The radius with a short text that differs by rounding alone, if there is one.
    舍入到简短文本的半径。

    Examples:
        >>> 0.75 * 0.1, plain_eps(0.75 * 0.1), eps_text(plain_eps(2 * 8 / 255))
        (0.07500000000000001, 0.075, '16/255')
    """
    near = (parse_eps(text) for text in (f"{eps:.4g}", f"{eps * 255:.4g}/255"))
    return next((value for value in near if math.isclose(value, eps, rel_tol=1e-12)), eps)


def parse_eps(text: str | SupportsFloat) -> float:
    """A radius from text such as ``"8/255"`` or ``"0.1"``, or from a number. 解析半径。

    Args:
        text: The text, or a number of Python, numpy or torch; of one in float32 the shortest text
            that gives the same float32 counts, as 0.1.

    Raises:
        ValueError: If it is not a number, no fraction, negative or not finite.

    Examples:
        >>> parse_eps("8/255") == 8 / 255
        True
    """
    try:
        eps = _fraction(text) if isinstance(text, str) else float(text)
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(
            f"eps must be a number or a fraction such as 8/255, got {text!r}"
        ) from error
    if isinstance(text, bool):
        raise ValueError(f"eps must be a number or a fraction such as 8/255, got {text!r}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps must be >= 0 and finite, got {text!r}")
    if str(getattr(text, "dtype", "")) in ("float32", "torch.float32"):
        return _shortest(eps)
    return eps


def parse_radii(eps: Radii) -> list[float]:
    """The radii of one, or of several, each once and in increasing order. 解析一个或多个半径。

    Args:
        eps: A radius as :func:`parse_eps` takes it, or a list, tuple or array of them.

    Raises:
        ValueError: If there is none, or one is not a radius.

    Examples:
        >>> parse_radii("8/255") == [8 / 255], parse_radii([0.2, "0.1", 0.2])
        (True, [0.1, 0.2])
    """
    radii = sorted({parse_eps(radius) for radius in several(eps)})
    if not radii:
        raise ValueError("eps must hold a radius or more, got none; give one such as '8/255'")
    return radii


def several(eps: Any) -> list[Any]:
    """What a list, a tuple or an array holds; anything else alone. 一个或多个值的列表。"""
    if isinstance(eps, str) or not isinstance(eps, Iterable) or getattr(eps, "ndim", 1) == 0:
        return [eps]
    return list(eps)


def _shortest(eps: float) -> float:
    """The number with the shortest text, a decimal or 255ths, of those that are ``eps`` in
    float32.
    """
    decimals = (f"{eps:.{digits}g}" for digits in range(1, 10))  # nine tell every float32 apart
    decimal = next(text for text in decimals if _as_float32(float(text)) == eps)
    fraction = f"{eps * 255:.4g}/255"
    if len(fraction) < len(decimal) and _as_float32(_fraction(fraction)) == eps:
        return _fraction(fraction)
    return float(decimal)


def _as_float32(value: float) -> float:
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


def _fraction(text: str) -> float:
    numerator, slash, denominator = text.partition("/")
    return float(numerator) / float(denominator) if slash else float(numerator)
