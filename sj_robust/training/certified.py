"""Training for proofs: cross entropy of the worst logits that bounds over a ball allow."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from sj_robust.classifier import SpikingClassifier
from sj_robust.core.preserved import preserved
from sj_robust.proofs.differentiable import DifferentiableBounds
from sj_robust.training.batch_norm import batch_statistics

__all__ = ["CertifiedLoss"]

_START, _RISE = 0.05, 0.6
"""Shares of the training: how much is on clean images alone, and in how much radius and weight then
rise.
"""


class CertifiedLoss:
    """Cross entropy of the worst logits that bounds over an Linf ball allow. 可验证训练的损失。

    Equation, with ``progress`` the share of the training that is done::

        ramp = (progress - 0.05) / 0.6 within [0, 1]
        z_c = upper bound of logit_c - logit_y over the ball of radius ramp * eps, 0 for c = y
        value = CE(z, y)

    Bounds are differentiable, with surrogates for the derivatives of both bounds of a spike, and
    those of the last layer are of the difference as a whole; see
    :class:`sj_robust.proofs.differentiable.DifferentiableBounds`.

    Args:
        classifier: The network.
        eps: Linf radius at the end, >= 0.

    Attributes:
        progress: Share of the training that is done, in [0, 1]; whoever trains sets it.

    Raises:
        ValueError: If ``eps`` is out of range, or something in the network has no bounds; it is
            named.

    Source: Gowal et al., "On the Effectiveness of Interval Bound Propagation" (arXiv 1810.12715),
        for the loss and its schedule; for spiking networks Liang et al. (NeurIPS 2022).

    Examples:
        >>> from sj_robust.models import NetworkSpec, build_classifier
        >>> loss = CertifiedLoss(build_classifier(NetworkSpec()).eval(), eps=0.1)
        >>> loss.progress = 0.35
        >>> round(loss.ramp, 6)
        0.5
        >>> value, share = loss.value(torch.rand(2, 1, 8, 8), torch.tensor([3, 7]))
        >>> bool(value > 0), 0 <= float(share) <= 1
        (True, True)
    """

    def __init__(self, classifier: SpikingClassifier, eps: float) -> None:
        """Find the neurons; see the class."""
        if not 0.0 <= eps <= 1.0:
            raise ValueError(
                f"certified_eps must be in [0, 1], got {eps}; it is the Linf radius for images "
                "in [0, 1], such as 8/255"
            )
        self.eps = float(eps)
        self.progress = 1.0
        with _explained():
            self._bounds = DifferentiableBounds(classifier, batch_statistics)

    @property
    def ramp(self) -> float:
        """How far radius and weight have risen, in [0, 1]."""
        return min(1.0, max(0.0, (self.progress - _START) / _RISE))

    def watching(self) -> AbstractContextManager[None]:
        """Context of the clean pass, whose batch statistics the bounds take."""
        return self._bounds.watching()

    def check(self, image: Tensor) -> None:
        """Refuse a network of which there are no bounds, by trying one image [1, ...]; nothing else
        changes.
        """
        classifier = self._bounds.classifier
        with _explained(), preserved(classifier), torch.no_grad():
            label = torch.zeros(1, dtype=torch.int64, device=image.device)
            DifferentiableBounds(classifier).lead(image, label, 0.0)

    def value(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the share of images whose class no perturbation of the present radius
        changes.
        """
        lead = self._bounds.lead(x, y, self.ramp * self.eps)
        rivals = lead.detach().scatter(1, y.unsqueeze(1), -torch.inf)
        return F.cross_entropy(lead, y), (rivals.amax(1) < 0).to(lead.dtype).mean()


@contextmanager
def _explained() -> Iterator[None]:
    """A network that has no bounds is the wrong network for this training."""
    try:
        yield
    except NotImplementedError as error:
        raise ValueError(f"{error}; train such a network in another mode") from error
