"""A whole evaluation: activity, choice of estimators, attacks with their control, diagnosis,
report; attacks of your own alone; and a network under faults or corruptions.
"""

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from sj_robust.attacks.call import Model
from sj_robust.core.checks import check_count, check_labels, check_model, check_samples
from sj_robust.core.environment import device_of
from sj_robust.core.eps import eps_text, parse_eps, plain_eps
from sj_robust.core.preserved import preserved
from sj_robust.core.randomness import SampleSeeds, check_seeds
from sj_robust.core.threat import ThreatModel
from sj_robust.evaluation.diagnosis.activity import firing
from sj_robust.evaluation.diagnosis.masking import diagnose, estimators_searched
from sj_robust.evaluation.report.report import Report
from sj_robust.evaluation.report.verdict import masked
from sj_robust.evaluation.request import Request, described
from sj_robust.evaluation.result import OVER_EPS, Row
from sj_robust.evaluation.run.data import Batches, Data, check_data
from sj_robust.evaluation.run.draws import DRAWS, check_history, gradient_draws, settled_draws
from sj_robust.evaluation.run.estimator_search import (
    CHANGES,
    EstimatorSearch,
    EstimatorTrial,
    search_estimators,
    short_attack,
    short_attack_name,
)
from sj_robust.evaluation.run.faults import (
    Corruption,
    Fault,
    corrupted,
    default_corruptions,
    default_faults,
    faulty,
)
from sj_robust.evaluation.run.identity import identify, network_key
from sj_robust.evaluation.run.loop import Asked, Job, Outcome, releases, rows_of, run, run_batch
from sj_robust.evaluation.run.member import Member, Variant, fooled, refused
from sj_robust.evaluation.run.plain import plain_copy
from sj_robust.evaluation.run.progress import BatchLog, computed_once, gathered, rank_and_world_size
from sj_robust.evaluation.run.proofs import has_proofs, proof_row, prove
from sj_robust.evaluation.run.suites import (
    UNSEARCHED,
    Suite,
    SuiteName,
    allowed_by,
    check_shape,
    make_suite,
)
from sj_robust.evaluation.subject import Subject
from sj_robust.models.rates import rate_twin
from sj_robust.proofs.soundness import UnprovableError

__all__ = [
    "DIAGNOSED",
    "Softened",
    "assess",
    "stress_network",
    "worst_case",
]

_Found = TypeVar("_Found")

_FIRST = 256
"""Images that firing is counted on, estimators are chosen on and accuracy over eps is measured on,
at most.
"""
DIAGNOSED = 40
"""Images that are checked for gradient masking, at most."""
_SPREAD = 10.0
"""Of logits, whose probabilities float32 tells from 0 and 1."""
_FACTORS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Radii of accuracy over eps, in units of the threat's."""
_BOUND = "bound of all"
"""Name of the row of proved bounds among the attacks that moved the potential."""
_NOT_DIAGNOSED = (
    "Gradient masking was not checked: the diagnosis needs small changes of values, which binary "
    "events do not allow. The suite covers it with random changes, which need no gradient, and "
    "with its choice of estimators."
)


def assess(subject: Subject, batches: Batches | Data, request: Request) -> Report:
    """Evaluate a network and write the report. 完整评估并生成报告。

    In order: firing of every layer, proofs for Linf and L0 (images that no attack can break, and
    none needs to try), a search over gradient estimators (if the suite chooses), the suite and its
    control on all images, accuracy over eps, signs of gradient masking (not for event frames, as
    the report then says). Every part is saved in the folder of the request when it ends, and a
    call with the same request resumes a stopped one. Several processes share the images,
    and each gets the report.

    Args:
        subject: The network.
        batches: Test images with labels in batches, read once; binary event frames [N, T, 2, H, W]
            for the suite ``"events"``.
        request: What is asked.

    Raises:
        ValueError: If the network draws random numbers though one draw is asked for, or carries
            state from one forward into the next, or the folder holds the progress of another
            evaluation.

    Source: recommendations of Carlini et al., "On evaluating adversarial robustness" (arXiv
        1902.06705).

    Examples:
        >>> import torch
        >>> from sj_robust import DLIFNode, SpikingClassifier
        >>> net = nn.Sequential(nn.Flatten(2), nn.Linear(4, 3), DLIFNode(T=2))
        >>> mine = Subject("mine", SpikingClassifier(net, T=2), "one layer")
        >>> batches = [(torch.rand(6, 1, 2, 2), torch.arange(6) % 3)]
        >>> threat = ThreatModel("Linf", 0.1)
        >>> assess(mine, batches, Request("fast", threat, "noise", 3)).worst_case.total
        6
    """
    model = subject.model
    data = Data.of(batches)
    check_data(data, request.threat)
    say = request.watch.say
    draws = settled_draws(model, data, request.draws)
    if request.draws is None and draws > 1:
        check_shape(cast("SuiteName", request.suite), data[0][0], draws=draws)
        say(f"the network draws random numbers: {draws} forwards judge an image")
    reasons = refused(model, UNSEARCHED.get(request.suite, ()))
    told = "the surrogate model"
    if request.surrogate_model is None:
        request = replace(request, surrogate_model=rate_twin(model))
        told = "the network of its rates, which has a true gradient"
    suite = partial(_suite, request, draws, reasons, data.batch_size)
    plan = suite()
    key = network_key(model, data, request.folder)
    parts = _Parts(subject, data, request, draws, key)
    shared = [] if parts.plain is None else check_history(parts.plain, data)
    say(f"firing rates on {len(parts.y)} images")
    layers = firing(model, parts.x, seed=request.seed, batch_size=data.batch_size)
    activity = list(map(asdict, layers))
    proved = parts.proofs() if request.proofs and has_proofs(request.threat) else {}
    trials: list[dict[str, Any]] = []
    if plan.search is not None:
        trials = parts.search(plan.search)
        chosen = [row["estimator"] for row in trials if row["chosen"]]
        plan = suite(chosen)
    if request.surrogate_model is not None:
        crafted = [one.name for one in plan.members if one.name.startswith("transfer/")]
        there = f"{', '.join(crafted)} crafted on {told}"
        plan = replace(plan, description=f"{plan.description}; {there}")
    control = plan.control if request.control else ()
    say(
        f"suite {plan.name}: {plan.description}; {len(plan.members)} attacks and {len(control)} of "
        "the control"
    )
    verified = proved.get("verified", ())
    outcome = parts.run("suite", data, (*plan.members, *control), verified)
    rows = [*outcome.rows, *parts.rows_of_proofs(proved)]
    if request.radii or (request.checks and not _has_curve(rows, request.threat)):
        estimators = [row["estimator"] for row in trials if row["chosen"]]
        rows += parts.over_eps(estimators[0] if estimators else "training")
    unproved = ""
    if request.checks and "verified" in proved:
        more, unproved = parts.proofs_over_eps(rows)
        rows += more
    looks_for_masking = request.checks and not request.threat.of_events
    findings = parts.findings(trials) if looks_for_masking else []
    unseen = {text for row in outcome.potential for text in row["warnings"]}
    potential = [*outcome.potential, *proved.get("potential", ())]
    shown = ("member", "samples", "layers")
    report = Report(
        **described(subject, data, request, parts.network),
        rows=tuple(rows),
        description=plan.description,
        draws=draws,
        estimators=tuple(trials),
        firing=tuple(activity),
        findings=tuple(findings),
        potential=tuple({name: row[name] for name in shown} for row in potential),
        warnings=(
            *subject.remarks,
            *shared,
            *sorted(unseen.union(outcome.warnings)),
            *_left_out(reasons),
            *proved.get("reasons", ()),
            *([unproved] if unproved else []),
            *_of_few_classes(data.labels, parts.y.tolist()),
            *([_NOT_DIAGNOSED] if request.threat.of_events else []),
        ),
    )
    return parts.with_plain_attacks(report, plan.plain, verified) if masked(report) else report


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


def stress_network(subject: Subject, batches: Batches | Data, request: Request) -> Report:
    """Measure a network under faults or corruptions and write the report. 压力测试。

    Every step is kept in the folder of the request as it ends, and a call with the same request
    continues where a killed one stopped. Several processes share the levels, and each gets the
    report. The network stays as it was: faults are those of a copy. What cannot be measured is
    named in the warnings.

    Args:
        subject: The network.
        batches: Images with labels in batches, read once.
        request: What is asked; the attack is crafted on the faulty network, or from the corrupted
            images: APGD-CE of so many steps (``flip_events`` or ``move_events`` for events).

    Raises:
        ValueError: If the network carries state from one forward into the next, or the folder holds
            the progress of another run.

    Source: as of :func:`sj_robust.evaluation.stress`.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from sj_robust.attacks import ThreatModel
        >>> from sj_robust.classifier import SpikingClassifier
        >>> net = SpikingClassifier(nn.Sequential(nn.Flatten(2), nn.Linear(4, 3)), T=2)
        >>> mine = Subject("mine", net, "one layer")
        >>> batches = [(torch.rand(6, 1, 2, 2), torch.arange(6) % 3)]
        >>> few = [Fault("weight_bits", 4), Fault("first_steps", 1)]
        >>> asked = Request("stress", ThreatModel("Linf", 0.1), "noise", faults=few)
        >>> stress_network(mine, batches, asked).variants
        ('none', 'weight_bits:4', 'first_steps:1')
    """
    data = Data.of(batches)
    check_data(data, request.threat)
    faults = request.faults
    if faults is None and request.suite == "stress":
        faults = default_faults(subject.model)
    elif faults is None:
        faults = default_corruptions(data[0][0])
    kinds = {fault.kind for fault in faults}
    request.watch.say(f"{request.suite}: {len(faults)} levels of {len(kinds)} kinds")
    draws = settled_draws(subject.model, data, None)
    if draws > 1:
        request.watch.say(f"the network draws random numbers: {draws} forwards judge an image")
    network = network_key(subject.model, data, request.folder)
    with preserved(subject.model):
        outcome = run(
            subject.model,
            data,
            _variants(faults, request, draws),
            asked=Asked(request.threat, draws),
            network=network,
            folder=request.folder,
            watch=request.watch,
        )
    judged = f", judged over {draws} draws" if draws > 1 else ""
    return Report(
        **described(subject, data, request, network),
        rows=outcome.rows,
        description=f"{short_attack_name(request.threat)} {request.steps}{judged}",
        draws=request.draws or 1,
        warnings=(*subject.remarks, *outcome.warnings),
    )


class _Parts:
    """Parts of an evaluation that take long; what one has found is kept in a file."""

    def __init__(
        self, subject: Subject, data: Data, request: Request, draws: int, network: str
    ) -> None:
        self.model = subject.model
        self.plain = None if subject.plain is None else subject.plain.to(device_of(self.model))
        self.data = data
        self.request = request
        self.draws = draws
        self.network = network
        self.few = data.first(_FIRST)
        self.x, self.y = self.few.tensors(device_of(self.model))
        self.threat = request.threat
        self.say = request.watch.say

    @cached_property
    def key(self) -> dict[str, str]:
        """What decides every part, by name."""
        return {
            "network": self.network,
            "data": self.data.fingerprint,
            "threat": repr(self.threat),
            "seed": str(self.request.seed),
            "releases": releases(),
            "draws": str(self.draws),
        }

    def search(self, settings: EstimatorSearch) -> list[dict[str, Any]]:
        """Trials of the gradient estimators; none if the network gets no image right."""
        names = {"training", *settings.candidates}
        self.say(f"choosing among {len(names)} gradient estimators")
        draws = self.draws

        def compute() -> list[dict[str, Any]]:
            seeds = SampleSeeds(range(len(self.y))).derived("sweep", self.request.seed)
            wrong = fooled(
                self.model,
                self.x,
                self.y,
                draws=draws,
                seeds=seeds,
                batch_size=self.data.batch_size,
            )
            if bool(wrong.all()):
                return []
            trials = search_estimators(
                self.model,
                self.x,
                self.y,
                threat=self.threat,
                settings=settings,
                draws=draws,
                seeds=seeds,
                batch_size=self.data.batch_size,
            )
            return [asdict(trial) for trial in trials]

        key = self.key | {"settings": repr(settings)}
        return self._computed_once("estimators.json", key, compute)

    def proofs(self) -> dict[str, Any]:
        """Images that are verified, how far the potential can move, and seconds; or why nothing
        could be proved.
        """
        self.say(f"proofs at {self.threat.norm} {eps_text(self.threat.eps)}")

        def compute() -> dict[str, Any]:
            start = time.perf_counter()
            try:
                found = prove(self.model, self.data, [self.threat.eps], self.threat)
            except (NotImplementedError, UnprovableError) as error:
                return {"reasons": [f"Nothing could be proved: {error}."]}
            (verified,) = found.verified.values()
            bound = {"member": _BOUND, "samples": found.total, "layers": found.potential}
            potential = [bound] if found.potential else []
            seconds = time.perf_counter() - start
            return {"verified": verified, "potential": potential, "seconds": seconds}

        return self._computed_once("proofs.json", self.key, compute)

    def rows_of_proofs(self, proved: Mapping[str, Any]) -> list[Row]:
        """The row of the proofs at the threat's radius, if there are any."""
        if "verified" not in proved:
            return []
        row = proof_row(self.threat, len(self.data.labels), proved["verified"])
        return [replace(row, seconds=proved["seconds"])]

    def proofs_over_eps(self, rows: Sequence[Row]) -> tuple[list[Row], str]:
        """Proofs at the radii of accuracy over eps, of the first images; or none, and why: a
        network may do something else at a radius beyond that of the threat.
        """
        self.say("proofs over eps")
        levels = [row for row in rows if row.attacks and "@" in row.member]
        radii = {row.eps or 0.0 for row in levels}
        if not self.threat.of_events:  # a threat of events changes one or more
            radii.add(0.0)
        names = [eps_text(eps) for eps in sorted(radii)]

        def compute() -> dict[str, tuple[int, ...]] | str:
            radii = list(map(parse_eps, names))
            try:
                found = prove(self.model, self.few, radii, self.threat)
            except (NotImplementedError, UnprovableError) as error:
                return f"Nothing could be proved over eps: {error}."
            return dict(found.verified)

        key = self.key | {"radii": ", ".join(names)}
        verified = self._computed_once("proofs_over_eps.json", key, compute)
        if isinstance(verified, str):
            return [], verified
        found = []
        if OVER_EPS not in {row.variant for row in rows}:
            found.append(_on_the_first(rows[0], len(self.y)))
        for eps, numbers in verified.items():
            threat = replace(self.threat, eps=parse_eps(eps))
            row = proof_row(threat, len(self.y), numbers)
            found.append(replace(row, variant=OVER_EPS))
        return found, ""

    def run(
        self, name: str, data: Data, members: Sequence[Member], verified: Sequence[int]
    ) -> Outcome:
        """Run members on images."""
        asked = Asked(self.threat, self.draws, frozenset(verified))
        return self._run(name, data, Variant(members, seed=self.request.seed), asked)

    def over_eps(self, estimator: str) -> tuple[Row, ...]:
        """Accuracy over eps, from a short attack at every radius."""
        of_events = self.threat.of_events
        self.say("accuracy over the number of changes" if of_events else "accuracy over eps")
        radii = self.request.radii or _radii(self.threat, elements=self.x[0].numel())
        threats = [replace(self.threat, eps=eps) for eps in radii]
        samples = gradient_draws(self.draws, self.threat)
        levels = [_level(threat, estimator, samples) for threat in threats]
        variant = Variant(levels, OVER_EPS, seed=self.request.seed)
        widest = Asked(replace(self.threat, eps=max(radii)), self.draws)
        return self._run("over_eps", self.few, variant, widest).rows

    def findings(self, trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Checks for gradient masking; what a search has tried is not attacked again."""
        self.say("checks for gradient masking")
        source = self.request.surrogate_model
        searched = estimators_searched([EstimatorTrial(**trial) for trial in trials])

        def compute() -> list[dict[str, Any]]:
            found = diagnose(
                self.model,
                self.x[:DIAGNOSED],
                self.y[:DIAGNOSED],
                threat=self.threat,
                seed=self.request.seed,
                estimators=None if searched else (),
                source=source,
                plain=self.plain,
                eot_samples=gradient_draws(self.draws, self.threat),
            )
            return [asdict(finding) for finding in (*found, *searched)]

        of_source = {}
        if source is not None:
            of_source["source"] = identify(source, self.data).fingerprint
        return self._computed_once("findings.json", self.key | of_source, compute)

    def with_plain_attacks(
        self, report: Report, members: Sequence[Member], verified: Sequence[int]
    ) -> Report:
        """The report with attacks on a plain copy of the network, those that it allows, on the
        images that the suite has left.
        """
        allowed = allowed_by(self.plain, members, self.x)
        if not allowed:
            return report
        self.say("signs of gradient masking: attacks on a plain copy of the network")
        left = report.standing("worst case").difference(verified)
        others = frozenset(range(len(report.labels))) - left
        variant = Variant(allowed, "plain", self.request.seed, wrong=others)
        asked = Asked(self.threat, self.draws)
        model = self.model if self.plain is None else self.plain
        outcome = self._run("plain", self.data, variant, asked, Softened(model))
        rows = [replace(row, variant=report.main) for row in outcome.rows[1:]]
        return replace(
            report,
            rows=(*report.rows, *rows),
            description=f"{report.description}; as gradients may be masked, also attacks on "
            f"{'the network itself' if self.plain is None else 'a plain copy of the network'}",
            warnings=(*report.warnings, *outcome.warnings),
        )

    def _run(
        self,
        name: str,
        data: Data,
        variant: Variant,
        asked: Asked,
        model: nn.Module | None = None,
    ) -> Outcome:
        return run(
            self.model if model is None else model,
            data,
            [variant],
            asked=asked,
            network=self.network,
            plain=self.plain,
            folder=self.request.folder and self.request.folder / name,
            watch=self.request.watch,
        )

    def _computed_once(
        self, name: str, key: Mapping[str, str], compute: Callable[[], _Found]
    ) -> _Found:
        """What the first process computes or an earlier run has computed, on every process."""
        rank, _ = rank_and_world_size()
        found: dict[int, _Found] = {}
        if rank == 0:
            folder = self.request.folder
            found[0] = computed_once(folder and folder / name, key, compute)
        return gathered(found)[0]


class Softened(nn.Module):
    """A network whose cross entropy does not vanish: logits that lie apart are shrunk."""

    def __init__(self, network: nn.Module) -> None:
        """Wrap a network."""
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes], those of an image within ``_SPREAD``."""
        logits: Tensor = self.network(images)
        spread = (logits.amax(1, keepdim=True) - logits.amin(1, keepdim=True)).detach()
        return logits * (_SPREAD / spread.clamp(min=_SPREAD))


def _suite(
    request: Request,
    draws: int,
    without: Collection[str],
    batch_size: int,
    chosen: Sequence[str] = (),
) -> Suite:
    return make_suite(
        cast("SuiteName", request.suite),
        request.threat,
        chosen=chosen,
        classes=request.classes,
        eot_samples=gradient_draws(draws, request.threat),
        rounds=request.rounds,
        refused=without,
        batch_size=batch_size,
        surrogate_model=request.surrogate_model,
    )


def _left_out(reasons: Mapping[str, str]) -> list[str]:
    """Which estimators a suite would use, beside those of a search, if the network allowed it."""
    return [f"Estimator {name} was left out: {reason}." for name, reason in reasons.items()]


def _of_few_classes(labels: Sequence[int], first: Sequence[int]) -> list[str]:
    """Says so where the first images hold fewer than half of the classes that they could."""
    number, every = len(set(first)), len(set(labels))
    if 2 * number >= min(every, len(first)):
        return []
    return [
        f"The first {len(first)} images, on which firing, estimators, accuracy over eps and the "
        f"checks were measured, hold {number} of {every} classes: shuffle the images."
    ]


def _on_the_first(row: Row, count: int) -> Row:
    """The row of the clean images for the first ones alone."""
    fell = [number for number in row.fell if number < count]
    return replace(row, variant=OVER_EPS, seen=tuple(range(count)), fell=tuple(fell))


def _has_curve(rows: Sequence[Row], threat: ThreatModel) -> bool:
    """Whether members of the suite have other radii than the threat, such as the paper's."""
    radii = {row.eps for row in rows if row.attacks and "@" in row.member}
    return len(radii - {None, threat.eps}) >= 2


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


def _variants(
    faults: Sequence[Fault | Corruption], request: Request, draws_of_network: int
) -> list[Variant]:
    """The network as it is, then every draw of every level."""
    first = request.seed * 2**10
    network_is_noisy = draws_of_network > 1
    attack = [_attack(request, noisy=network_is_noisy)]
    found = [Variant(attack, "none", first)]
    for fault in faults:
        name = f"{fault.kind}:{fault.level}"
        if isinstance(fault, Corruption):
            images = _Corrupted(fault, request.seed)
            found.append(Variant(attack, name, first, images=images))
            continue
        draws = (request.draws or 1) if fault.random else 1
        members = [_attack(request, noisy=fault.noisy or network_is_noisy)]
        for draw in range(draws):
            seed = first + draw
            place = name if draws == 1 else f"{name}/draw{draw}"
            network = partial(faulty, fault=fault, seed=seed, counts=request.threat.counts)
            found.append(Variant(members, place, seed, network=network, may_draw=fault.noisy))
    return found


def _attack(request: Request, *, noisy: bool) -> Member:
    threat = request.threat
    draws = gradient_draws(DRAWS, threat) if noisy else 1
    attack = short_attack(threat, request.steps, draws=draws)
    return Member(f"short@{eps_text(threat.eps)}", attack, threat=threat)


@dataclass(frozen=True)
class _Corrupted:
    """Images with a corruption."""

    corruption: Corruption
    seed: int

    def __call__(self, x: Tensor, start: int) -> Tensor:
        return corrupted(x, self.corruption, seed=self.seed, start=start)
