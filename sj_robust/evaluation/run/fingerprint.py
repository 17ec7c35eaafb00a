"""Fingerprints of networks, attacks and data sets."""

import dis
import functools
import hashlib
import importlib.util
import io
import logging
import os
import platform
import re
import sys
import sysconfig
import threading
import zipfile
from argparse import Namespace
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from copyreg import dispatch_table
from enum import Enum
from itertools import takewhile
from pathlib import Path, PurePath
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodType,
    MethodWrapperType,
    ModuleType,
    SimpleNamespace,
    WrapperDescriptorType,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sj_robust.core.environment import CODE_KEY
from sj_robust.core.host import base

__all__ = ["code_of", "description", "fingerprint", "parts_of"]

_DEPTH = 12
_BARE = set(vars(nn.Module()))
"""Attributes that every module has: described apart, or of no effect."""
_HOST_STATE = {"v_seq", "_memories"}
"""What a neuron of SpikingJelly keeps from its last forward."""
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_NO_BEHAVIOUR = {"__init__", "__repr__", "extra_repr"}
"""Methods whose effects are seen in what they leave."""
_OPEN = (
    io.IOBase,
    threading.Thread,
    threading.Condition,
    threading.Event,
    type(threading.Lock()),
)
"""What is open to the outside, or held by somebody, while the process lives."""
_SURROUNDINGS = (*_OPEN, logging.Filterer, type(os.environ))
"""What belongs to a process: its class is all that is said of it."""
_PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    np.generic,
)
_CACHED = type(functools.lru_cache(len))
_FOLDERS = [sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")]
_LIBRARIES = (
    "<frozen ",
    *(f"{folder}{os.sep}" for folder in (*_FOLDERS, Path(__file__).parents[2])),
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
    class and its attributes, or what it would be pickled with where a package's class says so; a
    function its code, bound arguments, defaults, and the values it closes over and reads from its
    module; a module of one's own its plain values; a network what :func:`parts_of` tells. Code of
    installed packages is named, with its version. Of locks, loggers, open files, writers, the
    environment, and objects that cannot be read, the class alone is told.

    Examples:
        >>> from functools import partial
        >>> description(partial(round, ndigits=2))
        'builtins.round(ndigits=2)'
    """
    return _Walk().whole(value)


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


def code_of(function: object) -> dict[str, str]:
    """The digest of the code that a function of one's own runs, under a name with the version of
    Python, since others compile the same code otherwise. 代码指纹。

    It covers the function, the functions and classes that it names, and the values that these read
    from their modules, except devices and paths, which belong to a machine. Code of installed
    packages and of this one is named alone, so that another commit or release changes nothing.
    Comments and line numbers do not count.

    Args:
        function: The function; a class is one too.

    Examples:
        >>> code_of(lambda x: 2 * x) == code_of(lambda x: 3 * x)
        False
    """
    walk = _Walk(constructors=True)
    version = ".".join(platform.python_version_tuple()[:2])
    return {f"{CODE_KEY} {version}": _digest(walk.whole(function))}


class _Walk:
    """Describes values; what several of them share is a part of its own."""

    def __init__(self, *, parameters: bool = True, constructors: bool = False) -> None:
        self.parts: dict[str, str] = {}
        self._parameters = parameters
        self._of_code = constructors
        self._effectless = _NO_BEHAVIOUR - {"__init__"} if constructors else _NO_BEHAVIOUR
        self._kept: list[object] = []  # so that no id is given twice
        self._names: dict[int, str] = {}
        self._open: set[int] = set()
        self._networks = 0
        self._given: Counter[str] = Counter()
        self._globals: dict[tuple[int, str], str] = {}
        self._left: deque[tuple[str, object]] = deque()

    def whole(self, value: object) -> str:
        """The description of a value, and all parts."""
        text = self.text(value)
        self.finish()
        further = [f"{name}: {part}" for name, part in sorted(self.parts.items())]
        return "\n".join([text, *further])

    def text(self, value: object) -> str:
        """The description of a value; parts that it shares with others are added."""
        try:
            return self._text(value)
        except Exception:  # an object of somebody's that cannot be read
            return f"<{_name_of(type(value))}>"

    def _text(self, value: object) -> str:
        if isinstance(value, Enum):
            return f"{_name_of(type(value))}.{value.name}"
        if self._of_code and isinstance(value, torch.device | PurePath):
            return f"<{_name_of(type(value))}>"
        if isinstance(value, _PLAIN):
            return repr(value)
        if isinstance(value, Tensor):
            return f"tensor({value.dtype}, {list(value.shape)}, {_digest_of_tensor(value)})"
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, ModuleType):
            return self._module(value)
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
            elif isinstance(value, ModuleType):
                self._add_module(name, value)
            else:
                self.parts[name] = self.text(value)

    def network(self, root: nn.Module, prefix: str) -> None:
        """Add the parts of a network, named after their place in it."""
        places = [(f"{prefix}.{name}" if name else prefix, m) for name, m in root.named_modules()]
        for place, module in places:
            self._names.setdefault(id(module), place)
            self._kept.append(module)
        scripts = [module for _, module in places if isinstance(module, torch.jit.ScriptModule)]
        inside = {id(part) for script in scripts for part in script.modules() if part is not script}
        for place, module in places:
            children = [f"{name}={self.text(child)}" for name, child in module._modules.items()]
            self.parts[place] = f"{self._class(type(module))}({', '.join(children)})"
            for name, tensor in self._tensors(module):
                self.parts[f"{place}.{name}"] = self.text(tensor)
            if not isinstance(module, torch.jit.ScriptModule):
                self._add_attributes(place, module)
            elif id(module) not in inside:
                self.parts[f"{place}.code"] = _script_text(module)
            for name in _HOOKS:
                if hooks := vars(module).get(name):
                    self.parts[f"{place}.{name}"] = self.text(list(hooks.values()))

    def _tensors(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        if self._parameters:
            yield from module.named_parameters(recurse=False, remove_duplicate=False)
        yield from module.named_buffers(recurse=False, remove_duplicate=False)

    def _add_attributes(self, place: str, module: nn.Module) -> None:
        passing = _BARE | _HOST_STATE if isinstance(module, base.MemoryModule) else _BARE
        for name, value in vars(module).items():
            usual = getattr(type(module), name, self) is value
            if name not in passing and not usual:
                self.parts[f"{place}.{name}"] = self.text(value)

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
        if isinstance(value, Mapping | list | tuple | range | deque | set | frozenset):
            return self._collection(value)
        if isinstance(value, np.ndarray):
            if value.dtype.hasobject:
                return f"array[{', '.join(map(self.text, value.reshape(-1).tolist()))}]"
            content = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:16]
            return f"array({value.dtype}, {list(value.shape)}, {content})"
        if isinstance(value, BuiltinFunctionType | MethodWrapperType):
            return self._builtin(value)
        if isinstance(value, MethodDescriptorType | WrapperDescriptorType):
            return value.__qualname__
        if isinstance(value, _CACHED):
            return f"cached {self.text(value.__wrapped__)}"
        return self._object(value)

    def _collection(self, value: Any) -> str:
        """What is inside; of a class of one's own also what else it holds."""
        if value is sys.modules or isinstance(value, _SURROUNDINGS):
            return self._class(type(value))
        if isinstance(value, Mapping):
            items = [f"{self.text(key)}: {self.text(value[key])}" for key in value]
            text = "{" + ", ".join(sorted(items)) + "}"
        elif isinstance(value, set | frozenset):
            text = "{" + ", ".join(sorted(map(self.text, value))) + "}"
        else:
            text = f"[{', '.join(map(self.text, value))}]"
        return text if _is_of_a_package(type(value).__module__) else text + self._object(value)

    def _builtin(self, value: Any) -> str:
        """Name of a function that is not in Python, with the object that it is of."""
        name = f"{value.__module__}.{value.__qualname__}"
        owner = value.__self__
        return name if _is_free(value) else f"{name}[{self.text(owner)}]"

    def _object(self, value: object) -> str:
        """Class and state; of what belongs to the process, and of torch's insides, the class."""
        kind = type(value)
        name = self._class(kind)
        if isinstance(value, _SURROUNDINGS) or _holds_what_is_open(value):
            return name
        if isinstance(value, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
            return str(value)
        if kind.__module__.startswith("torch._"):
            return name
        return f"{name}({', '.join(self._named(_state(value)))})"

    def _module(self, module: ModuleType) -> str:
        """Name of a module; the plain values of one's own are parts."""
        if _is_packaged_module(module):
            return f"module {module.__name__}"
        if id(module) not in self._names:
            self._names[id(module)] = self._new_place(f"module {module.__name__}")
            self._kept.append(module)
            self._left.append((self._names[id(module)], module))
        return self._names[id(module)]

    def _add_module(self, place: str, module: ModuleType) -> None:
        for name, value in vars(module).items():
            if not name.startswith("__") and _is_plain(value):
                self.parts[f"{place}.{name}"] = self.text(value)

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
        function = _function_of(value)
        if isinstance(function, FunctionType):
            made = function.__code__.co_filename == "<string>"  # as dataclasses make theirs
            own = made and function.__module__ == kind.__module__ and not foreign
            known = name in self._effectless or own or _is_packaged(function)
            return "" if known else self.text(function)
        special = name.startswith("__") and name.endswith("__")
        return "" if special or name == "_abc_impl" or not foreign else self.text(function)

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
        """Make what code reads a part, except for what the version of a package says."""
        value = namespace[name]
        if isinstance(value, ModuleType):
            self.text(value)
        elif not _is_known(value, namespace) and (id(namespace), name) not in self._globals:
            place = self._new_place(f"global {name}")
            self._globals[id(namespace), name] = place
            self._left.append((place, value))

    def _named(self, items: Mapping[str, object]) -> list[str]:
        return [f"{name}={self.text(items[name])}" for name in sorted(items)]


def _state(value: object) -> dict[str, object]:
    """What an object holds: what a package's class pickles it with, and attributes."""
    kind = type(value)
    reduced = _reduced(value)
    if reduced is None:
        return _attributes(value, kind.__mro__)
    if _is_of_a_package(kind.__module__):
        return {"pickled": reduced}
    own = [one for one in kind.__mro__ if not _is_of_a_package(one.__module__)]
    return _attributes(value, own) | {"pickled": reduced}


def _reduced(value: Any) -> object:
    """What an object is pickled with, if a class of a package, and not Python's usual way, says."""
    kind = type(value)
    ways = ("__reduce_ex__", "__reduce__")
    saying = next(one for one in kind.__mro__ if not vars(one).keys().isdisjoint(ways))
    usual = saying is object or not _is_of_a_package(saying.__module__)
    if usual and kind not in dispatch_table:
        return None
    try:
        reduced = dispatch_table[kind](value) if kind in dispatch_table else value.__reduce_ex__(2)
    except Exception:  # it cannot be pickled
        return None
    if isinstance(reduced, str):
        return reduced
    items = [list(more) for more in reduced[3:5] if more is not None]
    return [*reduced[:3], *items]


def _attributes(value: object, kinds: Sequence[type]) -> dict[str, object]:
    """What an object holds in its dictionary, and in the slots of its classes."""
    found = _dictionary(value)
    for kind in kinds:
        for name, member in vars(kind).items():
            if isinstance(member, MemberDescriptorType):
                try:
                    found[name] = member.__get__(value)
                except AttributeError:  # nothing is in the slot
                    continue
    return found


def _dictionary(value: object) -> dict[str, object]:
    """The attributes of an object, whatever its class makes of being asked for them."""
    try:
        return dict(vars(value))
    except Exception:  # it has none, or what it does when asked fails
        return {}


def _holds_what_is_open(value: object, depth: int = 4) -> bool:
    """Whether an object of a package, such as a writer of logs, has open files or threads."""
    if isinstance(value, _OPEN):
        return True
    if depth == 0 or not _is_of_a_package(type(value).__module__):
        return False
    return any(_holds_what_is_open(item, depth - 1) for item in _dictionary(value).values())


def _is_plain(value: object, depth: int = _DEPTH) -> bool:
    """Whether a value is data: numbers, texts, tensors, and collections of them."""
    if isinstance(value, Namespace | SimpleNamespace):
        value = vars(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return depth > 0 and all(_is_plain(item, depth - 1) for item in value)
    return isinstance(value, (*_PLAIN, Enum, Tensor, np.ndarray))


def _is_known(value: Any, namespace: Mapping[str, object]) -> bool:
    """Whether the version of a package says what a global is."""
    if isinstance(value, BuiltinFunctionType):
        return _is_free(value)
    if isinstance(value, FunctionType):
        return _is_packaged(value)
    if isinstance(value, type):
        return _is_of_a_package(value.__module__)
    inside = _is_of_a_package(str(namespace.get("__name__")))
    return inside and _is_of_a_package(type(value).__module__)


def _is_free(function: Any) -> bool:
    """Whether a function that is not in Python is of no object."""
    return function.__self__ is None or isinstance(function.__self__, ModuleType)


def _function_of(value: Any) -> Any:
    """What runs when an attribute of a class is used."""
    if isinstance(value, staticmethod | classmethod):
        return value.__func__
    if isinstance(value, property):
        return value.fget
    if isinstance(value, functools.cached_property):
        return value.func
    if isinstance(value, functools.partialmethod):
        return functools.partial(value.func, *value.args, **value.keywords)
    return value


def _script_text(module: torch.jit.ScriptModule) -> str:
    """What TorchScript saves of a module: code, constants and attributes, without places in files
    and the numbers that it gives to classes of one name.
    """
    content = []
    with zipfile.ZipFile(io.BytesIO(module.save_to_buffer())) as archive:
        for name in sorted(archive.namelist()):
            if not name.endswith((".debug_pkl", "serialization_id")):
                plain = re.sub(rb"___torch_mangle_\d+\.?", b"", archive.read(name))
                content.append(hashlib.sha256(plain).hexdigest())
    return " ".join(sorted(content))


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
    """What the code of a function reads from its module, from modules that it names there, and
    what it imports.
    """
    for code in _codes(function.__code__):
        instructions = list(dis.get_instructions(code))
        for number, instruction in enumerate(instructions):
            following = instructions[number + 1 :]
            read = instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
            if read and instruction.argval in function.__globals__:
                yield _followed(function.__globals__, instruction.argval, following)
            if instruction.opname == "IMPORT_NAME":
                level = instructions[number - 2].argval
                yield from _imported(function, instruction.argval, level, following)


def _imported(
    function: FunctionType, name: str, level: int, instructions: Sequence[dis.Instruction]
) -> Iterator[tuple[dict[str, Any], str]]:
    """The module that a statement imports, if it is loaded, and what is taken from it."""
    package = function.__globals__.get("__package__") or ""
    if level and package:
        name = importlib.util.resolve_name("." * level + name, package)
    if name not in sys.modules:
        return
    yield sys.modules, name
    namespace = vars(sys.modules[name])
    taking = takewhile(lambda one: one.opname.startswith(("IMPORT_FROM", "STORE_")), instructions)
    for instruction in taking:
        if instruction.opname == "IMPORT_FROM" and instruction.argval in namespace:
            yield namespace, instruction.argval


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


def _is_packaged_module(module: ModuleType) -> bool:
    file = vars(module).get("__file__")
    if isinstance(file, str) and Path(file).is_absolute():
        return file.startswith(_LIBRARIES)
    return _is_of_a_package(module.__name__)


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
