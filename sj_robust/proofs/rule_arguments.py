"""Checks of the arguments of rules."""

from typing import Any

import torch
from torch import Tensor

from sj_robust.proofs.bound_tensor import Bounds, Function, Run, is_truth
from sj_robust.proofs.constants import in_float64
from sj_robust.proofs.rounding import NoBoundsError
from sj_robust.proofs.spiking import Interval

__all__ = [
    "as_bounds",
    "centre_of_either",
    "check_dtype",
    "check_numbers",
    "constant",
    "dispatched",
    "interval",
    "is_rounded",
    "new_leaf",
    "reshaped",
    "size_of_constant",
]


def constant(value: Any, run: Run | None) -> Tensor:
    """A weight: in float64 and without a graph, or as it is in a differentiable run."""
    if isinstance(value, Bounds):
        raise NoBoundsError("a weight or a divisor that depends on the input")
    number = torch.float32 if run is None else run.dtype
    found: Tensor = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=number)
    if run is not None and run.differentiable:
        return found
    if found.ndim == 0:
        found = found.to(number)  # as torch does beside a tensor of the network
    return in_float64(found)


def as_bounds(value: Any, run: Run | None, like: Tensor) -> Bounds:
    """Bounds, or a constant as bounds that nothing moves."""
    if isinstance(value, Bounds):
        return value
    centre = constant(value, run).to(like)
    return Bounds(centre, size_of_constant(centre, run), run=run)


def size_of_constant(value: Tensor, run: Run | None) -> Tensor:
    """The radius of a constant: none, or in a sized run of points its size."""
    is_sized = run is not None and run.points and run.sized
    return value.abs() if is_sized else torch.zeros_like(value)


def centre_of_either(a: Any, b: Any) -> Tensor:
    """The centre of the one of two that is bounds."""
    centre: Tensor = (a if isinstance(a, Bounds) else b).centre
    return centre


def check_dtype(x: Bounds, *given: Any) -> None:
    """Raise NoBoundsError if one of some arguments is another dtype than that of the values."""
    for dtype in given:
        if isinstance(dtype, torch.dtype) and dtype != x.dtype:
            raise NoBoundsError(f"a conversion to {dtype}: bounds are those of {x.dtype}")


def check_numbers(func: Any, *values: Any) -> None:
    """Raise NoBoundsError if all of these are True and False, which torch does not take for 1 and
    0.
    """
    if all(map(is_truth, values)):
        raise NoBoundsError(
            f"the operation {func.__name__} of comparisons alone: convert one first, as in (x >= "
            "0).to(x.dtype)"
        )


def interval(x: Bounds) -> Interval:
    """What float32 can give."""
    return Interval(x.lower, x.upper)


def is_rounded(run: Run | None) -> bool:
    """Whether bounds have what float32 rounds."""
    return run is None or run.rounded


def new_leaf(run: Run | None, by: Function, arguments: list[Bounds], values: Interval) -> Bounds:
    """A leaf in the run of its arguments."""
    if run is None:
        raise NoBoundsError(f"{by.name} outside a run")
    return run.begin(by, arguments, values)


def dispatched(func: Any, *args: Any) -> Any:
    """What a function of bounds gives, as if the network had called it."""
    # torch lacks the type
    return Bounds.__torch_function__(func, (), args)


def reshaped(x: Bounds, shape: torch.Size) -> Bounds:
    """Bounds in another shape. 改变形状。"""
    if x.shape == shape:
        return x
    found: Bounds = dispatched(torch.Tensor.reshape, x, shape)
    return found
