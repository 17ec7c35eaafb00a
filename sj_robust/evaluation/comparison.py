"""Two robustness reports side by side."""

from dataclasses import dataclass

from sj_robust._saved import markdown_table
from sj_robust.evaluation.intervals import difference_interval, paired_difference_interval
from sj_robust.evaluation.report import Accuracy
from sj_robust.evaluation.robustness_report import RobustnessReport

__all__ = ["Comparison", "Difference", "compare_reports"]


@dataclass(frozen=True)
class Difference:
    """One accuracy in two reports. 两份报告中同一指标的差异。

    Attributes:
        first: The accuracy in the first report.
        second: The same in the second.
        interval: 95 % interval of second minus first.

    Examples:
        >>> clean = Accuracy("clean", "clean", 8, 10, 0.0), Accuracy("clean", "clean", 9, 10, 0.0)
        >>> round(Difference(*clean, interval=(-0.2, 0.4)).value, 3)
        0.1
    """

    first: Accuracy
    second: Accuracy
    interval: tuple[float, float]

    @property
    def value(self) -> float:
        """Second minus first, in [-1, 1]."""
        return self.second.accuracy - self.first.accuracy

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.interval[0] > 0 or self.interval[1] < 0

    def cells(self) -> list[str]:
        """A row of a table in per cent; a star marks an interval that leaves out 0."""
        low, high = (100 * end for end in self.interval)
        value = f"{100 * self.value:+.1f}{' *' if self.clear else ''}"
        return [
            self.first.name,
            self.first.percent,
            self.second.percent,
            value,
            f"{low:+.1f} to {high:+.1f}",
        ]


@dataclass(frozen=True)
class Comparison:
    """Result of :func:`compare_reports`. 报告比较结果。

    Attributes:
        names: Names of the two networks.
        differences: One per accuracy that both reports have.
        notes: What makes the reports incomparable, and what else to know.
    """

    names: tuple[str, str]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]

    def table(self) -> str:
        """Markdown table; a star marks intervals that leave out 0."""
        heads = ["accuracy, %", *self.names, "difference", "95 % interval"]
        return markdown_table(heads, [row.cells() for row in self.differences])


def compare_reports(first: RobustnessReport, second: RobustnessReport) -> Comparison:
    """What differs between two reports, with intervals, and whether they can be compared at all.
    比较两份报告。

    On the same images the interval is that of paired shares, which is far narrower; otherwise that
    of independent ones.

    Args:
        first: The one to start from.
        second: The one to compare with it.

    Examples:
        >>> from sj_robust.attacks import ThreatModel
        >>> threat = ThreatModel("Linf", 0.1)
        >>> report = RobustnessReport("mine", "digits", threat, "fast", 2, (0, 1), (0,), ())
        >>> print(compare_reports(report, report).table())
        | accuracy, % | mine (first) | mine (second) | difference | 95 % interval |
        | --- | ---: | ---: | ---: | ---: |
        | clean | 50.0 | 50.0 | +0.0 | -49.0 to +49.0 |
        | worst case | 50.0 | 50.0 | +0.0 | -49.0 to +49.0 |
        | everything | 50.0 | 50.0 | +0.0 | -49.0 to +49.0 |
    """
    paired = first.labels == second.labels and first.data == second.data
    others = {other.name: other for other in second.accuracies}
    rows = []
    for one in first.accuracies:
        if (other := others.get(one.name)) is None:
            continue
        if paired:
            before, after = first.standing(one.name), second.standing(one.name)
            interval = paired_difference_interval(
                len(after - before), len(before - after), one.total
            )
        else:
            interval = difference_interval(one.correct, one.total, other.correct, other.total)
        rows.append(Difference(one, other, interval))
    alike = first.name == second.name
    names = (
        (f"{first.name} (first)", f"{second.name} (second)") if alike else (first.name, second.name)
    )
    return Comparison(names, tuple(rows), _notes(first, second, paired=paired))


def _notes(first: RobustnessReport, second: RobustnessReport, *, paired: bool) -> tuple[str, ...]:
    notes = []
    for what, here, there in (
        ("norm", first.threat.norm, second.threat.norm),
        ("eps", first.eps, second.eps),
        ("data set", first.dataset, second.dataset),
        ("suite", first.suite, second.suite),
    ):
        if here != there:
            harm = (
                "other attacks were run"
                if what == "suite"
                else "robust accuracies cannot be compared"
            )
            notes.append(f"DIFFERENT {what}: {here} and {there}; {harm}.")
    if not paired:
        notes.append(
            f"The images differ ({len(first.labels)} and {len(second.labels)}): intervals are "
            "those of independent samples."
        )
    if first.network.get("fingerprint") and first.network.get("fingerprint") == second.network.get(
        "fingerprint"
    ):
        notes.append("Both reports are about the same weights.")
    mine, theirs = ({one.name for one in report.accuracies} for report in (first, second))
    for report, missing in ((first, theirs - mine), (second, mine - theirs)):
        if missing:
            notes.append(
                f"{len(missing)} attacks are not in the report of {report.name}, and left out."
            )
    notes += [
        f"{report.name}: {text}"
        for report in (first, second)
        for text in (*report.alarms, *report.masked)
    ]
    return tuple(notes)
