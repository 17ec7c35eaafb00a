"""Networks of convolution - batch norm - neuron stages in a row: the paper's VGG, and a small one."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from spikingjelly.activation_based import functional, layer
from torch import nn

from sj_robust.models.direct import DirectlyEncoded, initialise, neuron_builder

__all__ = ["VGG", "VGG_FEATURES", "ConvChain", "SmallConvNet"]

VGG_FEATURES: dict[str, tuple[int | Literal["A"], ...]] = {
    "vgg5": (64, "A", 128, 128, "A"),
    "vgg11": (64, "A", 128, 256, "A", 512, 512, 512, "A", 512, 512),
    "vgg13": (64, 64, "A", 128, 128, "A", 256, 256, "A", 512, 512, "A", 512, 512, "A"),
    "vgg16": (64, 64, "A", 128, 128, "A", *[256] * 3, "A", *[512] * 3, "A", *[512] * 3, "A"),
    "vgg19": (64, 64, "A", 128, 128, "A", *[256] * 4, "A", *[512] * 4, "A", *[512] * 4, "A"),
}
"""Output channels of the convolutions of each network and ``"A"`` for a pooling, under the published code's names."""


class ConvChain(DirectlyEncoded):
    """Convolution - batch norm - neuron for every number in ``features``, average pooling by 2 for every ``"A"``.

    After them linear - neuron for every number in ``hidden``, and a linear layer to the classes.
    逐层堆叠的卷积脉冲网络。

    Shapes and the time steps: see :class:`DirectlyEncoded`.

    Args:
        image_shape: (C, H, W) of one image; H and W at least 2 to the number of poolings.
        classes: Number of classes.
        T: Number of time steps an image is repeated for.
        spiking_neuron: Class or function that builds a neuron, as in SpikingJelly's model zoo.
        features: Output channels of 3x3 convolutions, the first of them first, and ``"A"`` for a pooling.
        hidden: Widths of the hidden linear layers.
        step_mode: ``"m"`` or ``"s"``.
        **neuron_kwargs: Passed on to ``spiking_neuron``; one that takes ``T`` (``DLIFNode`` does) gets the network's.

    Raises:
        ValueError: If the image is too small for the number of poolings, ``features`` does not begin with a
            convolution, a width is not positive, or an input has another number of dimensions.

    Source: the VGG networks of Ding et al. (ICML 2024), section 5.

    Examples:
        >>> import torch
        >>> from sj_robust.neuron import DLIFNode
        >>> net = ConvChain((1, 8, 8), 10, T=4, spiking_neuron=DLIFNode, features=[4, "A"], hidden=[16])
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
        features: Sequence[int | Literal["A"]],
        hidden: Sequence[int] = (),
        step_mode: str = "m",
        **neuron_kwargs: Any,
    ) -> None:
        """Build the network; see the class."""
        super().__init__()
        width, height, columns = image_shape
        poolings = features.count("A")
        if not features or features[0] == "A":
            raise ValueError(f"features must begin with a convolution, got {list(features)}")
        for name, sizes in (("convolution", [size for size in features if size != "A"]), ("hidden layer", hidden)):
            if any(size < 1 for size in sizes):
                raise ValueError(f"every {name} must have a width >= 1, got {list(sizes)}; leave the layer out")
        if min(height, columns) < 2**poolings:
            raise ValueError(
                f"an image of {height}x{columns} pixels cannot be halved {poolings} times (>= 1 needed); "
                "pass fewer stages, or larger images"
            )
        node = neuron_builder(spiking_neuron, T, neuron_kwargs)
        self.T = T
        stages: list[nn.Module] = []
        for feature in features:
            if feature == "A":
                stages.append(layer.AvgPool2d(2))
                continue
            stages += [layer.Conv2d(width, feature, 3, padding=1), layer.BatchNorm2d(feature), node()]
            width = feature
        width *= (height // 2**poolings) * (columns // 2**poolings)
        stages.append(layer.Flatten())
        for size in hidden:
            stages += [layer.Linear(width, size), node()]
            width = size
        self.first = stages[0]
        self.stages = nn.Sequential(*stages[1:], layer.Linear(width, classes))
        initialise(self)
        functional.set_step_mode(self, step_mode)


class VGG(ConvChain):
    """VGG with batch norm: convolutions as named, then two hidden linear layers of spiking neurons. 脉冲 VGG 网络。

    Args:
        name: One of :data:`VGG_FEATURES`.
        image_shape: (C, H, W) of one image.
        classes: Number of classes.
        hidden: Widths of the hidden linear layers.
        **arguments: ``T``, ``spiking_neuron`` and whatever else :class:`ConvChain` takes.

    Raises:
        ValueError: If the name is unknown, and as :class:`ConvChain`.

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
        hidden: Sequence[int] = (4096, 4096),
        **arguments: Any,
    ) -> None:
        """Build the network; see the class."""
        if name not in VGG_FEATURES:
            raise ValueError(f"name must be one of {', '.join(VGG_FEATURES)}, got {name!r}")
        super().__init__(image_shape, classes, features=VGG_FEATURES[name], hidden=hidden, **arguments)


class SmallConvNet(ConvChain):
    """Convolution - batch norm - neuron - average pooling, once per entry of ``channels``, then a linear layer.

    小型卷积脉冲网络，适用于 8x8 至 32x32 的图像。

    Args:
        image_shape: (C, H, W) of one image; H and W at least ``2 ** len(channels)``.
        classes: Number of classes.
        channels: Output channels of the convolutions.
        **arguments: ``T``, ``spiking_neuron`` and whatever else :class:`ConvChain` takes.

    Source: the stages of the VGG networks of Ding et al. (ICML 2024), made small.

    Examples:
        >>> import torch
        >>> from sj_robust.neuron import DLIFNode
        >>> net = SmallConvNet((1, 8, 8), 10, T=4, spiking_neuron=DLIFNode)
        >>> net(torch.rand(5, 1, 8, 8)).shape
        torch.Size([4, 5, 10])
    """

    def __init__(
        self, image_shape: Sequence[int], classes: int, *, channels: Sequence[int] = (16, 32), **arguments: Any
    ) -> None:
        """Build the network; see the class."""
        features: list[int | Literal["A"]] = [feature for width in channels for feature in (width, "A")]
        super().__init__(image_shape, classes, features=features, **arguments)
