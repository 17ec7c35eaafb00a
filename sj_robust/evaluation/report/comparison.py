"""Comparison of two robustness reports."""

from collections.abc import Sequence
from dataclasses import dataclass

from sj_robust.attacks.threat import eps_text
from sj_robust.core.saved import markdown_table
from sj_robust.evaluation.intervals import difference_interval, paired_difference_interval
from sj_robust.evaluation.report.verdict import alarms, masked
from sj_robust.evaluation.result import Accuracy, Evaluation, Row

__all__ = ["Comparison", "Difference", "compare_reports"]


@dataclass(frozen=True)
class Difference:
    """One accuracy in two reports. 两份报告中同一指标的差异。

    Attributes:
        first: The accuracy in the first report.
        second: The same in the second.
        interval: 95 % CI of second minus first.
        partial: Whether it covers only the images on which the attack was run in both reports.

    Examples:
        >>> clean = Accuracy("clean", "clean", 8, 10, 0.0), Accuracy("clean", "clean", 9, 10, 0.0)
        >>> round(Difference(*clean, interval=(-0.2, 0.4)).value, 3)
        0.1
    """

    first: Accuracy
    second: Accuracy
    interval: tuple[float, float]
    partial: bool = False

    @property
    def value(self) -> float:
        """Second minus first, in [-1, 1]."""
        return self.second.accuracy - self.first.accuracy

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.interval[0] > 0 or self.interval[1] < 0

    def cells(self) -> list[str]:
        """A row of a table in per cent; a star marks an interval that excludes 0."""
        low, high = (100 * end for end in self.interval)
        images = f" ({self.first.total} images)" if self.partial else ""
        value = f"{100 * self.value:+.1f}{' *' if self.clear else ''}"
        return [
            f"{self.first.name}{images}",
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
        differences: One per accuracy that both reports have and that can be compared.
        notes: Reasons why the reports are not comparable, and further remarks.
    """

    names: tuple[str, str]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]

    def table(self) -> str:
        """Markdown table; a star marks intervals that exclude 0."""
        heads = ["accuracy, %", *self.names, "difference", "95 % CI"]
        return markdown_table(heads, [row.cells() for row in self.differences])


def compare_reports(first: Evaluation, second: Evaluation) -> Comparison:
    """What differs between two reports, with intervals, and whether they are comparable.
    比较两份报告。

    If both reports are on the same images, the interval is that of paired proportions, which is far
    narrower; otherwise it is that of independent ones. An attack of a suite runs only on images
    that are not broken yet, so it is compared on the images on which it was run in both reports. If
    there are none, or the images differ, its row is omitted.

    Args:
        first: The report to start from.
        second: The report to compare with it.

    Examples:
        >>> rows = [Row("clean", "clean", (0, 1), (1,))]
        >>> report = Evaluation("mine", "digits", "fast", (0, 1), rows)
        >>> print(compare_reports(report, report).table())
        | accuracy, % | mine (first) | mine (second) | difference | 95 % CI |
        | --- | ---: | ---: | ---: | ---: |
        | clean | 50.0 | 50.0 | +0.0 | -49.0 to +49.0 |
        | worst case | 50.0 | 50.0 | +0.0 | -49.0 to +49.0 |
        | everything | 50.0 | 50.0 | +0.0 | -49.0 to +49.0 |
    """
    paired = first.labels == second.labels and first.data == second.data
    known = {other.name for other in second.accuracies}
    rows = []
    left_out = []
    for one in first.accuracies:
        if one.name not in known:
            continue
        if one.kind == "member":
            row = _attack_alone(first, second, one.name, paired=paired)
        else:
            other = second.under(one.name)
            standing = first.standing(one.name), second.standing(one.name)
            row = _difference(one, other, *standing, paired=paired)
        if row is None:
            left_out.append(one.name)
        else:
            rows.append(row)
    names = first.name, second.name
    if first.name == second.name:
        names = f"{first.name} (first)", f"{second.name} (second)"
    notes = [*_notes(first, second, paired=paired), *_notes_on_attacks(rows, left_out)]
    return Comparison(names, tuple(rows), tuple(notes))


def _difference(
    one: Accuracy,
    other: Accuracy,
    before: frozenset[int],
    after: frozenset[int],
    *,
    paired: bool,
    partial: bool = False,
) -> Difference:
    """Two accuracies, of the images that are ``before`` and ``after`` standing."""
    if paired:
        gained, lost = len(after - before), len(before - after)
        interval = paired_difference_interval(gained, lost, one.total)
    else:
        interval = difference_interval(one.correct, one.total, other.correct, other.total)
    return Difference(one, other, interval, partial)


def _attack_alone(
    first: Evaluation, second: Evaluation, name: str, *, paired: bool
) -> Difference | None:
    """What one attack does in both reports, whatever was run before it; None if nobody can say."""
    rows = _row(first, name), _row(second, name)
    met = _met(first, rows[0]), _met(second, rows[1])
    right = first.standing("clean"), second.standing("clean")
    totals = len(first.labels), len(second.labels)
    partial = not (met[0] >= right[0] and met[1] >= right[1])
    if partial:
        both = met[0] & met[1]
        if not paired or not both:
            return None
        right = both, both
        totals = len(both), len(both)
    left = []
    accuracies = []
    for row, images, total in zip(rows, right, totals, strict=True):
        left.append(images.difference(row.fell))
        counted = Accuracy(name, "member", len(left[-1]), total, row.seconds)
        accuracies.append(counted)
    one, other = accuracies
    return _difference(one, other, *left, paired=paired, partial=partial)


def _row(report: Evaluation, name: str) -> Row:
    return next(row for row in report.attacks if row.member == name)


def _met(report: Evaluation, row: Row) -> frozenset[int]:
    """Images of which is known what the attack does: those it was run on, and those that are
    proved.
    """
    seen = frozenset(row.seen)
    if report.verified is None or not report.within(row):
        return seen
    return seen | report.standing("verified")


def _notes_on_attacks(rows: Sequence[Difference], left_out: Sequence[str]) -> list[str]:
    notes = []
    if any(row.partial for row in rows):
        notes.append(
            "An attack runs only on images that earlier attacks did not break. Rows with a number "
            "of images compare it on the images that it was run on in both reports."
        )
    if left_out:
        notes.append(
            f"Omitted, since no image was attacked in both reports: {', '.join(left_out)}."
        )
    return notes


def _notes(first: Evaluation, second: Evaluation, *, paired: bool) -> tuple[str, ...]:
    notes = []
    harm = "robust accuracies are not comparable"
    settings = [
        ("norm", _norm(first), _norm(second), harm),
        ("eps", _eps(first), _eps(second), harm),
        ("data set", first.dataset, second.dataset, harm),
        ("suite", first.suite, second.suite, "the attacks differ"),
        ("search over spikes", _search(first), _search(second), "the attacks differ"),
    ]
    for what, here, there, consequence in settings:
        if here != there:
            notes.append(f"DIFFERENT {what}: {here} and {there}; {consequence}.")
    if not paired:
        notes.append(
            f"The images differ ({len(first.labels)} and {len(second.labels)}): intervals "
            "assume independent samples."
        )
    mine = first.network.get("fingerprint")
    if mine and mine == second.network.get("fingerprint"):
        notes.append("Both reports are about the same network.")
    for report, other in ((first, second), (second, first)):
        names = {one.name for one in report.accuracies}
        missing = [one for one in other.accuracies if one.name not in names]
        if missing:
            notes.append(
                f"Omitted: {len(missing)} attacks that the report of {report.name} does not have."
            )
    for report in (first, second):
        texts = (*alarms(report), *masked(report))
        notes += [f"{report.name}: {text}" for text in texts]
    return tuple(notes)


def _search(report: Evaluation) -> str:
    return "yes" if any("spike_search/" in row.member for row in report.attacks) else "no"


def _norm(report: Evaluation) -> str:
    return "none" if report.threat is None else report.threat.norm


def _eps(report: Evaluation) -> str:
    return "none" if report.threat is None else eps_text(report.threat.eps)
