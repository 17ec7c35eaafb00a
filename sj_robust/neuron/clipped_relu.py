"""The activation of a network that is to be run with spikes."""

import torch
from torch import Tensor, nn

from sj_robust.core.checks import check_count, check_size

__all__ = ["ClippedReLU"]


class ClippedReLU(nn.Module):
    """A ReLU that is clipped at a learnable threshold, and in training as uncertain as a count of
    spikes. 截断 ReLU，训练时加均匀噪声，用于待转换的网络。

    Equation, with the threshold theta, L levels, and u uniform in [-1/2, 1/2], drawn for each
    value in training mode and 0 in evaluation mode::

        y = theta * clip(x / theta + u / L, 0, 1)

    :func:`sj_robust.training.convert` takes theta for the value of a spike in every step. T steps
    round y / theta to a multiple of 1 / T: u is as large as the error of L steps, and the network
    learns to bear it, with gradients that are those of the function (dither, where a rounded
    activation needs a straight-through estimator).

    Shapes: any, and the same.

    Args:
        levels: L, >= 1; None: no noise.
        threshold: Initial theta, > 0, in units of the activation.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If one is out of range.

    Source: learnable threshold: Bu et al., "Optimal ANN-SNN conversion for high-accuracy and
        ultra-low-latency spiking neural networks" (ICLR 2022), whose activation rounds.

    Examples:
        >>> ClippedReLU(threshold=2.0).eval()(torch.tensor([-1.0, 0.5, 5.0])).tolist()
        [0.0, 0.5, 2.0]
    """

    def __init__(self, levels: int | None = 4, threshold: float = 2.0) -> None:
        """See the class."""
        super().__init__()
        self.levels = None if levels is None else check_count("levels", levels)
        first = check_size("threshold", threshold, positive=True)
        self.threshold = nn.Parameter(torch.tensor(first))

    def forward(self, x: Tensor) -> Tensor:
        """Clipped, of the same shape."""
        share = x / self.threshold
        if self.training and self.levels is not None:
            share = share + (torch.rand_like(share) - 0.5) / self.levels
        return self.threshold * share.clamp(0, 1)

    def extra_repr(self) -> str:
        """Levels and threshold."""
        return f"levels={self.levels}, threshold={float(self.threshold):.3g}"
