"""The wide residual networks of the paper."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from spikingjelly.activation_based import functional, layer
from torch import Tensor, nn

from sj_robust.core.checks import check_count
from sj_robust.models.direct import DirectlyEncoded, initialise, neuron_builder
from sj_robust.neuron import Stage

__all__ = ["WIDE_RESNETS", "MixedBlock", "WideResNet"]

WIDE_RESNETS = {"wrn16_4": (16, 4), "wrn28_10": (28, 10)}
"""Depth and widening factor of each network."""


class WideResNet(DirectlyEncoded):
    """Wide residual network of spiking neurons. 脉冲宽残差网络。

    A 3x3 convolution to 16 channels, three stages of ``(depth - 4) / 6`` blocks with 16, 32 and 64
    times ``widen_factor`` channels and stride 1, 2 and 2, then batch norm - neuron - average over
    all remaining pixels (8x8 for a 32x32 image) - linear layer to the classes. Convolutions have no
    bias.

    :class:`DirectlyEncoded` describes shapes and time steps, :class:`MixedBlock` the blocks, and
    :class:`ConvChain` the arguments that are not listed here.

    Args:
        image_shape: (C, H, W) of one image; any size is possible.
        depth: Number of layers, a multiple of 6 plus 4.
        widen_factor: Multiple of the channels of the narrowest network.

    Raises:
        ValueError: If the depth or the widening factor is out of range, or an input has another
            number of dimensions.

    Source: Ding et al. (ICML 2024), section 5, with its published code; Zagoruyko and Komodakis,
        "Wide Residual Networks" (BMVC 2016); the mixed branches as in SNN-RAT (NeurIPS 2022).

    Examples:
        >>> from sj_robust.neuron import DLIFNode
        >>> net = WideResNet((3, 8, 8), 10, T=2, spiking_neuron=DLIFNode, depth=10, widen_factor=1)
        >>> net(torch.rand(5, 3, 8, 8)).shape
        torch.Size([2, 5, 10])
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        classes: int,
        *,
        T: int,
        spiking_neuron: Callable[..., nn.Module],
        depth: int = 16,
        widen_factor: int = 4,
        step_mode: str = "m",
        **neuron_kwargs: Any,
    ) -> None:
        """Build the network; see the class."""
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            nearest = max(10, 6 * round((depth - 4) / 6) + 4)
            raise ValueError(
                f"depth must be 6 n + 4 for a whole n >= 1, got {depth}; pass {nearest}"
            )
        check_count("widen_factor", widen_factor)
        node = neuron_builder(spiking_neuron, T, neuron_kwargs)
        self.T = T
        self.first = layer.Conv2d(image_shape[0], 16, 3, padding=1, bias=False)
        stages: list[nn.Module] = []
        width = 16
        for channels, stride in ((16, 1), (32, 2), (64, 2)):
            for block in range((depth - 4) // 6):
                stages.append(
                    MixedBlock(width, channels * widen_factor, 1 if block else stride, node)
                )
                width = channels * widen_factor
        stages.append(Stage(node(), norm=layer.BatchNorm2d(width)))
        stages += [layer.AdaptiveAvgPool2d(1), layer.Flatten(), layer.Linear(width, classes)]
        self.stages = nn.Sequential(*stages)
        initialise(self)
        functional.set_step_mode(self, step_mode)


class MixedBlock(nn.Module):
    """Pre-activation residual block whose two branches are mixed by two learnable coefficients.
    可学习混合的残差块。

    Equation::

        a = neuron(BN(x))
        y = mixing[0] * shortcut + mixing[1] * conv(neuron(BN(conv(a))))

    The shortcut is x itself if the width stays the same, and a 1x1 convolution of a if it changes.

    Shapes: x [T, N, in, H, W] to [T, N, out, H / stride, W / stride], or without T in step mode
        ``"s"``.

    Args:
        in_channels: Channels of x.
        out_channels: Channels of y.
        stride: Stride of the first 3x3 and of the 1x1 convolution; 1 if the width stays the same.
        node: Builds one neuron.

    Source: the published code of Ding et al. (ICML 2024); He et al., "Identity Mappings in Deep
        Residual Networks" (ECCV 2016).

    Examples:
        >>> MixedBlock(4, 4, 1, nn.ReLU).mixing.tolist()
        [0.5, 0.5]
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, node: Callable[[], nn.Module]
    ) -> None:
        """Build the block; see the class."""
        super().__init__()
        self.activation = Stage(node(), norm=layer.BatchNorm2d(in_channels))
        self.residual = nn.Sequential(
            layer.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
            Stage(node(), norm=layer.BatchNorm2d(out_channels)),
            layer.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        )
        changes = in_channels != out_channels
        self.shortcut = (
            layer.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            if changes
            else None
        )
        self.mixing = nn.Parameter(torch.full((2,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        """The block's output for x; see the class."""
        active = self.activation(x)
        through = x if self.shortcut is None else self.shortcut(active)
        residual: Tensor = self.residual(active)
        return self.mixing[0] * through + self.mixing[1] * residual
