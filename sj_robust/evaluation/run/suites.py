"""Suites of attacks by name, with the control of equal cost."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sj_robust.attacks.apgd import apgd
from sj_robust.attacks.bridges import Version, autoattack, transfer
from sj_robust.attacks.call import Attack, Model
from sj_robust.attacks.gradient import fgsm, pgd
from sj_robust.attacks.noise import gaussian
from sj_robust.attacks.sapgd import sapgd
from sj_robust.attacks.spike_search import PROPOSALS_AT_ONCE, spike_search
from sj_robust.attacks.square import square
from sj_robust.core.checks import check_choice, check_count
from sj_robust.core.extras import check_extra
from sj_robust.core.preserved import evaluation_mode
from sj_robust.core.threat import ThreatModel
from sj_robust.evaluation.run.estimator_search import (
    CANDIDATES,
    CHANGES,
    EstimatorSearch,
    confident,
    event_attack,
    expectation,
    is_adaptive,
    random_event_attack,
)
from sj_robust.evaluation.run.member import Member
from sj_robust.evaluation.run.proofs import program

__all__ = [
    "GRADES",
    "UNSEARCHED",
    "Suite",
    "SuiteName",
    "allowed_by",
    "check_radius",
    "check_rounds",
    "check_shape",
    "check_suite",
    "make_suite",
]

SuiteName = Literal[
    "paper", "fast", "standard", "gradient", "long", "autoattack", "gradients", "events"
]
"""Names of the suites."""

GRADES: dict[str, str] = {
    "paper": "Published protocol, weaker than `standard`",
    "fast": "Quick check",
    "standard": "Full evaluation",
    "gradient": "Gradient attacks and Square, without a search over spikes",
    "long": "Long runs of one gradient attack, in addition to `standard`",
    "autoattack": "AutoAttack with the training surrogate only",
    "gradients": "Comparison of gradient estimators",
    "events": "Full evaluation on event frames",
}
"""How far to trust the figures of each suite."""

_COMPARED = (*CANDIDATES, "pdsg", "hart_mixed:1.2", "straight_through")
UNSEARCHED: dict[str, tuple[str, ...]] = {
    "gradient": ("assg",),
    "gradients": _COMPARED,
    "long": ("mixed",),
}
"""By suite the estimators that its members use whatever a search chooses."""
_SHARES = tuple(f"assg:{share}" for share in ("0.5", "0.7", "0.8", "0.85", "0.9", "0.95"))
"""Shares of ASSG's area that the suite ``long`` chooses from."""
_FEW_CANDIDATES = ("triangle:0.25", "triangle:0.5", "atan:8", "assg")
"""Estimators that the suite ``fast`` chooses from: of those that a long attack of all candidates
chooses (docs/results/estimator_choice.csv), the most frequent ones and two that differ from them.
"""
_REPEATED = ("fast", "standard", "gradient", "long", "events")
"""Suites that may have several rounds."""
_INNER = 0.95
"""Share of the radius of a plain attack that does not end on the border."""
_FAR = 1e6
"""A lead of a wrong class that no network gives."""
_PAPER_EPS = 8 / 255
_PAPER_STEPS = {
    7: 2.55 / 255,
    10: 2 / 255,
    20: 1 / 255,
    40: 0.5 / 255,
}  # steps of PGD: step size at _PAPER_EPS


@dataclass(frozen=True)
class Suite:
    """Attacks that are run together. 攻击套件。

    Attributes:
        name: Name of the suite.
        members: Attacks whose worst case counts, in the order in which they are run; those of group
            ``""`` are reported separately, and may have another radius than the threat.
        control: The training surrogate with restarts at the same cost, in group ``"control"``; the
            difference shows the benefit of choosing estimators.
        description: What is run, in one sentence.
        search: How the estimators are chosen beforehand; None if the suite needs no choice.
        plain: Attacks that join where a sign of gradient masking shows, on a plain copy of the
            network, of whose gradient nothing but its surrogates is the network's own.

    Raises:
        ValueError: If two attacks have the same name.
    """

    name: str
    members: tuple[Member, ...]
    control: tuple[Member, ...]
    description: str
    search: EstimatorSearch | None = None
    plain: tuple[Member, ...] = ()

    def __post_init__(self) -> None:
        names = [member.name for member in (*self.members, *self.control, *self.plain)]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(
                f"names of a suite's attacks must differ, got {repeated} more than once; add the "
                "restart"
            )


def make_suite(
    name: SuiteName,
    threat: ThreatModel,
    *,
    chosen: Sequence[str] = (),
    classes: int,
    eot_samples: int = 1,
    rounds: int = 1,
    refused: Collection[str] = (),
    batch_size: int | None = None,
    surrogate_model: Model | None = None,
) -> Suite:
    """Build a suite for a threat model, with the estimators chosen by a search.

    按名称构造攻击套件。

    c1, c2, c3 are the chosen estimators, the strongest first; if fewer are chosen, attacks that
    would run twice are omitted. APGD-T is APGD with the targeted DLR loss. In ``paper`` and
    ``gradients``, every attack is run on all correctly classified images; in the other suites, only
    on the images that are still correct after the earlier attacks.

    | suite | members in their order (steps x restarts) |
    | --- | --- |
    | ``paper`` | Gaussian (sigma = eps), FGSM, PGD-7, 10, 20, 40 (best and last iterate), |
    | | APGD-CE 10, APGD-DLR 10; PGD-10 with step eps/4 at 10, 20 ... 100/255 |
    | ``fast`` | APGD-CE c1, c2 (50 x 1), APGD-DLR c1 (50 x 1), APGD-CE training (50 x 1), |
    | | spike_search from their images (2,000 forwards) |
    | ``standard`` | APGD-CE c1, c2, c3 (100 x 1), APGD-DLR c1 (100 x 1), |
    | | APGD-CE training (100 x 1), APGD-T c1, c2 (3 classes x 100), |
    | | spike_search from their images (36,000 forwards), |
    | | in Linf and for small networks a mixed-integer program (300 nodes per rival) |
    | ``gradient`` | APGD-CE c1, c2, c3 (100 x 1), APGD-DLR c1 (100 x 1), APGD-CE c1 (100 x 2), |
    | | APGD-DLR c1 (100 x 1), APGD-CE training, c2, c3 (100 x 1), |
    | | APGD-T c1, c2, c3 (3 classes x 100), SA-PGD with ASSG (100 x 1), Square (1000 queries) |
    | ``long`` | SA-PGD c1, mixed (1,000 x 1), with c1 among shares of ASSG |
    | ``autoattack`` | pyautoattack's standard: APGD-CE (100), APGD-T and FAB-T (9 x 100), |
    | | Square (5000 queries) |
    | ``events`` | flip_events c1, c2, c3 (x 1), random removals (200 tries), |
    | | flip_events c1 (x 3), training, c2, c3 (x 1), c1 towards 3 classes (x 1), |
    | | random changes of both kinds (200 tries), flip_events c1 (x 3); for a threat of moves |
    | | ``move_events`` and ``random_moves`` instead |

    The search itself uses no surrogate, but the attacks that it starts from do. A network that
    draws random numbers (``eot_samples`` > 1) has different spikes in every forward: instead of the
    search, ``standard`` then runs Square (1000 queries), so that ``gradient`` contains it, and
    ``fast`` runs APGD-CE c1 (50 x 2).

    Where a check for gradient masking fails, ``evaluate`` also runs APGD-CE, APGD-DLR (100 x 1) and
    Square (1000 queries) on a plain copy of the network, APGD-CE also with 0.95 of the radius.

    With ``rounds`` > 1, the attacks are repeated with other random numbers, each on the images that
    are still correct; a search starts from the images of its own round, so that it ends elsewhere.
    Where twice the steps or forwards find nothing more, another round may.

    With a ``surrogate_model``, APGD-CE, APGD-DLR and APGD-T (3 classes) of 100 steps (``fast``: 50)
    are crafted on it, and the network judges what they make; they follow the first attack, so that
    the search starts from their images too. On events this is flip_events or ``move_events``.

    The control repeats every attack within the threat model, with the training surrogate and
    another seed; its search starts from the images of the control. There are three exceptions. The
    control of ``standard`` has no program, which uses no gradient. That of ``autoattack`` replaces
    FAB-T (one more forward per step) and Square by a second APGD-T and 20 more runs of APGD-CE at
    equal cost, counting a backward as two forwards. That of ``gradients`` is APGD-CE with the
    training surrogate, five times.

    Args:
        name: ``"paper"`` (the protocol of Ding et al., Linf), ``"fast"``, ``"standard"``,
            ``"gradient"``, ``"long"`` (Linf) or ``"autoattack"``; ``"events"`` for event
            frames, with a threat in L0 or of moves and no other suite.
        threat: The budget of every attack. The step sizes of ``paper`` scale with it and are those
            of the paper at 8/255.
        chosen: Names of estimators, the strongest first; if empty, the training surrogate is used.
        classes: Number of classes of the network; the DLR losses are omitted if there are too few.
        eot_samples: Number of forwards over which a gradient is averaged, > 1 for a network that
            draws random numbers: attacks then continue after a first lucky draw and keep the
            highest loss, and AutoAttack runs its version ``"rand"``.
        rounds: How many times the attacks are run, each time at the cost of the suite; the program
            runs once.
        refused: Names of estimators that the network does not allow: members of ``gradients`` with
            one of them are left out, as is the second attack of ``long`` without ``"mixed"``, and
            SA-PGD of ``gradient`` uses c1 instead of ASSG.
        batch_size: Images that may be evaluated at a time; the search over spikes takes up to twice
            as many, since it keeps no graph. None leaves it at its default.
        surrogate_model: A differentiable stand-in, from the same images to logits; None is none.

    Raises:
        ValueError: If the suite is unknown or does not fit the threat model, the radius is 0,
            estimators or rounds are given to a suite that does not use them, or there are fewer
            than two classes.

    Source: Ding et al. (ICML 2024), section 5; AutoAttack of Croce and Hein (ICML 2020); ``long``:
        Wang et al. (arXiv 2512.22522), who recommend 1,000 steps and a search over the share.

    Examples:
        >>> suite = make_suite(
        ...     "fast", ThreatModel("Linf", 8 / 255), chosen=["atan:4", "triangle:0.5"], classes=10
        ... )
        >>> [member.name for member in suite.members[:3]]
        ['apgd_ce/atan:4/r0', 'apgd_ce/triangle:0.5/r0', 'apgd_dlr/atan:4/r0']
        >>> suite.control[0].name, suite.control[0].estimator
        ('control/apgd_ce/training/r0', 'training')
    """
    check_suite(name, threat)
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 2:
        raise ValueError(
            f"classes must be an integer >= 2, got {classes!r}; pass the number of logits"
        )
    fixed = {"paper": _paper, "autoattack": _autoattack, "gradients": _gradients}
    if chosen and name in fixed:
        raise ValueError(f"suite {name!r} has its estimators fixed, got {list(chosen)}; pass none")
    check_count("eot_samples", eot_samples)
    check_rounds(name, rounds)
    plan = _Plan(threat, classes, eot_samples, rounds, frozenset(refused), batch_size)
    choosing = {
        "fast": _fast,
        "standard": _standard,
        "gradient": _gradient,
        "long": _long,
        "events": _events,
    }
    if name in fixed:
        suite = fixed[name](plan)
    else:
        suite = choosing[name](plan, tuple(dict.fromkeys(chosen)) or ("training",))
    suite = replace(suite, plain=plan.plain())
    if rounds > 1:
        suite = replace(suite, description=f"{suite.description}; {rounds} rounds")
    if surrogate_model is None:
        return suite
    return _with_transfer(suite, plan, surrogate_model)


def allowed_by(plain: nn.Module | None, members: Sequence[Member], x: Tensor) -> list[Member]:
    """Those of a suite's plain attacks that a plain copy of a network allows; None is a network
    that cannot be copied, of which no gradient is asked.
    """
    has_gradient = plain is not None and _has_gradient(plain, x[:1])
    return [member for member in members if (x.ndim == 4 if _is_square(member) else has_gradient)]


def check_suite(name: SuiteName, threat: ThreatModel) -> None:
    """Raise for a suite that is unknown, needs a package that is missing or does not fit a threat.

    Examples:
        >>> check_suite("paper", ThreatModel("L2", 0.5))
        Traceback (most recent call last):
            ...
        ValueError: suite 'paper' is defined for Linf, got 'L2'; use 'standard'
    """
    check_choice("suite", name, get_args(SuiteName))
    check_extra(name)
    check_radius(threat)
    if name == "events" and not threat.of_events:
        raise ValueError(
            f"suite 'events' does not fit a threat in {threat.norm}; count changes with "
            "ThreatModel('L0', k)"
        )
    if name != "events" and threat.of_events:
        raise ValueError(
            f"suite {name!r} does not fit a threat in {threat.norm}; use the suite 'events'"
        )
    if name in ("paper", "long") and threat.norm != "Linf":
        raise ValueError(f"suite {name!r} is defined for Linf, got {threat.norm!r}; use 'standard'")


def check_rounds(name: str, rounds: int) -> None:
    """Raise an error for several rounds of a suite that is run once, and for fewer than one."""
    check_count("rounds", rounds)
    if rounds > 1 and name not in _REPEATED:
        several = ", ".join(map(repr, _REPEATED))
        raise ValueError(
            f"suite {name!r} is run once, got rounds={rounds}; suites of several rounds: {several}"
        )


def check_radius(threat: ThreatModel) -> None:
    """Raise ValueError for a radius of 0, at which no attack does anything."""
    if threat.eps <= 0:
        raise ValueError(
            f"eps must be > 0 to attack at all, got {threat.eps}; give a radius such as eps='8/255'"
        )


def check_shape(name: SuiteName, images: Tensor, *, draws: int = 1) -> None:
    """Raise ValueError for images that Square, which comes last in a suite, would not take.

    Examples:
        >>> import torch
        >>> check_shape("gradient", torch.rand(2, 36))
        Traceback (most recent call last):
            ...
        ValueError: suite 'gradient' needs images [N, C, H, W] for Square, got shape (2, 36); use
        'fast', or reshape inside the model
    """
    with_square = name in ("gradient", "autoattack") or (name == "standard" and draws > 1)
    if with_square and images.ndim != 4:
        raise ValueError(
            f"suite {name!r} needs images [N, C, H, W] for Square, got shape "
            f"{tuple(images.shape)}; use 'fast', or reshape inside the model"
        )


def _is_square(member: Member) -> bool:
    return isinstance(member.attack, partial) and member.attack.func is square


def _has_gradient(plain: nn.Module, x: Tensor) -> bool:
    with torch.inference_mode(False), torch.enable_grad(), evaluation_mode(plain):
        try:
            logits: Tensor = plain(x.clone().requires_grad_())
        except Exception:  # a forward that does not take tensors which record their graph
            return False
        return logits.requires_grad


@dataclass(frozen=True)
class _Plan:
    """Members with the budget of a threat."""

    threat: ThreatModel
    classes: int
    eot_samples: int
    rounds: int
    refused: frozenset[str]
    batch_size: int | None = None

    @property
    def averaged(self) -> dict[str, Any]:
        """Options of an attack that averages, where the network draws random numbers."""
        return {} if self.eot_samples == 1 else {"eot_samples": self.eot_samples}

    def again(self, members: Sequence[Member]) -> list[Member]:
        """The members of every round, each with a restart of its own."""
        kinds = [member.name.removesuffix(f"/r{member.seed}") for member in members]
        runs = Counter(kinds)
        found = []
        for number in range(self.rounds):
            for kind, member in zip(kinds, members, strict=True):
                restart = member.seed + number * runs[kind]
                found.append(replace(member, name=f"{kind}/r{restart}", seed=restart))
        return found

    def member(
        self, kind: str, attack: Attack, estimator: str = "training", restart: int = 0
    ) -> Member:
        return Member(
            f"{kind}/{estimator}/r{restart}", attack, estimator, seed=restart, threat=self.threat
        )

    def ce(self, estimator: str, restart: int = 0, *, steps: int = 100) -> Member:
        return self.member("apgd_ce", self._apgd("ce", steps), estimator, restart)

    def dlr(self, estimator: str, restart: int = 0, *, steps: int = 100) -> list[Member]:
        """APGD-DLR; the loss needs three logits."""
        return (
            [self.member("apgd_dlr", self._apgd("dlr", steps), estimator, restart)]
            if self.classes > 2
            else []
        )

    def targeted(
        self, estimator: str, restart: int = 0, *, targets: int = 3, steps: int = 100
    ) -> list[Member]:
        """APGD towards the likeliest wrong classes with the targeted DLR loss, which needs four
        logits.
        """
        if self.classes < 4:
            return []
        attack = partial(
            self._apgd("dlr_targeted", steps), target_classes=min(targets, self.classes - 1)
        )
        return [self.member("apgd_t", attack, estimator, restart)]

    def sapgd(self, estimator: str, *, steps: int = 100) -> list[Member]:
        """SA-PGD, which knows the Linf ball alone."""
        if self.threat.norm != "Linf":
            return []
        attack = partial(sapgd, eps=self.threat, steps=steps, **expectation(self.eot_samples))
        return [self.member("sapgd", attack, estimator)]

    def square(self, queries: int) -> Member:
        attack = partial(square, eps=self.threat, queries=queries)
        return self.member("square", partial(attack, **self.averaged))

    def plain(self) -> tuple[Member, ...]:
        """On a plain copy of the network, which is not asked on event frames."""
        if self.threat.of_events:
            return ()
        inner = replace(self, threat=replace(self.threat, eps=_INNER * self.threat.eps))
        inside = replace(inner.ce("training"), name="apgd_ce/training/inside")
        members = [self.ce("training"), *self.dlr("training"), inside, self.square(1000)]
        return tuple(replace(member, name=f"plain/{member.name}") for member in members)

    def spikes(self, forwards: int) -> list[Member]:
        """The search over spikes, from what the members before it found; a network that draws
        random numbers has other ones in every forward.
        """
        if self.eot_samples > 1:
            return []
        attack = partial(spike_search, eps=self.threat, forwards=forwards)
        if self.batch_size is not None:
            attack = partial(attack, batch_size=min(2 * self.batch_size, PROPOSALS_AT_ONCE))
        return [replace(self.member("spike_search", attack), takes_starts=True)]

    def program(self) -> list[Member]:
        """The mixed-integer program on the images that are still correct, for small networks."""
        if self.eot_samples > 1 or self.threat.norm != "Linf":
            return []
        return [self.member("program", partial(program, eps=self.threat))]

    def _apgd(self, loss: Literal["ce", "dlr", "dlr_targeted"], steps: int) -> partial[Tensor]:
        noisy = expectation(self.eot_samples)
        return partial(apgd, eps=self.threat, loss=loss, steps=steps, **noisy)

    def flips(self, estimator: str, restart: int = 0, *, runs: int = 1) -> Member:
        attack = partial(
            event_attack(self.threat), restarts=runs, reduce=False, **confident(self.eot_samples)
        )
        return self.member(CHANGES[self.threat.norm], attack, estimator, restart)

    def flips_targeted(self, estimator: str) -> list[Member]:
        """The attack towards the likeliest wrong classes, which are others than the first only if
        there are three.
        """
        if self.classes < 3:
            return []
        targets = min(3, self.classes - 1)
        attack = partial(
            event_attack(self.threat),
            target_classes=targets,
            reduce=False,
            **confident(self.eot_samples),
        )
        return [self.member(f"{CHANGES[self.threat.norm]}_t", attack, estimator)]

    def random_flips(self, allow: Literal["both", "remove"]) -> Member:
        attack = partial(random_event_attack(self.threat, allow=allow), tries=200)
        attack = partial(attack, **self.averaged)
        if self.threat.norm == "moves":
            return self.member("random_moves", attack, restart=int(allow == "both"))
        return self.member(f"random_{allow}", attack)


def _with_transfer(suite: Suite, plan: _Plan, source: Model) -> Suite:
    """The suite with attacks crafted on another network, and with the same attacks on the network
    itself in its control.

    What is crafted there does not end at the border of the source, where nothing would transfer.
    The first attack stays the network's own, which also meets the images that are proved.
    """
    steps = 50 if suite.name == "fast" else 100
    if plan.threat.of_events:
        own = [plan.flips("training")]
        goes_on: dict[str, Any] = {"confidence": _FAR}
    else:
        own = [plan.ce("training", steps=steps), *plan.dlr("training", steps=steps)]
        own += plan.targeted("training", steps=steps)
        goes_on = {"keep_best": False}
    members, control = list(suite.members), list(suite.control)
    for place, member in enumerate(own, 1):
        kind = member.name.partition("/")[0]
        attack = transfer(source, partial(member.attack, **goes_on))
        group = suite.members[0].group
        members.insert(place, replace(member, name=f"transfer/{kind}", attack=attack, group=group))
        control.insert(place, replace(member, name=f"control/transfer/{kind}", group="control"))
    return replace(suite, members=tuple(members), control=tuple(control))


def _fast(plan: _Plan, chosen: tuple[str, ...]) -> Suite:
    best, second = chosen[0], chosen[1 % len(chosen)]
    ce = partial(plan.ce, steps=50)
    members = [ce(best)]
    if second != best:
        members.append(ce(second))
    members += plan.dlr(best, steps=50)
    if "training" not in (best, second):
        members.append(ce("training"))
    search = plan.spikes(2_000)
    members += search or [ce(best, 1), ce(best, 2)]
    members = plan.again(members)
    end = " and a short search over spikes" if search else ""
    description = (
        f"50 steps of APGD with {_listed(best, second)}{end}; a quick check, not a final figure"
    )
    return Suite(
        "fast",
        tuple(members),
        _control(members),
        description,
        EstimatorSearch(_FEW_CANDIDATES, images=32, steps=10, count=2, finalists=0),
    )


def _standard(plan: _Plan, chosen: tuple[str, ...]) -> Suite:
    members = [plan.ce(name) for name in chosen]
    members += plan.dlr(chosen[0])
    if "training" not in chosen:
        members.append(plan.ce("training"))
    for name in chosen[:2]:
        members += plan.targeted(name)
    search = plan.spikes(36_000)
    last = "a search over spikes that starts from their results"
    if not search:
        search = [plan.square(1000)]
        last = "Square"
    members = plan.again([*members, *search])
    control = _control(members)
    description = f"APGD-CE, APGD-DLR and APGD-T with {_listed(*chosen, 'training')}, then {last}"
    asked = plan.program()
    if asked:
        members += asked
        description += ", and for small networks a mixed-integer program"
    return Suite("standard", tuple(members), control, description, EstimatorSearch())


def _gradient(plan: _Plan, chosen: tuple[str, ...]) -> Suite:
    best, every = chosen[0], tuple(dict.fromkeys((*chosen, "training")))
    # A network that allows no other estimator than "training" may hold no spiking neuron at all.
    allows_assg = len(every) > 1 and "assg" not in plan.refused
    adaptive = next(filter(is_adaptive, every), "assg" if allows_assg else best)
    members = [plan.ce(name) for name in chosen]
    members += plan.dlr(best)
    members += [plan.ce(best, 1), plan.ce(best, 2)]
    members += plan.dlr(best, 1)
    if "training" not in chosen:
        members.append(plan.ce("training"))
    members += [plan.ce(name, 1) for name in chosen[1:]]
    for name in chosen:
        members += plan.targeted(name)
    members += plan.sapgd(adaptive)
    members = plan.again([*members, plan.square(1000)])
    description = (
        f"worst case of APGD-CE, APGD-DLR, APGD-T, SA-PGD and Square with {_listed(*every)}"
    )
    return Suite("gradient", tuple(members), _control(members), description, EstimatorSearch())


def _long(plan: _Plan, chosen: tuple[str, ...]) -> Suite:
    best = chosen[0]
    members = plan.sapgd(best, steps=1000)
    # if the best is "training", no other estimator may work for the network
    if best != "training" and "mixed" not in plan.refused:
        members += plan.sapgd("mixed", steps=1000)
    members = plan.again(members)
    names = [member.estimator for member in members]
    description = f"SA-PGD of 1,000 steps with {_listed(*names)}"
    search = EstimatorSearch(candidates=_SHARES, count=1)
    return Suite("long", tuple(members), _control(members), description, search)


def _paper(plan: _Plan) -> Suite:
    eps = plan.threat.eps
    scale = eps / _PAPER_EPS
    figures: dict[str, Attack] = {"fgsm": partial(fgsm, eps=eps)}
    for steps, size in _PAPER_STEPS.items():
        attack = partial(pgd, eps=eps, step_size=size * scale, steps=steps, **plan.averaged)
        figures |= {f"pgd{steps}": attack, f"pgd{steps}/last": partial(attack, keep_best=False)}
    for loss in ("ce", "dlr") if plan.classes > 2 else ("ce",):
        figures[f"apgd_{loss}"] = partial(
            apgd, eps=eps, loss=loss, steps=10, **expectation(plan.eot_samples)
        )
    members = [
        Member(name, attack, group="", threat=plan.threat) for name, attack in figures.items()
    ]
    control = _control(members)
    members.insert(0, Member("gaussian", partial(gaussian, std=eps), group=""))
    for level in range(10, 101, 10):
        radius = level / 255
        attack = partial(pgd, eps=radius, step_size=radius / 4, steps=10, **plan.averaged)
        members.append(
            Member(f"pgd10@{level}/255", attack, group="", threat=ThreatModel("Linf", radius))
        )
    description = (
        "the protocol of Ding et al. (ICML 2024): every attack on its own, with the "
        "training surrogate"
    )
    return Suite("paper", tuple(members), control, description)


def _autoattack(plan: _Plan) -> Suite:
    threat = plan.threat
    version: Version = "standard" if plan.eot_samples == 1 else "rand"
    member = plan.member("autoattack", partial(autoattack, eps=threat, version=version))
    targeted = partial(plan.targeted, "training", targets=9)
    spent = [plan.ce("training"), *targeted(0), *targeted(1)]
    spent += [plan.ce("training", restart) for restart in range(1, 21)]
    description = (
        "AutoAttack standard: APGD-CE, APGD-T, FAB-T and Square with the training surrogate"
    )
    return Suite("autoattack", (member,), _control(spent), description)


def _events(plan: _Plan, chosen: tuple[str, ...]) -> Suite:
    best = chosen[0]
    members = [plan.flips(name) for name in chosen]
    members.append(plan.random_flips("remove"))
    members.append(plan.flips(best, 1, runs=3))
    if "training" not in chosen:
        members.append(plan.flips("training"))
    members += [plan.flips(name, 1) for name in chosen[1:]]
    members += plan.flips_targeted(best)
    members.append(plan.random_flips("both"))
    members = plan.again([*members, plan.flips(best, 2, runs=3)])
    done = "added or removed" if plan.threat.norm == "L0" else "moved in time"
    description = (
        f"worst case over events {done}, at random and with {_listed(*chosen, 'training')}"
    )
    return Suite(
        "events",
        tuple(members),
        _control(members),
        description,
        EstimatorSearch(images=32, finalists=0),
    )


def _listed(*names: str) -> str:
    return ", ".join(dict.fromkeys(names))


def _gradients(plan: _Plan) -> Suite:
    members = [plan.ce(name) for name in _COMPARED]
    for name in ("training", "triangle:0.5", "atan:4", "assg"):
        members += plan.sapgd(name)
    allowed = [member for member in members if member.estimator not in plan.refused]
    alone = tuple(replace(member, group="") for member in allowed)
    control = _control([plan.ce("training", restart) for restart in range(5)])
    description = "every gradient estimator on its own, at an equal number of gradients"
    return Suite("gradients", alone, control, description)


def _control(members: Sequence[Member]) -> tuple[Member, ...]:
    """The same attacks at the same cost, all with the training surrogate and from other random
    starts.
    """
    runs: Counter[str] = Counter()
    control = []
    for member in members:
        kind = member.name.removesuffix(f"/{member.estimator}/r{member.seed}")
        name = (
            f"control/{member.name}"
            if kind == member.name
            else f"control/{kind}/training/r{runs[kind]}"
        )
        control.append(
            replace(member, name=name, estimator="training", group="control", seed=runs[kind])
        )
        runs[kind] += 1
    return tuple(control)
