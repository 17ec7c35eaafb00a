"""SA-PGD: gradient ascent with normalised moments and a falling bound on every element's step."""

import torch
from torch import Tensor

from sj_robust.attacks._walk import Walk, border_point, checkpoints, climb
from sj_robust.attacks.call import Best, Loss, Model, Objective, checked_copies, crafting
from sj_robust.attacks.checks import check_count, check_size
from sj_robust.attacks.projection import per_sample
from sj_robust.randomness import SampleSeeds

__all__ = ["sapgd"]

_FIRST_DECAY = 0.5
_SECOND_DECAY = 0.8


def sapgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    steps: int = 100,
    restarts: int = 1,
    eot_samples: int = 1,
    loss: Loss | None = None,
    keep_best: bool = True,
    generator: torch.Generator | SampleSeeds | None = None,
) -> Tensor:
    """Stable adaptive PGD in the Linf ball, made for the noisy gradients of spiking networks.

    为脉冲神经网络设计的自适应投影梯度攻击（SA-PGD）。

    Equation: with the gradient g at ``x[k]``, means over a sample's elements and everything else per element,
    ``m <- 0.5 m + g / mean|g|``, ``v <- 0.8 v + g^2 / mean(g^2)`` and
    ``x[k+1] = P(x[k] + clip(eta m / (sqrt(v) + 1e-12), -eta, eta))``; m and v begin at 0, a gradient of 0 adds
    nothing. ``x[0] = x + eps u / max|u|`` with u uniform in [-1, 1]; ``eta = eps`` at first, halved after 22 % of
    the steps and then at intervals shorter by 3 % each, down to 6 %.

    With ``keep_best`` a sample leaves as soon as any image fools the model, ``x`` itself included, and further
    restarts attack only what still stands: misclassified images come back as they are. Where nothing fools, the
    result is the image of highest loss. A stochastic model is judged on the ``eot_samples`` it was averaged over:
    score the result with several fresh draws.

    Args:
        model: Images [N, ...] in [0, 1] to logits [N, classes].
        x: Images, floating point.
        y: Labels [N] int64.
        eps: Linf radius in units of [0, 1] images; never exceeded, see ``linf_bounds``.
        steps: Number of steps of a run, >= 1.
        restarts: Number of runs from different random starts, >= 1.
        eot_samples: Forwards averaged per step (expectation over transformation), for stochastic models.
        loss: Logits and labels to one value per sample, [N]; cross entropy by default.
        keep_best: False takes all steps on all samples and returns the image of highest loss.
        generator: Seeds all randomness of the call, per sample if it is ``SampleSeeds``; None draws fresh numbers,
            global generators untouched.

    Returns:
        Adversarial images in shape, dtype and device of ``x``.

    Raises:
        TypeError: If an argument has the wrong type or ``x`` is not floating point.
        ValueError: If ``x`` is not finite or leaves [0, 1], labels or logits do not fit, or a number is out of range.
        RuntimeError: If no gradient reaches the images.

    Source: SA-PGD, arXiv 2512.22522; its checkpoints are those of Croce and Hein (ICML 2020).

    Examples:
        >>> weight = torch.tensor([[0.0, 0.0], [3.0, -4.0]])
        >>> x, y = torch.tensor([[0.75, 0.5]]), torch.tensor([1])  # margin 0.25, lost at a distance of 0.25 / 7
        >>> x_adv = sapgd(lambda x: x @ weight.T, x, y, eps=0.04, steps=10)
        >>> (x_adv @ weight.T).argmax(1)
        tensor([0])
    """
    eps = check_size("eps", eps, at_most=1.0)
    for name, count in (("steps", steps), ("restarts", restarts), ("eot_samples", eot_samples)):
        check_count(name, count)
    x, y = checked_copies(model, x, y, generator)
    if x.numel() == 0:
        return x
    objective = Objective(model, loss, eot_samples=eot_samples)
    with crafting(model, x.device, generator) as private:
        best = Best(x)
        if keep_best:
            best.fooled = objective.score(x, y).fooled
        for _ in range(restarts):
            # Drawn for all samples, so that the start of one does not depend on how many others are left.
            start = border_point(x, eps, "Linf", private)
            rows = best.standing()
            if len(rows) == 0:
                break
            walk = _MomentWalk(rows, x[rows], start[rows], eps=eps, steps=steps)
            climb(walk, lambda rows: objective, y, best, steps=steps, keep_best=keep_best)
    return best.x_adv


class _MomentWalk(Walk):
    """A run of SA-PGD; one bound on the step for all samples."""

    def __init__(self, rows: Tensor, x: Tensor, start: Tensor, *, eps: float, steps: int) -> None:
        super().__init__(rows, x, start, eps=eps, norm="Linf")
        self.checkpoints = checkpoints(steps)
        self.eta = eps
        self.first = torch.zeros_like(x, dtype=torch.float64)
        self.second = torch.zeros_like(x, dtype=torch.float64)

    def move(self, step: int) -> None:
        """One step of normalised moments, no element further than eta."""
        relative = _over_mean(self.grad.double().abs(), self.grad.double())
        self.first = _FIRST_DECAY * self.first + relative
        self.second = _SECOND_DECAY * self.second + _over_mean(relative.square(), relative.square())
        way = self.eta * self.first / (self.second.sqrt() + 1e-12)
        self.x_adv = self.project(self.x_adv + way.clamp(-self.eta, self.eta).to(self.x.dtype))

    def arrive(self, step: int) -> None:
        """Halve the bound at the checkpoints."""
        if step in self.checkpoints:
            self.eta /= 2


def _over_mean(weights: Tensor, values: Tensor) -> Tensor:
    """Values divided by a sample's mean weight; 0 where that is 0."""
    mean = per_sample(weights.flatten(1).mean(1), weights)
    return torch.where(mean > 0, values / torch.where(mean > 0, mean, 1.0), 0.0)
