"""Every preset loads with the recipe's own parser and builds its network, loss, attack and plan."""

from dataclasses import asdict, replace
from types import SimpleNamespace

import adv_train
import pytest
import torch
import yaml
from lab.sweeping.grid import expand, seeds_of
from lab.sweeping.plan import plan_runs
from lab.sweeping.published_accuracies import PUBLISHED
from lab.sweeping.recipe import load_recipe
from launch import ROOT

from sj_robust import training
from sj_robust.attacks.threat import parse_eps

RECIPES = ROOT / "recipes"
CONFIGS = RECIPES / "configs"
CELLS = sorted((CONFIGS / "paper").glob("*.yaml"))
PRESETS = [*sorted(CONFIGS.glob("*.yaml")), *sorted((CONFIGS / "certified").glob("*.yaml")), *CELLS]
SWEEPS = sorted((CONFIGS / "sweeps").glob("*.yaml"))
SHAPES = {"digits": ((1, 8, 8), 10)} | dict.fromkeys(("mnist", "fashion_mnist"), ((1, 28, 28), 10))
SHAPES |= {"cifar10": ((3, 32, 32), 10), "cifar100": ((3, 32, 32), 100)}


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(RECIPES / "adv_train.py")


def options_in(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_every_cell_of_the_tables_is_there():
    names = {path.stem for path in CELLS}
    for dataset in ("cifar10", "cifar100"):
        for model in ("vgg11", "wrn16_4"):
            for neuron in ("lif", "dlif"):
                assert f"{dataset}_{model}_none_{neuron}" in names
                for mode in ("gaussian", "at", "rat"):
                    assert {
                        f"{dataset}_{model}_{mode}_{neuron}_rho{rho}" for rho in (0, 1)
                    } <= names
    assert {f"cifar10_vgg5_at_dlif_{name}" for name in ("rho0", "mppd", "tasad", "std")} <= names
    assert len(names) == 48 + 8 + 4


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_builds(recipe, path):
    options = adv_train.completed(adv_train.Options(**recipe.resolve(options_in(path))))
    options = replace(options, mean=None, std=None)  # values, which there are none of on meta
    shape, classes = SHAPES[options.dataset]
    splits = SimpleNamespace(image_shape=shape, classes=classes, mean=None, std=None, frames=False)
    with torch.device("meta"):
        objective, plan, attack = adv_train.prepared(options, splits)
    assert sum(parameter.numel() for parameter in objective.classifier.parameters()) > 1000
    certified = path.parent.name == "certified"
    assert (
        certified
        == (options.mode == "certified")
        == (plan.select == "verified")
        == (plan.optimizer == "adam")
    )
    assert (attack is None) == (certified or options.mode == "none")
    assert plan.weight_decay == (0.0 if certified or options.mode == "rat" else 5e-4)
    assert (plan.retraction > 0) == (options.mode == "rat")
    assert certified or objective.kappa == 0.5
    if certified:
        assert plan.verified_eps == parse_eps(options.eval_eps or options.eps)
        assert objective.certified.eps >= plan.verified_eps
    assert set(training.validation_attacks(options.eval_eps or options.eps)) == {"fgsm", "pgd"}


@pytest.mark.parametrize("given", [{"box": 0.3}, {"attacked": True}])
def test_what_small_boxes_and_an_attacked_term_need_is_made_at_the_radius_of_the_bounds(given):
    options = {"mode": "certified", "eps": 0.1, "certified_eps": 0.2, "surrogate_width": 0.5}
    options |= {"milestones": (0.5,), "gradient_clip": 10.0, "precise_statistics": 3, "l1": 1e-6}
    completed = adv_train.completed(adv_train.Options(**options | given))
    splits = SimpleNamespace(image_shape=(1, 8, 8), classes=10, mean=None, std=None, frames=False)
    objective, plan, attack = adv_train.prepared(completed, splits)
    assert attack.keywords["eps"] == 0.2
    wanted = {"surrogate_width": 0.5, "ramp": 0.6, "box": 1.0, "attacked": False}
    assert asdict(objective.certified.options) == wanted | given
    assert (plan.milestones, plan.gradient_clip, plan.precise_statistics) == ((0.5,), 10.0, 3)
    assert [penalty.name for penalty in objective.penalties] == ["l1"]


@pytest.mark.parametrize("path", CELLS, ids=lambda path: path.stem)
def test_a_cell_has_the_papers_hyperparameters(recipe, path):
    text = path.read_text(encoding="utf-8")
    assert "# Needs a GPU for fp16; elsewhere add --mixed-precision no." in text
    given = options_in(path)
    options = recipe.resolve(given)
    name = path.stem.split("_")
    assert options["dataset"] == name[0]
    assert options["model"] == ("wrn16_4" if "wrn16" in name else name[1])
    assert options["mode"] in name
    assert options["neuron"] in name
    wanted = {
        "T": 8,
        "tau": 100.0,
        "lr": 0.1,
        "momentum": 0.9,
        "epochs": 100,
        "batch_size": 64,
        "kappa": 0.5,
    }
    wanted |= {
        "eval_eps": "8/255",
        "mixed_precision": "fp16",
        "augment": True,
        "layers": "last",
        "norm": "l2",
    }
    wanted |= {
        "weight_decay": 0.0 if options["mode"] == "rat" else 5e-4,
        "input_gain": False,
        "select": None,
    }
    wanted |= {"rho": 0.0 if name[-1] == "rho0" else 1.0, "indicator": "mppd", "reference": False}
    wanted |= {"indicator": name[-1]} if name[-1] in ("tasad", "std") else {}
    if options["mode"] == "none":
        assert not {"rho", "project"} & given.keys()
        del wanted["rho"]
    named = {"dataset", "model", "neuron", "mode", "eps", "project", "beta"}
    assert given.keys() <= wanted.keys() | named, "nothing else differs from the defaults"
    assert {name: options[name] for name in wanted} == wanted
    assert parse_eps(options["eps"]) == (8 if options["mode"] == "gaussian" else 4) / 255
    if options["mode"] in ("at", "rat"):
        assert options["project"] is False
        assert "project false is the paper's form" in text
    if options["mode"] == "rat":
        assert given["beta"] == (4e-3 if options["model"] == "wrn16_4" else 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_is_made_of_the_presets(recipe, path, tmp_path):
    sweep = options_in(path)
    fixed = (
        options_in(CONFIGS / f"{sweep['base']}.yaml")
        | sweep.get("options", {})
        | {"reference": False}
    )
    runs = plan_runs(
        tmp_path,
        expand(sweep["grid"], fixed=recipe.resolve(fixed), skip=sweep.get("skip", ())),
        seeds_of(sweep.get("seeds", 1)),
        recipe=recipe,
        evaluator=load_recipe(RECIPES / "evaluate.py"),
        fixed=fixed,
        evaluations=dict.fromkeys(sweep["evaluate"], sweep.get("evaluation_options", {})),
    )
    if sweep["base"].startswith("paper/"):
        prefix = "cifar10_vgg5" if "indicators" in path.stem else path.stem.removesuffix("_sweep")
        cells = [one for one in CELLS if one.stem.startswith(prefix)]
        planned = [recipe.identity(run.options) for run in runs]
        assert len(planned) == len(cells)
        for cell in cells:
            assert recipe.identity(recipe.resolve(options_in(cell))) in planned, cell.stem
        return
    names = [run.name for run in runs]
    cells = sum(name.endswith("-seed0") for name in names)
    assert len(names) == len(set(names))
    assert f"{cells} cells, {len(names)} runs" in " ".join(
        path.read_text().replace("\n#", "").split()
    )
    if path.stem.startswith("certified"):
        fixed_gain = {
            run.options["neuron"] == "lif" or not run.options["learn_gain"] for run in runs
        }
        assert fixed_gain == ({False} if "radii" in path.stem else {False, True})
        trained = [run.options for run in runs if run.options["mode"] == "certified"]
        assert len(trained) >= len(runs) / 3
        assert all(
            parse_eps(options["certified_eps"]) > parse_eps(options["eps"]) for options in trained
        )
    elif path.stem.startswith("bfloat16"):
        assert [run.options["mixed_precision"] for run in runs[:2]] == ["no", "bf16"]
    else:
        trained = ("at",) if path.stem.startswith("cifar10") else ("gaussian", "at", "rat")
        wanted = {
            (mode, neuron, rho)
            for mode in trained
            for neuron in ("lif", "dlif")
            for rho in (0.0, 1.0)
        }
        neurons = [
            "dlif" if run.options["learn_gain"] and run.options["neuron"] == "dlif" else "lif"
            for run in runs
        ]
        found = {
            (run.options["mode"], neuron, run.options["rho"])
            for run, neuron in zip(runs, neurons, strict=True)
        }
        assert wanted <= found
        assert {neuron for mode, neuron, _ in found if mode == "none"} >= {"dlif"}


@pytest.mark.slow
def test_every_published_figure_of_the_paper_has_its_preset(recipe):
    settings = [recipe.resolve(options_in(path)) for path in CELLS]
    for figure in PUBLISHED:
        if "Ding" in figure.source:
            assert any(figure.options.items() <= options.items() for options in settings), figure
