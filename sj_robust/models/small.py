"""A small convolutional spiking network for images of 8x8 to 32x32 pixels."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import nn

from sj_robust.models.chain import ConvChain

__all__ = ["SmallConvNet"]


class SmallConvNet(ConvChain):
    """Convolution - batch norm - neuron - average pooling, once per entry of ``channels``, then a linear layer.

    小型卷积脉冲网络，适用于 8x8 至 32x32 的图像。

    Args:
        image_shape: (C, H, W) of one image; H and W at least ``2 ** len(channels)``.
        classes: Number of classes.
        T: Number of time steps an image is repeated for.
        spiking_neuron: Class or function that builds a neuron, as in SpikingJelly's model zoo.
        channels: Output channels of the convolutions.
        step_mode: ``"m"`` or ``"s"``.
        **neuron_kwargs: Passed on to ``spiking_neuron``; see :class:`ConvChain`, as for shapes and errors.

    Source: the convolution - batch norm - neuron stages of the VGG networks of Ding et al. (ICML 2024), made small.

    Examples:
        >>> import torch
        >>> from sj_robust.neuron import DLIFNode
        >>> net = SmallConvNet((1, 8, 8), 10, T=4, spiking_neuron=DLIFNode)
        >>> net(torch.rand(5, 1, 8, 8)).shape
        torch.Size([4, 5, 10])
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        classes: int,
        *,
        T: int,
        spiking_neuron: Callable[..., nn.Module],
        channels: Sequence[int] = (16, 32),
        step_mode: str = "m",
        **neuron_kwargs: Any,
    ) -> None:
        """Build the network; see the class."""
        features: list[int | Literal["A"]] = []
        for width in channels:
            features += [width, "A"]
        super().__init__(
            image_shape,
            classes,
            T=T,
            spiking_neuron=spiking_neuron,
            features=features,
            step_mode=step_mode,
            **neuron_kwargs,
        )
