"""Words of a command line to the options of a recipe."""

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

from lab.command_line.parser import RecipeParser
from lab.command_line.wrong_use import check_values
from sj_robust.training.folder import CONFIGURATION_FILE, run_to_resume

__all__ = ["named_arguments", "parse_options", "read_options", "same_names"]

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


def read_options(options_type: type[OptionsT], arguments: Sequence[str]) -> OptionsT:
    """Options of a recipe from the words of its command line. 解析命令行选项。

    Args:
        options_type: Dataclass of options; see :class:`lab.command_line.parser.RecipeParser`.
        arguments: Words of the command line, such as :func:`named_arguments` returns.

    Returns:
        The options.

    Raises:
        WrongUse: If a number is too small, a radius is none, or a data set is not known.
        SystemExit: If an option is unknown or has the wrong type (code 2), or after ``--help``.
    """
    options = _parsed(options_type, arguments)
    check_values(options)
    return options


def parse_options(
    options_type: type[OptionsT],
    arguments: Sequence[str],
    stem: Callable[[OptionsT], str],
    *,
    mark: str = "*/last.pt",
) -> OptionsT:
    """Options of a recipe; those of a run that is resumed come from its own folder first. 解析可续跑的命令行选项。

    Args:
        options_type: Dataclass with at least ``output`` and ``resume``.
        arguments: Words of the command line, such as :func:`named_arguments` returns.
        stem: Name of a run's folder up to its number.
        mark: Files that tell a run with something to go on with; see :func:`sj_robust.training.run_to_resume`.

    Returns:
        The options; ``output`` is the folder of a resumed run.

    Raises:
        FileNotFoundError: If there is no run to resume.
        WrongUse: As :func:`read_options`.
        SystemExit: As :func:`read_options`.
    """
    options: Any = read_options(options_type, arguments)
    if not options.resume:
        return options  # type: ignore[no-any-return]  # what read_options returned
    folder = run_to_resume(options.output, stem(options), mark=mark)
    resumed: Any = read_options(options_type, ["--config", str(folder / CONFIGURATION_FILE), *arguments])
    return replace(resumed, output=str(folder))  # type: ignore[no-any-return]  # as above


def _parsed(options_type: type[OptionsT], arguments: Sequence[str]) -> OptionsT:
    found = RecipeParser(options_type).parse_args(list(arguments))
    return options_type(**{field.name: found[field.name] for field in fields(options_type)})  # type: ignore[arg-type]


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
