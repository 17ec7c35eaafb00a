"""Gradient attacks: one step (FGSM, R-FGSM) and many (PGD)."""

import torch
from torch import Tensor

from sj_robust.attacks.call import (
    Best,
    Loss,
    Model,
    Objective,
    Randomness,
    checked_copies,
    crafting,
    direction,
)
from sj_robust.core.checks import check_counts, check_size
from sj_robust.core.randomness import randn
from sj_robust.core.threat import Threat, ThreatModel, as_threat, random_point

__all__ = ["fgsm", "pgd", "rfgsm"]


def fgsm(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: Threat,
    targeted: bool = False,
    loss: Loss | None = None,
    generator: Randomness = None,
) -> Tensor:
    """Fast gradient sign method: one step to the border of the Linf ball.

    快速梯度符号攻击。

    Equation: ``x_adv = clamp(x + eps * sign(grad_x loss(model(x), y)), 0, 1)``.

    All arguments, result and errors are those of :mod:`sj_robust.attacks`; FGSM itself uses no
    random numbers.

    Source: Goodfellow et al. (ICLR 2015); evaluation of Ding et al. (ICML 2024), section 5.

    Examples:
        >>> weight = torch.tensor([[0.0, 0.0], [1.0, -2.0]])
        >>> fgsm(lambda x: x @ weight.T, torch.full((1, 2), 0.5), torch.tensor([1]), eps=0.25)
        tensor([[0.2500, 0.7500]])
    """
    return rfgsm(
        model, x, y, eps=eps, noise_std=0.0, targeted=targeted, loss=loss, generator=generator
    )


def rfgsm(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: Threat,
    step_size: float | None = None,
    noise_std: float = 0.001,
    project: bool = True,
    targeted: bool = False,
    loss: Loss | None = None,
    generator: Randomness = None,
) -> Tensor:
    """FGSM from a slightly noisy start, as used in adversarial training.

    带随机起点的快速梯度符号攻击。

    Equation: ``x0 = x + noise_std * n`` with ``n ~ N(0, 1)``, then
    ``x_adv = clamp(x0 + step_size * sign(grad_x0 loss(model(x0), y)), 0, 1)``, projected back onto
    the ball of ``eps``.

    Other arguments, result and errors are those of :mod:`sj_robust.attacks`; the model sees x0,
    which may leave [0, 1] by the noise.

    Args:
        step_size: Length of the step; ``eps`` by default.
        noise_std: Standard deviation of the noise at the start.
        project: Whether to project onto the ball; False does as the published code, whose result
            lies within ``step_size`` of x0 instead.

    Source: Ding et al. (ICML 2024), adversarial training of the published code, eps = step = 4/255.

    Examples:
        >>> x, y = torch.rand(2, 8), torch.tensor([0, 1])
        >>> x_adv = rfgsm(torch.nn.Linear(8, 3), x, y, eps=4 / 255)
        >>> bool((x_adv - x).abs().max() <= 4 / 255)
        True
    """
    ball = as_threat(eps, "Linf")
    step_size = ball.eps if step_size is None else _checked_step(step_size, ball)
    noise_std = check_size("noise_std", noise_std, at_most=1.0)
    if not project:
        ball = ThreatModel("Linf", 1.0)  # holds every image in [0, 1]
    x, y = checked_copies(model, x, y, generator)
    if x.numel() == 0:
        return x
    with crafting(model, x.device, generator) as private:
        start = x
        if noise_std > 0:
            start = x + noise_std * randn(x.shape, private, dtype=x.dtype, device=x.device)
        grad, _ = Objective(model, loss, targeted).gradient(start, y)
        x_adv = start + step_size * grad.sign()
        return ball.project(x, x_adv)


def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: Threat,
    step_size: float | None = None,
    steps: int = 10,
    random_start: bool = True,
    restarts: int = 1,
    eot_samples: int = 1,
    targeted: bool = False,
    keep_best: bool = True,
    stop_early: bool = False,
    loss: Loss | None = None,
    generator: Randomness = None,
) -> Tensor:
    """Projected gradient descent in the Linf or L2 ball.

    投影梯度下降攻击。

    Equation: ``x[k+1] = project(x[k] + step_size * d(grad_x loss(model(x[k]), y)))`` with ``d(g) =
    sign(g)`` for Linf and ``d(g) = g / ||g||`` per sample for L2 (0 where g is 0); ``x[0]`` is
    uniform in the ball, or ``x``.

    With ``keep_best``, the result of a sample is the image of highest loss among those that fool
    the model, or among all if none does. ``x`` itself and all ``x[k]`` are candidates, so an image
    that was misclassified stays misclassified. Further restarts attack only samples without success
    so far.

    Other arguments, result and errors are those of :mod:`sj_robust.attacks`.

    Args:
        step_size: Length of a step in the norm of ``eps``; ``2.5 * eps / steps`` by default.
        random_start: Whether to start from a random point of the ball, clamped to [0, 1].
        keep_best: False returns the last iterate (with several restarts, the best of their last
            iterates), as other libraries usually do, which overstates robustness.
        stop_early: Whether a sample stops as soon as an image fools the model, as in ``apgd``: just
            as many samples succeed, with a lower loss and in less time.

    Raises:
        ValueError: Also for restarts without a random start, or ``stop_early`` without
            ``keep_best``.

    Source: Madry et al. (ICLR 2018); evaluation of Ding et al. (ICML 2024), section 5.

    Examples:
        >>> weight = torch.tensor([[0.0, 0.0], [3.0, -4.0]])
        >>> x, y = torch.full((1, 2), 0.5), torch.tensor([1])
        >>> pgd(
        ...     lambda x: x @ weight.T,
        ...     x,
        ...     y,
        ...     eps=ThreatModel("L2", 0.25),
        ...     step_size=0.1,
        ...     steps=4,
        ...     random_start=False,
        ... )
        tensor([[0.3500, 0.7000]])
    """
    ball = as_threat(eps, "Linf", "L2")
    check_counts(steps=steps, restarts=restarts, eot_samples=eot_samples)
    step_size = 2.5 * ball.eps / steps if step_size is None else _checked_step(step_size, ball)
    if restarts > 1 and not random_start:
        raise ValueError(
            f"restarts > 1 need random_start=True to differ, got restarts={restarts} without it"
        )
    if stop_early and not keep_best:
        raise ValueError(
            "stop_early=True keeps the image that fools, got keep_best=False; omit one of them"
        )
    x, y = checked_copies(model, x, y, generator)
    if x.numel() == 0:
        return x
    objective = Objective(model, loss, targeted, eot_samples)
    with crafting(model, x.device, generator) as private:
        best = Best(x)
        rows = torch.arange(len(x), device=x.device)
        if keep_best and random_start:  # without a random start x is the first iterate
            clean = objective.score(x, y)
            best.offer(rows, x, clean.loss, clean.fooled)
        for restart in range(restarts):
            # The start is drawn for all samples, so that the one of a sample does not depend on how
            # many others are left.
            start = random_point(x, ball, private) if random_start else x
            if restart > 0:
                rows = best.standing()
            if len(rows) == 0:
                break
            project = ball.projection(x[rows])
            x_adv = start[rows]
            for _ in range(steps):
                grad, score = objective.gradient(x_adv, y[rows])
                if keep_best:
                    best.offer(rows, x_adv, score.loss, score.fooled)
                if stop_early and bool(score.fooled.any()):
                    left = (~score.fooled).nonzero().squeeze(1)
                    rows = rows[left]
                    if len(rows) == 0:
                        return best.x_adv
                    x_adv = x_adv[left]
                    grad = grad[left]
                    project = ball.projection(x[rows])
                x_adv = project(x_adv + step_size * direction(grad, ball.norm))
            if not keep_best and restarts == 1:
                return x_adv  # there is nothing to compare it with
            score = objective.score(x_adv, y[rows])
            best.offer(rows, x_adv, score.loss, score.fooled)
    return best.x_adv


def _checked_step(step_size: float, ball: ThreatModel) -> float:
    """The step size, which must be positive in a ball with a radius, where 0 would attack nothing.

    In Linf it is at most the diameter of the ball or 1, so that 2 instead of 2/255 is noticed.
    """
    longest = float("inf")
    if ball.norm == "Linf":
        longest = max(1.0, 2 * ball.eps)
    return check_size("step_size", step_size, positive=ball.eps > 0, at_most=longest)
