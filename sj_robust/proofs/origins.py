"""The origin of bounds: their inputs and samples."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sj_robust.proofs.bound_tensor import Bounds, Call, Origin
from sj_robust.proofs.rounding import NoBoundsError
from sj_robust.proofs.rules import moved

__all__ = ["leaves_of", "replayed", "rows_of"]


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
    with torch._C.DisableTorchFunctionSubclass():
        walk = _Walk(
            of_leaf=leaves.__getitem__,
            of_call=lambda call, args: call.rule(call.func, *args, **call.kwargs),
        )
        found: Bounds = walk.value_of(origin)
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
    walk = _Walk(of_leaf=leaves, of_call=_rows_behind, of_part=_spread)
    found: Tensor = walk.value_of(origin)
    return found


class _Walk:
    """Values for origins, from those of their leaves up; every call is made once.

    It is a class because a nested function that calls itself would be a cycle, and would keep all
    that the calls made until Python looks for cycles.
    """

    def __init__(
        self,
        *,
        of_leaf: Callable[[int], Any],
        of_call: Callable[[Call, Any], Any],
        of_part: Callable[[Any, Origin], Any] = lambda found, _: found,
    ) -> None:
        """Nothing is made yet.

        Args:
            of_leaf: The value of a leaf, by its number.
            of_call: The value of a call, from the call and the values of its arguments.
            of_part: The value of an origin, from that of its part of a call and the origin.
        """
        self._of_leaf = of_leaf
        self._of_call = of_call
        self._of_part = of_part
        self._made: dict[Call, Any] = {}

    def value_of(self, value: Any) -> Any:
        """An argument of a call, with values in the place of origins."""
        if type(value) in (tuple, list):
            return type(value)(map(self.value_of, value))
        if not isinstance(value, Origin):
            return value
        if value.leaf is not None:
            return self._of_leaf(value.leaf)
        call = value.call
        assert call is not None
        if call not in self._made:
            self._made[call] = self._of_call(call, self.value_of(call.args))
        made = self._made[call]
        return self._of_part(made if value.part is None else made[value.part], value)


def _rows_behind(call: Call, args: Any) -> Any:
    """Samples of the results of a call, for those of its arguments."""
    name = call.func.__name__.strip("_")
    if call.rule is moved:
        func = torch.Tensor.reshape if name == "view" else call.func
        if isinstance(args[0], list | tuple):
            args = (_beside(args, call), *args[1:])
        return func(*args, **call.kwargs)
    first = _first_rows(args, call.args)
    if name in ("mean", "sum"):
        dim = [*args[1:], call.kwargs.get("dim")][0]
        keepdim = call.kwargs.get("keepdim", args[2] if len(args) > 2 else False)
        dims = tuple(range(first.ndim)) if dim is None else dim
        return first.amax(dims, keepdim)
    return first


def _beside(args: Any, call: Call) -> list[Tensor]:
    """What is joined, with constants as of the samples that they stand beside."""
    parts, origins = args[0], call.args[0]
    dim = call.kwargs.get("dim", args[1] if len(args) > 1 else 0)
    like = _first_rows(parts, origins)
    found = []
    for part, origin in zip(parts, origins, strict=True):
        if isinstance(origin, Origin):
            found.append(part)
        elif part.shape == like.shape:
            found.append(like)
        elif like.numel():
            found.append(like.narrow(dim, 0, 1).expand(part.shape))
        else:
            raise NoBoundsError("joining a constant with an empty part, such as s[:-1] at T = 1")
    return found


def _first_rows(args: Any, origins: Any) -> Tensor:
    """Of the first argument that is bounds and has most dimensions."""
    some = [one for one, origin in zip(args, origins, strict=True) if isinstance(origin, Origin)]
    found: Tensor = max(some, key=lambda one: one.ndim)
    return found


def _spread(rows: Tensor, origin: Origin) -> Tensor:
    """Samples of the elements of a result, in which a dimension may have another size."""
    shape = origin.shape
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
