"""Worst case per sample over attacks, gradient estimators and seeds, and the sweep that chooses the estimators."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sj_robust.attacks.apgd import apgd
from sj_robust.attacks.call import Model
from sj_robust.attacks.checks import check_count
from sj_robust.attacks.logits import margin
from sj_robust.attacks.projection import Norm
from sj_robust.evaluation.member import (
    Member,
    SampleAttack,
    check_estimator,
    clock,
    craft,
    fools,
    has_detached_reset,
    scored,
)
from sj_robust.randomness import SampleSeeds

__all__ = ["CANDIDATES", "Member", "Outcome", "SweepRow", "WorstCase", "craft", "fools", "sweep", "worst_case"]

CANDIDATES = (
    "training",
    *(f"triangle:{width}" for width in ("0.25", "0.5", "0.75", "1", "1.5", "2")),
    *(f"atan:{alpha}" for alpha in (1, 2, 4, 8)),
    *(f"sigmoid:{alpha}" for alpha in (2, 4, 8)),
    *(f"rectangle:{width}" for width in ("0.5", "1")),
    "bptr",
    "rga",
    "assg",
    "hart:1.2",
)
"""Estimators that :func:`sweep` tries by default: shapes with widths around the threshold, and the adaptive ones but
PDSG, whose gradient of an image depends on the others in the batch."""


@dataclass(frozen=True)
class Outcome:
    """What one member did to the images of a batch. 单项攻击的结果。

    Attributes:
        name: Name of the member.
        group: Its group.
        attacked: Images it was run on, [N] bool.
        fooled: Images of those that the true network gets wrong afterwards, [N] bool.
        seconds: Time it took, scoring included.
    """

    name: str
    group: str
    attacked: Tensor
    fooled: Tensor
    seconds: float


@dataclass(frozen=True)
class WorstCase:
    """Result of :func:`worst_case`. 最坏情况结果。

    Attributes:
        x_adv: Images of the first member that fooled the network; the clean image where none did.
        correct: Images that are classified right without an attack, [N] bool.
        fooled_by: Index of the first member that fooled the network, [N] int64; -1 where none did.
        outcomes: One per member, in their order.
    """

    x_adv: Tensor
    correct: Tensor
    fooled_by: Tensor
    outcomes: tuple[Outcome, ...]

    @property
    def robust_accuracy(self) -> float:
        """Share of all images that are classified right and that no member fooled; NaN without images."""
        return float((self.correct & (self.fooled_by < 0)).double().mean())

    def standing(self, group: str) -> Tensor:
        """Images classified right that no member of one group fooled, [N] bool.

        Raises:
            ValueError: If there is no such group.
        """
        outcomes = [outcome for outcome in self.outcomes if outcome.group == group]
        if not outcomes:
            groups = sorted({outcome.group for outcome in self.outcomes})
            raise ValueError(f"group must be one of {groups}, got {group!r}")
        return self.correct & ~torch.stack([outcome.fooled for outcome in outcomes]).any(0)


def worst_case(
    model: Model, x: Tensor, y: Tensor, members: Sequence[Member], *, seeds: SampleSeeds, draws: int = 1
) -> WorstCase:
    """Run the members one after the other and keep, per sample, the first that fools the network.

    逐样本取多种攻击与梯度估计的最坏情况。

    Equation: ``robust accuracy = mean_n [right on x_n and on a_m(x_n) for every member m]``. A member attacks what is
    classified right and still stands in its group. Every success is scored again by :func:`fools`.

    Args:
        model: Images [N, ...] in [0, 1] to logits [N, classes]; an ``nn.Module`` where a member has an estimator.
        x: Images, floating point.
        y: Labels [N] int64.
        members: What is run, in this order.
        seeds: One seed per sample; the result of a sample then depends on neither its neighbours nor the batch size
            (unless the network itself draws random numbers, or the estimator is ``pdsg``).
        draws: Forwards in every one of which a stochastic network has to be wrong.

    Returns:
        The images, what fooled each sample, and every member's outcome and seconds.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If images, labels or seeds do not fit, names repeat, or an attack leaves its budget.

    Source: per-sample worst case as in AutoAttack (Croce and Hein, ICML 2020), over several gradients as Bu et al.
        (TMLR 2024) ensemble them for spiking networks.

    Examples:
        >>> from functools import partial
        >>> from sj_robust.attacks import fgsm, pgd
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> model.weight = torch.nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> x, y = torch.tensor([[0.6, 0.5], [0.9, 0.1]]), torch.tensor([0, 0])
        >>> members = [Member("fgsm", partial(fgsm, eps=0.1))]
        >>> result = worst_case(model, x, y, members, seeds=SampleSeeds([0, 1]))
        >>> result.fooled_by.tolist(), result.robust_accuracy
        ([0, -1], 0.5)
    """
    if len({member.name for member in members}) < len(members):
        raise ValueError(f"names of members must differ, got {[member.name for member in members]}; add the restart")
    correct = ~fools(model, x, y, draws=draws, seeds=seeds)
    standing = {member.group: correct.clone() for member in members}
    x_adv, fooled_by = x.detach().clone(), torch.full_like(y, -1)
    outcomes = []
    for index, member in enumerate(members):
        start = clock(x.device)
        attacked = correct if member.group == "" else standing[member.group].clone()
        fooled = torch.zeros_like(attacked)
        rows = attacked.nonzero().flatten()
        if len(rows):
            own = seeds.rows(rows)
            images = craft(model, x[rows], y[rows], member, seeds=own)
            hit = fools(model, images, y[rows], draws=draws, seeds=own.derived("score", member.name))
            fooled[rows] = hit
            first = hit & (fooled_by[rows] < 0)
            x_adv[rows[first]] = images[first]
            fooled_by[rows[first]] = index
            standing[member.group] &= ~fooled
        outcomes.append(Outcome(member.name, member.group, attacked, fooled, clock(x.device) - start))
    return WorstCase(x_adv, correct, fooled_by, tuple(outcomes))


@dataclass(frozen=True)
class SweepRow:
    """How strong a short attack is with one estimator. 单个梯度估计的试探结果。

    Attributes:
        estimator: Name of the estimator.
        robust_accuracy: Share of the swept images, all classified right before, that stand.
        margin: Margin (logit of the label minus the largest other one, 0 where fooled) that is left, as a share of
            the margin on the clean images.
        seconds: Time of the attack.
        chosen: Whether it is one of the estimators to go on with.
        note: Why it could not be tried; its figures are then those of no attack.
    """

    estimator: str
    robust_accuracy: float
    margin: float
    seconds: float
    chosen: bool = False
    note: str = ""


def sweep(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: Norm = "Linf",
    candidates: Sequence[str] = CANDIDATES,
    steps: int = 20,
    count: int = 3,
    images: int = 48,
    attack: SampleAttack | None = None,
    draws: int = 1,
    seeds: SampleSeeds,
) -> tuple[SweepRow, ...]:
    """Try a short attack with every estimator on a few images, and choose those that fool most together.

    在少量图像上比较各梯度估计并选出最优组合。

    Equation: with ``m_e(n) >= 0`` the margin that estimator e leaves on image n, in units of the mean clean margin, and
    ``c_e(n) = [n stands] + m_e(n)``, estimators are chosen one by one to minimise ``mean_n min_{chosen e} c_e(n)``.

    All candidates start from the same random points. In a second stage the two best are also tried with the gradient
    of the reset detached. The choice follows the figures, not the clock, so that it can be repeated: all candidates
    spend the same number of gradients, and none costs much more than another.

    Args:
        model: Images [N, ...] in [0, 1] to logits; an ``nn.Module`` unless ``"training"`` is the only candidate.
        x: Images; the first ones that are classified right are used.
        y: Labels [N] int64.
        eps: Radius in units of [0, 1] images.
        norm: ``"Linf"`` or ``"L2"``.
        candidates: Names of estimators; ``"training"`` is always tried.
        steps: Steps of the attack.
        count: How many to choose at most; fewer are chosen where no further one adds anything.
        images: How many images to use at most.
        attack: Another attack than APGD-CE of ``steps`` steps, its budget bound.
        draws: Forwards in every one of which a stochastic network has to be wrong.
        seeds: One seed per sample.

    Returns:
        One row per estimator, strongest first; those that could not be tried come last, with the reason.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If no image is classified right, an estimator is unknown, or an argument is out of range.

    Source: hyperparameter search over surrogate widths as in HART (Hao et al., ICLR 2024), here over shapes as well.

    Examples:
        >>> model, x = torch.nn.Linear(4, 3), torch.rand(6, 4)
        >>> y = model(x).argmax(1)
        >>> rows = sweep(model, x, y, eps=0.1, candidates=["training"], seeds=SampleSeeds(range(6)))
        >>> rows[0].estimator, rows[0].chosen
        ('training', True)
    """
    for name, value in (("steps", steps), ("count", count), ("images", images)):
        check_count(name, value)
    rows = (~fools(model, x, y, draws=draws, seeds=seeds)).nonzero().flatten()[:images]
    if len(rows) == 0:
        raise ValueError(f"a sweep needs images that are classified right, got none among {len(x)}; give others")
    short = partial(apgd, eps=eps, norm=norm, steps=steps) if attack is None else attack
    trial = _Trials(model, x[rows], y[rows], short, draws, seeds.rows(rows))
    names = tuple(dict.fromkeys(("training", *candidates)))
    for name in names:
        check_estimator(name)
    for name in names:
        trial.run(name)
    for name in trial.choice(2) if len(names) > 1 else ():
        if has_detached_reset(name):
            trial.run(f"{name}+detach")
    chosen = trial.choice(count)
    rows_by_strength = sorted(trial.rows.values(), key=lambda row: (bool(row.note), row.robust_accuracy + row.margin))
    return tuple(replace(row, chosen=row.estimator in chosen) for row in rows_by_strength)


class _Trials:
    """What every estimator tried so far leaves of the swept images."""

    def __init__(
        self, model: Model, x: Tensor, y: Tensor, attack: SampleAttack, draws: int, seeds: SampleSeeds
    ) -> None:
        self.model, self.x, self.y, self.attack, self.draws, self.seeds = model, x, y, attack, draws, seeds
        self.rows: dict[str, SweepRow] = {}
        self.left: dict[str, Tensor] = {}
        self.clean = self._scores(x)[1].mean().clamp(min=torch.finfo(torch.float64).tiny)
        self._craft("training", slice(1))  # the first call may compile kernels, which is no estimator's fault

    def run(self, name: str) -> None:
        """Attack with one estimator; one that this network does not allow is noted."""
        if name in self.rows:
            return
        start = clock(self.x.device)
        try:
            x_adv, note = self._craft(name, slice(None)), ""
        except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            if name == "training":
                raise
            x_adv, note = self.x, f"{type(error).__name__}: {error}"
        seconds = clock(self.x.device) - start
        standing, margins = self._scores(x_adv)
        margins = margins / self.clean
        self.left[name] = standing + margins
        self.rows[name] = SweepRow(name, float(standing.mean()), float(margins.mean()), seconds, note=note)

    def choice(self, count: int) -> list[str]:
        """Names of the estimators that together leave least, chosen one by one."""
        open_names = [name for name, row in self.rows.items() if not row.note]
        chosen: list[str] = []
        left = torch.full_like(self.left["training"], torch.inf)
        while open_names and len(chosen) < count:
            means = {name: float(torch.minimum(left, self.left[name]).mean()) for name in open_names}
            best = min(open_names, key=means.__getitem__)
            if chosen and means[best] >= float(left.mean()):
                break
            left = torch.minimum(left, self.left[best])
            chosen.append(best)
            open_names.remove(best)
        return chosen

    def _craft(self, name: str, rows: slice) -> Tensor:
        member = Member("sweep", self.attack, name)  # one name, so that all estimators start from the same points
        seeds = SampleSeeds(self.seeds.seeds[rows])
        return craft(self.model, self.x[rows], self.y[rows], member, seeds=seeds)

    def _scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Whether a sample stands in any draw, and its largest margin over the draws, 0 where fooled; [N] float64."""
        standing, margins = [], []
        for draw in range(self.draws):
            logits = scored(self.model, x, self.y, seed=self.seeds.derived("draw", draw).single()).double()
            standing.append(logits.argmax(1) == self.y)
            margins.append(margin(logits, self.y))
        return torch.stack(standing).any(0).double(), torch.stack(margins).amax(0).clamp(min=0)
