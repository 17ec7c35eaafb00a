"""Progress on the terminal; needs rich."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn

__all__ = ["PAUSE", "MovingLine", "duration", "moving", "moving_line", "working", "write_over"]

PAUSE = 20.0
"""Seconds between lines of progress where there is no terminal."""
_NOTEBOOK = 100
"""Letters in a line of a notebook."""


@contextmanager
def working(
    text: str, console: "Console | None" = None, *, total: int | None = None
) -> Iterator[Callable[[], None]]:
    r"""Show a task, its duration and its progress. 显示正在进行的工作。

    On a terminal that can move its cursor a line with a spinner, which disappears in the end;
    in a notebook a line that is written over; elsewhere the text once, and where the number of
    steps (``total``) is known, a line now and then with the time left. A quiet console shows
    nothing. The context gives a function to call after
    every step.

    Examples:
        >>> import io
        >>> from rich.console import Console
        >>> console = Console(file=io.StringIO())
        >>> with working("adding", console, total=2) as step:
        ...     step()
        >>> console.file.getvalue()
        'adding\n'
    """
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn

    console = console or Console(highlight=False, soft_wrap=True)
    if console.is_jupyter:
        write_over(text, console)
    elif not console.is_interactive:
        console.print(text, markup=False)
    bar = (
        ()
        if total is None
        else (BarColumn(bar_width=12), TextColumn("{task.completed}/{task.total}"))
    )
    started = said = time.monotonic()
    done = 0
    with moving_line(console, TextColumn("{task.description}", markup=False), *bar) as progress:
        task = progress.add_task(text, total=total)

        def step() -> None:
            nonlocal done, said
            done += 1
            progress.advance(task)
            now = time.monotonic()
            if progress.disable and total is not None and done < total and now - said > PAUSE:
                said = now
                left = duration((now - started) / done * (total - done))
                line = f"{text}: {done}/{total}, {left} left"
                if console.is_jupyter:
                    write_over(line, console)
                else:
                    console.print(line, markup=False)

        yield step
    if console.is_jupyter:
        write_over("", console)


def write_over(text: str, console: "Console") -> None:
    """Put text in the place of the last one; a notebook understands a carriage return, and no
    cursor that moves.
    """
    if not console.quiet:
        print(f"\r{text[:_NOTEBOOK]:<{_NOTEBOOK}}", end="\r", file=console.file, flush=True)


def moving_line(console: "Console", *columns: "ProgressColumn") -> "Progress":
    """Columns of rich between a spinner and the time, on a line that disappears; nothing where it
    cannot move.
    """
    from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

    ends = SpinnerColumn("line"), TimeElapsedColumn()
    return Progress(
        ends[0], *columns, ends[1], console=console, disable=not moving(console), transient=True
    )


class MovingLine:
    """Base of what shows its ``_progress``, a :func:`moving_line`, while its context lasts."""

    _progress: "Progress"

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()


def moving(console: "Console") -> bool:
    """Whether a bar can be shown: on a terminal that moves its cursor, as neither a file nor
    ``TERM=dumb`` does.
    """
    return console.is_interactive and not console.quiet


def duration(seconds: float) -> str:
    """Seconds as people say them, such as ``1 h 5 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
