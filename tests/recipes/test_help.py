"""Help of every recipe: readable on any terminal, complete, and the same as the pages of the documentation."""

import importlib
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from lab.command_line.description import describe
from lab.command_line.help import COMMON, help_text
from lab.command_line.options import SWITCHES
from lab.command_line.parser import RecipeParser

from sj_robust.data import DATASETS

ROOT = Path(__file__).parents[2]
RECIPES = ("adv_train", "evaluate", "sweep", "figures", "benchmark")
sys.path.insert(0, str(ROOT / "recipes"))
sys.path.insert(0, str(ROOT / "docs" / "options"))
import generate  # noqa: E402  # a script, found only now


@pytest.fixture(params=RECIPES)
def options_type(request):
    return importlib.import_module(request.param).Options


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_every_line_fits(options_type, width):
    lines = help_text(describe(options_type), width).splitlines()
    wide = [line for line in lines if len(line) > width and len(line.split()) > 1]
    # what is beyond the width is a command, a value or a list of choices that cannot be broken
    allowed = {80: 0, 120: 0}
    assert len(wide) <= allowed.get(width, 12), wide
    assert all(line == line.rstrip() for line in lines)


def test_the_width_is_that_of_the_terminal_and_120_at_most(options_type, monkeypatch, capsys):
    for columns, longest in (("80", 80), ("300", 120)):
        monkeypatch.setenv("COLUMNS", columns)
        with pytest.raises(SystemExit) as stop:
            RecipeParser(options_type).parse_args(["--help"])
        assert stop.value.code == 0
        lines = capsys.readouterr().out.splitlines()
        assert longest - 25 < max(map(len, lines)) <= longest


def test_every_option_is_there_once_with_its_default_in_a_group(options_type):
    description = describe(options_type)
    assert [option.name for option in description.options] == [field.name for field in fields(options_type)]
    assert len(description.groups) >= 3
    text = help_text(description, 120)
    for option in (*description.options, *COMMON):
        assert len(re.findall(rf"^  {re.escape(option.flag)}(?= |$)", text, re.MULTILINE)) == 1, option.flag
        assert option.text.endswith(".")
        assert "null" not in option.default or "null" in option.text, f"{option.name}: say what null is"
    shown = re.findall(r"\[default: ", text)
    assert len(shown) == sum(option.takes != "" for option in description.options)


def test_the_parser_takes_every_option_as_the_help_shows_it(options_type):
    parser = RecipeParser(options_type)
    known = {action.dest for action in parser._actions}
    assert {option.name for option in describe(options_type).options} <= known
    for option in describe(options_type).options:
        for choice in () if option.takes.startswith("[") else option.choices:
            parser.parse_args([f"--{option.name}={choice}"])


def test_choices_are_spelled_out(options_type):
    text = " ".join(help_text(describe(options_type), 120).split())
    for option in describe(options_type).options:
        assert all(re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", text) for choice in option.choices), option.name
        if option.name == "dataset" and "adv_train" not in option.text:
            assert set(DATASETS) <= set(re.findall(r"[\w:]+", option.text))


def test_switches_are_those_that_are_off_by_default():
    types = [importlib.import_module(name).Options for name in RECIPES]
    switches = {option.flag for kind in types for option in describe(kind).options if option.takes == ""}
    assert {switch.replace("_", "-") for switch in SWITCHES} == switches


@pytest.mark.parametrize("name", RECIPES)
def test_the_page_of_the_options_is_up_to_date(name):
    written = (ROOT / "docs" / "options" / f"{name}.md").read_text(encoding="utf-8")
    assert written == generate.pages()[f"{name}.md"], "run python docs/options/generate.py"


def test_the_page_is_linked_from_the_recipes_page():
    text = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    for name in RECIPES:
        assert f"docs/options/{name}.md" in text


@dataclass(frozen=True)
class Silent:
    """Options.

    Attributes:
        told: A text.
    """

    told: int = 1
    untold: int = 2


@dataclass(frozen=True)
class Late:
    """Options.

    Attributes:
        first: A text.
        second: A text.
    """

    first: int = 1
    second: int = 2


def test_options_without_a_text_or_a_group_are_found(monkeypatch):
    with pytest.raises(ValueError, match="untold of .* needs a default, and a text under Attributes"):
        describe(Silent)
    monkeypatch.setattr(Late, "GROUPS", {"late": "second"}, raising=False)
    with pytest.raises(ValueError, match="must begin at first"):
        describe(Late)
    monkeypatch.setattr(Late, "GROUPS", {"one": "first", "two": "third"})
    with pytest.raises(ValueError, match="names third, which are none of its options"):
        describe(Late)
    monkeypatch.setattr(Late, "GROUPS", {"one": "first", "two": "second"})
    assert [(group.title, group.options[0].name) for group in describe(Late).groups] == [
        ("one", "first"), ("two", "second"),
    ]  # fmt: skip
