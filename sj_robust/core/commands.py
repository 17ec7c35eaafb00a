"""The commands of ``sj-robust`` and their recipes; needs neither torch nor an extra."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["COMMANDS", "CONFIGS", "RECIPES", "Command", "as_called", "called_as_command"]

_PACKAGE = Path(__file__).parents[1]
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


def called_as_command() -> None:
    """Let this process and those it starts show commands instead of scripts."""
    os.environ[_VARIABLE] = "1"


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
