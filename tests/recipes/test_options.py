"""Options of every recipe: each reaches somebody, is shown on any terminal, and needs no torch to
be answered.
"""

import importlib
import re
import subprocess
import sys

import adv_train
import pytest
from lab.command_line.declared import idle, options_of
from lab.command_line.parser import RecipeParser
from launch import RECIPES, ROOT

from sj_robust.training import MODES

sys.path.insert(0, str(ROOT / "docs" / "options"))
import generate  # a script, found only now


@pytest.fixture(params=RECIPES)
def recipe(request):
    return importlib.import_module(request.param)


def test_the_help_shows_every_option_with_its_choices(recipe, capsys):
    parser = RecipeParser(recipe.Options)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--help"])
    assert stop.value.code == 0
    words = set(re.split(r"[^\w./-]+", capsys.readouterr().out))
    for one in parser.options.values():
        assert {one.flag, *one.value[1]} <= words
    assert idle(recipe.Options()) <= set(parser.options)  # what idle= reads is there


def test_the_parser_takes_every_option_as_the_help_shows_it(recipe):
    parser = RecipeParser(recipe.Options)
    assert parser.values([]) == vars(recipe.Options())
    for one in parser.options.values():
        takes, choices = one.value
        for choice in () if takes.startswith("[") else choices:
            parser.values([f"{one.flag}={choice}"])
        if one.kind is bool:
            assert parser.values([f"--no-{one.flag[2:]}"])[one.name] is False
            assert parser.values([one.flag])[one.name] is True


def test_the_page_of_the_options_is_up_to_date_and_linked(recipe):
    page = f"docs/options/{recipe.__name__}.md"
    written = (ROOT / page).read_text(encoding="utf-8")
    assert written == generate.pages()[f"{recipe.__name__}.md"], (
        "run python docs/options/generate.py"
    )
    assert page in (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["--nothing", "1"], 2)])
def test_help_and_wrong_options_do_not_wait_for_torch(recipe, words, code):
    command = [sys.executable, "-X", "importtime", recipe.__file__, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert "lab.command_line.parser" in imported
    assert not imported & {"torch", "spikingjelly", "accelerate", "matplotlib", "rich", "numpy"}


def test_what_modes_leave_idle_are_options():
    names = {one.name for one in options_of(adv_train.Options)}
    for mode in MODES.values():
        assert set(mode.idle) <= names, mode.name


INDICATOR = {"layers", "norm", "indicator", "input_gain"}
BOUNDS = {"certified_eps", "surrogate_width", "ramp", "box", "attacked"}


def without_effect(**given):
    return idle(adv_train.completed(adv_train.Options(**given)))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"attack_steps", "beta", "trades_weight"}),
        ({"rho": 0.0}, {"attack_steps", "beta", "trades_weight", *INDICATOR}),
        ({"indicator": "tasad"}, {"attack_steps", "beta", "trades_weight", "input_gain"}),
        ({"mode": "rat"}, {"attack_steps", "trades_weight"}),
        (
            {"mode": "gaussian"},
            {"step_size", "attack_steps", "noise_std", "project", "beta", "trades_weight"},
        ),
        ({"mode": "pgd_at"}, {"noise_std", "project", "beta", "trades_weight", *INDICATOR}),
        ({"mode": "pgd_at", "rho": 1.0}, {"noise_std", "project", "beta", "trades_weight"}),
        ({"mode": "trades", "rho": 1.0}, {"kappa", "project", "beta"}),
        ({"mode": "certified"}, {"attack_steps", "beta", "trades_weight", *INDICATOR}),
        ({"mode": "certified", "rho": 1.0}, {"attack_steps", "beta", "trades_weight"}),
    ],
)
def test_options_without_effect(given, expected):
    found = without_effect(augment=True, **given)
    assert found == expected | {"guard_margin"} | (
        BOUNDS if given.get("mode") != "certified" else set()
    )
    assert "guard_margin" not in without_effect(threshold_guard=0.1, **given)


def test_cutout_has_an_effect_where_images_are_augmented():
    for given in ({}, {"dataset": "cifar10", "augment": False}, {"dataset": "cifar10_dvs"}):
        assert "cutout" in without_effect(**given), given
    for given in ({"dataset": "cifar10"}, {"augment": True}):
        assert "cutout" not in without_effect(**given), given


def test_eps_has_an_effect_without_a_defence_where_eval_eps_is_it():
    without = without_effect(mode="none", rho=1.0)
    assert without >= {
        "rho",
        "kappa",
        "step_size",
        "attack_steps",
        "noise_std",
        "project",
        "beta",
        *INDICATOR,
    }
    assert not {"eps", "lr", "seed"} & without
    assert "eps" in without_effect(mode="none", rho=1.0, eval_eps="8/255")
