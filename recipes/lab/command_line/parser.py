"""The parser of a recipe: jsonargparse's, with this package's help and errors in a line."""

import difflib
import re
import sys
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined]  # public, in a computed __all__

from lab.command_line.description import Option, describe
from lab.command_line.help import COMMON, help_text

__all__ = ["RecipeParser"]


class RecipeParser(ArgumentParser):
    """Parser of the options of a recipe. 脚本的参数解析器。

    Wrong use is told in a line on stderr with what would be right, and ends with exit code 2.

    Args:
        options_type: Dataclass of options, each with a default and a text; see
            :func:`lab.command_line.description.describe`.
    """

    def __init__(self, options_type: type[Any]) -> None:
        """Take the options over; see the class."""
        super().__init__()
        self._description = describe(options_type)
        self.add_argument("--config", action=ActionConfigFile)
        self.add_class_arguments(options_type)

    def format_help(self, formatter: object = None) -> str:
        """The help for this terminal."""
        return help_text(self._description)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong and stop."""
        text = " ".join(self._explained(message).split())
        sys.stderr.write(f"error: {text}; every option: python {self._description.script} --help\n")
        sys.exit(2)

    def _explained(self, message: str) -> str:
        """What jsonargparse found, as this package says it."""
        options = {option.name: option for option in (*self._description.options, *COMMON)}
        if found := re.match(r"(?:unrecognized arguments: |Option ')(?:--)?([\w.-]+)", message):
            return _unknown(found[1].partition("=")[0], list(options), message)
        if found := re.match(r"argument --([\w.-]+): expected (?:one|at least one) argument", message):
            return f"--{found[1].replace('_', '-')} needs a value"
        found = re.match(r'Parser key "(\w+)":\s*(.*)', message, re.DOTALL)
        if found is None or found[1] not in options or found[1] == "config":
            return message
        option = options[found[1]]
        got = re.findall(r"(?:Got value|Given value): (.*)", found[2])
        return f"{option.flag} must be {_wanted(option)}, got {got[-1]}" if got else f"{option.flag}: {found[2]}"


def _unknown(word: str, names: list[str], message: str) -> str:
    if message.startswith("unrecognized") and f" --{word}" not in message:
        return f"a bare {word} means nothing here; write --option VALUE"
    near = difflib.get_close_matches(word.replace("-", "_"), names, n=3, cutoff=0.6)
    flags = " or ".join("--" + name.replace("_", "-") for name in near)
    return f"there is no option --{word.replace('_', '-')}" + (f"; did you mean {flags}?" if near else "")


def _wanted(option: Option) -> str:
    """What an option takes, in words."""
    if option.choices:
        listed = ", ".join(option.choices)
        return f"a list of {listed}" if option.takes.startswith("[") else f"one of {listed}"
    if option.takes == "":
        return "true or false"
    kinds = {"N": "an integer", "X": "a number", "VALUE": "another kind of value"}
    if option.takes.startswith("["):
        return f"a list such as {option.default}" if option.default.startswith("[") else f"a list {option.takes}"
    if option.takes.startswith("{"):
        return "names with values, such as '{name: value}'"
    return kinds.get(option.takes, "text")
