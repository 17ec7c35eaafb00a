"""MPD-SGR: fewer potentials where the surrogate has a gradient."""

from typing import Any

import torch
from torch import Tensor

from sj_robust.defences.penalty import PotentialPenalty, check_weight

__all__ = ["SurrogateOverlap"]

_SMALLEST_VARIANCE = 1e-6
"""Added to the variance, so that a channel whose potentials are all the same has a gradient."""


class SurrogateOverlap(PotentialPenalty):
    """Estimated share of potentials within reach of the surrogate (MPD-SGR).
    膜电位分布与替代梯度区间重叠率的惩罚项。

    Equation, with the mean mu and the standard deviation sigma of ``z = h - v_threshold`` over
    batch and space, for every layer, channel and time step, and the normal distribution function
    Phi::

        Omega = Phi((half_width - mu) / sigma) - Phi((-half_width - mu) / sigma)
        value = mean over layers of mean over channels, steps and passes of Omega

    A surrogate has no gradient where ``|z| > half_width``, so fewer potentials within reach make
    the gradient of the whole network smaller, and with it the steps of whatever follows that
    gradient. This can also mask gradients: evaluate such a network with other estimators and
    without gradients.

    The paper, as far as it could be read, does not state the weight, which it tunes for each
    network. It derives mu and sigma from the parameters of batch norm (tdBN); here they are
    computed from the batch, which is also right for other norms and after a reset.

    Args:
        weight: Weight in the objective, the paper's eta.
        half_width: Half width of the surrogate in potential, the paper's gamma; 1 for the triangle
            of alpha 1.
        **options: ``layers`` and ``rising``, see
            :class:`~sj_robust.defences.penalty.PotentialPenalty`; so are the errors.

    Source: Jiang et al., "MPD-SGR: Robust Spiking Neural Networks with Membrane Potential
        Distribution-Driven Surrogate Gradient Regularization" (AAAI 2026, arXiv 2511.12199).

    Examples:
        >>> penalty = SurrogateOverlap(weight=0.1)
        >>> penalty.cost(torch.tensor([[-1.0], [1.0]]), None)  # one deviation to each side
        tensor([0.6827])
    """

    name = "mpd_sgr"

    def __init__(self, weight: float, *, half_width: float = 1.0, **options: Any) -> None:
        """Keep the options; see the class."""
        super().__init__(weight, **options)
        self.half_width = check_weight("half_width", half_width, positive=True)

    def cost(self, z: Tensor, node: Any) -> Tensor:
        """Omega of every channel, [C]."""
        per_channel = z.transpose(0, 1).flatten(1)
        mu = per_channel.mean(1)
        variance = per_channel.var(1, correction=0)
        sigma = (variance + _SMALLEST_VARIANCE).sqrt()
        upper: Tensor = torch.special.ndtr((self.half_width - mu) / sigma)
        lower: Tensor = torch.special.ndtr((-self.half_width - mu) / sigma)
        return upper - lower
