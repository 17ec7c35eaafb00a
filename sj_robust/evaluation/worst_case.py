"""Worst case per sample over attacks, gradient estimators and seeds."""

from collections.abc import Sequence

from torch import Tensor, nn

from sj_robust.attacks.call import Model
from sj_robust.core.checks import check_count, check_labels, check_model, check_samples
from sj_robust.core.randomness import SampleSeeds, check_seeds
from sj_robust.core.threat import ThreatModel
from sj_robust.evaluation.report.report import Report
from sj_robust.evaluation.run.loop import Asked, Job, rows_of, run_batch
from sj_robust.evaluation.run.member import Member
from sj_robust.evaluation.run.plain import plain_copy
from sj_robust.evaluation.run.progress import BatchLog
from sj_robust.evaluation.run.variant import Variant

__all__ = ["worst_case"]


def worst_case(
    model: Model,
    x: Tensor,
    y: Tensor,
    members: Sequence[Member],
    *,
    threat: ThreatModel | None = None,
    draws: int = 1,
    seeds: SampleSeeds | None = None,
    plain: Model | None = None,
) -> Report:
    """Run your own attacks one after the other, and determine for every image whether any of them
    fools the network. 逐样本取多种攻击与梯度估计的最坏情况。

    Equation: ``robust accuracy = mean_n [correct on x_n and on a_m(x_n) for every member m]``. A
    member attacks the images that are classified correctly and not yet broken in its group. What it
    makes is judged by a copy of the network that no attack has asked.

    Args:
        model: Images [N, ...] in [0, 1] to logits [N, classes]; an ``nn.Module`` where a member has
            an estimator.
        x: Images, floating point.
        y: Labels [N] int64.
        members: The attacks, in the order in which they are run.
        threat: Threat model within which an image counts as broken; None counts every image of a
            member.
        draws: Number of forwards; a stochastic network has to be wrong in more than half of them.
        seeds: One seed per sample; the result of a sample then depends neither on the other samples
            nor on the batch size (unless the network itself draws random numbers, or the estimator
            is ``pdsg``). None uses the indices of the images.
        plain: A copy of the network that nothing has asked yet; None makes one.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If images, labels or seeds do not fit, names repeat, or an attack leaves its
            budget.

    Source: per-sample worst case as in AutoAttack (Croce and Hein, ICML 2020), over several
        gradients as Bu et al. (TMLR 2024) ensemble them for spiking networks.

    Examples:
        >>> import torch
        >>> from functools import partial
        >>> from sj_robust.attacks import fgsm
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> model.weight = torch.nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> x, y = torch.tensor([[0.6, 0.5], [0.9, 0.1]]), torch.tensor([0, 0])
        >>> report = worst_case(model, x, y, [Member("fgsm", partial(fgsm, eps=0.1))])
        >>> report.attacks[0].fell, report.everything.accuracy
        ((0,), 0.5)
    """
    check_model(model)
    check_samples(x)
    check_labels(y, x)
    check_count("draws", draws)
    seeds = SampleSeeds(range(len(x))) if seeds is None else seeds
    check_seeds(seeds, x)
    variant = Variant(members)
    variant.check_names()
    remark = ""
    if plain is None and isinstance(model, nn.Module):
        plain, remark = plain_copy(model)
    job = Job(
        variant=variant,
        model=model,
        x=x,
        y=y,
        start=0,
        seeds=seeds,
        asked=Asked(threat, draws),
        plain=plain,
    )
    steps = list(run_batch(job, BatchLog()))
    return Report(
        name=type(model).__name__,
        dataset="images",
        suite="worst case",
        labels=tuple(y.tolist()),
        rows=rows_of(variant, [steps], [0]),
        threat=threat,
        draws=draws,
        warnings=tuple(filter(None, [remark])),
    )
