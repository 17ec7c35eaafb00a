"""Penalties that need no neurons of their own, and what is done to weights after the optimizer's
step: SNN-RAT's retraction and projections.
"""

import torch
from torch import Tensor, nn

from sj_robust.attacks.logits import without
from sj_robust.core.weights import weights
from sj_robust.defences.node import Bounded
from sj_robust.defences.penalty import ForwardPasses, Penalty, check_weight
from sj_robust.proofs.gains import gain_penalty

__all__ = [
    "GradientSparsity",
    "StabilityGain",
    "WeightMagnitude",
    "project_parameters_",
    "project_to_simplex_",
    "retract_",
]


_SAMPLED_ROWS = 200
_SAMPLED_SHARE = 0.3


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


@torch.no_grad()
def retract_(net: nn.Module, beta: float, generator: torch.Generator | None = None) -> None:
    """Move every convolution and linear layer towards orthonormal rows, in place.
    SNN-RAT 的正交回缩。

    Equation, for the weight W as a matrix [out, everything else]::

        W <- (1 + beta) * W - beta * W W^T W

    one gradient step of length beta on ``||W W^T - I||^2 / 4``: a singular value s becomes ``s +
    beta * (s - s^3)``, closer to 1 as long as ``0 < beta * s * (s + 1) < 2``. In a linear layer
    with 200 rows or more, only a random 30 % of the rows (rounded down) are changed, as a matrix of
    their own. Afterwards every parameter that a module calls ``mixing`` (the coefficients of a wide
    ResNet's two branches) is replaced by the nearest non-negative one that sums to 1.

    Frozen parameters (without ``requires_grad``) stay as they are.

    Call it after every step of the optimizer, with weight decay 0. Layers are taken in the order of
    ``net.modules()`` and rows are drawn on the CPU, so generators in the same state give the same
    rows on every process and device.

    Args:
        net: The network, not wrapped in DDP; convolutions of any dimension, grouped ones included.
        beta: Length of the step, >= 0; the paper uses 1e-3 for VGG-11 and 4e-3 for WRN-16.
        generator: CPU generator that chooses the rows; None uses fresh randomness and leaves the
            global generators untouched.

    Raises:
        ValueError: If ``beta`` is out of range.

    Source: Ding et al., "SNN-RAT: Robustness-enhanced Spiking Neural Network through Regularized
        Adversarial Training" (NeurIPS 2022) and its code (which rows, and in this order), after
        Cisse et al., "Parseval Networks" (ICML 2017).

    Examples:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        >>> retract_(layer, beta=0.1)
        >>> layer.weight.data
        tensor([[1.0000, 0.0000],
                [0.0000, 1.4000]])
    """
    if not 0.0 <= beta < float("inf"):
        raise ValueError(f"beta must be >= 0 and finite, got {beta}; SNN-RAT uses 1e-3 to 4e-3")
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    for module in net.modules():
        own = dict(module.named_parameters(recurse=False))
        if "mixing" in own and own["mixing"].requires_grad:
            project_to_simplex_(own["mixing"])
        if "weight" not in own or not isinstance(
            module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
        ):
            continue
        weight = own["weight"]
        matrix = weight.data.flatten(1)
        if isinstance(module, nn.Linear) and len(matrix) >= _SAMPLED_ROWS:
            chosen = torch.randperm(len(matrix), generator=generator)
            rows = chosen[: int(_SAMPLED_SHARE * len(matrix))].to(matrix.device)
            if weight.requires_grad:
                weight.data[rows] = _retracted(matrix[rows], beta)
        elif weight.requires_grad:
            weight.data.copy_(_retracted(matrix, beta).view_as(weight))


def project_parameters_(net: nn.Module) -> None:
    """Put the parameters of every :class:`sj_robust.defences.node.Bounded` module back into their
    range: the projection of projected gradient descent. 投影回参数的允许范围。

    A clamp in the forward pass alone would not do: a parameter that a step carried out of the range
    has no gradient to return with.

    Args:
        net: The network, after a step of the optimizer.

    Examples:
        >>> from sj_robust.defences import StochasticGate
        >>> gate = StochasticGate()
        >>> _ = gate(torch.ones(1, 1, 2))
        >>> _ = gate.rate.data.fill_(1.5)
        >>> project_parameters_(gate)
        >>> gate.rate
        Parameter containing:
        tensor([0.9990, 0.9990], requires_grad=True)
    """
    for module in net.modules():
        if isinstance(module, Bounded):
            module.project_()


@torch.no_grad()
def project_to_simplex_(coefficients: Tensor) -> None:
    """Replace coefficients by the nearest non-negative ones that sum to 1. 投影到概率单纯形。

    Equation: ``c <- max(c - tau, 0)`` with the tau for which the result sums to 1; with u = c
    sorted downwards, ``tau = (u_1 + ... + u_k - 1) / k`` for the largest k that has ``u_k > tau``.

    Args:
        coefficients: A vector [K], K >= 1, changed in place.

    Raises:
        ValueError: If it is not a vector of at least one element.

    Source: Held, Wolfe and Crowder, "Validation of subgradient optimization" (1974); Duchi et al.
        (ICML 2008); the convex combination of SNN-RAT's code.

    Examples:
        >>> c = torch.tensor([0.9, 0.5])
        >>> project_to_simplex_(c)
        >>> c
        tensor([0.7000, 0.3000])
    """
    if coefficients.ndim != 1 or coefficients.numel() == 0:
        raise ValueError(
            f"coefficients must be a vector [K] with K >= 1, got shape {tuple(coefficients.shape)}"
        )
    descending = coefficients.detach().sort(descending=True).values
    counts = torch.arange(1, len(descending) + 1, device=descending.device)
    shifts = (descending.cumsum(0) - 1) / counts
    tau = shifts[int((descending > shifts).sum()) - 1]
    coefficients.sub_(tau).clamp_(min=0)


def _retracted(matrix: Tensor, beta: float) -> Tensor:
    """The step for a matrix [rows, columns]."""
    return (1 + beta) * matrix - beta * (matrix @ matrix.T) @ matrix
