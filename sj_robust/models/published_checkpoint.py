"""Checkpoints of the paper's published code, and of SNN-RAT's, in the networks of this package.

Both keep a plain ``state_dict``. Their networks differ from those here in names alone, which the
tables below translate. Mean and standard deviation per channel, decay, threshold and surrogate are
constants of the programs and not in the file.
"""

import math
import re
from collections.abc import Iterator, Mapping
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

PARAMETERS = {"input_gain": "p", "mixing": "comb"}
"""Our and their name of parameters; weights, biases and statistics of batch norm have the same."""


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
    """A checkpoint of the published code, or of SNN-RAT's, as a classifier of this package.
    载入论文公开代码的检查点。

    Which network it is, its classes, its neuron (DLIF if there are gains ``p``, else LIF, or IF
    without a leak) and a DLIF network's T are read from the file. A VGG of SNN-RAT, whose neurons
    have no leak, is known by its names; a wide residual network of it has those of the paper's code
    and needs ``tau=math.inf``.

    Args:
        path: A ``state_dict`` of the published code (.pth or .pt), with or without the ``module.``
            of ``DataParallel``.
        mean: Mean per channel that it was trained with (``sj_robust.data.CIFAR_STATISTICS``); None
            for none.
        std: Standard deviation per channel, likewise.
        image_shape: (C, H, W) of one image.
        T: Time steps of a LIF or IF network, 8 if omitted; of a DLIF network only as a check.
        tau: Membrane time constant in steps. None is 100, the published decay of 0.99, and infinity
            for a VGG of SNN-RAT.
        fused: As in :class:`NetworkSpec`.

    Returns:
        The classifier in evaluation mode, on the CPU, and its specification. Saved with
        ``save_checkpoint(path, {"model": classifier.state_dict(), "description": {"network":
        asdict(spec)}})`` it is a checkpoint like those of ``recipes/adv_train.py``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, is of none of the published VGG or wide residual
            networks, a shape does not fit, or T is not the number of gains.

    Source: names of the published code of Ding et al. (ICML 2024),
        github.com/DingJianhao/stable-snn, and of SNN-RAT (NeurIPS 2022),
        github.com/putshua/SNN-RAT.

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
    if rat := "classifier.5.weight" in tensors:  # whose flattening is a module of the classifier
        tensors = {
            re.sub(r"(?<=^classifier\.)\d", lambda n: str(int(n[0]) - 1), key): tensors[key]
            for key in tensors
        }
    if tau is None:
        tau = math.inf if rat else 100.0
    spec = NetworkSpec(
        **_sizes(tensors, path),
        image_shape=image_shape,
        tau=tau,
        fused=fused,
        mean=mean,
        std=std,
        **_time(tensors, T, tau, path),
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
        names[key] = f"{modules[module]}.{PARAMETERS.get(parameter, parameter)}"
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
    convolutions = [
        tensor.shape
        for key, tensor in tensors.items()
        if tensor.ndim == 4 and key.startswith("layer")
    ]
    widths = tuple(shape[0] for shape in convolutions)
    for name, features in VGG_FEATURES.items():
        if (
            widths == tuple(feature for feature in features if feature != "A")
            and "classifier.4.weight" in tensors
        ):
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
        f"{path} is of none of the published networks {known} (it begins with "
        f"{', '.join(list(tensors)[:4])}); give a checkpoint of one of them, or load a network "
        "of your own with network module:function"
    )


def _time(tensors: Mapping[str, Tensor], T: int | None, tau: float, path: Path) -> dict[str, Any]:
    """Neuron and time steps."""
    gains = {
        len(tensor) for key, tensor in tensors.items() if key.endswith(".p") and tensor.ndim == 1
    }
    if not gains:
        return {"neuron": "if" if math.isinf(tau) else "lif", "T": 8 if T is None else T}
    steps = min(gains)
    if T not in (None, steps):
        raise ValueError(
            f"{path} was trained with T={steps}, got T={T}; leave T out, and set_time_steps "
            "afterwards"
        )
    return {"neuron": "dlif", "T": steps}
