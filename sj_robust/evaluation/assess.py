"""A whole evaluation: activity, choice of estimators, attacks with their control, diagnosis,
report.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from sj_robust.attacks.bridges import transfer
from sj_robust.attacks.events import check_frames
from sj_robust.attacks.threat import ThreatModel, eps_text, parse_eps
from sj_robust.core.environment import device_of, environment
from sj_robust.core.eps import plain_eps
from sj_robust.core.randomness import SampleSeeds
from sj_robust.evaluation.activity import firing
from sj_robust.evaluation.data import Batches, Data
from sj_robust.evaluation.draws import check_draws
from sj_robust.evaluation.estimator_search import (
    CHANGES,
    EstimatorSearch,
    event_attack,
    search_estimators,
    short_attack,
    short_attack_name,
)
from sj_robust.evaluation.identity import identify, network_key
from sj_robust.evaluation.masking import diagnose
from sj_robust.evaluation.member import Member, fooled
from sj_robust.evaluation.outcome import MemberOutcome, SuiteOutcome
from sj_robust.evaluation.progress import Position, computed_once, gathered, rank_and_world_size
from sj_robust.evaluation.proofs import check_proofs, prove
from sj_robust.evaluation.robustness_report import RobustnessReport
from sj_robust.evaluation.runner import releases, run_on_data
from sj_robust.evaluation.subject import Subject, describe_network
from sj_robust.evaluation.suites import Suite, SuiteName, make_suite

__all__ = ["assess"]

_Found = TypeVar("_Found")

_FIRST = 256
"""Images that firing is counted on, estimators are chosen on and accuracy over eps is measured on,
at most.
"""
_DIAGNOSED = 40
_FAR = 1e6
"""A lead of a wrong class that no network gives."""
_FACTORS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Radii of accuracy over eps, in units of the threat's."""
_BOUND = "bound of all"
"""What stands among the attacks that moved the potential for the bounds of every perturbation."""
_NOT_DIAGNOSED = (
    "Signs of gradient masking were not looked for: the diagnosis moves values a little, and "
    "events cannot. The random changes of the suite, which need no gradient, and its choice of "
    "estimators stand in for it."
)


def assess(
    subject: Subject,
    batches: Batches | Data,
    *,
    suite: SuiteName,
    threat: ThreatModel,
    dataset: str,
    classes: int,
    seed: int = 0,
    draws: int = 1,
    source: nn.Module | None = None,
    proofs: bool = True,
    control: bool = True,
    folder: Path | None = None,
    configuration: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
    on_step: Callable[[Position], None] | None = None,
) -> RobustnessReport:
    """Evaluate a network and write the report. 完整评估并生成报告。

    In order: firing of every layer, proofs for Linf (images that no attack can break, and none
    needs to try), a search over gradient estimators (if the suite chooses), the suite and its
    control on all images, accuracy over eps, signs of gradient masking (not for event frames, as
    the report then says). Every part is kept in ``folder`` as it ends, and a call with the same
    arguments goes on where a killed one stopped. Several processes share the images, see
    ``run_suite``, and each gets the report.

    Args:
        subject: The network.
        batches: Test images with labels in batches, read once; binary event frames [N, T, 2, H, W]
            for the suite ``"events"``.
        suite: Name of the suite.
        threat: Norm and radius, > 0; for the suite ``"events"`` ``ThreatModel("L0", k)`` or one of
            moves.
        dataset: Name of the data set.
        classes: Number of classes.
        seed: Seeds everything.
        draws: Fresh forwards in each of which a stochastic network must be wrong, and which its
            gradients are averaged over; 1 for a network that draws no random numbers, as every
            image is asked twice to check.
        source: Another network for the same images; transfer attacks from it join the suite.
        proofs: Whether images are verified, where threat and network have bounds.
        control: Whether the control of the suite runs too.
        folder: Where progress is kept; None keeps none.
        configuration: Options of the run, for the report.
        say: Called with a line for each part.
        on_step: Called after every step of the suite.

    Raises:
        ValueError: If an argument is wrong, the network draws random numbers without ``draws`` or
            carries state from one forward into the next, or the folder holds the progress of
            another evaluation.

    Source: evaluation as asked for by Carlini et al., "On evaluating adversarial robustness" (arXiv
        1902.06705).

    Examples:
        >>> import torch
        >>> from sj_robust import DLIFNode, SpikingClassifier
        >>> net = nn.Sequential(nn.Flatten(2), nn.Linear(4, 3), DLIFNode(T=2))
        >>> mine = Subject("mine", SpikingClassifier(net, T=2), "one layer")
        >>> batches = [(torch.rand(6, 1, 2, 2), torch.arange(6) % 3)]
        >>> report = assess(
        ...     mine,
        ...     batches,
        ...     suite="fast",
        ...     threat=ThreatModel("Linf", 0.1),
        ...     dataset="noise",
        ...     classes=3,
        ... )
        >>> report.worst_case.total
        6
    """
    kind: dict[str, Any] = {"classes": classes, "eot_samples": draws}
    plan = make_suite(suite, threat, **kind)
    model = subject.model
    data = Data.of(batches)
    few = data.first(_FIRST)
    x, y = few.tensors(device_of(model))
    if threat.of_events:
        check_frames(x)
    if draws == 1:
        check_draws(model, data)
    key = {
        "network": network_key(model, data, folder),
        "data": data.fingerprint,
        "threat": repr(threat),
        "seed": str(seed),
        "releases": releases(),
        "draws": str(draws),
    }
    parts = _Parts(
        model=model,
        data=data,
        few=few,
        x=x,
        y=y,
        threat=threat,
        seed=seed,
        draws=draws,
        key=key,
        folder=folder,
        say=say,
        on_step=on_step,
    )

    say(f"firing of every layer on {len(x)} images")
    activity = [asdict(layer) for layer in firing(model, x, seed=seed)]
    proved = parts.proofs() if proofs and threat.norm == "Linf" else {}
    verified = proved.get("verified")
    rows = [] if plan.search is None else parts.search(plan.search)
    chosen = [row["estimator"] for row in rows if row["chosen"]]
    if plan.search is not None:
        plan = make_suite(suite, threat, chosen=chosen, **kind)
    if source is not None:
        plan = _with_transfer(plan, source, threat)
    if not control:
        plan = replace(plan, control=())
    say(
        f"suite {plan.name}: {plan.description}; {len(plan.members)} attacks, "
        f"{len(plan.control)} of the control"
    )
    outcome = parts.run(
        "suite", data, (*plan.members, *plan.control), threat=threat, verified=verified or ()
    )
    curve, levels = _curve_of(outcome, threat), outcome.members
    if not curve:
        curve, levels = parts.over_eps(chosen[0] if chosen else "training")
    band = [] if verified is None else parts.proofs_over_eps(curve, levels)
    findings = parts.findings(source) if not threat.of_events else []
    network = {
        "architecture": subject.architecture,
        "fingerprint": key["network"],
    } | describe_network(model)
    unseen = sorted(
        {text for row in outcome.potential for text in row["warnings"]} | set(outcome.warnings)
    )
    return RobustnessReport(
        name=subject.name,
        dataset=dataset,
        threat=threat,
        suite=plan.name,
        classes=classes,
        labels=outcome.labels,
        correct=outcome.correct,
        members=outcome.members,
        seed=seed,
        draws=draws,
        network=network,
        data=data.fingerprint,
        estimators=tuple(rows),
        verified=verified,
        verified_seconds=proved.get("seconds", 0.0),
        over_eps=tuple(curve),
        verified_over_eps=tuple(band),
        firing=tuple(activity),
        findings=tuple(findings),
        potential=tuple(
            {name: row[name] for name in ("member", "samples", "layers")}
            for row in (*outcome.potential, *proved.get("potential", ()))
        ),
        configuration=dict(configuration or {}),
        environment=environment(x.device) | {"processes": str(rank_and_world_size()[1])},
        warnings=(
            *unseen,
            *proved.get("reasons", ()),
            *([_NOT_DIAGNOSED] if threat.of_events else []),
        ),
    )


@dataclass(frozen=True)
class _Parts:
    """Parts of an evaluation that take long, and what each of them needs; what one has found is
    kept in a file.
    """

    model: nn.Module
    data: Data
    few: Data
    x: Tensor
    y: Tensor
    threat: ThreatModel
    seed: int
    draws: int
    key: dict[str, str]
    folder: Path | None
    say: Callable[[str], None]
    on_step: Callable[[Position], None] | None

    def search(self, settings: EstimatorSearch) -> list[dict[str, Any]]:
        """Trials of the gradient estimators, strongest first; none if the network gets no image
        right.
        """
        self.say(f"choosing among {len(settings.candidates)} gradient estimators")

        def compute() -> list[dict[str, Any]]:
            few, seeds = (
                (self.model, self.x, self.y),
                SampleSeeds(range(len(self.y))).derived("sweep", self.seed),
            )
            if bool(fooled(*few, draws=self.draws, seeds=seeds).all()):
                return []
            attack = short_attack(self.threat, settings.steps, draws=self.draws)
            trials = search_estimators(
                *few,
                threat=self.threat,
                settings=settings,
                attack=attack,
                draws=self.draws,
                seeds=seeds,
            )
            return [asdict(trial) for trial in trials]

        return self._computed_once(
            "estimators.json", self.key | {"settings": repr(settings)}, compute
        )

    def proofs(self) -> dict[str, Any]:
        """Images that are verified, how far the potential can move, seconds; or why nothing is
        proved.
        """
        self.say(f"proofs at Linf {eps_text(self.threat.eps)}")

        def compute() -> dict[str, Any]:
            start = time.perf_counter()
            try:
                found = prove(self.model, self.data, [self.threat.eps])
            except (NotImplementedError, TypeError, ValueError) as error:
                return {"reasons": [f"Nothing is proved: {error}."]}
            (verified,) = found.verified.values()
            bound = {"member": _BOUND, "samples": found.total, "layers": found.potential}
            return {
                "verified": verified,
                "potential": [bound] if found.potential else [],
                "seconds": time.perf_counter() - start,
            }

        return self._computed_once("proofs.json", self.key, compute)

    def proofs_over_eps(
        self, curve: Sequence[Mapping[str, Any]], levels: Sequence[MemberOutcome]
    ) -> list[dict[str, Any]]:
        """Rows of what is verified at the radii of a curve; ValueError if an attack of it breaks
        such an image.
        """
        self.say("proofs over eps")
        radii = [row["eps"] for row in curve]
        verified = self._computed_once(
            "proofs_over_eps.json",
            self.key | {"radii": ", ".join(radii)},
            lambda: dict(prove(self.model, self.few, [parse_eps(eps) for eps in radii]).verified),
        )
        for eps, numbers in verified.items():
            check_proofs(levels, numbers, parse_eps(eps))
        return [
            {"eps": eps, "verified": len(numbers), "total": len(self.y)}
            for eps, numbers in verified.items()
        ]

    def run(self, name: str, data: Data, members: Sequence[Member], **what: Any) -> SuiteOutcome:
        folder = self.folder and self.folder / name
        return run_on_data(
            self.model,
            data,
            members,
            network=self.key["network"],
            seed=self.seed,
            folder=folder,
            draws=self.draws,
            on_step=self.on_step,
            **what,
        )

    def over_eps(self, estimator: str) -> tuple[list[dict[str, Any]], tuple[MemberOutcome, ...]]:
        """Accuracy over eps, from a short attack at every radius; and what each of these did."""
        self.say(
            "accuracy over the number of changes" if self.threat.of_events else "accuracy over eps"
        )
        radii = _radii(self.threat, elements=self.x[0].numel())
        levels = [
            _level(replace(self.threat, eps=radius), estimator, self.draws) for radius in radii
        ]
        widest = replace(self.threat, eps=max(radii))
        outcome = self.run("over_eps", self.few, levels, threat=widest)
        kind = short_attack_name(self.threat) + ("" if self.threat.of_events else " 20")
        return _curve(
            outcome, outcome.members, [f"{kind}, {estimator}"] * len(levels)
        ), outcome.members

    def findings(self, source: nn.Module | None) -> list[dict[str, Any]]:
        self.say("signs of gradient masking")

        def compute() -> list[dict[str, Any]]:
            x, y, samples = self.x[:_DIAGNOSED], self.y[:_DIAGNOSED], 10 if self.draws > 1 else 1
            found = diagnose(
                self.model,
                x,
                y,
                threat=self.threat,
                seed=self.seed,
                source=source,
                eot_samples=samples,
            )
            return [asdict(finding) for finding in found]

        of_source = {}
        if source is not None:
            of_source["source"] = identify(source, self.data).fingerprint
        return self._computed_once("findings.json", self.key | of_source, compute)

    def _computed_once(
        self, name: str, key: Mapping[str, str], compute: Callable[[], _Found]
    ) -> _Found:
        """What the first process computes or an earlier run has computed, on every process."""
        rank, _ = rank_and_world_size()
        found: dict[int, _Found] = {}
        if rank == 0:
            found[0] = computed_once(self.folder and self.folder / name, key, compute)
        return gathered(found)[0]


def _with_transfer(suite: Suite, source: nn.Module, threat: ThreatModel) -> Suite:
    """The suite with attacks crafted on another network, and with those of the same cost in its
    control.
    """
    attack = short_attack(threat, 50)
    if threat.of_events:  # without an end at the border of the source, where nothing would transfer
        attack = partial(event_attack(threat), confidence=_FAR, reduce=False)
    kind = CHANGES.get(threat.norm, "apgd_ce")
    crafted = Member(f"transfer/{kind}", transfer(source, attack), group="transfer", threat=threat)
    own = Member("control/transfer", attack, group="control", threat=threat)
    return replace(suite, members=(*suite.members, crafted), control=(*suite.control, own))


def _radii(threat: ThreatModel, *, elements: int) -> list[float]:
    """Radii of accuracy over eps; none beyond that with which every image is within reach."""
    if threat.of_events:
        return sorted({min(elements, math.ceil(factor * threat.eps)) for factor in _FACTORS})
    limit = 1.0 if threat.norm == "Linf" else float("inf")
    return sorted({min(limit, plain_eps(factor * threat.eps)) for factor in _FACTORS})


def _level(threat: ThreatModel, estimator: str, draws: int) -> Member:
    """A short attack at one radius; all are in one group: what has fallen at one has fallen at
    every larger one.
    """
    name = f"{CHANGES.get(threat.norm, 'apgd')}20@{eps_text(threat.eps)}"
    attack = short_attack(threat, 20, draws=draws, queries=100)
    return Member(name, attack, estimator, group="over_eps", threat=threat)


def _curve_of(outcome: SuiteOutcome, threat: ThreatModel) -> list[dict[str, Any]]:
    """Accuracy over eps from the members of a suite that have other radii than the threat, such as
    the paper's.
    """
    members = [
        member for member in outcome.members if "@" in member.name and member.eps is not None
    ]
    if len({member.eps for member in members} - {threat.eps}) < 2:
        return []
    return _curve(outcome, members, [member.name.partition("@")[0] for member in members])


def _curve(
    outcome: SuiteOutcome, members: Sequence[MemberOutcome], attacks: Sequence[str]
) -> list[dict[str, Any]]:
    """Rows of accuracy over eps; in a group every member begins with what the earlier ones left."""
    correct, total = len(outcome.correct), len(outcome.labels)
    rows: list[dict[str, Any]] = [
        {"eps": "0", "attack": "clean", "correct": correct, "total": total}
    ]
    for member, attack in zip(members, attacks, strict=True):
        left = (rows[-1]["correct"] if member.group else correct) - len(member.fooled)
        rows.append(
            {"eps": eps_text(member.eps or 0.0), "attack": attack, "correct": left, "total": total}
        )
    return rows
