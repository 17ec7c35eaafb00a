"""A small convolutional spiking network for images of 8x8 to 32x32 pixels."""

import inspect
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

from spikingjelly.activation_based import functional, layer
from torch import Tensor, nn

__all__ = ["SmallConvNet"]


class SmallConvNet(nn.Module):
    """Convolution - batch norm - neuron - average pooling, once per entry of ``channels``, then a linear layer.

    小型卷积脉冲网络，适用于 8x8 至 32x32 的图像。

    The image does not change over time under direct encoding, and a convolution is linear, so the first convolution
    runs once and its result is repeated over the T steps after it; batch norm sees the T copies.

    Shapes: in step mode ``"m"`` images [N, C, H, W] or frames [T, N, C, H, W] to [T, N, classes]; in step mode ``"s"``
    one frame [N, C, H, W] to [N, classes] per call.

    Args:
        image_shape: (C, H, W) of one image; H and W at least ``2 ** len(channels)``.
        classes: Number of classes.
        T: Number of time steps an image is repeated for.
        spiking_neuron: Class or function that builds a neuron, as in SpikingJelly's model zoo.
        channels: Output channels of the convolutions.
        step_mode: ``"m"`` or ``"s"``.
        **neuron_kwargs: Passed on to ``spiking_neuron``; one that takes ``T`` (``DLIFNode`` does) gets the network's.

    Raises:
        ValueError: If the image is too small for the number of poolings or an input has another number of dimensions.

    Source: the convolution - batch norm - neuron stages of the VGG networks of Ding et al. (ICML 2024), made small.

    Example:
        >>> import torch
        >>> from sj_robust.neuron import DLIFNode
        >>> net = SmallConvNet((1, 8, 8), 10, T=4, spiking_neuron=DLIFNode)
        >>> net(torch.rand(5, 1, 8, 8)).shape
        torch.Size([4, 5, 10])
    """

    expands_time = True

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
        super().__init__()
        width, height, columns = image_shape
        shrink = 2 ** len(channels)
        if not channels or min(height, columns) < shrink:
            raise ValueError(
                f"an image of {height}x{columns} pixels cannot be halved {len(channels)} times (>= 1 needed); "
                "pass fewer or larger stages in channels, or larger images"
            )
        if "T" in inspect.signature(spiking_neuron).parameters:
            neuron_kwargs.setdefault("T", T)
        self.T = T
        self.first = layer.Conv2d(width, channels[0], 3, padding=1)
        stages: list[nn.Module] = []
        for index, width in enumerate(channels):
            if index > 0:
                stages.append(layer.Conv2d(channels[index - 1], width, 3, padding=1))
            stages += [layer.BatchNorm2d(width), spiking_neuron(**deepcopy(neuron_kwargs)), layer.AvgPool2d(2)]
        features = channels[-1] * (height // shrink) * (columns // shrink)
        self.stages = nn.Sequential(*stages, layer.Flatten(), layer.Linear(features, classes))
        _initialise(self)
        functional.set_step_mode(self, step_mode)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of every time step ([T, N, classes]), or of one ([N, classes]) in step mode ``"s"``."""
        single_step = self.first.step_mode == "s"
        if x.ndim not in ((4,) if single_step else (4, 5)):
            wanted = "one frame [N, C, H, W]" if single_step else "images [N, C, H, W] or frames [T, N, C, H, W]"
            raise ValueError(f"SmallConvNet in step mode {self.first.step_mode!r} takes {wanted}, got {tuple(x.shape)}")
        if single_step or x.ndim == 5:
            return self.stages(self.first(x))  # type: ignore[no-any-return]  # torch types a module's call as Any
        current = self.first(x.unsqueeze(0))
        return self.stages(current.expand(self.T, *current.shape[1:]))  # type: ignore[no-any-return]  # as above


def _initialise(net: nn.Module) -> None:
    """Kaiming-normal (fan out) convolutions; biases of the linear layer 0."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
