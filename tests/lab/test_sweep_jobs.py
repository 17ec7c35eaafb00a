"""The processes of a sweep, with recipes that take no time."""

import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import submitit
import sweep
import torch
from fake_recipes import write_fakes
from filelock import FileLock
from lab.sweeping.perform import LOG_FILE, Attempt, executor_for, gpus_of, perform, perform_all
from launch import fork, forked, wait_until


@pytest.fixture
def planned(tmp_path):
    """A function that plans runs that behave as is said."""

    def plan(*behave, seeds=1):
        options = sweep.Options(
            grid={"behave": list(behave)},
            seeds=seeds,
            evaluate=("paper",),
            **write_fakes(tmp_path),
        )
        return sweep.plan(options, tmp_path / "sweep").runs

    return plan


def calls(run):
    path = run.folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


def stages(run):
    return [line.split(" pid")[0] for line in calls(run)]


def waits(run):
    return (run.folder / "training" / "waiting").exists()


def has_ended(run):
    """Whether the process of the run's last call is gone."""
    pid = int(calls(run)[-1].split("pid=")[1])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").exists() and " Z " in Path(f"/proc/{pid}/stat").read_text()


RESUMED = ["train resume=False", "train resume=True", "paper resume=False"]


@pytest.mark.parametrize(
    ("behave", "said"), [("fail", "ValueError: no such thing"), ("exit", "SystemExit: 2")]
)
def test_an_attempt_says_in_a_line_what_ended_it_and_logs_the_rest(planned, behave, said):
    (run,) = planned(behave)
    assert forked(lambda: os._exit(0 if Attempt(run)() == said else 1)) == [0]
    log = (run.folder / LOG_FILE).read_text()
    assert "training dlif" in log
    assert "Traceback" in log


def test_a_run_that_another_process_performs_is_waited_for(planned):
    (run,) = planned("well")
    run.folder.mkdir(parents=True)
    with FileLock(run.folder / ".lock"):
        child = fork(Attempt(run))
        wait_until(lambda: (run.folder / LOG_FILE).exists(), "the attempt's start")
        wait_until(lambda: "waiting" in (run.folder / LOG_FILE).read_text(), "that it waits")
        assert calls(run) == []
    assert os.waitpid(child, 0)[1] == 0
    assert stages(run) == ["train resume=False", "paper resume=False"]


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
    runs = planned("well", seeds=3)
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
        wait_until(lambda: waits(last), "the run's start")
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


@pytest.mark.slow
def test_runs_survive_each_other_and_stop_when_asked(planned, tmp_path, monkeypatch):
    """A run that kills its process, one whose time is up and that is queued again, and one that
    Ctrl-C stops.
    """
    monkeypatch.setattr(submitit.LocalJob, "_results_timeout_s", 1)
    runs = planned("die", "long", "wait")
    dies, long, stopped = runs

    def end_of_time():
        wait_until(lambda: waits(long), "the long run's start")
        os.kill(int(calls(long)[0].split("pid=")[1]), signal.SIGUSR2)
        wait_until(lambda: long.finished, "the long run's end")

    found = ends_until_interrupted(
        runs, executor_for(tmp_path), last=stopped, jobs=2, meanwhile=end_of_time
    )
    assert found.pop("long-seed0", None) is None  # its end may come with Ctrl-C
    assert found == {"die-seed0": "its process died (state FINISHED)"}
    assert stages(long) == RESUMED
    assert all(map(has_ended, runs))
    for run in (dies, stopped):
        perform(run)
        assert stages(run) == RESUMED


@pytest.mark.slow
def test_the_run_of_a_killed_sweep_ends_too(planned, tmp_path):
    (run,) = planned("wait")
    sweep = fork(lambda: list(perform_all([run], executor_for(tmp_path))))
    wait_until(lambda: waits(run), "the run's start")
    assert not has_ended(run)
    os.kill(sweep, signal.SIGKILL)
    os.waitpid(sweep, 0)
    wait_until(lambda: has_ended(run), "the end of the run")  # which sleeps longer
    assert stages(run) == ["train resume=False"]
    perform(run)
    assert stages(run) == RESUMED


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
    runs = planned("well", "wait")
    options = {"slurm_partition": "gpu", "timeout_min": 600}
    executor = executor_for(tmp_path, "slurm", options, jobs=1)
    assert ends_until_interrupted(runs, executor, last=runs[1]) == {"well-seed0": None}
    script = (tmp_path / "script").read_text()
    for line in ("--partition=gpu", "--time=600", "--array=0-1%1"):
        assert f"#SBATCH {line}\n" in script
    wait_until(lambda: has_ended(runs[1]), "the end of the job that was cancelled")
    assert stages(runs[1]) == ["train resume=False"]


@pytest.mark.parametrize(
    ("visible", "there", "expected"),
    [("", 2, ["0", "1", "0"]), ("3,GPU-a", 2, ["3", "GPU-a", "3"]), ("", 0, ["", "", ""])],
)
def test_gpus_are_shared_out(monkeypatch, visible, there, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert list(map(gpus_of, range(3))) == expected


@pytest.mark.parametrize(("cluster", "options"), [("slurm", {}), ("local", {"slurm_qeue": "gpu"})])
def test_wrong_clusters_and_options(tmp_path, cluster, options):
    with pytest.raises(ValueError, match=f"cluster {cluster}"):
        executor_for(tmp_path, cluster, options)
