"""A recipe run as a script: its exit code, and what the console is spared."""

import logging
import sys
from collections.abc import Callable

from sj_robust.command_line.wrong_use import WrongUse
from sj_robust.training.engine import NonFiniteLossError
from sj_robust.training.signals import TrainingInterrupted

__all__ = ["run_recipe"]

_TRITON_LOGGER = "torch._library.triton"
_TRITON_MESSAGE = "Triton not available, find_triton_kernels = []"


def run_recipe(main: Callable[[list[str]], None], *, stopped: str = "continue with --resume") -> None:
    """Run a recipe as a script: errors in a line on stderr, the conventional exit codes. 以脚本方式运行。

    0 after success, 1 if the work failed, 2 after wrong use, 130 after Ctrl-C, and 128 plus its number after another
    signal that left a checkpoint.

    Args:
        main: Takes the words of the command line.
        stopped: What to do after Ctrl-C.
    """
    _quiet_triton()
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


def _quiet_triton() -> None:
    """Drop one message of torch, and no other.

    The first LIF layer of SpikingJelly 2.x that runs registers its kernels as Triton operators, and where Triton is not
    installed, as on any machine without a GPU, torch warns once per operator that it found none. Nothing is lost: the
    operators without Triton are used, and a recipe that needs Triton fails with an error of its own.
    """
    logging.getLogger(_TRITON_LOGGER).addFilter(_is_not_about_triton)


def _is_not_about_triton(record: logging.LogRecord) -> bool:
    return record.msg != _TRITON_MESSAGE
