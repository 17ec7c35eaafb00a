"""Networks of stages in a row: convolution, batch norm, neuron; or linear layers and neurons."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from spikingjelly.activation_based import functional, layer
from torch import nn

from sj_robust.core.checks import check_choice, check_count
from sj_robust.models.direct import DirectlyEncoded, initialise, neuron_builder
from sj_robust.neuron import Stage
from sj_robust.neuron.charging import has_known_dynamics, read_charging

__all__ = ["VGG", "VGG_FEATURES", "ConvChain", "FullyConnected", "SmallConvNet"]

VGG_FEATURES: dict[str, tuple[int | Literal["A"], ...]] = {
    "vgg5": (64, "A", 128, 128, "A"),
    "vgg11": (64, "A", 128, 256, "A", 512, 512, 512, "A", 512, 512),
    "vgg13": (64, 64, "A", 128, 128, "A", 256, 256, "A", 512, 512, "A", 512, 512, "A"),
    "vgg16": (64, 64, "A", 128, 128, "A", *[256] * 3, "A", *[512] * 3, "A", *[512] * 3, "A"),
    "vgg19": (64, 64, "A", 128, 128, "A", *[256] * 4, "A", *[512] * 4, "A", *[512] * 4, "A"),
}
"""Output channels of the convolutions of each network and ``"A"`` for a pooling, under the
published code's names.
"""

_SLOPE = 2.0
"""Slope of the potential over the pixel in a first layer that starts at thresholds, in units of the
distance from the reset to the threshold of the neuron.
"""


class ConvChain(DirectlyEncoded):
    """Convolution - batch norm - neuron for every number in ``features``, average pooling by 2 for
    every ``"A"``.

    Then come linear - neuron for every number in ``hidden``, and a linear layer to the classes.
    逐层堆叠的卷积脉冲网络。

    Shapes and the time steps: see :class:`DirectlyEncoded`.

    Args:
        image_shape: (C, H, W) of one image; H and W at least 2 to the number of poolings.
        classes: Number of classes.
        T: Number of time steps for which an image is repeated.
        spiking_neuron: Class or function that builds a neuron, as in SpikingJelly's model zoo.
        features: Output channels of the convolutions in order, ``"A"`` for a
            pooling and ``"S"`` for a stride of 2 in the next convolution.
        hidden: Widths of the hidden linear layers.
        batch_norm: Whether every convolution is followed by batch norm; without it, weights are
            initialised by torch's default.
        kernel_size: Height and width of every kernel, or of each convolution's; the padding is
            ``(kernel_size - 1) // 2``.
        thresholds: For images of one channel, a first convolution of 1x1 and no batch norm: one
            threshold for each of its output channels, such as ``[0.2, 0.4, 0.6]``. In the first
            step, its neurons then fire where the pixel, as the network gets it, is at least as
            large, until training changes their weights. None: random weights.
        step_mode: ``"m"`` or ``"s"``.
        **neuron_kwargs: Passed on to ``spiking_neuron``, which also gets the network's ``T`` if it
            has such an argument, as ``DLIFNode`` does.

    Raises:
        ValueError: If the image is too small for the stages, ``features`` does not begin with a
            convolution or ends in ``"S"``, a width is not positive, thresholds do not fit the first
            convolution or its neuron, or an input has another number of dimensions.

    Source: the VGG networks of Ding et al. (ICML 2024), section 5; thresholds are the thermometer
        code of Buckman et al. (ICLR 2018) as weights.

    Examples:
        >>> import torch
        >>> from sj_robust.neuron import DLIFNode
        >>> net = ConvChain(
        ...     (1, 8, 8), 10, T=4, spiking_neuron=DLIFNode, features=[4, "A"], hidden=[16]
        ... )
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
        features: Sequence[int | Literal["A", "S"]],
        hidden: Sequence[int] = (),
        batch_norm: bool = True,
        kernel_size: int | Sequence[int] = 3,
        thresholds: Sequence[float] | None = None,
        step_mode: str = "m",
        **neuron_kwargs: Any,
    ) -> None:
        """Build the network; see the class."""
        super().__init__()
        width, height, columns = image_shape
        halvings = features.count("A") + features.count("S")
        widths = [feature for feature in features if isinstance(feature, int)]
        if not widths or features[0] == "A" or features[-1] == "S":
            raise ValueError(
                "features must begin with a convolution and not end in a stride, got "
                f"{list(features)}"
            )
        for name, sizes in (("convolution", widths), ("hidden layer", hidden)):
            if any(size < 1 for size in sizes):
                raise ValueError(
                    f"every {name} must have a width >= 1, got {list(sizes)}; omit the layer"
                )
        if min(height, columns) < 2**halvings:
            raise ValueError(
                f"an image of {height}x{columns} pixels cannot be halved {halvings} times (>= 1 "
                "needed); pass fewer stages, or larger images"
            )
        kernels = _one_per_convolution(kernel_size, len(widths))
        node = neuron_builder(spiking_neuron, T, neuron_kwargs)
        self.T = T
        stages: list[nn.Module] = []
        stride = 1
        for feature in features:
            if feature == "S":
                stride = 2
                continue
            if feature == "A":
                _pool(stages)
                height, columns = height // 2, columns // 2
                continue
            kernel = next(kernels)
            padding = (kernel - 1) // 2
            stages.append(layer.Conv2d(width, feature, kernel, stride=stride, padding=padding))
            norm = layer.BatchNorm2d(feature) if batch_norm else None
            stages.append(Stage(node(), norm=norm))
            height, columns = (
                (size + 2 * padding - kernel) // stride + 1 for size in (height, columns)
            )
            width, stride = feature, 1
        width *= height * columns
        stages.append(layer.Flatten())
        for size in hidden:
            stages += [layer.Linear(width, size), node()]
            width = size
        self.first = stages[0]
        self.stages = nn.Sequential(*stages[1:], layer.Linear(width, classes))
        if batch_norm:
            initialise(self)
        if thresholds is not None:
            _start_at(thresholds, stages[0], stages[1])
        functional.set_step_mode(self, step_mode)


def _start_at(thresholds: Sequence[float], convolution: Any, stage: Any) -> None:
    """Give a convolution the weights with which neurons behind it start to fire at thresholds.

    Equation, with the gain g of the first step::

        v_reset + g (weight x + bias) = v_threshold + slope (x - threshold)
    """
    if convolution.weight.shape != (len(thresholds), 1, 1, 1) or stage.norm is not None:
        raise ValueError(
            "thresholds need images of one channel, a first convolution of 1x1 with one output "
            f"channel for each of them, and batch_norm False, got {len(thresholds)} thresholds for "
            f"{'batch norm and ' if stage.norm is not None else ''}kernels of "
            f"{list(convolution.weight.shape)}"
        )
    if not has_known_dynamics(stage.node):
        raise ValueError(
            f"thresholds need IF, LIF, PLIF or DLIF neurons, got {type(stage.node).__name__}"
        )
    if not all(map(math.isfinite, thresholds)):
        raise ValueError(f"thresholds must be finite numbers, got {list(thresholds)}")
    gain = read_charging(stage.node).gain_at(0, input_gain=True)
    height = stage.node.v_threshold - (stage.node.v_reset or 0.0)
    slope = _SLOPE * height
    at = torch.as_tensor(thresholds, dtype=convolution.weight.dtype)
    with torch.no_grad():
        convolution.weight.copy_(torch.as_tensor(slope / gain))
        convolution.bias.copy_((height - slope * at) / gain)


def _one_per_convolution(kernel_size: int | Sequence[int], convolutions: int) -> Iterator[int]:
    """The kernel sizes in the order of the convolutions."""
    sizes: Sequence[Any] = [kernel_size] * convolutions
    if isinstance(kernel_size, list | tuple):
        sizes = kernel_size
    if len(sizes) != convolutions:
        raise ValueError(
            f"kernel_size must be one number, or one for each of {convolutions} convolutions, got "
            f"{kernel_size!r}"
        )
    return iter([check_count("kernel_size", size) for size in sizes])


def _pool(stages: list[nn.Module]) -> None:
    """Halve height and width behind what is there."""
    last = stages[-1]
    if isinstance(last, Stage) and last.pool is None:
        last.pool = layer.AvgPool2d(2)
    else:
        stages.append(layer.AvgPool2d(2))


class VGG(ConvChain):
    """VGG with batch norm: the convolutions given by the name, then two hidden linear layers of
    spiking neurons. 脉冲 VGG 网络。

    Args:
        name: ``"vgg5"``, ``"vgg11"``, ``"vgg13"``, ``"vgg16"`` or ``"vgg19"``.
        image_shape: (C, H, W) of one image.
        classes: Number of classes.
        hidden: Widths of the hidden linear layers.
        **arguments: ``T``, ``spiking_neuron`` and whatever else :class:`ConvChain` takes.

    Raises:
        ValueError: If the name is unknown, and as for :class:`ConvChain`.

    Source: Ding et al. (ICML 2024), section 5, with its published code's names; Simonyan &
        Zisserman (2015).

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
        hidden: Sequence[int] = (4096, 4096),
        **arguments: Any,
    ) -> None:
        """Build the network; see the class."""
        check_choice("name", name, VGG_FEATURES)
        super().__init__(
            image_shape, classes, features=VGG_FEATURES[name], hidden=hidden, **arguments
        )


class SmallConvNet(ConvChain):
    """Convolution - batch norm - neuron - average pooling, once per entry of ``channels``, then
    linear layers.

    With ``strides`` the convolutions have these instead of the poolings, which gives tighter
    bounds.

    小型卷积脉冲网络，适用于 8x8 至 32x32 的图像。

    Args:
        image_shape: (C, H, W) of one image; H and W at least ``2 ** len(channels)``.
        classes: Number of classes.
        channels: Output channels of the convolutions.
        strides: Stride of each convolution, 1 or 2; None for poolings.
        **arguments: ``T``, ``spiking_neuron`` and whatever else :class:`ConvChain` takes, such as
            ``hidden``.

    Raises:
        ValueError: If there is not a stride of 1 or 2 for every convolution, and as
            :class:`ConvChain`.

    Source: the stages of the VGG networks of Ding et al. (ICML 2024), made small.

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
        channels: Sequence[int] = (16, 32),
        strides: Sequence[int] | None = None,
        **arguments: Any,
    ) -> None:
        """Build the network; see the class."""
        if strides is not None and (len(strides) != len(channels) or not set(strides) <= {1, 2}):
            raise ValueError(
                f"strides must be 1 or 2 for each of {len(channels)} convolutions, got "
                f"{list(strides)}"
            )
        features: list[int | Literal["A", "S"]] = []
        for number, width in enumerate(channels):
            if strides is None:
                features += [width, "A"]
            else:
                features += ["S", width] if strides[number] == 2 else [width]
        super().__init__(image_shape, classes, features=features, **arguments)


class FullyConnected(DirectlyEncoded):
    """Linear layer - neuron for every number in ``widths``, then a linear layer to the classes.
    全连接脉冲网络。

    The first linear layer is a convolution as large as the image. Each of its neurons sees all
    pixels, so a few changed events change its current little, which gives tight bounds. Weights
    before neurons are initialised with the standard deviation 2 / sqrt(inputs), so that sparse
    events make the neurons fire.

    Shapes and the time steps: see :class:`DirectlyEncoded`.

    Args:
        image_shape: (C, H, W) of one image.
        classes: Number of classes.
        T: Number of time steps for which an image is repeated.
        spiking_neuron: Class or function that builds a neuron, as in SpikingJelly's model zoo.
        widths: Neurons of each layer.
        step_mode: ``"m"`` or ``"s"``.
        **neuron_kwargs: Passed on to ``spiking_neuron``, which also gets the network's ``T`` if it
            has such an argument.

    Raises:
        ValueError: If there is no width, or one is not positive.

    Source: fully connected spiking networks as in SpikingJelly's examples.

    Examples:
        >>> import torch
        >>> from sj_robust.neuron import DLIFNode
        >>> net = FullyConnected((2, 8, 8), 10, T=4, spiking_neuron=DLIFNode, widths=[32])
        >>> net(torch.rand(4, 5, 2, 8, 8)).shape
        torch.Size([4, 5, 10])
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        classes: int,
        *,
        T: int,
        spiking_neuron: Callable[..., nn.Module],
        widths: Sequence[int] = (256,),
        step_mode: str = "m",
        **neuron_kwargs: Any,
    ) -> None:
        """Build the network; see the class."""
        super().__init__()
        if not widths or min(widths) < 1:
            raise ValueError(
                f"widths must be one number >= 1 for each layer, got {list(widths)}; such as [256]"
            )
        channels, height, columns = image_shape
        node = neuron_builder(spiking_neuron, T, neuron_kwargs)
        self.T = T
        self.first = layer.Conv2d(channels, widths[0], (height, columns))
        stages: list[nn.Module] = [node(), layer.Flatten()]
        for before, after in pairwise(widths):
            stages += [layer.Linear(before, after), node()]
        for module in (self.first, *stages):
            if isinstance(module, nn.Conv2d | nn.Linear):
                fan = module.weight[0].numel()
                nn.init.normal_(module.weight, std=2.0 / math.sqrt(fan))
        self.stages = nn.Sequential(*stages, layer.Linear(widths[-1], classes))
        functional.set_step_mode(self, step_mode)
