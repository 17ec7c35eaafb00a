"""A network's forward as a program: the operations of a plain run, recorded, so that what is
bounded is what runs.
"""

from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sj_robust.classifier import SpikingClassifier
from sj_robust.core.host import functional
from sj_robust.core.preserved import other_forward, same
from sj_robust.neuron.charging import Neuron
from sj_robust.neuron.dlif import DLIFNode
from sj_robust.proofs.neurons import spiking_surrogates
from sj_robust.proofs.rounding import NoBoundsError
from sj_robust.proofs.rules import ASKED, MAY_WRITE, OF_TRUTH, RULES

__all__ = ["Operation", "Program", "Record", "Value", "captured", "plain", "recorded"]


@dataclass(frozen=True)
class Value:
    """A value of a program: the result of an operation, or one of several; -1 is the input."""

    operation: int
    part: int | None = None


@dataclass(frozen=True)
class _State:
    """The potential of a neuron behind a call, which the forward must not read."""

    neuron: str
    call: int


_NO_SHAPE = torch.Size()


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation of a program.

    Attributes:
        func: Torch's function, or a surrogate, or a spiking layer.
        args: Its arguments, with :class:`Value` for those that depend on the input and copies of
            the others.
        kwargs: Likewise.
        where: The module in or behind which it stands.
        writes: Whether torch writes the result into the first argument.
        shape: Of the result, or of its first part.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    where: str = ""
    writes: bool = False
    shape: torch.Size = _NO_SHAPE

    @property
    def values(self) -> list[Value]:
        """Those that it takes."""
        return list(_among((self.args, self.kwargs), Value))

    def alike(self, other: "Operation") -> bool:
        """Whether another one does the same, constants compared by value."""
        return (
            self.func == other.func
            and _alike(self.args, other.args)
            and _alike(self.kwargs, other.kwargs)
        )


Apply = Callable[[Operation, tuple[Any, ...], dict[str, Any]], Any]
"""What an operation gives for its arguments, with values in the place of :class:`Value`."""


class Program:
    """Operations in their order, and which value is the output.

    Args:
        operations: The operations.
        output: What they are for.
        cut: Whether autograd does not see all of them: one is a ``detach``, or runs under
            ``no_grad`` where the caller has gradients on.
        begins: Operations whose results are known, so that nothing before them runs.
    """

    def __init__(
        self,
        operations: list[Operation],
        output: Value,
        *,
        cut: bool,
        begins: Container[Operation | None] = (),
    ) -> None:
        """See the class."""
        self.operations = operations
        self.output = output
        self.cut = cut
        self._begins = begins
        self._needed = _needed(operations, output, begins)
        last: dict[int, int] = {}
        for number in self._needed:
            for value in self._taken(number):
                last[value.operation] = number
        self.takes_input = -1 in last or output.operation == -1
        last.pop(output.operation, None)
        self._done: dict[int, list[int]] = {}
        for source, number in last.items():
            self._done.setdefault(number, []).append(source)

    def behind(self, begins: Container[Operation | None], output: Value) -> "Program":
        """What leads from the results of some operations, and the input, to a value."""
        return Program(self.operations, output, cut=self.cut, begins=begins)

    @property
    def needed(self) -> list[Operation]:
        """Those that run, and of those whose results are known the ones that are taken."""
        return [self.operations[number] for number in self._needed]

    def _taken(self, number: int) -> list[Value]:
        """Values that an operation takes."""
        operation = self.operations[number]
        return [] if operation in self._begins else operation.values

    def run(self, x: Any, apply: Apply) -> Any:
        """The output for another kind of input, each operation as ``apply`` says; operations with
        known results are not given their arguments.
        """
        made = {-1: x}

        def given(value: Any) -> Any:
            if not isinstance(value, Value):
                return value
            found = made[value.operation]
            is_one = value.part is None or self.operations[value.operation] in self._begins
            return found if is_one else found[value.part]

        for number in self._needed:
            operation = self.operations[number]
            is_known = operation in self._begins
            args = () if is_known else mapped(operation.args, given)
            kwargs = {} if is_known else mapped(operation.kwargs, given)
            made[number] = apply(operation, args, kwargs)
            for done in self._done.get(number, ()):
                del made[done]
        return given(self.output)

    def alike(self, other: "Program") -> bool:
        """Whether another program does the same."""
        return (
            self.output == other.output
            and len(self.operations) == len(other.operations)
            and all(map(Operation.alike, self.operations, other.operations))
        )


def plain(operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operation gives for tensors. 在张量上执行一个运算。"""
    func = operation.func
    if isinstance(func, Neuron):
        return func.module.forward(*args)
    if isinstance(func, nn.Module):
        return func.forward(*args)
    if operation.writes:
        args = (args[0].clone(), *args[1:])
    return func(*args, **kwargs)


def _needed(
    operations: list[Operation], output: Value, begins: Container[Operation | None]
) -> list[int]:
    """Numbers of the operations that the output may depend on; of a whole program spiking layers
    run on.
    """
    needed = {output.operation}
    for number in reversed(range(len(operations))):
        operation = operations[number]
        runs_on = not begins and isinstance(operation.func, Neuron)
        if number in needed or runs_on:
            needed.add(number)
            if operation not in begins:
                needed |= {value.operation for value in operation.values}
    return sorted(needed - {-1})


def captured(model: SpikingClassifier, images: Tensor, neurons: dict[str, Neuron]) -> Program:
    """The program of a network for so many images, whatever is in them. 捕获网络的前向程序。

    It is recorded twice: without a graph on the images, as the network runs where it is used, and
    with one on random images. Both must be the same program, so that neither a value of the images
    nor whether gradients are on decides what is computed.

    Raises:
        NoBoundsError: If the forward does something that is not recorded, or two programs.
    """
    model.find_convention(images, again=False)  # by forwards of which nothing is recorded
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(images.shape, generator=generator, dtype=torch.float64).to(images)
    with torch.no_grad():
        first = Record(images, neurons)
        found = first.program(model, model.net)
    with torch.enable_grad():
        again = Record(drawn, neurons, first=first).program(model, model.net)
    if not found.alike(again):
        raise NoBoundsError(
            "a forward that computes something else where gradients are on, or for other images"
        )
    return found


def recorded(model: SpikingClassifier, images: Tensor, neurons: dict[str, Neuron]) -> Program:
    """The program of one run for training, whose constants are the network's own tensors with
    their graph.
    """
    model.find_convention(images, again=False)
    with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
        return Record(images, neurons, live=True).program(model, model.net)


_IDENTITIES = ("detach", "detach_", "requires_grad_")
"""Methods whose result has the values of their tensor."""

_SETTINGS: tuple[str, ...] = ("shape", "dtype", "device", "ndim", "layout", "requires_grad")
_SETTINGS += ("is_leaf", "grad_fn", "names", "nbytes", "itemsize", "is_cuda", "is_cpu", "is_mps")
_SETTINGS += ("is_meta", "is_sparse", "is_quantized", "is_nested", "is_mkldnn", "is_xpu", "is_xla")
"""Attributes of a tensor that do not depend on its values."""


class Record(TorchFunctionMode):
    """Records the operations on what depends on the input.

    A tensor of the forward is the input, what a recorded operation gave, or a constant: what a
    function without the input gave, or a tensor that was there before, which is one that the first
    of two runs met as well and that was kept since. Any other one is of unknown origin. A refusal
    is kept, so that a forward that goes on is refused all the same.
    """

    def __init__(
        self,
        x: Tensor,
        neurons: dict[str, Neuron],
        *,
        live: bool = False,
        first: "Record | None" = None,
    ) -> None:
        """Nothing is recorded yet.

        Args:
            x: The input.
            neurons: Spiking layers by name, each of whose calls is one operation.
            live: Whether constants are the tensors themselves, not copies.
            first: The first of two runs.
        """
        super().__init__()
        self.operations: list[Operation] = []
        self.refused: NoBoundsError | None = None
        self.pauses = 0
        """Calls in progress of which nothing is recorded."""
        self.cut = False
        self._x = x.detach().clone()
        self._live = live
        self._neurons = neurons
        self._graph = torch.is_grad_enabled()
        self._where = ""
        self._alive: list[Tensor] = []  # so that no address stands for two
        self._values: dict[int, Value | _State] = {}
        self._known: set[int] = set()
        self._moving: dict[int, list[Tensor]] = {}
        """Tensors that depend on the input, by their memory."""
        self._numbers: dict[str, Any] = {}
        self._calls = dict.fromkeys(neurons, 0)
        self._steps = dict.fromkeys(neurons, 0)
        self._first = first
        self.unknown: list[Tensor] = []
        """Constants that nothing recorded gave."""
        for one in () if first is None else first.unknown:
            self._know(one)
        self._note(self._x, Value(-1))

    def program(self, function: Callable[[Tensor], Tensor], net: nn.Module) -> Program:
        """The program of a function of the input, which runs once, and has a network in it."""
        with ExitStack() as stack:
            for name, module in net.named_modules():
                if name and not list(module.children()):
                    entered = partial(self.entered, name=name)
                    stack.callback(module.register_forward_pre_hook(entered).remove)
            for neuron in self._neurons.values():
                forward = self.of_neuron(neuron, neuron.module.forward)
                stack.enter_context(other_forward(neuron.module, forward))
            for surrogate in spiking_surrogates(net):
                forward = self.of_surrogate(surrogate, surrogate.forward)
                stack.enter_context(other_forward(surrogate, forward))
            stack.callback(functional.reset_net, net)
            stack.enter_context(_Guard(self))
            stack.enter_context(self)
            try:
                output = function(self._x)
            except Exception:
                if self.refused is None:
                    raise
        if self.refused is None:
            self.check_numbers()
        if self.refused is not None:
            raise self.refused
        found = self.value_of(output)
        if not isinstance(found, Value):
            raise NoBoundsError("an output that does not depend on the input")
        return Program(self.operations, found, cut=self.cut)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context in which nothing is recorded."""
        self.pauses += 1
        try:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self._live):
                yield
        finally:
            self.pauses -= 1

    def entered(self, module: nn.Module, args: object, *, name: str) -> None:
        """A module begins."""
        self._where = name

    def refusal(self, what: str) -> NoBoundsError:
        """The error, which is kept."""
        error = NoBoundsError(what)
        error.where = self._where
        self.refused = self.refused or error
        return error

    def moves(self, value: Tensor) -> bool:
        """Whether a tensor depends on the input, or lies where one does."""
        return id(value) in self._values or _memory(value) in self._moving

    def value_of(self, value: Any) -> Any:
        """What stands for an argument."""
        if not isinstance(value, Tensor):
            return value
        found = self._values.get(id(value))
        if isinstance(found, _State):
            raise self.refusal("a forward that reads a neuron's potential v")
        if found is not None:
            if value.dtype not in (self._x.dtype, torch.bool):
                raise self.refusal(
                    f"a conversion to {value.dtype}: bounds are those of {self._x.dtype}"
                )
            return found
        memory = _memory(value)
        if memory in self._moving:
            raise self.refusal("a view of values of the input that no recorded operation gave")
        self._check_origin(value)
        if self._live:
            return value
        # torch multiplies otherwise where a factor has a gradient
        return value.detach().clone().requires_grad_(value.requires_grad)

    def _check_origin(self, constant: Tensor) -> None:
        """Refuse a constant that nothing recorded gave, unless both runs meet it."""
        if _memory(constant) in self._known:
            return
        if self._first is not None:
            raise self.refusal("a tensor of unknown origin, made where nothing is recorded")
        self.unknown.append(constant)
        self._know(constant)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.pauses:
            return func(*args, **kwargs)
        name = func.__name__
        with torch._C.DisableTorchFunction():
            tensors = list(_among((args, kwargs), Tensor))
            moving = [tensor for tensor in tensors if self.moves(tensor)]
        if not moving:
            with torch._C.DisableTorchFunction():
                for tensor in tensors:
                    self._check_origin(tensor)
                found = func(*args, **kwargs)
                for tensor in _among(found, Tensor):
                    self._know(tensor)
            return found
        rule = RULES.get(name.strip("_"))
        attribute = func.__self__.__name__ if name == "__get__" else ""
        is_asked = attribute in _SETTINGS or (rule is ASKED and not attribute)
        if is_asked and any(tensor is not tensors[0] for tensor in moving):
            raise self.refusal(f"{name} with a number that depends on the input")
        if is_asked or (name == "expand_as" and not self.moves(args[0])):
            with self.paused():
                found = func(*args, **kwargs)
                for tensor in _among(found, Tensor):
                    self._know(tensor)
            return found
        if name in _IDENTITIES and id(args[0]) in self._values:
            with self.paused():
                found = func(*args, **kwargs)
            value = self._values[id(args[0])]
            self.cut |= self._graph and name != "requires_grad_" and isinstance(value, Value)
            self._note(found, value)
            return found
        if name in _NUMBERS:
            raise self.refusal(f"{name}, a number that depends on the input")
        if rule is None or attribute:
            raise self.refusal(f"the operation {attribute or name}")
        return self._recorded(func, args, kwargs, tensors)

    def _recorded(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """What a function gives, which is recorded."""
        with torch._C.DisableTorchFunction():
            given = mapped(args, self.value_of)
            named = mapped(kwargs, self.value_of)
            versions = [tensor._version for tensor in tensors]
        with self.paused():
            found = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            written = [
                one for one, before in zip(tensors, versions, strict=True) if one._version != before
            ]
        name = func.__name__.strip("_")
        if any(one is not found for one in written) or (written and name not in MAY_WRITE):
            raise self.refusal(f"{func.__name__}, which writes into a tensor: write x = f(x)")
        named.pop("inplace", None)
        first = next(_among(found, Tensor), None)
        if first is None:
            raise self.refusal(f"{name}, a number that depends on the input")
        if first.dtype == torch.bool and RULES[name] not in OF_TRUTH:
            raise self.refusal(
                f"the operation {name} of a comparison: convert it first, as in (x >= "
                "0).to(x.dtype)"
            )
        operation = Operation(func, given, named, self._where, bool(written), first.shape)
        self._add(operation, found)
        return found

    def _add(self, operation: Operation, found: Any) -> None:
        """An operation, and the tensors that it gave."""
        self.cut |= self._graph and not torch.is_grad_enabled()
        number = len(self.operations)
        self.operations.append(operation)
        if not isinstance(found, Tensor):
            for part, one in enumerate(found):
                if isinstance(one, Tensor):
                    self._note(one, Value(number, part))
            return
        self._note(found, Value(number))
        if operation.writes:
            for other in self._moving[_memory(found)]:
                if other is not found:
                    self._note(other, self._seen(other, found))

    def _seen(self, x: Tensor, written: Tensor) -> Value:
        """What a tensor holds after another one that may share some of its memory was written to:
        elements of what it held and of what was written.
        """
        new, before = self._values[id(written)], self._values[id(x)]
        if isinstance(new, _State) or isinstance(before, _State):
            raise self.refusal("a write into memory of a neuron's potential")
        own, others = _places(x), _places(written)
        if own.shape == others.shape and torch.equal(own, others):
            return new
        place = torch.full((int(max(own.max(), others.max())) + 1,), -1)
        place[others.flatten()] = own.numel() + torch.arange(others.numel())
        index = place[own]
        index = torch.where(index < 0, torch.arange(own.numel()).view(own.shape), index)
        flat = [self._made(Tensor.flatten, value) for value in (before, new)]
        joined = self._made(torch.cat, flat)
        return self._made(Tensor.__getitem__, joined, index)

    def _made(self, func: Any, *args: Any) -> Value:
        """The value of an operation that the forward does not call."""
        self.operations.append(Operation(func, args, {}, self._where))
        return Value(len(self.operations) - 1)

    def of_neuron(self, neuron: Neuron, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of a spiking layer, each call of which is one operation."""

        def called(x: Any, *args: Any, **kwargs: Any) -> Any:
            if self.pauses:
                return forward(x, *args, **kwargs)
            name = neuron.name
            with self.paused():
                given = self.value_of(x)
                if not isinstance(given, Value):
                    raise self.refusal(
                        f"the layer {name} got no bounds: what reaches it does not depend on the "
                        "input"
                    )
                self._check_states(neuron)
                found = forward(x, *args, **kwargs)
                operation = Operation(neuron, (given,), {}, self._where, shape=found.shape)
            self._add(operation, found)
            self._calls[name] += 1
            self._steps[name] += len(x) if neuron.module.step_mode == "m" else 1
            if isinstance(neuron.module.v, Tensor):
                self._note(neuron.module.v, _State(name, self._calls[name]))
            return found

        return called

    def of_surrogate(self, function: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of a surrogate outside of spiking layers, likewise."""

        def called(x: Any, *args: Any, **kwargs: Any) -> Any:
            if self.pauses or not self.moves(x):
                return forward(x, *args, **kwargs)
            with self.paused():
                given = self.value_of(x)
                found = forward(x, *args, **kwargs)
                operation = Operation(function, (given,), {}, self._where, shape=found.shape)
            self._add(operation, found)
            return found

        return called

    def _check_states(self, neuron: Neuron) -> None:
        """Raise NoBoundsError if something other than its calls changed a neuron in this run."""
        name = neuron.name
        numbers = neuron.numbers(learned=not self._live)
        if self._numbers.setdefault(name, numbers) != numbers:
            raise self.refusal(_changes(name))
        v = neuron.module.v
        call = self._calls[name]
        if call and self._values.get(id(v)) != _State(name, call):
            raise self.refusal(
                f"the layer {name}, which is reset, or whose state is set, between two calls of "
                "one forward: use a neuron of its own for each"
            )
        is_constant = not isinstance(v, Tensor) or not self.moves(v)
        if not call and not (is_constant and bool((torch.as_tensor(v) == neuron.initial).all())):
            raise self.refusal(
                f"the layer {name}, whose v is set before its first step: set no v in a forward"
            )
        if isinstance(neuron.module, DLIFNode) and neuron.time_step != self._steps[name]:
            raise self.refusal(f"the layer {name}, whose time step is set, between two calls")

    def check_numbers(self) -> None:
        """Refuse a neuron that has run and charges, fires or resets differently now."""
        for name, numbers in self._numbers.items():
            if numbers != self._neurons[name].numbers(learned=not self._live):
                self.refusal(_changes(name))

    def _know(self, tensor: Tensor) -> None:
        """A constant."""
        self._alive.append(tensor)
        self._known.add(_memory(tensor))

    def _note(self, tensor: Tensor, value: Value | _State) -> None:
        """What depends on the input."""
        self._alive.append(tensor)
        if id(tensor) not in self._values:
            self._moving.setdefault(_memory(tensor), []).append(tensor)
        self._values[id(tensor)] = value


class _Guard(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Refuses what reaches torch's dispatcher with values of the input and is not recorded."""

    def __init__(self, record: Record) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # likewise
        self._record = record

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._record.pauses and any(
            map(self._record.moves, _among((args, kwargs or {}), Tensor))
        ):
            raise self._record.refusal(f"{func}, which is called around what is recorded")
        return func(*args, **(kwargs or {}))


_NUMBERS = ("__float__", "__int__", "__bool__", "__index__", "item", "tolist", "numpy")


def _changes(name: str) -> str:
    return (
        f"the layer {name}, whose threshold, reset, decay or gain changes within one forward: use "
        "a neuron of its own for each value"
    )


def _memory(tensor: Tensor) -> int:
    """The address of a tensor's storage; its own if it has none."""
    with torch._C.DisableTorchFunction():
        try:
            return int(tensor.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError):  # sparse, or of a subclass
            return id(tensor)


def _places(tensor: Tensor) -> Tensor:
    """Where the elements lie in their storage."""
    offset = int(tensor.storage_offset())
    size = offset + 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size += (length - 1) * stride
    return torch.arange(size).as_strided(tensor.shape, tensor.stride(), offset)


def mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """Arguments with each part through a function."""
    if type(value) in (tuple, list):
        return type(value)(mapped(part, function) for part in value)
    if type(value) is dict:
        return {key: mapped(part, function) for key, part in value.items()}
    return function(value)


def _among(value: Any, kind: type) -> Iterator[Any]:
    """Parts of arguments or results that are of a kind."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _among(part, kind)
    elif isinstance(value, dict):
        yield from _among(list(value.values()), kind)


def _alike(a: Any, b: Any) -> bool:
    """Whether two arguments are the same."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and same(a, b)
    if type(a) in (tuple, list):
        return type(a) is type(b) and len(a) == len(b) and all(map(_alike, a, b))
    if type(a) is dict:
        return a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in a)
    return type(a) is type(b) and bool(a == b)
