"""A tensor of bounds, which passes every torch function to its rule; constants beside it, and the
arguments of rules.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sj_robust.proofs.changes import Changes
from sj_robust.proofs.rounding import NoBoundsError
from sj_robust.proofs.spiking import Interval

__all__ = [
    "ON_TRUTH",
    "RULES",
    "Bounds",
    "Call",
    "Function",
    "HeldPotential",
    "Origin",
    "Pooling",
    "Refusal",
    "Rule",
    "Run",
    "as_bounds",
    "by_value",
    "centre_of_either",
    "check_dtype",
    "check_numbers",
    "constant",
    "dispatched",
    "in_float64",
    "interval",
    "is_rounded",
    "is_truth",
    "new_leaf",
    "parameters_kept_in_float64",
    "reshaped",
    "ruled",
    "run_of",
    "size_of_constant",
]

Pooling = Callable[[Tensor], Tensor]
"""A max pooling."""


@dataclass(frozen=True)
class Function:
    """An operation that is not an affine map, so that its result is a leaf.

    Attributes:
        name: What a message calls it.
        pooling: What it does, if that is a max pooling.
        along: For each argument the dimension whose values meet.
    """

    name: str
    pooling: Pooling | None = None
    along: tuple[int, ...] = ()


Rule = Callable[..., Any]
"""Bounds of an operation: called with torch's function and its arguments, of which one or more are
bounds.
"""


RULES: dict[str, Rule] = {}
"""The rule of every operation of which bounds are known, by torch's name without underscores.

:mod:`sj_robust.proofs.rules` fills it: a rule makes bounds, so it stands above them.
"""

ON_TRUTH: set[Rule] = set()
"""Rules that know what they make of True and False; filled likewise."""

_READS_POTENTIAL = "a forward that reads a neuron's potential v"

_OPERATORS_IN_PLACE = ["iadd", "isub", "imul", "itruediv", "idiv"]
_MAY_WRITE = ["add", "sub", "mul", "div", "truediv", "neg", *_OPERATORS_IN_PLACE]
"""Operations that may write their result into their first argument."""


@dataclass
class Refusal:
    """Why a run has no bounds, empty if it has: a forward that catches the error of an operation
    and goes on is refused all the same.
    """

    reason: str = ""

    def note(self, error: Exception) -> None:
        """Keep the first reason."""
        self.reason = self.reason or str(error) or type(error).__name__


class Run(Protocol):
    """What the rules know of the run that bounds belong to."""

    refusal: Refusal
    """What the run was refused for."""

    differentiable: bool
    """Whether bounds keep their graph to the weights."""

    rounded: bool
    """Whether bounds have what float32 rounds."""

    narrow: bool
    """Whether bounds are computed in float32, and what that rounds is part of their radius."""

    points: bool
    """Whether leaves are single values, so that values have no width and nobody asks for errors."""

    sized: bool
    """Whether, in a run of points, radii hold the sums of absolute values ``|A| |z| + |b|`` that
    rounding is relative to; otherwise they are zero there.
    """

    dtype: torch.dtype
    """Of the network."""

    def begin(self, by: Function, arguments: "list[Bounds]", values: Interval) -> "Bounds":
        """A leaf with these values, which an operation gives for arguments."""


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a rule, with origins instead of bounds and constants by value; in training, as
    they are, with their graph.
    """

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
    call: Call | None = None
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
        radius: How far the exact value can be from it; broadcast. In a run of points see
            :class:`Run`.
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

    truth: bool
    """Whether torch's values are True and False, as those of a comparison, whose sum is a logical
    or.
    """

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
        if run is not None and run.differentiable:  # autocast may have lowered it
            centre, radius = centre.to(dtype), radius.to(dtype)
        self: Bounds = Tensor._make_wrapper_subclass(
            cls, centre.shape, dtype=dtype, device=centre.device
        )
        self.centre, self.run, self.unrounded = centre, run, unrounded
        self.origin = None
        self.truth = False
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
        if self.run is not None and self.run.points:
            return self._middle
        fall = self.radius if self.changes is None else self.changes.lowered()
        return self._middle - fall

    @property
    def most(self) -> Tensor:
        """Largest value in exact arithmetic."""
        if self.run is not None and self.run.points:
            return self._middle
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
        """These bounds as they are now, whatever is done in place to them later, and without their
        run: a run that holds them would otherwise stay until Python looks for cycles.
        """
        found = Bounds(self.centre, self.radius, self.error, self.run, self.changes)
        found.origin, found.truth = self.origin, self.truth
        found.run = None
        return found

    # torch lacks the type
    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Shape alone: tensors of a network are large."""
        return f"Bounds({tuple(self.shape)})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Bounds of a function of bounds."""
        kwargs = dict(kwargs or {})
        with ruled(run_of((*args, *kwargs.values()))):
            return _bounds_of(func, types, args, kwargs)

    @classmethod
    # torch declares its default, which is a function
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """What reaches torch's dispatcher came around the rules above."""
        with ruled(run_of((*args, *(kwargs or {}).values()))):
            raise NoBoundsError(f"the operation {func}")


class HeldPotential(Tensor):
    """Stands for a neuron's potential after a call on bounds. Reading it raises an error; the next
    call notices if it was replaced.
    """

    refusal: Refusal

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse; only cutting its graph changes nothing."""
        if func.__name__ in ("detach", "detach_"):
            return args[0]
        error = NoBoundsError(_READS_POTENTIAL)
        for value in args:
            if isinstance(value, HeldPotential):
                value.refusal.note(error)
        raise error


def run_of(value: Any) -> Run | None:
    """The run of the first bounds among arguments."""
    if isinstance(value, Bounds):
        return value.run
    parts = value if type(value) in (tuple, list) else ()
    return next((run for run in map(run_of, parts) if run is not None), None)


@contextmanager
def ruled(run: Run | None) -> Iterator[None]:
    """Context of what a network's forward calls on bounds: maps keep their graph whatever the
    forward says of gradients, and an error refuses the whole run. In training nobody knows whether
    weights without a graph shall learn, so a forward without one is refused.
    """
    try:
        if run is None:
            yield
        elif run.differentiable:
            if not torch.is_grad_enabled():
                raise NoBoundsError("training of what runs without a graph, as in torch.no_grad()")
            yield
        else:
            with torch.inference_mode(False), torch.enable_grad():
                yield
    except Exception as error:
        if run is not None:
            run.refusal.note(error)
        raise


def _bounds_of(func: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What the rule of a function gives."""
    named = [kwargs.pop(key) for key in ("input", "tensors", "other") if key in kwargs]
    args = (*args, *named)
    name = func.__name__.strip("_")
    rule = RULES.get(name)
    in_place = func.__name__ == f"{name}_" or name in _OPERATORS_IN_PLACE
    if func.__name__ == "__float__":
        raise NoBoundsError("float(x), a number that depends on the input")
    if HeldPotential in types:
        raise NoBoundsError(_READS_POTENTIAL)
    if kwargs.get("out") is not None or (in_place and name not in _MAY_WRITE):
        raise NoBoundsError(f"{func.__name__}, which writes into a tensor: write x = f(x)")
    if rule is None:
        raise NoBoundsError(f"the operation {name}")
    if any(isinstance(value, Bounds) for value in kwargs.values()):
        raise NoBoundsError(f"{name} of an argument by keyword: pass it by its place")
    if rule not in ON_TRUTH and any(isinstance(x, Bounds) and x.truth for x in args):
        raise NoBoundsError(
            f"the operation {name} of a comparison: convert it first, as in (x >= 0).to(x.dtype)"
        )
    try:
        with torch._C.DisableTorchFunctionSubclass():
            call = _noted_call(rule, func, args, kwargs)
            found = rule(func, *args, **kwargs)
            _note(found, call)
            return _written(args[0], found, func.__name__) if in_place else found
    except TypeError as error:  # a rule does not know an argument, or the call is wrong
        raise NoBoundsError(f"the operation {name} as it is called here ({error})") from error


def is_truth(value: Any) -> bool:
    """Whether a value is True or False, or a tensor of them."""
    if isinstance(value, Bounds):
        return value.truth
    return isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool)


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


def _noted_call(rule: Rule, func: Any, args: Any, kwargs: Any) -> Call:
    """A call as it can be made again."""
    run = run_of(args)
    keep = _as_it_is if run is not None and run.differentiable else by_value
    return Call(
        rule=rule,
        func=func,
        args=_origins(args, keep),
        kwargs={name: keep(value) for name, value in kwargs.items()},
    )


def _as_it_is(value: Any) -> Any:
    return value


def _origins(value: Any, keep: Callable[[Any], Any]) -> Any:
    """Arguments with origins instead of bounds, and what is no bounds as ``keep`` gives it."""
    if isinstance(value, Bounds):
        return value.origin
    if type(value) in (tuple, list):
        return type(value)(_origins(part, keep) for part in value)
    return keep(value)


def _note(found: Any, call: Call) -> None:
    """Say of new bounds which call they come from."""
    if isinstance(found, Bounds):
        found.origin = found.origin or Origin(call=call, shape=found.shape)
    elif isinstance(found, tuple | list):
        for part, one in enumerate(found):
            if isinstance(one, Bounds):
                one.origin = one.origin or Origin(call=call, part=part, shape=one.shape)


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
