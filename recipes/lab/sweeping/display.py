"""Progress of a sweep: a bar on a terminal, elsewhere a line per run."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

from lab.sweeping.plan import PlannedRun
from lab.sweeping.pool import LOG_FILE, EndedRun
from sj_robust._console import MovingLine, moving_line


class SweepDisplay(MovingLine):
    """Says how each run ended, how many of ``total`` are done and how much time is left.

    Examples:
        >>> with SweepDisplay(Console(quiet=True), total=3, done=1) as display:
        ...     display.left
        'time left not known yet'
    """

    def __init__(self, console: Console, *, total: int, done: int) -> None:
        """Nothing is shown yet; ``done`` runs were finished before."""
        self._console, self._total, self._done = console, total, done
        self._first, self._started = done, time.monotonic()
        left = TextColumn("{task.fields[left]}")
        self._progress = moving_line(
            console, TextColumn("runs"), BarColumn(bar_width=12), MofNCompleteColumn(), left
        )
        self._task = self._progress.add_task("", total=total, completed=done, left=self.left)

    @property
    def left(self) -> str:
        """Time left in words, from the runs since it was started."""
        finished = self._done - self._first
        if finished == 0:
            return "time left not known yet"
        seconds = (time.monotonic() - self._started) / finished * (self._total - self._done)
        return f"{seconds / 60:.0f} min left" if seconds >= 120 else f"{seconds:.0f} s left"

    def add(self, ended: EndedRun) -> None:
        """Say how a run ended."""
        self._done += 1
        said = _accuracies(ended.run) if ended.error is None else f"FAILED, {ended.error}"
        line = f"{self._done}/{self._total} {ended.run.name}: {said} ({ended.seconds:.0f} s)"
        tail = "" if ended.error is None else f"; see {ended.run.folder / LOG_FILE}"
        now = "" if not self._progress.disable or self._done == self._total else f"; {self.left}"
        self._console.print(line + tail + now, markup=False, highlight=False, soft_wrap=True)
        self._progress.update(self._task, completed=self._done, left=self.left)


def _accuracies(run: PlannedRun) -> str:
    """Clean accuracy and the lowest of the training's report, and the worst case of every suite."""
    record = run.record
    if record is None:
        return "no record"
    report = {name: share for name, share in record.accuracies.items() if "/" not in name}
    lowest = min(report, key=lambda name: report[name])
    shown = {name: report[name] for name in dict.fromkeys(("clean", lowest)) if name in report}
    shown |= {
        f"{suite} worst": record.accuracies[f"{suite}/everything"] for suite in record.evaluations
    }
    return ", ".join(f"{name} {share:.1%}" for name, share in shown.items())
