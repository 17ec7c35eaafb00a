"""Proofs beside attacks: which images of an evaluation no perturbation in the ball can turn."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sj_robust._environment import device_of
from sj_robust.attacks.threat import eps_text
from sj_robust.evaluation.outcome import MemberOutcome
from sj_robust.stability import verify

__all__ = ["Proofs", "check_proofs", "prove"]


@dataclass(frozen=True)
class Proofs:
    """What was proved at some radii of Linf. 若干半径下被证明的图像。

    Attributes:
        verified: By radius, as text, the numbers of the images that are verified.
        total: Images that were looked at, the first ones of the data set.
        potential: At the largest radius, per layer and step, the mean square of the distance between the bounds of the
            charged potential, resets included. MS-MPPD leaves the resets out, so it may exceed them.
    """

    verified: Mapping[str, tuple[int, ...]]
    total: int
    potential: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """Rows with ``eps``, ``verified`` and ``total``."""
        return [{"eps": eps, "verified": len(numbers), "total": self.total} for eps, numbers in self.verified.items()]


def prove(model: nn.Module, batches: Iterable[tuple[Tensor, ...]], radii: Sequence[float]) -> Proofs:
    """Verify images at several radii by :func:`sj_robust.stability.verify`. 在多个半径下验证图像。

    Raises:
        TypeError: If the model is no ``SpikingClassifier``.
        ValueError: If it is not in float32.
        NotImplementedError: If something in it has no bounds.

    Examples:
        >>> import torch
        >>> from spikingjelly.activation_based import neuron
        >>> from sj_robust import SpikingClassifier
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), neuron.IFNode(step_mode="m"))
        >>> _ = net[0].weight.data.copy_(torch.eye(2))
        >>> batches = [(torch.tensor([[0.9, 0.1], [0.3, 0.2]]), torch.tensor([0, 0]))]
        >>> prove(SpikingClassifier(net, T=4).eval(), batches, [0.01, 0.05]).verified
        {'0.01': (0, 1), '0.05': (0,)}
    """
    device = device_of(model)
    found: dict[str, tuple[int, ...]] = {eps_text(eps): () for eps in radii}
    sums: dict[str, list[float]] = {}
    start = 0
    for batch in batches:
        x, y = batch[0].to(device), batch[1].to(device)
        for eps in radii:
            result = verify(model, x, y, eps)
            found[eps_text(eps)] += tuple(start + row for row, proved in enumerate(result.verified) if proved)
            for layer in result.layers if eps == max(radii) else ():
                before = sums.get(layer.name, [0.0] * len(layer.potential))
                sums[layer.name] = [sum_ + len(y) * value for sum_, value in zip(before, layer.potential, strict=True)]
        start += len(y)
    potential = {f"net.{name}": tuple(value / start for value in row) for name, row in sums.items()}
    return Proofs(found, start, potential)


def check_proofs(members: Iterable[MemberOutcome], verified: Iterable[int], eps: float) -> None:
    """Raise ValueError if an attack of at most this radius breaks an image that is verified: one of them has a bug.

    Examples:
        >>> pgd = MemberOutcome("pgd", "training", "", 0.1, (0,), (0,), (), 0.1, 1.0)
        >>> check_proofs([pgd], {0}, 0.1)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: image 0 is verified at eps 0.1 and broken by 'pgd': proof or attack has a bug; ...
    """
    proved = frozenset(verified)
    for member in members:
        if member.eps is not None and member.eps <= eps and (both := proved.intersection(member.broken)):
            raise ValueError(
                f"image {min(both)} is verified at eps {eps_text(eps)} and broken by {member.name!r}: proof or attack "
                "has a bug; no report is made, please report it with the network"
            )
