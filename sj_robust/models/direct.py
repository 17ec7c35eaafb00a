"""Networks that take images and add the time steps themselves."""

from collections.abc import Callable
from copy import deepcopy
from inspect import signature
from typing import Any

from torch import Tensor, nn

from sj_robust.ops.bn_dlif.config import repeat_step

__all__ = ["DirectlyEncoded", "initialise", "neuron_builder"]


class DirectlyEncoded(nn.Module):
    """A first layer that runs once per image, and stages that get its result T times.

    首层对静态图像只计算一次，再沿时间维展开。

    The image does not change over time under direct encoding, so the first convolution gives the
    same result at every step: it runs once, and its result is repeated over the T steps after it;
    batch norm sees the T copies.

    Shapes: in step mode ``"m"`` images [N, C, H, W] or frames [T, N, C, H, W] to [T, N, classes];
    in step mode ``"s"`` one frame [N, C, H, W] to [N, classes] per call.

    ``SpikingClassifier`` gives it images.

    A subclass sets ``T``, the SpikingJelly layer ``first`` and the module ``stages``.

    Raises:
        ValueError: If an input has another number of dimensions.

    Examples:
        >>> import torch
        >>> from spikingjelly.activation_based import layer
        >>> net = DirectlyEncoded()
        >>> net.T, net.first, net.stages = 2, layer.Conv2d(1, 3, 8, step_mode="m"), nn.Flatten(2)
        >>> net(torch.rand(5, 1, 8, 8)).shape
        torch.Size([2, 5, 3])
    """

    T: int
    first: nn.Module
    stages: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of every time step ([T, N, classes]), or of one ([N, classes]) in step mode
        ``"s"``.
        """
        single_step = self.first.step_mode == "s"
        if single_step:
            dimensions = [4]
            wanted = "one frame [N, C, H, W]"
        else:
            dimensions = [4, 5]
            wanted = "images [N, C, H, W] or frames [T, N, C, H, W]"
        if x.ndim not in dimensions:
            raise ValueError(
                f"{type(self).__name__} in step mode {self.first.step_mode!r} takes {wanted}, "
                f"got {tuple(x.shape)}"
            )
        if single_step or x.ndim == 5:
            # torch types a module's call as Any
            return self.stages(self.first(x))  # type: ignore[no-any-return]
        current = self.first(x.unsqueeze(0))
        return self.stages(repeat_step(current, self.T))  # type: ignore[no-any-return]  # as above


def neuron_builder(
    spiking_neuron: Callable[..., nn.Module], T: int, arguments: dict[str, Any]
) -> Callable[[], nn.Module]:
    """A function that builds one neuron after the other, which share nothing.
    逐个构建互不共享的神经元。

    A neuron with an argument ``T`` gets the network's, unless ``arguments`` has one.
    """
    if "T" in signature(spiking_neuron).parameters:
        arguments = {"T": T, **arguments}
    return lambda: spiking_neuron(**deepcopy(arguments))


def initialise(net: nn.Module) -> None:
    """Kaiming-normal (fan out) convolutions; biases of convolutions and linear layers 0.
    初始化权重。
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
