"""Digests of data, of settings and of what a network holds."""

import hashlib
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from pathlib import PurePath
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sj_robust.core.host import base

__all__ = ["description", "fingerprint", "parts_of"]

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
    PurePath,
)
_NAMED = (type, FunctionType, BuiltinFunctionType)
_OF_MODULES = {*vars(nn.Module())}
"""Attributes that every module has: described apart, or left to the logits."""
_OF_NEURONS = {*_OF_MODULES, "_memories", "v_seq"}
""":data:`_OF_MODULES`, and what a neuron keeps of its last forward."""


def fingerprint(value: object) -> str:
    """Digest of :func:`description`, the same in every run: 16 hexadecimal digits. 指纹。

    Examples:
        >>> fingerprint({"eps": 0.1}) == fingerprint({"eps": 0.1})
        True
        >>> fingerprint(torch.zeros(2)) == fingerprint(torch.zeros(2, 1))
        False
    """
    return _digest(description(value).encode())


def description(value: object) -> str:
    """Plain values, tensors and settings as text without addresses. 对象的可复现描述。

    It goes into collections, dataclasses, namespaces, networks, and into what a function binds:
    arguments, defaults and the values that it closes over. Of other objects the class is told, and
    of a function's code the name.

    Examples:
        >>> from functools import partial
        >>> description(partial(round, ndigits=2))
        'partial(function=round, arguments=[], ndigits=2)'
    """
    return _text(value, frozenset())


def parts_of(net: nn.Module, *, parameters: bool = True) -> dict[str, str]:
    """Digests of what a network holds by name: its modules with their attributes, buffers and
    parameters, without modes and states of neurons. 网络的组成部分及其摘要。

    Args:
        net: The network.
        parameters: Whether parameters are among the parts.

    Examples:
        >>> list(parts_of(nn.Sequential(nn.Flatten())))
        ['network', 'network.0', 'network.0.start_dim', 'network.0.end_dim']
    """
    return _parts(net, parameters, frozenset())


def _parts(net: nn.Module, parameters: bool, outside: frozenset[int]) -> dict[str, str]:
    known = outside.union(map(id, net.modules()))
    texts = {}
    for path, module in net.named_modules(prefix="network"):
        texts[path] = type(module).__qualname__
        passing = _OF_NEURONS if isinstance(module, base.MemoryModule) else _OF_MODULES
        held = {name: value for name, value in vars(module).items() if name not in passing}
        held |= dict(module.named_buffers(recurse=False))
        if parameters:
            held |= dict(module.named_parameters(recurse=False))
        for name, value in held.items():
            texts[f"{path}.{name}"] = _text(value, known)
    return {name: _digest(text.encode())[:12] for name, text in texts.items()}


def _text(value: Any, outside: frozenset[int]) -> str:
    """The description of a value, which may hold the values outside of it again."""
    if isinstance(value, Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if isinstance(value, _PLAIN):
        return repr(value)
    name = value.__qualname__ if isinstance(value, _NAMED) else type(value).__qualname__
    if id(value) in outside:
        return name
    if isinstance(value, Tensor):
        return name if is_lazy(value) else _text_of_tensor(value)
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return f"array({value.dtype}, {list(value.shape)}, {_digest(value.tobytes())})"
    outside |= {id(value)}
    if isinstance(value, dict):
        items = [
            f"{_text(key, outside)}: {_text(kept, outside)}" for key, kept in dict.items(value)
        ]
        return f"{{{', '.join(sorted(items))}}}"
    if isinstance(value, list | tuple | set | frozenset):
        texts = [_text(part, outside) for part in value]
        ordered = isinstance(value, list | tuple)
        return f"[{', '.join(texts)}]" if ordered else f"{{{', '.join(sorted(texts))}}}"
    bound = _bound(value, outside)
    texts = [f"{key}={_text(part, outside)}" for key, part in bound.items()]
    return f"{name}({', '.join(texts)})" if texts else name


def _text_of_tensor(tensor: Tensor) -> str:
    dense = tensor.detach().cpu()
    if dense.layout is not torch.strided:
        dense = dense.to_dense()
    flat = dense.contiguous().reshape(-1)
    content = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    kind = f"{tensor.dtype} {list(tensor.shape)};"
    digest = _digest(kind.encode() + content)
    return f"tensor({tensor.dtype}, {list(tensor.shape)}, {digest})"


def _bound(value: Any, outside: frozenset[int]) -> Mapping[str, object]:
    """What an object holds, if its kind is known."""
    if isinstance(value, nn.Module):
        return _parts(value, True, outside)
    if isinstance(value, partial):
        return {"function": value.func, "arguments": value.args, **value.keywords}
    if isinstance(value, MethodType):
        return {"function": value.__func__, "object": value.__self__}
    if isinstance(value, FunctionType):
        held: dict[str, object] = {
            "defaults": value.__defaults__,
            "keywords": value.__kwdefaults__,
            "closed over": [_content(cell) for cell in value.__closure__ or ()],
        }
        return {key: part for key, part in held.items() if part}
    if isinstance(value, Namespace | SimpleNamespace):
        return vars(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return {}


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # nothing is in it yet
        return None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
