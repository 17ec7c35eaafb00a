"""Weights and other constants of a network by their values, whatever it writes to them later."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["by_value", "in_float64", "parameters_kept_in_float64"]

_Known = tuple[Tensor, Tensor, Tensor]
"""A parameter, a copy of its values, and these in float64. Nothing but the values tells that a
forward has written to ``p.data``.
"""

_DOUBLES: ContextVar[dict[int, _Known] | None] = ContextVar("_DOUBLES", default=None)


@contextmanager
def parameters_kept_in_float64() -> Iterator[None]:
    """Context in which every parameter is converted once, for all runs; also a decorator."""
    token = _DOUBLES.set({})
    try:
        yield
    finally:
        _DOUBLES.reset(token)


def in_float64(value: Tensor) -> Tensor:
    """A copy of a constant in float64, without a graph."""
    known = _DOUBLES.get()
    if known is None or not isinstance(value, nn.Parameter):
        return _copy(value)
    if id(value) in known:
        parameter, values, found = known[id(value)]
        if parameter is value and torch.equal(values, value):
            return found
    found = _copy(value)
    known[id(value)] = value, value.detach().clone(), found
    return found


def _copy(value: Tensor) -> Tensor:
    """The same values in float64, in memory of their own."""
    found = value.detach().double()
    return found.clone() if value.dtype == torch.float64 else found


def by_value(value: Any) -> Any:
    """An argument of a call as it is now, for those who make the call again: a network with binary
    weights, say, has other values in them after its forward.
    """
    if type(value) in (tuple, list):
        return type(value)(map(by_value, value))
    if not isinstance(value, Tensor):
        return value
    if isinstance(value, nn.Parameter) and value.is_floating_point():
        return in_float64(value)
    return value.detach().clone()
