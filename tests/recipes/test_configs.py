"""Every preset loads with the recipe's own parser and builds its network, loss, attack and plan."""

import shlex
from dataclasses import asdict, replace
from itertools import product
from types import SimpleNamespace

import adv_train
import pytest
import sweep
import torch
import yaml
from covering import mostly_slow
from lab.command_line import from_values, plain, read_options
from lab.sweeping.report import papers
from lab.sweeping.runs import load_recipe
from launch import ROOT
from spikingjelly.activation_based import neuron

from sj_robust import training
from sj_robust.attacks import ThreatModel
from sj_robust.core.datasets import EVENT_DATASETS
from sj_robust.core.eps import parse_eps
from sj_robust.data import Augmentation

RECIPES = ROOT / "recipes"
CONFIGS = RECIPES / "configs"
CELLS = sorted((CONFIGS / "paper").glob("*.yaml"))
TABLES = list(product(("cifar10", "cifar100"), ("vgg11", "wrn16_4")))
DEFENCES = sorted((CONFIGS / "defences").glob("*.yaml"))
OTHERS = [*sorted(CONFIGS.glob("*.yaml")), *sorted((CONFIGS / "certified").glob("*.yaml"))]
PRESETS = [*OTHERS, *DEFENCES, *CELLS]
TWINS = RECIPES / "studies" / "twins.yaml"
SWEEPS = [
    *sorted((CONFIGS / "sweeps").glob("*.yaml")),
    *sorted(set((RECIPES / "studies").glob("*.yaml")) - {TWINS}),
]
SHAPES = {"digits": ((1, 8, 8), 10)} | dict.fromkeys(("mnist", "fashion_mnist"), ((1, 28, 28), 10))
SHAPES |= {"saccade:mnist": ((2, 34, 34), 10)}
SHAPES |= {"cifar10": ((3, 32, 32), 10), "cifar100": ((3, 32, 32), 100)}


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(RECIPES / "adv_train.py")


def options_in(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "path", mostly_slow(PRESETS, quick=[*OTHERS, *CELLS]), ids=lambda path: path.stem
)
def test_a_preset_builds(recipe, path):
    if path.stem.endswith("spikformer") and not hasattr(neuron, "PSN"):
        pytest.skip("this release of SpikingJelly has no Spikformer")
    options = from_values(adv_train.Options, options_in(path), path.name)
    options = replace(options, mean=None, std=None)  # values, which there are none of on meta
    shape, classes = SHAPES[options.dataset]
    splits = SimpleNamespace(
        image_shape=shape,
        classes=classes,
        mean=None,
        std=None,
        frames=options.dataset in EVENT_DATASETS,
    )
    with torch.device("meta"):
        objective, plan, attack = adv_train.prepared(options, splits)
    found = sum(parameter.numel() for parameter in objective.classifier.parameters())
    assert found > 1000
    certified = path.parent.name == "certified"
    assert (options.mode == "certified") == certified
    assert (plan.select == "verified") == certified
    assert (plan.optimizer == "adam") == certified
    assert (attack is None) == (certified or options.mode == "none")
    assert plan.weight_decay == (0.0 if certified or options.mode == "rat" else 5e-4)
    assert (plan.retraction > 0) == (options.mode == "rat")
    assert certified or objective.kappa == 0.5
    if certified and splits.frames:
        moved = options.moves is not None
        number, norm, name = (
            (options.moves, "moves", "moves") if moved else (options.flips, "L0", "flips")
        )
        threat = ThreatModel(norm, number, options.largest_shift)
        assert plan.verified == threat
        in_each_step = replace(threat, eps=options.certified_flips)
        assert objective.certified.threat == in_each_step
        assert set(adv_train.validation_attacks(options)) == {name}
        return
    if certified:
        assert plan.verified.eps == parse_eps(options.eval_eps or options.eps)
        assert objective.certified.threat.eps >= plan.verified.eps
    found = set(training.validation_attacks(options.eval_eps or options.eps))
    assert found == {"fgsm", "pgd"}


@pytest.mark.parametrize("path", DEFENCES, ids=lambda path: path.stem)
@pytest.mark.parametrize("dataset", mostly_slow(["digits", "cifar10"], quick=["digits"]))
def test_a_defence_builds_for_every_data_set_and_its_reference_has_none(path, dataset):
    options = from_values(adv_train.Options, options_in(path), path.name)
    options = replace(options, dataset=dataset)
    shape, classes = SHAPES[dataset]
    splits = SimpleNamespace(image_shape=shape, classes=classes, mean=None, std=None, frames=False)
    objective, _, _ = adv_train.prepared(options, splits)
    x = torch.rand(2, *shape)
    assert objective.classifier(x).shape == (2, classes)
    plain, plan, attack = adv_train.prepared(adv_train.undefended(options), splits)
    assert plain.classifier.encoder is None
    assert (plain.penalties, plan.deflation, attack) == ((), False, None)
    assert not any(type(m).__module__.startswith("sj_robust.defences") for m in plain.modules())


@pytest.mark.parametrize(
    ("neuron", "own"), [("tgo", {"noise_std": 0.3}), ("hosnn", {"tau_v": 1.5}), ("lif", {})]
)
def test_the_reference_has_the_architecture_without_the_arguments_of_the_neuron(neuron, own):
    given = {"batch_norm": False, **own}
    options = adv_train.Options(neuron=neuron, mode="none", model_options=given)
    assert adv_train.undefended(options).model_options == {"batch_norm": False}


def test_the_presets_of_defences_have_what_their_papers_have():
    found = {}
    for path in DEFENCES:
        options = from_values(adv_train.Options, options_in(path), path.name)
        splits = SimpleNamespace(
            image_shape=(1, 8, 8), classes=10, mean=None, std=None, frames=False
        )
        objective, _, _ = adv_train.prepared(options, splits)
        found[path.stem] = {penalty.name: penalty for penalty in objective.penalties}
    assert found["tgo"]["threshold_guarding"].rising
    assert found["mpd_sgr"]["mpd_sgr"].half_width == 1.0
    assert found["stog"]["gate_rates"].weight == 5e-6
    assert found["feel"] == found["hosnn"] == {}


@pytest.mark.parametrize("given", [{"box": 0.3}, {"attacked": True}])
def test_what_small_boxes_and_an_attacked_term_need_is_made_at_the_radius_of_the_bounds(given):
    options = adv_train.Options(
        mode="certified",
        eps=adv_train.Radius(0.1),
        certified_eps=adv_train.Radius(0.2),
        surrogate_width=0.5,
        l1=1e-6,
        **given,
    )
    splits = SimpleNamespace(image_shape=(1, 8, 8), classes=10, mean=None, std=None, frames=False)
    objective, _, attack = adv_train.prepared(options, splits)
    assert attack.keywords["eps"] == 0.2
    wanted = {"bounds": "ibp", "surrogate_width": 0.5}
    wanted |= {"ramp": 0.6, "box": 1.0, "attacked": False}
    assert objective.certified.threat == ThreatModel("Linf", 0.2)
    assert asdict(objective.certified.options) == wanted | given
    (penalty,) = objective.penalties
    assert penalty.name == "l1"


PAPER = {  # hyperparameters of every cell
    "T": 8,
    "tau": 100.0,
    "lr": 0.1,
    "momentum": 0.9,
    "epochs": 100,
    "batch_size": 64,
    "kappa": 0.5,
    "eval_eps": "8/255",
    "mixed_precision": "fp16",
    "augment": True,
    "layers": "last",
    "norm": "l2",
    "input_gain": False,
    "select": None,
    "reference": False,
}


@pytest.mark.parametrize("path", CELLS, ids=lambda path: path.stem)
def test_a_cell_has_the_papers_hyperparameters(recipe, path):
    given = options_in(path)
    options = plain(recipe.read(given))
    mode = options["mode"]
    assert mode == path.stem
    wanted = PAPER | {"weight_decay": 0.0 if mode == "rat" else 5e-4, "indicator": "mppd"}
    wanted |= {"dataset": "cifar10", "model": "vgg11", "neuron": "dlif"}
    wanted["rho"] = None if mode == "none" else 1.0
    wanted["eps"] = "8/255" if mode == "gaussian" else "4/255"
    if mode in ("at", "rat"):
        wanted["project"] = False
    if mode == "rat":
        wanted["beta"] = 1e-3
    assert given.keys() <= wanted.keys() | {"mode"}, "nothing else differs from the defaults"
    assert {name: options[name] for name in wanted} == wanted


def planned(path, folder, *words):
    plan = sweep.plan(sweep.parse(["--sweep", str(path), *words]), folder)
    return plan, [run.options for run in (*plan.runs, *plan.searches)]


def of_table(dataset, model):
    """All cells of a table of the paper, by the presets and the options that they name."""
    for path, neurons, rho in product(CELLS, ("lif", "dlif"), (0.0, 1.0)):
        own = {"dataset": dataset, "model": model, "neuron": neurons, "rho": rho}
        if path.stem == "rat" and model == "wrn16_4":
            own["beta"] = 4e-3
        yield options_in(path) | own


@pytest.mark.slow
@pytest.mark.parametrize(("dataset", "model"), TABLES)
def test_the_sweep_of_the_paper_makes_every_table(recipe, tmp_path, dataset, model):
    beta = {"vgg11": 1e-3, "wrn16_4": 4e-3}[model]
    words = ("--options", str({"dataset": dataset, "model": model, "beta": beta}))
    _, runs = planned(CONFIGS / "sweeps" / "paper_sweep.yaml", tmp_path, *words)
    found = [recipe.identity(recipe.read(run)) for run in runs]
    cells = of_table(dataset, model)
    assert set(found) == {recipe.identity(recipe.read(cell)) for cell in cells}
    assert len(found) == 14


@pytest.mark.slow
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_is_made_of_the_presets(path, tmp_path):
    plan, runs = planned(path, tmp_path)
    assert runs
    for run in runs:
        if run["mode"] == "certified":
            assert parse_eps(run["certified_eps"]) > parse_eps(run["eps"])
    if path.stem.startswith("defences"):
        assert len(runs) == (3 * 21 if plan.searches else 2 * 21)  # three values, or two seeds
        assert {run["seed"] for run in runs} == ({0} if plan.searches else {0, 1})
        shared = ("T", "channels", "epochs", "train_limit", "batch_size", "eval_eps")
        assert len({str([run[name] for name in shared]) for run in runs}) == 1
        others = [one for one in (*plan.runs, *plan.searches) if one.cell != "undefended"]
        assert {one.options["select"] for one in others} == {"pgd"}


@pytest.mark.parametrize(
    ("data", "training"),
    [(data, name) for data, study in options_in(TWINS).items() for name in study["trainings"]],
)
def test_a_training_of_the_study_of_twins_is_a_command(data, training, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = options_in(TWINS)[data]
    options = read_options(adv_train.Options, shlex.split(study["trainings"][training]))
    assert options.dataset == data.removesuffix("_vgg5")
    assert (options.mode == "twin_at") == (training == "twin")


def test_cifar_10_takes_what_the_search_on_fashion_mnist_may_choose():
    fixed, searched = (
        options_in(RECIPES / "studies" / f"defences_{data}.yaml")["cells"]
        for data in ("cifar10", "fashion_mnist")
    )
    assert list(fixed) == list(searched)
    for name, cell in searched.items():
        ((option, values),) = cell.pop("search").items()
        assert fixed[name]["options"].pop(option) in values
        if name == "undefended":  # whose epoch on CIFAR-10 clean accuracy selects
            assert fixed[name]["options"].pop("select") == "clean"
        assert {"options": {}} | cell == fixed[name]


@pytest.mark.slow
def test_every_published_figure_of_the_paper_has_its_cell(recipe):
    cells = [cell for table in TABLES for cell in of_table(*table)]
    for indicator in ("mppd", "tasad", "std"):
        own = {"model": "vgg5", "indicator": indicator}
        cells += [
            options_in(CONFIGS / "paper" / "at.yaml") | own | {"rho": rho} for rho in (0.0, 1.0)
        ]
    settings = [plain(recipe.read(cell)) for cell in cells]
    for paper in papers():
        for figure in paper["settings"] if "Ding" in paper["source"] else ():
            wanted = ({"dataset": "cifar10"} | figure["options"]).items()
            assert any(wanted <= options.items() for options in settings), figure


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, False),
        ({"dataset": "cifar10"}, Augmentation()),
        ({"augment": True, "cutout": 4}, Augmentation(cutout=4)),
        (
            {"augment_options": {"rotation": 10}, "cutout": 0},
            Augmentation(padding=0, flip=False, cutout=0, rotation=10),
        ),
        ({"augment_options": {"rotation": 10}, "augment": False}, False),
    ],
)
def test_the_augmentation_reaches_the_training_images(monkeypatch, given, expected):
    class StoppedError(Exception):
        pass

    def load_images(name, *, augment, **options):
        assert augment == expected
        raise StoppedError

    monkeypatch.setattr(adv_train, "load_images", load_images)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    with pytest.raises(StoppedError):
        adv_train.main(words)


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("mode", ["at", "certified"])
def test_what_frames_hold_reaches_attacks_bounds_and_validation(mode, counts):
    options = adv_train.Options(
        dataset="saccade:digits", mode=mode, T=3, flips=3, counts=counts, channels=(4,)
    )
    splits = SimpleNamespace(image_shape=(2, 10, 10), classes=10, mean=None, std=None, frames=True)
    objective, plan, attack = adv_train.prepared(options, splits)
    threat = adv_train.evaluation_threat(options)
    assert threat == ThreatModel("L0", 3, counts=counts)
    assert plan.verified == (threat if mode == "certified" else None)
    attacks = adv_train.validation_attacks(options) | adv_train.attacks_of_report(options)
    if mode == "certified":
        assert objective.certified.threat == threat
    else:
        attacks["training"] = attack
    for made in attacks.values():
        assert made.keywords["eps"] == threat
    adv_train.check_events(options, splits)
