"""A recipe run as a script: its exit code, and what the console is spared."""

import sys
from collections.abc import Callable

from lab.command_line.wrong_use import WrongUse
from sj_robust._host import quiet_triton
from sj_robust.training.engine import NonFiniteLossError
from sj_robust.training.signals import TrainingInterrupted

__all__ = ["run_recipe"]


def run_recipe(main: Callable[[list[str]], None], *, stopped: str = "continue with --resume") -> None:
    """Run a recipe as a script: errors in a line on stderr, the conventional exit codes. 以脚本方式运行。

    0 after success, 1 if the work failed, 2 after wrong use, 130 after Ctrl-C, and 128 plus its number after another
    signal that left a checkpoint.

    Args:
        main: Takes the words of the command line.
        stopped: What to do after Ctrl-C.
    """
    quiet_triton()
    try:
        main(sys.argv[1:])
    except TrainingInterrupted as interruption:
        print(interruption, file=sys.stderr)
        sys.exit(128 + interruption.signal_number)
    except KeyboardInterrupt:
        print(f"stopped; what is finished is kept, {stopped}", file=sys.stderr)
        sys.exit(130)
    except WrongUse as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (OSError, ValueError, ModuleNotFoundError, NonFiniteLossError) as error:
        sys.exit(f"error: {error}")
