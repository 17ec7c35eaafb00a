"""Options of every recipe: each is told, and no torch is needed to answer."""

import importlib
import os
import re
import resource
import subprocess
import sys

import adv_train
import evaluate
import pytest
from covering import each_in_turn
from lab.command_line import Idle, idle, marked, texts_of, unused
from launch import RECIPES, ROOT, unboxed

from sj_robust.training import MODES


@pytest.fixture(params=RECIPES)
def recipe(request):
    return importlib.import_module(request.param)


def test_every_option_has_a_text_and_one_that_may_be_idle_can_be_asked(recipe):
    options = recipe.Options()
    assert texts_of(recipe.Options).keys() == vars(options).keys()
    for mark in marked(recipe.Options, Idle).values():
        assert isinstance(mark.when(options), bool)


HELP = (["--help-all"], 0, "--output")
WRONG = (["--output", "/proc/eps"], 2, "output must be a folder that can be written")


@pytest.mark.parametrize(("name", "given"), each_in_turn(RECIPES, [HELP, WRONG]))
def test_help_and_wrong_options_do_not_wait_for_torch(name, given):
    check_light([str(ROOT / "recipes" / f"{name}.py")], *given)


@pytest.mark.parametrize("given", [HELP, WRONG], ids=["help", "wrong"])
def test_nor_does_the_command(given):
    check_light(["-m", "sj_robust", "train"], *given)


@pytest.mark.parametrize("words", [["--help-all"], ["--print-config"]], ids=["help", "config"])
def test_an_answer_that_nobody_reads_ends_without_a_message(words):
    reader, writer = os.pipe()
    os.close(reader)
    script = str(ROOT / "recipes" / "adv_train.py")
    done = subprocess.run(
        [sys.executable, script, *words], stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def check_light(start, words, code, told):
    """Python with these words ends with the code, says the text, and is quick."""
    command = [sys.executable, "-X", "importtime", *start, *words]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == code, done.stderr
    own = []
    imported = set()
    for line in done.stderr.splitlines():
        module = re.fullmatch(r"import time:.*\| +([\w.]+)", line)
        if module:
            imported.add(module[1])
        else:
            own.append(line)
    assert told in unboxed(done.stdout + "\n".join(own))
    assert "tyro" in imported
    assert not imported & {"torch", "spikingjelly", "accelerate", "matplotlib", "rich", "numpy"}
    assert after.ru_utime - before.ru_utime < 1  # of the processor: others may be busy, too


def test_what_modes_leave_idle_are_options():
    names = vars(adv_train.Options()).keys()
    for mode in MODES.values():
        assert set(mode.idle) <= names, mode.name


INDICATOR = {"layers", "norm", "indicator", "input_gain"}
CRAFTING = {"step_size", "noise_std", "project"}
BOUNDS = {
    "certified_eps",
    "certified_flips",
    "bounds",
    "surrogate_width",
    "ramp",
    "box",
    "attacked",
}


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
        ({"mode": "twin_at"}, {"noise_std", "project", "beta", "trades_weight", *INDICATOR}),
        ({"mode": "trades", "rho": 1.0}, {"kappa", "project", "beta"}),
        (
            {"mode": "certified"},
            {"attack_steps", "beta", "trades_weight", *INDICATOR, *CRAFTING},
        ),
        ({"mode": "certified", "box": 0.5}, {"attack_steps", "beta", "trades_weight", *INDICATOR}),
        ({"mode": "certified", "rho": 1.0}, {"attack_steps", "beta", "trades_weight"}),
    ],
)
def test_options_without_effect(given, expected):
    found = without_effect(augment=True, **given)
    unused = {"guard_margin", "guard_rising", "encoder_options", "temporal_orthogonality"}
    unused |= {"largest_shift", "hidden"}
    wanted = expected | unused | (BOUNDS if given.get("mode") != "certified" else set())
    wanted |= {"levels", "gain_fall"} if given.get("mode") != "twin_at" else set()
    assert found == wanted
    used = {"threshold_guard": 0.1, "encoder": "stod", "moves": 3, "model": "vgg5"}
    assert not unused & without_effect(**used, **given)


def test_attacks_on_events_do_not_take_the_options_of_those_on_images():
    for given in ({"flips": 3}, {"moves": 3}):
        assert without_effect(**given) >= CRAFTING
        assert not CRAFTING & without_effect(mode="certified", box=0.5, **given)


@pytest.mark.parametrize(
    ("given", "ignored"),
    [
        ({"proofs": False, "control": False, "draws": 7, "surrogate_model": "x"}, []),
        ({"norm": "L2", "proofs": False}, ["proofs"]),
        (
            {"smooth": 0.1, "smooth_draws": 7, "proofs": False, "control": False, "draws": 7},
            ["control", "draws", "proofs"],
        ),
        (
            {"suite": "fast", "smooth_draws": 5, "smooth_alpha": 0.5, "fault_draws": 3},
            ["fault_draws", "smooth_alpha", "smooth_draws"],
        ),
        (
            {
                "suite": "stress",
                "fault_draws": 3,
                "proofs": False,
                "draws": 7,
                "surrogate_model": "x",
            },
            ["draws", "proofs", "surrogate_model"],
        ),
        ({"suite": "corruptions", "fault_draws": 3, "control": False}, ["control", "fault_draws"]),
    ],
)
def test_what_an_evaluation_ignores(given, ignored):
    options = evaluate.Options(**given)
    assert unused(options, options) == ignored


def test_cutout_has_an_effect_where_images_are_augmented():
    chosen = {"augment_options": {"rotation": 10}}
    for given in ({}, {"dataset": "cifar10", "augment": False}, {"dataset": "cifar10_dvs"}):
        assert "cutout" in without_effect(**given), given
    assert without_effect(**chosen, augment=False) >= {"cutout", "augment_options"}
    for given in ({"dataset": "cifar10"}, {"augment": True}, chosen):
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
    known = without_effect(mode="none", rho=1.0, eval_eps=adv_train.Radius("8/255"))
    assert "eps" in known


def test_radii_of_images_have_no_effect_beside_changed_events():
    assert not {"eval_eps", "certified_eps"} & without_effect(mode="certified")
    assert without_effect(mode="certified", flips=2) >= {"eval_eps", "certified_eps"}
    assert "eps" in without_effect(mode="none", flips=2)
    assert "eps" not in without_effect(mode="at", flips=2)
