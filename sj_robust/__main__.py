"""The console command ``sj-robust``, also as ``python -m sj_robust``: runs the recipes."""

import runpy
import sys
from pathlib import Path

from sj_robust._version import __version__
from sj_robust.core.commands import COMMANDS, RECIPES, called_as_command

__all__ = ["main"]


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
    called_as_command()
    runpy.run_path(str(script), run_name="__main__")


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
