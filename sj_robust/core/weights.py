"""Weights of layers that multiply by a matrix."""

from torch import Tensor, nn

__all__ = ["LAYERS", "weights"]

LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
"""Layers that multiply by a matrix."""


def weights(net: nn.Module) -> list[Tensor]:
    """Weights of the convolutions and linear layers of a network, a shared one once, in the order
    of ``net.modules()``.

    Leaks, thresholds, gates and the kernels of encoders have several dimensions too, but are no
    weights.

    Examples:
        >>> first = nn.Linear(2, 3)
        >>> [list(weight.shape) for weight in weights(nn.Sequential(first, nn.PReLU(3), first))]
        [[3, 2]]
    """
    layers = [module for module in net.modules() if isinstance(module, LAYERS)]
    found = {id(layer.weight): layer.weight for layer in layers}
    return list(found.values())
