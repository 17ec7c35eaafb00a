"""The activation of a network that is to be run with spikes."""

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter, is_lazy

from sj_robust.core.checks import check_count, check_size
from sj_robust.defences.node import PerNeuron

__all__ = ["ClippedReLU"]

_LEAST = 0.01


class ClippedReLU(PerNeuron):
    """A ReLU that is clipped at a learnable threshold per channel, and in training as uncertain as
    a count of spikes. 截断 ReLU，训练时加均匀噪声，用于待转换的网络。

    Equation, with the threshold theta, L levels, and u uniform in [-1/2, 1/2], drawn for each
    value in training mode and 0 in evaluation mode::

        y = theta * clip(x / theta + u / L, 0, 1)

    :func:`sj_robust.training.convert` takes theta for the value of a spike in every step. T steps
    round y / theta to a multiple of 1 / T: u is as large as the error of L steps, and the network
    learns to bear it, with gradients that are those of the function (dither, where a rounded
    activation needs a straight-through estimator).

    Shapes: [N, C, *] in step mode ``"s"``, [T, N, C, *] in step mode ``"m"``, and the same.

    Args:
        levels: L, >= 1; None: no noise.
        threshold: Initial theta, > 0, in units of the activation.
        step_mode: ``"s"`` or ``"m"``.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If one is out of range.
        RuntimeError: When called, if the number of channels is not that of the first call.

    Source: learnable threshold: Bu et al., "Optimal ANN-SNN conversion for high-accuracy and
        ultra-low-latency spiking neural networks" (ICLR 2022), whose activation rounds.

    Examples:
        >>> ClippedReLU(threshold=2.0).eval()(torch.tensor([[-1.0, 0.5, 5.0]])).tolist()
        [[0.0, 0.5, 2.0]]
    """

    rectifies = True
    """Proofs bound it as a network of ReLUs."""

    def __init__(
        self, levels: int | None = 4, threshold: float = 2.0, step_mode: str = "s"
    ) -> None:
        """See the class."""
        super().__init__()
        self.levels = None if levels is None else check_count("levels", levels)
        self.initial = check_size("threshold", threshold, positive=True)
        self.step_mode = step_mode
        self.threshold = UninitializedParameter()

    @torch.no_grad()
    def project_(self) -> None:
        """Put the thresholds back into their range, in place."""
        if not is_lazy(self.threshold):
            self.threshold.clamp_(min=_LEAST)

    def forward(self, x: Tensor) -> Tensor:
        """Clipped, of the same shape."""
        channel = 2 if self.step_mode == "m" else 1
        self.materialize("threshold", (x.shape[channel],), self.initial, x)
        threshold = self.threshold.view(-1, *[1] * (x.ndim - channel - 1))
        share = x / threshold
        if self.training and self.levels is not None:
            share = share + (torch.rand_like(share) - 0.5) / self.levels
        return threshold * share.clamp(0, 1)

    def extra_repr(self) -> str:
        """Parameters shown by ``print``."""
        return f"levels={self.levels}, step_mode={self.step_mode}"
