"""Comparison of two robustness reports."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property

from sj_robust.core.eps import eps_text
from sj_robust.core.saved import markdown_table
from sj_robust.core.threat import ThreatModel
from sj_robust.evaluation.intervals import difference_interval, paired_difference_interval
from sj_robust.evaluation.report.verdict import alarms, masked
from sj_robust.evaluation.result import OVER_EPS, Accuracy, Evaluation, Row

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

    def named(self, name: str) -> "Difference":
        """The same under another name."""
        return replace(
            self, first=replace(self.first, name=name), second=replace(self.second, name=name)
        )

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

    Networks of a training, such as those before and after :func:`sj_robust.finetune`, are compared
    by name; if the first ones of both reports have no namesake, they are compared with each other.
    Notes say which others are omitted. Of a stress test, only the network without faults is
    compared. A worst case over several attacks is compared only between reports of a suite.

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
    paired = _same_images(first, second)
    pairs = _pairs(first, second)
    rows: list[Difference] = []
    left_out: list[str] = []
    for pair in pairs:
        for name, row in pair.differences(paired=paired):
            if row is None:
                left_out.append(name)
            else:
                rows.append(row)
    names = first.name, second.name
    if first.name == second.name:
        names = f"{first.name} (first)", f"{second.name} (second)"
    notes = [
        *_notes(first, second, pairs, paired=paired),
        *_notes_on_attacks(rows, left_out),
    ]
    return Comparison(names, tuple(rows), tuple(notes))


def _same_images(first: Evaluation, second: Evaluation) -> bool:
    """Whether two reports are known to be about the same images."""
    if first.labels != second.labels:
        return False
    if first.data or second.data:
        return first.data == second.data
    return first.dataset == second.dataset


@dataclass(frozen=True)
class _Side:
    """A variant of a report."""

    report: Evaluation
    variant: str

    @cached_property
    def accuracies(self) -> dict[str, Accuracy]:
        """Its accuracies by name; those over several attacks only of a suite."""
        if self.report.is_suite:
            found = self.report.accuracies_of(self.variant)
        else:
            found = self.report.single_accuracies(self.variant)
        return {one.name: one for one in found}

    @property
    def attacks(self) -> set[str]:
        """Names of its attacks."""
        return {row.member for row in self.report.of(self.variant) if row.attacks}

    def standing(self, name: str) -> frozenset[int]:
        """Images that are still correct."""
        return self.report.standing(name, variant=self.variant)

    def attack(self, name: str) -> Row:
        """The row of an attack."""
        rows = self.report.of(self.variant)
        return next(row for row in rows if row.attacks and row.member == name)

    def met(self, row: Row) -> frozenset[int]:
        """Images of which is known what the attack does: those it was run on, and those that are
        proved.
        """
        seen = frozenset(row.seen)
        if "verified" not in self.accuracies or not self.report.within(row):
            return seen
        return seen | self.standing("verified")


@dataclass(frozen=True)
class _Pair:
    """Two variants that are compared, and what their rows are called."""

    first: _Side
    second: _Side
    label: str

    def differences(self, *, paired: bool) -> Iterator[tuple[str, Difference | None]]:
        """By name, every accuracy that both have; None if nobody can say what differs."""
        others = self.second.accuracies
        for name, one in self.first.accuracies.items():
            if name not in others:
                continue
            row: Difference | None
            if one.kind == "member":
                row = _attack_alone(self.first, self.second, name, paired=paired)
            else:
                before = self.first.standing(name)
                after = self.second.standing(name)
                row = _difference(one, others[name], before, after, paired=paired)
            called = f"{self.label}: {name}" if self.label else name
            yield called, row and row.named(called)


def _networks(report: Evaluation) -> list[str]:
    """The variants of a report that are networks; of a stress test only that without faults."""
    if report.of_levels:
        return [report.main]
    return [variant for variant in report.variants if variant != OVER_EPS]


def _pairs(first: Evaluation, second: Evaluation) -> list[_Pair]:
    """Variants of one name, and the first ones if neither has a namesake."""
    own = _networks(first)
    others = _networks(second)
    common = [name for name in own if name in others]
    names = [(name, name) for name in common]
    if first.main not in common and second.main not in common:
        names.insert(0, (first.main, second.main))
    several = len(own) > 1 or len(others) > 1
    pairs = []
    for here, there in names:
        label = ""
        if several:
            label = " and ".join(filter(None, dict.fromkeys((here, there))))
        own_side = _Side(first, here)
        others_side = _Side(second, there)
        pairs.append(_Pair(own_side, others_side, label))
    return pairs


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
        gained = len(after - before)
        lost = len(before - after)
        interval = paired_difference_interval(gained, lost, one.total)
    else:
        interval = difference_interval(one.correct, one.total, other.correct, other.total)
    return Difference(first=one, second=other, interval=interval, partial=partial)


def _attack_alone(first: _Side, second: _Side, name: str, *, paired: bool) -> Difference | None:
    """What one attack does in both reports, whatever was run before it; None if nobody can say."""
    own = first.attack(name)
    others = second.attack(name)
    own_met = first.met(own)
    others_met = second.met(others)
    own_right = first.standing("clean")
    others_right = second.standing("clean")
    partial = not (own_met >= own_right and others_met >= others_right)
    if not partial:
        before = own_right.difference(own.fell)
        after = others_right.difference(others.fell)
        one = _alone(own, before, len(first.report.labels))
        other = _alone(others, after, len(second.report.labels))
        return _difference(one, other, before, after, paired=paired)
    both = own_met & others_met
    if not paired or not both:
        return None
    before = both.difference(own.fell)
    after = both.difference(others.fell)
    one = _alone(own, before, len(both))
    other = _alone(others, after, len(both))
    return _difference(one, other, before, after, paired=paired, partial=True)


def _alone(row: Row, left: frozenset[int], total: int) -> Accuracy:
    """Accuracy under one attack that leaves some images correct."""
    return Accuracy(
        name=row.member,
        kind="member",
        correct=len(left),
        total=total,
        seconds=row.seconds,
    )


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


def _notes(
    first: Evaluation, second: Evaluation, pairs: Sequence[_Pair], *, paired: bool
) -> tuple[str, ...]:
    notes = []
    harm = "robust accuracies are not comparable"
    settings = [
        *_threats(first.threat, second.threat, harm),
        ("data set", first.dataset, second.dataset, harm),
        *_draws(first, second),
        *_votes(first, second),
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
    if first.of_levels or second.of_levels:
        notes.append(
            "Levels of faults or corruptions are not compared; the table of each report has them."
        )
    firsts = [pair.first for pair in pairs]
    seconds = [pair.second for pair in pairs]
    notes += _notes_on_networks(first, firsts, "first")
    notes += _notes_on_networks(second, seconds, "second")
    notes += _notes_on_missing(first, zip(firsts, seconds, strict=True))
    notes += _notes_on_missing(second, zip(seconds, firsts, strict=True))
    for report in (first, second):
        texts = (*alarms(report), *masked(report))
        notes += [f"{report.name}: {text}" for text in texts]
    return tuple(notes)


def _draws(first: Evaluation, second: Evaluation) -> list[tuple[str, str, str, str]]:
    """Fresh forwards per image; those of a stress test are draws of the fault."""
    if first.of_levels or second.of_levels:
        return []
    return [("draws", str(first.draws), str(second.draws), "other images count as broken")]


def _votes(first: Evaluation, second: Evaluation) -> list[tuple[str, str, str, str]]:
    """What the certificates of two smoothed classifiers depend on beside the network."""
    here, there = (report.network.get("vote", {}) for report in (first, second))
    if not here or not there:
        return []
    harm = "other certificates"
    return [
        (f"{name} of the vote", str(here.get(name)), str(there.get(name)), harm)
        for name in ("sigma", "n", "alpha")
    ]


def _search(report: Evaluation) -> str:
    return "yes" if any("spike_search/" in row.member for row in report.attacks) else "no"


def _threats(
    first: ThreatModel | None, second: ThreatModel | None, harm: str
) -> list[tuple[str, str, str, str]]:
    """Every field of two threats."""
    here = _told(first)
    there = _told(second)
    return [(name.replace("_", " "), here[name], there[name], harm) for name in here]


def _told(threat: ThreatModel | None) -> dict[str, str]:
    """The fields of a threat as text."""
    found = {field.name: "none" for field in fields(ThreatModel)}
    found["counts"] = "no"
    if threat is None:
        return found
    for name, value in asdict(threat).items():
        if value is not None:
            found[name] = str(value)
    found["eps"] = eps_text(threat.eps)
    found["counts"] = "yes" if threat.counts else "no"
    return found


def _notes_on_networks(report: Evaluation, compared: Sequence[_Side], which: str) -> list[str]:
    known = {side.variant for side in compared}
    others = [name for name in _networks(report) if name not in known]
    if not others:
        return []
    network = "network" if len(others) == 1 else "networks"
    return [f"Omitted: {network} {', '.join(others)}, which only the {which} report has."]


def _notes_on_missing(report: Evaluation, sides: Iterable[tuple[_Side, _Side]]) -> list[str]:
    """How many attacks of the other report this one does not have."""
    missing = 0
    for own, other in sides:
        missing += len(other.attacks - own.attacks)
    if not missing:
        return []
    return [f"Omitted: {missing} attacks that the report of {report.name} does not have."]
