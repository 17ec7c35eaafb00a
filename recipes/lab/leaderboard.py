"""Stored robustness reports as one table, in Markdown and as a page that sorts; rebuilt from them alone."""

import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from sj_robust._saved import markdown_table, saved_format, write_whole
from sj_robust.evaluation import RobustnessReport

_HEADS = (
    "network", "data set", "images", "threat", "suite", "clean, %", "verified, %", "worst case, %", "control, %",
    "at most, %", "95 % interval", "doubts", "attack seconds", "fingerprint", "command",
)  # fmt: skip
_STORED = re.compile(r"^\| `([^`]+)` \| `([0-9a-f]{16})` \|$", flags=re.MULTILINE)
_NOTE = (
    "At most: right after every attack of suite and control; the true robust accuracy lies between verified and this. "
    "Figures of different data sets, threats or images cannot be compared."
)
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Leaderboard</title><style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 1.5rem; color-scheme: light dark; }}
table {{ border-collapse: collapse; }} th, td {{ border: 1px solid #8888; padding: .2rem .5rem; text-align: left; }}
th button {{ all: unset; cursor: pointer; font-weight: 600; }} td:last-child {{ font-family: monospace; }}
th button:focus-visible {{ outline: 2px solid; }}
</style></head><body><h1>Leaderboard</h1><p>{note} A click on a head sorts by it.</p>
<table><thead><tr>{heads}</tr></thead><tbody>
{rows}
</tbody></table>
<h2>Reports</h2><table><thead><tr><th>file</th><th>sha256, first 16 digits</th></tr></thead><tbody>
{reports}
</tbody></table>
<script>
document.querySelectorAll("th button").forEach((button) => button.addEventListener("click", () => {{
  const head = button.parentElement, column = head.cellIndex, body = head.closest("table").tBodies[0];
  const down = head.getAttribute("aria-sort") !== "descending";
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = (row) => row.cells[column].textContent;
  const order = (a, b) => value(a).localeCompare(value(b), "en", {{ numeric: true }}) * (down ? -1 : 1);
  [...body.rows].sort(order).forEach((row) => body.append(row));
}}));
</script></body></html>
"""


@dataclass(frozen=True)
class _Stored:
    """A report with where it lies and what its file holds."""

    path: str
    digest: str
    command: str
    report: RobustnessReport

    @property
    def file(self) -> tuple[str, str]:
        """Its row in the table of the files."""
        return f"`{self.path}`", f"`{self.digest}`"

    def cells(self) -> list[str]:
        """A row of the table."""
        report = self.report
        verified = report.under("verified") if report.verified is not None else None
        shares = (report.clean, verified, report.worst_case, report.control, report.everything)
        return [
            report.name, report.dataset, str(len(report.labels)), report.budget, report.suite,
            *("" if share is None else share.percent for share in shares), report.everything.interval_text,
            report.doubts, f"{report.everything.seconds:.0f}", str(report.network.get("fingerprint", "")), self.command,
        ]  # fmt: skip


@dataclass(frozen=True)
class Leaderboard:
    """The table of stored reports: by data set, threat and what all attacks leave."""

    stored: tuple[_Stored, ...]

    def markdown(self) -> str:
        """The table, and the files it was made of."""
        rows = [[cell.replace("|", "\\|") for cell in one.cells()] for one in self.stored]
        reports = markdown_table(["file", "sha256, first 16 digits"], [one.file for one in self.stored])
        return f"# Leaderboard\n\n{_NOTE}\n\n{markdown_table(_HEADS, rows)}\n\n## Reports\n\n{reports}\n"

    def html(self) -> str:
        """The page, whose heads sort."""
        heads = "".join(f'<th><button type="button">{escape(head)}</button></th>' for head in _HEADS)
        rows = "\n".join(_html_row(one.cells()) for one in self.stored)
        reports = "\n".join(_html_row(one.file) for one in self.stored)
        return _PAGE.format(note=escape(_NOTE), heads=heads, rows=rows, reports=reports).replace("`", "")

    def changed(self, folder: Path) -> list[str]:
        """Files that are not what they were when the table in a folder was made, or that are gone; each as a line."""
        path = folder / "leaderboard.md"
        before = dict(_STORED.findall(path.read_text(encoding="utf-8"))) if path.is_file() else {}
        now = {one.path: one.digest for one in self.stored}
        gone = [f"gone since the last leaderboard: {path}" for path in before if path not in now]
        return gone + [
            f"changed since the last leaderboard: {path}"
            for path, digest in now.items()
            if before.get(path, digest) != digest
        ]


def make_leaderboard(folders: Sequence[str], output: Path, usual: Mapping[str, Any]) -> None:
    """Write leaderboard.md and leaderboard.html of the reports in folders; print what changed, and where they are.

    ``usual`` holds the default options of ``evaluate.py``, which commands leave out.

    Raises:
        FileNotFoundError: As :func:`read_reports`, and so is ValueError.
    """
    board = read_reports(folders, usual)
    for line in board.changed(output):
        print(line)
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / "leaderboard.md", board.markdown())
    write_whole(output / "leaderboard.html", board.html())
    print(f"leaderboard.md and leaderboard.html of {len(board.stored)} reports are in {output}")


def read_reports(folders: Sequence[str], usual: Mapping[str, Any]) -> Leaderboard:
    """Every robustness report in folders and those below, or at a path itself.

    Raises:
        FileNotFoundError: If a folder is missing, or there is no report in any.
        ValueError: If a report is damaged or was changed so that its figures do not follow from its outcomes; the file
            is named.
    """
    stored = []
    for folder in map(Path, folders):
        if not folder.exists():
            raise FileNotFoundError(f"{folder} does not exist; --leaderboard takes folders of this recipe's reports")
        for path in [folder] if folder.is_file() else sorted(folder.rglob("*.json")):
            text = path.read_bytes()
            if saved_format(text.decode()) == RobustnessReport.saved_as:
                digest = hashlib.sha256(text).hexdigest()[:16]
                report = RobustnessReport.load(path)
                stored.append(_Stored(path.as_posix(), digest, _command(report.configuration, usual), report))
    if not stored:
        raise FileNotFoundError(f"no robustness report in {', '.join(folders)}; evaluate a network first")
    return Leaderboard(tuple(sorted({one.path: one for one in stored}.values(), key=_order)))


def _order(one: _Stored) -> tuple[str, str, float, str]:
    return one.report.dataset, one.report.budget, -one.report.everything.accuracy, one.path


def _command(configuration: Mapping[str, Any], usual: Mapping[str, Any]) -> str:
    """The command of an evaluation, from the options in its report that are not the usual ones; nothing for others."""
    if not configuration.keys() & {"checkpoint", "network"}:
        return ""
    words = ["python", "recipes/evaluate.py"]
    for name, value in configuration.items():
        if name == "checkpoint" and value is not None:
            words.append(str(value))
        elif value != usual.get(name) and name != "batch_size":  # on which no figure depends
            words.append("--" + name.replace("_", "-"))
            words += [] if value is True and usual.get(name) is False else [json.dumps(value).strip('"')]
    return shlex.join(words)


def _html_row(cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
