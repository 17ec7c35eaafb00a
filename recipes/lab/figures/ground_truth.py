"""Exact robust accuracy of a small network beside what attacks leave: how far does each
overstate?
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
    """What one attack, or a suite as a whole, leaves of a network whose exact robust accuracy is
    known.

    Attributes:
        attack: Its name, or ``"worst case"``, ``"control"`` or ``"everything"`` of the suite.
        left: Images that it leaves classified right.
        missed: Those of them that are known to be broken.
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
        verified: Images that are proved to be robust.
        broken: Images that are wrong, or that the program or an attack breaks.
        by_program_alone: Those of them that no attack broke.
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
        clean: Images that are classified right without a perturbation.
        truths: What is known, per radius.
    """

    network: str
    images: int
    clean: int
    truths: tuple[Truth, ...]
    attacks: tuple[AttackOnTruth, ...]

    def __post_init__(self) -> None:
        for name, kind in (("truths", Truth), ("attacks", AttackOnTruth)):
            # rows that come from a file are dictionaries
            rows = tuple(
                kind(**row) if isinstance(row, dict) else row for row in getattr(self, name)
            )
            object.__setattr__(self, name, rows)

    def table(self) -> str:
        """Markdown: what is known per radius, then a row per attack in the order of what it
        misses.
        """
        lines = [f"{self.network}: {self.images} images, {self.clean} classified right."]
        for truth in self.truths:
            low, high = (
                100 * count / self.images for count in (truth.verified, self.images - truth.broken)
            )
            exact = f"{low:.1f} %" if low == high else f"{low:.1f} to {high:.1f} %"
            rows = [attack for attack in self.attacks if attack.eps == truth.eps]
            rows.sort(key=lambda attack: (attack.missed, attack.suite))
            cells = [
                [row.suite, row.attack, self._share(row.left), self._share(row.missed)]
                for row in rows
            ]
            lines += [
                "",
                f"Linf {truth.eps:.6g}: robust accuracy {exact}; {truth.by_program_alone} images "
                "broken by the program alone.",
                "",
                markdown_table(
                    ["suite", "attack", "left, %", "broken images that it leaves, %"],
                    cells,
                    words=2,
                ),
            ]
        return "\n".join(lines)

    def _share(self, count: int) -> str:
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
    """Solve the program of every image, run the suites, and set one beside the other.

    Raises:
        RuntimeError: If an attack breaks an image that is verified, which is a fault of one of the
            two.
    """
    truths, attacks, clean = [], [], 0
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
        # Without proofs of its own, so that every attack tries the images that the program calls
        # verified.
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
    """What is known together, and what each attack leaves of it."""
    images = range(len(proofs.margin))
    verified = {i for i in images if proofs.verified[i]}
    solved = {i for i in images if proofs.broken[i]}
    fallen = {
        i for i in images if any(i not in report.standing("everything") for report in reports)
    }
    if fooled := sorted(verified & fallen):
        raise RuntimeError(
            f"image {fooled[0]} is verified at Linf {proofs.eps:.6g}, and an attack breaks it: "
            "one of both is at fault; please report it with the network"
        )
    broken = solved | fallen
    rows = []
    for report in reports:
        inside = {row.member for row in report.attacks if report.within(row)}
        whole = {"clean", "control", "worst case", "everything"}
        for accuracy in report.accuracies:
            if accuracy.name != "clean" and (accuracy.name in inside or accuracy.name in whole):
                left = report.standing(accuracy.name)
                rows.append(
                    AttackOnTruth(
                        proofs.eps, report.suite, accuracy.name, len(left), len(left & broken)
                    )
                )
    return Truth(proofs.eps, len(verified), len(broken), len(solved - fallen)), rows
