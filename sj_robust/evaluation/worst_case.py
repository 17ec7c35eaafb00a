"""Worst case per sample over attacks, gradient estimators and seeds, and the one loop over the
members of a set.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sj_robust.attacks.call import Model
from sj_robust.core.randomness import SampleSeeds
from sj_robust.evaluation.member import Member, clock, crafted, fooled, fools
from sj_robust.evaluation.outcome import MemberOutcome

__all__ = ["MemberRun", "WorstCase", "run_members", "worst_case"]


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
    outcomes: tuple[MemberOutcome, ...]

    @property
    def robust_accuracy(self) -> float:
        """Share of all images that are classified right and that no member fooled; NaN without
        images.
        """
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
        standing = self.correct.clone()
        for outcome in outcomes:
            standing[list(outcome.fooled)] = False
        return standing


def worst_case(
    model: Model,
    x: Tensor,
    y: Tensor,
    members: Sequence[Member],
    *,
    seeds: SampleSeeds,
    draws: int = 1,
) -> WorstCase:
    """Run the members one after the other and keep, per sample, the first that fools the network.

    逐样本取多种攻击与梯度估计的最坏情况。

    Equation: ``robust accuracy = mean_n [right on x_n and on a_m(x_n) for every member m]``. A
    member attacks what is classified right and still stands in its group. Every success is scored
    again by :func:`fools`.

    Args:
        model: Images [N, ...] in [0, 1] to logits [N, classes]; an ``nn.Module`` where a member has
            an estimator.
        x: Images, floating point.
        y: Labels [N] int64.
        members: What is run, in this order.
        seeds: One seed per sample; the result of a sample then depends on neither its neighbours
            nor the batch size (unless the network itself draws random numbers, or the estimator is
            ``pdsg``).
        draws: Forwards in every one of which a stochastic network has to be wrong.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If images, labels or seeds do not fit, names repeat, or an attack leaves its
            budget.

    Source: per-sample worst case as in AutoAttack (Croce and Hein, ICML 2020), over several
        gradients as Bu et al. (TMLR 2024) ensemble them for spiking networks.

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
        raise ValueError(
            f"names of members must differ, got {[member.name for member in members]}; add the "
            "restart"
        )
    correct = ~fools(model, x, y, draws=draws, seeds=seeds)
    x_adv, fooled_by = x.detach().clone(), torch.full_like(y, -1)
    outcomes = []
    for index, run in enumerate(
        run_members(model, x, y, members, correct, seeds=seeds, draws=draws)
    ):
        first = run.fooled & (fooled_by[run.rows] < 0)
        x_adv[run.rows[first]] = run.x_adv[first]
        fooled_by[run.rows[first]] = index
        threat = run.member.threat
        outcomes.append(
            MemberOutcome(
                run.member.name,
                run.member.estimator,
                run.member.group,
                eps=run.member.eps,
                attacked=tuple(run.rows.tolist()),
                fooled=tuple(run.rows[run.fooled].tolist()),
                outside=(),
                largest=max(threat.distance(x[run.rows], run.x_adv).tolist(), default=0.0)
                if threat
                else torch.nan,
                seconds=run.seconds,
            )
        )
    return WorstCase(x_adv, correct, fooled_by, tuple(outcomes))


class MemberRun(NamedTuple):
    """What one member made of the samples ``rows`` [n] of a batch; ``x_adv`` [n, ...] and
    ``fooled`` [n] are theirs.
    """

    member: Member
    rows: Tensor
    x_adv: Tensor
    fooled: Tensor
    seconds: float


def run_members(
    model: Model,
    x: Tensor,
    y: Tensor,
    members: Sequence[Member],
    correct: Tensor,
    *,
    seeds: SampleSeeds,
    draws: int,
    known: Sequence[Sequence[int]] = (),
    spared: Mapping[str, Tensor] | None = None,
) -> Iterator[MemberRun]:
    """Run members in their order, each on what is ``correct`` [N] and still stands in its group;
    images, labels and seeds are checked already.

    ``known[i]`` are the samples that ``members[i]`` fooled in an earlier run; only the members
    after these run and are yielded. ``spared`` are, by name of a member, samples [N] bool that it
    cannot fool and does not attack.
    """
    standing = {member.group: correct.clone() for member in members}
    for index, member in enumerate(members):
        if index < len(known):
            fallen = torch.tensor(known[index], dtype=torch.int64, device=x.device)
        else:
            spares = (spared or {}).get(member.name)
            attacked = (
                standing[member.group] if spares is None else standing[member.group] & ~spares
            )
            rows = attacked.nonzero()[:, 0]
            images, labels, own = x[rows], y[rows], seeds.rows(rows)
            start = clock(x.device)
            x_adv = crafted(model, images, labels, member, seeds=own)
            score = own.derived("score", member.name)
            hit = fooled(model, x_adv, labels, draws=draws, seeds=score)
            yield MemberRun(member, rows, x_adv, hit, clock(x.device) - start)
            fallen = rows[hit]
        if member.group:
            standing[member.group][fallen] = False
