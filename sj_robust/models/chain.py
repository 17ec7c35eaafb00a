"""Convolution - batch norm - neuron stages, one after the other: what SmallConvNet and VGG share."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from spikingjelly.activation_based import functional, layer
from torch import nn

from sj_robust.models.direct import DirectlyEncoded, initialise, neuron_builder

__all__ = ["ConvChain"]


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
