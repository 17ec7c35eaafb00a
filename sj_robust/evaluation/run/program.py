"""Images that fool a small network, found by the mixed-integer program with a bounded number of
steps: an attack.
"""

from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sj_robust.attacks.call import Model, Randomness
from sj_robust.classifier import SpikingClassifier
from sj_robust.core.environment import device_of
from sj_robust.core.preserved import preserved, sums_of_products
from sj_robust.core.threat import Threat, ThreatModel, as_threat
from sj_robust.proofs.bounds import bounded_logits, bounded_neurons
from sj_robust.proofs.joint import OverTime
from sj_robust.proofs.maps import Maps
from sj_robust.proofs.mip import Programs
from sj_robust.proofs.points import Points
from sj_robust.proofs.soundness import UnprovableError

__all__ = ["program"]

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
            asked = _Asked(model, x, ball)
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


class _Asked:
    """A small network that the program is asked about."""

    def __init__(self, model: SpikingClassifier, x: Tensor, ball: ThreatModel) -> None:
        """NotImplementedError if no program is known of it, or it is large."""
        self.model = model
        self.ball = ball
        neurons = bounded_neurons(model)
        modules = [neuron.module for neuron in neurons.values()]
        if device_of(model) != x.device or _spikes(model, modules, x[:1]) > _SPIKES:
            raise NotImplementedError
        maps = Maps(partial(bounded_logits, model), neurons, x[0])
        self.programs = Programs(OverTime(maps, model.T), Points(model, neurons, ball.eps))

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
