"""The result of an evaluation as a file that loads back equal."""

from dataclasses import dataclass, field, replace
from typing import Any, Self

from sj_robust.attacks.threat import ThreatModel
from sj_robust.core.saved import SavedResult, markdown_table, plain
from sj_robust.evaluation.intervals import wilson_interval

__all__ = ["Accuracy", "Report", "Score"]


@dataclass(frozen=True)
class Score:
    """How many images one network classifies right under one attack. 单项得分。

    Attributes:
        network: Name of the network.
        attack: Name of the attack, ``"clean"`` for none.
        correct: Images classified right.
        total: Images.

    Examples:
        >>> Score("dlif", "clean", 9, 10).accuracy
        0.9
    """

    network: str
    attack: str
    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Share of the images classified right, in [0, 1]."""
        return self.correct / self.total


@dataclass(frozen=True)
class Accuracy:
    """One accuracy of a report. 报告中的一项准确率。

    Attributes:
        name: What it is the accuracy under.
        kind: ``"member"`` for one attack, else the name of a summary.
        correct: Images still classified right.
        total: Images.
        seconds: Time of all that it took.

    Examples:
        >>> clean = Accuracy("clean", "clean", 9, 10, 0.1)
        >>> clean.accuracy, clean.interval_text
        (0.9, '59.6 to 98.2')
    """

    name: str
    kind: str
    correct: int
    total: int
    seconds: float

    @property
    def accuracy(self) -> float:
        """Share in [0, 1]."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share."""
        return wilson_interval(self.correct, self.total)

    @property
    def percent(self) -> str:
        """The share in per cent, as tables show it."""
        return f"{100 * self.accuracy:.1f}"

    @property
    def interval_text(self) -> str:
        """The interval in per cent, as tables show it."""
        low, high = (100 * end for end in self.interval)
        return f"{low:.1f} to {high:.1f}"


@dataclass(frozen=True)
class Report(SavedResult, what="a report of sj_robust", format="sj_robust.report", version=1):
    """Accuracies with all that is needed to read, repeat and draw them. 评估报告。

    Attributes:
        threat: Budget of the attacks.
        scores: One per network and attack.
        curves: Per network, one record per training epoch as plain data.
        configuration: Options of the run as plain data; infinity stands as text.
        environment: Versions, device, commit.
        notes: What a reader must know, such as warnings raised while training.

    Examples:
        >>> report = Report(ThreatModel("Linf", 0.1), (Score("dlif", "clean", 9, 10),))
        >>> Report.from_json(report.to_json()) == report
        True
        >>> print(report.table())
        | accuracy, % | dlif |
        | --- | ---: |
        | clean | 90.0 |
    """

    threat: ThreatModel
    scores: tuple[Score, ...]
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    configuration: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", tuple(self.scores))
        object.__setattr__(self, "notes", tuple(self.notes))
        for name in ("curves", "configuration", "environment"):
            object.__setattr__(self, name, plain(getattr(self, name)))

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the networks, in the order of the scores."""
        return tuple(dict.fromkeys(score.network for score in self.scores))

    @property
    def attacks(self) -> tuple[str, ...]:
        """Names of the attacks, in the order of the scores."""
        return tuple(dict.fromkeys(score.attack for score in self.scores))

    def accuracy(self, network: str, attack: str) -> float:
        """Accuracy of one network under one attack.

        Raises:
            KeyError: If the report has no such score.
        """
        for score in self.scores:
            if (score.network, score.attack) == (network, attack):
                return score.accuracy
        raise KeyError(f"no score of network {network!r} under attack {attack!r}")

    def merged(self, other: "Report") -> "Report":
        """This report with the scores, curves and notes of another one under the same threat.

        Raises:
            ValueError: If the threats differ.
        """
        if self.threat != other.threat:
            raise ValueError(
                f"reports must have the same threat to be merged, got {self.threat} and "
                f"{other.threat}"
            )
        return replace(
            self,
            scores=self.scores + other.scores,
            curves=self.curves | other.curves,
            notes=self.notes + other.notes,
        )

    def table(self) -> str:
        """Markdown table: one row per attack, one column per network, accuracy in per cent."""
        known = {
            (score.network, score.attack): f"{100 * score.accuracy:.1f}" for score in self.scores
        }
        rows = [
            [attack, *(known.get((name, attack), "") for name in self.networks)]
            for attack in self.attacks
        ]
        return markdown_table(["accuracy, %", *self.networks], rows)

    @classmethod
    def _from_content(cls, content: dict[str, Any]) -> Self:
        threat = ThreatModel(**content.pop("threat"))
        scores = tuple(Score(**score) for score in content.pop("scores"))
        return cls(threat, scores, **content)
