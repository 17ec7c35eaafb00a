"""The exact gain of DLIF neurons over time as a term of the training objective."""

from torch import Tensor

from sj_robust.stability.design import gain_penalty
from sj_robust.training.penalties import Passes, Penalty

__all__ = ["StabilityGain"]


class StabilityGain(Penalty):
    """Squared L2 gain of every DLIF layer over its T steps, summed. DLIF 层 L2 增益的惩罚项。

    Equation: ``value = sum over layers of ||L_decay diag(p)||_2^2``; see :func:`gain_penalty`. It needs no pass of the
    network and moves the input gains alone.

    Args:
        weight: Weight in the objective.
        normalized: Whether each gain is taken per mean of ``|p|``, so that only the shape of p counts.

    Raises:
        ValueError: If the weight is out of range; when evaluated, if the network has no DLIF neuron.

    Source: derived here, from Theorem 3.1 of Ding et al. (ICML 2024) with the exact constant in place of the printed.

    Examples:
        >>> StabilityGain(weight=0.01).name
        'stability_gain'
    """

    name = "stability_gain"

    def __init__(self, weight: float, *, normalized: bool = False) -> None:
        """Keep the options; see the class."""
        super().__init__(weight)
        self.normalized = normalized

    def value(self, passes: Passes) -> Tensor:
        """Sum over layers; see the class."""
        return gain_penalty(passes.classifier.net, normalized=self.normalized).to(passes.first[1])
