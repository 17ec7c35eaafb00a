import csv
from contextlib import nullcontext
from shlex import split

import pytest
import yaml
from evaluation.recipe_run import undrawn
from fake_recipes import write_fakes
from filelock import FileLock
from lab.sweeping import plan
from lab.sweeping.perform import perform
from lab.sweeping.recipe import load_recipe
from lab.sweeping.record import RECORD_FILE, RunRecord
from launch import ROOT

sweep = load_recipe(ROOT / "recipes" / "sweep.py")
GRID = ("--grid", "{neuron: [lif, dlif], mode: [none, at], rho: [0, 1]}", "--seeds", "2")


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
def run(tmp_path, monkeypatch, capsys):
    """A function that runs the recipe on recipes that take no time, with figures if asked for, and
    returns what it prints.
    """
    fakes = [f"--{name}={path}" for name, path in write_fakes(tmp_path).items()]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sweep.main.__globals__, "perform_all", one_after_the_other)
    monkeypatch.setitem(sweep.main.__globals__, "executor_for", lambda *given, jobs: given)

    def call(*arguments, code=None, draws=False):
        with nullcontext() if draws else undrawn():
            if code is None:
                sweep.main([*arguments, *fakes])
            else:
                with pytest.raises(SystemExit) as stop:
                    sweep.main([*arguments, *fakes])
                assert stop.value.code == code
        return capsys.readouterr().out

    return call


@pytest.mark.slow
def test_a_grid_from_end_to_end(run, tmp_path):
    output = run(
        *GRID,
        *split("--evaluate paper --evaluation_options"),
        "{test_limit: 20}",
        "--contrast",
        "rho",
        draws=True,
    )
    folder = tmp_path / "runs" / "sweep"
    assert "12 runs in runs/sweep, 0 of them finished before" in output
    assert "12/12 dlif-at-rho1-seed1: clean 90.0%, pgd20 53.0%, paper worst" in output
    assert "report of the training recipe" in output
    for name in (
        "results.md",
        "results.csv",
        "contrast-rho.csv",
        "effect-rho.png",
        "effect-rho.pdf",
    ):
        assert (folder / name).stat().st_size > 0
        assert name in output
    assert len(list(folder.glob("runs/*/run.json"))) == 12
    text = (folder / "results.md").read_text()
    assert "| dlif | at | 1 | 2 | 90.0 ± 0.0 [85.17] | 52.0 ± 1.4 |" in text
    assert "[37.55]" in text
    assert "| dlif | at | 0 → 1 | paper/clean | +0.00 | 0.00 | +0.00 to +0.00 | 2 |" in text
    rows = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    pgd = next(
        row
        for row in rows
        if row["figure"] == "paper/pgd10/last" and (row["neuron"], row["rho"]) == ("dlif", "1.0")
    )
    assert float(pgd["published"]) == 0.3755
    record = RunRecord.load(folder / "runs" / "dlif-at-rho1-seed1" / RECORD_FILE)
    assert record.evaluations["paper"]["figures"]["clean"] == {"correct": 19, "total": 20}


@pytest.mark.slow
def test_a_sweep_goes_on_and_grows_and_is_reported_again(run, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump({"grid": {"mode": ["at"], "rho": [0, 1]}, "seeds": 1, "evaluate": ["paper"]})
    )
    assert "2 runs in runs/mine, 0 of them" in run("--sweep", "mine.yaml")
    folder = tmp_path / "runs" / "mine"
    assert "2 runs in runs/mine, 2 of them finished before" in run("--output", "runs/mine")
    assert "4 runs in runs/mine, 2 of them" in run(
        *split("--output runs/mine --grid"), "{mode: [at, rat], rho: [0, 1]}"
    )
    assert "4 runs in runs/mine, 0 of them" in run(
        *split("--output runs/mine --evaluate paper fast"), draws=True
    )
    for calls in folder.glob("runs/*/calls"):
        found = [line.split()[0] for line in calls.read_text().splitlines()]
        assert found == [
            "train",
            "paper",
            "fast",
        ]
    before = {path.name: path.read_bytes() for path in folder.glob("[!R]*.*")}
    for name in ("results.md", "results.csv", "effect-rho.png", "effect-rho.pdf"):
        (folder / name).unlink()
    output = run(*split("--output runs/mine --report"), draws=True)
    assert "runs in" not in output
    found = {path.name: path.read_bytes() for path in folder.glob("[!R]*.*")}
    assert found == before
    assert "pgd20" not in run(*split("--output runs/mine --report --columns clean"))
    with pytest.raises(
        ValueError, match=r"columns \['x/\*'\] fit none of the figures there are: clean, pgd20"
    ):
        run(*split("--output runs/mine --report --columns x/*"))


CELLS = """
plain: {options: {neuron: lif, mode: none}}
tuned: {config: own.yaml, options: {mode: at}, search: {rho: [0, 1]}}
"""


def test_cells_search_on_validation_images_and_are_then_trained_with_every_seed(run, tmp_path):
    (tmp_path / "own.yaml").write_text("{neuron: lif, mode: rat, epochs: 7}")
    given = ("--cells", CELLS, "--options", "{epochs: 3}", "--seeds", "2")
    output = run(*given, "--evaluations", "{weak: {suite: paper, test_limit: 20}}")
    said = [line for line in output.splitlines() if "finished before" in line]
    assert said == [
        "2 runs in runs/sweep, 0 of them finished before",  # the search
        "2 runs in runs/sweep, 0 of them finished before",  # both cells with the first seed
        "4 runs in runs/sweep, 2 of them finished before",
    ]
    folder = tmp_path / "runs" / "sweep"
    assert (folder / "search.csv").read_text().splitlines() == [
        "cell,value,validation,clean,chosen",
        "tuned,rho 0,0.4,0.9,False",
        "tuned,rho 1,0.5,0.9,True",
    ]
    calls = {path.parent.name: path.read_text().split() for path in folder.glob("runs/*/calls")}
    assert {name: found[0] for name, found in calls.items()} == dict.fromkeys(calls, "train")
    evaluated = {name for name, found in calls.items() if "paper" in found}
    chosen = {f"{name}-seed{seed}" for name in ("plain", "tuned-rho1") for seed in (0, 1)}
    assert evaluated == chosen
    assert calls.keys() == {*chosen, "tuned-rho0-seed0"}
    rows = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    found = {(row["cell"], row["figure"]): (row["mean"], row["seeds"]) for row in rows}
    assert {cell for cell, _ in found} == {"plain", "tuned"}
    assert found["tuned", "weak/clean"] == ("0.95", "2")
    assert found["tuned", "weak/pgd10/ms_mppd"] == ("2.0", "2")
    assert found["tuned", "validation/pgd"] == ("0.51", "2")
    assert float(found["plain", "training/cpu_seconds"][0]) > 0
    record = RunRecord.load(folder / "runs" / "tuned-rho1-seed1" / RECORD_FILE)
    kept = {name: record.options[name] for name in ("neuron", "mode", "epochs")}
    assert kept == {"neuron": "lif", "mode": "at", "epochs": 3}  # the cell's own above all
    before = (folder / "results.csv").read_text()
    run("--output", "runs/sweep", "--report")
    assert (folder / "results.csv").read_text() == before
    assert "4 runs in runs/sweep, 4 of them finished" in run("--output", "runs/sweep")


@pytest.mark.slow
def test_a_plan_reads_every_run_of_the_folder_once_however_many_cells_there_are(
    run, tmp_path, monkeypatch
):
    (tmp_path / "own.yaml").write_text("{neuron: lif, mode: rat}")
    run("--cells", CELLS, "--seeds", "2")
    read = []
    read_file = plan.read_file

    def counted(path):
        read.append(path)
        return read_file(path)

    monkeypatch.setattr(plan, "read_file", counted)
    fakes = [f"--{name}={path}" for name, path in write_fakes(tmp_path).items()]
    folder = tmp_path / "runs" / "sweep"
    options = sweep.main.__globals__["parse"](["--output", str(folder), *fakes])
    planned = sweep.main.__globals__["plan"](options, folder)
    assert all(one.finished for one in planned.runs)
    assert sorted(read) == sorted(folder.glob("runs/*/options.yaml"))
    assert len(read) == 5


@pytest.mark.slow
def test_cells_that_are_stopped_at_any_run_go_on_and_repeat_nothing(run, tmp_path, monkeypatch):
    (tmp_path / "own.yaml").write_text("{neuron: lif}")
    given = ("--cells", CELLS, "--seeds", "1", "--evaluate", "paper")

    def stopped(runs, executor, *, jobs, threads):
        for end in one_after_the_other(runs, executor, jobs=jobs, threads=threads):
            yield end
            raise KeyboardInterrupt

    stops = 0
    with monkeypatch.context() as patch:
        patch.setitem(sweep.main.__globals__, "perform_all", stopped)
        while not list(tmp_path.glob("runs/sweep/runs/tuned-rho1-seed0/paper")):
            with pytest.raises(KeyboardInterrupt):
                run(*given)
            stops += 1
    assert stops == 4
    run("--output", "runs/sweep")
    for calls in tmp_path.glob("runs/sweep/runs/*/calls"):
        words = [line.split()[0] for line in calls.read_text().splitlines()]
        assert words in (["train"], ["train", "paper"])
    run(*given, "--output", "whole")
    tables = [tmp_path / name / "results.csv" for name in ("runs/sweep", "whole")]
    found, expected = (table.read_text().splitlines() for table in tables)
    assert [row for row in found if "cpu" not in row] == [
        row for row in expected if "cpu" not in row
    ]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ("{a: {mode: at}}", "a cell has config, options, search, got 'mode' in a"),
        (
            "{a: {search: {rho: [1]}}}",
            "a search needs two values or more, got {'rho': \\[1\\]} in a",
        ),
        ("{a: {options: {rho: 1}}, b: {options: {rho: 1}}}", "cells a and b are the same run"),
        ("{a: {options: {rho: 1}}, b: {options: {rho: 1.0}}}", "cells a and b are the same run"),
        ("{a: {search: {seed: [1, 2]}}}", "seed is set by the sweep itself"),
        # the same run: by its values, by null, or by an option without effect
        ("{a: {search: {rho: [1, 1.0, 2]}}}", r"two of cell a make the same one \(rho 1; rho 1"),
        ("{a: {search: {rho: [null, 1]}}}", "two of cell a make the same one"),
        ("{a: {options: {rho: 0}, search: {norm: [l1, l2]}}}", "values that make different runs"),
        (
            "{a-at: {options: {epochs: 2}}, a: {search: {mode: [at, rat]}}}",
            "a-at and a both have a run a-at-seed0",
        ),
        ("{a: [1]}", r"cell a must have names with values, such as .*, got \[1\]"),
        ("{a: {search: [1, 2]}}", r"search of cell a must have names .*, got \[1, 2\]"),
        ("{a: {options: [mode]}}", r"options of cell a must have names .*, got \['mode'\]"),
        ("{a: {config: [mode]}}", r"\['mode'\] must be a file of options"),
        ("{1: {options: {mode: at}}}", "name of a cell must be text, got 1"),
    ],
)
def test_wrong_cells(run, cells, message):
    with pytest.raises(ValueError, match=message):
        run("--cells", cells)


@pytest.mark.parametrize("cell", ["{options: {rho: 3}}", "{search: {rho: [2, 3]}}"])
def test_a_grid_does_not_override_what_a_cell_says(run, cell):
    with pytest.raises(ValueError, match="rho is in the grid and in cell a, whose own value"):
        run("--cells", f"{{a: {cell}}}", "--grid", "{rho: [0, 1]}")


def test_an_entry_of_skip_may_match_runs_of_a_single_cell(run):
    names = [f"c{number}" for number in range(6)]
    cells = ", ".join(f"{name}: {{options: {{epochs: {name[1:]}}}}}" for name in names)
    given = ("--cells", f"{{{cells}}}", "--grid", "{mode: [none, at]}")
    assert "11 runs in" in run(*given, "--skip", "[{epochs: 5, mode: none}]")
    with pytest.raises(ValueError, match=r"{'epochs': 6, 'mode': 'none'} matches none"):
        run(*given, "--skip", "[{epochs: 6, mode: none}]")


def test_a_wrong_grid_is_refused_before_cells_are_searched(run, tmp_path):
    run("--cells", "{a: {search: {rho: [0, 1]}}}", "--grid", "{mode: [an]}", code=2)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "name",
    ["training", "validation", "options", "run", "run.json", "output", "output.txt", "fast.yaml"],
)
def test_an_evaluation_has_a_name_of_its_own(run, tmp_path, name):
    with pytest.raises(ValueError, match=f"files or figures have already .*, got '{name}'"):
        run("--grid", "{rho: [1]}", "--evaluations", f"{{{name}: {{suite: fast}}}}")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["a/b", "'a b'", "..", ".lock", "''", "4", "-a", "ä"])
def test_the_name_of_an_evaluation_is_that_of_a_folder(run, name):
    with pytest.raises(ValueError, match="must be text of letters, digits"):
        run("--grid", "{rho: [1]}", "--evaluations", f"{{{name}: {{suite: fast}}}}")


def test_an_evaluation_may_have_any_other_name(run, tmp_path):
    given = ("--grid", "{rho: [1]}", "--evaluate", "paper", "--evaluation-options", "{suite: fast}")
    run(*given, "--evaluations", "{fast: null, 4_255+x-1.5: {}}")
    (path,) = tmp_path.glob("runs/sweep/runs/*/run.json")
    found = RunRecord.load(path).evaluations
    suites = {name: result["options"]["suite"] for name, result in found.items()}
    assert suites == {"paper": "paper", "fast": "fast", "4_255+x-1.5": "fast"}


@pytest.mark.parametrize("option", ["checkpoint", "data_root", "device", "name", "output"])
def test_an_evaluation_is_of_the_network_of_its_run(run, option):
    given = ("--grid", "{rho: [1]}", "--evaluate", "fast")
    for more in (
        ("--evaluation-options", f"{{{option}: x}}"),
        ("--evaluations", f"{{weak: {{suite: fast, {option}: x}}}}"),
    ):
        with pytest.raises(ValueError, match=f"{option} of an evaluation is set by the sweep"):
            run(*given, *more)


@pytest.mark.parametrize(
    "wrong",
    [{"suite": "stress"}, {"suite": "corruptions"}, {"suite": "fast", "smooth": 0.25}],
)
def test_an_evaluation_without_a_report_of_attacks_is_refused(tmp_path, wrong):
    options = sweep.options_type(base="digits", evaluations={"f": wrong})
    with pytest.raises(ValueError, match="must be a suite of attacks on the trained network, f"):
        sweep.main.__globals__["plan"](options, tmp_path)


def test_options_of_the_command_line_are_added_to_those_of_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = {"grid": {"rho": [1]}, "options": {"epochs": 5, "T": 2}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(kept))
    parse = sweep.main.__globals__["parse"]
    read = parse(["--sweep=mine.yaml", "--options", "{T: 4, data_root: x}"])
    assert (read.options, read.output) == ({"epochs": 5, "T": 4, "data_root": "x"}, "runs/mine")
    (tmp_path / "mine.yaml").rename(tmp_path / "sweep.yaml")
    assert parse(["--output", ".", "--options", "{T: 4}"]).options == {"epochs": 5, "T": 4}
    (tmp_path / "sweep.yaml").write_text("{base: digits, options: {model: own.py:build}}")
    with pytest.raises(ValueError, match="sweep.yaml names code that would be run"):
        parse(["--output", ".", "--options", "{T: 4}"])


def test_a_value_that_is_not_finite_is_recorded(run, tmp_path):
    given = ("--grid", "{rho: [1, .inf]}")
    assert "2 runs in runs/sweep, 0 of them finished before" in run(*given)
    assert "2 runs in runs/sweep, 2 of them finished before" in run(*given)
    rows = list(csv.DictReader((tmp_path / "runs/sweep/results.csv").read_text().splitlines()))
    assert {row["rho"] for row in rows} == {"1.0", "inf"}


def test_failures_are_summed_up(run, tmp_path):
    output = run("--grid", "{behave: [fail, well]}", "--output", "out", code=1)
    assert "FAILED" in output
    assert output.endswith(
        "1 runs FAILED; the same command tries them again:\nfail-seed0: no such\nthing\n"
    )
    assert "| well | 1 | 90.0" in (tmp_path / "out" / "results.md").read_text()
    assert "1 runs FAILED" in run("--grid", "{behave: [fail]}", "--output", "none", code=1)
    assert not (tmp_path / "none" / "results.md").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("--base", "list.yaml"), ValueError, "list.yaml must hold options"),
        (("--grid", "{seed: [1]}"), ValueError, "seed is set by the sweep itself"),
        (
            ("--grid", "{rho: [1]}", "--options", "{output: x}"),
            ValueError,
            "output is set by the sweep itself",
        ),
        (
            ("--grid", "{rho: [1]}", "--skip", "[{rho: 1}]"),
            ValueError,
            "skip leaves no combination",
        ),
        (
            ("--grid", "{rho: [1, 2]}", "--skip", "[{rho: 3}]"),
            ValueError,
            "{'rho': 3} matches none",
        ),
        (
            ("--grid", "{rho: [1, 2]}", "--skip", "[{seed: 0}]"),
            ValueError,
            "seed is set by the sweep itself",
        ),
        (("--grid", "{rho: [1]}", "--skip", "[lif]"), ValueError, "entry of skip must have names"),
        (("--grid", "{rho: [1]}", "--seeds", "[a]"), ValueError, r"seeds must be .*, got \['a'\]"),
        (
            ("--grid", "{rho: [1]}", "--evaluations", "{f: fast}"),
            ValueError,
            "evaluation f must have names with values, such as .*, got 'fast'",
        ),
        (("--grid", "{rho: [1]}", "--evaluate", "slow"), SystemExit, "2"),
        (("--grid", "{rho: [1]}", "--evaluations", "{f: {epss: 1}}"), SystemExit, "2"),
        (("--options", "{1: 2}", "--grid", "{rho: [1]}"), SystemExit, "2"),
        (
            ("--grid", "{rho: [1]}", "--contrast", "roh"),
            ValueError,
            "has no option 'roh'; it has",
        ),
        (("--grid", "{rho: [1]}", "--contrast", "mode"), ValueError, "got 'mode'"),
    ],
)
def test_wrong_use(run, tmp_path, arguments, error, message):
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(error, match=message):
        run(*arguments)


def test_two_sweeps_do_not_share_a_folder(run, tmp_path):
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out" / ".lock"),
        pytest.raises(BlockingIOError, match="out is being written by another"),
    ):
        run("--grid", "{rho: [1]}", "--output", "out")
    run("--grid", "{rho: [1]}", "--output", "out")


def test_null_and_its_value_are_one_run_of_the_real_recipe(tmp_path):
    def names(grid):
        planned = sweep.main.__globals__["plan"](
            sweep.options_type(base="digits", grid=grid), tmp_path
        )
        return [run.name for run in planned.runs]

    found = names({"rho": [None, 1, 0], "eps": ["0.1", 0.1]})
    assert found == [
        "rho1-eps0.1-seed0",
        "rho0-eps0.1-seed0",
    ]
