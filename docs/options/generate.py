"""Pages of every option of each recipe, from what the recipes themselves declare.

python docs/options/generate.py             # write docs/options/*.md
"""

import importlib
import inspect
import re
import sys
import textwrap
from pathlib import Path

from lab.command_line.declared import options_of
from lab.command_line.parser import RecipeParser, as_yaml, examples_in, meaning, shown_value

HERE = Path(__file__).parent
RECIPES = ("adv_train", "evaluate", "sweep", "figures", "benchmark")
COMMON = (
    ("--config FILE", "Options from a YAML file; those on the command line after it win."),
    ("--print-config", "Print all options as YAML, to save and change, and stop."),
    ("--help", "Print the options and stop; -h likewise."),
)


def pages():
    """Text by name of the file."""
    recipes = str(HERE.parents[1] / "recipes")
    sys.path.insert(0, recipes)
    try:
        return {f"{name}.md": page(importlib.import_module(name), name) for name in RECIPES}
    finally:
        sys.path.remove(recipes)


def page(module, name):
    """The page of one recipe."""
    summary, _, notes = examples_in(inspect.getdoc(module))
    command = f"python recipes/{name}.py {RecipeParser(module.Options).all_flag}"
    said = f"`{command}` says the same. Written by `python docs/options/generate.py`."
    lines = [f"# Options of {name}.py", "", summary, "", said, ""]
    lines += [line for note in notes for line in (*wrapped(note), "")]
    for one in options_of(module.Options):
        if title := one.group:
            lines += [""] * (lines[-1] != "") + [f"## {title[0].upper()}{title[1:]}", ""]
        lines += wrapped(
            row(f"{one.flag} {shown_value(one)}".strip(), meaning(one), as_yaml(one.default)), "  "
        )
    lines += ["", "## Every recipe", ""]
    lines += [line for head, text in COMMON for line in wrapped(row(head, text), "  ")]
    return "\n".join(lines) + "\n"


def row(head, text, default=""):
    """One option; an asterisk or an angle bracket would be a mark in Markdown."""
    escaped = re.sub(r"([*<>])", r"\\\1", text)
    return f"- `{head}`: {escaped}" + (f" Default: `{default}`." if default else "")


def wrapped(text, indent=""):
    """Lines of the page."""
    return textwrap.wrap(
        text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


if __name__ == "__main__":
    for name, text in pages().items():
        (HERE / name).write_text(text, encoding="utf-8")
