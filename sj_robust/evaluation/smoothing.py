"""Bounds of a smoothed classifier: certified accuracy in L2 and accuracy under attack."""

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from sj_robust.attacks.call import Model
from sj_robust.attacks.gradient import pgd
from sj_robust.core.checks import check_count, check_labels, check_seed
from sj_robust.core.environment import device_of, environment
from sj_robust.core.eps import Radii, parse_radii
from sj_robust.core.randomness import SampleSeeds
from sj_robust.core.threat import ThreatModel
from sj_robust.evaluation.report.report import Report
from sj_robust.evaluation.result import Row
from sj_robust.evaluation.run.data import Data
from sj_robust.evaluation.run.identity import network_key
from sj_robust.evaluation.run.loop import Asked, run
from sj_robust.evaluation.run.member import Member, Variant
from sj_robust.proofs.smoothing import ABSTAINED, SmoothedClassifier, Smoothing, smooth

__all__ = ["smoothed_bracket"]


def smoothed_bracket(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    smoothing: Smoothing,
    eps: Radii,
    *,
    steps: int = 20,
    eot_samples: int = 16,
    n0: int = 100,
    batch_size: int = 64,
    seed: int = 0,
    name: str = "vote",
    dataset: str = "images",
    configuration: dict[str, Any] | None = None,
) -> Report:
    """Attack the smoothed classifier itself, for an upper bound next to its certified accuracy.
    平滑分类器的上下界。

    At each radius, PGD in L2 maximises the cross entropy averaged over ``eot_samples`` noisy copies
    of every image that is not broken yet, including the certified ones. An image counts as broken
    if the smoothed classifier, with ``smoothing.n`` fresh draws, votes for another class on the
    last iterate; if it abstains, nothing is known. Neither bound says anything about the network
    without the vote.

    Args:
        model: The network that was smoothed.
        x: The images for which it was smoothed.
        y: Labels [N] int64.
        smoothing: The result of :func:`sj_robust.proofs.smooth` for them.
        eps: L2 radius, >= 0, or several.
        steps: Steps of PGD, each of 2.5 eps / steps.
        eot_samples: Number of noisy copies over which a gradient is averaged.
        n0: Number of draws to guess the class of a vote.
        batch_size: Images attacked at a time.
        seed: Seeds all noise.
        name: Name of the network in the report.
        dataset: Name of the images in the report.
        configuration: Options of the run, for the report.

    Returns:
        A report with both bounds at every radius, see ``Report.bracket_at``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If images, labels, smoothing or a number do not fit.

    Source: attacks that average over the noise as in SmoothAdv, Salman et al. (NeurIPS 2019).

    Examples:
        >>> x, y = torch.tensor([[0.8, 0.2], [0.55, 0.45]]), torch.tensor([0, 0])
        >>> net, draws = nn.Linear(2, 2, bias=False), torch.Generator().manual_seed(0)
        >>> _ = net.weight.data.copy_(torch.eye(2))
        >>> certified = smooth(net, x, 0.25, generator=draws)
        >>> found = smoothed_bracket(net, x, y, certified, [0.0, 0.2])
        >>> [[end.accuracy for end in found.bracket_at(radius)] for radius in (0.0, 0.2)]
        [[1.0, 1.0], [0.5, 0.5]]
    """
    check_labels(y, x)
    check_count("steps", steps)
    seed = check_seed("seed", seed)
    data = Data.of_tensors(x, y, check_count("batch_size", batch_size))
    ordered = parse_radii(eps)
    variant = f"vote:{smoothing.sigma:g}"
    right = smoothing.certified(y)
    wrong = [i for i, label in enumerate(smoothing.prediction) if label != ABSTAINED]
    attacked = Variant(
        [_attack(radius, steps, eot_samples) for radius in ordered if radius > 0],
        variant,
        seed,
        network=partial(SmoothedClassifier, sigma=smoothing.sigma),
        judge=_Vote(smoothing.n, n0, smoothing.alpha),
        wrong=frozenset(i for i in wrong if not right[i]),
    )
    network = network_key(model, data, None)
    middle = ThreatModel("L2", ordered[len(ordered) // 2])
    outcome = run(model, data, [attacked], asked=Asked(middle), network=network)
    proofs = [_proof(smoothing, y, radius, variant) for radius in ordered]
    vote = {"sigma": smoothing.sigma, "n": smoothing.n, "alpha": smoothing.alpha}
    return Report(
        name=name,
        dataset=dataset,
        suite="vote",
        labels=data.labels,
        rows=(*outcome.rows, *proofs),
        threat=middle,
        description=f"PGD {steps} on the vote",
        seed=seed,
        network={"fingerprint": network, "vote": vote},
        data=data.fingerprint,
        configuration=dict(configuration or {}),
        environment=environment(device_of(model)),
        warnings=outcome.warnings,
    )


def _attack(radius: float, steps: int, eot_samples: int) -> Member:
    threat = ThreatModel("L2", radius)
    attack = partial(
        pgd,
        eps=threat,
        steps=steps,
        eot_samples=eot_samples,
        keep_best=False,  # the best of noisy draws would be a lucky one
    )
    return Member(f"pgd@{radius:g}", attack, group="vote", threat=threat)


def _proof(smoothing: Smoothing, y: Tensor, radius: float, variant: str) -> Row:
    images = range(len(y))
    holds = smoothing.certified(y, radius)
    return Row(
        member="smooth",
        kind="proof",
        seen=tuple(images),
        fell=tuple(number for number in images if not holds[number]),
        variant=variant,
        threat=ThreatModel("L2", radius),
        estimator="",
        alpha=smoothing.alpha,
    )


@dataclass(frozen=True)
class _Vote:
    """Says that images are wrong for which the smoothed classifier votes for another class."""

    n: int
    n0: int
    alpha: float

    def __call__(
        self, model: Model, x: Tensor, y: Tensor, *, draws: int, seeds: SampleSeeds
    ) -> Tensor:
        noisy = cast("SmoothedClassifier", model)
        vote = smooth(
            noisy.model,
            x,
            noisy.sigma,
            n0=self.n0,
            n=self.n,
            alpha=self.alpha,
            generator=seeds.derived("vote"),
        )
        answers = zip(vote.prediction, y.tolist(), strict=True)
        wrong = [label not in (true, ABSTAINED) for label, true in answers]
        return torch.tensor(wrong, dtype=torch.bool, device=x.device)
