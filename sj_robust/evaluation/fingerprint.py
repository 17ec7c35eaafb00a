"""Short texts that differ when what they stand for differs: a network, an attack, a data set."""

import functools
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["description", "fingerprint"]

_DEPTH = 8
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def fingerprint(value: object) -> str:
    """Digest of :func:`description`, the same in every run: 16 hexadecimal digits. 指纹。

    Examples:
        >>> fingerprint({"eps": 0.1}) == fingerprint({"eps": 0.1})
        True
        >>> fingerprint(torch.zeros(2)) == fingerprint(torch.zeros(2, 1))
        False
    """
    return hashlib.sha256(description(value).encode()).hexdigest()[:16]


def description(value: object) -> str:
    """What decides the behaviour of ``value``, as text without addresses. 对象的可复现描述。

    Plain data, tensors, networks, functions and collections of them. A network is its architecture
    as printed and all of its state; a function its name, bound arguments, defaults and the values
    it closes over.

    Examples:
        >>> from functools import partial
        >>> description(partial(round, ndigits=2))
        'builtins.round(ndigits=2)'
    """
    return _describe(value, 0)


def _describe(value: object, depth: int) -> str:
    if value is None or isinstance(
        value, bool | int | float | str | bytes | torch.dtype | torch.device
    ):
        return repr(value)
    if depth > _DEPTH:
        return type(value).__qualname__
    inner = functools.partial(_describe, depth=depth + 1)
    if isinstance(value, Tensor):
        return f"tensor({value.dtype}, {list(value.shape)}, {_digest([value])})"
    if isinstance(value, nn.Module):
        state = {
            name: item for name, item in value.state_dict().items() if isinstance(item, Tensor)
        }
        return f"{_plain(value)} {list(state)} {_digest(state.values())}"
    if isinstance(value, functools.partial):
        arguments = [*map(inner, value.args), *_named(value.keywords, inner)]
        return f"{inner(value.func)}({', '.join(arguments)})"
    if is_dataclass(value) and not isinstance(value, type):
        items = {field.name: getattr(value, field.name) for field in fields(value)}
        return f"{type(value).__qualname__}({', '.join(_named(items, inner))})"
    if isinstance(value, Mapping):
        return (
            "{"
            + ", ".join(f"{inner(key)}: {inner(value[key])}" for key in sorted(value, key=repr))
            + "}"
        )
    if isinstance(value, list | tuple | range):
        return f"[{', '.join(map(inner, value))}]"
    if callable(value) and hasattr(value, "__qualname__"):
        return _describe_function(value, inner)
    attributes = getattr(value, "__dict__", None)
    if attributes:
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        return f"{name}({', '.join(_named(attributes, inner))})"
    return _plain(value)


def _describe_function(value: Any, inner: "functools.partial[str]") -> str:
    """Name of a function, with its defaults and what it closes over where it has any."""
    name = f"{value.__module__}.{value.__qualname__}"
    bound = [inner(item) for item in getattr(value, "__defaults__", None) or ()]
    bound += _named(getattr(value, "__kwdefaults__", None) or {}, inner)
    bound += [inner(cell.cell_contents) for cell in getattr(value, "__closure__", None) or ()]
    owner = getattr(value, "__self__", None)
    if owner is not None and not isinstance(owner, type) and type(owner).__name__ != "module":
        bound.append(inner(owner))
    return f"{name}[{', '.join(bound)}]" if bound else name


def _named(items: Mapping[str, object], inner: "functools.partial[str]") -> list[str]:
    return [f"{name}={inner(items[name])}" for name in sorted(items)]


def _plain(value: object) -> str:
    """Printed form without addresses in memory."""
    return _ADDRESS.sub("", repr(value))


def _digest(tensors: Iterable[Tensor]) -> str:
    """Digest of shapes, types and values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)};".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()[:16]
