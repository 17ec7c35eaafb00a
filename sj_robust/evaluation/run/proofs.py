"""Proofs in an evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from sj_robust.classifier import check_classifier
from sj_robust.core.eps import eps_text
from sj_robust.core.threat import ThreatModel
from sj_robust.evaluation.result import Row
from sj_robust.evaluation.run.data import Batches, Data
from sj_robust.proofs import verify
from sj_robust.proofs.soundness import UnprovableError
from sj_robust.proofs.verification import PROVABLE

__all__ = ["Proofs", "has_proofs", "proof_row", "prove"]


@dataclass(frozen=True)
class Proofs:
    """Results of proofs at several radii. 若干半径下被证明的图像。

    Attributes:
        verified: By radius, as text, the numbers of the images that are verified.
        total: Images that were looked at, the first ones of the data set.
        potential: At the largest radius that was tried, per layer and step, the mean square of the
            distance between the bounds of the charged potential, resets included. MS-MPPD leaves
            the resets out, so it may exceed them.
    """

    verified: Mapping[str, tuple[int, ...]]
    total: int
    potential: Mapping[str, tuple[float, ...]]


def proof_row(threat: ThreatModel, total: int, verified: Sequence[int]) -> Row:
    """The row of a report for proofs of the images with these numbers. 证明的报告行。"""
    images = range(total)
    left = sorted(set(images).difference(verified))
    return Row(
        "verify",
        "proof",
        seen=tuple(images),
        fell=tuple(left),
        threat=threat,
        estimator="",
    )


def has_proofs(threat: ThreatModel) -> bool:
    """Whether there are proofs for a threat. 是否可证明。

    Examples:
        >>> has_proofs(ThreatModel("L0", 5)), has_proofs(ThreatModel("L2", 0.5))
        (True, False)
    """
    return threat.norm in PROVABLE


def prove(
    model: nn.Module,
    batches: Batches | Data,
    radii: Sequence[float],
    threat: ThreatModel | None = None,
) -> Proofs:
    """Verify images at several radii of a threat, Linf if it is None, by
    :func:`sj_robust.proofs.verify`. 在多个半径下验证图像。

    Raises:
        UnprovableError: If nothing is proved of the model as it is, such as one that is no
            ``SpikingClassifier``.
        NotImplementedError: If something in it has no bounds.

    Examples:
        >>> from spikingjelly.activation_based import neuron
        >>> from sj_robust import SpikingClassifier
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), neuron.IFNode(step_mode="m"))
        >>> _ = net[0].weight.data.copy_(torch.eye(2))
        >>> batches = [(torch.tensor([[0.9, 0.1], [0.3, 0.2]]), torch.tensor([0, 0]))]
        >>> prove(SpikingClassifier(net, T=4).eval(), batches, [0.01, 0.05]).verified
        {'0.01': (0, 1), '0.05': (0,)}
    """
    try:
        check_classifier(model)
    except TypeError as error:
        raise UnprovableError(str(error)) from error
    ball = ThreatModel("Linf", 0.0) if threat is None else threat
    x, y = Data.of(batches).tensors(torch.device("cpu"))
    standing = list(range(len(y)))
    verified: dict[str, tuple[int, ...]] = {}
    potential: dict[str, tuple[float, ...]] = {}
    for eps in sorted(radii):  # what is not proved at a radius is not proved at any larger one
        if standing:
            within = replace(ball, eps=eps)
            result = verify(model, x[standing], y[standing], within)
            proved = zip(standing, result.verified, strict=True)
            standing = [number for number, good in proved if good]
            potential = {f"net.{layer.name}": layer.potential for layer in result.layers}
        verified[eps_text(eps)] = tuple(standing)
    return Proofs(verified, len(y), potential)
