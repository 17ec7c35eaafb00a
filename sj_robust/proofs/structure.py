"""Of which samples and time steps the values of a program are functions, read from it alone."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sj_robust.core.broadcast import along
from sj_robust.neuron.charging import Neuron
from sj_robust.proofs import function_rules
from sj_robust.proofs.neurons import counts
from sj_robust.proofs.program import Operation, Program, mapped
from sj_robust.proofs.rounding import NoBoundsError
from sj_robust.proofs.rules import moved
from sj_robust.proofs.values import RULES

__all__ = [
    "LAYOUTS",
    "Forms",
    "Layout",
    "ReadCall",
    "Structure",
    "by_row",
    "laid_out",
    "layout_of",
]

_CONSTANT = -3.0
"""Step of what depends on no leaf."""

_FIXED = -2.0
"""Step of what depends on particular steps, or on their order."""

_ALL = -1.0
"""Step of what is a function of the images and of means over all steps."""

_SUM = 2.0**20
"""Added to t: step of a sum of the steps 0 to t."""


def by_row(part: Tensor, rows: int, batch_dim: int) -> Tensor:
    """What the network lays out with its samples in ``batch_dim`` (see :class:`Layout`) as [N,
    steps, *].
    """
    return by_step(part, rows, batch_dim).transpose(0, 1)


def laid_out(part: Tensor, batch_dim: int) -> Tensor:
    """The inverse of :func:`by_row`."""
    return in_layout(part.transpose(0, 1), batch_dim)


def by_step(part: Tensor, samples: int, batch_dim: int) -> Tensor:
    """What the network lays out with its samples in ``batch_dim`` as [steps, N, *]."""
    if batch_dim == -1:
        return part.view(-1, samples, *part.shape[1:])
    return part if batch_dim == 1 else part.unsqueeze(0)


def in_layout(part: Tensor, batch_dim: int) -> Tensor:
    """The inverse of :func:`by_step`."""
    if batch_dim == -1:
        return part.flatten(0, 1)
    return part if batch_dim == 1 else part.squeeze(0)


@dataclass(frozen=True)
class Layout:
    """Where an operation outside of spiking layers has its samples.

    Attributes:
        batch_dim: Their dimension; -1 if dimension 0 holds the time steps of all samples, first
            step first.
        split: Whether a dimension holds the values of all samples, [T, N * values] or [N * values],
            and has to be split.
    """

    batch_dim: int
    split: bool = False

    def shape(self, given: torch.Size, samples: int) -> torch.Size | None:
        """The shape in which samples have a dimension of their own; None if it does not fit."""
        last = self.batch_dim
        if self.split:
            if len(given) != last + 1 or given[last] % samples:
                return None
            return torch.Size((*given[:last], samples, given[last] // samples))
        if last == -1:
            return given if len(given) > 0 and given[0] % samples == 0 else None
        return given if len(given) > last and given[last] == samples else None


LAYOUTS = (Layout(1), Layout(0), Layout(-1), Layout(1, split=True), Layout(0, split=True))
"""All that there are, the likeliest first."""


def layout_of(
    sample: Tensor, samples: int, possible: Sequence[Layout]
) -> tuple[Layout, torch.Size]:
    """The first layout in which every sample has what is its own, and the shape that it asks for.

    Args:
        sample: Number of the sample of each element; below 0 for what belongs to none.
        samples: Number of samples.
        possible: Layouts to choose from.
    """
    numbers = torch.arange(samples, device=sample.device).to(sample)
    for layout in possible:
        shape = layout.shape(sample.shape, samples)
        if shape is None:
            continue
        own = by_row(sample.reshape(shape), samples, layout.batch_dim)
        if bool(((own == along(numbers, 0, own.ndim)) | (own < 0)).all()):
            return layout, shape
    raise NoBoundsError(
        f"an operation on {tuple(sample.shape)} for {samples} samples, which must be [T, N, "
        "*], [T * N, *] or [N, *], and the same in batches of every size"
    )


class Forms:
    """Numbers of functions: two elements have the same one only if they are the same function of
    what they depend on, which is one sample and, if it has a step, that step.
    """

    def __init__(self) -> None:
        """None is numbered yet."""
        self._first: dict[Any, int] = {}
        self._next = 0
        self._constants: list[Tensor] = []

    def block(self, key: Any, size: int) -> int:
        """The first of so many numbers in a row, which belong to a key."""
        if key not in self._first:
            self._first[key] = self._next
            self._next += size
        return self._first[key]

    def key(self, value: Any) -> Any:
        """An argument as part of a key; tensors by value."""
        if isinstance(value, Tensor):
            for number, known in enumerate(self._constants):
                if known.dtype == value.dtype and torch.equal(known, value):
                    return ("constant", number)
            self._constants.append(value.detach().clone())
            return ("constant", len(self._constants) - 1)
        if isinstance(value, tuple | list):
            return tuple(map(self.key, value))
        if isinstance(value, dict):
            return tuple((name, self.key(part)) for name, part in sorted(value.items()))
        return (type(value), value)


@dataclass(frozen=True)
class _Place:
    """In a key, an argument that stands in the rows."""


@dataclass(frozen=True)
class _Labels:
    """What each element of a value depends on, as numbers in float64.

    Attributes:
        sample: Of the batch; -1 for none.
        step: Time step t >= 0, or one of the constants above.
        form: Which function of them it is, see :class:`Forms`.
        leaves: Numbers of the leaves that it depends on; 0 is the input.
        mixed: Whether something that is the same in all steps stands beside one step.
    """

    sample: Tensor
    step: Tensor
    form: Tensor
    leaves: frozenset[int] = frozenset()
    mixed: bool = False

    @property
    def shape(self) -> torch.Size:
        """Of the value."""
        return self.form.shape

    def each(self, function: Callable[[Tensor], Tensor]) -> "_Labels":
        """All parts through a function that moves elements."""
        sample, step, form = map(function, self.parts)
        return _Labels(sample, step, form, self.leaves, self.mixed)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """What each element depends on."""
        return self.sample, self.step, self.form


def _reshaped(x: _Labels, shape: torch.Size) -> _Labels:
    return x.each(lambda part: part.reshape(shape))


@dataclass(frozen=True)
class ReadCall:
    """A call of a spiking layer or of another function that begins a leaf.

    Attributes:
        by: Name of the layer; None for another function.
        first: Time steps of the layer before this call.
        step: What each element of one sample's current depends on, [steps, *].
        form: Which function it is, [steps, *].
        leaves: Numbers of the leaves that it depends on.
        mixed: Whether something that is the same in all steps stands beside one step.
        leaf: Number of the leaf that begins.
    """

    by: str | None
    first: int
    step: Tensor
    form: Tensor
    leaves: frozenset[int]
    mixed: bool
    leaf: int

    def is_of_counts(self, T: int) -> bool:
        """Whether it is a function of the images and of means over all of T steps."""
        is_whole = (self.step == _ALL) | (self.step == _CONSTANT)
        if T == 1:
            is_whole |= self.step == 0
        return bool(is_whole.all())

    def alike(self, other: "ReadCall") -> bool:
        """Whether another call, in a batch of another size, is of the same function."""
        return (
            (self.by, self.first, self.leaves) == (other.by, other.first, other.leaves)
            and torch.equal(self.step, other.step)
            and torch.equal(self.form, other.form)
        )


def are_same(calls: list[ReadCall]) -> bool:
    """Whether the current of a layer is the same in all steps of its calls."""
    step = torch.cat([call.step for call in calls])
    form = torch.cat([call.form for call in calls])
    return bool((step == step[:1]).all() and (form == form[:1]).all())


def are_steps(calls: list[ReadCall]) -> bool:
    """Whether the current of a layer is in every step t the same function of step t alone."""
    step = torch.cat([call.step for call in calls])
    form = torch.cat([call.form for call in calls])
    own = along(torch.arange(float(len(step))).double(), 0, step.ndim)
    is_own = (step == own) | (step == _CONSTANT)
    return bool(is_own.all() and (form == form[:1]).all())


@dataclass
class Structure:
    """How a program treats samples and time: every sample's values are the same function of that
    sample, which is checked. 程序如何处理样本与时间步。

    Attributes:
        calls: Where leaves begin, in their order; the last one is the output.
        layouts: Where each operation outside of spiking layers has its samples.
        steps_of_leaf: Time steps of each leaf, by number.
        elements: Values of one sample in all leaves.
    """

    forms: Forms
    neurons: dict[str, Neuron]
    samples: int
    T: int
    framed: bool = False
    told: "Structure | None" = None
    calls: list[ReadCall] = field(default_factory=list)
    layouts: list[Layout] = field(default_factory=list)
    steps_of_leaf: dict[int, int] = field(default_factory=dict)
    elements: int = 0
    apart: list[list[int]] = field(default_factory=list)
    """For each operation that does the same in every row of some dimensions, which these are."""

    @classmethod
    def of(
        cls,
        program: Program,
        images: Tensor,
        neurons: dict[str, Neuron],
        T: int,
        *,
        forms: Forms,
        told: "Structure | None" = None,
        framed: bool = False,
    ) -> "Structure":
        """Read a program.

        Args:
            program: The program.
            images: What it is for, [N, *].
            neurons: Spiking layers by name.
            T: Time steps.
            forms: Numbers of functions that are known.
            told: That of a batch of several samples, which tells where they are.
            framed: Whether dimension 1 of the images is time, and constants that are added do not
                matter.

        Raises:
            NoBoundsError: If samples are mixed, or one is treated otherwise than another.
        """
        found = cls(forms, neurons, len(images), T, framed=framed, told=told)
        output = program.run(found._input(images), found._apply)
        found._call(None, output, 0, 0)
        return found

    def alike(self, other: "Structure") -> bool:
        """Whether that of a batch of another size says the same."""
        return len(self.calls) == len(other.calls) and all(
            map(ReadCall.alike, self.calls, other.calls)
        )

    def _input(self, images: Tensor) -> _Labels:
        shape = images.shape
        sample = along(torch.arange(float(shape[0])).double(), 0, len(shape)).expand(shape)
        if self.framed:
            step = along(torch.arange(float(shape[1])).double(), 1, len(shape)).expand(shape)
            form = self._places("frame", shape[2:]).expand(shape)
        else:
            step = torch.full(shape, _ALL).double()
            form = self._places("image", shape[1:]).expand(shape)
        self.steps_of_leaf[0] = 1
        self.elements += shape[1:].numel()
        return _Labels(sample, step, form, frozenset({0}))

    def _places(self, key: Any, shape: torch.Size) -> Tensor:
        """A form of its own for each place."""
        first = self.forms.block((key, shape), shape.numel())
        return (first + torch.arange(shape.numel())).double().view(shape)

    def _apply(self, operation: Operation, args: Any, kwargs: Any) -> Any:
        """Labels of what an operation gives."""
        try:
            return self._of_operation(operation, args, kwargs)
        except NoBoundsError as error:
            error.where = operation.where
            raise

    def _of_operation(self, operation: Operation, args: Any, kwargs: Any) -> Any:
        func = operation.func
        if isinstance(func, Neuron):
            return self._neuron(func, args[0])
        if isinstance(func, nn.Module):
            return self._leaf(operation, args, {}, [set()])
        args = (*args, *[kwargs.pop(key) for key in ("input", "tensors", "other") if key in kwargs])
        name = func.__name__.strip("_")
        if any(isinstance(value, _Labels) for value in kwargs.values()):
            raise NoBoundsError(f"{name} of an argument by keyword: pass it by its place")
        rule = RULES[name]
        if rule is moved or name in ("pad", "expand_as"):
            return self._moved(func, name, args, kwargs)
        if name in _SAME:
            return args[0]
        values = [value for value in args if isinstance(value, _Labels)]
        if name in _SUMS:
            return self._sum(operation, args, values)
        if name in ("addmm", "baddbmm"):
            return self._product_and_sum(operation, args)
        if name in ("mean", "sum"):
            return self._reduced(operation, args, kwargs)
        ndim = values[0].form.ndim
        is_function = name in _FUNCTIONS
        if name in _PRODUCTS:
            is_function = len(values) > 1
            tied: Iterable[int] = ()
            if not is_function and _is_zero(next(v for v in args if not isinstance(v, _Labels))):
                return self._constant(torch.zeros(operation.shape))
        elif name in _MATMULS:
            return self._matmul(operation, args, values)
        else:
            tied = _tied(name, ndim, args, kwargs)
        dims = {dim % ndim for dim in tied}
        if is_function:
            found = self._leaf(operation, args, kwargs, [dims] * len(values))
            is_pair = name in ("max", "min") and len(values) == 1
            return (found, None) if is_pair else found
        return self._rowwise(operation, args, kwargs, dims)

    def _moved(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Of what only moves elements."""
        func = Tensor.reshape if name == "view" else func
        data, *others = args
        if name == "expand_as":
            func, others = Tensor.expand, [args[1].shape]
        if any(isinstance(part, _Labels) for part in others):
            raise NoBoundsError(f"{name} with a place that depends on the input")
        mode = others[1] if name == "pad" and len(others) > 1 else kwargs.get("mode", "constant")
        if name == "pad" and mode == "constant":
            return self._padded(data, others[0] if others else kwargs["pad"])
        if isinstance(data, _Labels):
            labels = [data]
            given: list[Any] = list(data.parts)
        else:
            labels = [one if isinstance(one, _Labels) else self._constant(one) for one in data]
            given = [list(parts) for parts in zip(*[one.parts for one in labels], strict=True)]
        leaves = frozenset[int]().union(*[one.leaves for one in labels])
        mixed = any(one.mixed for one in labels)
        found = [func(part, *others, **kwargs) for part in given]
        if isinstance(found[0], Tensor):
            return _Labels(found[0], found[1], found[2], leaves, mixed)
        every = zip(*found, strict=True)
        return [_Labels(sample, step, form, leaves, mixed) for sample, step, form in every]

    def _padded(self, x: _Labels, size: Any) -> _Labels:
        """Of what is padded with zeros."""
        zero = self._constant(torch.zeros(()))
        sample, step, form = (
            F.pad(part, size, value=float(filling))
            for part, filling in zip(x.parts, zero.parts, strict=True)
        )
        return _Labels(sample, step, form, x.leaves, x.mixed)

    def _constant(self, value: Any) -> _Labels:
        """Of a tensor that does not depend on the input, element by element by value."""
        exact = torch.as_tensor(value).detach().double().cpu()
        values, places = torch.unique(exact, return_inverse=True)
        numbers = [self.forms.block(("number", number), 1) for number in values.tolist()]
        form = torch.tensor(numbers).double()[places]
        return _Labels(torch.full_like(form, -1.0), torch.full_like(form, _CONSTANT), form)

    def _sum(self, operation: Operation, args: Any, values: list[_Labels]) -> _Labels:
        """Of sums and differences."""
        name = operation.func.__name__.strip("_")
        if len(values) == 1:
            other = next(value for value in args if not isinstance(value, _Labels))
            is_same = values[0].shape == operation.shape and "sub" not in name
            if is_same and (self.framed or _is_zero(other)):
                return values[0]
        elif "sub" not in name:
            found = self._running_sum(*values)
            if found is not None:
                return found
        return self._rowwise(operation, args, {}, set())

    def _running_sum(self, a: _Labels, b: _Labels) -> _Labels | None:
        """Of the sum of the steps 0 to t - 1, or step 0, and of step t of the same function."""
        first, second = sorted((a, b), key=lambda one: float(one.step.min()) % _SUM)
        t = float(second.step.flatten()[0])
        before = _SUM * (t > 1) + t - 1
        if a.mixed or b.mixed or a.shape != b.shape or not torch.equal(a.form, b.form):
            return None
        if t < 1 or t >= _SUM or not bool(((first.step == before) & (second.step == t)).all()):
            return None
        if not torch.equal(a.sample, b.sample):
            return None
        if t < self.T - 1:
            return replace(a, step=torch.full_like(a.step, _SUM + t), leaves=a.leaves | b.leaves)
        whole = replace(a, step=torch.full_like(a.step, _ALL), leaves=a.leaves | b.leaves)
        return self._rows("sum of steps", [whole], [], set(), a.shape)

    def _product_and_sum(self, operation: Operation, args: Any) -> _Labels:
        """Of a matrix product and what is added to it."""
        shift, a, b = args
        product = replace(operation, func=torch.matmul)
        found = self._matmul(product, (a, b), [v for v in (a, b) if isinstance(v, _Labels)])
        both = [one for one in (found, shift) if isinstance(one, _Labels)]
        return self._sum(replace(operation, func=torch.add), (found, shift), both)

    def _matmul(self, operation: Operation, args: Any, values: list[_Labels]) -> _Labels:
        """Of matrix products."""
        a, b = args
        if operation.func.__name__ == "__rmatmul__":
            a, b = b, a
        if len(values) == 2:
            return self._leaf(operation, (a, b), {}, [{a.form.ndim - 1}, {b.form.ndim - 2}])
        x, weight = values[0], torch.as_tensor(b if isinstance(a, _Labels) else a)
        ndim = x.form.ndim
        if isinstance(a, _Labels) and weight.ndim <= 2:
            tied = {ndim - 1}
        elif weight.ndim <= 2 and ndim >= 2:
            tied = {ndim - 2}
        else:
            tied = set(range(ndim))
        shape = operation.shape
        if weight.ndim == 1:  # as a matrix of one row or column
            wide = (*shape, 1) if isinstance(a, _Labels) else (*shape[:-1], 1, *shape[-1:])
            operation = replace(operation, shape=torch.Size(wide))
        found = self._rowwise(operation, args, {}, tied)
        return _reshaped(found, shape)

    def _reduced(self, operation: Operation, args: Any, kwargs: Any) -> _Labels:
        """Of means and sums over dimensions."""
        x, *others = args
        name = operation.func.__name__
        dim = others[0] if others else kwargs.get("dim")
        ndim = x.form.ndim
        dims = sorted(d % ndim for d in ([dim] if isinstance(dim, int) else dim or range(ndim)))
        kept = [d for d in range(ndim) if d not in dims]
        size = 1
        for d in dims:
            size *= x.shape[d]
        flat = x.each(lambda part: part.permute(*kept, *dims).flatten(len(kept)) if dims else part)
        flat = flat.each(lambda part: part.reshape(*part.shape[: len(kept)], size))
        whole = self._over_all_steps(flat, size)
        shape = torch.Size([*flat.shape[:-1], 1])
        found = self._rows((name, size), [whole or flat], [], {len(kept)}, shape)
        return _reshaped(found, operation.shape)

    def _over_all_steps(self, x: _Labels, size: int) -> _Labels | None:
        """A value [*, size] with the steps 0 to T - 1 of the same functions, as one of all steps;
        None for another one.
        """
        step = x.step.reshape(-1, size)
        if self.T == 1 or size % self.T or not bool((step == step[:1]).all()):
            return None
        order = step[0].argsort(stable=True)
        each = torch.arange(float(self.T)).double().repeat_interleave(size // self.T)
        if not torch.equal(step[0][order], each):
            return None
        each_step = (*x.shape[:-1], self.T, size // self.T)
        form, sample = (part[..., order].reshape(each_step) for part in (x.form, x.sample))
        if not bool((form == form[..., :1, :]).all() and (sample == sample[..., :1, :]).all()):
            return None
        one = form[..., 0, :]
        return replace(
            x, sample=sample[..., 0, :], step=torch.full_like(one, _ALL), form=one, mixed=False
        )

    def _rowwise(self, operation: Operation, args: Any, kwargs: Any, tied: set[int]) -> _Labels:
        """Of an operation that does the same in every place of the dimensions that are not tied."""
        values = [value for value in args if isinstance(value, _Labels)]
        others: list[Tensor] = []
        key: Any = args
        if not tied:  # element by element: constants are laid beside them
            shape = operation.shape
            values = [value.each(lambda part: part.expand(shape)) for value in values]
            constants = [value for value in args if isinstance(value, Tensor)]
            others = [value.detach().double().cpu().expand(shape) for value in constants]
            key = mapped(args, lambda value: _Place() if isinstance(value, Tensor) else value)
        key = mapped(key, lambda value: _Place() if isinstance(value, _Labels) else value)
        named = (operation.func.__name__, self.forms.key(key), self.forms.key(kwargs))
        return self._rows(named, values, others, tied, operation.shape)

    def _rows(
        self, key: Any, values: list[_Labels], others: list[Tensor], tied: set[int], shape: Any
    ) -> _Labels:
        """Of the results of shape ``shape`` of an operation with a key, for values of one shape,
        and constants in the same places.
        """
        ndim = values[0].form.ndim
        sample = torch.stack([value.sample for value in values], -1)
        step = torch.stack([value.step for value in values], -1)
        form = torch.stack([value.form for value in values], -1)
        free = [dim for dim in range(ndim) if dim not in tied]
        apart = [dim for dim in free if _varies(sample, dim, -1.0)]
        is_fixed = bool(((step == _FIXED) | (step >= _SUM)).any())
        in_steps = [dim for dim in free if dim in apart or _varies(step, dim, _ALL)]
        if not is_fixed:
            _, most, least = _ends(step, in_steps, _ALL)
            is_fixed = bool((most != least).any())
        if not is_fixed:
            apart = in_steps
        parts = [form, *([step] if is_fixed else [])]
        if others:
            parts.append(torch.stack(others, -1))
        needed = set(apart)
        apart = [d for d in free if d in needed or not any(_differs(part, d) for part in parts)]
        if self.told is not None:
            apart = next(iter(self.told.apart[len(self.apart) :]), [])
            if not needed <= set(apart) <= set(free):
                raise NoBoundsError(_MIXED)
        self.apart.append(apart)
        sample, most, least = _ends(sample, apart, -1.0)
        if bool((most != least).any()):
            raise NoBoundsError(_MIXED)
        sample_of_row = sample.amax(1)
        step = _in_rows(step, apart)
        step_of_row = step.amax(1)
        mixed = any(value.mixed for value in values)
        keyed = [_in_rows(part, apart) for part in parts]
        if is_fixed:
            key = ("fixed", key)
            step_of_row = torch.full_like(step_of_row, _FIXED)
        else:
            mixed |= bool(((step_of_row >= 0).unsqueeze(1) & (step == _ALL)).any())
        if apart and (len(shape) != ndim or any(shape[d] != form.shape[d] for d in apart)):
            raise NoBoundsError(_MIXED)
        sizes = [shape[dim] for dim in apart]
        rest = [shape[dim] for dim in range(len(shape)) if dim not in apart]
        count = torch.Size(rest).numel()
        firsts = self._numbered(key, torch.cat(keyed, 1), count)
        forms = firsts.unsqueeze(1) + torch.arange(count).double()
        back = [*apart, *[dim for dim in range(len(shape)) if dim not in apart]]
        order = torch.tensor(back).argsort().tolist() if back else []

        def placed(rows: Tensor) -> Tensor:
            return rows.expand(len(firsts), count).reshape(*sizes, *rest).permute(*order)

        leaves = frozenset().union(*[value.leaves for value in values])
        return _Labels(
            placed(sample_of_row.unsqueeze(1)),
            placed(step_of_row.unsqueeze(1)),
            placed(forms),
            leaves=leaves,
            mixed=mixed,
        )

    def _numbered(self, key: Any, rows: Tensor, count: int) -> Tensor:
        """The first form of the results of each row [R, *], of which there are so many."""
        number = self.forms.block
        if bool((rows == rows[:1]).all()):
            first = number((key, count, rows[0].numpy().tobytes()), count)
            return torch.full((len(rows),), float(first)).double()
        firsts = [number((key, count, row.numpy().tobytes()), count) for row in rows.contiguous()]
        return torch.tensor(firsts).double()

    def _neuron(self, neuron: Neuron, x: _Labels) -> _Labels:
        batch_dim = 1 if neuron.module.step_mode == "m" else 0
        if x.form.ndim <= batch_dim or x.shape[batch_dim] != self.samples:
            raise NoBoundsError(
                f"the layer {neuron.name} in step mode {neuron.module.step_mode!r} on "
                f"{tuple(x.shape)} for {self.samples} samples, which must be [T, N, *] in "
                "mode 'm' and [N, *] in mode 's'"
            )
        name = None if counts(neuron) is not None else neuron.name
        first = sum(len(call.step) for call in self.calls if name is not None and call.by == name)
        self._call(name, x, batch_dim, first)
        return self._begun(x.shape, batch_dim, name, first)

    def _leaf(self, operation: Operation, args: Any, kwargs: Any, tied: list[set[int]]) -> _Labels:
        """Of what a function gives that is not affine, with the dimensions of each value that
        meet.
        """
        found = torch.full(operation.shape, -1.0).double()
        values = [value for value in args if isinstance(value, _Labels)]
        for value, dims in zip(values, tied, strict=True):
            sample = value.sample
            for dim in dims:
                sample = _meeting(sample, dim)
            sample = self._spread(sample, operation.shape)
            if bool(((sample != found) & (sample >= 0) & (found >= 0)).any()):
                raise NoBoundsError(_MIXED)
            found = torch.maximum(found, sample)
        for value in args:
            if isinstance(value, _Labels):
                laid, batch_dim = self._in_layout(value)
                self._call(None, laid, batch_dim, 0)
            elif isinstance(value, Tensor) and _fits(value.shape, operation.shape):
                others = self._constant(value.expand(operation.shape))
                laid, batch_dim = self._in_layout(replace(others, sample=found), told=False)
                self._check_samples(laid, batch_dim)
        x = _Labels(found, torch.zeros_like(found), torch.zeros_like(found))
        laid, batch_dim = self._in_layout(x)
        begun = self._begun(laid.shape, batch_dim, None, 0)
        return _reshaped(begun, operation.shape)

    def _spread(self, sample: Tensor, shape: torch.Size) -> Tensor:
        """Samples of the elements of a result, in which a dimension may have another size."""
        if sample.ndim > len(shape):  # of a dimension that is gone one place is left
            return sample.reshape(shape)
        if sample.ndim == len(shape):
            for dim, size in enumerate(shape):
                if sample.shape[dim] not in (1, size):
                    sample = _meeting(sample, dim)
        return sample.expand(shape)

    def _in_layout(self, x: _Labels, *, told: bool = True) -> tuple[_Labels, int]:
        """A value in a shape in which its samples have a dimension, and which one."""
        possible: Sequence[Layout] = LAYOUTS
        if self.told is not None and told:
            number = len(self.layouts)
            possible = self.told.layouts[number : number + 1]
        layout, shape = layout_of(x.sample, self.samples, possible)
        if told:
            self.layouts.append(layout)
        return _reshaped(x, shape), layout.batch_dim

    def _check_samples(self, x: _Labels, batch_dim: int) -> None:
        """Every sample's values are the same functions of that sample."""
        sample = by_row(x.sample, self.samples, batch_dim)
        own = along(torch.arange(float(self.samples)).double(), 0, sample.ndim)
        rows = [by_row(part, self.samples, batch_dim) for part in (x.form, x.step)]
        is_own = bool(((sample == own) | (sample < 0)).all())
        if not is_own or not all(bool((row == row[:1]).all()) for row in rows):
            raise NoBoundsError(_MIXED)

    def _call(self, by: str | None, x: _Labels, batch_dim: int, first: int) -> None:
        """A current arrives, and a leaf will begin."""
        self._check_samples(x, batch_dim)
        step, form = (
            by_step(part, self.samples, batch_dim)[:, 0].clone() for part in (x.step, x.form)
        )
        leaf = len(self.steps_of_leaf)
        self.calls.append(ReadCall(by, first, step, form, x.leaves, x.mixed, leaf))

    def _begun(self, shape: torch.Size, batch_dim: int, by: str | None, first: int) -> _Labels:
        """A leaf, whose steps have the same forms."""
        leaf = len(self.steps_of_leaf)
        zeros = torch.zeros(shape).double()
        steps, samples, *places = by_step(zeros, self.samples, batch_dim).shape
        self.steps_of_leaf[leaf] = steps
        self.elements += steps * torch.Size(places).numel()
        ndim = 2 + len(places)
        sample = along(torch.arange(float(samples)).double(), 1, ndim)
        step = along(first + torch.arange(float(steps)).double(), 0, ndim)
        form = self._places(by if by is not None else leaf, torch.Size(places))
        full = (steps, samples, *places)
        found = _Labels(
            sample.expand(full), step.expand(full), form.expand(full), frozenset({leaf})
        )
        return found.each(lambda part: in_layout(part, batch_dim))


_MIXED = (
    "a network that mixes the samples of a batch, or treats them differently; give time steps "
    "first, [T, N, *], and use no value of other images"
)

_SAME = ["to", "float", "type_as", "dropout", "dropout1d", "dropout2d", "dropout3d"]
_SUMS = ["add", "radd", "iadd", "sub", "rsub", "isub"]
_PRODUCTS = ["mul", "rmul", "imul", "div", "truediv", "rdiv", "rtruediv", "itruediv", "idiv"]
_MATMULS = ["matmul", "rmatmul", "bmm", "mm"]
_FUNCTIONS = {name for _, names in function_rules.OPERATIONS for name in names.split()}
_ELEMENTS = _FUNCTIONS | {"neg"}


def _tied(name: str, ndim: int, args: Any, kwargs: Any) -> Iterable[int]:
    """Dimensions along which an operation mixes values or does not do the same everywhere."""
    if name[-1] == "d" and name[-2].isdigit():
        spatial = int(name[-2])
        return range(-spatial - ("conv" in name), 0)
    if name == "linear":
        return (-1,)
    if name == "batch_norm":
        return (1,)
    if name == "softmax":
        return (args[1] if len(args) > 1 else kwargs["dim"],)
    if name == "layer_norm":
        return range(-len(args[1]), 0)
    if name == "group_norm":
        return range(1, ndim)
    if name in ("max", "min", "amax", "amin") and sum(isinstance(v, _Labels) for v in args) == 1:
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        return (dim,) if isinstance(dim, int) else dim or range(ndim)
    if name in _ELEMENTS:
        return ()
    return range(ndim)


def _is_zero(value: Any) -> bool:
    """Whether a constant is 0 everywhere."""
    return bool((torch.as_tensor(value) == 0).all())


def _fits(shape: torch.Size, other: torch.Size) -> bool:
    """Whether a tensor can be expanded to a shape."""
    pairs = zip(reversed(shape), reversed(other), strict=False)
    return len(shape) <= len(other) and all(size in (1, of_other) for size, of_other in pairs)


def _meeting(sample: Tensor, dim: int) -> Tensor:
    """Samples along a dimension whose values meet, which must be of one sample."""
    most = sample.amax(dim, keepdim=True)
    if bool(((sample != most) & (sample >= 0)).any()):
        raise NoBoundsError(_MIXED)
    return most


def _varies(labels: Tensor, dim: int, below: float) -> bool:
    """Whether labels above a number differ along a dimension."""
    most = labels.amax(dim)
    least = torch.where(labels > below, labels, torch.inf).amin(dim)
    return bool((most > least).any())


def _differs(part: Tensor, dim: int) -> bool:
    """Whether a tensor is not the same all along a dimension."""
    return bool((part != part.narrow(dim, 0, 1)).any()) if part.numel() else False


def _in_rows(part: Tensor, apart: list[int]) -> Tensor:
    """A tensor as [R, *], a row for each place of some dimensions."""
    rest = [dim for dim in range(part.ndim) if dim not in apart]
    rows = 1
    for dim in apart:
        rows *= part.shape[dim]
    return part.permute(*apart, *rest).reshape(rows, -1)


def _ends(labels: Tensor, apart: list[int], below: float) -> tuple[Tensor, Tensor, Tensor]:
    """Labels by row, and the largest and least above a number of each row."""
    rows = _in_rows(labels, apart)
    most = rows.amax(1)
    least = torch.where(rows > below, rows, torch.inf).amin(1)
    return rows, most, torch.where(least == torch.inf, most, least)
