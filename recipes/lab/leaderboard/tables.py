"""Leaderboard of stored robustness reports: a table for each data set, threat and set of images, in
Markdown and as a page for a telephone first, where a bar of every network unfolds into its reports.
"""

import csv
import hashlib
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment

from sj_robust.__main__ import as_called
from sj_robust.core.saved import csv_text, markdown_table, saved_format, write_whole
from sj_robust.evaluation import Report
from sj_robust.evaluation.run.suites import GRADES

REPORTS = "reports.csv"
"""File of a leaderboard with every report."""
_DIGEST = "sha256, first 16 digits"
FORMATS = (Report.saved_as,)
"""Formats of reports."""
_NOTE = (
    "Robust accuracy lies between the share that is proved and the share still correct after all "
    "attacks, control included (at most; below it its 95 % CI). In each bar, the first part is "
    "proved, the second is open, and the rest is broken or misclassified. Do not compare tables: "
    "their data set, threat or images differ. An exclamation mark (!) means signs of "
    "gradient masking, a question mark (?) that one report proves what another breaks, a star (*) "
    "that a report was not checked."
)
HEADS = ("network", "clean, %", "proved, %", "at most, %", "checked by")
WEAKER = "Not ranked (weaker suites):"
"""Above the networks of a group that are listed apart."""
_RANKING = ("standard", "events")
"""Suites whose figures can be ranked."""
_CELLS = 20
"""Characters of a bar in Markdown."""
_TEMPLATE = Path(__file__).with_name("page.html")


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

    def details(self) -> dict[str, str]:
        """What is told of a report, by its head."""
        report = self.report
        found = {
            "network": report.name,
            "threat": report.budget,
            "suite": report.suite,
            "images": str(len(report.labels)),
        }
        shares = {
            "clean": report.clean,
            "proved": report.verified,
            "worst case": report.worst_case,
            "control": report.control,
            "at most": report.everything,
        }
        for name, share in shares.items():
            found[f"{name}, %"] = "" if share is None else share.percent
        return found | {
            "95 % CI": report.everything.interval_text,
            "caveats": report.caveats,
            "attack seconds": f"{report.everything.seconds:.0f}",
            "fingerprint": str(report.network.get("fingerprint", "")),
            "command": self.command,
        }


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


def has_digests(report: Report) -> bool:
    """Whether the adversarial images of a report can be told from others, and so be checked."""
    return all(row.digests or not row.fell for row in report.attacks)


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
        checked += "" if all(has_digests(one.report) for one in self.reports) else " *"
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


def make_leaderboard(folders: Sequence[str], output: Path, usual: Mapping[str, Any]) -> None:
    """Write leaderboard.md, leaderboard.html and reports.csv of the reports in folders; print what
    changed, and where they are.

    ``usual`` holds the default options of ``evaluate.py``, which commands leave out.

    Raises:
        FileNotFoundError: As :func:`read_reports`, and so is ValueError.
    """
    stored = read_reports(folders, usual)
    for line in _changes({one.path: one.digest for one in stored}, _listed(output)):
        print(line)
    groups = groups_of(stored)
    for line in _disputed(groups):
        print(line)
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / "leaderboard.md", _markdown(groups))
    write_whole(output / REPORTS, _csv(stored))
    write_whole(output / "leaderboard.html", _page(groups))
    print(
        f"leaderboard.md, leaderboard.html and {REPORTS} of {len(stored)} reports are in {output}"
    )


def elsewhere(board: Path) -> list[str]:
    """The reports of a leaderboard outside its own folder, as far as they are still there."""
    own = board.resolve()
    others = [path for path in _listed(board) if own not in Path(path).resolve().parents]
    return [path for path in others if Path(path).is_file()]


def read_reports(
    folders: Sequence[str], usual: Mapping[str, Any], *, may_be_empty: bool = False
) -> list[Stored]:
    """Every robustness report in folders and those below, or at a path itself, by data set, threat,
    images, the most of them first, and robust accuracy.

    Raises:
        FileNotFoundError: If a folder is missing, or there is no report in any, unless they may be
            empty.
        ValueError: If a report is damaged or was changed so that its figures do not follow from its
            outcomes; the file is named.
    """
    stored: dict[str, Stored] = {}
    for folder in map(Path, folders):
        if not folder.exists():
            raise FileNotFoundError(
                f"{folder} does not exist; --leaderboard takes folders of this recipe's reports"
            )
        for path in [folder] if folder.is_file() else sorted(folder.rglob("*.json")):
            one = _read_report(path, usual)
            if one is not None:
                stored[one.path] = one
    if not stored and not may_be_empty:
        raise FileNotFoundError(
            f"no robustness report in {', '.join(folders)}; evaluate a network first"
        )
    return sorted(stored.values(), key=_order)


def _read_report(path: Path, usual: Mapping[str, Any]) -> Stored | None:
    """The report in a file; None if it holds something else, or one that is no suite's."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    try:
        text = content.decode()
    except UnicodeDecodeError:  # no report is written like this
        return None
    if saved_format(text) not in FORMATS:
        return None
    report = Report.load(path)
    if report.suite not in GRADES:
        return None
    try:
        check_fields(report)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    digest = hashlib.sha256(content).hexdigest()[:16]
    command = _command(report.configuration, usual)
    return Stored(path.as_posix(), digest, command, report)


def check_fields(report: Report) -> None:
    """Raise ValueError if a field that a table or a check reads is of another type than it
    should be.
    """
    layers = report.network.get("layers", []) if isinstance(report.network, dict) else []
    fields = [
        ("name", report.name, _is_text(report.name), "text in UTF-8"),
        ("dataset", report.dataset, _is_text(report.dataset), "text in UTF-8"),
        ("suite", report.suite, _is_text(report.suite), "text in UTF-8"),
        ("data", report.data, isinstance(report.data, str), "text"),
        ("draws", report.draws, _is_number(report.draws, int, least=1), "an integer >= 1"),
        ("classes", report.classes, _is_number(report.classes, int), "an integer >= 0"),
        ("layers", layers, _are_objects(layers), "a list of objects"),
    ]
    for name in ("configuration", "environment", "network"):
        held = getattr(report, name)
        fields.append((name, held, isinstance(held, dict), "an object"))
    for row in report.rows:
        proves = not row.alpha or report.suite not in GRADES
        fields.append(
            (f"alpha of {row.member}", row.alpha, proves, "0, as no proof of a suite errs")
        )
        for what, number in (("largest", row.largest), ("seconds", row.seconds)):
            is_one = _is_number(number, int | float)
            fields.append((f"{what} of {row.member}", number, is_one, "a finite number >= 0"))
    for name, value, is_right, rule in fields:
        if not is_right:
            raise ValueError(f"{name} must be {rule}, got {value!r}; the file was changed")


def _is_text(value: Any) -> bool:
    """Whether there is something to read, without a half of a surrogate, which no file holds."""
    if not isinstance(value, str) or not value.strip():
        return False
    return not any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_number(value: Any, kind: Any, *, least: int = 0) -> bool:
    return isinstance(value, kind) and value is not True and least <= value < float("inf")


def _are_objects(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, dict) for value in values)


def groups_of(stored: Sequence[Stored]) -> list[Group]:
    """The tables: by data set, threat and images, networks by what attacks leave of them.

    A few images may all be easy, so networks on fewer images get a table of their own, and so do
    networks on as many others, whose title then ends with the fingerprint of the images.
    """
    groups = []
    titles = Counter(table[:3] for table in set(map(_table, stored)))
    for (dataset, budget, images, data), found in groupby(stored, key=_table):
        networks: dict[tuple[str, str, str], list[Stored]] = {}
        for one in found:
            networks.setdefault(one.network, []).append(one)
        entries = [Entry.of(reports) for reports in networks.values()]
        entries.sort(key=lambda entry: (-entry.at_most, -(entry.proved or 0.0), entry.name))
        title = f"{short_name(dataset)}, {budget}, {images:,} images"
        if titles[dataset, budget, images] > 1:
            title += f" ({data})"
        groups.append(Group(title, tuple(entries)))
    return groups


def short_name(dataset: str) -> str:
    """A data set as a heading names it: of a folder, its last part."""
    return dataset.rstrip("/").rpartition("/")[2] if ":" in dataset else dataset


def _table(one: Stored) -> tuple[str, str, int, str]:
    """Data set, threat, number of images and their fingerprint, which the reports of a table
    share.
    """
    report = one.report
    return report.dataset, report.budget, len(report.labels), report.data


def _order(one: Stored) -> tuple[str, str, int, str, float, str]:
    dataset, budget, images, data = _table(one)
    return dataset, budget, -images, data, -one.report.everything.accuracy, one.path


def _command(configuration: Mapping[str, Any], usual: Mapping[str, Any]) -> str:
    """The command of an evaluation, from the options in its report that are not the usual ones;
    nothing for others.
    """
    if not configuration.keys() & {"checkpoint", "network"}:
        return ""
    words = ["python", "recipes/evaluate.py"]
    for name, value in configuration.items():
        if name == "checkpoint" and value is not None:
            words.append(str(value))
        elif value != usual.get(name) and name != "batch_size":  # on which no figure depends
            words += _option(name, value, is_switch=isinstance(usual.get(name), bool))
    return as_called(shlex.join(words))


def _option(name: str, value: Any, *, is_switch: bool) -> list[str]:
    """An option in the words of a command line."""
    flag = name.replace("_", "-")
    if is_switch:
        return [f"--{flag}" if value else f"--no-{flag}"]
    values = value if isinstance(value, list) else [value]
    return [f"--{flag}", *map(str, values)]


def _listed(board: Path) -> dict[str, str]:
    """Digests by file of the reports that a leaderboard was made of; none before it is made.

    Raises:
        ValueError: If the file has other columns.
    """
    path = board / REPORTS
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        lines = csv.DictReader(file)
        if not {"file", _DIGEST} <= set(lines.fieldnames or ()):
            raise ValueError(
                f"{path} is not that of a leaderboard; remove it, and give the folders of all "
                "reports"
            )
        return {line["file"]: line[_DIGEST] for line in lines}


def _changes(now: Mapping[str, str], before: Mapping[str, str]) -> list[str]:
    """Files that are not what they were when the leaderboard was made, or that are gone, each as
    a line.
    """
    gone = [path for path in before if path not in now]
    changed = [path for path, digest in now.items() if before.get(path, digest) != digest]
    return [
        *(f"gone since the last leaderboard: {path}" for path in gone),
        *(f"changed since the last leaderboard: {path}" for path in changed),
    ]


def _disputed(groups: Sequence[Group]) -> list[str]:
    """Networks of which one report proves what another breaks, each as a line."""
    lines = []
    for group in groups:
        for entry in group.entries:
            if entry.disputed:
                files = ", ".join(one.path for one in entry.reports)
                lines.append(
                    f"{entry.name} ({group.title}): a report proves an image that another breaks, "
                    f"so one of them is wrong; evaluate the network again ({files})"
                )
    return lines


def _markdown(groups: Sequence[Group]) -> str:
    parts = ["# Leaderboard", _NOTE]
    parts.append(f"[Every report with its command]({REPORTS})")
    for group in groups:
        title = escape(" ".join(group.title.splitlines()), quote=False)
        parts.append(f"## {title}")
        for above, entries in group.tables:
            parts += [above] * bool(above)
            parts.append(markdown_table(HEADS, list(map(_row, entries))))
    return "\n\n".join(parts) + "\n"


def _row(entry: Entry) -> list[str]:
    name, clean, proved, at_most, checked = entry.cells()
    name = escape(name, quote=False)
    name = name.replace("\\", "\\\\").replace("[", "\\[")  # so that it is no link
    return [f"{name}<br>`{entry.bar()}`", clean, proved, f"{at_most}<br>{entry.interval}", checked]


def _csv(stored: Sequence[Stored]) -> str:
    """Every report with its file and its digest."""
    lines = []
    for one in stored:
        where = {"file": one.path, _DIGEST: one.digest}
        lines.append({"dataset": one.report.dataset} | one.details() | where)
    return csv_text(list(lines[0]), lines)


def _page(groups: Sequence[Group]) -> str:
    """The whole page, without anything from elsewhere."""
    html = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    html.filters["share"] = "{:.1f}".format
    template = html.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(note=_NOTE, heads=HEADS, groups=groups)
