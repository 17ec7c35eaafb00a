"""One rule per operation: how bounds are propagated.

The rules of affine maps and of what only moves elements stand here; those of other functions in
:mod:`sj_robust.proofs.function_rules`.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sj_robust.core.broadcast import along
from sj_robust.proofs import function_rules, nonlinear
from sj_robust.proofs.changes import Changes
from sj_robust.proofs.function_rules import step
from sj_robust.proofs.rounding import SMALLEST, NoBoundsError, gamma, within_float32
from sj_robust.proofs.values import (
    MAY_WRITE,
    OF_TRUTH,
    RULES,
    Bounds,
    Pooling,
    Rule,
    Run,
    as_bounds,
    bounds_of,
    centre_of_either,
    check_dtype,
    constant,
    interval,
    is_rounded,
    new_leaf,
    run_of,
)

__all__ = [
    "ASKED",
    "MAY_WRITE",
    "OF_TRUTH",
    "RULES",
    "Bounds",
    "Pooling",
    "Run",
    "moved",
    "step",
]


def _affine(
    x: Bounds,
    apply: Callable[[Tensor], Tensor],
    absolute: Callable[[Tensor], Tensor],
    *,
    terms: int,
    shift: Tensor | None = None,
    changes: Changes | None = None,
) -> Bounds:
    """Bounds of ``apply(x) + shift``; ``absolute`` is the map whose entries are the absolute values
    of apply's, and ``changes`` what is known of changed events behind it.

    Equation, with g the growth of a sum of so many terms by rounding::

        centre = A c + b,    radius = |A| r,    error = |A| (e + g (|c| + r + e)) + g |b|
    """
    centre = apply(x.centre)
    if shift is None:
        shift = x.centre.new_zeros(())
    else:
        shift = shift.to(x.centre.dtype)
        centre = centre + shift
    if x.run is not None and x.run.points:
        return Bounds(centre, centre.detach().new_zeros(()), run=x.run)
    growth = gamma(terms)
    if x.run is not None and x.run.narrow:
        # what the sums of both, and of this, round is at most twice growth; it is in the radius,
        # which changes, unrounded, would stand in the place of
        of_values = absolute(x.radius + growth * x.centre.abs())
        of_rounding = growth * (shift.abs() + centre.abs())
        radius = (1.0 + 4.0 * growth) * of_values + of_rounding + terms * SMALLEST
        return Bounds(centre, radius, run=x.run)
    radius = absolute(x.radius) if changes is None else changes.radius()
    if x.unrounded:
        return Bounds(centre, radius, run=x.run, changes=changes)
    largest = x.centre.detach().abs() + x.radius + x.error
    of_sums = absolute(x.error + growth * largest)
    error = of_sums + growth * shift.abs() + terms * SMALLEST
    return Bounds(
        centre=centre,
        radius=radius,
        error=within_float32(error),
        run=x.run,
        changes=changes,
    )


def _weighted(
    func: Any, x: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any
) -> Bounds:
    """Convolution and linear."""
    weight = constant(weight, x.run).to(x.centre.dtype)
    magnitude = cache(weight.abs)  # needed only where there is a radius
    shift = None if bias is None else constant(bias, x.run)
    if shift is not None and weight.ndim > 2:
        shift = along(shift, 0, weight.ndim - 1)
    return _affine(
        x,
        lambda z: func(z, weight, None, *args, **kwargs),
        lambda z: func(z, magnitude(), None, *args, **kwargs),
        terms=(weight[0].numel() if weight.ndim > 1 else weight.numel()) + 2,
        shift=shift,
        changes=_weighted_changes(func, x, weight, args, kwargs),
    )


def _weighted_changes(
    func: Any, x: Bounds, weight: Tensor, args: Any, kwargs: Any
) -> Changes | None:
    """What changed events can do behind a convolution or linear map."""
    if x.changes is None:
        return None
    # On a device without memory only the shape is worked out.
    of_x = x.radius.to("meta")
    shape = func(of_x, weight.to("meta"), None, *args, **kwargs).shape
    if func.__name__ == "linear":
        return x.changes.linear(weight, shape)
    if func.__name__ != "conv2d":
        return None
    names = ("stride", "padding", "dilation", "groups")
    given = dict(zip(names, args, strict=False)) | kwargs
    return x.changes.convolved(weight, shape, **given)


def _transposed(
    func: Any, x: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any
) -> Bounds:
    """Transposed convolution."""
    weight = constant(weight, x.run).to(x.centre.dtype)
    shift = None if bias is None else constant(bias, x.run)
    if shift is not None:
        shift = along(shift, 0, weight.ndim - 1)
    return _affine(
        x,
        lambda z: func(z, weight, None, *args, **kwargs),
        lambda z: func(z, weight.abs(), None, *args, **kwargs),
        terms=weight[:, 0].numel() + 2,
        shift=shift,
    )


def _matmul(func: Any, a: Any, b: Any) -> Bounds:
    """Matrix products with a constant, or of two values that depend on the input."""
    if func.__name__ == "__rmatmul__":
        a, b = b, a
    run = run_of((a, b))
    if isinstance(a, Bounds) and isinstance(b, Bounds):
        if a.ndim < 2 or b.ndim < 2:
            raise NoBoundsError("a product of vectors that depend on the input")
        values = nonlinear.matmul(interval(a), interval(b), rounded=is_rounded(run))
        return new_leaf(run, [a, b], values)
    if isinstance(a, Bounds):
        return _matmul_with(a, constant(b, run), from_left=False)
    return _matmul_with(b, constant(a, run), from_left=True)


def _matmul_with(x: Bounds, weight: Tensor, *, from_left: bool) -> Bounds:
    """``x @ weight``, or ``weight @ x`` if the constant stands on the left."""
    weight = weight.to(x.centre.dtype)

    def times(z: Tensor, weight: Tensor) -> Tensor:
        return torch.matmul(weight, z) if from_left else torch.matmul(z, weight)

    summed_over = -1 if from_left or weight.ndim == 1 else -2
    return _affine(
        x,
        lambda z: times(z, weight),
        lambda z: times(z, weight.abs()),
        terms=weight.shape[summed_over] + 2,
    )


def _matmul_and_sum(
    func: Any, shift: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1
) -> Bounds:
    """A matrix product and what is added to it."""
    if beta != 1 or alpha != 1:
        raise NoBoundsError("a matrix product with alpha or beta")
    if isinstance(a, Bounds) and isinstance(b, Bounds):
        raise NoBoundsError(
            f"{func.__name__} of two values that depend on the input: multiply them first"
        )
    product = bounds_of(torch.matmul, a, b)
    found: Bounds = bounds_of(torch.add, product, shift)
    return found


def _batch_norm(
    func: Any,
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Bounds:
    """Batch norm with given statistics."""
    if training or running_mean is None or running_var is None:
        raise NoBoundsError(
            "batch norm with the statistics of the batch, which one image alone does not decide"
        )
    behind_samples = x.ndim - 1
    slope = (constant(running_var, x.run) + eps).rsqrt()
    if weight is not None:
        slope = slope * constant(weight, x.run)
    slope = along(slope, 0, behind_samples)
    mean = along(constant(running_mean, x.run), 0, behind_samples)
    shift_of_mean = mean * slope
    if bias is None:
        bias = torch.zeros_like(shift_of_mean)
    else:
        bias = along(constant(bias, x.run), 0, behind_samples)
    found = _scaled(x, slope, terms=12, shift=bias - shift_of_mean)
    if found.unrounded:
        return found
    # Computed as (x - mean) * slope + bias or as x * slope + (bias - mean * slope): either is
    # covered.
    of_shift = gamma(12) * (shift_of_mean.abs() + bias.abs())
    error = found.error + of_shift
    return Bounds(
        centre=found.centre,
        radius=found.radius,
        error=error,
        run=x.run,
        changes=found.changes,
    )


def _scaled(x: Bounds, factor: Tensor, *, terms: int, shift: Tensor | None = None) -> Bounds:
    """Bounds of ``factor * x + shift``."""
    factor = factor.to(x.centre.dtype)
    changes = None
    if x.changes is not None:
        changes = x.changes.scaled(factor)
    return _affine(
        x,
        lambda z: z * factor,
        lambda z: z * factor.abs(),
        terms=terms,
        shift=shift,
        changes=changes,
    )


_PLACE_OF_DIVISOR = 5
"""Of average pooling, among the arguments behind the values."""


def _average(func: Any, x: Any, *args: Any, **kwargs: Any) -> Bounds:
    """Sums with weights of one sign: average pooling, ``mean``, ``sum``."""
    check_dtype(x, kwargs.pop("dtype", None))

    def apply(z: Tensor) -> Any:
        return func(z, *args, **kwargs)

    name = func.__name__
    if name.startswith("avg_pool"):
        size = args[0] if args else kwargs.get("kernel_size", 1)
        each_side = size if isinstance(size, tuple | list) else [size]
        spatial = _spatial(name)
        terms = math.prod(each_side) ** (spatial // len(each_side))
    elif name.startswith("adaptive_avg_pool"):
        terms = math.prod(x.shape[-_spatial(name) :])
    else:
        results = apply(x.radius).numel()
        terms = x.centre.numel() // max(1, results)
    divisor = kwargs.get("divisor_override")
    if name.startswith("avg_pool") and len(args) > _PLACE_OF_DIVISOR:
        divisor = args[_PLACE_OF_DIVISOR]
    is_negative = divisor is not None and divisor < 0
    absolute = (lambda z: -apply(z)) if is_negative else apply
    return _affine(x, apply, absolute, terms=terms + 2)


def _spatial(name: str) -> int:
    """Spatial dimensions of a pooling, as in ``avg_pool2d``, whose input may have no channels."""
    return int(name[-2])


def _sum(func: Any, a: Any, b: Any, **kwargs: Any) -> Bounds:
    """Sums and differences."""
    if kwargs:
        raise NoBoundsError("a sum with alpha or out")
    name = func.__name__.strip("_")
    run = run_of((a, b))
    if name == "rsub":
        a, b = b, a
    is_difference = "sub" in name
    like = centre_of_either(a, b)
    first = as_bounds(a, run, like)
    second = as_bounds(b, run, like)
    combined = torch.sub if is_difference else torch.add
    centre = combined(first.centre, second.centre)
    radius = first.radius + second.radius
    if run is not None and run.narrow:
        radius = radius + gamma(4) * (centre.abs() + radius) + SMALLEST
        return Bounds(centre, radius, run=run)
    changes = None
    if not isinstance(b, Bounds):
        changes = _shifted_changes(first, centre.shape)
    elif not isinstance(a, Bounds):
        changes = _shifted_changes(second, centre.shape)
        if changes is not None and is_difference:
            changes = changes.opposite()
    if first.unrounded:
        return Bounds(centre, radius, run=run, changes=changes)
    error = first.error + second.error
    size = centre.detach().abs() + radius + error
    error = error + gamma(2) * size + SMALLEST
    return Bounds(
        centre=centre,
        radius=radius,
        error=within_float32(error),
        run=run,
        changes=changes,
    )


def _shifted_changes(x: Bounds, shape: torch.Size) -> Changes | None:
    """What changed events can do to bounds plus a constant, if that makes no more of them."""
    return x.changes if x.shape == shape else None


def _product(func: Any, a: Any, b: Any, **kwargs: Any) -> Bounds:
    """Products with a constant, and divisions by one."""
    name = func.__name__.strip("_")
    is_division = "div" in name
    if isinstance(a, Bounds) and isinstance(b, Bounds) and not is_division:
        values = nonlinear.product(interval(a), interval(b), rounded=is_rounded(a.run))
        return new_leaf(a.run, [a, b], values)
    x = a
    other = b
    if not isinstance(a, Bounds):
        x = b
        other = a
    if is_division and (kwargs or x is not a or name.startswith("r")):
        raise NoBoundsError("a division by a value that depends on the input, or one that rounds")
    factor = constant(other, x.run).to(x.centre.device)
    if is_division:
        factor = 1.0 / factor
    return _scaled(x, factor, terms=4)


def _negative(func: Any, x: Any) -> Bounds:
    """The opposite."""
    changes = None if x.changes is None else x.changes.opposite()
    return Bounds(
        centre=-x.centre,
        radius=x.radius,
        error=x.error,
        run=x.run,
        changes=changes,
    )


def moved(func: Any, *args: Any, **kwargs: Any) -> Any:
    """A function that only moves elements, of all parts."""
    if func.__name__ == "view":
        func = torch.Tensor.reshape  # parts may be laid out otherwise
    run = run_of(args)
    names = ["centre", "radius"]
    if run is None or run.rounded:
        names.append("error")
    data, *places = args
    if run_of(places) is not None:
        raise NoBoundsError(f"{func.__name__} with a place that depends on the input")
    parts = {name: func(_part(data, name, run), *places, **kwargs) for name in names}
    results = parts["centre"]
    is_one = isinstance(results, Tensor)
    if is_one:
        views = [Bounds(**parts, run=run)]
    else:
        views = []
        for number in range(len(results)):
            of_one = {name: part[number] for name, part in parts.items()}
            views.append(Bounds(**of_one, run=run))
    _move_changes(views, func, args, kwargs)
    return views[0] if is_one else type(results)(views)


def _expanded_as(func: Any, x: Any, other: Tensor) -> Any:
    """``x.expand(other.shape)``."""
    return moved(Tensor.expand, x, other.shape)


def _move_changes(views: list[Bounds], func: Any, args: Any, kwargs: Any) -> None:
    """Give bounds that were moved the changes of where they were."""
    x = args[0]
    if not isinstance(x, Bounds) or x.changes is None:
        return
    name = func.__name__.strip("_")
    apart = name in _ONCE
    if name == "getitem":
        apart = _is_slice(args[1])

    def result(number: int, part: Tensor) -> Tensor:
        found = func(part, *args[1:], **kwargs)
        chosen: Tensor = found if isinstance(found, Tensor) else found[number]
        return chosen

    for number, view in enumerate(views):
        view.changes = x.changes.moved(partial(result, number), apart=apart)


def _is_slice(index: Any) -> bool:
    """Whether an index takes each element once at most, as numbers and slices do."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or isinstance(part, int | slice) for part in parts)


def _part(value: Any, part: str, run: Run | None) -> Any:
    """One part of bounds; what is fixed is its own centre, integers among it."""
    if isinstance(value, Bounds):
        return getattr(value, part)
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            value = value.to(torch.float32 if run is None else run.dtype)
        value = constant(value, run)
        return value if part == "centre" else torch.zeros_like(value)
    if type(value) in (tuple, list):
        return type(value)(_part(item, part, run) for item in value)
    return value


def _asked(func: Any, *args: Any) -> Any:
    """What does not depend on values, such as a shape: the record has it."""
    raise NoBoundsError(f"the operation {func.__name__}")


def _padded(func: Any, x: Any, pad: Any, mode: str = "constant", value: Any = None) -> Any:
    """Padding with zeros or with values of its own."""
    if mode == "constant" and value:
        raise NoBoundsError("a padding with another constant than 0")
    return moved(F.pad, x, pad, mode)


def _dropout(
    func: Any, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    """Dropout that is off."""
    if training:
        raise NoBoundsError("dropout that stays on")
    return x


def _converted(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """A conversion to the dtype that the values have already, or of True and False to numbers."""
    given = [getattr(value, "dtype", value) for value in (*args, *kwargs.values())]
    if func.__name__ == "float":
        given.append(torch.float32)
    check_dtype(x, *given)
    return x


_LAID_OUT = ["flatten", "view", "reshape", "permute", "transpose", "unsqueeze", "squeeze"]
_LAID_OUT += ["movedim", "unflatten", "swapaxes", "flip", "clone", "contiguous"]
_PARTS = ["narrow", "select", "chunk", "split", "unbind"]
_ONCE = _LAID_OUT + _PARTS
"""Functions in whose results each element stands once at most."""

_OPERATIONS: list[tuple[Rule, str]] = [
    (_weighted, "conv1d conv2d conv3d linear"),
    (_batch_norm, "batch_norm"),
    (_transposed, "conv_transpose1d conv_transpose2d conv_transpose3d"),
    (_matmul, "matmul rmatmul bmm mm"),
    (_matmul_and_sum, "addmm baddbmm"),
    (_average, "avg_pool1d avg_pool2d avg_pool3d mean sum"),
    (_average, "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"),
    (_expanded_as, "expand_as"),
    (_asked, "full_like zeros_like ones_like new_full new_zeros new_ones"),
    (_padded, "pad"),
    (_sum, "add radd iadd sub rsub isub"),
    (_product, "mul rmul imul div truediv rdiv rtruediv itruediv idiv"),
    (_negative, "neg"),
    (_dropout, "dropout dropout1d dropout2d dropout3d"),
    (_converted, "to float type_as"),
    (moved, "flatten view reshape expand permute transpose unsqueeze squeeze contiguous"),
    (moved, "clone repeat chunk split getitem cat concat concatenate stack unbind movedim"),
    (moved, "narrow select unflatten swapaxes tile flip"),
    (_asked, "dim size numel stride ndimension len get_device"),
    (_asked, "is_floating_point is_contiguous is_complex"),
    *function_rules.OPERATIONS,
]

for _rule, _names in _OPERATIONS:
    RULES |= dict.fromkeys(_names.split(), _rule)

ASKED = _asked
"""The rule of what does not depend on values."""

OF_TRUTH |= {moved, _expanded_as, function_rules.compared}
