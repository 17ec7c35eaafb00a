"""Bounds of a tensor, what the rule of a function makes of them, constants beside them, and the
arguments of rules.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from sj_robust.proofs.changes import Changes
from sj_robust.proofs.rounding import NoBoundsError
from sj_robust.proofs.spiking import Interval

__all__ = [
    "MAY_WRITE",
    "OF_TRUTH",
    "RULES",
    "Bounds",
    "Pooling",
    "Rule",
    "Run",
    "as_bounds",
    "bounds_of",
    "centre_of_either",
    "check_dtype",
    "constant",
    "interval",
    "is_rounded",
    "new_leaf",
    "reshaped",
    "rule_of",
    "run_of",
]

Pooling = Callable[[Tensor], Tensor]
"""A max pooling."""


Rule = Callable[..., Any]
"""Bounds of an operation: called with torch's function and its arguments, of which one or more are
bounds.
"""


RULES: dict[str, Rule] = {}
"""The rule of every operation of which bounds are known, by torch's name without underscores.

:mod:`sj_robust.proofs.rules` fills it: a rule makes bounds, so it stands above them.
"""

OF_TRUTH: set[Rule] = set()
"""Rules of operations whose results may be True and False, which are 1 and 0; filled likewise."""

_OPERATORS_IN_PLACE = ["iadd", "isub", "imul", "itruediv", "idiv"]
MAY_WRITE = ["add", "sub", "mul", "div", "truediv", "neg", "relu", *_OPERATORS_IN_PLACE]
"""Operations that the forward may write into their first argument."""


class Run(Protocol):
    """What the rules know of the run that bounds belong to."""

    differentiable: bool
    """Whether bounds keep their graph to the weights."""

    rounded: bool
    """Whether bounds have what float32 rounds."""

    narrow: bool
    """Whether bounds are computed in float32, and what that rounds is part of their radius."""

    points: bool
    """Whether leaves are single values, so that values have no width and nobody asks for errors."""

    dtype: torch.dtype
    """Of the network."""

    def begin(
        self, arguments: "list[Bounds]", values: Interval, pooling: Pooling | None
    ) -> "Bounds":
        """A leaf with these values, which an operation that is no affine map gives for arguments;
        a max pooling is told.
        """


class Bounds:
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
        >>> y = bounds_of(torch.add, bounds_of(torch.mul, x, 2.0), 1.0)
        >>> float(y.centre), float(y.radius), 0 < float(y.error) < 1e-6
        (2.0, 0.5, True)
    """

    centre: Tensor
    radius: Tensor
    error: Tensor
    unrounded: bool
    run: Run | None
    changes: Changes | None

    def __init__(
        self,
        centre: Tensor,
        radius: Tensor,
        error: Tensor | None = None,
        run: Run | None = None,
        changes: Changes | None = None,
    ) -> None:
        """Keep the parts; see the class."""
        self.dtype = torch.float32 if run is None else run.dtype
        if run is not None and run.differentiable:  # autocast may have lowered it
            centre, radius = centre.to(self.dtype), radius.to(self.dtype)
        self.centre = centre
        self.run = run
        self.unrounded = run is not None and not run.rounded
        self.changes = changes
        self.radius = radius.expand(centre.shape)
        if self.unrounded:
            self.error = radius.new_zeros(())
        elif error is None:
            self.error = torch.zeros_like(self.radius)
        else:
            self.error = error.expand(centre.shape)

    @property
    def shape(self) -> torch.Size:
        """Of the values."""
        return self.centre.shape

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self.centre.ndim

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

    def same(self) -> "Bounds":
        """These bounds without their run: a run that holds them would otherwise stay until Python
        looks for cycles.
        """
        found = Bounds(self.centre, self.radius, self.error, self.run, self.changes)
        found.run = None
        return found

    def __repr__(self) -> str:
        """Shape alone: tensors of a network are large."""
        return f"Bounds({tuple(self.shape)})"


def run_of(value: Any) -> Run | None:
    """The run of the first bounds among arguments."""
    if isinstance(value, Bounds):
        return value.run
    parts = value if type(value) in (tuple, list) else ()
    return next((run for run in map(run_of, parts) if run is not None), None)


def rule_of(func: Any) -> Rule:
    """The rule of a function of torch."""
    return RULES[func.__name__.strip("_")]


def bounds_of(func: Any, *args: Any, **kwargs: Any) -> Any:
    """What the rule of a function gives for bounds among its arguments. 由规则得到的上下界。

    Raises:
        NoBoundsError: If no rule knows it.
    """
    args = (*args, *[kwargs.pop(key) for key in ("input", "tensors", "other") if key in kwargs])
    name = func.__name__.strip("_")
    rule = rule_of(func)
    if any(isinstance(value, Bounds) for value in kwargs.values()):
        raise NoBoundsError(f"{name} of an argument by keyword: pass it by its place")
    try:
        return rule(func, *args, **kwargs)
    except TypeError as error:  # a rule does not know an argument, or the call is wrong
        raise NoBoundsError(f"the operation {name} as it is called here ({error})") from error


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
    return found.detach().double()


def as_bounds(value: Any, run: Run | None, like: Tensor) -> Bounds:
    """Bounds, or a constant as bounds that nothing moves."""
    if isinstance(value, Bounds):
        return value
    centre = constant(value, run).to(like)
    return Bounds(centre, torch.zeros_like(centre), run=run)


def centre_of_either(a: Any, b: Any) -> Tensor:
    """The centre of the one of two that is bounds."""
    centre: Tensor = (a if isinstance(a, Bounds) else b).centre
    return centre


def check_dtype(x: Bounds, *given: Any) -> None:
    """Raise NoBoundsError if one of some arguments is another dtype than that of the values."""
    for dtype in given:
        if isinstance(dtype, torch.dtype) and dtype != x.dtype:
            raise NoBoundsError(f"a conversion to {dtype}: bounds are those of {x.dtype}")


def interval(x: Bounds) -> Interval:
    """What float32 can give."""
    return Interval(x.lower, x.upper)


def is_rounded(run: Run | None) -> bool:
    """Whether bounds have what float32 rounds."""
    return run is None or run.rounded


def new_leaf(
    run: Run | None, arguments: list[Bounds], values: Interval, pooling: Pooling | None = None
) -> Bounds:
    """A leaf in the run of its arguments, see :meth:`Run.begin`."""
    assert run is not None  # a function that begins leaves is called in a run
    return run.begin(arguments, values, pooling)


def reshaped(x: Bounds, shape: torch.Size) -> Bounds:
    """Bounds in another shape. 改变形状。"""
    if x.shape == shape:
        return x
    found: Bounds = bounds_of(torch.Tensor.reshape, x, shape)
    return found
