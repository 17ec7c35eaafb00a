"""Short texts that differ when what they stand for differs: a network, an attack, a data set."""

import dis
import functools
import hashlib
import os
import sys
import sysconfig
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["description", "fingerprint", "parts_of"]

_DEPTH = 12
_STATE = {
    "training",
    "v_seq",
    "_memories",
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_is_full_backward_hook",
    "_compiled_call_impl",
}
"""Attributes of a module that are described apart, or say what was done with it last."""
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_NO_BEHAVIOUR = {"__init__", "__repr__", "extra_repr"}
"""Methods whose effects are seen in what they leave."""
_WITH_PLAIN_REPR = {"datetime", "decimal", "fractions", "pathlib", "uuid"}
_FOLDERS = [sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")]
_LIBRARIES = (
    "<frozen ",
    *(f"{folder}{os.sep}" for folder in (*_FOLDERS, Path(__file__).parents[1])),
    *(f"{Path(folder).resolve()}{os.sep}" for folder in _FOLDERS),
)
"""What the file names of code begin with for which the version of its package stands."""


def fingerprint(value: object) -> str:
    """Digest of :func:`description`, the same in every run: 16 hexadecimal digits. 指纹。

    Examples:
        >>> fingerprint({"eps": 0.1}) == fingerprint({"eps": 0.1})
        True
        >>> fingerprint(torch.zeros(2)) == fingerprint(torch.zeros(2, 1))
        False
    """
    return _digest(description(value))


def description(value: object) -> str:
    """What decides the behaviour of ``value``, as text without addresses. 对象的可复现描述。

    Plain data, tensors, networks, functions, objects and collections of them. An object is its
    class and its attributes; a function its code, bound arguments, defaults, and the values it
    closes over and reads from its module; a network what :func:`parts_of` tells. Code of installed
    packages is named, with its version.

    Examples:
        >>> from functools import partial
        >>> description(partial(round, ndigits=2))
        'builtins.round(ndigits=2)'
    """
    walk = _Walk()
    text = walk.text(value)
    walk.finish()
    further = [f"{name}: {part}" for name, part in sorted(walk.parts.items())]
    return "\n".join([text, *further])


def parts_of(model: object, *, parameters: bool = True) -> dict[str, str]:
    """A network in parts by name, each with the digest of what it is. 网络的组成部分及其摘要。

    Its modules with their wiring, parameters, all buffers, attributes and hooks, as
    ``net.0.weight``; the code of their classes, as ``class Net.forward``; and what this code reads
    from its module, as ``global SCALE``. States of neurons and modes are left out. Of
    anything else than an ``nn.Module`` the description is one part.

    Args:
        model: The network.
        parameters: Whether parameters are among the parts.

    Examples:
        >>> list(parts_of(nn.Sequential(nn.Linear(2, 2, bias=False))))[:3]
        ['network', 'network.0', 'network.0.weight']
    """
    walk = _Walk(parameters=parameters)
    if isinstance(model, nn.Module):
        walk.network(model, "network")
    else:
        walk.parts["network"] = walk.text(model)
    walk.finish()
    return {name: _digest(part)[:12] for name, part in walk.parts.items()}


class _Walk:
    """Describes values; what several of them share is a part of its own."""

    def __init__(self, *, parameters: bool = True) -> None:
        self.parts: dict[str, str] = {}
        self._parameters = parameters
        self._kept: list[object] = []  # so that no id is given twice
        self._names: dict[int, str] = {}
        self._open: set[int] = set()
        self._networks = 0
        self._given: Counter[str] = Counter()
        self._globals: dict[tuple[int, str], str] = {}
        self._left: deque[tuple[str, object]] = deque()

    def text(self, value: object) -> str:
        """The description of a value; parts that it shares with others are added."""
        if isinstance(value, Enum):
            return f"{_name_of(type(value))}.{value.name}"
        if value is None or isinstance(
            value,
            bool | int | float | complex | str | bytes | torch.dtype | torch.device | np.generic,
        ):
            return repr(value)
        if isinstance(value, Tensor):
            return f"tensor({value.dtype}, {list(value.shape)}, {_digest_of_tensor(value)})"
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, ModuleType):
            return f"module {value.__name__}"
        if id(value) in self._names:
            return self._names[id(value)]
        if id(value) in self._open or len(self._open) > _DEPTH:
            return f"<{_name_of(type(value))}>"
        self._open.add(id(value))
        try:
            return self._compound(value)
        finally:
            self._open.remove(id(value))

    def finish(self) -> None:
        """Add the parts that were named only."""
        while self._left:
            name, value = self._left.popleft()
            if isinstance(value, type) and name.startswith("class "):
                self._add_class(name, value)
            else:
                self.parts[name] = self.text(value)

    def network(self, root: nn.Module, prefix: str) -> None:
        """Add the parts of a network, named after their place in it."""
        places = [(f"{prefix}.{name}" if name else prefix, m) for name, m in root.named_modules()]
        for place, module in places:
            self._names.setdefault(id(module), place)
            self._kept.append(module)
        for place, module in places:
            children = [f"{name}={self.text(child)}" for name, child in module._modules.items()]
            self.parts[place] = f"{self._class(type(module))}({', '.join(children)})"
            tensors = module._parameters | module._buffers if self._parameters else module._buffers
            for name, tensor in tensors.items():
                self.parts[f"{place}.{name}"] = self.text(tensor)
            for name, value in vars(module).items():
                usual = getattr(type(module), name, self) is value
                if name not in _STATE and "_hooks" not in name and not usual:
                    self.parts[f"{place}.{name}"] = self.text(value)
            for name in _HOOKS:
                if hooks := getattr(module, name):
                    self.parts[f"{place}.{name}"] = self.text(list(hooks.values()))

    def _compound(self, value: Any) -> str:
        """The description of a value with others inside."""
        if isinstance(value, nn.Module):
            self._networks += 1
            place = f"network {self._networks}"
            self.network(value, place)
            return place
        if isinstance(value, functools.partial):
            arguments = [*map(self.text, value.args), *self._named(value.keywords)]
            return f"{self.text(value.func)}({', '.join(arguments)})"
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, MethodType):
            return f"{self.text(value.__func__)} of {self.text(value.__self__)}"
        if isinstance(value, Mapping):
            items = [f"{self.text(key)}: {self.text(value[key])}" for key in value]
            return "{" + ", ".join(sorted(items)) + "}"
        if isinstance(value, list | tuple | range | deque):
            return f"[{', '.join(map(self.text, value))}]"
        if isinstance(value, set | frozenset):
            return "{" + ", ".join(sorted(map(self.text, value))) + "}"
        if isinstance(value, np.ndarray):
            if value.dtype.hasobject:
                return f"array[{', '.join(map(self.text, value.reshape(-1).tolist()))}]"
            content = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:16]
            return f"array({value.dtype}, {list(value.shape)}, {content})"
        if callable(value) and hasattr(value, "__qualname__"):
            return self._builtin(value)
        return self._object(value)

    def _builtin(self, value: Any) -> str:
        """Name of a function that is not in Python, with the object or the function it is of."""
        name = f"{value.__module__}.{value.__qualname__}"
        owner = getattr(value, "__wrapped__", getattr(value, "__self__", None))
        if owner is None or isinstance(owner, ModuleType):
            return name
        return f"{name}[{self.text(owner)}]"

    def _object(self, value: object) -> str:
        """Class and attributes; of objects of Python and of torch's insides the class alone."""
        kind = type(value)
        name = self._class(kind)
        top = kind.__module__.partition(".")[0]
        if top in _WITH_PLAIN_REPR:
            return repr(value)
        inside = top in sys.stdlib_module_names or kind.__module__.startswith("torch._")
        if inside and kind is not SimpleNamespace:
            return name if top != "re" else f"{name}({getattr(value, 'pattern', '')!r})"
        return f"{name}({', '.join(self._named(dict(_attributes(value))))})"

    def _class(self, kind: type) -> str:
        """Name of a class; its code, and what was put in the place of a package's, are parts."""
        if id(kind) not in self._names:
            place = self._new_place(f"class {_name_of(kind)}")
            self._names[id(kind)] = place.removeprefix("class ")
            self._left.append((place, kind))
        return self._names[id(kind)]

    def _new_place(self, name: str) -> str:
        """The name of a part; two of one name, from different modules, are numbered."""
        self._given[name] += 1
        return name if self._given[name] == 1 else f"{name} #{self._given[name]}"

    def _add_class(self, place: str, kind: type) -> None:
        self._kept.append(kind)
        bases = [self._class(base) for base in kind.__bases__ if base is not object]
        foreign = not _is_of_a_package(kind.__module__)
        if foreign:
            self.parts[place] = f"({', '.join(bases)})"
        for name, value in vars(kind).items():
            if text := self._of_class(kind, name, value, foreign=foreign):
                self.parts[f"{place}.{name}"] = text

    def _of_class(self, kind: type, name: str, value: Any, *, foreign: bool) -> str:
        """What stands in a class; of a package's class only what comes from elsewhere."""
        function = getattr(value, "__func__", getattr(value, "fget", getattr(value, "func", value)))
        if isinstance(function, FunctionType):
            made = function.__code__.co_filename == "<string>"  # as dataclasses make theirs
            own = made and function.__module__ == kind.__module__ and not foreign
            known = name in _NO_BEHAVIOUR or own or _is_packaged(function)
            return "" if known else self.text(function)
        special = name.startswith("__") and name.endswith("__")
        return "" if special or name == "_abc_impl" or not foreign else self.text(value)

    def _function(self, function: FunctionType) -> str:
        """Name of a function, with what it binds; of one's own also its code and what it reads."""
        bound = [self.text(item) for item in function.__defaults__ or ()]
        bound += self._named(function.__kwdefaults__ or {})
        for cell in function.__closure__ or ():
            try:
                bound.append(self.text(cell.cell_contents))
            except ValueError:  # nothing is in it yet
                bound.append("<empty>")
        if not _is_packaged(function):
            own = {name: item for name, item in vars(function).items() if name != "__wrapped__"}
            bound += [_digest(_code_text(function.__code__)), *self._named(own)]
            for namespace, name in _read_globals(function):
                self._global(namespace, name)
        name = function.__qualname__
        if _is_packaged(function):
            name = f"{function.__module__}.{name}"
        return f"{name}[{', '.join(bound)}]" if bound else name

    def _global(self, namespace: dict[str, Any], name: str) -> None:
        """Make what code reads a part, but for what the version of a package says."""
        value = namespace[name]
        packaged = isinstance(value, BuiltinFunctionType | ModuleType)
        if isinstance(value, FunctionType):
            packaged = _is_packaged(value)
        elif isinstance(value, type):
            packaged = _is_of_a_package(value.__module__)
        if not packaged and (id(namespace), name) not in self._globals:
            place = self._new_place(f"global {name}")
            self._globals[id(namespace), name] = place
            self._left.append((place, value))

    def _named(self, items: Mapping[str, object]) -> list[str]:
        return [f"{name}={self.text(items[name])}" for name in sorted(items)]


def _attributes(value: object) -> Iterator[tuple[str, object]]:
    """What an object holds, in its dictionary and in slots."""
    yield from getattr(value, "__dict__", {}).items()
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name, getattr(value, name)


def _code_text(code: CodeType) -> str:
    """What a function does, as the interpreter reads it: without line numbers and file names."""
    constants = [_constant_text(constant) for constant in code.co_consts]
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    return f"{code.co_code.hex()} {constants} {names} {code.co_flags}"


def _constant_text(constant: object) -> str:
    if isinstance(constant, CodeType):
        return _code_text(constant)
    if isinstance(constant, frozenset):
        return str(sorted(map(repr, constant)))
    return repr(constant)


def _read_globals(function: FunctionType) -> Iterator[tuple[dict[str, Any], str]]:
    """What the code of a function reads from its module, and from modules that it names there."""
    for code in _codes(function.__code__):
        instructions = list(dis.get_instructions(code))
        for number, instruction in enumerate(instructions):
            read = instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
            if read and instruction.argval in function.__globals__:
                namespace, name = function.__globals__, instruction.argval
                yield _followed(namespace, name, instructions[number + 1 :])


def _followed(
    namespace: dict[str, Any], name: str, instructions: Sequence[dis.Instruction]
) -> tuple[dict[str, Any], str]:
    """What is read from a module by the attributes that follow."""
    for instruction in instructions:
        module = namespace[name]
        attribute = instruction.opname in ("LOAD_ATTR", "LOAD_METHOD")
        if not (attribute and isinstance(module, ModuleType)):
            break
        if instruction.argval not in vars(module):
            break
        namespace, name = vars(module), instruction.argval
    return namespace, name


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code of a function and of those inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _is_packaged(function: FunctionType) -> bool:
    """Whether the version of a package, or of Python, says what a function does."""
    return function.__code__.co_filename.startswith(_LIBRARIES)


@functools.cache
def _is_of_a_package(module: str) -> bool:
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names:
        return top != "__main__"
    origin = getattr(sys.modules.get(top), "__file__", None)
    return origin is not None and origin.startswith(_LIBRARIES)


def _name_of(kind: type) -> str:
    """Name of a class; that of one's own is the same in a script and in a module."""
    packaged = _is_of_a_package(kind.__module__)
    return f"{kind.__module__}.{kind.__qualname__}" if packaged else kind.__qualname__


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _digest_of_tensor(tensor: Tensor) -> str:
    """Digest of shape, type and values."""
    digest = hashlib.sha256()
    digest.update(f"{tensor.dtype} {list(tensor.shape)};".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()[:16]
