"""Penalties that do not belong to a published defence."""

import torch
from torch import Tensor

from sj_robust.attacks.logits import without
from sj_robust.core.weights import weights
from sj_robust.defences.penalty import ForwardPasses, Penalty, check_weight
from sj_robust.proofs.gains import gain_penalty

__all__ = ["GradientSparsity", "StabilityGain", "WeightMagnitude"]


class GradientSparsity(Penalty):
    """The l1 norm of the input gradient of the true class's probability, by a finite difference.
    输入梯度稀疏正则。

    Equation, with the logits z, the most likely wrong class m at ``x`` and ``d = sign(grad_x
    f(x))``, which is treated as a constant::

        f(x) = exp(z_y) / (exp(z_y) + exp(z_m))
        value = mean_n |f(x + h * d) - f(x)| / h            (squared: the mean of its square)

    which tends to ``||grad_x f||_1`` for small h without a second derivative. ``x`` are the images
    of the first pass (the clean images, or the perturbed ones if only these are used). ``f(x + h *
    d)`` needs one more pass in the mode of the objective, so in training mode batch norm also sees
    those images, as in the published code. Random layers draw the same numbers in both passes.

    Args:
        weight: Weight in the objective.
        h: Length of the difference in units of [0, 1] images; ``x + h * d`` may leave [0, 1].
        squared: Whether to use the mean square, as the published code does, instead of the mean.

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
        self.h = check_weight("h", h, positive=True)
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
        with passes.same_numbers():
            f_moved = _pair_probability(passes.classifier(moved), passes.y, wrong)
        slope = (f_moved - f) / self.h
        if self.squared:
            return slope.square().mean()
        return slope.abs().mean()


class WeightMagnitude(Penalty):
    """L1 norm of the weights of convolutions and linear layers, without biases and gains.
    权重的 L1 惩罚项。

    Equation: ``value = sum over layers of sum |W|``. Bounds grow with ``|W|``, layer by layer.

    Args:
        weight: Weight in the objective; published certified training uses 1e-6 to 1e-5.

    Raises:
        ValueError: If the weight is out of range; when evaluated, if the network has no such layer.

    Source: the L1 term of Mao et al., "CTBench: A Library and Benchmark for Certified Training"
        (arXiv 2406.04848).

    Examples:
        >>> WeightMagnitude(weight=1e-6).name
        'l1'
    """

    name = "l1"

    def value(self, passes: ForwardPasses) -> Tensor:
        """Sum over layers; see the class."""
        found = weights(passes.classifier)
        if not found:
            raise ValueError("l1 needs a network with convolutions or linear layers; omit it")
        return torch.stack([weight.abs().sum() for weight in found]).sum()


class StabilityGain(Penalty):
    """Squared L2 gain of every DLIF layer over its T steps, summed. DLIF 层 L2 增益的惩罚项。

    Equation: ``value = sum over layers of ||L_decay diag(p)||_2^2``; see
    :func:`sj_robust.proofs.gains.gain_penalty`. It needs no forward pass and only changes the
    input gains.

    Args:
        weight: Weight in the objective.
        normalized: Whether each gain is divided by the mean of ``|p|``, so that only the shape of p
            matters.

    Raises:
        ValueError: If the weight is out of range; when evaluated, if the network has no DLIF
            neuron.

    Source: derived here, from Theorem 3.1 of Ding et al. (ICML 2024) with the exact constant
        instead of the printed one.

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
        _, logits = passes.first
        penalty = gain_penalty(passes.classifier.net, normalized=self.normalized)
        return penalty.to(logits)


def _pair_probability(logits: Tensor, y: Tensor, wrong: Tensor) -> Tensor:
    """Probability of the class y [N] against one other class per sample."""
    both = torch.stack((y, wrong), 1)
    right_logit, wrong_logit = logits.gather(1, both).unbind(1)
    return (right_logit - wrong_logit).sigmoid()
