"""Bounds of tensors, and how each operation of a network passes them on: one rule per operation."""

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sj_robust.proofs import nonlinear
from sj_robust.proofs.changes import Changes
from sj_robust.proofs.rounding import SMALLEST, NoBoundsError, gamma, within_float32
from sj_robust.proofs.spiking import Interval

__all__ = [
    "NONLINEAR",
    "RULES",
    "Bounds",
    "Function",
    "Origin",
    "Pooling",
    "Rule",
    "Run",
    "leaves_of",
    "parameters_kept_in_float64",
    "replayed",
    "reshaped",
    "rows_of",
    "step",
]

Pooling = Callable[[Tensor], Tensor]
"""A max pooling; or a ReLU, which is the maximum of a value and zero."""


@dataclass(frozen=True)
class Function:
    """An operation that is no affine map, so that its result is a leaf.

    Attributes:
        name: What a message calls it.
        pooling: What it does, if that is a max pooling or a ReLU of one value.
        along: For each argument the dimension whose values meet.
    """

    name: str
    pooling: Pooling | None = None
    along: tuple[int, ...] = ()


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

    def begin(self, by: Function, arguments: "list[Bounds]", values: Interval) -> "Bounds":
        """A leaf with these values, which an operation gives for arguments."""


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
    shape: torch.Size | None = None


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
    maps. Products of bounds, ReLU and the other functions of
    :mod:`sj_robust.proofs.nonlinear` give an interval, with which a leaf begins. Anything else
    raises :class:`NoBoundsError`.

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
        found.origin = found.origin or Origin(call=call, shape=found.shape)
    elif isinstance(found, tuple | list):
        for part, one in enumerate(found):
            if isinstance(one, Bounds):
                one.origin = one.origin or Origin(call=call, part=part, shape=one.shape)


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


def rows_of(origin: Origin | None, leaves: Callable[[int], Tensor]) -> Tensor:
    """The number of the sample to which each element of bounds belongs. 每个元素所属的样本。

    Args:
        origin: Where the bounds come from.
        leaves: The same for a leaf, by its number.

    Examples:
        >>> x = Bounds(torch.ones(2, 3).double(), torch.zeros(2, 3).double())
        >>> x.origin = Origin(leaf=0)
        >>> rows_of((3 * x.transpose(0, 1)).origin, lambda _: torch.tensor([[0] * 3, [1] * 3]))
        tensor([[0, 1],
                [0, 1],
                [0, 1]])
    """
    made: dict[_Call, Any] = {}

    def rows(value: Any) -> Any:
        if type(value) in (tuple, list):
            return type(value)(map(rows, value))
        if not isinstance(value, Origin):
            return value
        if value.leaf is not None:
            return leaves(value.leaf)
        call = value.call
        assert call is not None
        if call not in made:
            made[call] = _rows_behind(call, rows(call.args))
        found = made[call] if value.part is None else made[call][value.part]
        return _spread(found, value.shape)

    found: Tensor = rows(origin)
    return found


def _rows_behind(call: _Call, args: Any) -> Any:
    """Samples of the results of a call, for those of its arguments."""
    name = call.func.__name__.strip("_")
    if call.rule is _moved:
        func = torch.Tensor.reshape if name == "view" else call.func
        return func(*args, **call.kwargs)
    first = _first_rows(args, call.args)
    if name in ("mean", "sum"):
        dim = [*args[1:], call.kwargs.get("dim")][0]
        keepdim = call.kwargs.get("keepdim", args[2] if len(args) > 2 else False)
        dims = tuple(range(first.ndim)) if dim is None else dim
        return first.amax(dims, keepdim)
    return first


def _first_rows(args: Any, origins: Any) -> Tensor:
    """Of the first argument that is bounds and has most dimensions."""
    some = [one for one, origin in zip(args, origins, strict=True) if isinstance(origin, Origin)]
    found: Tensor = max(some, key=lambda one: one.ndim)
    return found


def _spread(rows: Tensor, shape: torch.Size | None) -> Tensor:
    """Samples of the elements of a result, in which a dimension may have another size."""
    assert shape is not None
    if rows.ndim == len(shape):
        for dim, size in enumerate(shape):
            if rows.shape[dim] != size:
                rows = rows.narrow(dim, 0, 1)
    return rows.expand(shape)


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
        raise NoBoundsError("a weight or a divisor that depends on the input")
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


def _transposed(
    func: Any, x: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any
) -> Bounds:
    """Transposed convolution."""
    weight = _constant(weight, x.run).to(x.centre.dtype)
    shift = None if bias is None else _constant(bias, x.run)
    if shift is not None:
        shift = shift.view(-1, *[1] * (weight.ndim - 2))
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
    run = _run_of((a, b))
    if isinstance(a, Bounds) and isinstance(b, Bounds):
        if a.ndim < 2 or b.ndim < 2:
            raise NoBoundsError("a product of vectors that depend on the input")
        values = nonlinear.matmul(_interval(a), _interval(b), rounded=_is_rounded(run))
        return _begin(run, Function("a matrix product", along=(-1, -2)), [a, b], values)
    x, other = (a, b) if isinstance(a, Bounds) else (b, a)
    weight = _constant(other, run).to(x.centre.dtype)
    first = x is a

    def apply(z: Tensor, weight: Tensor = weight) -> Tensor:
        found: Tensor = torch.matmul(z, weight) if first else torch.matmul(weight, z)
        return found

    terms = weight.shape[0 if weight.ndim == 1 else (-2 if first else -1)] + 2
    return _affine(x, apply, lambda z: apply(z, weight.abs()), terms=terms)


def _matmul_and_sum(
    func: Any, shift: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1
) -> Bounds:
    """A matrix product and what is added to it."""
    if beta != 1 or alpha != 1:
        raise NoBoundsError("a matrix product with alpha or beta")
    found: Bounds = _dispatched(torch.add, _dispatched(torch.matmul, a, b), shift)
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
    if isinstance(a, Bounds) and isinstance(b, Bounds) and "mul" in name:
        values = nonlinear.product(_interval(a), _interval(b), rounded=_is_rounded(a.run))
        return _begin(a.run, Function("a product"), [a, b], values)
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


def _interval(x: Bounds) -> Interval:
    """What float32 can give."""
    return Interval(x.lower, x.upper)


def _is_rounded(run: Run | None) -> bool:
    return run is None or run.rounded


def _begin(run: Run | None, by: Function, arguments: list[Bounds], values: Interval) -> Bounds:
    """A leaf in the run of its arguments."""
    if run is None:
        raise NoBoundsError(f"{by.name} outside a run")
    return run.begin(by, arguments, values)


def _dispatched(func: Any, *args: Any) -> Any:
    """What a function of bounds gives, as if the network had called it."""
    # torch lacks the type
    return Bounds.__torch_function__(func, (), args)


def reshaped(x: Bounds, shape: torch.Size) -> Bounds:
    """Bounds in another shape. 改变形状。"""
    if x.shape == shape:
        return x
    found: Bounds = _dispatched(torch.Tensor.reshape, x, shape)
    return found


def _largest_of(func: Any, x: Any, *args: Any, **kwargs: Any) -> Bounds:
    """Max pooling."""
    if kwargs.pop("return_indices", False):
        raise NoBoundsError("a max pooling that returns indices")

    def pooling(z: Tensor) -> Tensor:
        found: Tensor = func(z, *args, **kwargs)
        return found

    by = Function("a max pooling", pooling)
    return _begin(x.run, by, [x], _interval(x).each(pooling))


def _rectified(func: Any, x: Any, inplace: bool = False) -> Bounds:
    """ReLU."""
    if inplace:
        raise NoBoundsError("a ReLU that writes into its input: take inplace=False")
    return _begin(x.run, Function("a ReLU", torch.relu), [x], _interval(x).each(torch.relu))


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

    values = of_one(_interval(x), function, name, rounded=_is_rounded(x.run))
    return _begin(x.run, Function(name), [x], values)


def _rounded_number(value: Any, x: Bounds) -> Any:
    """A number beside a tensor of the network, as that holds it."""
    if not isinstance(value, float):
        return value
    return float(torch.as_tensor(value, dtype=x.dtype))


def _extremum(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """The largest or smallest value along a dimension, or of two values."""
    name = func.__name__.strip("_")
    run = _run_of((x, *args))
    if name in ("maximum", "minimum"):
        low, high = (_as_bounds(part, run, _like(x, args[0])) for part in (x, args[0]))
        ends = Interval(func(low.lower, high.lower), func(low.upper, high.upper))
        bounded = [part for part in (x, args[0]) if isinstance(part, Bounds)]
        return _begin(run, Function(f"a {name}"), bounded, ends)
    if args and isinstance(args[0], Tensor):
        same = torch.maximum if name == "max" else torch.minimum
        return _extremum(same, x, args[0])
    alone = torch.amax if name.endswith("max") else torch.amin
    dim = args[0] if args else kwargs.get("dim")
    if not isinstance(dim, int):
        raise NoBoundsError(f"{name} over several dimensions")
    keepdim = args[1] if len(args) > 1 else kwargs.get("keepdim", False)
    values = _interval(x).each(lambda end: alone(end, dim, keepdim=True))
    found = _begin(run, Function(f"a {name}", along=(dim,)), [x], values)
    if not keepdim:
        found = _dispatched(torch.Tensor.squeeze, found, dim)
    return found if name.startswith("a") else _Largest(found, None)


class _Largest(NamedTuple):
    """What ``max`` along a dimension gives, without the places."""

    values: Any
    indices: Any


def _like(a: Any, b: Any) -> Tensor:
    """The centre of the one of two that is bounds."""
    centre: Tensor = (a if isinstance(a, Bounds) else b).centre
    return centre


def _compared(func: Any, a: Any, b: Any) -> Bounds:
    """Whether a value is at least, or above, another one: 1 or 0."""
    run = _run_of((a, b))
    like = _like(a, b)
    name = func.__name__.strip("_")
    first, second = (_as_bounds(part, run, like) for part in (a, b))
    if name in ("le", "lt"):
        first, second = second, first
    reached = torch.ge if name in ("ge", "le") else torch.gt
    low = reached(first.lower, second.upper).to(like.dtype)
    high = reached(first.upper, second.lower).to(like.dtype)
    bounded = [part for part in (a, b) if isinstance(part, Bounds)]
    return _begin(run, Function("a comparison"), bounded, Interval(low, high))


def _chosen(func: Any, where: Any, a: Any, b: Any) -> Bounds:
    """One of two values, as a third one says."""
    run = _run_of((where, a, b))
    bounded = [part for part in (where, a, b) if isinstance(part, Bounds)]
    like = bounded[0].centre
    first, second = (_as_bounds(part, run, like) for part in (a, b))
    if isinstance(where, Bounds):
        decided = _interval(where)
    else:
        given = where.to(like.dtype)
        decided = Interval(given, given)
    values = nonlinear.chosen(decided, _interval(first), _interval(second))
    return _begin(run, Function("a choice"), bounded, values)


def _softmax(func: Any, x: Any, dim: int, *args: Any, **kwargs: Any) -> Bounds:
    """Softmax along a dimension."""
    values = nonlinear.softmax(_interval(x), dim, rounded=_is_rounded(x.run))
    return _begin(x.run, Function("a softmax", along=(dim,)), [x], values)


def _layer_norm(
    func: Any, x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Bounds:
    """Layer norm: the values of the last dimensions are a group."""
    group = _dispatched(torch.Tensor.flatten, x, -len(shape))
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
        return _constant(value, x.run).repeat_interleave(elements).view(groups, -1)

    found = _normalised(group, "a group norm", eps, of_groups(weight), of_groups(bias))
    return reshaped(found, x.shape)


def _flat(value: Any, x: Bounds) -> Any:
    return None if value is None else _constant(value, x.run).flatten()


def _normalised(group: Any, name: str, eps: float, factor: Any, shift: Any) -> Bounds:
    """Groups [*, n] of values, less their mean and divided by their deviation."""
    like = group.radius
    mean = _average(torch.mean, group, -1, keepdim=True)
    deviation = _sum(torch.sub, group, mean)
    values = nonlinear.normalised(
        _interval(group),
        _interval(deviation),
        eps,
        like.new_ones(()) if factor is None else factor.to(like),
        like.new_zeros(()) if shift is None else shift.to(like),
        rounded=_is_rounded(group.run),
    )
    return _begin(group.run, Function(name, along=(-1,)), [group], values)


def step(x: Bounds, function: Callable[[Tensor], Tensor]) -> Bounds:
    """Of a surrogate's forward: 1 where the value is >= 0. 阶跃函数的上下界。

    Args:
        x: The values.
        function: The forward, whose gradient a differentiable run takes.
    """
    ends = nonlinear.steps(_interval(x)) if _is_rounded(x.run) else _interval(x).each(function)
    return _begin(x.run, Function("a surrogate"), [x], ends)


def _filled(func: Any, x: Any, *args: Any, **kwargs: Any) -> Tensor:
    """A new tensor of the shape of a value, which does not depend on it."""
    kwargs.setdefault("dtype", x.dtype)
    kwargs.setdefault("device", x.device)
    kwargs.pop("memory_format", None)
    name = func.__name__
    fill: Any = getattr(torch, name.removeprefix("new_").removesuffix("_like"))
    shape = [x.shape] if name.endswith("_like") else []
    found: Tensor = fill(*shape, *args, **kwargs)
    return found


def _padded(func: Any, x: Any, pad: Any, mode: str = "constant", value: Any = None) -> Any:
    """Padding with zeros or with values of its own."""
    if mode == "constant" and value:
        raise NoBoundsError("a padding with another constant than 0")
    return _moved(F.pad, x, pad, mode)


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
    (_transposed, "conv_transpose1d conv_transpose2d conv_transpose3d"),
    (_matmul, "matmul rmatmul bmm mm"),
    (_matmul_and_sum, "addmm baddbmm"),
    (_average, "avg_pool1d avg_pool2d avg_pool3d mean sum"),
    (_average, "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"),
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
    (_filled, "full_like zeros_like ones_like new_full new_zeros new_ones"),
    (_padded, "pad"),
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

_NONLINEAR = [_matmul, _matmul_and_sum, _product, _largest_of, _rectified, _function, _extremum]
_NONLINEAR += [_compared, _chosen, _softmax, _layer_norm, _group_norm]

RULES: dict[str, Rule] = {}
"""The rule of every operation of which bounds are known, by torch's name without underscores."""

for _rule, _names in _OPERATIONS:
    RULES |= dict.fromkeys(_names.split(), _rule)

NONLINEAR = [name for name, rule in RULES.items() if rule in _NONLINEAR]
"""Operations whose results may begin a leaf: no affine maps of the input."""
