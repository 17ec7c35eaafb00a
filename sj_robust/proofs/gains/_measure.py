"""How far a perturbation of the input moved each layer, from one run over clean and perturbed
inputs together.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sj_robust.classifier import SpikingClassifier
from sj_robust.core.convention import Convention, Takes
from sj_robust.core.host import first_argument, step_mode
from sj_robust.proofs.gains._affine import INPUT
from sj_robust.proofs.gains.gain import NeuronGains

__all__ = ["Moved", "first_frame", "measure", "per_step"]


@dataclass
class Moved:
    """One layer (or the input) of every pair, summed over the steps so far; each [N] in float64.

    Attributes:
        current: Squared L2 norm of the clean input current, the scale of its rounding.
        perturbation: Squared L2 norm of the simplified perturbation.
        peak: Largest squared norm of one step.
        spikes: Squared L2 norm of the difference of the outputs.
    """

    current: Tensor
    perturbation: Tensor
    peak: Tensor
    spikes: Tensor
    _eps: Tensor | float = 0.0
    _step: int = 0

    def charge(self, x_seq: Tensor, gains: NeuronGains) -> None:
        """Follow the perturbation through the next steps with input currents [T, 2 N, *]."""
        for x in x_seq:
            clean, perturbed = x.double().flatten(1).chunk(2)
            gain = float(gains.input_gain[self._step])
            eps = gains.decay * self._eps + gain * (clean - perturbed)
            self._eps = eps
            self._step += 1
            squared = eps.square().sum(1)
            self.current = self.current + clean.square().sum(1)
            self.perturbation = self.perturbation + squared
            self.peak = torch.maximum(squared, self.peak)

    def send(self, s_seq: Tensor, repeats: int = 1) -> None:
        """Add the difference of outputs [T, 2 N, *], each of which counts ``repeats`` times."""
        for s in s_seq:
            clean, perturbed = s.double().flatten(1).chunk(2)
            squared = (clean - perturbed).square().sum(1)
            self.spikes = self.spikes + repeats * squared


@torch.no_grad()
def measure(
    classifier: SpikingClassifier,
    x: Tensor,
    x_perturbed: Tensor,
    layers: Mapping[str, NeuronGains | None],
) -> dict[str, Moved]:
    """Run a classifier on pairs, in evaluation mode as it is, and tell what moved, by layer and for
    :data:`INPUT`.

    ``layers`` holds gains over T steps by name in ``classifier.net``; None where only the output
    counts.
    """
    net = classifier.net
    convention = classifier.find_convention(x)
    net_mode = "s" if convention.takes == "steps" else "m"
    zeros = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    moved = {name: Moved(zeros, zeros, zeros, zeros) for name in (INPUT, *layers)}

    def enter(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if convention.takes == "images":
            repeats = classifier.T if per_step(convention) == "sequence" else 1
            moved[INPUT].send(args[0].unsqueeze(0), repeats)
        else:
            moved[INPUT].send(_sequence(args[0], net_mode))

    with ExitStack() as stack:
        stack.callback(net.register_forward_pre_hook(enter).remove)
        for name, gains in layers.items():
            follow = _Follow(moved[name], gains, net_mode)
            hook = net.get_submodule(name).register_forward_hook(follow, with_kwargs=True)
            stack.callback(hook.remove)
        classifier(torch.cat((x, x_perturbed)))
    return moved


@dataclass(frozen=True)
class _Follow:
    """Forward hook of a layer, which adds to what moved there."""

    moved: Moved
    gains: NeuronGains | None
    net_mode: str

    def __call__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> None:
        # A single-step neuron may stand in a container that hands it the steps in turn.
        mode = step_mode(module, self.net_mode)
        if self.gains is not None:
            self.moved.charge(_sequence(first_argument(args, kwargs), mode), self.gains)
        self.moved.send(_sequence(output, mode))


def _sequence(values: Tensor, mode: str) -> Tensor:
    """Values [T, N, *] of a call."""
    return values if mode == "m" else values.unsqueeze(0)


def per_step(convention: Convention) -> Takes:
    """What a network is to be called with for the maps of a single time step, where it can be."""
    return "sequence" if convention.takes_sequences else convention.takes


@torch.no_grad()
def first_frame(classifier: SpikingClassifier, x: Tensor) -> Tensor:
    """What the network inside a classifier gets in its first time step for one sample, [1, *]."""
    given: list[Tensor] = []

    def enter(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        given.append(args[0])

    with ExitStack() as stack:
        stack.callback(classifier.net.register_forward_pre_hook(enter).remove)
        classifier(x[:1])
    if classifier.find_convention(x).takes == "sequence":
        return given[0][0]
    return given[0]
