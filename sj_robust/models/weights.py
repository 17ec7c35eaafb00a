"""Files of weights, read without running any code in them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sj_robust.core.saved import load_tensors
from sj_robust.neuron.fusion import fused_names, plain_names

__all__ = ["Weights", "as_named_in", "check_keys", "read_weights"]

_ENDINGS = (".pt", ".pth")
_WRAPPERS = ("model", "state_dict", "net", "model_state_dict")


@dataclass(frozen=True)
class Weights:
    """A ``state_dict`` and what its file says of the network.

    Attributes:
        tensors: Parameters and buffers by name, without the ``module.`` of ``DataParallel`` and its
            kind or the ``_orig_mod.`` of ``torch.compile``.
        network: The ``NetworkSpec`` of a checkpoint of this package, as plain data; None for any
            other file.
        options: The options that ``recipes/adv_train.py`` trained it with; None for any other file.
    """

    tensors: dict[str, Tensor]
    network: Mapping[str, Any] | None = None
    options: Mapping[str, Any] | None = None


def read_weights(path: Path) -> Weights:
    """Weights of a file, on the CPU: a checkpoint of this package, or a ``state_dict``, plain or in
    a dictionary.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the ending is another, the file is damaged, holds a pickled network, or no
            tensors by name.

    Examples:
        >>> read_weights(Path("weights.h5"))
        Traceback (most recent call last):
        ...
        ValueError: a file of weights must end in .pt or .pth, got weights.h5; save
        net.state_dict() with torch.save
    """
    if path.suffix not in _ENDINGS:
        raise ValueError(
            f"a file of weights must end in {' or '.join(_ENDINGS)}, got {path}; save "
            "net.state_dict() with torch.save"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.absolute()} does not exist; give a best.pt, or a state_dict saved by torch.save"
        )
    content = load_tensors(path, what="weights", remedy="save net.state_dict() with torch.save")
    if not isinstance(content, dict):
        content = {}
    description = content.get("description")
    if not isinstance(description, dict):
        description = {}
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not content or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise ValueError(f"{path} holds no tensors by name; save net.state_dict() with torch.save")
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):  # of either around the other
        if all(key.startswith(prefix) for key in content):
            content = {key.removeprefix(prefix): value for key, value in content.items()}
    return Weights(dict(content), description.get("network"), description.get("options"))


def as_named_in(net: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names that a network has for them.
    按网络当前的名称返回权重。

    Files of a network without stages, such as those of before :class:`sj_robust.neuron.Stage`, or
    with more of them have other names.

    Args:
        net: The network that the weights are for.
        tensors: Its ``state_dict``, or what it was without stages or as :func:`fuse` makes it.

    Examples:
        >>> import torch
        >>> from sj_robust.neuron import DLIFNode, Stage
        >>> list(as_named_in(nn.Sequential(Stage(DLIFNode(T=2))), {"0.input_gain": torch.ones(2)}))
        ['0.node.input_gain']
    """
    plain = plain_names(net)
    of_plain = {name: name for name in plain.values()}
    known = [plain, of_plain]
    if not any(tensors.keys() <= names.keys() for names in known):
        known.append(fused_names(net))
    # which of these knows most of the names; the present ones, if equally many
    found = max(known, key=lambda names: len(tensors.keys() & names.keys()))
    if found is plain:
        return dict(tensors)
    now = {old: new for new, old in plain.items()}
    named = {}
    for key, value in tensors.items():
        old = found.get(key, key)
        named[now.get(old, old)] = value
    return named


def check_keys(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], origin: str, remedy: str
) -> None:
    """Raise ValueError unless the file ``origin`` has the names and shapes that the network needs,
    and finite numbers.

    Examples:
        >>> import torch
        >>> check_keys({"b": torch.ones(2)}, {"a": torch.ones(2)}, "w.pt", "take another file")
        Traceback (most recent call last):
        ...
        ValueError: w.pt does not fit the network: missing a; unexpected b; take another file
    """
    missing = []
    shapes = []
    no_numbers = []
    for key, value in wanted.items():
        if key not in tensors:
            missing.append(key)
        elif tensors[key].shape != value.shape:
            shapes.append(f"{key} {tuple(tensors[key].shape)} instead of {tuple(value.shape)}")
        elif value.is_floating_point() and not _all_finite(tensors[key]):
            no_numbers.append(key)
    unexpected = [key for key in tensors if key not in wanted]
    faults = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": shapes,
        "no dense tensors of finite floating point numbers": no_numbers,
    }
    listed = []
    for fault, keys in faults.items():
        if keys:
            more = f" and {len(keys) - 6} more" if len(keys) > 6 else ""
            listed.append(f"{fault} {', '.join(keys[:6])}{more}")
    if listed:
        raise ValueError(f"{origin} does not fit the network: {'; '.join(listed)}; {remedy}")


def _all_finite(values: Tensor) -> bool:
    """Whether they are dense floating point numbers, none of them NaN or infinite."""
    is_dense = values.layout == torch.strided and not values.is_meta
    return is_dense and values.is_floating_point() and bool(values.float().isfinite().all())
