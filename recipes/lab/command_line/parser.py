"""Options of a recipe from the words of its command line: jsonargparse, with short help and errors
in a line.
"""

import argparse
import difflib
import inspect
import json
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

# public, in a computed __all__
from jsonargparse import (  # type: ignore[attr-defined]
    ActionConfigFile,
    ArgumentParser,
    DefaultHelpFormatter,
)

from lab.command_line.declared import Option, options_of
from sj_robust.core.folders import read_text

OptionsT = TypeVar("OptionsT")


class WrongUse(ValueError):  # noqa: N818  # the name of what was done, as SystemExit's
    """A recipe was asked for what cannot be: nothing was done, and the exit code is 2."""


class RecipeParser(ArgumentParser):
    """Parser of a recipe's dataclass of options, see :func:`lab.command_line.option`."""

    def __init__(self, options_type: type[Any], *, all_in_help: bool = True) -> None:
        """Take the options over; the help shows all of them, or those that people change often."""
        module = sys.modules[options_type.__module__]
        self.script = f"recipes/{Path(getattr(module, '__file__', None) or 'recipe.py').name}"
        self.options = {one.name: one for one in options_of(options_type)}
        usage = f"python {self.script} [--option VALUE ...]"
        description = inspect.getdoc(module) or ""
        super().__init__(usage=usage, description=description, formatter_class=_Help)
        text = "Options from a YAML file; those on the command line after it win."
        self.add_argument("--config", action=ActionConfigFile, metavar="FILE", help=text)
        self.all_flag = (
            "--help-all" if any(one.in_short_help for one in self.options.values()) else "--help"
        )
        if self.all_flag == "--help-all":
            text = "Print every option and stop; --help has those that are changed most."
            self.add_argument("--help_all", action="help", help=text)
        group: Any = self
        for one in self.options.values():
            group = self.add_argument_group(one.group) if one.group else group
            metavar = shown_value(one)
            text = meaning(one) + (f" [default: {as_yaml(one.default)}]" if metavar else "")
            if not (all_in_help or one.in_short_help or self.all_flag == "--help"):
                text = argparse.SUPPRESS
            group.add_argument(
                f"--{one.name}", type=one.kind, default=one.default, help=text, metavar=metavar
            )

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise WrongUse, in a line."""
        text = " ".join(self._explained(message).split())
        raise WrongUse(f"{text}; every option: python {self.script} {self.all_flag}")

    def values(self, given: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
        """All options by name, checked: from words of a command line, or from some of them as plain
        data.
        """
        if isinstance(given, Mapping):
            words = {name: self._word(name, value) for name, value in given.items()}
            found = self.parse_object(words)
        else:
            found = self._parsed(named_arguments(self.options, given))
        values = {name: _builtin(found[name]) for name in self.options}
        for name, value in values.items():
            try:
                self.options[name].check(value)
            except ValueError as error:
                self.error(str(error))
        return values

    def _parsed(self, words: list[str]) -> Any:
        """What jsonargparse makes of the words; a file of options in another encoding is named."""
        try:
            return self.parse_args(words)
        except UnicodeDecodeError:
            for word in words:
                if word.startswith("--config="):
                    try:
                        read_text(Path(word.removeprefix("--config=")))
                    except ValueError as error:
                        self.error(str(error))
            raise

    def _word(self, name: str, value: Any) -> Any:
        """The value, or the word ``no``, which YAML reads as false, where an option has that to
        choose.
        """
        one = self.options.get(name)
        return "no" if value is False and one is not None and "no" in one.value[1] else value

    def _explained(self, message: str) -> str:
        """What jsonargparse found, in this project's words."""
        if found := re.match(r"(?:unrecognized arguments: |Option ')(?:--)?([\w.-]+)", message):
            word = found[1].replace("-", "_")
            near = difflib.get_close_matches(
                word, [*self.options, "config", "help"], n=3, cutoff=0.6
            )
            flags = " or ".join("--" + name.replace("_", "-") for name in near)
            remedy = f"; did you mean {flags}?" if near else ""
            return f"there is no option --{word.replace('_', '-')}{remedy}"
        if found := re.match(
            r"argument --([\w.-]+): expected (?:one|at least one) argument", message
        ):
            return f"--{found[1].replace('_', '-')} needs a value"
        found = re.match(r'Parser key "(\w+)"[^:]*:\s*(.*)', message, re.DOTALL)
        if found is None or found[1] not in self.options:
            return message
        one = self.options[found[1]]
        got = re.findall(
            r"(?:Got value|Given value): (.*)|: (\S+) does not conform|with base 10: '(.*)'",
            found[2],
        )
        return (
            f"{one.flag} must be {_wanted(one)}, got {''.join(got[-1])}"
            if got
            else f"{one.flag}: {found[2]}"
        )


class _Help(DefaultHelpFormatter):
    """Flags with dashes, texts from one column on, examples as commands with what they are for
    above them.
    """

    def __init__(self, prog: str, **options: Any) -> None:
        width = max(40, min(120, shutil.get_terminal_size().columns))
        # untyped in jsonargparse
        super().__init__(  # type: ignore[no-untyped-call]
            prog, max_help_position=28 if width >= 70 else 6, width=width, **options
        )

    def _format_action_invocation(self, action: Any) -> str:
        flag = next(word for word in action.option_strings if word.startswith("--"))
        return f"{flag.replace('_', '-')} {action.metavar or ''}".rstrip()

    def _get_help_string(self, action: Any) -> str:
        return str(action.help)

    def _split_lines(self, text: str, width: int) -> list[str]:
        text = text.replace("[default: ", "[default:\0")
        lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
        return [line.replace("\0", " ") for line in lines]

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        summary, examples, notes = examples_in(text)
        lines = []
        for command, comment in examples:
            lines += [*([f"  # {comment}"] if comment else []), *_broken(command, width)]
        paragraphs = [
            textwrap.fill(summary, width),
            "\n".join(["examples:", *lines]) if lines else "",
        ]
        return "\n\n".join(
            [*filter(None, paragraphs), *(textwrap.fill(note, width) for note in notes)]
        )


def read_options(options_type: type[OptionsT], arguments: Sequence[str]) -> OptionsT:
    """Options from the words of a command line; WrongUse for a wrong one, ModuleNotFoundError for
    one that needs what is not installed, SystemExit after ``--help``.
    """
    few = not {"--help-all", "--help_all"} & set(arguments)
    parser = RecipeParser(options_type, all_in_help=not few)
    values = parser.values(arguments)
    for name, one in parser.options.items():
        one.check_installed(values[name])
    return options_type(**values)


def parse_options(
    options_type: type[OptionsT],
    arguments: Sequence[str],
    stem: Callable[[OptionsT], str],
    *,
    mark: str = "*/last.pt",
) -> OptionsT:
    """Options of a recipe with ``output`` and ``resume``; those of a run that is resumed come from
    its folder first.

    ``stem`` names a run's folder up to its number, ``mark`` the files that tell a run with
    something to go on with, as :func:`sj_robust.training.run_to_resume` takes them.
    """
    options: Any = read_options(options_type, arguments)
    if not options.resume:
        return options  # type: ignore[no-any-return]  # what read_options returned
    from sj_robust.training.folder import CONFIGURATION_FILE, run_to_resume  # imports torch

    folder = run_to_resume(options.output, stem(options), mark=mark)
    resumed: Any = read_options(
        options_type, ["--config", str(folder / CONFIGURATION_FILE), *arguments]
    )
    check_code(resumed, options, folder / CONFIGURATION_FILE)
    return replace(resumed, output=str(folder))  # type: ignore[no-any-return]  # as above


def check_code(options: Any, given: Any, path: Path) -> None:
    """Raise WrongUse for code that the options of a folder's file name and those of the command
    line do not.
    """
    for one in options_of(type(options)):
        value = getattr(options, one.name)
        if (
            one.runs_code
            and value != getattr(given, one.name)
            and (value is True or _names_code(value))
        ):
            said = one.flag if value is True else f"{one.flag} {shlex.quote(as_yaml(value))}"
            raise WrongUse(
                f"{path} names code that would be run; if you trust it, name it here as well: "
                f"{said}"
            )


def _names_code(value: object) -> bool:
    """Whether a value is a file of Python or a function of one's own, or holds such a value."""
    if isinstance(value, dict | list | tuple):
        return any(map(_names_code, value.values() if isinstance(value, dict) else value))
    text = str(value)
    return text.endswith(".py") or (":" in text and not text.startswith(("zoo:", "image_folder:")))


def named_arguments(options: Mapping[str, Option], arguments: Sequence[str]) -> list[str]:
    """Each option with its value in one word, as jsonargparse takes it.

    ``--data-root x`` is ``--data_root=x``; a switch alone is true, and false as ``--no-download``;
    several words after an option of a list are its list; a bare word is the value of the option
    that is positional.
    """
    positional = next((one.name for one in options.values() if one.positional), "")
    words, found = list(arguments), list[str]()
    while words:
        word, equals, value = words.pop(0).partition("=")
        if not word.startswith("-"):
            found.append(_bare(positional, word + equals + value, found))
            continue
        if not word.startswith("--"):
            found.append(word)
            continue
        name = word[2:].replace("-", "_")
        one, opposite = options.get(name), options.get(name.removeprefix("no_"))
        takes_words = one is not None and one.takes_a_list
        count = next(
            (index for index, other in enumerate(words) if other.startswith("--")), len(words)
        )
        if one is None and opposite is not None and opposite.kind is bool and not equals:
            name, equals, value = opposite.name, "=", "false"
        elif one is not None and one.kind is bool and not equals:
            said = words[:1] in (["true"], ["false"]) or (count and not positional)
            equals, value = "=", words.pop(0) if said else "true"
        elif count and not equals:
            given = words[: count if takes_words else 1]
            del words[: len(given)]
            one_word = len(given) == 1 and (given[0].startswith("[") or not takes_words)
            equals, value = "=", given[0] if one_word else f"[{', '.join(given)}]"
        found.append(f"--{name}{equals}{value}")
    return found


def shown_value(one: Option) -> str:
    """What stands for the value of an option: the choices if they are few, empty for a switch."""
    takes, choices = one.value
    listed = "|".join(choices)
    if not takes or not listed or len(listed) > 40:
        return takes
    return f"[{listed},...]" if takes.startswith("[") else listed


def meaning(one: Option) -> str:
    """The words of an option, with the choices that neither they nor the head name."""
    words = set(re.findall(r"[\w-]+", f"{one.words} {shown_value(one)}"))
    _, choices = one.value
    return one.words if set(choices) <= words else f"{one.words} One of {', '.join(choices)}."


def as_yaml(value: object) -> str:
    """A default value as YAML has it."""
    return json.dumps(value).replace('"', "")


def examples_in(docstring: str) -> tuple[str, list[tuple[str, str]], list[str]]:
    """First paragraph, commands with their comments, and other paragraphs of a recipe's
    docstring.
    """
    summary, examples, notes = "", [], []
    for paragraph in docstring.split("\n\n"):
        lines = [line.strip() for line in paragraph.splitlines()]
        if lines[0].startswith(("python ", "torchrun ")):
            pairs = (line.partition(" # ")[::2] for line in lines)
            examples += [(command.strip(), comment.strip()) for command, comment in pairs]
        elif summary:
            notes.append(" ".join(lines))
        else:
            summary = " ".join(lines)
    return summary, examples, notes


def _broken(command: str, width: int) -> list[str]:
    """A command in lines, as a shell takes them; words stay with the option before them."""
    joined = re.sub(r" (?!--)", "\0", command)
    lines = textwrap.wrap(joined, width - 8, break_long_words=False, break_on_hyphens=False)
    return ("  " + " \\\n      ".join(lines)).replace("\0", " ").splitlines()


def _bare(name: str, word: str, found: Sequence[str]) -> str:
    if not name:
        raise WrongUse(f"a bare {word} means nothing here; write --option VALUE")
    if any(other.startswith(f"--{name}=") for other in found):
        raise WrongUse(f"one {name} at a time, got another one, {word}; it needs a call of its own")
    return f"--{name}={word}"


def _builtin(value: Any) -> Any:
    """A number of jsonargparse's as one of Python's, which files and checkpoints take."""
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    return value


def _wanted(one: Option) -> str:
    """What an option takes, in words."""
    takes, choices = one.value
    if choices:
        return (
            f"a list of {', '.join(choices)}"
            if takes.startswith("[")
            else f"one of {', '.join(choices)}"
        )
    if takes.startswith("["):
        return f"a list such as {as_yaml(one.default)}" if one.default else f"a list {takes}"
    kinds = {
        "": "true or false",
        "N": "an integer",
        "X": "a number",
        "VALUE": "another kind of value",
    }
    kinds["{NAME: VALUE,...}"] = "names with values, such as '{name: value}'"
    return kinds.get(takes, "text") + _range(one.kind)


def _range(kind: Any) -> str:
    """`` > 0`` of a restricted type of jsonargparse, which says it in its docstring; empty for
    others.
    """
    said = "\n".join(getattr(part, "__doc__", None) or "" for part in (kind, *get_args(kind)))
    found = re.search(r"restricted to be (.*)", said)
    return (
        re.sub(r"([<>]=?) ?", r" \1 ", found[1].replace("≥", ">=")).rstrip().replace("  ", " ")
        if found
        else ""
    )
