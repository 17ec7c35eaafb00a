"""Files of weights, read without running any code in them; those of published programs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sj_robust.classifier import SpikingClassifier
from sj_robust.core.saved import load_tensors
from sj_robust.models.build import NetworkSpec, build_classifier
from sj_robust.models.chain import VGG_FEATURES
from sj_robust.models.wide_resnet import WIDE_RESNETS
from sj_robust.neuron.fusion import fused_names, plain_names

__all__ = [
    "Weights",
    "as_named_in",
    "check_keys",
    "load_published_checkpoint",
    "published_names",
    "read_weights",
]

_ENDINGS = (".pt", ".pth")
_WRAPPERS = ("model", "state_dict", "net", "model_state_dict")
_PROGRAMS = {"layer1.0.weight": (100.0, 8), "conv1.weight": (100.0, 8), "net.0.weight": (2.0, 4)}
"""Weights by which files of published programs are known, with their tau and T."""
_PUBLISHED = {"input_gain": "p", "mixing": "comb", "rate": "poisson_rate"}
"""Our and their names of parameters; weights, biases and statistics of batch norm have the same."""


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


def load_published_checkpoint(
    path: Path | str,
    *,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    image_shape: tuple[int, int, int] = (3, 32, 32),
    T: int | None = None,
    tau: float | None = None,
    fused: bool = True,
) -> tuple[SpikingClassifier, NetworkSpec]:
    """Load a checkpoint of the paper's published code, or of another program, as a classifier of
    this package. 载入公开代码的检查点。

    The architecture, the number of classes, the neuron (DLIF if there are gains ``p``, otherwise
    LIF, or IF without a leak) and the T of a DLIF network are read from the file. The programs are
    recognised by the contents of their files:

    ============================  =====================================  =====  =====  ==========
    program                       known by                               tau    T      neuron
    ============================  =====================================  =====  =====  ==========
    stable-snn (VGG, WRN)         ``layer1.0.weight``, ``block1.0...``   100    8      DLIF, LIF
    SNN-RAT, SR (VGG)             ``classifier.5.weight``                inf    8      IF
    StoG-meets-SNN (VGG, WRN)     ``layer1.2.1.poisson_rate``            inf    8      IF, gates
    PDSG-SDA (VGG-11)             ``net.0.weight`` without a bias        2      4      LIF
    ============================  =====================================  =====  =====  ==========

    A wide residual network of SNN-RAT uses the names of the paper's code and needs
    ``tau=math.inf``. StoG's fully open gates (rate 1 or more) become
    :class:`sj_robust.defences.StochasticGate`, which closes for one spike in a thousand.

    Args:
        path: A ``state_dict`` (.pth or .pt), plain or in a dictionary, with or without the
            ``module.`` of ``DataParallel``.
        mean: Mean per channel that it was trained with (``sj_robust.data.CIFAR_STATISTICS``); None
            for none.
        std: Standard deviation per channel, likewise.
        image_shape: (C, H, W) of one image.
        T: Number of time steps of a LIF or IF network; None uses that of the table. For a DLIF
            network it is only checked.
        tau: Membrane time constant in steps; None uses that of the table.
        fused: As in :class:`NetworkSpec`.

    Returns:
        The classifier in evaluation mode, on the CPU, and its specification. Saved with
        ``save_checkpoint(path, {"model": classifier.state_dict(), "description": {"network":
        asdict(spec)}})`` it is a checkpoint like those of ``recipes/adv_train.py``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or does not belong to one of the published VGG or wide
            residual networks, a shape does not fit, or T differs from the number of gains.

    Source: names of the published code of Ding et al. (ICML 2024),
        github.com/DingJianhao/stable-snn, of SNN-RAT (NeurIPS 2022), github.com/putshua/SNN-RAT, of
        SR (ICML 2024), github.com/putshua/gradient_reg_defense, of StoG (AAAI 2024),
        github.com/DingJianhao/StoG-meets-SNN, and of PDSG-SDA (CVPR 2025),
        github.com/ryime/PDSG-SDA.

    Examples:
        >>> load_published_checkpoint(
        ...     "vgg11DLI_ATFGSMv2.pth", mean=None, std=None
        ... )  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        FileNotFoundError: ...vgg11DLI_ATFGSMv2.pth does not exist; give a best.pt, or a
        state_dict saved by torch.save
    """
    path = Path(path)
    tensors = read_weights(path).tensors
    spec = NetworkSpec(
        **_architecture(tensors, path),
        **_neurons(tensors, path, T, tau),
        image_shape=image_shape,
        fused=fused,
        mean=mean,
        std=std,
    )
    classifier = build_classifier(spec)
    net = classifier.net
    wanted = net.state_dict()
    names = published_names(net, tensors)
    found = {ours: tensors[theirs] for ours, theirs in names.items()}
    if not any(_kind(name, tensors) == ("bias", 4) for name in tensors):
        missing = wanted.keys() - found.keys()
        biases = [name for name in missing if _kind(name, wanted) == ("bias", 4)]
        found |= {name: torch.zeros_like(wanted[name]) for name in biases}
    found |= {name: tensors[name] for name in tensors.keys() - set(names.values())}
    remedy = f"it was read as {spec.name} for images {image_shape}; pass its image_shape"
    check_keys(found, wanted, str(path), remedy)
    net.load_state_dict(found)
    return classifier.eval(), spec


def published_names(net: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The name in a published file of every parameter and buffer of a network of this package.
    本包参数名到公开代码参数名的映射。

    Both have their convolutions, batch norms, neurons and linear layers in the same order.

    Args:
        net: A :class:`VGG` or :class:`WideResNet`.
        tensors: The ``state_dict`` of the published program.

    Returns:
        Their name by ours, as far as the file has one.

    Examples:
        >>> import torch
        >>> theirs = {"layer1.0.weight": torch.ones(1, 1), "layer1.2.p": torch.ones(2)}
        >>> from sj_robust.neuron import DLIFNode
        >>> published_names(nn.Sequential(nn.Linear(1, 1), DLIFNode(T=2)), theirs)
        {'0.weight': 'layer1.0.weight', '1.input_gain': 'layer1.2.p'}
    """
    waiting: dict[object, list[str]] = {}
    for theirs in reversed(list(tensors)):
        waiting.setdefault(_kind(theirs, tensors), []).append(theirs)
    own = net.state_dict()
    names = {}
    for ours in own:
        alike = waiting.get(_kind(ours, own))
        if alike:
            names[ours] = alike.pop()
    return names


def _kind(name: str, tensors: Mapping[str, Tensor]) -> tuple[str, int]:
    """What a tensor is, and the dimensions of the weight of its module, 0 if there is none."""
    module, _, parameter = name.rpartition(".")
    weight = tensors.get(f"{module}.weight")
    return _PUBLISHED.get(parameter, parameter), 0 if weight is None else weight.ndim


def _architecture(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Name, classes and widths of the network that a file is of."""
    widths = [len(tensor) for tensor in tensors.values() if tensor.ndim == 4]
    linear = [tensor for tensor in tensors.values() if tensor.ndim == 2]
    blocks = sum(name.endswith(".comb") for name in tensors)
    if not _PROGRAMS.keys().isdisjoint(tensors):
        for name, features in VGG_FEATURES.items():
            if len(linear) == 3 and widths == [size for size in features if size != "A"]:
                first, second, classes = map(len, linear)
                return {"name": name, "classes": classes, "hidden": (first, second)}
        for name, (depth, widen_factor) in WIDE_RESNETS.items():
            inputs = [tensor.shape[1] for tensor in linear]
            if blocks == (depth - 4) // 2 and inputs == [64 * widen_factor]:
                return {"name": name, "classes": len(linear[0])}
    known = ", ".join([*VGG_FEATURES, *WIDE_RESNETS])
    raise ValueError(
        f"{path} does not belong to any of the published networks {known} (it begins with "
        f"{', '.join(list(tensors)[:4])}); give a checkpoint of one of them, or load your own "
        "network with network module:function"
    )


def _neurons(
    tensors: Mapping[str, Tensor], path: Path, T: int | None, tau: float | None
) -> dict[str, Any]:
    """Neuron, tau and time steps: those asked for, or of the program that wrote a file."""
    gated = any(name.endswith(".poisson_rate") for name in tensors)
    usual_tau, usual_T = next(_PROGRAMS[name] for name in _PROGRAMS if name in tensors)
    if gated or "classifier.5.weight" in tensors:  # behind a module that flattens
        usual_tau = math.inf
    if tau is None:
        tau = usual_tau
    gains = [len(tensor) for name, tensor in tensors.items() if name.endswith(".p")]
    if not gains:
        leaking = "if" if math.isinf(tau) else "lif"
        steps = usual_T if T is None else T
        return {"neuron": "stog" if gated else leaking, "tau": tau, "T": steps}
    steps = min(gains)
    if T not in (None, steps):
        raise ValueError(
            f"{path} was trained with T={steps}, got T={T}; omit T, and call set_time_steps "
            "afterwards"
        )
    return {"neuron": "dlif", "tau": tau, "T": steps}


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
