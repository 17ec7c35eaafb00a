"""What a leaderboard shows: reports, networks by all reports about them, and which of them can be
compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sj_robust.evaluation import Report

HEADS = ("network", "clean, %", "proved, %", "at most, %", "checked by")
DETAILS = (
    "network",
    "threat",
    "suite",
    "images",
    "clean, %",
    "proved, %",
    "worst case, %",
    "control, %",
    "at most, %",
    "95 % CI",
    "caveats",
    "attack seconds",
    "fingerprint",
    "command",
)
WEAKER = "Not ranked (weaker suites):"
"""Above the networks of a group that are listed apart."""
_RANKING = ("standard", "events")
"""Suites whose figures can be ranked."""
_CELLS = 20
"""Characters of a bar in Markdown."""


@dataclass(frozen=True)
class Stored:
    """A report, its path, the digest of its file, and the command that made it."""

    path: str
    digest: str
    command: str
    report: Report

    @property
    def network(self) -> tuple[str, str, str]:
        """What reports about one network on the same images share."""
        report = self.report
        fingerprint = str(report.network.get("fingerprint", ""))
        return report.data, report.budget, fingerprint or self.path

    def details(self) -> list[str]:
        """What is told of a report, in the order of DETAILS."""
        report = self.report
        shares = (
            report.clean,
            report.verified,
            report.worst_case,
            report.control,
            report.everything,
        )
        return [
            report.name,
            report.budget,
            report.suite,
            str(len(report.labels)),
            *("" if share is None else share.percent for share in shares),
            report.everything.interval_text,
            report.caveats,
            f"{report.everything.seconds:.0f}",
            str(report.network.get("fingerprint", "")),
            self.command,
        ]


def disputes(reports: Sequence[Report]) -> frozenset[int]:
    """Images that a report about a network proves, and that the same or another report breaks
    under the same threat.
    """
    proved: set[int] = set()
    broken: set[int] = set()
    for report in reports:
        for row in report.of(report.main):
            if row.kind == "proof" and row.threat == report.threat:
                proved |= row.stood
        for row in report.attacks:
            broken |= report.broken(row)
    return frozenset(proved & broken)


@dataclass(frozen=True)
class Entry:
    """A network under a threat, by all reports about it; shares in per cent.

    Attributes:
        name: Its name in the report with the most successful attacks.
        clean: Accuracy without an attack.
        proved: What the proofs of all reports cover at least; None without proofs.
        at_most: What the attacks of all reports leave at most.
        interval: Its 95 % CI, as text.
        suites: The suites, that with the most successful attacks first.
        masked: Whether a report shows signs of gradient masking.
        disputed: Whether one report proves an image that another breaks; nothing counts as proved
            then.
        reports: The reports.
    """

    name: str
    clean: float
    proved: float | None
    at_most: float
    interval: str
    suites: tuple[str, ...]
    masked: bool
    disputed: bool
    reports: tuple[Stored, ...]

    @classmethod
    def of(cls, stored: Sequence[Stored]) -> "Entry":
        """The entry of a network whose reports these are."""
        ordered = sorted(stored, key=lambda one: one.report.everything.accuracy)
        reports = [one.report for one in ordered]
        low, high = (100 * end for end in reports[0].everything.interval)
        proofs = [one.verified.accuracy for one in reports if one.verified is not None]
        disputed = bool(disputes(reports))
        return cls(
            name=reports[0].name,
            clean=100 * reports[0].clean.accuracy,
            proved=100 * max(proofs) if proofs and not disputed else None,
            at_most=100 * reports[0].everything.accuracy,
            interval=f"{low:.1f}\N{EN DASH}{high:.1f}",  # fits on a telephone
            suites=tuple(dict.fromkeys(one.suite for one in reports)),
            masked=any(one.masked for one in reports),
            disputed=disputed,
            reports=tuple(ordered),
        )

    @property
    def is_ranked(self) -> bool:
        """Whether one of its reports is under a full suite; a weaker one may leave more."""
        return any(suite in _RANKING for suite in self.suites)

    def cells(self) -> list[str]:
        """Its row, without the bar and the interval."""
        proved = "" if self.proved is None else f"{self.proved:.1f}"
        checked = ", ".join(self.suites) + (" !" if self.masked else "")
        checked += " ?" if self.disputed else ""
        return [self.name, f"{self.clean:.1f}", proved, f"{self.at_most:.1f}", checked]

    def bar(self) -> str:
        """Its bracket in characters."""
        proved = round((self.proved or 0.0) * _CELLS / 100)
        open_ = max(round(self.at_most * _CELLS / 100) - proved, 0)
        return "█" * proved + "▒" * open_ + "·" * (_CELLS - proved - open_)


@dataclass(frozen=True)
class Group:
    """Networks that can be compared: the same images under the same threat."""

    title: str
    entries: tuple[Entry, ...]

    @property
    def tables(self) -> list[tuple[str, list[Entry]]]:
        """Its networks that are ranked and those that are not, each with what stands above it,
        without empty ones.
        """
        ranked = [entry for entry in self.entries if entry.is_ranked]
        weaker = [entry for entry in self.entries if not entry.is_ranked]
        return [(above, few) for above, few in (("", ranked), (WEAKER, weaker)) if few]
