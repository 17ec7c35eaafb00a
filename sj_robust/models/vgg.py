"""The VGG networks of the paper."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import nn

from sj_robust.models.chain import ConvChain

__all__ = ["VGG", "VGG_FEATURES"]

VGG_FEATURES: dict[str, tuple[int | Literal["A"], ...]] = {
    "vgg5": (64, "A", 128, 128, "A"),
    "vgg11": (64, "A", 128, 256, "A", 512, 512, 512, "A", 512, 512),
    "vgg13": (64, 64, "A", 128, 128, "A", 256, 256, "A", 512, 512, "A", 512, 512, "A"),
    "vgg16": (64, 64, "A", 128, 128, "A", *[256] * 3, "A", *[512] * 3, "A", *[512] * 3, "A"),
    "vgg19": (64, 64, "A", 128, 128, "A", *[256] * 4, "A", *[512] * 4, "A", *[512] * 4, "A"),
}
"""Output channels of the convolutions of each network and ``"A"`` for a pooling, under the published code's names."""


class VGG(ConvChain):
    """VGG with batch norm: convolutions as named, then two hidden linear layers of spiking neurons. 脉冲 VGG 网络。

    Args:
        name: One of :data:`VGG_FEATURES`.
        image_shape: (C, H, W) of one image.
        classes: Number of classes.
        T: Number of time steps an image is repeated for.
        spiking_neuron: Class or function that builds a neuron, as in SpikingJelly's model zoo.
        hidden: Widths of the hidden linear layers.
        step_mode: ``"m"`` or ``"s"``.
        **neuron_kwargs: Passed on to ``spiking_neuron``; see :class:`ConvChain`, as for shapes and errors.

    Raises:
        ValueError: If the name is unknown or the image too small for the number of poolings.

    Source: Ding et al. (ICML 2024), section 5, with its published code's names; Simonyan & Zisserman (2015).

    Examples:
        >>> import torch
        >>> from sj_robust.neuron import DLIFNode
        >>> net = VGG("vgg5", (3, 8, 8), 10, T=2, spiking_neuron=DLIFNode, hidden=[32, 32])
        >>> net(torch.rand(5, 3, 8, 8)).shape
        torch.Size([2, 5, 10])
    """

    def __init__(
        self,
        name: str,
        image_shape: Sequence[int],
        classes: int,
        *,
        T: int,
        spiking_neuron: Callable[..., nn.Module],
        hidden: Sequence[int] = (4096, 4096),
        step_mode: str = "m",
        **neuron_kwargs: Any,
    ) -> None:
        """Build the network; see the class."""
        if name not in VGG_FEATURES:
            raise ValueError(f"name must be one of {', '.join(VGG_FEATURES)}, got {name!r}")
        super().__init__(
            image_shape,
            classes,
            T=T,
            spiking_neuron=spiking_neuron,
            features=VGG_FEATURES[name],
            hidden=hidden,
            step_mode=step_mode,
            **neuron_kwargs,
        )
