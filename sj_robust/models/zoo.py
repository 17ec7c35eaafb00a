"""Networks of SpikingJelly's model zoo."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from inspect import Parameter, isclass, isfunction, signature
from typing import Any

from spikingjelly.activation_based import functional
from torch import nn

from sj_robust.models.foreign import call_with_known

__all__ = ["build_zoo_network", "zoo_networks"]

_ZOO = "spikingjelly.activation_based.model"
"""Imported when somebody asks for the zoo: it brings h5py and SpikingJelly's distributed part."""


def zoo_networks() -> dict[str, Callable[..., nn.Module]]:
    """Name and builder of every network of SpikingJelly's model zoo that takes a spiking neuron as
    an argument. 模型库中可用的网络。

    These are the public functions of ``spikingjelly.activation_based.model`` whose only required
    parameter is ``spiking_neuron``, and such classes in files without such functions. Files that
    import a missing package are omitted.

    Examples:
        >>> "spiking_vgg11_bn" in zoo_networks()
        True
    """
    found: dict[str, Callable[..., nn.Module]] = {}
    model = importlib.import_module(_ZOO)
    for entry in pkgutil.iter_modules(model.__path__):
        if entry.ispkg or entry.name.startswith("train_"):  # scripts
            continue
        try:
            module = importlib.import_module(f"{_ZOO}.{entry.name}")
        except ImportError:
            continue
        functions: dict[str, Any] = {}
        classes: dict[str, Any] = {}
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", "") != module.__name__:
                continue
            if isfunction(value) and _takes_only_a_neuron(value):
                functions[name] = value
            if isclass(value) and _takes_only_a_neuron(value):
                classes[name] = value
        found |= functions or classes
    return dict(sorted(found.items()))


def build_zoo_network(
    name: str,
    image_shape: Sequence[int],
    classes: int,
    *,
    T: int,
    spiking_neuron: Callable[..., nn.Module],
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A network of SpikingJelly's zoo with fresh weights, in step mode ``"m"``.
    构建模型库中的网络。

    Shapes: frames [T, N, C, H, W] to [T, N, classes] or [N, classes]; some take images [N, C, H, W]
    as well and repeat them, which ``SpikingClassifier`` finds out.

    Args:
        name: One of :func:`zoo_networks`.
        image_shape: (C, H, W) of one image.
        classes: Number of classes.
        T: Number of time steps.
        spiking_neuron: Function that builds a neuron; the zoo's own neuron arguments are passed to
            it.
        options: Further keyword arguments of the builder; ``cnf`` of a SEW ResNet is ``"ADD"``
            unless given.

    Raises:
        ValueError: If there is no such network, it takes no such option, or it is for images of
            other channels or for another number of classes.

    Source: the model zoo of SpikingJelly; SEW ResNet's ADD as in Fang et al. (NeurIPS 2021).

    Examples:
        >>> from sj_robust.neuron import DLIFNode
        >>> build_zoo_network("spiking_vg11", (3, 32, 32), 10, T=4, spiking_neuron=DLIFNode)
        Traceback (most recent call last):
        ...
        ValueError: the model zoo has no 'spiking_vg11'; nearest: spiking_vgg11,
        spiking_vgg19, spiking_vgg16
    """
    builders = zoo_networks()
    if name not in builders:
        near = get_close_matches(name, builders, n=3)
        hint = f"nearest: {', '.join(near)}" if near else f"there are {', '.join(builders)}"
        raise ValueError(f"the model zoo has no {name!r}; {hint}")
    channels, height, width = image_shape
    offered: dict[str, Any] = {
        "T": T,
        "in_channels": channels,
        "img_size_h": height,
        "img_size_w": width,
    }
    offered |= {
        "input_size": (height, width),
        "cnf": "ADD",
        "spiking_neuron": spiking_neuron,
        "num_classes": classes,
    }
    # every function takes num_classes, if only through its **kwargs
    needed = {"num_classes": classes} if isfunction(builders[name]) else {}
    net: nn.Module = call_with_known(
        builders[name], f"zoo:{name}", offered, needed | dict(options or {})
    )
    functional.set_step_mode(net, "m")
    _check_fits(net, name, channels, classes)
    return net


def _takes_only_a_neuron(builder: Callable[..., Any]) -> bool:
    """Whether it has a parameter ``spiking_neuron`` and needs no other."""
    parameters = signature(builder).parameters
    variadic = (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL)
    for name, parameter in parameters.items():
        is_needed = parameter.default is Parameter.empty and parameter.kind not in variadic
        if is_needed and name != "spiking_neuron":
            return False
    return "spiking_neuron" in parameters


def _check_fits(net: nn.Module, name: str, channels: int, classes: int) -> None:
    """The first convolution takes the images, the last linear layer has the classes (some of the
    zoo fix them).
    """
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    first = convolutions[0] if convolutions else None
    if first is not None and first.in_channels != channels:
        raise ValueError(
            f"zoo:{name} expects images with {first.in_channels} channels, these have {channels}; "
            "use another network"
        )
    last = [module for module in net.modules() if isinstance(module, nn.Linear)][-1:]
    if last and last[0].out_features % classes:
        raise ValueError(
            f"zoo:{name} ends in {last[0].out_features} outputs, not in {classes} classes; choose "
            "another network"
        )
