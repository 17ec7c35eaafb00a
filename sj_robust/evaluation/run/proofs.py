"""Proofs in an evaluation, and the mixed-integer program of a small network as an attack."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sj_robust.attacks.call import Model, Randomness
from sj_robust.classifier import SpikingClassifier, check_classifier
from sj_robust.core.environment import device_of
from sj_robust.core.eps import eps_text
from sj_robust.core.preserved import preserved, sums_of_products
from sj_robust.core.threat import Threat, ThreatModel, as_threat
from sj_robust.evaluation.result import Row
from sj_robust.evaluation.run.data import Batches, Data
from sj_robust.proofs import verify
from sj_robust.proofs.bounds import bounded_neurons
from sj_robust.proofs.joint import OverTime
from sj_robust.proofs.maps import Maps
from sj_robust.proofs.mip import Programs
from sj_robust.proofs.points import Points
from sj_robust.proofs.soundness import UnprovableError
from sj_robust.proofs.verification import PROVABLE

__all__ = ["Proofs", "has_proofs", "program", "proof_row", "prove"]


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


_SPIKES = 1024
"""Neurons times time steps up to which a network is small."""
_WITHOUT_PROGRAM = (NotImplementedError, UnprovableError)
"""What says that no program is known of a network, or of an image of it."""


def program(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: Threat,
    nodes: int = 300,
    generator: Randomness = None,
) -> Tensor:
    """Ask the mixed-integer program for an image in every Linf ball that a small network
    misclassifies.

    混合整数规划攻击，仅用于小型网络。

    It is the program of ``verify(method="mip")`` without its proof: spikes and logits keep a small
    distance from thresholds and draws, and of every rival at most ``nodes`` nodes of the search
    tree are visited, so that the result depends on neither time nor neighbours and draws nothing.
    What it finds is tried on the network itself.

    Images come back as they are where it finds nothing; if the network has more than 1024 spikes
    (neurons times steps), or an image leaves more than 128 of them open; and for a model of which
    no program is known, such as a plain function.

    Args:
        model: Images [N, ...] in [0, 1] to logits.
        x: The images.
        y: Their labels [N] int64.
        eps: Linf radius.
        nodes: Nodes of the search tree for every rival class.
        generator: Not used; every attack takes one.

    Raises:
        ModuleNotFoundError: If scipy is missing.
    """
    ball = as_threat(eps, "Linf")
    x_adv = x.detach().clone()
    if not isinstance(model, SpikingClassifier) or len(x) == 0 or ball.eps == 0:
        return x_adv
    with sums_of_products(x.device), preserved(model), torch.enable_grad():
        try:
            asked = _Small(model, x, ball)
        except _WITHOUT_PROGRAM:
            return x_adv
        for number in range(len(x)):
            part = slice(number, number + 1)
            # Image by image: whether a part without a program is asked depends on what is open.
            with suppress(*_WITHOUT_PROGRAM):
                found = asked.witness(x[part], y[part], nodes)
                if found is not None:
                    x_adv[part] = found
    return x_adv


class _Small:
    """A small network that the program is asked about."""

    def __init__(self, model: SpikingClassifier, x: Tensor, ball: ThreatModel) -> None:
        """NotImplementedError if no program is known of it, or it is large."""
        self.model = model
        self.ball = ball
        neurons = bounded_neurons(model)
        modules = [neuron.module for neuron in neurons.values()]
        if device_of(model) != x.device or _spikes(model, modules, x[:1]) > _SPIKES:
            raise NotImplementedError
        maps = Maps(model, neurons, x[0])
        self.programs = Programs(OverTime(maps, model.T), Points(model, ball.eps))

    def witness(self, image: Tensor, label: Tensor, nodes: int) -> Tensor | None:
        """An image of the ball of one image [1, ...] that the network gets wrong."""
        found = self.programs.witness(image, label, nodes)
        if found is None:
            return None
        inside = self.ball.project(image, found.to(image.dtype))
        with torch.no_grad():
            wrong = self.model(inside).argmax(1) != label
        return inside if bool(wrong) else None


@torch.no_grad()
def _spikes(model: SpikingClassifier, modules: list[nn.Module], image: Tensor) -> int:
    """Neurons times time steps of a network."""
    sizes: list[int] = []

    def called(module: nn.Module, args: Any, output: Tensor) -> None:
        sizes.append(output.numel())

    hooks = [module.register_forward_hook(called) for module in modules]
    try:
        model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(sizes)
