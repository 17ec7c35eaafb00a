"""A recipe run as a script: wrong use told from failed work, the exit codes, what the console is
spared, and the README of the output folder.
"""

import errno
import io
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from lab.command_line.read import WrongUse, read_options
from sj_robust.__main__ import as_called

_TEMPLATES = Path(__file__).with_name("readmes")
_BROKEN_PIPE = 141
"""Exit code: 128 plus the number of SIGPIPE, as other commands have it."""


@contextmanager
def checked() -> Iterator[None]:
    """What a ValueError refuses inside is wrong use, since nothing but options is looked at
    there.
    """
    try:
        yield
    except WrongUse:
        raise
    except ValueError as error:
        raise WrongUse(str(error)) from error


def check_options(options_type: type[Any], arguments: Sequence[str] | None = None) -> None:
    """Answer ``--help`` and wrong options, before a script imports what takes seconds.

    The words are those of this process unless others are given. If nobody reads the output
    any more, as in ``--help | head``, the process ends without a message.
    """
    try:
        try:
            read_options(options_type, sys.argv[1:] if arguments is None else arguments)
        finally:
            if sys.stdout is not None:  # as it is where the console is closed
                sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        sys.exit(_BROKEN_PIPE)
    except WrongUse as error:
        _refuse(error)
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}")


def run_recipe(
    main: Callable[[list[str]], None], *, stopped: str = "continue with --resume"
) -> None:
    """Run a recipe as a script: errors in a line on stderr, the conventional exit codes.

    0 after success, 1 if the work failed, 2 after wrong use, 130 after Ctrl-C (``stopped`` says
    what to do then), and 128 plus its number after another signal that left a checkpoint. What the
    terminal has no character for is shown as a question mark.
    """
    from sj_robust.core.host import (
        quiet_triton,  # these import torch, which --help does not wait for
    )
    from sj_robust.training import NonFiniteLossError, TrainingInterrupted

    quiet_triton()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        main(sys.argv[1:])
    except TrainingInterrupted as interruption:
        print(interruption, file=sys.stderr)
        sys.exit(128 + interruption.signal_number)
    except KeyboardInterrupt:
        print(f"stopped; what is finished is kept, {stopped}", file=sys.stderr)
        sys.exit(130)
    except WrongUse as error:
        _refuse(error)
    except (OSError, ValueError, ModuleNotFoundError, NonFiniteLossError) as error:
        full = isinstance(error, OSError) and error.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
        )
        remedy = f"; free some space there: {stopped}" if full else ""
        sys.exit(as_called(f"error: {error}{remedy}"))


def describe_folder(folder: Path, recipe: str, arguments: Sequence[str]) -> None:
    """Write the README of an output folder, from ``readmes``; commands that wrote into it before
    stay in it.
    """
    from sj_robust.core.saved import write_whole  # imports torch

    path = folder / "README.md"
    earlier = path.read_text(encoding="utf-8") if path.is_file() else ""
    commands = earlier.partition("```text\n")[2].partition("\n```")[0].splitlines()
    commands.append(
        " ".join(shlex.join(["python", f"recipes/{recipe}.py", *arguments]).splitlines())
    )
    text = (
        (_TEMPLATES / f"{recipe}.md")
        .read_text(encoding="utf-8")
        .replace("FOLDER", shlex.quote(str(folder)))
    )
    text = text.replace("COMMANDS", "\n".join(dict.fromkeys(commands)), 1)
    write_whole(path, as_called(text))


def _refuse(error: WrongUse) -> NoReturn:
    print(as_called(f"error: {error}"), file=sys.stderr)
    sys.exit(2)
