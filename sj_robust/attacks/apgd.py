"""Auto-PGD: projected gradient ascent that adapts its step size."""

from collections.abc import Sequence
from functools import partial
from typing import Literal, get_args

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
    direction,
)
from sj_robust.attacks.logits import likeliest_wrong, of_class, without
from sj_robust.core.checks import check_counts
from sj_robust.core.threat import Threat, as_threat, per_sample

__all__ = ["apgd"]

LossName = Literal["ce", "dlr", "dlr_targeted"]

_MOMENTUM = 0.75
"""Weight of the new step; the last move has the rest. alpha of the paper."""
_RISES = 0.75
"""Share of the steps between two checkpoints that must have raised the loss. rho of the paper."""
LEAST_CLASSES = {"ce": 1, "dlr": 3, "dlr_targeted": 4}
"""Classes that the denominators of the losses need."""


def apgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: Threat,
    loss: LossName | Loss = "ce",
    steps: int = 100,
    restarts: int = 1,
    target_classes: int = 9,
    eot_samples: int = 1,
    keep_best: bool = True,
    generator: Randomness = None,
) -> Tensor:
    """Auto-PGD: gradient ascent with momentum whose step size halves when progress stalls.

    自适应步长的投影梯度攻击（APGD）。

    Equation, with P and d as in ``pgd``::

        z = P(x[k] + eta * d(g))
        x[k + 1] = P(x[k] + 0.75 * (z - x[k]) + 0.25 * (x[k] - x[k - 1]))

    ``eta`` is ``2 * eps`` at first, and ``x[0]`` is random on the border of the ball. Checkpoints
    come after 22 % of the steps, then at intervals that shrink by 3 % each, down to 6 %. At a
    checkpoint, a sample halves its eta and returns to its image of highest loss in two cases: if
    fewer than 75 % of the steps since the last checkpoint raised the loss, or if eta was not halved
    at the last checkpoint and the highest loss has not grown since. Losses, with the logits z, and
    z_1, z_2, ... their values in descending order:

    - ``"ce"``: cross entropy.
    - ``"dlr"``: ``-(z_y - max_{i != y} z_i) / (z_1 - z_3)``, which does not depend on the scale of
      the logits.
    - ``"dlr_targeted"``: ``-(z_y - z_t) / (z_1 - (z_3 + z_4) / 2)`` for each class t of the
      ``target_classes`` most likely wrong classes at ``x``, one after the other, each with all
      restarts.

    With ``keep_best``, the result of a sample is the first image that fools the model: ``x`` if it
    is misclassified, otherwise an iterate, after which the sample is skipped in all further steps,
    restarts and targets. If nothing fools the model, it is the image of highest loss.

    The authors' code also keeps any iterate that fools the model, so robust accuracies agree within
    the noise of the random starts; it does not skip samples, so this implementation is faster. The
    steps at which progress is checked, and the strict "fewer", follow the paper; both matter only
    if there are few steps.

    Other arguments, result and errors are those of :mod:`sj_robust.attacks`.

    Args:
        loss: One of the names above, or a function of logits and labels that returns one value per
            sample, [N].
        target_classes: Number of target classes of ``"dlr_targeted"``; if there are fewer wrong
            classes, all of them.
        keep_best: False runs all steps on all samples and returns the image of highest loss, as is
            best for transfer attacks.

    Raises:
        ValueError: Also if there are fewer than 3 classes for ``"dlr"`` or 4 for
            ``"dlr_targeted"``.

    Source: Croce and Hein (ICML 2020), algorithm 1 and sections 3 and 4; random starts and targets
        of AutoAttack.

    Examples:
        >>> weight = torch.tensor([[0.0, 0.0], [3.0, -4.0]])
        >>> x, y = (
        ...     torch.tensor([[0.75, 0.5]]),
        ...     torch.tensor([1]),
        ... )  # margin 0.25, lost at a distance of 0.25 / 7
        >>> x_adv = apgd(lambda x: x @ weight.T, x, y, eps=0.04, steps=10)
        >>> (x_adv @ weight.T).argmax(1)
        tensor([0])
    """
    ball = as_threat(eps, "Linf", "L2")
    check_counts(
        steps=steps, restarts=restarts, target_classes=target_classes, eot_samples=eot_samples
    )
    named_loss = _checked_loss(loss)
    x, y = checked_copies(model, x, y, generator)
    if x.numel() == 0:
        return x
    with crafting(model, x.device, generator) as private:
        best = Best(x)
        targets: Sequence[Tensor | None] = [None]  # one pass without a target class
        if keep_best or loss == "dlr_targeted":
            clean = Objective(model, eot_samples=eot_samples).score(x, y)
            if not callable(loss):
                _check_classes(clean.logits, loss)
            if keep_best:
                best.fooled = clean.fooled  # no run attacks these: they stay as they are
            if loss == "dlr_targeted":
                wrong_classes = clean.logits.shape[1] - 1
                count = min(target_classes, wrong_classes)
                targets = likeliest_wrong(clean.logits, y, count)
        for target in targets:
            objective = partial(_objective, model, named_loss, target, eot_samples)
            ascend(
                _AutoAscent,
                objective,
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


def dlr_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio, [N]: positive if misclassified, at least -1, the same for every
    scale of the logits.

    Equation: ``-(z_y - max_{i != y} z_i) / (z_1 - z_3)``; the divisor is 1 if the three largest
    logits are equal.

    Source: Croce and Hein (ICML 2020), equation 6.
    """
    _check_classes(logits, "dlr")
    top = logits.topk(3).values
    wrong = without(logits, y).max(1).values
    lead = wrong - of_class(logits, y)
    return lead / _divisor(top[:, 0] - top[:, 2])


def targeted_dlr_loss(logits: Tensor, y: Tensor, *, target: Tensor) -> Tensor:
    """Difference of logits ratio towards the classes ``target``, [N].

    Equation: ``-(z_y - z_t) / (z_1 - (z_3 + z_4) / 2)``; the divisor is 1 if the four largest
    logits are equal.

    Source: Croce and Hein (ICML 2020), equation 7.
    """
    top = logits.topk(4).values
    middle = (top[:, 2] + top[:, 3]) / 2
    lead = of_class(logits, target) - of_class(logits, y)
    return lead / _divisor(top[:, 0] - middle)


class _AutoAscent(Ascent):
    """A run of Auto-PGD; a sample's step size follows from its own losses.

    Attributes:
        step_size: eta of every sample.
        previous: Images before the last step.
        loss_before: Their losses.
        rises: Number of steps since the last checkpoint that raised the loss.
        last_checkpoint: Number of the step of the last checkpoint.
        top_at_checkpoint: Highest loss so far at the last checkpoint.
        halved: Whether the step size was halved at the last checkpoint.
    """

    def begin(self) -> None:
        """At the first image with the largest step."""
        self.step_size = torch.full_like(self.loss, 2 * self.ball.eps)
        self.previous = self.x_adv
        self.loss_before = self.loss
        self.rises = torch.zeros_like(self.loss)
        self.last_checkpoint = 0
        self.top_at_checkpoint = self.loss
        self.halved = torch.zeros_like(self.loss, dtype=torch.bool)

    def move(self, step: int) -> None:
        """One step with momentum; the first has none."""
        here = self.x_adv
        eta = per_sample(self.step_size, here).to(here.dtype)
        there = self.project(here + eta * direction(self.grad, self.norm))
        if step > 1:
            new_step = _MOMENTUM * (there - here)
            last_move = (1 - _MOMENTUM) * (here - self.previous)
            there = self.project(here + new_step + last_move)
        self.previous = here
        self.loss_before = self.loss
        self.x_adv = there

    def arrive(self, step: int) -> None:
        """Count the steps that raised the loss, and look at the progress at a checkpoint."""
        if step == 0:
            self.top_at_checkpoint = self.top_loss
            return
        self.rises = self.rises + (self.loss > self.loss_before)
        if step in self.checkpoints:
            few_rises = self.rises < _RISES * (step - self.last_checkpoint)
            stalled = ~self.halved & (self.top_loss <= self.top_at_checkpoint)
            self._halve(few_rises | stalled)
            self.last_checkpoint = step
            self.top_at_checkpoint = self.top_loss
            self.rises = torch.zeros_like(self.rises)

    def _halve(self, samples: Tensor) -> None:
        """Halve the step size of the samples of a mask [N], and take them back to their image of
        highest loss.
        """
        self.halved = samples
        self.step_size = torch.where(samples, self.step_size / 2, self.step_size)
        self.loss = torch.where(samples, self.top_loss, self.loss)
        images = per_sample(samples, self.x)
        self.x_adv = torch.where(images, self.top_x, self.x_adv)
        self.grad = torch.where(images, self.top_grad, self.grad)


def _checked_loss(loss: LossName | Loss) -> Loss | None:
    """The loss of the name; None is the cross entropy of the objective."""
    if callable(loss):
        return loss
    if loss not in get_args(LossName):
        raise ValueError(
            f"loss must be one of {get_args(LossName)} or a function of logits and labels with "
            f"one value per sample, got {loss!r}"
        )
    return dlr_loss if loss == "dlr" else None


def _objective(
    model: Model, loss: Loss | None, target: Tensor | None, eot_samples: int, rows: Tensor
) -> Objective:
    """Objective of the samples ``rows``; ``target`` holds the classes of all samples."""
    if target is not None:
        loss = partial(targeted_dlr_loss, target=target[rows])
    return Objective(model, loss, eot_samples=eot_samples)


def _check_classes(logits: Tensor, loss: LossName) -> None:
    least = LEAST_CLASSES[loss]
    if logits.shape[1] < least:
        raise ValueError(
            f"loss={loss!r} needs at least {least} classes, the model returns {logits.shape[1]}; "
            "use loss='ce'"
        )


def _divisor(spread: Tensor) -> Tensor:
    """The spread of the logits [N], or 1 where they are equal, so that nothing is divided by 0."""
    return torch.where(spread > 0, spread, torch.ones_like(spread))
