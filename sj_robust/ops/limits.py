"""Limits that pass the gradient on where a value is exactly at the limit."""

import torch
from torch import Tensor

__all__ = ["at_least", "at_most", "by_sign"]


def at_least(x: Tensor, limit: float) -> Tensor:
    """Equation: ``max(x, limit)``, whose gradient is 1 where x is the limit.

    That of ``clamp`` is 1 there in torch 2.13, but 0 in torch 2.15, where a parameter at its limit
    would never leave it.

    Examples:
        >>> x = torch.tensor([-1.0, 0.0, 1.0], requires_grad=True)
        >>> at_least(x, 0.0).sum().backward()
        >>> x.grad
        tensor([0., 1., 1.])
    """
    return torch.where(x < limit, limit, x)


def at_most(x: Tensor, limit: float) -> Tensor:
    """Equation: ``min(x, limit)``, whose gradient is 1 where x is the limit; see
    :func:`at_least`.
    """
    return torch.where(x > limit, limit, x)


def by_sign(x: Tensor) -> tuple[Tensor, Tensor]:
    """Equation: ``max(x, 0)`` and ``min(x, 0)``, whose sum is x; where x is 0, the first has
    gradient 1 and the second 0.

    Examples:
        >>> x = torch.tensor([-1.0, 0.0, 1.0], requires_grad=True)
        >>> positive, negative = by_sign(x)
        >>> (3 * positive + 5 * negative).sum().backward()
        >>> x.grad
        tensor([5., 3., 3.])
    """
    is_negative = x < 0
    return x.masked_fill(is_negative, 0.0), x.masked_fill(~is_negative, 0.0)
