"""Reports, comparisons and progress on the terminal; needs rich."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from sj_robust.core.console import PAUSE, MovingLine, duration, moving_line, write_over
from sj_robust.evaluation.report.comparison import Comparison
from sj_robust.evaluation.report.verdict import alarms, budget, masked, remarks, verdict
from sj_robust.evaluation.result import Evaluation
from sj_robust.evaluation.run.progress import Position

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Display", "show_comparison", "show_report"]


def show_report(
    report: Evaluation, console: "Console", say: Callable[[str], None] | None = None
) -> None:
    """Print the verdict, all accuracies, and what else a reader should know. 在终端显示报告。

    Args:
        report: The report.
        console: Where to print.
        say: What prints and keeps the verdict; None prints it.

    Examples:
        >>> import io
        >>> from rich.console import Console
        >>> from sj_robust.evaluation import Report
        >>> from sj_robust.evaluation.result import Row
        >>> console = Console(file=io.StringIO(), width=80)
        >>> rows = [Row("clean", "clean", (0, 1), (1,))]
        >>> show_report(Report("mine", "digits", "fast", (0, 1), rows, classes=2), console)
        >>> "NOT ROBUST" in console.file.getvalue()
        True
    """
    from rich.panel import Panel
    from rich.table import Column, Table
    from rich.text import Text

    if say is None:
        console.print(Text(verdict(report), style="bold"))
    else:
        say(verdict(report))
    for text in alarms(report):
        alarm = Panel(Text(text, style="bold red"), border_style="red")
        console.print(alarm, soft_wrap=False)
    title = f"{report.name} on {report.dataset}: {budget(report.threat)}, suite {report.suite}"
    table = Table(Column("accuracy", overflow="fold"), title=Text(title))
    for heading in ("%", "95 % CI", "correct", "seconds"):
        table.add_column(heading, justify="right")
    for one in report.accuracies:
        if one.kind in ("control", "verified"):
            table.add_section()
        name = one.name
        if one.kind == "everything" and report.control is not None:
            name = f"{name} (suite and control)"
        style = ""
        if one.kind in ("worst case", "everything", "verified"):
            style = "bold"
        elif one.name.startswith("control/"):
            style = "dim"
        correct = f"{one.correct}/{one.total}"
        seconds = f"{one.seconds:.1f}"
        table.add_row(Text(name), one.percent, one.interval_text, correct, seconds, style=style)
    console.print(table, soft_wrap=False)
    for text in masked(report):
        console.print(Text(text, style="yellow"))
    for text in remarks(report):
        console.print(Text(text))


def show_comparison(comparison: Comparison, console: "Console") -> None:
    """Print what differs between two reports. 在终端显示比较结果。

    Args:
        comparison: The comparison.
        console: Where to print.

    Examples:
        >>> import io
        >>> from rich.console import Console
        >>> from sj_robust.evaluation import Report, compare_reports
        >>> from sj_robust.evaluation.result import Row
        >>> console = Console(file=io.StringIO(), width=80)
        >>> rows = [Row("clean", "clean", (0, 1), (1,))]
        >>> report = Report("mine", "digits", "fast", (0, 1), rows)
        >>> show_comparison(compare_reports(report, report), console)
        >>> "mine (second) minus mine (first)" in console.file.getvalue()
        True
    """
    from rich.table import Column, Table
    from rich.text import Text

    for text in comparison.notes:
        console.print(Text(text, style="bold red" if text.startswith("DIFFERENT") else ""))
    headings = (*comparison.names, "difference", "95 % CI")
    numbers = (Column(Text(heading), justify="right") for heading in headings)
    title = f"{comparison.names[1]} minus {comparison.names[0]}"
    table = Table(Column("accuracy, %", overflow="fold"), *numbers, title=Text(title))
    for row in comparison.differences:
        table.add_row(*map(Text, row.cells()), style="bold" if row.clear else "")
    console.print(table, soft_wrap=False)
    console.print("* the interval excludes 0", style="dim")


class Display(MovingLine):
    """Progress of an evaluation with the time left: a bar on a terminal, one line that is written
    over in a notebook, elsewhere a line now and then. 评估进度显示。

    Args:
        console: Where to show it; a quiet one for all processes but the first.
        say: What prints and keeps a line about each part; None prints it.

    Examples:
        >>> from rich.console import Console
        >>> with Display(Console(quiet=True)) as display:
        ...     display.say("suite fast")
        ...     display.on_step(Position(0, 2, "pgd", 1, 4, 30.0))
    """

    def __init__(self, console: "Console", say: Callable[[str], None] | None = None) -> None:
        """Nothing is shown yet."""
        from rich.progress import BarColumn, TextColumn

        self._console = console
        self._say = say
        left = TextColumn("{task.fields[left]}", markup=False)
        name = TextColumn("{task.description}", markup=False)
        self._progress = moving_line(console, name, BarColumn(bar_width=12), left)
        self._task = self._progress.add_task("preparing", total=None, left="")
        self._last = time.monotonic()

    def __exit__(self, *exception: object) -> None:
        """Remove the line."""
        super().__exit__(*exception)
        if self._console.is_jupyter:
            write_over("", self._console)

    def say(self, text: str) -> None:
        """Show which part begins; the bar has no end until a step is done."""
        if self._console.is_jupyter:
            write_over(text, self._console)
        elif self._say is None:
            self._console.print(text, markup=False)
        else:
            self._say(text)
        self._progress.remove_task(self._task)  # a task cannot go back to having no end
        self._task = self._progress.add_task(text.partition(":")[0], total=None, left="")
        self._progress.refresh()  # a part may end before the next tenth of a second

    def on_step(self, position: Position) -> None:
        """Show the progress of the evaluation."""
        left = f"{duration(position.seconds_left)} left"
        batch = f"{position.batch + 1}/{position.batches}"
        if not self._progress.disable:
            self._progress.update(
                self._task,
                completed=position.done,
                total=position.total,
                description=position.member,
                left=f"batch {batch}, {left}",
            )
            return
        text = (
            f"{100 * position.done / position.total:.0f} % done, {left}, batch {batch}, "
            f"{position.member}"
        )
        if self._console.is_jupyter:
            write_over(text, self._console)
        elif time.monotonic() - self._last > PAUSE:
            self._last = time.monotonic()
            self._console.print(text, markup=False)
