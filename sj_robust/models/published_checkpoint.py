"""Checkpoints of published programs.

All keep a ``state_dict``, plain or in a dictionary. Their networks differ from those here in names
alone: a form of another program is translated into the names of the paper's published code, and
these into ours, by the tables below. Mean and standard deviation per channel, decay, threshold and
surrogate are constants of the programs and not in the file.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from sj_robust.classifier import SpikingClassifier
from sj_robust.models.build import NetworkSpec, build_classifier
from sj_robust.models.chain import VGG_FEATURES
from sj_robust.models.weights import check_keys, read_weights
from sj_robust.models.wide_resnet import WIDE_RESNETS, MixedBlock, WideResNet
from sj_robust.neuron.fusion import plain_names

__all__ = ["load_published_checkpoint", "published_names"]

BLOCK = {
    "bn1": "activation.0",
    "act1": "activation.1",
    "conv1": "residual.0",
    "bn2": "residual.1",
    "act2": "residual.2",
    "conv2": "residual.3",
    "convShortcut": "shortcut",
    "convex": "",
}
"""Modules of one residual block, theirs and ours; the mixing coefficients lie in the block
itself.
"""

PARAMETERS = {"input_gain": "p", "mixing": "comb", "rate": "poisson_rate"}
"""Our and their name of parameters; weights, biases and statistics of batch norm have the same."""


@dataclass(frozen=True)
class _File:
    """A checkpoint with the names of the paper's published code.

    Attributes:
        tensors: Parameters and buffers.
        tau: Membrane time constant of its program, in steps.
        T: Time steps that its program takes unless it is told others.
        gated: Whether a gate stands behind every neuron.
    """

    tensors: dict[str, Tensor]
    tau: float = 100.0
    T: int = 8
    gated: bool = False


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
    file = _as_published(read_weights(path).tensors)
    tensors = file.tensors
    if tau is None:
        tau = file.tau
    spec = NetworkSpec(
        **_sizes(tensors, path),
        image_shape=image_shape,
        tau=tau,
        fused=fused,
        mean=mean,
        std=std,
        **_time(file, T, tau, path),
    )
    classifier = build_classifier(spec)
    net = classifier.net
    names = published_names(net, spec.name)
    wanted = {names[key]: value for key, value in net.state_dict().items()}
    check_keys(
        tensors,
        wanted,
        str(path),
        f"it was read as {spec.name} for images {image_shape}; pass its image_shape",
    )
    net.load_state_dict({key: tensors[name] for key, name in names.items()})
    return classifier.eval(), spec


def published_names(net: nn.Module, name: str) -> dict[str, str]:
    """The published name of every parameter and buffer of a network of this package.
    本包参数名到公开代码参数名的映射。

    Args:
        net: A :class:`VGG` or :class:`WideResNet`.
        name: Which one, a name of ``VGG_FEATURES`` or ``WIDE_RESNETS``.

    Returns:
        Their name by ours, in the order of ``net.state_dict()``.

    Examples:
        >>> from sj_robust.models import build_network
        >>> net = build_network(NetworkSpec("vgg5", image_shape=(3, 8, 8), hidden=(8, 8)))
        >>> names = published_names(net, "vgg5")
        >>> names["first.weight"], names["stages.0.node.input_gain"], names["stages.6.weight"]
        ('layer1.0.weight', 'layer1.2.p', 'classifier.0.weight')
    """
    modules = dict(
        _vgg_modules(net, name)
        if name in VGG_FEATURES
        else _wide_resnet_modules(cast(WideResNet, net))
    )
    names = {}
    for key, plain in plain_names(net).items():
        module, _, parameter = plain.rpartition(".")
        gate = ".1" if parameter == "rate" else ""  # behind its neuron, in a row of two
        theirs = modules[module.removesuffix(gate)] + gate
        names[key] = f"{theirs}.{PARAMETERS.get(parameter, parameter)}"
    return names


def _vgg_modules(net: nn.Module, name: str) -> Iterator[tuple[str, str]]:
    """Our name without stages and their name of every module: stages end behind a pooling there,
    and the linear layers are apart.
    """
    last = max(
        int(plain.split(".")[0]) for plain in plain_names(cast(nn.Module, net.stages)).values()
    )
    layers = ["first", *(f"stages.{index}" for index in range(last + 1))]
    stage, index, position = 1, 0, 0
    for feature in VGG_FEATURES[name]:
        for _ in range(1 if feature == "A" else 3):
            yield layers[position], f"layer{stage}.{index}"
            position, index = position + 1, index + 1
        if feature == "A":
            stage, index = stage + 1, 0
    for index, ours in enumerate(
        layers[position + 1 :]
    ):  # behind the flattening, which is no module of theirs
        yield ours, f"classifier.{index}"


def _wide_resnet_modules(net: WideResNet) -> Iterator[tuple[str, str]]:
    """Our name without stages and their name of every module: three stages of blocks there, one
    list here.
    """
    yield "first", "conv1"
    stages = cast(nn.Sequential, net.stages)
    blocks = [index for index, module in enumerate(stages) if isinstance(module, MixedBlock)]
    each = len(blocks) // 3
    for index in blocks:
        for published, ours in BLOCK.items():
            yield (
                f"stages.{index}.{ours}".rstrip("."),
                f"block{index // each + 1}.{index % each}.{published}",
            )
    after = len(blocks)  # batch norm, neurons, average, flattening, linear layer
    yield f"stages.{after}", "bn1"
    yield f"stages.{after + 1}", "act"
    yield f"stages.{after + 4}", "fc"


def _sizes(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Name, classes and widths of the network that the file is of."""
    widths = []
    for key, tensor in tensors.items():
        if tensor.ndim == 4 and key.startswith("layer"):
            widths.append(tensor.shape[0])
    for name, features in VGG_FEATURES.items():
        if widths == list(_widths(features)) and tensors.keys() >= _LINEAR:
            hidden = tuple(tensors[f"classifier.{index}.weight"].shape[0] for index in (0, 2))
            return {
                "name": name,
                "classes": tensors["classifier.4.weight"].shape[0],
                "hidden": hidden,
            }
    blocks = sum(key.endswith("convex.comb") for key in tensors)
    for name, (depth, widen_factor) in WIDE_RESNETS.items():
        fc = tensors.get("fc.weight")
        if blocks == (depth - 4) // 2 and fc is not None and fc.shape[1] == 64 * widen_factor:
            return {"name": name, "classes": fc.shape[0]}
    known = ", ".join([*VGG_FEATURES, *WIDE_RESNETS])
    raise ValueError(
        f"{path} does not belong to any of the published networks {known} (it begins with "
        f"{', '.join(list(tensors)[:4])}); give a checkpoint of one of them, or load your own "
        "network with network module:function"
    )


def _time(file: _File, T: int | None, tau: float, path: Path) -> dict[str, Any]:
    """Neuron and time steps."""
    tensors = file.tensors
    gains = {
        len(tensor) for key, tensor in tensors.items() if key.endswith(".p") and tensor.ndim == 1
    }
    if not gains:
        leaking = "if" if math.isinf(tau) else "lif"
        steps = file.T if T is None else T
        return {"neuron": "stog" if file.gated else leaking, "T": steps}
    steps = min(gains)
    if T not in (None, steps):
        raise ValueError(
            f"{path} was trained with T={steps}, got T={T}; omit T, and call set_time_steps "
            "afterwards"
        )
    return {"neuron": "dlif", "T": steps}


def _as_published(tensors: dict[str, Tensor]) -> _File:
    """The file of any of the programs under the names of the paper's published code."""
    if "net.0.weight" in tensors and "net.0.bias" not in tensors:
        return _File(_of_pdsg(tensors), tau=2.0, T=4)
    gated = any(key.endswith(".poisson_rate") for key in tensors)
    flattens = "classifier.5.weight" in tensors  # in a module of its own, the first one
    if flattens:
        found = {}
        for key, tensor in tensors.items():
            head, dot, rest = key.partition("classifier.")
            number, _, tail = rest.partition(".")
            of_linear = dot and not head and number.isdecimal()
            found[f"classifier.{int(number) - 1}.{tail}" if of_linear else key] = tensor
        tensors = found
    return _File(tensors, tau=math.inf if gated or flattens else 100.0, gated=gated)


def _of_pdsg(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The VGG of PDSG-SDA, all layers in one row and convolutions without bias, which is 0."""
    widths = [len(tensor) for tensor in tensors.values() if tensor.ndim == 4]
    known = {tuple(_widths(features)): features for features in VGG_FEATURES.values()}
    features = known.get(tuple(widths))
    if features is None:
        return tensors
    names = {}
    theirs, stage, index = 0, 1, 0
    for feature in features:
        if feature == "A":
            theirs, stage, index = theirs + 1, stage + 1, 0
            continue
        for _ in range(3):  # convolution, batch norm, neuron
            names[f"net.{theirs}"] = f"layer{stage}.{index}"
            theirs, index = theirs + 1, index + 1
    for ours in range(5):  # behind the flattening
        names[f"net.{theirs + 1 + ours}"] = f"classifier.{ours}"
    convolutions = {key.rpartition(".")[0] for key in tensors if tensors[key].ndim == 4}
    if not convolutions <= names.keys():
        return tensors
    found = {}
    for key, tensor in tensors.items():
        module, _, parameter = key.rpartition(".")
        found[f"{names.get(module, module)}.{parameter}"] = tensor
        if tensor.ndim == 4:
            found[f"{names[module]}.bias"] = tensor.new_zeros(len(tensor))
    return found


_LINEAR = {f"classifier.{index}.weight" for index in (0, 2, 4)}


def _widths(features: Iterable[int | str]) -> list[int]:
    """Output channels of the convolutions alone."""
    return [feature for feature in features if isinstance(feature, int)]
