"""Networks by name: what a checkpoint needs to build its network again."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from spikingjelly.activation_based import neuron, surrogate
from torch import nn

from sj_robust.fusion import fuse_batch_norm
from sj_robust.models.small import SmallConvNet
from sj_robust.models.vgg import VGG, VGG_FEATURES
from sj_robust.neuron import DLIFNode

__all__ = ["NETWORKS", "NetworkSpec", "build_network"]

NETWORKS = ("small", *VGG_FEATURES)
"""Names of the architectures."""


@dataclass(frozen=True)
class NetworkSpec:
    """Everything :func:`build_network` needs, in plain types. 构建网络所需的全部参数。

    Attributes:
        name: Architecture.
        neuron: ``"dlif"``, or one of SpikingJelly's ``"lif"`` (``decay_input=False``, as DLIF with all gains 1) and
            ``"if"``; all with the triangle surrogate and a hard reset to 0.
        image_shape: (C, H, W) of one image.
        classes: Number of classes.
        T: Number of time steps.
        tau: Membrane time constant in steps (unused by ``"if"``).
        channels: Output channels of the convolutions of ``"small"``.
        hidden: Widths of the hidden linear layers of a VGG.
        fused: Whether batch norm and the DLIF neurons behind it run in one pass where they can.

    Example:
        >>> NetworkSpec(neuron="lif", T=8).tau
        100.0
    """

    name: Literal["small", "vgg5", "vgg11", "vgg13", "vgg16", "vgg19"] = "small"
    neuron: Literal["dlif", "lif", "if"] = "dlif"
    image_shape: tuple[int, int, int] = (1, 8, 8)
    classes: int = 10
    T: int = 4
    tau: float = 100.0
    channels: tuple[int, ...] = (16, 32)
    hidden: tuple[int, ...] = (4096, 4096)
    fused: bool = True


def build_network(spec: NetworkSpec) -> nn.Module:
    """The network of a specification, with fresh weights from torch's global random state. 按规格构建网络。

    Args:
        spec: What to build.

    Returns:
        A network in step mode ``"m"``.

    Raises:
        ValueError: If the architecture or the neuron is unknown, or an argument is out of range.

    Source: networks of Ding et al. (ICML 2024), section 5.

    Example:
        >>> build_network(NetworkSpec()).T
        4
    """
    if spec.name not in NETWORKS:
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}, got {spec.name!r}")
    if not (math.isinf(spec.tau) or spec.tau > 1):
        raise ValueError(f"tau must be > 1, got {spec.tau}; for a decay of 0.99 pass tau=100.0")
    node: Callable[..., nn.Module]
    match spec.neuron:
        case "dlif":
            node = partial(DLIFNode, tau=spec.tau)
        case "lif":
            node = partial(neuron.LIFNode, tau=float(spec.tau), decay_input=False)
        case "if":
            node = neuron.IFNode
        case _:
            raise ValueError(f"neuron must be 'dlif', 'lif' or 'if', got {spec.neuron!r}")
    arguments: dict[str, Any] = {
        "T": spec.T,
        "spiking_neuron": node,
        "v_reset": 0.0,
        "surrogate_function": surrogate.PiecewiseQuadratic(alpha=1.0),
    }
    net: nn.Module
    if spec.name == "small":
        net = SmallConvNet(spec.image_shape, spec.classes, channels=spec.channels, **arguments)
    else:
        net = VGG(spec.name, spec.image_shape, spec.classes, hidden=spec.hidden, **arguments)
    if spec.fused:
        fuse_batch_norm(net)
    return net
