"""Exact robust accuracy of a small network beside that under attacks: how far does each attack
overstate it?
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from sj_robust.attacks import ThreatModel
from sj_robust.classifier import SpikingClassifier
from sj_robust.core.saved import SavedResult, markdown_table
from sj_robust.evaluation import Report
from sj_robust.evaluation.assess import assess
from sj_robust.evaluation.request import Request
from sj_robust.evaluation.run.progress import Watch
from sj_robust.evaluation.subject import Subject
from sj_robust.proofs import verify
from sj_robust.proofs.verification import Verification


@dataclass(frozen=True)
class AttackOnTruth:
    """Images that one attack, or a suite as a whole, does not break.

    Attributes:
        eps: Radius.
        suite: Name of the suite.
        attack: Name of the attack, or ``"worst case"``, ``"control"`` or ``"everything"`` of the
            suite.
        left: Number of images that are classified correctly under it.
        missed: Number of those that are known to be broken by something else.
    """

    eps: float
    suite: str
    attack: str
    left: int
    missed: int


@dataclass(frozen=True)
class Truth:
    """What is known of a network at one radius.

    Attributes:
        eps: The radius.
        verified: Number of images that are proved to be robust.
        broken: Number of images that are classified wrongly, or that the mixed-integer program or
            an attack breaks.
        by_program_alone: Number of those that no attack breaks.
    """

    eps: float
    verified: int
    broken: int
    by_program_alone: int


@dataclass(frozen=True)
class GroundTruth(
    SavedResult, what="the numbers of a figure", format="sj_robust.figure.ground_truth", version=1
):
    """Exact robust accuracy beside every attack, estimator and suite.

    Attributes:
        network: Name of the network.
        images: Number of images.
        clean: Number of images that are classified correctly without a perturbation.
        truths: What is known, per radius.
        attacks: What each attack leaves, at every radius.
    """

    network: str
    images: int
    clean: int
    truths: tuple[Truth, ...]
    attacks: tuple[AttackOnTruth, ...]

    def __post_init__(self) -> None:
        # rows that were read from a file are dictionaries
        truths = [Truth(**row) if isinstance(row, dict) else row for row in self.truths]
        attacks = [AttackOnTruth(**row) if isinstance(row, dict) else row for row in self.attacks]
        object.__setattr__(self, "truths", tuple(truths))
        object.__setattr__(self, "attacks", tuple(attacks))

    def table(self) -> str:
        """Markdown: per radius what is known, and a row per attack, those that miss least first."""
        parts = [f"{self.network}: {self.images} images, {self.clean} classified correctly."]
        for truth in self.truths:
            parts += [self._sentence(truth), self._attacks_table(truth.eps)]
        return "\n\n".join(parts)

    def _sentence(self, truth: Truth) -> str:
        low = self._percent(truth.verified)
        high = self._percent(self.images - truth.broken)
        exact = f"{low} %" if truth.verified + truth.broken == self.images else f"{low} to {high} %"
        return (
            f"Linf {truth.eps:.6g}: robust accuracy {exact}; {truth.by_program_alone} images "
            "broken by the program alone."
        )

    def _attacks_table(self, eps: float) -> str:
        attacks = [attack for attack in self.attacks if attack.eps == eps]
        attacks.sort(key=lambda attack: (attack.missed, attack.suite))
        rows = []
        for attack in attacks:
            left = self._percent(attack.left)
            missed = self._percent(attack.missed)
            rows.append([attack.suite, attack.attack, left, missed])
        heads = ["suite", "attack", "accuracy, %", "broken images that it misses, %"]
        return markdown_table(heads, rows, words=2)

    def _percent(self, count: int) -> str:
        return f"{100 * count / self.images:.1f}"


def ground_truth(
    subject: Subject,
    x: Tensor,
    y: Tensor,
    eps: Sequence[float],
    *,
    suites: Sequence[str],
    time_limit: float,
    dataset: str,
    classes: int,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> GroundTruth:
    """Solve the mixed-integer program of every image, run the suites, and compare the two.

    Raises:
        RuntimeError: If an attack breaks an image that is verified, so that one of the two is
            faulty.
        TypeError: If the network is not a SpikingClassifier.
    """
    truths = []
    attacks = []
    clean = 0
    model = subject.model
    if not isinstance(model, SpikingClassifier):
        raise TypeError(
            f"the network must be a SpikingClassifier for proofs, got {type(model).__name__}"
        )
    for size in eps:
        proofs = verify(model, x, y, size, method="mip", time_limit=time_limit)
        clean = sum(proofs.correct)
        say(proofs.table().splitlines()[0])
        batches = DataLoader(TensorDataset(x, y), batch_size=128)
        # An evaluation with proofs would spare the images that it verifies; here every attack is to
        # try them.
        request = Request(
            "",
            ThreatModel("Linf", size),
            dataset,
            classes,
            seed=seed,
            proofs=False,
            watch=Watch(say),
        )
        reports = [assess(subject, batches, replace(request, suite=suite)) for suite in suites]
        truth, rows = beside(proofs, reports)
        truths.append(truth)
        attacks += rows
    return GroundTruth(subject.name, len(x), clean, tuple(truths), tuple(attacks))


def beside(proofs: Verification, reports: Sequence[Report]) -> tuple[Truth, list[AttackOnTruth]]:
    """What proofs and attacks together tell of the images, and what each attack leaves."""
    images = set(range(len(proofs.margin)))
    verified = {image for image in images if proofs.verified[image]}
    broken_by_program = {image for image in images if proofs.broken[image]}
    broken_by_attacks: set[int] = set()
    for report in reports:
        broken_by_attacks |= images - report.standing("everything")
    contradicted = sorted(verified & broken_by_attacks)
    if contradicted:
        raise RuntimeError(
            f"image {contradicted[0]} is verified at Linf {proofs.eps:.6g}, and an attack breaks "
            "it: either the proof or the attack is faulty; please report it with the network"
        )
    broken = broken_by_program | broken_by_attacks
    truth = Truth(
        eps=proofs.eps,
        verified=len(verified),
        broken=len(broken),
        by_program_alone=len(broken_by_program - broken_by_attacks),
    )
    rows = []
    for report in reports:
        for attack in _attacks_of(report):
            left = report.standing(attack)
            row = AttackOnTruth(
                eps=proofs.eps,
                suite=report.suite,
                attack=attack,
                left=len(left),
                missed=len(left & broken),
            )
            rows.append(row)
    return truth, rows


def _attacks_of(report: Report) -> list[str]:
    """Names of the attacks that keep the threat, then of what a suite does as a whole."""
    counted = {"control", "worst case", "everything"}
    counted |= {row.member for row in report.attacks if report.within(row)}
    return [accuracy.name for accuracy in report.accuracies if accuracy.name in counted]
