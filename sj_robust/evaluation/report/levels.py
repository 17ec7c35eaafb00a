"""Accuracy under faults or corruptions at every level."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from sj_robust.core.eps import eps_text
from sj_robust.core.saved import markdown_table
from sj_robust.core.threat import ThreatModel
from sj_robust.evaluation.intervals import repeated_interval
from sj_robust.evaluation.result import Evaluation

__all__ = [
    "WHATS",
    "Level",
    "What",
    "fall",
    "intact",
    "kinds",
    "levels",
    "levels_budget",
    "levels_table",
    "levels_verdict",
    "mean_accuracy",
]

What = Literal["clean", "attacked"]
WHATS: tuple[What, What] = ("clean", "attacked")
_POINTS = 5.0
"""Points of accuracy below the intact network that a star marks."""


@dataclass(frozen=True)
class Level:
    """Images still correct under one fault or corruption at one level. 单项故障的结果。

    Attributes:
        kind: The fault or corruption; ``"none"`` for the network as it is.
        level: Its level.
        clean: Images right without an attack, one number per draw.
        attacked: Images right under the attack, which was crafted on the faulty network, likewise.
        images: Number of images.
    """

    kind: str
    level: float
    clean: tuple[int, ...]
    attacked: tuple[int, ...]
    images: int

    def counts(self, what: What) -> tuple[int, ...]:
        """Images right, one number per draw."""
        return self.clean if what == "clean" else self.attacked

    def mean(self, what: What) -> float:
        """Images right in the mean over draws."""
        return fmean(self.counts(what))

    def percent(self, what: What) -> str:
        """Their share in per cent."""
        return f"{100 * self.mean(what) / self.images:.1f}"

    def interval(self, what: What) -> tuple[float, float]:
        """95 % CI of the share in per cent, over images and draws."""
        low, high = repeated_interval(self.counts(what), self.images)
        return 100 * low, 100 * high


def intact(report: Evaluation) -> Level:
    """The network without a fault."""
    return _all(report)[0]


def levels(report: Evaluation, kind: str | None = None) -> list[Level]:
    """Every level of every kind, or of one, from mild to severe."""
    return [one for one in _all(report)[1:] if kind in (None, one.kind)]


def kinds(report: Evaluation) -> tuple[str, ...]:
    """The kinds in their order."""
    return tuple(dict.fromkeys(one.kind for one in levels(report)))


def fall(report: Evaluation, what: What, points: float = _POINTS) -> dict[str, float | None]:
    """By kind, the first level at which accuracy is so many points below the intact network's; None
    at no level.
    """
    floor = intact(report).mean(what) - points / 100 * len(report.labels)
    found: dict[str, float | None] = dict.fromkeys(kinds(report))
    for one in reversed(levels(report)):
        if one.mean(what) <= floor:
            found[one.kind] = one.level
    return found


def mean_accuracy(report: Evaluation, what: What, kind: str | None = None) -> float:
    """Mean share over the levels of a kind, or of all, as corruptions are reported.

    Raises:
        KeyError: If the report has no such kind.
    """
    found = levels(report, kind)
    if not found:
        known = ", ".join(kinds(report))
        raise KeyError(f"no kind {kind!r} in this report; it has {known}")
    return fmean(one.mean(what) for one in found) / len(report.labels)


def levels_verdict(report: Evaluation) -> str:
    """Accuracy without faults, and the levels at which it drops."""
    parts = []
    for what in WHATS:
        found = fall(report, what)
        fallen = [f"{kind} {level:g}" for kind, level in found.items() if level is not None]
        never = [kind for kind, level in found.items() if level is None]
        text = f"{what}: {intact(report).percent(what)} % without faults"
        text += f", 5 points lower at {', '.join(fallen)}" if fallen else ""
        text += f", never 5 points lower under {', '.join(never)}" if never else ""
        parts.append(text)
    total = len(report.labels)
    said = f"{total} images, {report.description} at {levels_budget(report.threat)}."
    said += f" {'; '.join(parts)}."
    if not kinds(report):
        return f"{said} No fault was measured."
    if report.suite == "stress":
        return said
    clean, attacked = (100 * mean_accuracy(report, what) for what in WHATS)
    mean = f"{clean:.1f} % clean, {attacked:.1f} % attacked"
    return f"{said} Mean over kinds and severities: {mean}."


def levels_budget(threat: ThreatModel | None) -> str:
    """Norm and radius."""
    return "" if threat is None else f"{threat.norm} {eps_text(threat.eps)}"


def levels_table(report: Evaluation) -> str:
    """Markdown table of every level; a star marks the first level that is 5 points lower."""
    heads = ["fault" if report.suite == "stress" else "corruption", "level"]
    for what in WHATS:
        heads += [f"{what}, %", "95 % CI"]
    rows = [_cells(intact(report), "", {})]
    first = {what: fall(report, what) for what in WHATS}
    means = report.suite == "corruptions"
    for kind in kinds(report):
        for one in levels(report, kind):
            stars = {what: first[what][kind] == one.level for what in WHATS}
            rows.append(_cells(one, f"{one.level:g}", stars))
        if means:
            rows.append(_mean(report, kind))
    if means and kinds(report):
        rows.append(_mean(report, None))
    found = markdown_table([*heads, "draws"], rows)
    return "\n\n".join([found, *report.warnings])


def _cells(one: Level, level: str, stars: dict[What, bool]) -> list[str]:
    cells = [one.kind, level]
    for what in WHATS:
        low, high = one.interval(what)
        star = " *" if stars.get(what) else ""
        cells += [f"{one.percent(what)}{star}", f"{low:.1f} to {high:.1f}"]
    return [*cells, str(len(one.clean))]


def _mean(report: Evaluation, kind: str | None) -> list[str]:
    clean, attacked = (f"{100 * mean_accuracy(report, what, kind):.1f}" for what in WHATS)
    return [f"mean of {kind or 'all'}", "", clean, "", attacked, "", ""]


def _all(report: Evaluation) -> Sequence[Level]:
    """The levels, the intact network first, counted from the rows of their draws."""
    draws: dict[str, list[str]] = {}
    for variant in report.variants:
        draws.setdefault(variant.partition("/")[0], []).append(variant)
    found = []
    for name, variants in draws.items():
        kind, _, level = name.partition(":")
        clean: list[int] = []
        attacked: list[int] = []
        for variant in variants:
            clean.append(report.under("clean", variant=variant).correct)
            attacked.append(report.under("everything", variant=variant).correct)
        found.append(
            Level(
                kind,
                float(level or 0),
                clean=tuple(clean),
                attacked=tuple(attacked),
                images=len(report.labels),
            )
        )
    return found
