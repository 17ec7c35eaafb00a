"""What the recipes' command lines share; needs the extra ``recipes``."""

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from jsonargparse import auto_cli

from sj_robust.training.engine import NonFiniteLossError, TrainingInterrupted
from sj_robust.training.folder import CONFIGURATION_FILE, run_to_resume

__all__ = ["named_arguments", "parse_options", "run_recipe", "same_names"]

SWITCHES = (
    "--compile",
    "--download",
    "--input_gain",
    "--log_bounds",
    "--report",
    "--resume",
    "--sync_batch_norm",
    "--trust_code",
)
"""Options that need no value."""

OptionsT = TypeVar("OptionsT")


def named_arguments(arguments: Sequence[str]) -> list[str]:
    """Arguments as the options are called: ``--data-root`` is ``--data_root``, a bare switch (``--resume``) is true.

    规范化命令行参数。

    Args:
        arguments: Words of the command line.

    Returns:
        Words that jsonargparse takes.

    Examples:
        >>> named_arguments(["--data-root", "data", "--resume", "--seed=1"])
        ['--data_root', 'data', '--resume=true', '--seed=1']
    """
    words = [re.sub(r"^--[\w-]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in arguments]
    for index, word in enumerate(words):
        following = words[index + 1 : index + 2]
        if word in SWITCHES and not (following and following[0] in ("true", "false")):
            words[index] = f"{word}=true"
    return words


def parse_options(
    options_type: type[OptionsT],
    arguments: Sequence[str],
    stem: Callable[[OptionsT], str],
    *,
    mark: str = "*/last.pt",
) -> OptionsT:
    """Options of a recipe; those of a run that is resumed come from its own folder first. 解析命令行选项。

    Args:
        options_type: Dataclass with at least ``output`` and ``resume``.
        arguments: Words of the command line, such as :func:`named_arguments` returns.
        stem: Name of a run's folder up to its number.
        mark: Files that tell a run with something to go on with; see :func:`sj_robust.training.run_to_resume`.

    Returns:
        The options; ``output`` is the folder of a resumed run.

    Raises:
        FileNotFoundError: If there is no run to resume.
        SystemExit: If an option is unknown or has the wrong type (code 2), or after ``--help``.
    """
    options: Any = auto_cli(options_type, args=list(arguments))
    if not options.resume:
        return options  # type: ignore[no-any-return]  # auto_cli returns an instance of what it is given
    folder = run_to_resume(options.output, stem(options), mark=mark)
    resumed: Any = auto_cli(options_type, args=["--config", str(folder / CONFIGURATION_FILE), *arguments])
    return replace(resumed, output=str(folder))  # type: ignore[no-any-return]  # as above


def same_names(target: Callable[..., Any], options: object) -> dict[str, Any]:
    """Values of ``options`` that are called as parameters of ``target`` are. 同名参数。

    Args:
        target: Class or function that takes keyword arguments.
        options: Any object.

    Returns:
        Keyword arguments for ``target``.

    Examples:
        >>> from types import SimpleNamespace
        >>> same_names(lambda seed, size=2: None, SimpleNamespace(seed=7, name="run"))
        {'seed': 7}
    """
    parameters = inspect.signature(target).parameters
    return {name: getattr(options, name) for name in parameters if hasattr(options, name)}


def run_recipe(main: Callable[[list[str]], None]) -> None:
    """Run a recipe as a script: errors in a line on stderr, the conventional exit codes. 以脚本方式运行。

    Exit code 1 after an error, 130 after Ctrl-C, 128 plus its number after a signal that left a checkpoint.

    Args:
        main: Takes the words of the command line.
    """
    try:
        main(sys.argv[1:])
    except TrainingInterrupted as interruption:
        print(interruption, file=sys.stderr)
        sys.exit(128 + interruption.signal_number)
    except KeyboardInterrupt:
        print("stopped; what is finished is kept, continue with --resume", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError, ModuleNotFoundError, NonFiniteLossError) as error:
        sys.exit(f"error: {error}")
