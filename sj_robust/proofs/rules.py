"""Bounds of tensors, and how each operation of a network passes them on: one rule per operation."""

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sj_robust.proofs.changes import Changes
from sj_robust.proofs.rounding import SMALLEST, NoBoundsError, gamma, within_float32

__all__ = [
    "RULES",
    "Bounds",
    "Origin",
    "Pooling",
    "Rule",
    "Run",
    "leaves_of",
    "parameters_kept_in_float64",
    "replayed",
]

Pooling = Callable[[Tensor], Tensor]
"""A max pooling; or a ReLU, which is the maximum of a value and zero."""

Rule = Callable[..., Any]
"""Bounds of an operation: called with torch's function and its arguments, of which one or more are
bounds.
"""


class Run(Protocol):
    """What the rules know of the run that bounds belong to."""

    differentiable: bool
    """Whether bounds keep their graph to the weights."""

    rounded: bool
    """Whether bounds have what float32 rounds."""

    narrow: bool
    """Whether bounds are computed in float32, and what that rounds is part of their radius."""

    points: bool
    """Whether leaves are single values, so that radii are zero and nobody asks for errors."""

    dtype: torch.dtype
    """Of the network."""

    def pool(self, x: "Bounds", pooling: Pooling) -> "Bounds":
        """Bounds of a max pooling or a ReLU."""


@dataclass(frozen=True, eq=False)
class _Call:
    """A call of a rule, with origins in the place of bounds."""

    rule: Rule
    func: Any
    args: Any
    kwargs: Any


@dataclass(frozen=True, eq=False)
class Origin:
    """Where bounds come from: a leaf of their run, or a call of a rule and the number of the result
    if it has several.
    """

    leaf: int | None = None
    call: _Call | None = None
    part: int | None = None


class Bounds(Tensor):
    """Every value that a float32 tensor of a network can have while the input moves: ``centre -+
    (radius + error)``.

    In exact arithmetic a value is within ``centre -+ radius``; what float32 computes is at most
    ``error`` away from that. All three are float64. ``centre`` is kept as a graph down to the
    leaves (the input, the outputs of spiking layers and of max poolings), of which it is an affine
    function. 张量所有可能取值的上下界。

    In a run that is not ``rounded`` bounds are ``unrounded``: nothing asks for ``error``. If it is
    ``narrow``, centre and radius are float32. In a ``differentiable`` one, which is for training,
    they are in the precision of the input and keep their graph to the weights.

    Equation, for ``y = A x + b`` with n terms summed in any order, ``u = 2**-24`` and ``gamma = n u
    / (1 - n u)``::

        centre' = A centre + b
        radius' = |A| radius
        error'  = |A| (error + gamma (|centre| + radius + error)) + gamma |b|

    Convolution, linear, batch norm in evaluation mode, average pooling, sums and reshapes are such
    maps. Max pooling and ReLU are monotone: bounds of their results are the results of bounds.
    Anything else raises :class:`NoBoundsError`.

    If at most some events of the input change, the input itself is ``centre``, and ``changes``
    says how far one budget for all of them moves each value: a fall and a rise, where ``radius`` is
    the larger of the two. It is known for the first convolution or linear map, and for what only
    scales, shifts or moves elements; behind other operations it is None, and values are bounded as
    if each had a budget of its own.

    Args:
        centre: Middle of the values.
        radius: How far the exact value can be from it; broadcast.
        error: How far float32 can be from the exact value; broadcast, None for values that are
            exact.
        run: The run whose leaves ``centre`` depends on.
        changes: What changed events can do.

    Source: interval arithmetic; rounding as in Higham, "Accuracy and Stability of Numerical
        Algorithms" (2002), ch. 3.

    Examples:
        >>> x = Bounds(torch.tensor([[0.5]]).double(), torch.tensor([[0.25]]).double())
        >>> y = 2 * x + 1
        >>> float(y.centre), float(y.radius), 0 < float(y.error) < 1e-6
        (2.0, 0.5, True)
    """

    centre: Tensor
    radius: Tensor
    error: Tensor
    unrounded: bool
    run: Run | None
    changes: Changes | None
    origin: Origin | None
    """Which leaf they are, or how they follow from leaves; see :func:`replayed`."""

    family: list[weakref.ref[Tensor]]
    """This and the views that may share its memory: what is done in place to one of them changes
    all.
    """

    @staticmethod
    def __new__(
        cls,
        centre: Tensor,
        radius: Tensor,
        error: Tensor | None = None,
        run: Run | None = None,
        changes: Changes | None = None,
    ) -> "Bounds":
        """Wrap the parts; see the class."""
        unrounded = run is not None and not run.rounded
        dtype = torch.float32 if run is None else run.dtype
        if run is not None and run.differentiable:
            dtype = centre.dtype
        self: Bounds = Tensor._make_wrapper_subclass(
            cls, centre.shape, dtype=dtype, device=centre.device
        )
        self.centre, self.run, self.unrounded = centre, run, unrounded
        self.origin = None
        self.changes = changes
        self.radius = radius.expand(centre.shape)
        self.family = [weakref.ref(self)]
        if unrounded:
            self.error = radius.new_zeros(())
        else:
            self.error = (
                torch.zeros_like(self.radius) if error is None else error.expand(centre.shape)
            )
        return self

    @property
    def lower(self) -> Tensor:
        """Smallest value that float32 can give."""
        return self.least if self.unrounded else self.least - self.error

    @property
    def upper(self) -> Tensor:
        """Largest value that float32 can give."""
        return self.most if self.unrounded else self.most + self.error

    @property
    def least(self) -> Tensor:
        """Smallest value in exact arithmetic."""
        fall = self.radius if self.changes is None else self.changes.lowered()
        return self._middle - fall

    @property
    def most(self) -> Tensor:
        """Largest value in exact arithmetic."""
        rise = self.radius if self.changes is None else self.changes.raised()
        return self._middle + rise

    @property
    def _middle(self) -> Tensor:
        """The centre, without its graph where no gradient is asked for."""
        return self.centre if self.unrounded else self.centre.detach()

    def has_views(self) -> bool:
        """Whether another tensor may share its memory."""
        views = [reference() for reference in self.family]
        return any(view is not None and view is not self for view in views)

    def same(self) -> "Bounds":
        """These bounds as they are now, whatever is done in place to them later."""
        found = Bounds(self.centre, self.radius, self.error, self.run, self.changes)
        found.origin = self.origin
        return found

    # torch lacks the type
    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Shape alone: tensors of a network are large."""
        return f"Bounds({tuple(self.shape)})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Bounds of a function of bounds."""
        kwargs = dict(kwargs or {})
        named = [kwargs.pop(key) for key in ("input", "tensors", "other") if key in kwargs]
        args = (*args, *named)
        name = func.__name__.strip("_")
        rule = RULES.get(name)
        in_place = func.__name__ == f"{name}_" or name in _IN_PLACE
        if func.__name__ == "__float__":
            raise NoBoundsError("float(x), a number that depends on the input")
        if kwargs.get("out") is not None or (in_place and rule not in (_sum, _product, _negative)):
            raise NoBoundsError(f"{func.__name__}, which writes into a tensor: write x = f(x)")
        if rule is None:
            raise NoBoundsError(f"the operation {name}")
        try:
            with torch._C.DisableTorchFunctionSubclass():
                call = _Call(rule, func, _origins(args), kwargs)
                found = rule(func, *args, **kwargs)
                _note(found, call)
                return _written(args[0], found, func.__name__) if in_place else found
        except TypeError as error:  # a rule does not know an argument, or the call is wrong
            raise NoBoundsError(f"the operation {name} as it is called here ({error})") from error

    @classmethod
    # torch declares its default, which is a function
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """What reaches torch's dispatcher came around the rules above."""
        raise NoBoundsError(f"the operation {func}")


def _written(x: Any, result: Bounds, name: str) -> Bounds:
    """``x`` with the parts of a result, so that all who hold it see them."""
    if not isinstance(x, Bounds) or x.shape != result.shape or x.has_views():
        raise NoBoundsError(
            f"{name} on a view, on what has one, or on a constant: write x = x + y instead of x "
            "+= y"
        )
    x.centre, x.radius, x.error = result.centre, result.radius, result.error
    x.origin, x.changes = result.origin, result.changes
    return x


def _origins(value: Any) -> Any:
    """Arguments with origins in the place of bounds."""
    if isinstance(value, Bounds):
        return value.origin
    if type(value) in (tuple, list):
        return type(value)(map(_origins, value))
    return value


def _note(found: Any, call: _Call) -> None:
    """Say of new bounds which call they come from."""
    if isinstance(found, Bounds):
        found.origin = found.origin or Origin(call=call)
    elif isinstance(found, tuple | list):
        for part, one in enumerate(found):
            if isinstance(one, Bounds):
                one.origin = one.origin or Origin(call=call, part=part)


def replayed(origin: Origin, leaves: Mapping[int, Bounds]) -> Bounds:
    """What the calls behind bounds give for other leaves of the same shapes. 以其他叶子重算上下界。

    Args:
        origin: Where the bounds come from.
        leaves: Bounds by number of the leaf.

    Examples:
        >>> x = Bounds(torch.ones(2).double(), torch.zeros(2).double())
        >>> x.origin = Origin(leaf=0)
        >>> y = 3 * x + 1
        >>> other = Bounds(torch.zeros(2).double(), torch.ones(2).double())
        >>> again = replayed(y.origin, {0: other})
        >>> again.centre.tolist(), again.radius.tolist()
        ([1.0, 1.0], [3.0, 3.0])
    """
    made: dict[_Call, Any] = {}

    def value_of(value: Any) -> Any:
        if type(value) in (tuple, list):
            return type(value)(map(value_of, value))
        if not isinstance(value, Origin):
            return value
        if value.leaf is not None:
            return leaves[value.leaf]
        call = value.call
        assert call is not None
        if call not in made:
            made[call] = call.rule(call.func, *value_of(call.args), **call.kwargs)
        return made[call] if value.part is None else made[call][value.part]

    with torch._C.DisableTorchFunctionSubclass():
        found: Bounds = value_of(origin)
    return found


def leaves_of(origin: Origin | None) -> set[int]:
    """Numbers of the leaves that bounds depend on."""
    found: set[int] = set()
    seen: set[int] = set()
    waiting: list[Any] = [origin]
    while waiting:
        value = waiting.pop()
        if type(value) in (tuple, list):
            waiting += value
        elif isinstance(value, Origin):
            if value.leaf is not None:
                found.add(value.leaf)
            elif id(value.call) not in seen:
                assert value.call is not None
                seen.add(id(value.call))
                waiting.append(value.call.args)
    return found


def _asked(func: Any, *args: Any, **kwargs: Any) -> Any:
    """What does not depend on values, such as a shape."""
    return func(*args, **kwargs)


def _moved(func: Any, *args: Any, **kwargs: Any) -> Any:
    """A function that only moves elements, of all parts."""
    copies = func.__name__ in _COPIES
    if func.__name__ == "view":
        func = torch.Tensor.reshape  # parts may be laid out otherwise
    run = _run_of(args)
    names = ["centre", "radius"]
    if run is None or run.rounded:
        names.append("error")
    parts = [func(*_part(args, name, run), **kwargs) for name in names]
    alone = isinstance(parts[0], Tensor)
    of_each = [parts] if alone else list(zip(*parts, strict=True))
    views = [Bounds(**dict(zip(names, of_one, strict=True)), run=run) for of_one in of_each]
    _move_changes(views, func, args, kwargs)
    found = views[0] if alone else type(parts[0])(views)
    if not copies and isinstance(args[0], Bounds):
        for view in views:
            args[0].family += view.family
            view.family = args[0].family
    return found


def _move_changes(views: list[Bounds], func: Any, args: Any, kwargs: Any) -> None:
    """Give bounds that were moved the changes of where they were."""
    x = args[0]
    if not isinstance(x, Bounds) or x.changes is None:
        return
    name = func.__name__.strip("_")
    apart = name in _ONCE or (name == "getitem" and _is_slice(args[1]))
    for number, view in enumerate(views):

        def move(part: Tensor, number: int = number) -> Tensor:
            moved = func(part, *args[1:], **kwargs)
            result: Tensor = moved if isinstance(moved, Tensor) else moved[number]
            return result

        view.changes = x.changes.moved(move, apart=apart)


def _is_slice(index: Any) -> bool:
    """Whether an index takes each element once at most, as numbers and slices do."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or isinstance(part, int | slice) for part in parts)


def _part(value: Any, part: str, run: Run | None) -> Any:
    """One part of bounds; what is fixed is its own centre."""
    if isinstance(value, Bounds):
        return getattr(value, part)
    if isinstance(value, Tensor) and value.is_floating_point():
        value = _constant(value, run)
        return value if part == "centre" else torch.zeros_like(value)
    if type(value) in (tuple, list):
        return type(value)(_part(item, part, run) for item in value)
    return value


def _run_of(value: Any) -> Run | None:
    """The run of the first bounds among arguments."""
    if isinstance(value, Bounds):
        return value.run
    if type(value) in (tuple, list):
        for item in value:
            run = _run_of(item)
            if run is not None:
                return run
    return None


def _constant(value: Any, run: Run | None) -> Tensor:
    """A weight: in float64 and without a graph, or as it is in a differentiable run."""
    if isinstance(value, Bounds):
        raise NoBoundsError("a product of two values that depend on the input")
    number = torch.float32 if run is None else run.dtype
    found: Tensor = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=number)
    if run is not None and run.differentiable:
        return found
    if found.ndim == 0:
        found = found.to(number)  # as torch does beside a tensor of the network
    return _in_float64(found)


_DOUBLES: ContextVar[dict[int, tuple[Tensor, int, Tensor]] | None] = ContextVar(
    "_DOUBLES", default=None
)


@contextmanager
def parameters_kept_in_float64() -> Iterator[None]:
    """Context in which every parameter is converted once, for all runs; also a decorator."""
    token = _DOUBLES.set({})
    try:
        yield
    finally:
        _DOUBLES.reset(token)


def _in_float64(value: Tensor) -> Tensor:
    known = _DOUBLES.get()
    if known is None or not isinstance(value, nn.Parameter):
        return value.detach().double()
    parameter, version, found = known.get(id(value), (None, -1, value))
    if parameter is not value or version != value._version:
        found = value.detach().double()
        known[id(value)] = value, value._version, found
    return found


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
    """
    shift = x.centre.new_zeros(()) if shift is None else shift.to(x.centre.dtype)
    centre = apply(x.centre) + shift
    if x.run is not None and x.run.points:
        return Bounds(centre, centre.detach().new_zeros(()), run=x.run)
    growth = gamma(terms)
    if x.run is not None and x.run.narrow:
        # what the sums of both, and of this, round is at most twice growth; it is in the radius,
        # which changes, unrounded, would stand in the place of
        radius = (1.0 + 4.0 * growth) * absolute(x.radius + growth * x.centre.abs())
        radius = radius + growth * (shift.abs() + centre.abs()) + terms * SMALLEST
        return Bounds(centre, radius, run=x.run)
    radius = absolute(x.radius) if changes is None else changes.radius()
    if x.unrounded:
        return Bounds(centre, radius, run=x.run, changes=changes)
    largest = x.centre.detach().abs() + x.radius + x.error
    error = absolute(x.error + growth * largest) + growth * shift.abs() + terms * SMALLEST
    return Bounds(centre, radius, within_float32(error), x.run, changes)


def _weighted(
    func: Any, x: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any
) -> Bounds:
    """Convolution and linear."""
    weight = _constant(weight, x.run).to(x.centre.dtype)
    magnitude = cache(weight.abs)
    shift = None if bias is None else _constant(bias, x.run)
    if shift is not None and weight.ndim > 2:
        shift = shift.view(-1, *[1] * (weight.ndim - 2))
    return _affine(
        x,
        lambda z: func(z, weight, None, *args, **kwargs),
        lambda z: func(z, magnitude(), None, *args, **kwargs),
        terms=weight[0].numel() + 2,
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
    shape = func(x.radius.to("meta"), weight.to("meta"), None, *args, **kwargs).shape
    if func.__name__ == "linear":
        return x.changes.linear(weight, shape)
    if func.__name__ != "conv2d":
        return None
    names = ("stride", "padding", "dilation", "groups")
    given = dict(zip(names, args, strict=False)) | kwargs
    return x.changes.convolved(weight, shape, **given)


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
    shape = (-1, *[1] * (x.ndim - 2))
    slope = (_constant(running_var, x.run) + eps).rsqrt()
    if weight is not None:
        slope = slope * _constant(weight, x.run)
    slope = slope.view(shape)
    moved = _constant(running_mean, x.run).view(shape) * slope
    bias = torch.zeros_like(moved) if bias is None else _constant(bias, x.run).view(shape)
    found = _scaled(x, slope, terms=12, shift=bias - moved)
    if found.unrounded:
        return found
    # Computed as (x - mean) * slope + bias or as x * slope + (bias - mean * slope): either is
    # covered.
    error = found.error + gamma(12) * (moved.abs() + bias.abs())
    return Bounds(found.centre, found.radius, error, x.run, found.changes)


def _scaled(x: Bounds, factor: Tensor, *, terms: int, shift: Tensor | None = None) -> Bounds:
    """Bounds of ``factor * x + shift``."""
    factor = factor.to(x.centre.dtype)
    return _affine(
        x,
        lambda z: z * factor,
        lambda z: z * factor.abs(),
        terms=terms,
        shift=shift,
        changes=None if x.changes is None else x.changes.scaled(factor),
    )


def _average(func: Any, x: Any, *args: Any, **kwargs: Any) -> Bounds:
    """Sums with weights >= 0: average pooling, ``mean``, ``sum``."""
    _converted(func, x, kwargs.pop("dtype", None))
    size = args[0] if args else kwargs.get("kernel_size", 1)
    if not func.__name__.startswith("avg_pool"):
        pooled = "pool" in func.__name__
        terms = math.prod(x.shape[2:]) if pooled else _terms_of_sum(func, x, *args, **kwargs)
    elif isinstance(size, tuple | list):
        terms = math.prod(size)
    else:
        terms = int(size) ** (x.ndim - 2)

    def apply(z: Tensor) -> Any:
        return func(z, *args, **kwargs)

    return _affine(x, apply, apply, terms=terms + 2)


def _terms_of_sum(func: Any, x: Bounds, *args: Any, **kwargs: Any) -> int:
    """How many values each value of a sum or mean is made of."""
    results: int = func(x.radius, *args, **kwargs).numel()
    return x.numel() // max(1, results)


def _sum(func: Any, a: Any, b: Any, **kwargs: Any) -> Bounds:
    """Sums and differences."""
    if kwargs:
        raise NoBoundsError("a sum with alpha or out")
    name, run = func.__name__.strip("_"), _run_of((a, b))
    if name == "rsub":
        a, b = b, a
    like = (a if isinstance(a, Bounds) else b).centre
    first = _as_bounds(a, run, like)
    second = _as_bounds(b, run, like)
    centre = first.centre - second.centre if "sub" in name else first.centre + second.centre
    radius = first.radius + second.radius
    if run is not None and run.narrow:
        radius = radius + gamma(4) * (centre.abs() + radius) + SMALLEST
        return Bounds(centre, radius, run=run)
    changes = None
    if not isinstance(b, Bounds):
        changes = _shifted_changes(first, centre.shape)
    elif not isinstance(a, Bounds):
        changes = _shifted_changes(second, centre.shape)
        if changes is not None and "sub" in name:
            changes = changes.opposite()
    if first.unrounded:
        return Bounds(centre, radius, run=run, changes=changes)
    error = first.error + second.error
    size = centre.detach().abs() + radius + error
    error = within_float32(error + gamma(2) * size + SMALLEST)
    return Bounds(centre, radius, error, run, changes)


def _shifted_changes(x: Bounds, shape: torch.Size) -> Changes | None:
    """What changed events can do to bounds plus a constant, if that makes no more of them."""
    return x.changes if x.shape == shape else None


def _as_bounds(value: Any, run: Run | None, like: Tensor) -> Bounds:
    """Bounds, or a constant as bounds that nothing moves."""
    if isinstance(value, Bounds):
        return value
    centre = _constant(value, run).to(like)
    return Bounds(centre, torch.zeros_like(centre), run=run)


def _product(func: Any, a: Any, b: Any, **kwargs: Any) -> Bounds:
    """Products with a constant, and divisions by one."""
    name = func.__name__.strip("_")
    x, other = (a, b) if isinstance(a, Bounds) else (b, a)
    divides = "div" in name
    if divides and (kwargs or x is not a or name.startswith("r")):
        raise NoBoundsError("a division by a value that depends on the input, or one that rounds")
    factor = _constant(other, x.run).to(x.centre.device)
    return _scaled(x, 1.0 / factor if divides else factor, terms=4)


def _negative(func: Any, x: Any) -> Bounds:
    """The opposite."""
    changes = None if x.changes is None else x.changes.opposite()
    return Bounds(-x.centre, x.radius, x.error, x.run, changes)


def _largest_of(func: Any, x: Any, *args: Any, **kwargs: Any) -> Bounds:
    """Max pooling."""
    if kwargs.pop("return_indices", False):
        raise NoBoundsError("a max pooling that returns indices")
    if x.run is None:
        raise NoBoundsError("a max pooling outside a run")
    run: Run = x.run
    return run.pool(x, lambda z: func(z, *args, **kwargs))


def _rectified(func: Any, x: Any, inplace: bool = False) -> Bounds:
    """ReLU."""
    if inplace:
        raise NoBoundsError("a ReLU that writes into its input: take inplace=False")
    if x.run is None:
        raise NoBoundsError("a ReLU outside a run")
    run: Run = x.run
    return run.pool(x, torch.relu)


def _dropout(
    func: Any, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    """Dropout that is off."""
    if training:
        raise NoBoundsError("dropout that stays on")
    return x


def _converted(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """A conversion to the dtype that the values have already."""
    given = [getattr(value, "dtype", value) for value in (*args, *kwargs.values())]
    if func.__name__ == "float":
        given.append(torch.float32)
    for dtype in given:
        if isinstance(dtype, torch.dtype) and dtype != x.dtype:
            raise NoBoundsError(f"a conversion to {dtype}: bounds are those of {x.dtype}")
    return x


_IN_PLACE = ["iadd", "isub", "imul", "itruediv", "idiv"]
_ONCE = ["clone", "contiguous", "flatten", "view", "reshape", "permute", "transpose", "unsqueeze"]
_ONCE += ["squeeze", "movedim", "unflatten", "swapaxes", "flip", "narrow", "select", "chunk"]
_ONCE += ["split", "unbind"]
"""Functions in whose results each element stands once at most."""
_COPIES = ["clone", "repeat", "cat", "concat", "concatenate", "stack", "tile", "flip"]

_OPERATIONS: list[tuple[Rule, str]] = [
    (_weighted, "conv1d conv2d conv3d linear"),
    (_batch_norm, "batch_norm"),
    (_average, "avg_pool1d avg_pool2d avg_pool3d mean sum"),
    (_average, "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"),
    (_largest_of, "max_pool1d max_pool2d max_pool3d"),
    (_largest_of, "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"),
    (_rectified, "relu"),
    (_sum, "add radd iadd sub rsub isub"),
    (_product, "mul rmul imul div truediv rdiv rtruediv itruediv idiv"),
    (_negative, "neg"),
    (_dropout, "dropout dropout1d dropout2d dropout3d"),
    (_converted, "to float type_as"),
    (_moved, "flatten view reshape expand permute transpose unsqueeze squeeze contiguous"),
    (_moved, "clone repeat chunk split getitem cat concat concatenate stack unbind movedim"),
    (_moved, "narrow select unflatten swapaxes tile flip"),
    (_asked, "get dim size numel stride ndimension len get_device"),
    (_asked, "is_floating_point is_contiguous is_complex"),
]

RULES: dict[str, Rule] = {}
"""The rule of every operation of which bounds are known, by torch's name without underscores."""

for _rule, _names in _OPERATIONS:
    RULES |= dict.fromkeys(_names.split(), _rule)
