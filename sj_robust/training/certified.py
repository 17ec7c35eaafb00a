"""Certified training: cross entropy of the worst logits within bounds."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from sj_robust.classifier import SpikingClassifier
from sj_robust.core.checks import check_choice
from sj_robust.core.preserved import draws_numbers, preserved
from sj_robust.core.threat import Threat, as_threat
from sj_robust.proofs.differentiable import DifferentiableBounds, TrainedMethod
from sj_robust.proofs.verification import PROVABLE, ball_of

__all__ = ["CertifiedLoss", "CertifiedOptions"]

_START = 0.05
"""Share of the training that is on clean images alone."""


@dataclass(frozen=True)
class CertifiedOptions:
    """Options of certified training, apart from the threat. 可验证训练的选项。

    Attributes:
        bounds: Method of :func:`sj_robust.proofs.verify` that computes the bounds: ``"ibp"``, or
            ``"joint"``, which is slower and, for many time steps, tighter.
        surrogate_width: Width w of the surrogate in the bounds, relative to the neurons' own, > 0:
            the bounds use g(z / w) / w instead of g(z). The clean pass keeps g.
        ramp: Share of the training over which radius and weight increase, in (0, 0.95].
        box: Share of the radius r that the bounds cover, in (0, 1]: they are computed over the box
            of radius ``box * r`` around ``clamp(x~, x - (1 - box) r, x + (1 - box) r)``, which lies
            in the ball; x~ is the perturbed image.
        attacked: Whether the first term of the loss is the cross entropy of perturbed images,
            clamped to the ball of the current radius, instead of clean images.

    Raises:
        ValueError: If a number is out of range.

    Source: ``box``: Mueller et al., "Certified Training: Small Boxes are All You Need" (SABR, ICLR
        2023). ``attacked``: MTL-IBP of De Palma et al., "Expressive Losses for Verified
        Robustness via Convex Combinations" (ICLR 2024), whose alpha is ``1 - kappa``.
        ``surrogate_width``: measured here, see ``docs/results/certified.md``.

    Examples:
        >>> CertifiedOptions().surrogate_width
        1.0
    """

    bounds: TrainedMethod = "ibp"
    surrogate_width: float = 1.0
    ramp: float = 0.6
    box: float = 1.0
    attacked: bool = False

    @property
    def needs_perturbed(self) -> bool:
        """Whether the loss also uses perturbed images."""
        return self.attacked or self.box < 1.0

    def __post_init__(self) -> None:
        """Check the options."""
        check_choice("bounds", self.bounds, get_args(TrainedMethod))
        if not 0.0 < self.ramp <= 1.0 - _START:
            raise ValueError(
                f"ramp must be in (0, {1.0 - _START}], got {self.ramp}; the first {_START} of the "
                "training are on clean images alone"
            )
        if not 0.0 < self.box <= 1.0:
            raise ValueError(
                f"box must be in (0, 1], got {self.box}; SABR uses 0.1 to 0.7, and 1 is the ball"
            )
        if not 0.0 < self.surrogate_width < float("inf"):
            raise ValueError(
                f"surrogate_width must be > 0 and finite, got {self.surrogate_width}; 0.5 is half "
                "the neurons' own"
            )


class CertifiedLoss:
    """Cross entropy of the worst logits that bounds over a ball allow. 可验证训练的损失。

    Equation, with the completed share ``progress`` of the training::

        rise = (progress - 0.05) / ramp within [0, 1], with ramp = 0.6
        z_c = upper bound of logit_c - logit_y over the ball of radius rise * eps, 0 for c = y
        value = CE(z, y)

    or over a smaller box, see :class:`CertifiedOptions`.

    Bounds are differentiable, with surrogates for the derivatives of both bounds of a spike, and
    those of the last layer are of the difference as a whole; see
    :class:`sj_robust.proofs.differentiable.DifferentiableBounds`.

    Args:
        classifier: The network.
        eps: Linf radius at the end, or a ``ThreatModel`` in Linf, L0 or moves; in each time step,
            that many events may change or move.
        options: Options of certified training.

    Attributes:
        progress: Completed share of the training, in [0, 1]; set by the training loop.

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

    def __init__(
        self,
        classifier: SpikingClassifier,
        eps: Threat,
        options: CertifiedOptions = CertifiedOptions(),
    ) -> None:
        """Find the neurons; see the class."""
        self.threat = as_threat(eps, *PROVABLE)
        if self.threat.of_events and options.needs_perturbed:
            raise ValueError(
                f"box and attacked belong to Linf, got them for {self.threat.norm}, where events "
                "are there or not; omit them"
            )
        self.options = options
        self.progress = 1.0
        with _explained():
            self._bounds = DifferentiableBounds(
                classifier,
                surrogate_width=options.surrogate_width,
                method=options.bounds,
            )

    @property
    def ramp(self) -> float:
        """Current share of the final radius and weight, in [0, 1]."""
        done = (self.progress - _START) / self.options.ramp
        return min(1.0, max(0.0, done))

    def clamped(self, x: Tensor, x_perturbed: Tensor, share: float = 1.0) -> Tensor:
        """Perturbed images, clamped to a share of the current radius around ``x``."""
        reach = share * self.ramp * self.threat.eps
        above = torch.maximum(x_perturbed.detach(), x - reach)
        return torch.minimum(above, x + reach)

    def watching(self) -> AbstractContextManager[None]:
        """Context of the clean pass, whose batch statistics the bounds use."""
        return self._bounds.watching()

    def check(self, image: Tensor) -> None:
        """Raise an error for a network without bounds, by trying one image [1, ...]; nothing else
        changes.
        """
        classifier = self._bounds.classifier
        with preserved(classifier):
            if draws_numbers(classifier, image):
                raise ValueError(
                    "no bounds are known for a network that draws random numbers in a forward; "
                    "train such a network in another mode"
                )
        with _explained(), preserved(classifier), torch.no_grad():
            label = torch.zeros(1, dtype=torch.int64, device=image.device)
            DifferentiableBounds(classifier).lead(image, label, 0.0)

    def value(
        self, x: Tensor, y: Tensor, x_perturbed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss, and the share of images whose class, by these bounds, no perturbation within
        the current radius or box changes.

        Raises:
            ValueError: If there are no perturbed images although the box needs them, or if event
                frames are not binary, or with ``counts`` not numbers of events.
        """
        box = self.options.box
        if box < 1.0:
            if x_perturbed is None:
                raise ValueError(
                    f"box {box} needs perturbed images, around which it lies; give an attack"
                )
            x = self.clamped(x, x_perturbed, 1.0 - box)
        radius = box * self.ramp * self.threat.eps
        lead = self._bounds.lead(x, y, ball_of(self.threat, x, radius))
        rivals = lead.detach().scatter(1, y.unsqueeze(1), -torch.inf)
        share = (rivals.amax(1) < 0).to(lead.dtype).mean()
        return F.cross_entropy(lead, y), share


@contextmanager
def _explained() -> Iterator[None]:
    """A network that has no bounds is the wrong network for this training."""
    try:
        yield
    except NotImplementedError as error:
        raise ValueError(f"{error}; train such a network in another mode") from error
