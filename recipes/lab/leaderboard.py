"""Leaderboard of stored robustness reports, in Markdown and as a sortable page."""

import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from sj_robust.core.commands import as_called
from sj_robust.core.saved import markdown_table, saved_format, write_whole
from sj_robust.evaluation import Report
from sj_robust.evaluation.run.suites import GRADES

_HEADS = (
    "network",
    "data set",
    "images",
    "threat",
    "suite",
    "clean, %",
    "verified, %",
    "worst case, %",
    "control, %",
    "at most, %",
    "95 % CI",
    "caveats",
    "attack seconds",
    "fingerprint",
    "command",
)
_FORMATS = (Report.saved_as, "sj_robust.robustness_report")
"""Formats of reports, of today and of version 1."""
_STORED = re.compile(r"^\| `([^`]+)` \| `([0-9a-f]{16})` \|$", flags=re.MULTILINE)
_NOTE = (
    'Robust accuracy lies between "verified" and "at most", the worst case of suite and '
    "control. Rows of different data sets, threats or images are not comparable."
)
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Leaderboard</title><style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 1.5rem; color-scheme: light dark; }}
table {{ border-collapse: collapse; }}
th, td {{ border: 1px solid #8888; padding: .2rem .5rem; text-align: left; }}
th button {{ all: unset; cursor: pointer; font-weight: 600; }}
td:last-child {{ font-family: monospace; }}
th button:focus-visible {{ outline: 2px solid; }}
</style></head><body><h1>Leaderboard</h1><p>{note} Click a column heading to sort.</p>
<table><thead><tr>{heads}</tr></thead><tbody>
{rows}
</tbody></table>
<h2>Reports</h2><table><thead><tr><th>file</th><th>sha256, first 16 digits</th></tr></thead><tbody>
{reports}
</tbody></table>
<script>
document.querySelectorAll("th button").forEach((button) => button.addEventListener("click", () => {{
  const head = button.parentElement, column = head.cellIndex;
  const body = head.closest("table").tBodies[0];
  const down = head.getAttribute("aria-sort") !== "descending";
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = (row) => row.cells[column].textContent;
  const sign = down ? -1 : 1;
  const order = (a, b) => sign * value(a).localeCompare(value(b), "en", {{ numeric: true }});
  [...body.rows].sort(order).forEach((row) => body.append(row));
}}));
</script></body></html>
"""


@dataclass(frozen=True)
class _Stored:
    """A report, its path and the digest of its file."""

    path: str
    digest: str
    command: str
    report: Report

    def cells(self) -> list[str]:
        """A row of the table."""
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
            report.dataset,
            str(len(report.labels)),
            report.budget,
            report.suite,
            *("" if share is None else share.percent for share in shares),
            report.everything.interval_text,
            report.caveats,
            f"{report.everything.seconds:.0f}",
            str(report.network.get("fingerprint", "")),
            self.command,
        ]


def make_leaderboard(folders: Sequence[str], output: Path, usual: Mapping[str, Any]) -> None:
    """Write leaderboard.md and leaderboard.html of the reports in folders; print what changed, and
    where they are.

    ``usual`` holds the default options of ``evaluate.py``, which commands leave out.

    Raises:
        FileNotFoundError: As :func:`read_reports`, and so is ValueError.
    """
    stored = read_reports(folders, usual)
    for line in _changes({one.path: one.digest for one in stored}, output / "leaderboard.md"):
        print(line)
    rows = [one.cells() for one in stored]
    files = [[f"`{one.path}`", f"`{one.digest}`"] for one in stored]
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / "leaderboard.md", _markdown(rows, files))
    write_whole(output / "leaderboard.html", _html(rows, files))
    print(f"leaderboard.md and leaderboard.html of {len(stored)} reports are in {output}")


def read_reports(folders: Sequence[str], usual: Mapping[str, Any]) -> list[_Stored]:
    """Every robustness report in folders and those below, or at a path itself, by data set, threat
    and robust accuracy.

    Raises:
        FileNotFoundError: If a folder is missing, or there is no report in any.
        ValueError: If a report is damaged or was changed so that its figures do not follow from its
            outcomes; the file is named.
    """
    stored = []
    for folder in map(Path, folders):
        if not folder.exists():
            raise FileNotFoundError(
                f"{folder} does not exist; --leaderboard takes folders of this recipe's reports"
            )
        for path in [folder] if folder.is_file() else sorted(folder.rglob("*.json")):
            text = path.read_bytes()
            if saved_format(text.decode()) not in _FORMATS:
                continue
            report = Report.load(path)
            if report.suite in GRADES:
                digest = hashlib.sha256(text).hexdigest()[:16]
                command = _command(report.configuration, usual)
                stored.append(_Stored(path.as_posix(), digest, command, report))
    if not stored:
        raise FileNotFoundError(
            f"no robustness report in {', '.join(folders)}; evaluate a network first"
        )
    return sorted({one.path: one for one in stored}.values(), key=_order)


def _order(one: _Stored) -> tuple[str, str, float, str]:
    return one.report.dataset, one.report.budget, -one.report.everything.accuracy, one.path


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
            flag = name.replace("_", "-")
            if isinstance(usual.get(name), bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return as_called(shlex.join(words))


def _changes(now: Mapping[str, str], table: Path) -> list[str]:
    """Files that are not what they were when the table was made, or that are gone, each as a
    line.
    """
    before = dict(_STORED.findall(table.read_text(encoding="utf-8"))) if table.is_file() else {}
    gone = [path for path in before if path not in now]
    changed = [path for path, digest in now.items() if before.get(path, digest) != digest]
    said = {"gone": gone, "changed": changed}
    return [
        f"{word} since the last leaderboard: {path}"
        for word, paths in said.items()
        for path in paths
    ]


def _markdown(rows: Sequence[Sequence[str]], files: Sequence[Sequence[str]]) -> str:
    table = markdown_table(_HEADS, [[cell.replace("|", "\\|") for cell in row] for row in rows])
    reports = markdown_table(["file", "sha256, first 16 digits"], files)
    return f"# Leaderboard\n\n{_NOTE}\n\n{table}\n\n## Reports\n\n{reports}\n"


def _html(rows: Sequence[Sequence[str]], files: Sequence[Sequence[str]]) -> str:
    heads = "".join(f'<th><button type="button">{escape(head)}</button></th>' for head in _HEADS)
    shown, reports = ("\n".join(map(_html_row, table)) for table in (rows, files))
    return _PAGE.format(note=escape(_NOTE), heads=heads, rows=shown, reports=reports).replace(
        "`", ""
    )


def _html_row(cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
