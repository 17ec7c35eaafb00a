"""A run of many steps on the samples that still stand, with the state of each of them in tensors."""

from collections.abc import Callable

import torch
from torch import Tensor

from sj_robust.attacks.call import Best, Objective
from sj_robust.attacks.projection import Norm, l2_norm, linf_bounds, per_sample, project_l2
from sj_robust.randomness import Private, rand, randn


class Walk:
    """Where a run is, per sample; a subclass says how it moves.

    Every attribute that is a tensor has one entry per sample along its first dimension, so that a sample that has
    been fooled can leave.
    """

    def __init__(self, rows: Tensor, x: Tensor, start: Tensor, *, eps: float, norm: Norm) -> None:
        self.eps = eps
        self.norm = norm
        self.rows = rows
        self.x = x
        self.lower, self.upper = linf_bounds(x, eps=eps) if norm == "Linf" else (x, x)
        self.x_adv = start
        self.grad = torch.zeros_like(x)
        self.loss = torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device)
        self.top_x, self.top_grad, self.top_loss = self.x_adv, self.grad, self.loss

    def move(self, step: int) -> None:
        """Set ``x_adv`` to the image of step number ``step``, from 1 on."""
        raise NotImplementedError

    def arrive(self, step: int) -> None:
        """Take note of loss and gradient at the image of step number ``step``."""

    def project(self, x_adv: Tensor) -> Tensor:
        """Nearest image within the budget."""
        if self.norm == "Linf":
            return x_adv.clamp(self.lower, self.upper)
        return project_l2(x_adv, self.x, eps=self.eps)

    def see(self, step: int, loss: Tensor, grad: Tensor) -> None:
        """Loss and gradient at ``x_adv``, [N] and [N, ...]."""
        self.loss, self.grad = loss.double(), grad
        higher = self.loss > self.top_loss
        self.top_loss = torch.where(higher, self.loss, self.top_loss)
        self.top_x = torch.where(per_sample(higher, self.x), self.x_adv, self.top_x)
        self.top_grad = torch.where(per_sample(higher, self.x), grad, self.top_grad)
        self.arrive(step)

    def keep(self, mask: Tensor) -> None:
        """Go on with the samples of the mask alone."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[mask])


def climb(
    walk: Walk, objective: Callable[[Tensor], Objective], y: Tensor, best: Best, *, steps: int, keep_best: bool
) -> None:
    """Take ``steps`` steps and hand what they found to ``best``.

    With ``keep_best`` a sample leaves as soon as an image fools the model; without it all samples take all steps and
    their image of highest loss is handed over, whether or not it fools. ``objective`` gives that of some rows.
    """
    for step in range(steps + 1):
        if step > 0:
            walk.move(step)
        goal, labels = objective(walk.rows), y[walk.rows]
        if step < steps:
            grad, score = goal.gradient(walk.x_adv, labels)
        else:  # the last image needs no gradient
            grad, score = walk.grad, goal.score(walk.x_adv, labels)
        walk.see(step, score.loss, grad)
        if keep_best and bool(score.fooled.any()):
            found = score.fooled
            best.offer(walk.rows[found], walk.x_adv[found], score.loss[found], score.fooled[found])
            walk.keep(~found)
            if len(walk.rows) == 0:
                return
    best.offer(walk.rows, walk.top_x, walk.top_loss, torch.zeros_like(walk.top_loss, dtype=torch.bool))


def border_point(x: Tensor, eps: float, norm: Norm, private: Private) -> Tensor:
    """Random point on the border of the ball around ``x``, then clamped to [0, 1]."""
    if norm == "L2":
        normal = randn(x.shape, private, dtype=torch.float64, device=x.device)
        return project_l2(x + normal * per_sample(eps / l2_norm(normal), x), x, eps=eps)
    uniform = 2 * rand(x.shape, private, dtype=x.dtype, device=x.device) - 1
    largest = per_sample(uniform.abs().flatten(1).amax(1), x)
    return (x + eps * uniform / torch.where(largest > 0, largest, 1.0)).clamp(*linf_bounds(x, eps=eps))


def checkpoints(steps: int) -> list[int]:
    """Numbers of the steps after which a run looks back and may halve its step size.

    Equation: ``ceil(p_j * steps)`` with p_1 = 22 % and intervals that shrink by 3 % each, down to 6 %.

    Source: Croce and Hein (ICML 2020), section 3.2 and 3.4.
    """
    reached, interval, numbers = 0, 22, []
    while reached + interval <= 100:
        reached, interval = reached + interval, max(interval - 3, 6)
        numbers.append(-(-reached * steps // 100))
    return sorted(set(numbers))
