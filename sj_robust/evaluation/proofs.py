"""Proofs beside attacks: which images of an evaluation no perturbation in the ball can turn."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sj_robust.attacks.threat import eps_text
from sj_robust.evaluation.data import Batches, Data
from sj_robust.evaluation.outcome import MemberOutcome
from sj_robust.proofs import verify

__all__ = ["Proofs", "check_proofs", "prove"]


@dataclass(frozen=True)
class Proofs:
    """What was proved at some radii of Linf. 若干半径下被证明的图像。

    Attributes:
        verified: By radius, as text, the numbers of the images that are verified.
        total: Images that were looked at, the first ones of the data set.
        potential: At the largest radius, per layer and step, the mean square of the distance
            between the bounds of the charged potential, resets included. MS-MPPD leaves the resets
            out, so it may exceed them.
    """

    verified: Mapping[str, tuple[int, ...]]
    total: int
    potential: Mapping[str, tuple[float, ...]]


def prove(model: nn.Module, batches: Batches | Data, radii: Sequence[float]) -> Proofs:
    """Verify images at several radii by :func:`sj_robust.proofs.verify`. 在多个半径下验证图像。

    Raises:
        TypeError: If the model is no ``SpikingClassifier``.
        ValueError: If it is not in float32.
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
    x, y = Data.of(batches).tensors(torch.device("cpu"))
    found = {eps: verify(model, x, y, eps) for eps in radii}
    verified = {
        eps_text(eps): tuple(number for number, proved in enumerate(result.verified) if proved)
        for eps, result in found.items()
    }
    potential = {f"net.{layer.name}": layer.potential for layer in found[max(radii)].layers}
    return Proofs(verified, len(y), potential)


def check_proofs(members: Iterable[MemberOutcome], verified: Iterable[int], eps: float) -> None:
    """Raise ValueError if an attack of at most this radius breaks an image that is verified: one of
    them has a bug.
    """
    proved = frozenset(verified)
    for member in members:
        if (
            member.eps is not None
            and member.eps <= eps
            and (both := proved.intersection(member.broken))
        ):
            raise ValueError(
                f"image {min(both)} is verified at eps {eps_text(eps)} and broken by "
                f"{member.name!r}: proof or attack has a bug; no report is made, please report "
                "it with the network"
            )
