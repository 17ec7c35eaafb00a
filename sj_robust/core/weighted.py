"""Layers that multiply by a matrix."""

from collections.abc import Iterator

from torch import nn

__all__ = ["Weighted", "weighted_layers"]

Weighted = (
    nn.Linear
    | nn.Conv1d
    | nn.Conv2d
    | nn.Conv3d
    | nn.ConvTranspose1d
    | nn.ConvTranspose2d
    | nn.ConvTranspose3d
)


def weighted_layers(net: nn.Module) -> Iterator[Weighted]:
    """Convolutions and linear layers of a network, each once, in the order of ``net.modules()``.

    Leaks, thresholds, gates and the kernels of encoders have several dimensions too, but are no
    weights.

    Examples:
        >>> list(weighted_layers(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))))
        [Linear(in_features=2, out_features=3, bias=True)]
    """
    for module in net.modules():
        if isinstance(module, Weighted):
            yield module
