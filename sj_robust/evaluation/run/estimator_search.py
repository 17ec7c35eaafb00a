"""Search for the gradient estimators that fool a network most often."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from sj_robust.attacks.apgd import apgd
from sj_robust.attacks.call import Attack, Model
from sj_robust.attacks.events import Allow, flip_events, random_flips
from sj_robust.attacks.logits import margin
from sj_robust.attacks.timing import move_events, random_moves
from sj_robust.core.checks import check_count, check_labels, check_model, check_samples
from sj_robust.core.copies import in_copies, possible_copies
from sj_robust.core.randomness import SampleSeeds, check_seeds
from sj_robust.core.threat import ThreatModel
from sj_robust.evaluation.run.member import (
    Member,
    attacked_copy,
    check_estimator,
    clock,
    crafted,
    fooled,
    has_detached_reset,
    scored,
)

__all__ = [
    "CANDIDATES",
    "CHANGES",
    "EstimatorSearch",
    "EstimatorTrial",
    "confident",
    "event_attack",
    "expectation",
    "is_adaptive",
    "random_event_attack",
    "search_estimators",
    "short_attack",
    "short_attack_name",
]

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
"""Estimators that a search tries by default: shapes with widths around the threshold, and the
adaptive ones but PDSG, whose gradient of an image depends on the others in the batch."""

_FEW_DRAWS = 2
"""Forwards over which a gradient of a trial averages where the network draws random numbers; in
``docs/results/defences/gradient_draws.csv``, one leaves at most 1.7 points more than ten.
"""


@dataclass(frozen=True)
class EstimatorSearch:
    """How gradient estimators are chosen. 梯度估计搜索的设置。

    Attributes:
        candidates: Names of the estimators to try; ``"training"`` is always tried.
        steps: Steps of the short attack that tries all of them.
        images: Largest number of images for these attacks.
        count: Largest number of estimators to choose; fewer are chosen if no other one adds
            anything.
        finalists: How many of the best after the short attack are tried with a longer one, as are
            ``"training"`` and all candidates of the form ``"assg..."``; only these can be chosen.
            0: there is no longer attack.
        final_steps: Steps of the longer attack.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a number is below 1 (``finalists``: below 0).
    """

    candidates: Sequence[str] = CANDIDATES
    steps: int = 20
    images: int = 48
    count: int = 3
    finalists: int = 4
    final_steps: int = 60

    def __post_init__(self) -> None:
        for name in ("steps", "images", "count", "final_steps"):
            check_count(name, getattr(self, name))
        check_count("finalists", self.finalists, least=0)


@dataclass(frozen=True)
class EstimatorTrial:
    """Strength of an attack with one estimator on a few images. 单个梯度估计的试探结果。

    Attributes:
        estimator: Name of the estimator.
        robust_accuracy: Share of the correctly classified images that are not broken.
        margin: Margin under attack (logit of the label minus the largest other one, 0 if broken),
            as a share of the margin on the clean images.
        seconds: Time of the attack.
        images: Number of images.
        gained: Number of images broken with this estimator but not with the training surrogate.
        lost: Number of images broken with the training surrogate but not with this estimator.
        chosen: Whether it is one of the chosen estimators.
        note: The reason if it could not be tried; its figures are then those without an attack.
        steps: Steps of the attack; 0 if the attack was given and is not known to have steps.
    """

    estimator: str
    robust_accuracy: float
    margin: float
    seconds: float
    images: int
    gained: int = 0
    lost: int = 0
    chosen: bool = False
    note: str = ""
    steps: int = 0


def search_estimators(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    settings: EstimatorSearch | None = None,
    attack: Attack | None = None,
    draws: int = 1,
    seeds: SampleSeeds,
    batch_size: int | None = None,
) -> tuple[EstimatorTrial, ...]:
    """Attack a few images with every estimator, and choose the estimators that together fool the
    network most often.

    在少量图像上比较各梯度估计并选出最优组合。

    Equation: with ``m_e(n) >= 0``, the margin of image n after the attack with estimator e in units
    of the mean clean margin, and ``c_e(n) = [n is still correct] + m_e(n)``, estimators are chosen
    one by one to minimise ``mean_n min_{chosen e} c_e(n)``.

    Every candidate is tried as it is and with the gradient of the reset detached
    (``"NAME+detach"``), in two stages: a short attack compares all of them, a longer one those with
    the smallest ``mean_n c_e(n)``. All attacks start from the same random points. The choice
    depends on the results, not on run times, so that it can be repeated: all candidates of a stage
    compute the same number of gradients, and none costs much more than another.

    Args:
        model: Images [N, ...] in [0, 1] to logits; an ``nn.Module`` unless ``"training"`` is the
            only candidate.
        x: Images; the first ones that are classified correctly are used.
        y: Labels [N] int64.
        threat: The budget.
        settings: Candidates, length of the attacks and number of images; None takes the defaults.
        attack: An attack with its budget set, for a single stage; None uses :func:`short_attack`
            with the steps of each stage.
        draws: Number of forwards; a stochastic network has to be wrong in more than half of them.
            Gradients of the default attacks on images average over two of them.
        seeds: One seed per sample.
        batch_size: Images at a time; None takes all at once.

    Returns:
        One trial per estimator: those of the longer attack, strongest first, then those of the
        short attack; of each, those that could not be tried come last, with the reason.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If no image is classified correctly or an estimator is unknown.

    Source: hyperparameter search over surrogate widths as in HART (Hao et al., ICLR 2024), here
        over shapes as well.

    Examples:
        >>> model, x = torch.nn.Linear(4, 3), torch.rand(6, 4)
        >>> threat, settings = ThreatModel("Linf", 0.1), EstimatorSearch(candidates=["training"])
        >>> trials = search_estimators(
        ...     model,
        ...     x,
        ...     model(x).argmax(1),
        ...     threat=threat,
        ...     settings=settings,
        ...     seeds=SampleSeeds(range(6)),
        ... )
        >>> trials[0].estimator, trials[0].chosen
        ('training', True)
    """
    settings = settings or EstimatorSearch()
    check_model(model)
    check_samples(x)
    check_labels(y, x)
    check_count("draws", draws)
    check_seeds(seeds, x)
    right = ~fooled(model, x, y, draws=draws, seeds=seeds, batch_size=batch_size)
    rows = right.nonzero().flatten()
    rows = rows[: settings.images]
    if len(rows) == 0:
        raise ValueError(
            f"a search needs images that are classified correctly, got none among {len(x)}; use "
            "other images"
        )
    images = _Images(
        model,
        x=x[rows],
        y=y[rows],
        draws=draws,
        seeds=seeds.rows(rows),
        batch_size=batch_size or len(rows),
    )
    names = _with_detached(settings.candidates)
    few = draws if threat.of_events else min(draws, _FEW_DRAWS)
    if attack is None:
        short = short_attack(threat, settings.steps, draws=few)
        first = _Trials(images, short, settings.steps)
    else:
        first = _Trials(images, attack)
    # The first call may compile kernels, which is no estimator's fault.
    images.craft(first.attack, "training", slice(1))
    first.run(names)
    if attack is not None or settings.finalists == 0:
        return first.ordered(settings.count)
    longer = short_attack(threat, settings.final_steps, draws=few)
    last = _Trials(images, longer, settings.final_steps)
    last.run(_finalists(first, settings.finalists))
    others = [trial for trial in first.ordered(0) if trial.estimator not in last.found]
    return (*last.ordered(settings.count), *others)


def _with_detached(candidates: Sequence[str]) -> list[str]:
    """The training surrogate and the candidates, each also with the gradient of the reset
    detached.
    """
    names = list(dict.fromkeys(("training", *candidates)))
    for name in names:
        check_estimator(name)
    if len(names) == 1:  # a network that allows no other estimator may hold no spiking neuron
        return names
    detached = [f"{name}+detach" for name in names if has_detached_reset(name)]
    return list(dict.fromkeys([*names, *detached]))


def _finalists(first: "_Trials", count: int) -> list[str]:
    """What is tried again: the training surrogate, those that a short attack underrates, and the
    best of the others.
    """
    always = [name for name in first.tried() if name == "training" or is_adaptive(name)]
    others = [name for name in first.tried() if name not in always]
    others.sort(key=lambda name: float(first.left[name].mean()))
    return [*always, *others[:count]]


def is_adaptive(name: str) -> bool:
    """Whether an estimator is ASSG in any form, which adapts to the network during an attack, so
    that a short one underrates it.
    """
    return name.startswith("assg")


def _weakness(trial: EstimatorTrial) -> tuple[bool, float]:
    """What trials are sorted by."""
    left = trial.robust_accuracy + trial.margin
    return bool(trial.note), left


def short_attack(
    threat: ThreatModel, steps: int, *, draws: int = 1, queries: int = 0
) -> "partial[Tensor]":
    """APGD-CE for a first impression; on events their own attack, with ``queries`` random
    exchanges.
    """
    if threat.of_events:
        return partial(
            event_attack(threat), steps=steps, queries=queries, reduce=False, **confident(draws)
        )
    return partial(apgd, eps=threat, steps=steps, **expectation(draws))


CHANGES = {"L0": "flips", "moves": "moves"}
"""What attacks do to events, by the norm of the threat."""


def short_attack_name(threat: ThreatModel) -> str:
    """What :func:`short_attack` makes."""
    return {"L0": "flip_events", "moves": "move_events"}.get(threat.norm, "APGD-CE")


def event_attack(threat: ThreatModel) -> "partial[Tensor]":
    """The guided attack of a threat of events, its budget bound."""
    return partial(flip_events if threat.norm == "L0" else move_events, eps=threat)


def random_event_attack(threat: ThreatModel, *, allow: Allow) -> "partial[Tensor]":
    """Its random control; moves neither add nor remove events, whatever ``allow`` says."""
    if threat.norm == "L0":
        return partial(random_flips, eps=threat, allow=allow)
    return partial(random_moves, eps=threat)


def confident(draws: int) -> dict[str, Any]:
    """Options of an attack on events where the network draws random numbers; confidence is in units
    of logits.
    """
    return {} if draws == 1 else {"eot_samples": draws, "confidence": 0.1}


def expectation(draws: int) -> dict[str, Any]:
    """Options of APGD and SA-PGD, so that one lucky draw of a stochastic network is not the end of
    the attack.
    """
    return {} if draws == 1 else {"eot_samples": draws, "keep_best": False}


@dataclass(frozen=True)
class _Images:
    """What the estimators are tried on."""

    model: Model
    x: Tensor
    y: Tensor
    draws: int
    seeds: SampleSeeds
    batch_size: int

    def craft(self, attack: Attack, name: str, rows: slice = slice(None)) -> Tensor:
        """The images after an attack with an estimator."""
        member = Member("sweep", attack, name)  # part of the seeds: all start from the same points
        x, y, seeds = self.x[rows], self.y[rows], self.seeds.seeds[rows]
        found = []
        for start in range(0, len(y), self.batch_size):
            part = slice(start, start + self.batch_size)
            own = SampleSeeds(seeds[part])
            found.append(crafted(self.copy, x[part], y[part], member, seeds=own).x_adv)
        return torch.cat(found)

    @cached_property
    def copy(self) -> Model:
        """What the attacks ask."""
        return self.model if self.draws > 1 else attacked_copy(self.model, self.x)

    @cached_property
    def mean_clean_margin(self) -> Tensor:
        """Mean margin of the clean images, above 0."""
        _, margins = self.scores(self.x)
        least = torch.finfo(torch.float64).tiny
        return margins.mean().clamp(min=least)

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Whether a sample stands in half of the draws or more, [N] bool, and its mean margin over
        them, 0 where the network is fooled, [N] float64.
        """
        standing, margins = [], []
        for draw in range(self.draws):
            seed = self.seeds.derived("draw", draw).single()
            logits = scored(self.model, x, self.y, seed=seed, batch_size=self.batch_size).double()
            standing.append(logits.argmax(1) == self.y)
            margins.append(margin(logits, self.y).clamp(min=0))
        stands = 2 * torch.stack(standing).sum(0) >= self.draws
        return stands, torch.stack(margins).mean(0)


@dataclass
class _Trials:
    """What an attack with each estimator leaves of the images."""

    images: _Images
    attack: Attack
    steps: int = 0
    found: dict[str, EstimatorTrial] = field(default_factory=dict)
    standing: dict[str, Tensor] = field(default_factory=dict)
    left: dict[str, Tensor] = field(default_factory=dict)

    def run(self, names: Sequence[str]) -> None:
        """Attack with every estimator, ``"training"`` first."""
        images = self.images

        def one(index: int, tell: object) -> tuple[list[bool], list[float], float, str]:
            """What an estimator leaves; one that this network does not allow is noted."""
            start = clock(images.x.device)
            try:
                x_adv, note = images.craft(self.attack, names[index]), ""
            except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
                if names[index] == "training":
                    raise
                x_adv, note = images.x, f"{type(error).__name__}: {error}"
            seconds = clock(images.x.device) - start
            standing, margins = images.scores(x_adv)
            return standing.tolist(), margins.tolist(), seconds, note

        copies = possible_copies()
        found = dict(in_copies(one, len(names), copies, print))
        for index, name in enumerate(names):
            self._add(name, *found[index])

    def _add(
        self, name: str, stood: list[bool], margin_of: list[float], seconds: float, note: str
    ) -> None:
        """The trial of one estimator, that of ``"training"`` first."""
        device = self.images.x.device
        standing = torch.tensor(stood, device=device)
        margins = torch.tensor(margin_of, dtype=torch.float64, device=device)
        margins = margins / self.images.mean_clean_margin
        self.standing[name] = standing
        self.left[name] = standing.double() + margins
        usual = self.standing["training"]
        self.found[name] = EstimatorTrial(
            name,
            robust_accuracy=float(standing.double().mean()),
            margin=float(margins.mean()),
            seconds=seconds,
            images=len(standing),
            gained=int((usual & ~standing).sum()),
            lost=int((standing & ~usual).sum()),
            note=note,
            steps=self.steps,
        )

    def tried(self) -> list[str]:
        """Names of the estimators that could be tried."""
        return [name for name, trial in self.found.items() if not trial.note]

    def ordered(self, count: int) -> tuple[EstimatorTrial, ...]:
        """The trials, strongest first, with ``count`` chosen ones at most."""
        chosen = self.choice(count)
        by_strength = sorted(self.found.values(), key=_weakness)
        return tuple(replace(row, chosen=row.estimator in chosen) for row in by_strength)

    def choice(self, count: int) -> list[str]:
        """Names of the estimators that together leave least, chosen one by one."""
        tried = self.tried()
        chosen: list[str] = []
        left = torch.full_like(self.left["training"], torch.inf)
        while tried and len(chosen) < count:
            means = {}
            for name in tried:
                both = torch.minimum(left, self.left[name])
                means[name] = float(both.mean())
            best = min(tried, key=means.__getitem__)
            if chosen and means[best] >= float(left.mean()):
                break  # none of the others helps
            left = torch.minimum(left, self.left[best])
            chosen.append(best)
            tried.remove(best)
        return chosen
