"""Every study runs small, and the pages show the tables that it draws from the CSV files."""

import importlib
import json
import shutil
import sys
from dataclasses import asdict, replace
from functools import partial
from itertools import product

import pytest
import torch
import yaml
from evaluation.reports import member, report
from evaluation.short_suite import short_suite, shortened
from lab.command_line import read_options
from launch import ROOT
from torchvision.transforms.functional import to_pil_image

from sj_robust.core.environment import environment
from sj_robust.evaluation import EstimatorSearch, make_suite, search_estimators
from sj_robust.models import NetworkSpec, build_classifier
from sj_robust.training import save_checkpoint

STUDIES = ROOT / "recipes" / "studies"
RESULTS = ROOT / "docs" / "results"
SHIPPED = ROOT / "sj_robust" / "models" / "trained"
PAGES = ("defences_tables", "networks", "pretrained", "proved_tables", "record", "rounds")
PAGES += ("standard", "twins")
SHORT = "--suite fast --test-limit 2 --no-control --batch-size 2"
SMALL = {
    "before_after": {},
    "defences": {},
    "defences_pictures": {},
    "defences_tables": {},
    "events": {"flips": 2, "moves": 2, "samples": 3, "tries": 3},
    "ground_truth": {
        "names": ("dlif-T2",),
        "radii": (0.05,),
        "images": 3,
        "training": "--epochs 1 --no-reference --judged 0 --train-limit 100 --test-limit 10",
        "forwards": 50,
        "seconds": 1.0,
    },
    "networks": {"names": ("single steps, one layer",)},
    "pretrained": {"names": ("digits/lif",), "more": SHORT},
    "proved": {"data": "digits", "images": 1},
    "proved_tables": {},
    "record": {},
    "rounds": {"networks": ("digits/lif",), "seeds": (0,), "rounds": (1,), "images": 2},
    "spikes_case": {"attacks": ("PGD-20", "standard"), "images": 2},
    "sweeps": {"study": "mine"},
    "standard": {"names": ("digits/lif",), "suites": ("gradient",), "more": f"{SHORT} --no-proofs"},
    "twins": {
        "data": "digits",
        "trainings": ("twin",),
        "steps": (2,),
        "seeds": (0,),
        "images": 2,
        "suite": "fast",
        "more": "--epochs 1 --train-limit 100 --test-limit 10",
    },
    "twins_tables": {},
}
"""What each study is run with, beside a folder of its own."""
WRITES = {
    "before_after": ["picture.png"],
    "defences": ["defences/defences.csv", "defences/networks.csv"],
    "defences_pictures": ["defences/brackets.png", "defences/ms_mppd.png"],
    "events": ["events/attacks.csv"],
    "ground_truth": ["dlif-T2.json", "dlif-T2.pt"],
    "networks": ["networks.csv"],
    "proved": ["proved/networks.csv", "proved/layers.csv", "proved/digits.png"],
    "proved_tables": ["proved/cifar10.png", "proved/digits.png", "proved/fashion_mnist.png"],
    "record": ["certified/record.png"],
    "rounds": ["rounds.csv"],
    "spikes_case": ["spikes_case.csv", "picture.png"],
    "standard": ["standard.csv"],
    "sweeps": ["sweeps.csv", "contrasts.csv"],
    "twins": ["twins.csv"],
}
FROM_FILES = ("defences", "defences_pictures", "defences_tables")
FROM_FILES += ("proved_tables", "record", "twins_tables")
"""Studies that read the CSV files of the pages."""


@pytest.fixture
def study(request, monkeypatch):
    monkeypatch.syspath_prepend(STUDIES)
    monkeypatch.delitem(sys.modules, request.param, raising=False)  # tests/defences, if imported
    return importlib.import_module(request.param)


@pytest.mark.parametrize("study", ["tables"], indirect=True)
def test_a_table_without_a_place_on_its_page_is_named(study):
    with pytest.raises(ValueError, match="no place for the table 'digits'"):
        study.with_tables("# A page\n", {"digits": "| a |"})


@pytest.mark.parametrize("study", PAGES, indirect=True)
def test_a_page_shows_the_tables_that_its_study_draws(study):
    tables = importlib.import_module("tables")
    text = (RESULTS / study.PAGE).read_text(encoding="utf-8")
    shown = study.tables() if study.__name__ == "pretrained" else study.tables(RESULTS)
    assert tables.with_tables(text, shown) == text, (
        f"run python recipes/studies/{study.__name__}.py"
    )


def inputs(name, folder):
    """What a study is run with, its input made."""
    given = SMALL[name] | {"output": folder}
    if name in FROM_FILES:
        shutil.copytree(RESULTS, folder, ignore=shutil.ignore_patterns("*.png"), dirs_exist_ok=True)
    if name in ("ground_truth", "standard", "pretrained", "proved", "defences", "twins"):
        given["runs"] = folder / "runs"
    if name == "defences":
        finished_sweep(folder / "runs" / "defences_mine")
    if name == "events":
        spec = NetworkSpec(image_shape=(2, 10, 10), T=3, channels=(3,), frames=True)
        content = {
            "description": {"network": asdict(spec), "options": {"dataset": "saccade:digits"}}
        }
        model = build_classifier(spec)
        save_checkpoint(folder / "best.pt", content | {"model": model.state_dict()})
        given["network"] = folder / "best.pt"
    if name == "pretrained":
        cards = json.loads((SHIPPED / "cards.json").read_text(encoding="utf-8"))
        (folder / "cards.json").write_text(json.dumps({"digits/lif": cards["digits/lif"]}))
        (folder / "digits").mkdir()
        shutil.copy(SHIPPED / "digits" / "lif.pt", folder / "digits")
        given["shipped"] = folder
    if name == "proved":
        run = folder / "runs" / "proved_digits" / "runs" / "one"
        (run / "training" / "lif_at").mkdir(parents=True)
        shutil.copy(SHIPPED / "digits" / "lif-at.pt", run / "training" / "lif_at" / "best.pt")
        options = {"neuron": "lif", "mode": "at", "rho": 0.0, "layers": "last", "norm": "l2"}
        options |= {"seed": 0, "dataset": "digits", "data_root": "data"}
        (run / "run.json").write_text(json.dumps({"name": "one", "options": options}))
    if name == "before_after":
        for part, number in product(("train", "test"), range(3)):
            picture = torch.rand(3, 32, 32)
            for label in range(10):  # in one of them it is right
                picture[0, 0, 0] = label / 10
                of_class = folder / part / str(label)
                of_class.mkdir(parents=True, exist_ok=True)
                to_pil_image(picture).save(of_class / f"{number}.png")
        given |= {"folder": folder, "output": folder / "picture.png"}
    if name == "sweeps":
        heads = "neuron,figure,mean,standard_deviation,seeds,published,source\n"
        (folder / "results.csv").write_text(f"{heads}lif,clean,0.5,0.1,2,,\n")
        heads = "neuron,first,second,figure,difference,standard_error,low,high,pairs\n"
        (folder / "contrast-rho.csv").write_text(f"{heads}lif,0,1,clean,0.1,0.1,-1,1,2\n")
        given["folder"] = folder
    if name == "spikes_case":
        given["picture"] = folder / "picture.png"
    return given


def finished_sweep(folder):
    """One cell with one seed, of whose eight images gradients break four, all attacks six."""
    run = folder / "runs" / "at-seed0"
    (run / "standard").mkdir(parents=True)
    sweep = {"options": {"dataset": "fashion_mnist"}, "evaluations": {"paper": {}, "standard": {}}}
    sweep["evaluation_options"] = {"eps": "16/255"}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    shares = {"clean": 8, "pgd20/last": 5, "control": 4, "everything": 2}
    figures = {name: {"correct": number, "total": 10} for name, number in shares.items()}
    record = {"cell": "at", "options": {"seed": 0, "lr": 0.2}}
    record["evaluations"] = {suite: {"figures": figures} for suite in ("paper", "standard")}
    record["ms_mppd"] = {"paper": {"pgd20": 0.25}}
    (run / "run.json").write_text(json.dumps(record))
    members = (
        member("apgd_ce/training/r0", (0, 1)),
        member("control/apgd_ce/training/r0", (2, 3), group="control"),
        member("spike_search/training/r0", (4,)),
        member("control/spike_search/training/r0", (5,), group="control"),
    )
    report(members=members).save(run / "standard" / "report.json")


def evaluated(name, words, output):
    """A report that stands for that of the command, whose options are read."""
    assert read_options(importlib.import_module(name.removesuffix(".py")).Options, words)
    output.mkdir(parents=True)
    made = report(verified=(7,))
    replace(made, environment=environment()).save(output / "report.json")


def test_every_study_is_run_small():
    files = {path.stem for path in STUDIES.glob("*.py")}
    assert files - {"forgeries", "networks_columns", "tables"} == SMALL.keys()


@pytest.mark.slow
@pytest.mark.parametrize("study", SMALL, indirect=True)
def test_a_study_runs(study, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    name = study.__name__
    if name in ("proved", "spikes_case"):
        monkeypatch.setattr(study, "make_suite", lambda *a, **b: short_suite(make_suite(*a, **b)))
        few = EstimatorSearch(candidates=("atan:2",), images=8, steps=5, count=2, final_steps=6)
        monkeypatch.setattr(study, "search_estimators", partial(search_estimators, settings=few))
    if name in ("pretrained", "standard"):
        monkeypatch.setattr(study, "run_recipe", evaluated)
    with shortened():
        study.main(study.Options(**inputs(name, tmp_path)))
    for file in WRITES.get(name, []):
        assert (tmp_path / file).stat().st_size > 0
    before = (RESULTS / getattr(study, "PAGE", "none")).name
    if name in FROM_FILES[1:] and (tmp_path / before).is_file():
        assert (tmp_path / before).read_bytes() == (RESULTS / before).read_bytes()
    if name == "defences":
        rows = importlib.import_module("tables").read_table(tmp_path / "defences" / "defences.csv")
        (mine,) = [row for row in rows if (row["radius"], row["cell"]) == ("16/255", "at")]
        wanted = {"clean": "80.0", "pgd": "50.0", "no_spike_search": "40.0", "at_most": "20.0"}
        wanted |= {"chosen": "lr 0.2", "seeds": "1", "proved": "", "ms_mppd": "0.25"}
        assert wanted.items() <= mine.items()


def test_a_stopped_study_goes_on(study_tables, tmp_path):
    path = tmp_path / "some.csv"
    asked = []

    def measured(name, seed):
        asked.append((name, seed))
        return {"left": len(asked)}

    grid = [{"name": "a", "seed": 0}, {"name": "a", "seed": 1}]
    study_tables.once(path, grid[:1], measured)
    rows = study_tables.once(path, grid, measured)
    assert asked == [("a", 0), ("a", 1)]
    assert rows == study_tables.read_table(path)
    assert [row["left"] for row in rows] == ["1", "2"]


@pytest.fixture
def study_tables(monkeypatch):
    monkeypatch.syspath_prepend(STUDIES)
    return importlib.import_module("tables")
