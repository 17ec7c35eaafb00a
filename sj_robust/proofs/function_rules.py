"""Rules of operations that are no affine maps: pooling, ReLU, comparisons, norms of a sample."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sj_robust.proofs import nonlinear
from sj_robust.proofs.bound_tensor import Bounds, Function, Rule
from sj_robust.proofs.rounding import NoBoundsError
from sj_robust.proofs.rule_arguments import (
    as_bounds,
    centre_of_either,
    constant,
    dispatched,
    interval,
    is_rounded,
    new_leaf,
    reshaped,
    run_of,
)
from sj_robust.proofs.spiking import Interval

__all__ = ["OPERATIONS", "step"]


def _largest_of(func: Any, x: Any, *args: Any, **kwargs: Any) -> Bounds:
    """Max pooling."""
    if kwargs.pop("return_indices", False):
        raise NoBoundsError("a max pooling that returns indices")

    def pooling(z: Tensor) -> Tensor:
        found: Tensor = func(z, *args, **kwargs)
        return found

    by = Function("a max pooling", pooling)
    return new_leaf(x.run, by, [x], interval(x).each(pooling))


def _rectified(func: Any, x: Any, inplace: bool = False) -> Bounds:
    """ReLU."""
    if inplace:
        raise NoBoundsError("a ReLU that writes into its input: take inplace=False")
    return new_leaf(x.run, Function("a ReLU", torch.relu), [x], interval(x).each(torch.relu))


def _function(func: Any, x: Any, *args: Any, **kwargs: Any) -> Bounds:
    """A function of one value that never falls, or that falls up to a point and rises then."""
    name = func.__name__.strip("_")
    given = (*args, *kwargs.values())
    if kwargs.pop("inplace", False) or any(isinstance(part, Bounds) for part in given):
        raise NoBoundsError(f"{name} that writes into its input, or has several bounds")
    if name == "gelu" and kwargs.pop("approximate", "none") != "none":
        raise NoBoundsError("gelu with approximate='tanh'")
    if name in ("leaky_relu", "elu") and any(part < 0 for part in given):
        raise NoBoundsError(f"{name} with a negative slope, which falls and rises")
    args = tuple(_rounded_number(part, x) for part in args)
    kwargs = {key: _rounded_number(part, x) for key, part in kwargs.items()}
    of_one = nonlinear.valley if name in nonlinear.VALLEYS else nonlinear.monotone

    def function(z: Tensor) -> Tensor:
        found: Tensor = func(z, *args, **kwargs)
        return found

    values = of_one(interval(x), function, name, rounded=is_rounded(x.run))
    return new_leaf(x.run, Function(name), [x], values)


def _rounded_number(value: Any, x: Bounds) -> Any:
    """A number beside a tensor of the network, as that holds it."""
    if not isinstance(value, float):
        return value
    return float(torch.as_tensor(value, dtype=x.dtype))


def _extremum(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """The largest or smallest value along a dimension, or of two values."""
    name = func.__name__.strip("_")
    run = run_of((x, *args))
    if name in ("maximum", "minimum"):
        low, high = (as_bounds(part, run, centre_of_either(x, args[0])) for part in (x, args[0]))
        ends = Interval(func(low.lower, high.lower), func(low.upper, high.upper))
        bounded = [part for part in (x, args[0]) if isinstance(part, Bounds)]
        return new_leaf(run, Function(f"a {name}"), bounded, ends)
    if args and isinstance(args[0], Tensor):
        same = torch.maximum if name == "max" else torch.minimum
        return _extremum(same, x, args[0])
    alone = torch.amax if name.endswith("max") else torch.amin
    dim = args[0] if args else kwargs.get("dim")
    if not isinstance(dim, int):
        raise NoBoundsError(f"{name} over several dimensions")
    keepdim = args[1] if len(args) > 1 else kwargs.get("keepdim", False)
    values = interval(x).each(lambda end: alone(end, dim, keepdim=True))
    found = new_leaf(run, Function(f"a {name}", along=(dim,)), [x], values)
    if not keepdim:
        found = dispatched(torch.Tensor.squeeze, found, dim)
    return found if name.startswith("a") else _Largest(found, None)


class _Largest(NamedTuple):
    """What ``max`` along a dimension gives, without the places."""

    values: Any
    indices: Any


def _compared(func: Any, a: Any, b: Any) -> Bounds:
    """Whether a value is at least, or above, another one: 1 or 0."""
    run = run_of((a, b))
    beside = centre_of_either(a, b)
    name = func.__name__.strip("_")
    first, second = (as_bounds(part, run, beside) for part in (a, b))
    if name in ("le", "lt"):
        first, second = second, first
    reached = torch.ge if name in ("ge", "le") else torch.gt
    low = reached(first.lower, second.upper).to(beside.dtype)
    high = reached(first.upper, second.lower).to(beside.dtype)
    bounded = [part for part in (a, b) if isinstance(part, Bounds)]
    return new_leaf(run, Function("a comparison"), bounded, Interval(low, high))


def _chosen(func: Any, where: Any, a: Any, b: Any) -> Bounds:
    """One of two values, as a third one says."""
    run = run_of((where, a, b))
    bounded = [part for part in (where, a, b) if isinstance(part, Bounds)]
    beside = bounded[0].centre
    first, second = (as_bounds(part, run, beside) for part in (a, b))
    if isinstance(where, Bounds):
        decided = interval(where)
    else:
        given = where.to(beside.dtype)
        decided = Interval(given, given)
    values = nonlinear.chosen(decided, interval(first), interval(second))
    return new_leaf(run, Function("a choice"), bounded, values)


def _softmax(func: Any, x: Any, dim: int, *args: Any, **kwargs: Any) -> Bounds:
    """Softmax along a dimension."""
    values = nonlinear.softmax(interval(x), dim, rounded=is_rounded(x.run))
    return new_leaf(x.run, Function("a softmax", along=(dim,)), [x], values)


def _layer_norm(
    func: Any, x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Bounds:
    """Layer norm: the values of the last dimensions are a group."""
    group = dispatched(torch.Tensor.flatten, x, -len(shape))
    found = _normalised(group, "a layer norm", eps, _flat(weight, x), _flat(bias, x))
    return reshaped(found, x.shape)


def _group_norm(
    func: Any, x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Bounds:
    """Group norm: the values of some channels of a sample are a group."""
    group = reshaped(x, torch.Size((len(x), groups, x.radius[0].numel() // groups)))
    elements = x.radius[0, 0].numel()

    def of_groups(value: Any) -> Any:
        if value is None:
            return None
        return constant(value, x.run).repeat_interleave(elements).view(groups, -1)

    found = _normalised(group, "a group norm", eps, of_groups(weight), of_groups(bias))
    return reshaped(found, x.shape)


def _flat(value: Any, x: Bounds) -> Any:
    return None if value is None else constant(value, x.run).flatten()


def _normalised(group: Any, name: str, eps: float, factor: Any, shift: Any) -> Bounds:
    """Groups [*, n] of values, less their mean and divided by their deviation."""
    beside = group.radius
    mean = dispatched(torch.mean, group, -1, True)
    deviation = dispatched(torch.sub, group, mean)
    values = nonlinear.normalised(
        interval(group),
        interval(deviation),
        eps,
        beside.new_ones(()) if factor is None else factor.to(beside),
        beside.new_zeros(()) if shift is None else shift.to(beside),
        rounded=is_rounded(group.run),
    )
    return new_leaf(group.run, Function(name, along=(-1,)), [group], values)


def step(x: Bounds, function: Callable[[Tensor], Tensor]) -> Bounds:
    """Of a surrogate's forward: 1 where the value is >= 0. 阶跃函数的上下界。

    Args:
        x: The values.
        function: The forward, whose gradient a differentiable run takes.
    """
    ends = nonlinear.steps(interval(x)) if is_rounded(x.run) else interval(x).each(function)
    return new_leaf(x.run, Function("a surrogate"), [x], ends)


OPERATIONS: list[tuple[Rule, str]] = [
    (_largest_of, "max_pool1d max_pool2d max_pool3d"),
    (_largest_of, "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"),
    (_rectified, "relu"),
    (_function, " ".join((*nonlinear.MONOTONE[1:], *nonlinear.VALLEYS))),
    (_extremum, "max min amax amin maximum minimum"),
    (_compared, "ge gt le lt"),
    (_chosen, "where"),
    (_softmax, "softmax"),
    (_layer_norm, "layer_norm"),
    (_group_norm, "group_norm"),
]
"""Rules, and torch's names of the operations that each of them is for."""
