"""Leaderboard of stored robustness reports: a table for each data set, threat and set of images."""

import csv
import hashlib
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from lab.leaderboard.entries import DETAILS, HEADS, Entry, Group, Stored
from lab.leaderboard.page import page
from sj_robust.core.commands import as_called
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
    "gradient masking, a question mark (?) that one report proves what another breaks."
)


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
    write_whole(output / "leaderboard.html", page(groups, _NOTE))
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
    texts = {"name": report.name, "dataset": report.dataset, "suite": report.suite}
    for name, value in texts.items():
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{name} must be text, got {value!r}; the file was changed")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{name} must be text in UTF-8, got {value!r}; the file was changed"
            ) from None
    if not isinstance(report.data, str):
        raise ValueError(f"data must be text, got {report.data!r}; the file was changed")
    objects = {
        "configuration": report.configuration,
        "environment": report.environment,
        "network": report.network,
    }
    for name, held in objects.items():
        if not isinstance(held, dict):
            raise ValueError(f"{name} must be an object, got {held!r}; the file was changed")
    layers = report.network.get("layers", [])
    if not isinstance(layers, list) or not all(isinstance(row, dict) for row in layers):
        raise ValueError(f"layers must be a list of objects, got {layers!r}; the file was changed")
    if type(report.draws) is not int or report.draws < 1:
        raise ValueError(
            f"draws must be an integer >= 1, got {report.draws!r}; the file was changed"
        )
    if type(report.classes) is not int or report.classes < 0:
        raise ValueError(
            f"classes must be an integer >= 0, got {report.classes!r}; the file was changed"
        )
    for row in report.rows:
        if row.alpha and report.suite in GRADES:
            raise ValueError(
                f"alpha of {row.member} must be 0, as the proofs of a suite never err, got "
                f"{row.alpha!r}; the file was changed"
            )
        for what, number in (("largest", row.largest), ("seconds", row.seconds)):
            if not isinstance(number, int | float) or not 0 <= number < float("inf"):
                raise ValueError(
                    f"{what} of {row.member} must be a finite number >= 0, got {number!r}; the "
                    "file was changed"
                )


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
        details = dict(zip(DETAILS, one.details(), strict=True))
        where = {"dataset": one.report.dataset, "file": one.path, _DIGEST: one.digest}
        lines.append(details | where)
    return csv_text(["dataset", *DETAILS, "file", _DIGEST], lines)
