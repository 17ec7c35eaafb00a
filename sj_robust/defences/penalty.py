"""The interface of penalties, and the base of those on membrane potentials."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sj_robust.classifier import SpikingClassifier
from sj_robust.core.checks import check_layers
from sj_robust.neuron.charging import Neuron, find_neurons
from sj_robust.neuron.watching import SpikingCall, Wants, watch
from sj_robust.ops.recurrence import charge, reset

__all__ = ["ForwardPasses", "Penalty", "PotentialPenalty", "check_weight"]


@dataclass(frozen=True)
class ForwardPasses:
    """The forward passes of one training step so far, for use by penalties.
    一步训练中已完成的前向传播。

    Attributes:
        classifier: The network in training, in the mode of the objective.
        y: Labels [N].
        x: Clean images [N, ...].
        x_perturbed: Perturbed images; None if there are none.
        logits: Logits [N, classes] of the clean images with their graph; None if the objective ran
            no clean pass.
        logits_perturbed: The same for the perturbed images.
        same_numbers: Makes a context in which random layers draw what they drew in the first pass,
            for a pass that is compared with it; by default one that changes nothing.
    """

    classifier: SpikingClassifier
    y: Tensor
    x: Tensor
    x_perturbed: Tensor | None
    logits: Tensor | None
    logits_perturbed: Tensor | None
    same_numbers: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def first(self) -> tuple[Tensor, Tensor]:
        """Images and logits of the first pass: those of the clean images, or of the perturbed
        images if there is no clean pass.
        """
        if self.logits is not None:
            return self.x, self.logits
        assert self.x_perturbed is not None
        assert self.logits_perturbed is not None
        return self.x_perturbed, self.logits_perturbed


class Penalty(ABC):
    """A term of the objective beyond cross entropy and MS-MPPD. 训练目标的附加惩罚项。

    A training evaluates it once before it begins, in evaluation mode on one image, so that one that
    does not fit the network is refused at once.

    Equation, with ``rise = 1``, or ``(1 - cos(pi * progress)) / 2`` for a rising weight::

        L = ... + rise * weight * value

    A subclass sets :attr:`name`, which appears in the logs, and implements :meth:`value`; if it
    needs to observe the passes themselves, it hooks the network in :meth:`observe`.

    Args:
        weight: Weight in the objective, >= 0 and finite.
        rising: Whether the weight rises from 0 during training, along half a cosine.

    Attributes:
        progress: Completed share of the training, in [0, 1]; set by the training loop.

    Raises:
        ValueError: If the weight is out of range.

    Examples:
        >>> class Decay(Penalty):
        ...     name = "decay"
        ...
        ...     def value(self, passes):
        ...         return sum(w.square().sum() for w in passes.classifier.parameters())
        >>> Decay(weight=1e-4).weight
        0.0001
    """

    name: str
    input_gradient: bool = False
    """Whether the images of the first pass must require a gradient, so that the graph reaches them.
    """

    def __init__(self, weight: float, *, rising: bool = False) -> None:
        """Keep the weight; see the class."""
        self.weight = check_weight("weight", weight)
        self.rising = rising
        self.progress = 1.0

    @property
    def present_weight(self) -> float:
        """The weight at the current stage of the training."""
        rise = (1 - math.cos(math.pi * self.progress)) / 2 if self.rising else 1.0
        return self.weight * rise

    def observe(self, classifier: SpikingClassifier) -> AbstractContextManager[None]:
        """Context in which the objective runs its passes; it observes nothing unless overridden."""
        return nullcontext()

    @abstractmethod
    def value(self, passes: ForwardPasses) -> Tensor:
        """The penalty before its weight: a scalar with a graph to the parameters it acts on."""


class PotentialPenalty(Penalty):
    """A penalty on the membrane potentials before the reset, of all passes of a step.
    作用于重置前膜电位的惩罚项。

    Equation: ``value = mean over layers of the mean of``:meth:`cost`. The potentials are recomputed
    from currents and spikes; the gradient reaches the network through them, including their past
    spikes (surrogate), unless a neuron detaches its reset.

    Args:
        weight: Weight in the objective.
        layers: ``"all"``, or names of spiking layers.
        rising: Whether the weight rises from 0 over the training.

    Raises:
        ValueError: If a number is out of range, a layer is unknown, or the dynamics of a layer are
            not known.
        RuntimeError: If no chosen layer ran in a pass.
    """

    def __init__(
        self,
        weight: float,
        *,
        layers: Literal["all"] | Sequence[str] = "all",
        rising: bool = False,
    ) -> None:
        """Keep the options; see the class."""
        super().__init__(weight, rising=rising)
        self.layers = check_layers(layers, "all")
        self._chosen: dict[str, Neuron] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    @abstractmethod
    def cost(self, z: Tensor, node: Any) -> Tensor:
        """Costs, of any shape, of ``z = h - v_threshold`` [N, *] of one step of a neuron."""

    @contextmanager
    def observe(self, classifier: SpikingClassifier) -> Iterator[None]:
        """Watch the neurons while the objective runs its passes."""
        self._sums, self._counts = {}, {}
        self._chosen = self._find(classifier.net)
        with watch(classifier.net, self, self._chosen):
            yield

    def wants(self, name: str) -> Wants:
        """Currents and spikes, see :class:`sj_robust.neuron.watching.Watcher`."""
        return Wants.SPIKES

    def called(self, call: SpikingCall) -> None:
        """Recompute the potential before every reset of a call."""
        node, x_seq, spike_seq = call.node, call.input, call.spikes
        assert x_seq is not None  # they were asked for
        assert spike_seq is not None
        if node.detach_reset:
            spike_seq = spike_seq.detach()
        if node.step_mode == "s":
            x_seq, spike_seq = x_seq.unsqueeze(0), spike_seq.unsqueeze(0)
        charging = self._chosen[call.name].charging()
        v = call.v_before
        for t, (x, spike) in enumerate(zip(x_seq, spike_seq, strict=True)):
            wide = x if x.dtype == torch.float64 else x.float()
            gain = charging.gain_at(call.time_step + t, input_gain=True)
            h = charge(v, wide, decay=charging.decay, gain=gain, v_reset=node.v_reset)
            self._add(call.name, self.cost(h - node.v_threshold, node))
            spike = spike.to(wide.dtype)
            v = reset(h, spike, v_threshold=node.v_threshold, v_reset=node.v_reset)

    def _add(self, name: str, costs: Tensor) -> None:
        total = costs.sum()
        if name in self._sums:
            total = self._sums[name] + total
        self._sums[name] = total
        self._counts[name] = self._counts.get(name, 0) + costs.numel()

    def value(self, passes: ForwardPasses) -> Tensor:
        """Mean over layers; see the class."""
        sums, self._sums = self._sums, {}
        if not sums:
            raise RuntimeError(
                f"{self.name} saw no spiking layer run: the network was compiled before "
                "its hooks were attached, or skips them; train without compilation"
            )
        means = [total / self._counts[name] for name, total in sums.items()]
        return torch.stack(means).mean()

    def _find(self, net: nn.Module) -> dict[str, Neuron]:
        followed, unsupported, spiking = find_neurons(net)
        names = [*followed, *sorted(spiking)] if self.layers == "all" else self.layers
        for name in names:
            if name not in followed:
                reason = unsupported.get(
                    name, f"no spiking layer has that name; known are {', '.join(followed)}"
                )
                raise ValueError(
                    f"layer {name!r} cannot be penalised: {reason}; name others in layers=[...]"
                )
        return {name: followed[name] for name in names}


def check_weight(name: str, value: float, *, positive: bool = False) -> float:
    """The value, if it is finite and >= 0, or > 0; else ValueError. 检查非负有限数。"""
    if not 0.0 <= value < float("inf") or (positive and value == 0):
        raise ValueError(f"{name} must be {'> 0' if positive else '>= 0'} and finite, got {value}")
    return float(value)
