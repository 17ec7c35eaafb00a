"""Planning and performing, with recipes that take no time."""

import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import submitit
import torch
from fake_recipes import write_fakes
from lab import paths_for_children
from lab.sweeping.grid import expand
from lab.sweeping.perform import LOG_FILE, Attempt, perform
from lab.sweeping.plan import begun_runs, load_records, plan_runs
from lab.sweeping.pool import executor_for, gpus_of, perform_all
from lab.sweeping.recipe import load_recipe
from lab.sweeping.record import RECORD_FILE, RunRecord
from lab.sweeping.skip import Skip
from launch import fork, forked, unboxed, wait_until

from sj_robust.evaluation import Report

GRID = {"mode": ["none", "at"], "rho": [0, 1]}


@pytest.fixture
def planned(tmp_path):
    """A function that plans a sweep in a folder."""
    paths = {name: load_recipe(Path(path)) for name, path in write_fakes(tmp_path).items()}

    def plan(grid=GRID, seeds=(0,), fixed=None, evaluations=None):
        suites = evaluations or {"paper": {}}
        folder = tmp_path / "sweep"
        return plan_runs(
            folder,
            expand(grid),
            seeds,
            fixed=fixed or {},
            evaluations=suites,
            begun=begun_runs(folder, paths["recipe"]),
            **paths,
        )

    return plan


def names(runs):
    return [run.name for run in runs]


def calls(run):
    if (run.folder / "calls").exists():
        return (run.folder / "calls").read_text().split("\n")[:-1]
    return []


def stages(run):
    return [line.split(" pid")[0] for line in calls(run)]


def has_ended(run):
    """Whether the process of the run's last call is gone."""
    pid = int(calls(run)[-1].split("pid=")[1])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").exists() and " Z " in Path(f"/proc/{pid}/stat").read_text()


def test_the_same_run_is_planned_once(planned):
    runs = planned(seeds=(0, 1))
    assert names(runs) == [
        "none-seed0",
        "at-rho0-seed0",
        "at-rho1-seed0",
        "none-seed1",
        "at-rho0-seed1",
        "at-rho1-seed1",
    ]
    assert [run.options["rho"] for run in runs[:2]] == [
        1.0,
        0.0,
    ]  # the default with none, whatever the grid says
    assert not (runs[0].folder).exists()
    # null is the value that it stands for
    found = names(planned({"rho": [None, 1, 0]}))
    assert found == ["rho1-seed0", "rho0-seed0"]
    found = [run.options["rho"] for run in planned({"mode": ["at", "pgd_at"], "rho": [0, None, 1]})]
    assert found == [0, 1, 0, 1]
    # where no other value is asked for, modes still differ in nothing but the mode
    found = [run.options["rho"] for run in planned({"mode": ["at", "pgd_at"]}, fixed={"rho": None})]
    assert found == [None, None]
    # two folders of images are the same run: the option is no part of what decides the accuracies
    assert len(planned({"data_root": ["a", "b"]})) == 1
    grid = {"eps": ["8/255", 0.1], "data_root": ["a/b"], "norm": ["l1"]}
    assert names(planned(grid)) == ["eps8_255-a_b-l1-seed0", "eps0.1-a_b-l1-seed0"]


@pytest.fixture
def recipe(tmp_path):
    return load_recipe(Path(write_fakes(tmp_path)["recipe"]))


def test_skip_names_options_beside_the_grid_and_lists_of_values(recipe):
    combinations = expand({"mode": ["none", "at", "rat"], "rho": [0, 1, 2]})
    skip = Skip([{"neuron": "lif", "mode": ["at", "rat"], "rho": [1.0, 2]}], recipe)
    assert skip.names == ["neuron", "mode", "rho"]
    assert skip.left_of(combinations, {"neuron": "dlif"}) == combinations
    with pytest.raises(ValueError, match=r"skip must match .*, {'neuron': 'lif', .* matches none"):
        skip.check_used()
    left = skip.left_of(combinations, {"neuron": "lif"})
    found = [(one["mode"], one["rho"]) for one in left]
    assert found == [
        ("none", 0),
        ("none", 1),
        ("none", 2),
        ("at", 0),
        ("rat", 0),
    ]
    skip.check_used()
    joint = Skip([{"mode,rho": [["at", 1], ["rat", 2]]}], recipe).left_of(combinations, {})
    assert len(joint) == len(combinations) - 2


@pytest.mark.parametrize(
    ("entry", "left"),
    [
        ({"mode": "at", "rho": 1}, ["pgd_at"]),  # rho is null, which means 1 with at
        ({"rho": 0}, ["at"]),
        ({"rho": None}, []),
        ({"eps": 0.0313725490196}, []),
        ({"eps": ["8/255", 0.2]}, []),
        ({"eps": 0.0314}, ["at", "pgd_at"]),
        ({"norm": "l2"}, []),  # the default
    ],
)
def test_skip_compares_the_values_that_runs_have(recipe, entry, left):
    skip = Skip([entry], recipe)
    found = skip.left_of(expand({"mode": ["at", "pgd_at"]}), {"rho": None, "eps": "8/255"})
    assert [one["mode"] for one in found] == left


def test_an_option_that_is_searched_is_not_skipped_by_its_default(recipe):
    skip = Skip([{"rho": 1}], recipe)
    assert skip.left_of([{"mode": "at"}], {}, ["rho"]) == [{"mode": "at"}]
    assert skip.left_of([{"mode": "at"}], {}) == []


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "would skip everything"),
        ("lif", "an entry of skip must have names with values, such as .*, got 'lif'"),
    ],
)
def test_wrong_entries_of_skip(recipe, entry, message):
    with pytest.raises(ValueError, match=message):
        Skip([entry], recipe)


def test_options_in_skip_are_checked(recipe, capsys):
    for entry in ({"nueron": "lif"}, {"mode": "an"}):
        with pytest.raises(SystemExit) as stop:
            Skip([entry], recipe)
        assert stop.value.code == 2
        assert "(in skip)" in capsys.readouterr().err


def test_a_run_that_had_null_is_found_by_its_value_and_tabled_with_it(planned):
    (run,) = planned({"mode": ["at"]}, fixed={"rho": None})
    perform(run)
    assert run.record.options["rho"] is None
    known, other = planned({"rho": [1, 0]})
    assert (known.name, known.finished, other.finished) == ("at-seed0", True, False)
    folder = run.folder.parents[1]
    recipe = load_recipe(run.recipe)
    found = [record.options["rho"] for record in load_records(folder, recipe)]
    assert found == [None]
    perform(other)
    found = [record.options["rho"] for record in load_records(folder, recipe)]
    assert found == [1.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": {"roh": [1]}}, r"Unrecognized options: --roh, 1 .*--rho.*\(in recipe.py\)"),
        ({"grid": {"mode": ["at", "an"]}}, r"'an' for argument '--mode'.*\(in recipe.py\)"),
        ({"grid": {"rho": ["much"]}}, r"--rho.*much.*\(in recipe.py\)"),
        ({"fixed": {"epochs": 1.5}}, "--epochs: invalid literal for int"),
        ({"evaluations": {"slow": {}}}, r"--suite.*\(in evaluator.py\)"),
        ({"evaluations": {"paper": {"limit": 3}}}, "options: --limit, 3 .*--test-limit"),
    ],
)
def test_wrong_options_stop_before_anything_starts(planned, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        planned(**arguments)
    assert stop.value.code == 2
    assert re.search(message, unboxed(capsys.readouterr().err))
    assert not (tmp_path / "sweep").exists()


def test_a_run_whose_options_make_too_long_a_name_is_refused(planned):
    with pytest.raises(ValueError, match="at most 255 bytes"):
        planned({"dataset": ["n" * 300]})


def test_a_run_leaves_one_record(planned):
    run = planned(evaluations={"paper": {"test_limit": 30}, "fast": {}})[1]
    record = perform(run)
    assert RunRecord.load(run.folder / RECORD_FILE) == record
    assert record.options == run.options
    assert record.training == {
        "clean": {"correct": 90, "total": 100},
        "pgd20": {"correct": 41, "total": 100},
    }
    shares = {
        "paper/clean": 29 / 30,
        "fast/clean": 39 / 40,
        "paper/everything": 25 / 30,
        "paper/control": 28 / 30,
    }
    found = {name: record.accuracies[name] for name in shares}
    assert found == pytest.approx(shares)
    assert record.evaluations["paper"]["options"]["test_limit"] == 30
    assert record.evaluations["paper"]["eps"] == "8/255"
    assert set(record.seconds) == {"training", "paper", "fast"}
    assert stages(run) == ["train resume=False", "paper resume=False", "fast resume=False"]
    assert Report.load(run.folder / "fast" / "report.json").name == run.name == "at-rho0-seed0"


def test_what_is_finished_is_not_repeated_and_a_wider_grid_or_a_suite_adds(planned):
    for run in planned():
        perform(run)
    runs = planned({"mode": ["none", "at"], "rho": [0, 1, 2], "norm": ["l2", "l1"]}, seeds=(0, 1))
    found = names(run for run in runs if run.finished)
    assert found == [
        "none-seed0",
        "at-rho0-seed0",
        "at-rho1-seed0",
    ]
    assert len(runs) == 2 * 6
    assert "at-rho1-l1-seed0" in names(runs)
    perform(runs[0])
    assert stages(runs[0]) == ["train resume=False", "paper resume=False"]
    run = planned(evaluations={"paper": {}, "fast": {}})[0]
    assert not run.finished
    assert list(perform(run).evaluations) == ["paper", "fast"]
    assert stages(run) == ["train resume=False", "paper resume=False", "fast resume=False"]


def test_changed_options_under_the_same_name_are_found(planned, tmp_path, capsys):
    perform(planned()[0])
    with pytest.raises(
        ValueError, match=r"none-seed0 was run with other options \(epochs was 1 and is 2 now\)"
    ):
        planned(fixed={"epochs": 2})
    with pytest.raises(
        ValueError, match=r"paper was run with other options \(test_limit was None and is 5 now\)"
    ):
        planned(evaluations={"paper": {"test_limit": 5}})
    found = names(planned({**GRID, "epochs": [1, 2]}))
    assert found == [
        "none-seed0",
        "none-epochs2-seed0",
        "at-rho0-epochs1-seed0",
        "at-rho0-epochs2-seed0",
        "at-rho1-epochs1-seed0",
        "at-rho1-epochs2-seed0",
    ]
    # elsewhere and on another device it is the same run; an option that a newer recipe has is at
    # its default
    assert planned(fixed={"data_root": "elsewhere", "device": "cpu", "workers": 2})[0].finished
    path = tmp_path / "sweep" / "runs" / "none-seed0" / "options.yaml"
    path.write_text(
        "\n".join(line for line in path.read_text().splitlines() if not line.startswith("norm:"))
    )
    assert planned()[0].finished
    path.write_text(path.read_text() + "\ngone: 1\n")
    with pytest.raises(SystemExit):
        planned()
    told = unboxed(capsys.readouterr().err)
    assert "Unrecognized options: --gone, 1" in told
    assert "options.yaml, of another version: use another --output)" in told


def test_stages_that_were_cut_short_go_on(planned):
    run = planned()[1]
    (run.folder / "training").mkdir(parents=True)
    (run.folder / "training" / "config.yaml").write_text(
        "torn: ["
    )  # killed before the first checkpoint
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
    assert len(calls(run)) == 3
    (failing,) = planned({"behave": ["fail"]})
    for _ in range(2):
        with pytest.raises(ValueError, match="no such"):
            perform(failing)
    assert stages(failing) == ["train resume=False", "train resume=True"]


def test_a_report_of_other_options_is_not_taken_over(planned):
    before = planned(evaluations={"paper": {"test_limit": 20}})[0]
    perform(before)
    path = before.folder / "paper" / "report.json"
    trained = replace(before.record, evaluations={})
    trained.save(before.folder / RECORD_FILE)  # killed between the report and the record
    perform(before)
    assert stages(before) == ["train resume=False", "paper resume=False"]
    trained.save(before.folder / RECORD_FILE)
    after = planned(evaluations={"paper": {"test_limit": 30}})[0]
    figures = perform(after).evaluations["paper"]["figures"]
    assert figures["clean"]["total"] == 30
    assert stages(after)[2:] == ["paper resume=False"]
    # a report from before the options existed was made with their defaults
    trained.save(before.folder / RECORD_FILE)
    default = planned()[0]
    for configuration in ({"suite": "paper"}, {}):
        report = replace(Report.load(path), configuration=configuration)
        report.save(path)
        trained.save(before.folder / RECORD_FILE)
        perform(default)
    assert len(stages(default)) == 3


def comes_to_its_end(runs, seconds):
    """Whether runs are performed in a process that is killed after so much time of the CPU."""
    child = os.fork()
    if not child:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        for run in runs:
            perform(run)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.slow
def test_kills_at_any_moment_lose_and_repeat_nothing(planned):
    runs = planned(seeds=(0, 1))
    rng = random.Random(0)
    undisturbed = []
    seconds = 1.0
    for run in runs:
        start = time.process_time()
        undisturbed.append(perform(run))
        seconds = min(seconds, time.process_time() - start)  # of one whose imports are done
        shutil.rmtree(run.folder)
    kills = 0
    while not comes_to_its_end(runs, rng.uniform(0.1, 0.8) * seconds):
        kills += 1
        seconds *= 1.02  # a forked process may need more than this one did
        assert kills < 100
    assert kills > 2
    for run, known in zip(runs, undisturbed, strict=True):
        assert (run.record.options, run.record.accuracies) == (known.options, known.accuracies)


def ends_until_interrupted(runs, executor, *, last, jobs=1, meanwhile=lambda: None):
    """Errors by name, until a run waits, at which Ctrl-C is pressed."""
    ends = {}

    def interrupt():
        meanwhile()
        wait_until((last.folder / "training" / "waiting").exists, "the run's start")
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    def perform_them():
        for run, error in perform_all(runs, executor, jobs=jobs):
            ends[run.name] = error

    # a shell may have started the tests in the background, where SIGINT is ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            perform_them()
    finally:
        signal.signal(signal.SIGINT, before)
        thread.join()
    return ends


@pytest.mark.parametrize(
    ("behave", "said"),
    [("fail", "ValueError: no such thing"), ("exit", "SystemExit: 2")],
)
def test_an_attempt_says_in_a_line_what_ended_it_and_logs_the_rest(planned, behave, said):
    (run,) = planned({"behave": [behave]})

    def work():
        os._exit(0 if Attempt(run)() == said else 1)

    assert forked(work) == [0]
    log = (run.folder / LOG_FILE).read_text()
    assert "training dlif" in log
    assert "Traceback" in log


@pytest.mark.slow
def test_runs_survive_each_other_and_stop_when_asked(planned, tmp_path, monkeypatch):
    """A run that kills its process, one that is well, one whose time is up and that is queued
    again, and one that Ctrl-C stops.
    """
    monkeypatch.setattr(submitit.LocalJob, "_results_timeout_s", 1)
    runs = planned({"behave": ["die", "well", "long", "wait"]})
    dies, well, long, waits = runs

    def end_of_time():
        wait_until((long.folder / "training" / "waiting").exists, "the long run's start")
        os.kill(int(calls(long)[0].split("pid=")[1]), signal.SIGUSR2)
        wait_until(lambda: long.finished, "the long run's end")

    found = ends_until_interrupted(
        runs, executor_for(tmp_path), last=waits, jobs=2, meanwhile=end_of_time
    )
    assert found.pop("long-seed0", None) is None  # its end may come with Ctrl-C
    assert found == {
        "die-seed0": "its process died (state FINISHED)",
        "well-seed0": None,
    }
    records = load_records(well.folder.parents[1], load_recipe(well.recipe))
    assert [record.name for record in records] == ["long-seed0", "well-seed0"]
    assert stages(long) == ["train resume=False", "train resume=True", "paper resume=False"]
    assert all(map(has_ended, runs))
    for run in (dies, waits):
        perform(run)
        assert stages(run) == ["train resume=False", "train resume=True", "paper resume=False"]


SCRIPT = """
import pickle
from pathlib import Path
from lab.sweeping.pool import executor_for, perform_all

runs = pickle.loads(Path("runs.pkl").read_bytes())
list(perform_all(runs, executor_for(Path("sweep")), jobs=len(runs)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_runs_of_a_killed_sweep_end_too(planned, tmp_path, number):
    runs = planned({"behave": ["wait", "long"]})
    (tmp_path / "sweep.py").write_text(SCRIPT)
    (tmp_path / "runs.pkl").write_bytes(pickle.dumps(runs))
    command = [sys.executable, "-W", "ignore", "sweep.py"]
    with subprocess.Popen(command, cwd=tmp_path, env=os.environ | paths_for_children()) as sweep:
        for run in runs:
            wait_until((run.folder / "training" / "waiting").exists, "the run's start")
        assert not any(map(has_ended, runs))
        sweep.send_signal(number)
        wait_until(lambda: all(map(has_ended, runs)), "the end of its runs")  # which sleep longer
    for run in runs:
        assert "the sweep has ended: stopping" in (run.folder / LOG_FILE).read_text()
        assert stages(run) == ["train resume=False"]
        perform(run)
        assert stages(run) == ["train resume=False", "train resume=True", "paper resume=False"]


@pytest.mark.slow
def test_a_run_that_another_process_performs_is_waited_for(planned, tmp_path):
    (run,) = planned({"behave": ["linger"]})

    child = fork(Attempt(run))
    wait_until((run.folder / "training" / "waiting").exists, "the run's start")
    found = list(perform_all([run], executor_for(tmp_path / "sweep")))
    assert os.waitpid(child, 0)[1] == 0
    assert found == [(run, None)]
    output = (run.folder / LOG_FILE).read_text()
    assert "waiting: another process still performs linger-seed0" in output
    assert stages(run) == ["train resume=False", "paper resume=False"]


SBATCH = """
cp "$1" script
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\)%.*/\\1/p' script)
export SLURM_JOB_ID=$$ SLURM_ARRAY_JOB_ID=$$ SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1
export SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
(for i in $(seq 0 $last); do
  SLURM_ARRAY_TASK_ID=$i setsid -w sh -c "echo \\$\\$ > pid$$_$i; exec sh script"
done) > /dev/null 2>&1 &
echo "Submitted batch job $$"
"""
SLURM = {
    "sbatch": SBATCH,
    "srun": 'shift 3; exec "$@"  # --unbuffered --output FILE COMMAND',
    "sacct": "echo 'JobID|State'",
    "scancel": "kill $(ps -o pid= -s $(cat pid$1))",
}


@pytest.mark.slow
def test_an_array_of_a_cluster(planned, tmp_path, monkeypatch):
    """With stand-ins for Slurm's commands that run the tasks of an array in turn."""
    for name, text in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    runs = planned({"behave": ["well", "wait"]})
    options = {"slurm_partition": "gpu", "timeout_min": 600}
    executor = executor_for(tmp_path, "slurm", options, jobs=1)
    assert ends_until_interrupted(runs, executor, last=runs[1]) == {"well-seed0": None}
    script = (tmp_path / "script").read_text()
    for line in ("--partition=gpu", "--time=600", "--array=0-1%1"):
        assert f"#SBATCH {line}\n" in script
    wait_until(lambda: has_ended(runs[1]), "the end of the job that was cancelled")
    assert stages(runs[1]) == ["train resume=False"]


def test_gpus_are_shared_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for visible, expected in (("", ["0", "1", "0"]), ("3,GPU-a", ["3", "GPU-a", "3"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert list(map(gpus_of, range(3))) == expected
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert gpus_of(1) == ""


def test_wrong_clusters_and_options(tmp_path):
    with pytest.raises(
        ValueError, match="cannot use cluster slurm with options {}: Could not detect"
    ):
        executor_for(tmp_path, "slurm")
    with pytest.raises(ValueError, match="Unknown argument 'qeue' for executor 'slurm'"):
        executor_for(tmp_path, "local", {"slurm_qeue": "gpu"})


def test_a_recipe_must_look_like_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; a sweep needs"):
        load_recipe(tmp_path / "none.py")
    (tmp_path / "empty.py").touch()
    with pytest.raises(ValueError, match="must have Options and main"):
        load_recipe(tmp_path / "empty.py")
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError):
            load_recipe(tmp_path / "broken.py")
