"""Multi-step gradient ascent on the samples that are not fooled yet, with the state of each sample
in tensors.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sj_robust.attacks.call import Best, Objective, lowest_loss
from sj_robust.core.randomness import Private
from sj_robust.core.threat import ThreatModel, per_sample, random_point


class Ascent:
    """Where a run of ``steps`` steps is, per sample; a subclass says how it moves.

    Every attribute that is a tensor has one entry per sample along its first dimension, so that a
    sample that has been fooled can leave.
    """

    def __init__(
        self, rows: Tensor, x: Tensor, start: Tensor, *, ball: ThreatModel, steps: int
    ) -> None:
        self.ball = ball
        self.norm = ball.norm
        self.steps = steps
        self.checkpoints = checkpoints(steps)
        self.rows = rows
        self.x = x
        self.project = ball.projection(x)
        self.x_adv = start
        self.grad = torch.zeros_like(x)
        self.loss = lowest_loss(x)
        self.top_x = self.x_adv
        self.top_grad = self.grad
        self.top_loss = self.loss
        self.begin()

    def begin(self) -> None:
        """Set what only this kind of run keeps."""

    def move(self, step: int) -> None:
        """Set ``x_adv`` to the image of step ``step``, counted from 1."""
        raise NotImplementedError

    def arrive(self, step: int) -> None:
        """Record loss and gradient at the image of step ``step``."""

    def climb(
        self, objective: Callable[[Tensor], Objective], y: Tensor, best: Best, *, keep_best: bool
    ) -> None:
        """Take the steps and pass the results to ``best``.

        With ``keep_best`` a sample leaves as soon as an image fools the model; without it all
        samples take all steps and their image of highest loss is handed over, whether or not it
        fools. ``objective`` gives that of some rows.
        """
        for step in range(self.steps + 1):
            if step > 0:
                self.move(step)
            goal = objective(self.rows)
            labels = y[self.rows]
            if step < self.steps:
                grad, score = goal.gradient(self.x_adv, labels)
            else:  # the last image needs no gradient
                grad = self.grad
                score = goal.score(self.x_adv, labels)
            self.see(step, score.loss, grad)
            if keep_best and len(found := score.fooled.nonzero().squeeze(1)):
                best.offer(
                    self.rows[found], self.x_adv[found], score.loss[found], score.fooled[found]
                )
                self._keep((~score.fooled).nonzero().squeeze(1))
                if len(self.rows) == 0:
                    return
        none_fooled = torch.zeros_like(self.rows, dtype=torch.bool)
        best.offer(self.rows, self.top_x, self.top_loss, none_fooled)

    def see(
        self,
        step: int,
        loss: Tensor,
        grad: Tensor,
    ) -> None:
        """Loss and gradient at ``x_adv``, [N] and [N, ...]."""
        self.loss = loss.double()
        self.grad = grad
        higher = self.loss > self.top_loss
        higher_image = per_sample(higher, self.x)
        self.top_loss = torch.where(higher, self.loss, self.top_loss)
        self.top_x = torch.where(higher_image, self.x_adv, self.top_x)
        self.top_grad = torch.where(higher_image, grad, self.top_grad)
        self.arrive(step)

    def _keep(self, standing: Tensor) -> None:
        """Continue with only some samples, given by their indices."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[standing])
        self.project = self.ball.projection(self.x)


def ascend(
    kind: type[Ascent],
    objective: Callable[[Tensor], Objective],
    x: Tensor,
    y: Tensor,
    best: Best,
    *,
    ball: ThreatModel,
    steps: int,
    restarts: int,
    keep_best: bool,
    private: Private,
) -> None:
    """A run for every restart, from points on the border, of the samples that ``best`` has left
    standing by then; see :meth:`Ascent.climb`.
    """
    for _ in range(restarts):
        # Drawn for all samples, so that the start of one does not depend on how many others are
        # left.
        start = random_point(x, ball, private, on_border=True)
        rows = best.standing()
        if len(rows) == 0:
            return
        run = kind(rows, x[rows], start[rows], ball=ball, steps=steps)
        run.climb(objective, y, best, keep_best=keep_best)


def checkpoints(steps: int) -> list[int]:
    """Numbers of the steps after which a run looks back and may halve its step size.

    Equation: ``ceil(p_j * steps)`` with ``p_1 = 22 %`` and intervals that shrink by 3 % each, down
    to 6 %.

    Source: Croce and Hein (ICML 2020), section 3.2 and 3.4.
    """
    numbers = set()
    interval = 22
    reached = interval
    while reached <= 100:
        numbers.add(-(-reached * steps // 100))
        interval = max(interval - 3, 6)
        reached += interval
    return sorted(numbers)
