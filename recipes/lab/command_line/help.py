"""The help of a recipe: for a terminal of any width, and as a page of the documentation."""

import re
import shutil
import textwrap

from lab.command_line.description import Description, Option

__all__ = ["help_text", "options_page"]

_COLUMN = 28
"""Where the texts of the options begin."""
_WIDEST = 120

COMMON = (
    Option("config", "FILE", (), "", "Options from a YAML file; those on the command line after it win."),
    Option("print_config", "", (), "", "Print all options as YAML, to save and change, and stop."),
    Option("help", "", (), "", "Print this text and stop; -h likewise."),
)
"""Options that every recipe has."""


def help_text(description: Description, width: int | None = None) -> str:
    """The help as text. 终端帮助文本。

    Args:
        description: The recipe.
        width: Columns; None for those of the terminal, 120 at most.

    Returns:
        The text.

    Examples:
        >>> print(help_text(Description("recipes/mine.py", "Do it.", (), (), ()), 60).splitlines()[0])
        usage: python recipes/mine.py [--option VALUE ...]
    """
    width = max(40, min(_WIDEST, width or shutil.get_terminal_size().columns))
    parts = [f"usage: python {description.script} [--option VALUE ...]", textwrap.fill(description.summary, width)]
    if description.examples:
        lines = [line for command, comment in description.examples for line in _example(command, comment, width)]
        parts.append("\n".join(["examples:", *lines]))
    groups = [(group.title, group.options) for group in description.groups] + [("every recipe", COMMON)]
    for title, options in groups:
        lines = [line for option in options for line in _rows(option, width)]
        parts.append("\n".join([f"{title}:", *lines]))
    parts += [textwrap.fill(note, width) for note in description.notes]
    return "\n\n".join(parts) + "\n"


def options_page(description: Description) -> str:
    """The options as a page in Markdown. 选项文档页。

    Args:
        description: The recipe.

    Returns:
        The page; ``docs/options/generate.py`` writes it.
    """
    name = description.script.rpartition("/")[2]
    lines = [f"# Options of {name}", "", description.summary, ""]
    lines += [
        f"`python {description.script} --help` says the same. Written by `python docs/options/generate.py`.",
        "",
    ]
    lines += [line for note in description.notes for line in (*textwrap.wrap(_escaped(note), _WIDEST), "")]
    groups = [(group.title, group.options) for group in description.groups] + [("every recipe", COMMON)]
    for title, options in groups:
        lines += [f"## {title[0].upper()}{title[1:]}", ""]
        for option in options:
            head = f"`{' '.join([option.flag, _value(option)]).strip()}`"
            default = f" Default: `{option.default}`." if option.default else ""
            text = f"- {head}: {_escaped(_meaning(option))}{default}"
            lines += textwrap.wrap(
                text, _WIDEST, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
            )
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _rows(option: Option, width: int) -> list[str]:
    """Lines of one option: its name and value, then the text beside it, or below where the name is long."""
    head = f"  {option.flag} {_value(option)}".rstrip()
    if len(head) > width:
        head = f"  {option.flag} {option.takes}".rstrip()
    default = f" [default: {option.default}]" if option.default and option.takes else ""
    column = _COLUMN if width >= 70 else 6
    texts = _wrapped(_meaning(option) + default.replace("[default: ", "[default:\0"), width - column)
    texts = [text.replace("\0", " ") for text in texts]
    if len(head) + 2 <= column:
        return [f"{head:<{column}}{texts[0]}", *(" " * column + text for text in texts[1:])]
    return [head, *(" " * column + text for text in texts)]


def _wrapped(text: str, width: int, subsequent_indent: str = "") -> list[str]:
    """Lines of a text in which no word is broken."""
    return textwrap.wrap(
        text, width, subsequent_indent=subsequent_indent, break_long_words=False, break_on_hyphens=False
    )


def _value(option: Option) -> str:
    """What stands for the value: the choices, if they are few."""
    listed = "|".join(option.choices)
    if not listed or len(listed) > 40:
        return option.takes
    return f"[{listed},...]" if option.takes.startswith("[") else listed


def _meaning(option: Option) -> str:
    """The text, with the choices that neither it nor the head names."""
    words = set(re.findall(r"[\w-]+", f"{option.text} {_value(option)}"))
    if set(option.choices) <= words:
        return option.text
    return f"{option.text} One of {', '.join(option.choices)}."


def _example(command: str, comment: str, width: int) -> list[str]:
    """A command with its comment above it, broken as a shell allows."""
    lines = [f"  # {line}" for line in textwrap.wrap(comment, width - 4)]
    pieces = re.split(r" (?=--)", command)
    line = f"  {pieces[0]}"
    for piece in pieces[1:]:
        if len(line) + len(piece) + 3 > width:
            lines.append(f"{line} \\")
            line = f"      {piece}"
        else:
            line += f" {piece}"
    return [*lines, line]


def _escaped(text: str) -> str:
    """Text for Markdown, where an asterisk or an angle bracket would be a mark."""
    return re.sub(r"([*<>])", r"\\\1", text)
