"""Penalties on top of the training objective: one interface, and defences that fit on it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sj_robust.attacks.logits import without
from sj_robust.classifier import SpikingClassifier
from sj_robust.defences import OrthogonalEncoder
from sj_robust.defences.stod import temporal_similarity
from sj_robust.neuron.charging import Neuron, find_neurons
from sj_robust.neuron.watching import SpikingCall, Wants, watch
from sj_robust.ops.recurrence import charge, reset
from sj_robust.perturbation.gains import gain_penalty

__all__ = [
    "ForwardPasses",
    "GradientSparsity",
    "Penalty",
    "StabilityGain",
    "TemporalOrthogonality",
    "ThresholdGuarding",
    "WeightMagnitude",
]


@dataclass(frozen=True)
class ForwardPasses:
    """What one training step has run so far, for a penalty to build on.
    一步训练中已完成的前向传播。

    Attributes:
        classifier: The network in training, in the mode of the objective.
        y: Labels [N].
        x: Clean images [N, ...].
        x_perturbed: Perturbed images, None without any.
        logits: Logits [N, classes] of the clean images with their graph, None if the objective ran
            no clean pass.
        logits_perturbed: The same of the perturbed images.
    """

    classifier: SpikingClassifier
    y: Tensor
    x: Tensor
    x_perturbed: Tensor | None
    logits: Tensor | None
    logits_perturbed: Tensor | None

    @property
    def first(self) -> tuple[Tensor, Tensor]:
        """Images and logits of the first pass: of the clean images, or of the perturbed ones where
        they run alone.
        """
        if self.logits is not None:
            return self.x, self.logits
        assert self.x_perturbed is not None
        assert self.logits_perturbed is not None
        return self.x_perturbed, self.logits_perturbed


class Penalty(ABC):
    """A term of the objective beyond cross entropy and MS-MPPD. 训练目标的附加惩罚项。

    Equation: ``L = ... + weight * value``. A subclass sets :attr:`name`, which the logs show, and
    gives :meth:`value`; if it must watch the passes themselves it hooks the network in
    :meth:`observe`.

    Args:
        weight: Weight in the objective, >= 0 and finite.

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
    """Whether the images of the first pass must require a gradient, so that its graph reaches
    them.
    """

    def __init__(self, weight: float) -> None:
        """Keep the weight; see the class."""
        self.weight = _checked("weight", weight)

    def observe(self, classifier: SpikingClassifier) -> AbstractContextManager[None]:
        """Context in which the objective runs its passes; it watches nothing unless overridden."""
        return nullcontext()

    @abstractmethod
    def value(self, passes: ForwardPasses) -> Tensor:
        """The penalty before its weight: a scalar with a graph to the parameters it acts on."""


class GradientSparsity(Penalty):
    """l1 norm of the input gradient of the true class's probability, by a finite difference.
    输入梯度稀疏正则。

    Equation, with z the logits, m the likeliest wrong class at ``x`` and ``d = sign(grad_x f(x))``
    a constant::

        f(x) = exp(z_y) / (exp(z_y) + exp(z_m))
        value = mean_n |f(x + h * d) - f(x)| / h            (squared: the mean of its square)

    which tends to ``||grad_x f||_1`` for small h without a second derivative. ``x`` are the images
    of the first pass (the clean ones, or the perturbed ones if these are all that is trained on).
    ``f(x + h * d)`` takes one more pass in the mode of the objective, so that in training batch
    norm sees those images too, as in the published code.

    Args:
        weight: Weight in the objective.
        h: Length of the difference in units of [0, 1] images; ``x + h * d`` may leave [0, 1].
        squared: Whether to take the mean square, as the published code does, instead of the mean.

    Raises:
        ValueError: If ``weight`` or ``h`` is out of range.
        RuntimeError: If gradients are disabled while the penalty is evaluated.

    Source: Liu et al., "Enhancing Adversarial Robustness in SNNs with Sparse Gradients" (ICML
        2024), and its code for f and h = 0.01.

    Examples:
        >>> GradientSparsity(weight=0.1).h
        0.01
    """

    name = "gradient_sparsity"
    input_gradient = True

    def __init__(self, weight: float, *, h: float = 0.01, squared: bool = False) -> None:
        """Keep the options; see the class."""
        super().__init__(weight)
        self.h = _checked("h", h, positive=True)
        self.squared = squared

    def value(self, passes: ForwardPasses) -> Tensor:
        """Mean over the batch; see the class."""
        images, logits = passes.first
        if not logits.requires_grad or not images.requires_grad:
            raise RuntimeError(
                "gradient_sparsity needs the gradient at the images: evaluate the objective with "
                "gradients enabled"
            )
        wrong = without(logits.detach(), passes.y).argmax(1)
        f = _pair_probability(logits, passes.y, wrong)
        (grad,) = torch.autograd.grad(f.sum(), images, retain_graph=True)
        moved = images.detach() + self.h * grad.sign()
        slope = (_pair_probability(passes.classifier(moved), passes.y, wrong) - f) / self.h
        return slope.square().mean() if self.squared else slope.abs().mean()


class ThresholdGuarding(Penalty):
    """Keeps membrane potentials away from the threshold, where a small push flips a spike.
    膜电位远离阈值的约束。

    Equation, with h the potential before the reset::

        value = mean over layers of mean over neurons, time and batch of max(0, margin - |h -
        v_threshold|)

    over all passes of the step, clean and perturbed. The gradient reaches the network through h,
    its past spikes included (surrogate), unless a neuron detaches its reset.

    Args:
        weight: Weight in the objective.
        margin: Distance from the threshold within which a potential is penalised, in units of the
            potential, > 0.
        layers: ``"all"``, or names of spiking layers.

    Raises:
        ValueError: If a number is out of range, a layer is unknown, or the dynamics of one are not
            known.
        RuntimeError: If no chosen layer ran in a pass.

    Source: threshold-guarding constraint of Wang et al., "Robust Spiking Neural Networks Against
        Adversarial Attacks" (ICLR 2026), with a fixed weight and the mean over layers in place of
        their sum.

    Examples:
        >>> ThresholdGuarding(weight=0.1, margin=0.5).margin
        0.5
    """

    name = "threshold_guarding"

    def __init__(
        self, weight: float, *, margin: float = 0.5, layers: Literal["all"] | Sequence[str] = "all"
    ) -> None:
        """Keep the options; see the class."""
        super().__init__(weight)
        self.margin = _checked("margin", margin, positive=True)
        self.layers = layers if isinstance(layers, str) else list(layers)
        self._chosen: dict[str, Neuron] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

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
            self._add(call.name, (self.margin - (h - node.v_threshold).abs()).relu())
            spike = spike.to(wide.dtype)
            v = reset(h, spike, v_threshold=node.v_threshold, v_reset=node.v_reset)

    def _add(self, name: str, excess: Tensor) -> None:
        total = excess.sum()
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._counts[name] = self._counts.get(name, 0) + excess.numel()

    def value(self, passes: ForwardPasses) -> Tensor:
        """Mean over layers; see the class."""
        sums, self._sums = self._sums, {}
        if not sums:
            raise RuntimeError(
                "threshold_guarding saw no spiking layer run: the network was compiled before "
                "its hooks were attached, or skips them; train without compilation"
            )
        return torch.stack([total / self._counts[name] for name, total in sums.items()]).mean()

    def _find(self, net: nn.Module) -> dict[str, Neuron]:
        followed, unsupported, spiking = find_neurons(net, {}, {})
        names = [*followed, *sorted(spiking)] if self.layers == "all" else self.layers
        for name in names:
            if name not in followed:
                reason = unsupported.get(
                    name, f"no spiking layer has that name; known are {', '.join(followed)}"
                )
                raise ValueError(
                    f"layer {name!r} cannot be guarded: {reason}; name others in layers=[...]"
                )
        return {name: followed[name] for name in names}


class WeightMagnitude(Penalty):
    """L1 norm of the weights of convolutions and linear layers, biases and gains left out.
    权重的 L1 惩罚项。

    Equation: ``value = sum over layers of sum |W|``. Bounds grow with ``|W|``, layer by layer.

    Args:
        weight: Weight in the objective; published trainings for bounds take 1e-6 to 1e-5.

    Raises:
        ValueError: If the weight is out of range.

    Source: the L1 term of Mao et al., "CTBench: A Library and Benchmark for Certified Training"
        (arXiv 2406.04848).

    Examples:
        >>> WeightMagnitude(weight=1e-6).name
        'l1'
    """

    name = "l1"

    def value(self, passes: ForwardPasses) -> Tensor:
        """Sum over layers; see the class."""
        weights = [w for w in passes.classifier.parameters() if w.ndim > 1]
        return torch.stack([w.abs().sum() for w in weights]).sum()


class StabilityGain(Penalty):
    """Squared L2 gain of every DLIF layer over its T steps, summed. DLIF 层 L2 增益的惩罚项。

    Equation: ``value = sum over layers of ||L_decay diag(p)||_2^2``; see
    :func:`sj_robust.perturbation.gains.gain_penalty`. It needs no pass of the network and moves the
    input gains alone.

    Args:
        weight: Weight in the objective.
        normalized: Whether each gain is taken per mean of ``|p|``, so that only the shape of p
            counts.

    Raises:
        ValueError: If the weight is out of range; when evaluated, if the network has no DLIF
            neuron.

    Source: derived here, from Theorem 3.1 of Ding et al. (ICML 2024) with the exact constant in
        place of the printed.

    Examples:
        >>> StabilityGain(weight=0.01).name
        'stability_gain'
    """

    name = "stability_gain"

    def __init__(self, weight: float, *, normalized: bool = False) -> None:
        """Keep the options; see the class."""
        super().__init__(weight)
        self.normalized = normalized

    def value(self, passes: ForwardPasses) -> Tensor:
        """Sum over layers; see the class."""
        return gain_penalty(passes.classifier.net, normalized=self.normalized).to(passes.first[1])


class TemporalOrthogonality(Penalty):
    """Keeps the frames of the time steps apart that an orthogonal encoder makes of an image.
    时间步编码的正交正则。

    Equation, with f[t] the distance of the frame of step t from grey::

        value = mean over the images of the sum over i < j of cos(f[i], f[j])^2

    It moves the kernels of :class:`sj_robust.defences.OrthogonalEncoder` alone.

    Args:
        weight: Weight in the objective.

    Raises:
        ValueError: If the weight is out of range.
        TypeError: When evaluated, if the classifier has another encoder.

    Source: global orthogonal regularisation of "Breaking Gradient Temporal Collinearity for Robust
        Spiking Neural Networks" (ICLR 2026); its weight is not in the text that was at hand.

    Examples:
        >>> TemporalOrthogonality(weight=0.1).name
        'temporal_orthogonality'
    """

    name = "temporal_orthogonality"

    def value(self, passes: ForwardPasses) -> Tensor:
        """Mean over the batch; see the class."""
        encoder = passes.classifier.encoder
        if not isinstance(encoder, OrthogonalEncoder):
            raise TypeError(
                "temporal_orthogonality needs an OrthogonalEncoder, got "
                f"{type(encoder).__name__}; take the encoder stod"
            )
        images = passes.first[0].detach()
        steps = range(len(encoder.skew))
        return temporal_similarity(torch.stack([encoder.turned(images, t) for t in steps]))


def _pair_probability(logits: Tensor, y: Tensor, wrong: Tensor) -> Tensor:
    """Probability of the class y [N] against one other class per sample."""
    chosen = logits.gather(1, torch.stack((y, wrong), 1))
    return (chosen[:, 0] - chosen[:, 1]).sigmoid()


def _checked(name: str, value: float, *, positive: bool = False) -> float:
    if not 0.0 <= value < float("inf") or (positive and value == 0):
        raise ValueError(f"{name} must be {'> 0' if positive else '>= 0'} and finite, got {value}")
    return float(value)
