"""Every option of a recipe in words: its group, what it takes, its default, what it means."""

import inspect
import json
import sys
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

__all__ = ["Description", "Group", "Option", "describe"]

_WORDS = {
    "base": "FILE",
    "checkpoint": "CHECKPOINT",
    "compare": "REPORT",
    "data_root": "FOLDER",
    "dataset": "NAME",
    "evaluator": "FILE",
    "model": "NAME",
    "network": "FUNCTION",
    "output": "FOLDER",
    "plot": "OPTION",
    "pretrained": "CHECKPOINT",
    "recipe": "FILE",
    "redraw": "FOLDER",
    "run": "FOLDER",
    "transfer": "CHECKPOINT",
}
"""What stands for the value of an option that takes text."""


@dataclass(frozen=True)
class Option:
    """One option. 一个命令行选项。

    Attributes:
        name: Name in the dataclass and in YAML, such as ``data_root``.
        takes: What stands for its value in the help, such as ``FOLDER``; empty for a switch.
        choices: The values there are; empty if they are not a few words.
        default: Default value as YAML has it.
        text: What it means.
    """

    name: str
    takes: str
    choices: tuple[str, ...]
    default: str
    text: str

    @property
    def flag(self) -> str:
        """The option on the command line, such as ``--data-root``."""
        return "--" + self.name.replace("_", "-")


@dataclass(frozen=True)
class Group:
    """Options that belong together. 选项分组。

    Attributes:
        title: Name of the group.
        options: The options.
    """

    title: str
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Description:
    """A recipe's command line. 脚本的命令行说明。

    Attributes:
        script: The recipe, as one starts it from the repository.
        summary: What it does.
        examples: Commands with what they are for.
        notes: What else there is to know.
        groups: All options.
    """

    script: str
    summary: str
    examples: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    groups: tuple[Group, ...]

    @property
    def options(self) -> tuple[Option, ...]:
        """The options of all groups."""
        return tuple(option for group in self.groups for option in group.options)


def describe(options_type: type[Any]) -> Description:
    """What a recipe's dataclass of options and the module around it say of its command line. 描述脚本的全部选项。

    Meaning and default come from the dataclass and its docstring. Its ``GROUPS``, if there is one, names groups of
    options in order, each by the first option in it: an option added to the dataclass is in the group that it stands
    in. Summary, examples and notes come from the docstring of the module.

    Args:
        options_type: The dataclass.

    Returns:
        The description.

    Raises:
        ValueError: If an option has no text or no default, or a group begins at no option.

    Examples:
        >>> @dataclass(frozen=True)
        ... class Options:
        ...     '''Options.
        ...
        ...     Attributes:
        ...         seed: Seed of everything.
        ...     '''
        ...
        ...     seed: int = 0
        >>> describe(Options).options
        (Option(name='seed', takes='N', choices=(), default='0', text='Seed of everything.'),)
    """
    module = sys.modules[options_type.__module__]
    path = Path(getattr(module, "__file__", None) or "recipe.py")
    summary, examples, notes = _parts(inspect.getdoc(module) or "")
    notes += [text for text in (_after_title(inspect.getdoc(options_type) or ""),) if text]
    texts = _texts(inspect.getdoc(options_type) or "")
    types = get_type_hints(options_type)
    titles = {first: title for title, first in getattr(options_type, "GROUPS", {}).items()}
    groups: list[tuple[str, list[Option]]] = [] if titles else [("options", [])]
    for field in fields(options_type):
        default = field.default if field.default_factory is NO_DEFAULT else field.default_factory()
        if field.name not in texts or default is NO_DEFAULT:
            raise ValueError(f"{field.name} of {path.name} needs a default, and a text under Attributes")
        if field.name in titles:
            groups.append((titles.pop(field.name), []))
        if not groups:
            raise ValueError(f"GROUPS of {path.name} must begin at {field.name}, its first option")
        takes, choices = _takes(field.name, types[field.name], default)
        groups[-1][1].append(Option(field.name, takes, choices, _as_yaml(default), texts[field.name]))
    if titles:
        raise ValueError(f"GROUPS of {path.name} names {', '.join(titles)}, which are none of its options")
    found = tuple(Group(title, tuple(options)) for title, options in groups)
    return Description(f"recipes/{path.name}", summary, tuple(examples), tuple(notes), found)


def _texts(docstring: str) -> dict[str, str]:
    """Text of every name under ``Attributes:``, in one line each."""
    texts: dict[str, str] = {}
    name = ""
    for line in docstring.partition("Attributes:\n")[2].splitlines():
        if line and not line.startswith(" "):
            break
        if line.startswith("        "):
            texts[name] += f" {line.strip()}"
        elif line.strip():
            name, _, text = line.strip().partition(": ")
            texts[name] = text
    return texts


def _after_title(docstring: str) -> str:
    """Text of the dataclass beside its title and its attributes."""
    title = docstring.partition("Attributes:\n")[0]
    return " ".join(title.split(".", 1)[1].split()) if "." in title else ""


def _parts(docstring: str) -> tuple[str, list[tuple[str, str]], list[str]]:
    """First paragraph, commands with their comments, and other paragraphs of a recipe's docstring."""
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


def _takes(name: str, kind: Any, default: object) -> tuple[str, tuple[str, ...]]:
    """What stands for the value, and the choices there are."""
    if get_origin(kind) in (Union, UnionType):
        parts = [part for part in get_args(kind) if part is not NoneType]
        null = ("null",) if len(parts) < len(get_args(kind)) else ()
        if len(parts) == 1:
            takes, choices = _takes(name, parts[0], default)
            return takes, (*choices, *null) if choices else ()
        return ("X", ()) if set(parts) == {float, str} else ("VALUE", ())
    if get_origin(kind) is Literal:
        return name.rpartition("_")[2].upper(), tuple(map(str, get_args(kind)))
    if kind is bool:
        return ("", ()) if default is False else ("BOOL", ("true", "false"))
    if get_origin(kind) in (list, tuple):
        inner, choices = _takes(name, get_args(kind)[0], None)
        return f"[{inner},...]", choices
    if get_origin(kind) is dict:
        return "{NAME: VALUE,...}", ()
    return {int: "N", float: "X", str: _WORDS.get(name, "TEXT")}.get(kind, "VALUE"), ()


def _as_yaml(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_as_yaml, value))}]"
    return value if isinstance(value, str) else json.dumps(value)
