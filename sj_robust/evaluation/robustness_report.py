"""How robust a network is, with all that a sceptical reader asks for, as a file that loads back
equal.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from sj_robust.attacks.threat import ThreatModel, eps_text, parse_eps
from sj_robust.core.saved import SavedResult, markdown_table, plain
from sj_robust.core.shown import Shown, shown_html, write_figure
from sj_robust.evaluation._symptoms import extent
from sj_robust.evaluation.drawings import robustness_figures
from sj_robust.evaluation.outcome import MemberOutcome
from sj_robust.evaluation.proofs import check_proofs
from sj_robust.evaluation.report import Accuracy
from sj_robust.evaluation.suites import GRADES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RobustnessReport"]

_WRONG, _STANDING = -2, -1
_DEAD = 0.99
"""Share of a layer's neurons that never fire, or always, from which the layer is dead."""
_NUMBERS = re.compile(r"\[\n\s+[-+.\deE]+(?:,\n\s+[-+.\deE]+)*\n\s*\]")
"""A list of numbers over several lines, some as long as the data set; no text in JSON holds a bare
line break.
"""

_COUNTED = ("clean_acc", "autoattack_acc", "external", "figures", "outcome")
_DERIVED = ("architecture", "unreliable", "footnote", *_COUNTED)
"""What a file holds beside the fields; the counted ones must follow from the outcomes when it is
read.
"""

_SHIFTS = ("largest_shift", "total_shift")
"""What a file holds besides of a threat of moves."""

_SUMMARIES = ("clean", "control", "worst case", "everything", "verified")


@dataclass(frozen=True, repr=False)
class RobustnessReport(
    Shown, SavedResult, what="a robustness report", format="sj_robust.robustness_report", version=1
):
    """A network under a suite of attacks, image by image. 鲁棒性评估报告。

    The outcome of every image is the truth; every accuracy is counted from it. The JSON also holds
    the accuracies, so that other programs need not count; names are those of RobustBench's model
    cards where they have one (``name``, ``dataset``, ``eps``, ``architecture``, ``clean_acc``,
    ``autoattack_acc``, ``external`` for the worst case of another evaluation than AutoAttack,
    ``unreliable``, ``footnote``), with percentages as text.

    With proofs the true robust accuracy lies in a bracket, between what is verified and what
    everything leaves; an image that is both verified and broken is an error.

    An image counts as broken if an attack fools the network with a change that the threat allows.
    Members beyond it (other radii, Gaussian noise) have figures of their own, and no part in the
    worst case.

    Attributes:
        name: Name of the network.
        dataset: Name of the data set.
        threat: Norm and radius of the adversary; in the file ``threat`` is the norm, and ``eps``
            the radius as text.
        suite: Name of the suite.
        classes: Number of classes.
        labels: Class of every image.
        correct: Numbers of the images classified right without an attack.
        members: What each attack did, in the order of the suite.
        seed: Seed of the run.
        draws: Fresh forwards in each of which a stochastic network must be wrong to count as
            broken.
        network: Architecture, ``T``, number of parameters, ``fingerprint``, and per spiking layer
            the ``neuron`` and the ``surrogate`` it was trained with.
        data: Fingerprint of images and labels.
        estimators: Trials of the search over gradient estimators, strongest first; empty if there
            was none.
        verified: Numbers of the images that are proved to withstand the threat, whatever the
            attack; None if the network or the threat has no bounds. Attacks within the threat leave
            them out, but for the first.
        verified_seconds: Time for these proofs.
        over_eps: Rows with ``eps``, ``attack``, ``correct``, ``total``.
        verified_over_eps: Rows with ``eps``, ``verified``, ``total``.
        firing: Rows of ``sj_robust.evaluation.activity.firing``.
        findings: Rows of ``sj_robust.evaluation.masking.diagnose``.
        potential: MS-MPPD per layer and step under each attack, and with proofs the mean square of
            the distance between the bounds of the potential (with its resets); rows with
            ``member``, ``samples``, ``layers``.
        configuration: Options of the run as plain data.
        environment: Versions, device, commit.
        warnings: What a reader must know besides.

    Raises:
        ValueError: If there are no images, or a number is not one of an image.

    Source: ``model_info`` of RobustBench (Croce et al., NeurIPS 2021 Datasets and Benchmarks).

    Examples:
        >>> pgd = MemberOutcome("pgd", "training", "suite", 0.1, (0, 1), (1,), (), 0.1, 2.0)
        >>> threat = ThreatModel("Linf", 0.1)
        >>> report = RobustnessReport(
        ...     "mine", "digits", threat, "fast", 3, (0, 1, 2), (0, 1), (pgd,)
        ... )
        >>> report.clean.correct, report.worst_case.correct, report.outcome
        (2, 1, (-1, 0, -2))
        >>> RobustnessReport.from_json(report.to_json()) == report
        True
    """

    name: str
    dataset: str
    threat: ThreatModel
    suite: str
    classes: int
    labels: tuple[int, ...]
    correct: tuple[int, ...]
    members: tuple[MemberOutcome, ...]
    seed: int = 0
    draws: int = 1
    network: dict[str, Any] = field(default_factory=dict)
    data: str = ""
    estimators: tuple[dict[str, Any], ...] = ()
    verified: tuple[int, ...] | None = None
    verified_seconds: float = 0.0
    over_eps: tuple[dict[str, Any], ...] = ()
    verified_over_eps: tuple[dict[str, Any], ...] = ()
    firing: tuple[dict[str, Any], ...] = ()
    findings: tuple[dict[str, Any], ...] = ()
    potential: tuple[dict[str, Any], ...] = ()
    configuration: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("labels", "correct", "members", "warnings"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(
            self, "verified", None if self.verified is None else tuple(self.verified)
        )
        for name in (
            "estimators",
            "over_eps",
            "verified_over_eps",
            "firing",
            "findings",
            "potential",
        ):
            object.__setattr__(self, name, tuple(plain(row) for row in getattr(self, name)))
        for name in ("network", "configuration", "environment"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        if not self.labels:
            raise ValueError("a report needs at least one image, got none")
        images = range(len(self.labels))
        for numbers in (
            self.correct,
            self.verified or (),
            *(member.attacked for member in self.members),
        ):
            if not all(number in images for number in numbers):
                raise ValueError(
                    f"numbers of images must be from 0 to {len(images) - 1}, got {max(numbers)}"
                )
        right = set(self.correct)
        for member in self.members:
            if not set(member.fooled) <= set(member.attacked) <= right:
                raise ValueError(
                    f"{member.name!r} must fool images that it attacked, of those classified right"
                )
        if not right >= set(self.verified or ()):
            raise ValueError("verified images must be among those classified right")
        check_proofs(filter(self.within, self.members), self.verified or (), self.threat.eps)

    # Accuracies, all counted from the outcome of every image

    @property
    def clean(self) -> Accuracy:
        """Without an attack."""
        return self.under("clean")

    @property
    def worst_case(self) -> Accuracy:
        """Per image over all members of the suite, the control left out."""
        return self.under("worst case")

    @property
    def control(self) -> Accuracy | None:
        """Per image over the control, the training surrogate with restarts at the same cost."""
        return (
            self.under("control")
            if any(member.group == "control" for member in self.members)
            else None
        )

    @property
    def everything(self) -> Accuracy:
        """Per image over suite and control together: no image left counts that anything here
        breaks.
        """
        return self.under("everything")

    @property
    def accuracies(self) -> tuple[Accuracy, ...]:
        """All accuracies: clean, under each member, control, worst case, everything, verified."""
        control = ["control"] if self.control else []
        names = [
            "clean",
            *(member.name for member in self.members),
            *control,
            "worst case",
            "everything",
        ]
        return tuple(
            map(self.under, [*names, *(["verified"] if self.verified is not None else [])])
        )

    @property
    def bracket(self) -> tuple[Accuracy, Accuracy] | None:
        """The true robust accuracy lies between the two: what is verified, and what everything
        leaves; None without proofs.
        """
        return None if self.verified is None else (self.under("verified"), self.everything)

    @property
    def undecided(self) -> frozenset[int]:
        """Images that no attack breaks and that are not verified."""
        return self.standing("everything").difference(self.verified or ())

    def under(self, name: str) -> Accuracy:
        """One accuracy by name; seconds are those of the members within the threat.

        Raises:
            KeyError: As :meth:`standing`.
        """
        kind = name if name in _SUMMARIES else "member"
        seconds = sum(
            member.seconds
            for member in self._members(name)
            if kind == "member" or self.within(member)
        )
        seconds += self.verified_seconds if kind == "verified" else 0.0
        return Accuracy(name, kind, len(self.standing(name)), len(self.labels), float(seconds))

    def standing(self, name: str) -> frozenset[int]:
        """Numbers of the images that are classified right under what a figure is called after.

        Under a member of a group that attacks what is left, these are the images left by it and
        those before it.

        Raises:
            KeyError: If the report has no such figure.
        """
        members = self._members(name)
        if name == "verified":
            return frozenset(self.verified or ())
        if name in _SUMMARIES:
            fallen = [member.broken for member in members]
        else:
            (this,) = members
            before = self.members[: self.members.index(this)]
            fallen = [
                this.fooled,
                *(other.fooled for other in before if this.group and other.group == this.group),
            ]
        return frozenset(self.correct).difference(*fallen)

    def within(self, member: MemberOutcome) -> bool:
        """Whether a member keeps the threat, so that it is part of the worst case."""
        return not member.outside and member.eps is not None and member.eps <= self.threat.eps

    @property
    def outcome(self) -> tuple[int, ...]:
        """Per image: index of the first member that broke it (those of the suite first), -1 none,
        -2 wrong already.
        """
        broken_by = dict.fromkeys(self.correct, _STANDING)
        order = sorted(enumerate(self.members), key=lambda item: item[1].group == "control")
        for index, member in reversed(order):
            broken_by |= dict.fromkeys(member.broken, index)
        return tuple(broken_by.get(number, _WRONG) for number in range(len(self.labels)))

    # What RobustBench calls them, and the threat in words

    @property
    def eps(self) -> str:
        """Radius as text, such as ``"8/255"``; in L0 the number of changed elements, such as
        ``"20"``.
        """
        return eps_text(self.threat.eps)

    @property
    def budget(self) -> str:
        """Norm and radius, or the number of changes, as a reader sees them."""
        if self.threat.norm == "L0":
            return f"L0, at most {self.eps} event{'' if self.eps == '1' else 's'} added or removed"
        if self.threat.norm == "moves":
            limits = {
                "by {} frames at most": self.threat.largest_shift,
                "by {} together": self.threat.total_shift,
            }
            shifts = [text.format(shift) for text, shift in limits.items() if shift is not None]
            return ", ".join(
                [f"at most {self.eps} event{'' if self.eps == '1' else 's'} moved in time", *shifts]
            )
        return f"{self.threat.norm}, eps {self.eps}"

    @property
    def architecture(self) -> str:
        """Architecture of the network."""
        return str(self.network.get("architecture", "unknown"))

    @property
    def clean_acc(self) -> str:
        """Accuracy without an attack, in per cent."""
        return f"{100 * self.clean.accuracy:.2f}"

    @property
    def autoattack_acc(self) -> str | None:
        """Accuracy under AutoAttack, if that was the suite."""
        return f"{100 * self.worst_case.accuracy:.2f}" if self.suite == "autoattack" else None

    @property
    def external(self) -> str:
        """Lowest accuracy known, in per cent."""
        return f"{100 * self.everything.accuracy:.2f}"

    @property
    def unreliable(self) -> bool:
        """Whether robust accuracies mean nothing, or may be too high."""
        return bool(self.alarms or self.masked)

    @property
    def footnote(self) -> str:
        """The first alarm, if there is one."""
        return next(iter((*self.alarms, *self.masked)), "")

    # What stands above and below the figures

    @property
    def verdict(self) -> str:
        """In one breath: what share withstands the threat at most and at least, what was tried,
        what to doubt.
        """
        most = self.everything
        proved = "" if self.bracket is None else f"; at least {self.bracket[0].percent} % is proved"
        attacks = f"{len(self.members)} attack{'' if len(self.members) == 1 else 's'}"
        grade = f" ({GRADES[self.suite]})" if self.suite in GRADES else ""
        return (
            f"At most {most.percent} % (95 % interval {most.interval_text}) of {most.total} "
            f"images withstand {self.budget}{proved}. Tried: suite {self.suite}{grade}, "
            f"{attacks}. Doubts: {self.doubts}."
        )

    @property
    def doubts(self) -> str:
        """What speaks against the figures, in a few words."""
        signs = len(self.findings)
        found = [text.partition(":")[0] for text in self.alarms]
        if self.masked:
            names = ", ".join(text.removeprefix("CHECK ").partition(":")[0] for text in self.masked)
            found.append(f"{len(self.masked)} of {signs} signs of gradient masking, {names}")
        elif self.findings:
            found.append(f"none of {signs} signs of gradient masking")
        else:
            found.append("signs of gradient masking were not looked for")
        return "; ".join(found)

    @property
    def alarms(self) -> tuple[str, ...]:
        """Why the network must not be called robust at all: it is dead, or it guesses; none for one
        that works.
        """
        clean = self.clean
        chance = max(1 / self.classes, max(Counter(self.labels).values()) / len(self.labels))
        guesses = clean.interval[0] <= chance
        found = []
        for row in self.firing:
            if max(row["silent"], row["saturated"]) >= _DEAD:
                never = row["silent"] >= _DEAD
                found.append(
                    f"DEAD {'NETWORK' if guesses else 'LAYER'}: "
                    f"{row['silent' if never else 'saturated']:.1%} of layer {row['layer']} "
                    f"({row['neuron']}) "
                    f"{'never fires' if never else 'fires in every step of every image'}. What "
                    "does not depend on the image cannot be attacked; that is not robustness. "
                    "Train it again before reporting any."
                )
        if guesses:
            found.append(
                f"NOT ROBUST: clean accuracy is {clean.percent} % (95 % interval "
                f"{clean.interval_text}), which cannot be told from always naming one class "
                f"({100 * chance:.1f} %). What a network does not know, no attack can take from "
                "it."
            )
        return tuple(found)

    @property
    def masked(self) -> tuple[str, ...]:
        """Symptoms of masked gradients, which make robust accuracies too high, with number,
        threshold and remedy.

        That another estimator beats the training surrogate is none where the suite has chosen among
        estimators.
        """
        answered = {"other_estimator_stronger"} if self.estimators else set()
        return tuple(
            f"CHECK {row['name']}: {extent(row['value'], row.get('count'), row.get('total'))}; "
            f"at most {row['threshold']:.3g} passes. {row['meaning']} {row['remedy']}"
            for row in self.findings
            if not row["passed"] and row["name"] not in answered
        )

    @property
    def remarks(self) -> tuple[str, ...]:
        """What else a reader should know."""
        found = list(self.warnings)
        control, worst = self.control, self.worst_case
        if control is not None and control.correct < worst.correct:
            found.append(
                f"The control leaves {control.percent} %, less than the suite's {worst.percent} "
                "%: the choice of estimators did not pay here. Report the lowest figure."
            )
        beyond = [member.name for member in self.members if not self.within(member)]
        if beyond:
            found.append(
                f"Beyond the threat, and so no part of the worst case: {', '.join(beyond)}."
            )
        return tuple(found)

    # Text

    def _repr_html_(self) -> str:
        figures = [one for one in self.accuracies if one.kind != "member"]
        return shown_html(
            "\n".join(
                [self.verdict, *self.alarms, *self.masked, self._table(figures), *self.remarks]
            )
        )

    def table(self) -> str:
        """Markdown table of all accuracies."""
        return self._table(self.accuracies)

    def _table(self, accuracies: Sequence[Accuracy]) -> str:
        rows = [
            [one.name, one.percent, one.interval_text, str(one.total), f"{one.seconds:.1f}"]
            for one in accuracies
        ]
        return markdown_table(["accuracy", "%", "95 % interval", "images", "seconds"], rows)

    def plot(
        self,
        which: Literal["accuracy_over_eps", "attacks", "potential"] | None = None,
        path: str | Path | None = None,
    ) -> "Figure":
        """One of the figures. 绘制报告的一张图。

        It needs matplotlib (extra ``recipes``).

        Args:
            which: ``"accuracy_over_eps"``, ``"attacks"`` (what each left) or ``"potential"``
                (MS-MPPD of every layer and step); None takes the first that the report has numbers
                for.
            path: File to write as well; its ending says which format.

        Raises:
            ValueError: If the report has no numbers for it.
        """
        figures = robustness_figures(self)
        name: str = which or next(iter(figures.keys()))
        if name not in figures:
            raise ValueError(f"which must be one of {', '.join(figures)}, got {which!r}")
        if path is not None:
            write_figure(figures[name], path)
        return figures[name]

    def to_json(self) -> str:
        """The report as JSON text, which :meth:`from_json` reads back equal."""
        text = super().to_json()
        return _NUMBERS.sub(
            lambda match: " ".join(match[0].split()).replace("[ ", "[").replace(" ]", "]"), text
        )

    def _content(self) -> dict[str, Any]:
        threat = asdict(self.threat)
        shifts = {name: threat[name] for name in _SHIFTS} if self.threat.norm == "moves" else {}
        return (
            self._derived() | asdict(self) | {"threat": self.threat.norm, "eps": self.eps} | shifts
        )

    @classmethod
    def _from_content(cls, content: dict[str, Any]) -> Self:
        """The report; accuracies that do not follow from its outcomes are a ValueError."""
        derived = {name: content.pop(name, None) for name in _DERIVED}
        shifts = {name: content.pop(name, None) for name in _SHIFTS}
        threat = ThreatModel(content.pop("threat"), parse_eps(content.pop("eps")), **shifts)
        members = tuple(MemberOutcome(**member) for member in content.pop("members"))
        report = cls(threat=threat, members=members, **content)
        counted = plain(report._derived())
        for name in _COUNTED:
            if derived[name] != counted[name]:
                raise ValueError(
                    f"{name} of the report does not follow from its outcomes; the file was changed"
                )
        return report

    def _members(self, name: str) -> tuple[MemberOutcome, ...]:
        """The members that a figure is counted over."""
        match name:
            case "clean":
                return ()
            case "verified" if self.verified is not None:
                return ()
            case "everything":
                return self.members
            case "control" | "worst case":
                return tuple(
                    member
                    for member in self.members
                    if (member.group == "control") == (name == "control")
                )
        found = tuple(member for member in self.members if member.name == name)
        if not found:
            raise KeyError(
                f"no figure {name!r} in this report; it has "
                f"{', '.join(m.name for m in self.members)}"
            )
        return found

    def _derived(self) -> dict[str, Any]:
        figures = [
            {**asdict(one), "accuracy": one.accuracy, "interval": list(one.interval)}
            for one in self.accuracies
        ]
        return {name: figures if name == "figures" else getattr(self, name) for name in _DERIVED}
