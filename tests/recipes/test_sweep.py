"""A sweep with recipes that take no time; its processes are in tests/lab/test_sweep_jobs.py."""

import csv
from dataclasses import replace
from shlex import split
from types import SimpleNamespace

import numpy as np
import pytest
import sweep
import yaml
from evaluation.recipe_run import undrawn
from fake_recipes import write_fakes
from filelock import FileLock
from lab.sweeping.perform import perform
from lab.sweeping.report import Results, papers, plot_effect, published
from lab.sweeping.runs import RECORD_FILE, RunRecord, load_recipe
from scipy import stats

from sj_robust.core.environment import CODE_KEY

GRID = {"mode": ["none", "at"], "rho": [0, 1]}
SUITE = {"evaluate": ("paper",)}


def one_after_the_other(runs, executor, *, jobs, threads):
    """In place of processes, which take seconds to start and have tests of their own."""
    for run in runs:
        try:
            perform(run)
        except ValueError as error:
            yield run, str(error)
        else:
            yield run, None


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "perform_all", one_after_the_other)
    monkeypatch.setattr(sweep, "executor_for", lambda *given, jobs: None)
    return write_fakes(tmp_path)


@pytest.fixture
def run(fakes, capsys):
    """A function that runs the recipe without drawing, and returns what it prints."""

    def call(*arguments, code=None):
        words = [*arguments, *(f"--{name}={path}" for name, path in fakes.items())]
        with undrawn():
            if code is None:
                sweep.main(words)
            else:
                with pytest.raises(SystemExit) as stop:
                    sweep.main(words)
                assert stop.value.code == code
        return capsys.readouterr().out

    return call


@pytest.fixture
def planned(fakes, tmp_path):
    """A function that plans a sweep in a folder."""

    def plan(grid=GRID, **options):
        options = sweep.Options(grid=grid, **fakes, **options)
        return sweep.plan(options, tmp_path / "sweep").runs

    return plan


def names(runs):
    return [run.name for run in runs]


def stages(run):
    return [line.split(" pid")[0] for line in (run.folder / "calls").read_text().splitlines()]


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_a_grid_from_end_to_end(run, tmp_path, monkeypatch):
    """Means, spreads and differences are those of an independent computation from the records."""
    output = run(
        "--grid",
        "{neuron: [lif, dlif], mode: [none, at], rho: [0, 1]}",
        *split("--seeds 3 --evaluate paper --contrast rho --evaluation_options"),
        "{test_limit: 20}",
    )
    folder = tmp_path / "runs" / "sweep"
    assert "18 runs in runs/sweep, 0 of them finished before" in output
    assert "18/18 dlif-at-rho1-seed2: clean 90.0%, pgd20 " in output
    records = {path.parent.name: RunRecord.load(path) for path in folder.glob("runs/*/run.json")}
    shares = {name: record.training["pgd20"]["correct"] / 100 for name, record in records.items()}

    def values(*words):
        return np.array([shares["-".join([*words, f"seed{seed}"])] for seed in range(3)])

    found = {}
    for row in rows_of(folder / "results.csv"):
        found[row["neuron"], row["mode"], row["rho"], row["figure"]] = row
    assert len({key[:3] for key in found}) == 6  # rho changes nothing without attack
    for neuron in ("lif", "dlif"):
        for mode, rho in (("none", ""), ("at", "0.0"), ("at", "1.0")):
            words = [neuron, mode] + ([f"rho{float(rho):g}"] if rho else [])
            row = found[neuron, mode, rho, "pgd20"]
            assert float(row["mean"]) == pytest.approx(values(*words).mean())
            assert float(row["standard_deviation"]) == pytest.approx(values(*words).std(ddof=1))
            assert row["seeds"] == "3"
    assert float(found["dlif", "at", "1.0", "paper/pgd10/last"]["published"]) == 0.3755
    before, after = values("lif", "at", "rho0"), values("lif", "at", "rho1")
    (row,) = [
        row
        for row in rows_of(folder / "contrast-rho.csv")
        if (row["neuron"], row["figure"]) == ("lif", "pgd20")
    ]
    assert (row["first"], row["second"], row["pairs"]) == ("0", "1", "3")
    assert float(row["difference"]) == pytest.approx((after - before).mean())
    text = (folder / "results.md").read_text()
    assert "| dlif | at | 1 | 3 | 90.0 ± 0.0 [85.17] |" in text
    assert "| lif | none | – | 3 |" in text
    assert "[37.55]" in text
    record = records["dlif-at-rho1-seed1"]
    assert record.evaluations["paper"]["figures"]["clean"] == {"correct": 19, "total": 20}

    # results of other seeds and releases, as records that were written since
    def change(name, **fields):
        replace(records[name], **fields).save(folder / "runs" / name / RECORD_FILE)

    for seed, correct in enumerate((44, 61, 48)):
        counts = {"clean": {"correct": 9, "total": 10}, "pgd20": {"correct": correct, "total": 100}}
        change(f"lif-at-rho1-seed{seed}", training=counts)
        shares[f"lif-at-rho1-seed{seed}"] = correct / 100
    here = {"torch": "2.8", "commit": "a", f"{CODE_KEY} 3.12": "1"}
    change("dlif-at-rho0-seed0", trained_in=here)
    change("dlif-at-rho0-seed1", trained_in=here | {"commit": "b"})
    change("dlif-at-rho0-seed2", trained_in=here | {f"{CODE_KEY} 3.12": "2"})
    change("dlif-at-rho1-seed0", trained_in=here, evaluations={})
    change("dlif-at-rho1-seed1", trained_in=here | {"torch": "2.9"})
    alarmed = record.evaluations["paper"] | {"alarm": "it guesses"}
    change("lif-none-seed0", evaluations={"paper": alarmed})
    run(*split("--output runs/sweep --report"))
    interval = stats.ttest_rel(values("lif", "at", "rho1"), before).confidence_interval(0.95)
    (row,) = [
        row
        for row in rows_of(folder / "contrast-rho.csv")
        if (row["neuron"], row["figure"]) == ("lif", "pgd20")
    ]
    assert (float(row["low"]), float(row["high"])) == pytest.approx(tuple(interval))
    text, _, warned = (folder / "results.md").read_text().partition("**Not to be relied on**")
    assert "| dlif | at | 1 | 2 | 95.0 ± 0.0" in text
    cells = [", ".join(f"dlif-at-rho{rho}-seed{seed}" for seed in range(3)) for rho in (0, 1)]
    assert [line for line in warned.splitlines() if line] == [
        "- lif-none-seed0, suite paper: it guesses",
        f"- {cells[0]}: the code of the network changed between these runs of a cell",
        f"- {cells[1]}: trained with torch 2.8 and 2.9 and x, in one cell",
    ]
    change("lif-at-rho0-seed2", training={"clean": {"correct": 9, "total": 10}})
    assert "(n = 2)" in run(*split("--output runs/sweep --report"))


def test_a_sweep_goes_on_and_grows_and_is_reported_again(run, tmp_path):
    kept = {"grid": {"mode": ["at"], "rho": [0, 1]}, "seeds": 1, "evaluate": ["paper"]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(kept))
    assert "2 runs in runs/mine, 0 of them" in run("--sweep", "mine.yaml")
    folder = tmp_path / "runs" / "mine"
    assert "2 runs in runs/mine, 2 of them finished before" in run("--output", "runs/mine")
    wider = ("--grid", "{mode: [at, rat], rho: [0, 1]}")
    given = split("--output runs/mine --evaluate paper fast")
    assert "4 runs in runs/mine, 0 of them" in run(*given, *wider)
    for calls in folder.glob("runs/*/calls"):
        found = [line.split()[0] for line in calls.read_text().splitlines()]
        assert found == ["train", "paper", "fast"]
    before = {path.name: path.read_bytes() for path in folder.glob("[!R]*.*")}
    for name in ("results.md", "results.csv", "effect-rho.png", "effect-rho.pdf"):
        (folder / name).unlink()
    assert "runs in" not in run(*split("--output runs/mine --report"))
    assert {path.name: path.read_bytes() for path in folder.glob("[!R]*.*")} == before
    assert "pgd20" not in run(*split("--output runs/mine --report --columns clean"))
    with pytest.raises(ValueError, match="columns"):
        run(*split("--output runs/mine --report --columns x/*"))


CELLS = """
plain: {options: {neuron: lif, mode: none}}
tuned: {config: own.yaml, options: {mode: at}, search: {rho: [0, 1]}}
"""


def test_cells_search_on_validation_images_and_stop_at_any_run(run, tmp_path, monkeypatch):
    (tmp_path / "own.yaml").write_text("{neuron: lif, mode: rat, epochs: 7}")
    given = ("--cells", CELLS, "--options", "{epochs: 3}", "--seeds", "2")
    given += ("--evaluations", "{weak: {suite: paper, test_limit: 20}}")

    def stopped(runs, executor, *, jobs, threads):
        for end in one_after_the_other(runs, executor, jobs=jobs, threads=threads):
            yield end
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "perform_all", stopped)
        for _ in range(5):
            with pytest.raises(KeyboardInterrupt):
                run(*given)
    assert "4 runs in runs/sweep, 3 of them finished before" in run(*given)
    folder = tmp_path / "runs" / "sweep"
    assert (folder / "search.csv").read_text().splitlines() == [
        "cell,value,validation,clean,chosen",
        "tuned,rho 0,0.4,0.9,False",
        "tuned,rho 1,0.5,0.9,True",
    ]
    found = {}
    for path in folder.glob("runs/*/calls"):
        found[path.parent.name] = [line.split()[0] for line in path.read_text().splitlines()]
    chosen = {f"{name}-seed{seed}" for name in ("plain", "tuned-rho1") for seed in (0, 1)}
    assert found.pop("tuned-rho0-seed0") == ["train"]
    assert found.keys() == chosen
    assert all(words == ["train", "paper"] for words in found.values())
    rows = {(row["cell"], row["figure"]): row for row in rows_of(folder / "results.csv")}
    assert {cell for cell, _ in rows} == {"plain", "tuned"}
    for figure, mean in {"weak/clean": 0.95, "weak/pgd10/ms_mppd": 2.0}.items():
        row = rows["tuned", figure]
        assert (float(row["mean"]), row["seeds"]) == (mean, "2")
    assert float(rows["plain", "training/cpu_seconds"]["mean"]) > 0
    record = RunRecord.load(folder / "runs" / "tuned-rho1-seed1" / RECORD_FILE)
    kept = {name: record.options[name] for name in ("neuron", "mode", "epochs")}
    assert kept == {"neuron": "lif", "mode": "at", "epochs": 3}  # the cell's own above all
    before = (folder / "results.csv").read_text()
    run("--output", "runs/sweep", "--report")
    assert (folder / "results.csv").read_text() == before


@pytest.mark.parametrize(
    ("grid", "options", "expected"),
    [
        # what has no effect makes no other run
        (
            GRID,
            {"seeds": [3, 1]},
            [f"{a}-seed{s}" for s in (3, 1) for a in ("none", "at-rho0", "at-rho1")],
        ),
        # null is the value that it stands for
        ({"rho": [None, 1, 0]}, {}, ["rho1-seed0", "rho0-seed0"]),
        ({"norm,rho": [["l2", 1.0], ["l1", 3]]}, {}, ["l2-rho1-seed0", "l1-rho3-seed0"]),
        ({"data_root": ["a", "b"]}, {}, ["a-seed0"]),
        (
            {"eps": ["8/255", 0.1], "data_root": ["a/b"], "norm": ["l1"]},
            {},
            ["eps8_255-a_b-l1-seed0", "eps0.1-a_b-l1-seed0"],
        ),
    ],
)
def test_the_same_run_is_planned_once(planned, grid, options, expected):
    assert names(planned(grid, **options)) == expected


def test_options_of_planned_runs(planned):
    assert [run.options["rho"] for run in planned()] == [1.0, 0.0, 1.0]  # without effect: default
    grid = {"mode": ["at", "pgd_at"]}
    found = [run.options["rho"] for run in planned({**grid, "rho": [0, None, 1]})]
    assert found == [0, 1, 0, 1]
    # where no other value is asked for, modes still differ in nothing but the mode
    assert [run.options["rho"] for run in planned(grid, options={"rho": None})] == [None, None]


def test_what_is_finished_is_not_repeated_and_a_wider_grid_or_a_suite_adds(planned):
    for run in planned(**SUITE):
        perform(run)
    wider = {"mode": ["none", "at"], "rho": [0, 1, 2], "norm": ["l2", "l1"]}
    runs = planned(wider, seeds=2, **SUITE)
    assert names(run for run in runs if run.finished) == names(planned())
    assert len(runs) == 2 * 6
    assert "at-rho1-l1-seed0" in names(runs)
    run = planned(evaluate=("paper", "fast"))[0]
    assert not run.finished
    assert list(perform(run).evaluations) == ["paper", "fast"]
    assert stages(run) == ["train resume=False", "paper resume=False", "fast resume=False"]


def test_a_run_that_had_null_is_found_by_its_value(planned):
    (run,) = planned({"mode": ["at"]}, options={"rho": None}, **SUITE)
    perform(run)
    known, other = planned({"rho": [1, 0]}, **SUITE)
    assert (known.name, known.finished, other.finished) == ("at-seed0", True, False)


def test_changed_options_under_the_same_name_are_found(planned, tmp_path):
    perform(planned(**SUITE)[0])
    with pytest.raises(ValueError, match="epochs is 1 there and 2 here"):
        planned(options={"epochs": 2})
    with pytest.raises(ValueError, match="test_limit is None there and 5 here"):
        planned(evaluations={"paper": {"test_limit": 5}})
    assert names(planned({**GRID, "epochs": [1, 2]}))[:2] == ["none-seed0", "none-epochs2-seed0"]
    # elsewhere and on another device it is the same run; an option that a newer recipe has is at
    # its default
    machine = {"data_root": "elsewhere", "device": "cpu", "workers": 2}
    assert planned(options=machine, **SUITE)[0].finished
    path = tmp_path / "sweep" / "runs" / "none-seed0" / "options.yaml"
    lines = [line for line in path.read_text().splitlines() if not line.startswith("norm:")]
    path.write_text("\n".join(lines))
    assert planned(**SUITE)[0].finished
    path.write_text(path.read_text() + "\ngone: 1\n")
    with pytest.raises(SystemExit):
        planned()


def test_stages_that_were_cut_short_go_on(planned):
    run = planned(**SUITE)[1]
    (run.folder / "training").mkdir(parents=True)
    (run.folder / "training" / "config.yaml").write_text("torn: [")  # before the first checkpoint
    (run.folder / "refuse").touch()
    with pytest.raises(OSError, match="disk full"):
        perform(run)
    assert run.record.training
    assert not run.finished
    (run.folder / "refuse").unlink()
    perform(run)
    assert stages(run) == ["train resume=False", "paper resume=False", "paper resume=True"]
    # killed between a report and the record
    (run.folder / "run.json").unlink()
    assert perform(run).accuracies["paper/clean"] == pytest.approx(39 / 40)
    assert len(stages(run)) == 3
    (failing,) = planned({"behave": ["fail"]})
    for _ in range(2):
        with pytest.raises(ValueError, match="no such"):
            perform(failing)
    assert stages(failing) == ["train resume=False", "train resume=True"]


def test_a_report_of_other_options_is_not_taken_over(planned):
    before = planned(evaluations={"paper": {"test_limit": 20}})[0]
    perform(before)
    trained = replace(before.record, evaluations={})
    for limit, times in ((20, 1), (30, 2)):
        trained.save(before.folder / RECORD_FILE)  # killed between the report and the record
        run = planned(evaluations={"paper": {"test_limit": limit}})[0]
        assert perform(run).evaluations["paper"]["figures"]["clean"]["total"] == limit
        assert stages(run)[1:] == ["paper resume=False"] * times


def test_options_of_the_command_line_are_added_to_those_of_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = {"grid": {"rho": [1]}, "options": {"epochs": 5, "T": 2}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(kept))
    read = sweep.parse(["--sweep=mine.yaml", "--options", "{T: 4, data_root: x}"])
    assert (read.options, read.output) == ({"epochs": 5, "T": 4, "data_root": "x"}, "runs/mine")
    (tmp_path / "mine.yaml").rename(tmp_path / "sweep.yaml")
    assert sweep.parse(["--output", ".", "--options", "{T: 4}"]).options == {"epochs": 5, "T": 4}
    (tmp_path / "sweep.yaml").write_text("{base: digits, options: {model: own.py:build}}")
    with pytest.raises(ValueError, match="sweep.yaml names code that would be run"):
        sweep.parse(["--output", ".", "--options", "{T: 4}"])


def test_values_that_are_not_finite_and_failures(run, tmp_path):
    given = ("--grid", "{rho: [1, .inf], behave: [fail, well]}", "--output", "out")
    output = run(*given, code=1)
    assert "2 runs FAILED" in output
    assert "rho1-fail-seed0: no such" in output
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(BlockingIOError, match="another"):
        run(*given)
    assert "4 runs in out, 2 of them finished before" in run(*given, code=1)
    rows = rows_of(tmp_path / "out" / "results.csv")
    assert {(row["rho"], row["behave"]) for row in rows} == {("1.0", "well"), ("inf", "well")}
    assert "1 runs FAILED" in run("--grid", "{behave: [fail]}", "--output", "none", code=1)
    assert not (tmp_path / "none" / "results.md").exists()


KNOWN = {"dataset": "cifar10", "model": "vgg11", "neuron": "dlif", "mode": "at", "rho": 1.0}
KNOWN |= {"norm": "l2", "indicator": "mppd"}


@pytest.mark.parametrize(
    ("setting", "column", "percent"),
    [
        ({}, "paper/pgd10/last", 37.55),
        ({"rho": None}, "paper/pgd10/last", 37.55),
        ({"rho": 0.0}, "paper/pgd10/last", 29.06),
        ({"mode": "none", "neuron": "lif"}, "paper/pgd7/last", 0.03),
        ({"model": "vgg5", "indicator": "std"}, "paper/pgd7/last", 26.82),
        ({"norm": "l1", "rho": 3.0}, "autoattack/worst case", 23.04),
        ({}, "paper/pgd10", None),
        ({"norm": "l1"}, "paper/pgd10/last", None),
        ({"dataset": "cifar100"}, "paper/pgd10/last", None),
        ({"mode": "pgd_at"}, "paper/pgd10/last", None),
    ],
)
def test_published_accuracies(setting, column, percent):
    found = published(KNOWN | setting, column)
    assert (found and found[0]) == percent
    assert sum(len(setting["percent"]) for paper in papers() for setting in paper["settings"]) == 29


def made_up(pgd, suites=(), **values):
    """A run with so many of 100 images right under PGD-20."""
    shown = ("clean", "pgd10", "pgd10/last", "pgd10@10/255", "control", "everything")
    counts = {name: {"correct": pgd, "total": 200} for name in shown}
    training = {name: {"correct": pgd, "total": 100} for name in ("clean", "pgd20")}
    result = {"figures": counts, "alarm": "", "options": {}}
    record = RunRecord("", KNOWN | {"seed": 0}, training, dict.fromkeys(suites, result))
    return SimpleNamespace(values=values, record=record)


def test_columns():
    results = Results([made_up(5, T=8), made_up(5, ["paper", "fast"], T=16)], ["T"])
    paper = ["paper/clean", "paper/pgd10/last", "paper/control", "paper/everything"]
    fast = ["fast/clean", "fast/control", "fast/everything"]
    assert results.columns() == ["clean", "pgd20", *paper, *fast]
    few = [name for name in (*paper, *fast) if "control" not in name]
    assert results.columns(few=True) == few
    assert results.columns(["fast/ev*", "pgd*"]) == ["fast/everything", "pgd20"]


def test_the_figure_tells_lines_and_values_apart(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "lab.sweeping.report.save", lambda figure, *where: drawn.append(figure) or where
    )
    runs = [made_up(5, mode="none")]
    for mode in ("at", "rat"):
        runs.append(made_up(50, mode=mode, rho=0.0))
        runs += [
            made_up(50, mode=mode, rho=rho, norm=norm)
            for rho in (10.0, 0.3)
            for norm in ("l1", "l2")
        ]
    results = Results(runs, ["mode", "rho", "norm"])
    plot_effect(results, "rho", ["clean", "pgd20"], tmp_path / "effect-rho")
    (figure,) = drawn
    assert [panel.get_title(loc="left") for panel in figure.axes] == ["at", "rat", "", ""]
    assert [panel.get_ylabel() for panel in figure.axes] == ["clean, %", "", "pgd20, %", ""]
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert labels == {"l1", "l2", "none"}
    # equal steps, and rho 0, where the norm changes nothing, at the start of both lines
    for panel in figure.axes:
        assert [label.get_text() for label in panel.get_xticklabels()] == ["0", "0.3", "10"]
        for container in panel.containers:
            assert container.lines[0].get_xdata() == pytest.approx([0, 1, 2], abs=0.2)
    level = next(one for one in figure.axes[2].containers if one.get_label() == "none")
    assert level.lines[0].get_ydata() == pytest.approx([5, 5, 5])
    for name in ("mode", "tau"):  # of words, and of nothing that differs
        assert plot_effect(results, name, ["clean"], tmp_path / "effect") == ()


def test_null_and_its_value_are_one_run_of_the_real_recipe(tmp_path):
    options = sweep.Options(base="digits", grid={"rho": [None, 1, 0], "eps": ["0.1", 0.1]})
    assert names(sweep.plan(options, tmp_path).runs) == ["rho1-eps0.1-seed0", "rho0-eps0.1-seed0"]


def test_a_recipe_must_look_like_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.py"):
        load_recipe(tmp_path / "none.py")
    (tmp_path / "empty.py").touch()
    with pytest.raises(ValueError, match="Options and main"):
        load_recipe(tmp_path / "empty.py")
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError):
            load_recipe(tmp_path / "broken.py")
