"""The result of an evaluation as a file that loads back equal."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sj_robust._saved import known_fields, load_saved, plain, saved_content, write_whole
from sj_robust.attacks.threat import ThreatModel

__all__ = ["Report", "Score"]

_FORMAT = "sj_robust.report"
_VERSION = 1


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
class Report:
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
            raise ValueError(f"reports must have the same threat to be merged, got {self.threat} and {other.threat}")
        return replace(
            self,
            scores=self.scores + other.scores,
            curves=self.curves | other.curves,
            notes=self.notes + other.notes,
        )

    def table(self) -> str:
        """Markdown table: one row per attack, one column per network, accuracy in per cent."""
        rows = [["accuracy, %", *self.networks], ["---", *["---:"] * len(self.networks)]]
        known = {(score.network, score.attack): f"{100 * score.accuracy:.1f}" for score in self.scores}
        rows += [[attack, *(known.get((name, attack), "") for name in self.networks)] for attack in self.attacks]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def to_json(self) -> str:
        """The report as JSON text, which :meth:`from_json` reads back equal."""
        return json.dumps({"format": _FORMAT, "version": _VERSION, **asdict(self)}, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The report that :meth:`to_json` wrote.

        Raises:
            ValueError: If the text is not JSON, not a report or of another version.
        """
        content = saved_content(text, what="a report of sj_robust", format=_FORMAT, version=_VERSION)
        with known_fields("the report"):
            threat = ThreatModel(**content.pop("threat"))
            scores = tuple(Score(**score) for score in content.pop("scores"))
            return cls(threat, scores, **content)

    def save(self, path: Path) -> None:
        """Write the report; the file is whole or not there."""
        write_whole(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: Path) -> "Report":
        """The report that :meth:`save` wrote; raises as :meth:`from_json`, naming the file."""
        return load_saved(path, cls.from_json)
