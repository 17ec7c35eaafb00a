"""The console command ``sj-robust``, also as ``python -m sj_robust``: runs the recipes, and needs
neither torch nor an extra for it.
"""

import os
import re
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

from sj_robust._version import __version__

__all__ = ["COMMANDS", "CONFIGS", "RECIPES", "Command", "as_called", "main"]

_PACKAGE = Path(__file__).parent
_INSTALLED = _PACKAGE / "recipes"

RECIPES = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "recipes"
"""Folder of the recipes: in the package where it is installed, beside it in a clone."""
CONFIGS = RECIPES / "configs"
"""Folder of the presets."""

_VARIABLE = "SJ_ROBUST_COMMAND"
"""Set in the environment of a recipe that a command started, and so of the processes it starts."""


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        recipe: Name of the recipe that it runs; empty for none.
        text: What it does.
        words: Words that stand before those of the user.
    """

    recipe: str
    text: str
    words: tuple[str, ...] = ()


COMMANDS = {
    "train": Command("adv_train", "train a robust network and measure it"),
    "evaluate": Command("evaluate", "measure how robust a network is"),
    "compare": Command("evaluate", "compare two reports: compare A B", ("--compare",)),
    "sweep": Command("sweep", "train and evaluate a grid of options and seeds"),
    "figures": Command("figures", "draw the figures of the paper from a run"),
    "leaderboard": Command(
        "evaluate", "one table of all reports: leaderboard FOLDER", ("--leaderboard",)
    ),
    "doctor": Command("", "show what is installed and what runs here"),
    "benchmark": Command("benchmark", "measure the time of layers, networks and training steps"),
}
"""By name."""
_NAMES = {command.recipe: name for name, command in COMMANDS.items() if not command.words}
_SCRIPT = re.compile(r"(torchrun [^\n]*?|python )?recipes/(\w+)\.py")
_PRESET = re.compile(r"recipes/configs/(\S+)\.yaml")


def main() -> None:
    """Run the command that the first word names, with the other words; the exit codes are those of
    the recipes.

    运行 sj-robust 的子命令。

    Raises:
        SystemExit: With code 2 if there is no such command.
    """
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        print(_help())
        return
    if name == "--version":
        print(f"sj_robust {__version__}")
        return
    if name not in COMMANDS:
        _refuse(f"there is no command {name}; there are {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    if not command.recipe:
        _run_doctor(words)
        return
    script = RECIPES / f"{command.recipe}.py"
    if not script.is_file():
        _refuse(f"{script} is missing; install sj_robust again")
    sys.argv = [str(script), *command.words, *words]
    sys.path.insert(0, str(RECIPES))  # as for python recipes/adv_train.py
    os.environ[_VARIABLE] = "1"  # for this process and those it starts
    runpy.run_path(str(script), run_name="__main__")


def as_called(text: str) -> str:
    """A text that names recipes, with ``sj-robust`` instead of their scripts if the user called it.
    按用户的调用方式显示命令。

    Args:
        text: Help, a README or an error.

    Examples:
        >>> as_called("python recipes/adv_train.py --resume")  # Python, or a recipe as a script
        'python recipes/adv_train.py --resume'
    """
    if _VARIABLE not in os.environ:
        return text
    return _PRESET.sub(r"\1", _SCRIPT.sub(_command, text))


def _command(match: re.Match[str]) -> str:
    """The command that replaces a script."""
    launcher, recipe = match.groups()
    if recipe not in _NAMES:
        return match[0]
    if launcher is None or launcher == "python ":
        return f"sj-robust {_NAMES[recipe]}"
    return f"{launcher}-m sj_robust {_NAMES[recipe]}"


def _help() -> str:
    """What the commands are."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.text}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: sj-robust COMMAND [OPTIONS]",
            "",
            "Train robust spiking networks and measure how robust they are.",
            "",
            *lines,
            "",
            "COMMAND --help shows the usual options, COMMAND --help-all every one. All commands",
            "except doctor need the optional extra 'recipes': pip install 'sj_robust[recipes]'",
        ]
    )


def _run_doctor(words: list[str]) -> None:
    """The doctor, which takes no options."""
    if "--help" in words or "-h" in words:
        print(f"usage: sj-robust doctor\n\n{COMMANDS['doctor'].text}; takes no options")
    elif words:
        _refuse(f"doctor takes no options, got {' '.join(words)}")
    else:
        runpy.run_path(str(Path(__file__).with_name("doctor.py")), run_name="__main__")


def _refuse(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
