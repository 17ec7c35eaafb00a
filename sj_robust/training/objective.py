"""The training objective: cross entropy of the clean and the perturbed image, and the perturbation between them."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from sj_robust.attacks.randomness import seeded_globals
from sj_robust.classifier import SpikingClassifier
from sj_robust.perturbation import MPPDMonitor

__all__ = ["Losses", "Objective"]


class Losses(NamedTuple):
    """Parts of the objective for one batch, scalars; only ``total`` carries a graph.

    Attributes:
        total: What is minimised.
        clean: Cross entropy of the clean images.
        perturbed: Cross entropy of the perturbed images; 0 without any.
        mppd: MS-MPPD before its weight; 0 if it has none.
        accuracy: Share of the clean images that are classified right.
        accuracy_perturbed: The same of the perturbed images; 0 without any.
    """

    total: Tensor
    clean: Tensor
    perturbed: Tensor
    mppd: Tensor
    accuracy: Tensor
    accuracy_perturbed: Tensor


class Objective(nn.Module):
    """Loss of a classifier on clean and perturbed images. 干净与扰动图像上的训练目标。

    Equation::

        L = kappa * CE(f(x), y) + (1 - kappa) * CE(f(x~), y) + rho * MS-MPPD

    or ``CE(f(x), y)`` without perturbed images. Both passes run in the module's own mode, the clean one first, so
    in training mode batch norm sees one after the other. The clean pass is a constant in MS-MPPD.

    Shapes: images [N, C, H, W], labels [N]; the parts are scalars. Both passes happen inside one ``forward``, which
    is what DDP needs to reduce every gradient once.

    Args:
        classifier: The network to train.
        kappa: Weight of the clean cross entropy, in [0, 1].
        rho: Weight of MS-MPPD, >= 0; 0 leaves the monitor out.
        layers: ``"last"`` (the spiking layer executed last), ``"all"``, or names of spiking layers.
        norm: ``"l2"`` for the mean square, ``"l1"`` for the mean absolute value.
        input_gain: Whether DLIF's learnable gain is part of the perturbation; the paper leaves it out.

    Raises:
        ValueError: If a weight is out of range or a layer unknown.

    Source: Ding et al., "Robust Stable Spiking Neural Networks" (ICML 2024), section 4; kappa 0.5 and rho 1.

    Example:
        >>> import torch
        >>> from sj_robust.models import NetworkSpec, build_network
        >>> objective = Objective(SpikingClassifier(build_network(NetworkSpec()), T=4))
        >>> x, y = torch.rand(2, 1, 8, 8), torch.tensor([3, 7])
        >>> bool(objective(x, y, x + 0.1).total > 0)
        True
    """

    def __init__(
        self,
        classifier: SpikingClassifier,
        *,
        kappa: float = 0.5,
        rho: float = 1.0,
        layers: Literal["last", "all"] | Sequence[str] = "last",
        norm: Literal["l2", "l1"] = "l2",
        input_gain: bool = False,
    ) -> None:
        """Attach the monitor if the objective needs one; see the class."""
        super().__init__()
        if not 0.0 <= kappa <= 1.0:
            raise ValueError(f"kappa must be in [0, 1], got {kappa}; it is the weight of the clean images")
        if not 0.0 <= rho < float("inf"):
            raise ValueError(f"rho must be >= 0 and finite, got {rho}; 0 turns MS-MPPD off")
        if norm not in ("l2", "l1"):
            raise ValueError(f"norm must be 'l2' or 'l1', got {norm!r}")
        self.classifier = classifier
        self.kappa = kappa
        self.rho = rho
        self.layers = layers if isinstance(layers, str) else list(layers)
        self.norm: Literal["l2", "l1"] = norm
        self.input_gain = input_gain
        self.monitor = MPPDMonitor(classifier.net, layers=self.layers) if rho > 0 else None

    def prepare(self, x: Tensor) -> None:
        """Find the layer executed last by running the network on ``x``, which changes nothing else.

        The monitor then leaves the other layers to themselves from the first step on, so that a resumed run repeats an
        unbroken one bit for bit also where batch norm and neuron run in one pass.
        """
        if self.monitor is not None:
            with seeded_globals(0, x.device):
                self.monitor.compare(x, x, forward=self.classifier)
            self.monitor.clear_recorded_data()

    def forward(self, x: Tensor, y: Tensor, x_perturbed: Tensor | None = None) -> Losses:
        """Parts of the objective for images ``x`` with labels ``y``; without perturbed images, plain cross entropy."""
        if x_perturbed is None:
            logits = self.classifier(x)
            total = F.cross_entropy(logits, y)
            zero = total.detach().new_zeros(())
            return Losses(total, total.detach(), zero, zero, _accuracy(logits, y), zero)
        if self.monitor is None:
            logits, logits_perturbed = self.classifier(x), self.classifier(x_perturbed)
            mppd = logits.new_zeros(())
        else:
            with self.monitor.clean():
                logits = self.classifier(x)
            with self.monitor.perturbed():
                logits_perturbed = self.classifier(x_perturbed)
            mppd = self.monitor.loss(layers=self.layers, norm=self.norm, input_gain=self.input_gain, retain=False)
        clean, perturbed = F.cross_entropy(logits, y), F.cross_entropy(logits_perturbed, y)
        total = self.kappa * clean + (1 - self.kappa) * perturbed + self.rho * mppd
        return Losses(
            total,
            clean.detach(),
            perturbed.detach(),
            mppd.detach(),
            _accuracy(logits, y),
            _accuracy(logits_perturbed, y),
        )


def _accuracy(logits: Tensor, y: Tensor) -> Tensor:
    return (logits.argmax(1) == y).to(logits.dtype).mean()
