"""SA-PGD: gradient ascent with normalised moments and bounded steps."""

import torch
from torch import Tensor

from sj_robust.attacks._ascent import Ascent, ascend
from sj_robust.attacks.call import (
    Best,
    Loss,
    Model,
    Objective,
    Randomness,
    checked_copies,
    crafting,
)
from sj_robust.core.checks import check_counts
from sj_robust.core.threat import Threat, as_threat, per_sample

__all__ = ["sapgd"]

_FIRST_DECAY = 0.5
_SECOND_DECAY = 0.8


def sapgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: Threat,
    steps: int = 100,
    restarts: int = 1,
    eot_samples: int = 1,
    loss: Loss | None = None,
    keep_best: bool = True,
    generator: Randomness = None,
) -> Tensor:
    """Stable adaptive PGD in the Linf ball, designed for the noisy gradients of spiking networks.

    为脉冲神经网络设计的自适应投影梯度攻击（SA-PGD）。

    Equation, with g the gradient at ``x[k]``::

        m <- 0.5 m + g / mean|g|
        v <- 0.8 v + g^2 / mean(g^2)
        x[k+1] = P(x[k] + clip(eta m / (sqrt(v) + 1e-12), -eta, eta))

    The means are over the elements of a sample, everything else is per element; m and v start at 0,
    and a gradient that is 0 everywhere adds nothing. ``x[0] = x + eps u / max|u|`` with u uniform
    in [-1, 1]. ``eta`` is ``eps`` at first; it is halved after 22 % of the steps, and then at
    intervals that shrink by 3 % each, down to 6 %.

    With ``keep_best``, a sample stops as soon as it fools the model, as in :func:`apgd`;
    misclassified images are returned unchanged.

    Other arguments, result and errors are those of :mod:`sj_robust.attacks`.

    Args:
        keep_best: False runs all steps on all samples and returns the image of highest loss.

    Source: SA-PGD, arXiv 2512.22522; its checkpoints are those of Croce and Hein (ICML 2020).

    Examples:
        >>> weight = torch.tensor([[0.0, 0.0], [3.0, -4.0]])
        >>> x, y = (
        ...     torch.tensor([[0.75, 0.5]]),
        ...     torch.tensor([1]),
        ... )  # margin 0.25, lost at a distance of 0.25 / 7
        >>> x_adv = sapgd(lambda x: x @ weight.T, x, y, eps=0.04, steps=10)
        >>> (x_adv @ weight.T).argmax(1)
        tensor([0])
    """
    ball = as_threat(eps, "Linf")
    check_counts(steps=steps, restarts=restarts, eot_samples=eot_samples)
    x, y = checked_copies(model, x, y, generator)
    if x.numel() == 0:
        return x
    objective = Objective(model, loss, eot_samples=eot_samples)
    with crafting(model, x.device, generator) as private:
        best = Best(x)
        if keep_best:
            best.fooled = objective.score(x, y).fooled
        ascend(
            _MomentAscent,
            lambda rows: objective,
            x,
            y,
            best,
            ball=ball,
            steps=steps,
            restarts=restarts,
            keep_best=keep_best,
            private=private,
        )
    return best.x_adv


class _MomentAscent(Ascent):
    """A run of SA-PGD.

    Attributes:
        eta: Bound on the step of every element, the same for all samples.
        first: Running sum of the normalised gradients, m.
        second: Running sum of their normalised squares, v.
    """

    def begin(self) -> None:
        """Without moments, with the largest bound."""
        self.eta = self.ball.eps
        self.first = torch.zeros_like(self.x, dtype=torch.float64)
        self.second = torch.zeros_like(self.first)

    def move(self, step: int) -> None:
        """One step along ``first / sqrt(second)``, clipped to ``eta``."""
        grad = self.grad.double()
        relative = grad / _mean_or_one(grad.abs())
        square = relative.square()
        self.first = _FIRST_DECAY * self.first + relative
        self.second = _SECOND_DECAY * self.second + square / _mean_or_one(square)
        way = self.eta * self.first / (self.second.sqrt() + 1e-12)
        clipped = way.clamp(-self.eta, self.eta).to(self.x.dtype)
        self.x_adv = self.project(self.x_adv + clipped)

    def arrive(self, step: int) -> None:
        """Halve the bound at the checkpoints."""
        if step in self.checkpoints:
            self.eta /= 2


def _mean_or_one(sizes: Tensor) -> Tensor:
    """Mean over the elements of a sample, to divide them by; 1 where all of them are 0."""
    mean = per_sample(sizes.flatten(1).mean(1), sizes)
    return torch.where(mean > 0, mean, 1.0)
