"""Rules of operations that are not affine: pooling, ReLU, comparisons, norms of a sample."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sj_robust.proofs import nonlinear
from sj_robust.proofs.rounding import NoBoundsError
from sj_robust.proofs.spiking import Interval
from sj_robust.proofs.values import (
    Bounds,
    Rule,
    as_bounds,
    bounds_of,
    centre_of_either,
    check_dtype,
    constant,
    interval,
    is_rounded,
    new_leaf,
    reshaped,
    run_of,
)

__all__ = ["OPERATIONS", "compared", "step"]

_SOFTPLUS_THRESHOLD = 15
"""From it on, the step from ``log(1 + exp(x))`` to x is far below what float32 rounds."""


def _largest_of(func: Any, x: Any, *args: Any, **kwargs: Any) -> Bounds:
    """Max pooling."""
    if kwargs.pop("return_indices", False):
        raise NoBoundsError("a max pooling that returns indices")

    def pooling(z: Tensor) -> Tensor:
        found: Tensor = func(z, *args, **kwargs)
        return found

    values = interval(x).each(pooling)
    return new_leaf(x.run, [x], values, pooling)


def _rectified(func: Any, x: Any, inplace: bool = False) -> Bounds:
    """ReLU, also if torch writes it into its input."""
    values = interval(x).each(torch.relu)
    return new_leaf(x.run, [x], values)


def _function(func: Any, x: Any, *args: Any, **kwargs: Any) -> Bounds:
    """A function of one value that never falls, or that falls up to a point and then rises."""
    name = func.__name__.strip("_")
    _check_function(name, x, args, kwargs)
    numbers = [_rounded_number(part, x) for part in args]
    options = {}
    for key, part in kwargs.items():
        if key not in ("inplace", "approximate"):
            options[key] = _rounded_number(part, x)

    def function(z: Tensor) -> Tensor:
        found: Tensor = func(z, *numbers, **options)
        return found

    of_one = nonlinear.valley if name in nonlinear.VALLEYS else nonlinear.monotone
    values = of_one(interval(x), function, name, rounded=is_rounded(x.run))
    return new_leaf(x.run, [x], values)


def _check_function(name: str, x: Bounds, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The further arguments of a function of one value leave it one that has bounds."""
    given = (*args, *kwargs.values())
    has_other_bounds = any(isinstance(part, Bounds) for part in given)
    if has_other_bounds or kwargs.get("inplace", False):
        raise NoBoundsError(f"{name} that writes into its input, or has several bounds")
    if name == "gelu" and kwargs.get("approximate", "none") != "none":
        raise NoBoundsError("gelu with approximate='tanh'")
    if name in ("leaky_relu", "elu") and any(part < 0 for part in given):
        raise NoBoundsError(f"{name} with a negative slope, which falls and rises")
    if name == "softplus" and is_rounded(x.run):
        given_threshold = args[1] if len(args) > 1 else kwargs.get("threshold", 20.0)
        if given_threshold < _SOFTPLUS_THRESHOLD:
            raise NoBoundsError(
                f"softplus with a threshold below {_SOFTPLUS_THRESHOLD}, where it jumps down"
            )


def _rounded_number(value: Any, x: Bounds) -> Any:
    """A number in the precision of a tensor of the network."""
    if not isinstance(value, float):
        return value
    return float(torch.as_tensor(value, dtype=x.dtype))


def _extremum(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """The largest or smallest value along a dimension, or of two values."""
    name = func.__name__.strip("_")
    is_max = name in ("max", "amax", "maximum")
    if name in ("maximum", "minimum") or (args and isinstance(args[0], Tensor | Bounds)):
        of_two = torch.maximum if is_max else torch.minimum
        return _extremum_of_two(of_two, x, args[0])
    dim = args[0] if args else kwargs.get("dim")
    if not isinstance(dim, int):
        raise NoBoundsError(f"{name} over several dimensions")
    keepdim = args[1] if len(args) > 1 else kwargs.get("keepdim", False)
    along_dim = torch.amax if is_max else torch.amin
    values = interval(x).each(lambda end: along_dim(end, dim, keepdim=True))
    found = new_leaf(x.run, [x], values)
    if not keepdim:
        found = bounds_of(torch.Tensor.squeeze, found, dim)
    without_places = name in ("amax", "amin")
    return found if without_places else _Largest(found, None)


def _extremum_of_two(func: Any, a: Any, b: Any) -> Bounds:
    """The larger or the smaller of two values."""
    run = run_of((a, b))
    like = centre_of_either(a, b)
    first = as_bounds(a, run, like)
    second = as_bounds(b, run, like)
    low = func(first.lower, second.lower)
    high = func(first.upper, second.upper)
    return new_leaf(run, _bounds_among(a, b), Interval(low, high))


class _Largest(NamedTuple):
    """What ``max`` along a dimension gives, without the places."""

    values: Any
    indices: Any


def compared(func: Any, a: Any, b: Any) -> Bounds:
    """Whether a value is at least, or above, another one: 1 or 0."""
    run = run_of((a, b))
    like = centre_of_either(a, b)
    larger = as_bounds(a, run, like)
    smaller = as_bounds(b, run, like)
    name = func.__name__.strip("_")
    if name in ("le", "lt"):
        larger, smaller = smaller, larger
    reached = torch.ge if name in ("ge", "le") else torch.gt
    surely = reached(larger.lower, smaller.upper).to(like.dtype)
    possibly = reached(larger.upper, smaller.lower).to(like.dtype)
    ends = Interval(surely, possibly)
    return new_leaf(run, _bounds_among(a, b), ends)


def _chosen(func: Any, where: Any, a: Any, b: Any) -> Bounds:
    """One of two values, as a third one says."""
    run = run_of((where, a, b))
    bounded = _bounds_among(where, a, b)
    like = bounded[0].centre
    if isinstance(where, Bounds):
        decided = interval(where)
    else:
        given = where.to(like.dtype)
        decided = Interval(given, given)
    if_true = interval(as_bounds(a, run, like))
    if_false = interval(as_bounds(b, run, like))
    values = nonlinear.chosen(decided, if_true, if_false)
    return new_leaf(run, bounded, values)


def _bounds_among(*values: Any) -> list[Bounds]:
    """Those of the values that are bounds."""
    return [value for value in values if isinstance(value, Bounds)]


def _softmax(func: Any, x: Any, dim: int, *args: Any, **kwargs: Any) -> Bounds:
    """Softmax along a dimension."""
    check_dtype(x, *args, *kwargs.values())
    values = nonlinear.softmax(interval(x), dim, rounded=is_rounded(x.run))
    return new_leaf(x.run, [x], values)


def _layer_norm(
    func: Any, x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Bounds:
    """Layer norm: the values of the last dimensions are a group."""
    group = bounds_of(torch.Tensor.flatten, x, -len(shape))
    found = _normalised(group, eps, _flat(weight, x), _flat(bias, x))
    return reshaped(found, x.shape)


def _group_norm(
    func: Any, x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Bounds:
    """Group norm: the values of some channels of a sample are a group."""
    values_of_a_group = x.radius[0].numel() // groups
    group = reshaped(x, torch.Size((x.shape[0], groups, values_of_a_group)))
    values_of_a_channel = x.radius[0, 0].numel()

    def by_group(of_channels: Any) -> Any:
        if of_channels is None:
            return None
        of_values = constant(of_channels, x.run).repeat_interleave(values_of_a_channel)
        return of_values.view(groups, -1)

    found = _normalised(group, eps, by_group(weight), by_group(bias))
    return reshaped(found, x.shape)


def _flat(value: Any, x: Bounds) -> Any:
    """A weight or bias of the last dimensions as one row; None for none."""
    return None if value is None else constant(value, x.run).flatten()


def _normalised(group: Any, eps: float, factor: Any, shift: Any) -> Bounds:
    """Groups [*, n] of values, less their mean and divided by their deviation."""
    like = group.radius
    keepdim = True
    mean = bounds_of(torch.mean, group, -1, keepdim)
    deviation = bounds_of(torch.sub, group, mean)
    if factor is None:
        factor = like.new_ones(())
    if shift is None:
        shift = like.new_zeros(())
    factor = factor.to(like)
    shift = shift.to(like)
    values = nonlinear.normalised(
        interval(group),
        interval(deviation),
        eps,
        factor,
        shift,
        rounded=is_rounded(group.run),
    )
    return new_leaf(group.run, [group], values)


def step(x: Bounds, function: Callable[[Tensor], Tensor]) -> Bounds:
    """Of a surrogate's forward: 1 where the value is >= 0. 阶跃函数的上下界。

    Args:
        x: The values.
        function: The forward, whose gradient a differentiable run takes.
    """
    values = interval(x)
    spikes = nonlinear.steps(values) if is_rounded(x.run) else values.each(function)
    return new_leaf(x.run, [x], spikes)


OPERATIONS: list[tuple[Rule, str]] = [
    (_largest_of, "max_pool1d max_pool2d max_pool3d"),
    (_largest_of, "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"),
    (_rectified, "relu"),
    (_function, " ".join((*nonlinear.MONOTONE[1:], *nonlinear.VALLEYS))),
    (_extremum, "max min amax amin maximum minimum"),
    (compared, "ge gt le lt"),
    (_chosen, "where"),
    (_softmax, "softmax"),
    (_layer_norm, "layer_norm"),
    (_group_norm, "group_norm"),
]
"""Rules, and torch's names of the operations that each of them is for."""
