"""A robustness report, a comparison and the progress of an evaluation on the terminal; needs rich."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from sj_robust.evaluation.comparison import Comparison
from sj_robust.evaluation.progress import Position
from sj_robust.evaluation.robustness_report import Figure, RobustnessReport
from sj_robust.evaluation.verdict import alarms, masked, remarks

__all__ = ["Display", "show_comparison", "show_report"]

_PAUSE = 20.0
"""Seconds between lines of progress where there is no terminal."""


def show_report(report: RobustnessReport, console: Console) -> None:
    """Print the verdict, all accuracies, and what else a reader should know. 在终端显示报告。

    Args:
        report: The report.
        console: Where to print.

    Examples:
        >>> import io
        >>> from sj_robust.evaluation.robustness_report import RobustnessReport
        >>> console = Console(file=io.StringIO(), width=80)
        >>> report = RobustnessReport("mine", "digits", "Linf", "0.1", "fast", 2, (0, 1), (0,), ())
        >>> show_report(report, console)
        >>> "NOT ROBUST" in console.file.getvalue()
        True
    """
    for text in alarms(report):
        console.print(Panel(Text(text, style="bold red"), border_style="red"), soft_wrap=False)
    title = f"{report.name} on {report.dataset}: {report.budget}, suite {report.suite}"
    table = Table(title=title)
    table.add_column("accuracy", overflow="fold")
    for heading in ("%", "95 % interval", "images", "seconds"):
        table.add_column(heading, justify="right")
    for figure in report.figures:
        if figure.kind == "control":
            table.add_section()
        table.add_row(*_cells(figure), style=_style(figure))
    console.print(table, soft_wrap=False)
    for text in masked(report):
        console.print(Text(text, style="yellow"))
    for text in remarks(report):
        console.print(Text(text))


def show_comparison(comparison: Comparison, console: Console) -> None:
    """Print what differs between two reports. 在终端显示比较结果。

    Args:
        comparison: The comparison.
        console: Where to print.
    """
    for text in comparison.notes:
        console.print(Text(text, style="bold red" if text.startswith("DIFFERENT") else ""))
    table = Table(title=f"{comparison.names[1]} minus {comparison.names[0]}")
    table.add_column("accuracy, %", overflow="fold")
    for heading in (*comparison.names, "difference", "95 % interval"):
        table.add_column(heading, justify="right")
    for row in comparison.differences:
        low, high = (100 * end for end in row.interval)
        values = [f"{100 * figure.accuracy:.1f}" for figure in (row.first, row.second)]
        mark = " *" if row.clear else ""
        interval = f"{low:+.1f} to {high:+.1f}"
        style = "bold" if row.clear else ""
        table.add_row(row.first.name, *values, f"{100 * row.value:+.1f}{mark}", interval, style=style)
    console.print(table, soft_wrap=False)
    console.print("* the interval leaves out 0", style="dim")


class Display:
    """Progress of an evaluation: a bar with the time left on a terminal, elsewhere a line now and then. 评估进度显示。

    Args:
        console: Where to show it; a quiet one for all processes but the first.

    Examples:
        >>> with Display(Console(quiet=True)) as display:
        ...     display.on_step(Position(0, 2, "pgd", 1, 4, 30.0))
    """

    def __init__(self, console: Console) -> None:
        """Nothing is shown yet."""
        self._console = console
        self._progress = Progress(
            TextColumn("{task.fields[member]}"),
            BarColumn(bar_width=20),
            TextColumn("batch {task.fields[batch]}, {task.fields[left]}"),
            console=console,
            disable=console.quiet or not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("", total=None, member="", batch="", left="")
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        """Show the bar."""
        self._progress.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Take the bar away."""
        self._progress.stop()

    def on_step(self, position: Position) -> None:
        """Show where the evaluation stands."""
        left = f"{_duration(position.seconds_left)} left"
        batch = f"{position.batch + 1}/{position.batches}"
        if not self._progress.disable:
            self._progress.update(
                self._task,
                completed=position.done,
                total=position.total,
                member=position.member,
                batch=batch,
                left=left,
            )
        elif time.monotonic() - self._last > _PAUSE:
            self._last = time.monotonic()
            done = 100 * position.done / position.total
            self._console.print(f"{done:.0f} % done, batch {batch}, {position.member}, {left}", markup=False)


def _cells(figure: Figure) -> list[str]:
    low, high = (100 * end for end in figure.interval)
    name = f"{figure.name}, of suite and control" if figure.kind == "everything" else figure.name
    accuracy = f"{100 * figure.accuracy:.1f}"
    return [name, accuracy, f"{low:.1f} to {high:.1f}", f"{figure.correct}/{figure.total}", f"{figure.seconds:.1f}"]


def _style(figure: Figure) -> str:
    if figure.kind in ("worst case", "everything"):
        return "bold"
    return "dim" if figure.name.startswith("control/") else ""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
