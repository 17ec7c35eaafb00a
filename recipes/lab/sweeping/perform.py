"""One run of a sweep: train, evaluate, write the record; parts that an earlier attempt finished are
kept.
"""

import os
import shutil
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from accelerate.state import AcceleratorState
from filelock import FileLock, Timeout
from submitit.helpers import DelayedSubmission

from lab.sweeping.plan import OPTIONS_FILE, PlannedRun
from lab.sweeping.recipe import Recipe, load_recipe
from lab.sweeping.record import RECORD_FILE, RunRecord
from sj_robust.core.saved import plain, write_whole
from sj_robust.evaluation import Report
from sj_robust.evaluation.result import Accuracy
from sj_robust.training import TrainingInterrupted

LOG_FILE = "output.txt"
PATIENCE = 120.0
"""Seconds that runs have to write their checkpoints when they are asked to stop."""
_REPORT = "report.json"


@dataclass(frozen=True)
class Attempt:
    """A job of submitit: performs a run, in a process of its own.

    SIGTERM stops it, after the training has written a checkpoint. So does SIGUSR2, by which
    submitit and Slurm announce that the time of a job is up; then the job is queued again.

    Attributes:
        run: The run.
        gpus: GPUs of this machine that it sees, as in ``CUDA_VISIBLE_DEVICES``; None leaves the
            choice to the cluster.
        sweep: File that its sweep keeps locked, and with whose end, however it comes, the run is
            stopped; None for a run that goes on without it, as on a cluster.
    """

    run: PlannedRun
    gpus: str | None = None
    sweep: Path | None = None

    def __call__(self) -> str | None:
        """Perform the run; returns the error in a line, or None after success."""
        queue_again: Any = signal.getsignal(signal.SIGUSR2)  # the handler of submitit
        time_is_up: list[int] = []

        def stop_in_time(number: int, frame: object) -> None:
            time_is_up.append(number)
            signal.raise_signal(signal.SIGTERM)

        signal.signal(signal.SIGTERM, signal.default_int_handler)  # raises KeyboardInterrupt
        signal.signal(signal.SIGUSR2, stop_in_time)
        if self.gpus is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpus  # submitit sets it to none
        try:
            self._print_to_file()
            if self.sweep is not None:
                threading.Thread(target=_stop_with, args=(self.sweep,), daemon=True).start()
            with _alone(self.run.folder):
                perform(self.run)
        except (KeyboardInterrupt, TrainingInterrupted):
            if time_is_up:
                queue_again(signal.SIGUSR2, None)
            sys.exit("stopped")
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            return f"{type(error).__name__}: {' '.join(str(error).split())}"
        return None

    def checkpoint(self) -> DelayedSubmission:
        """What submitit queues when the time of the job is up: the same job, which resumes."""
        return DelayedSubmission(self)

    def _print_to_file(self) -> None:
        """Append all that this process prints to the run's log file."""
        self.run.folder.mkdir(parents=True, exist_ok=True)
        with (self.run.folder / LOG_FILE).open("ab") as log:
            os.dup2(log.fileno(), sys.stdout.fileno())
            os.dup2(log.fileno(), sys.stderr.fileno())


def _stop_with(sweep: Path) -> None:
    """Stop this process when the one that holds a lock is gone; the system frees that of one that
    was killed.
    """
    with FileLock(sweep).acquire(poll_interval=0.5):
        print("the sweep has ended: stopping", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os.kill(os.getpid(), signal.SIGKILL)


def perform(run: PlannedRun) -> RunRecord:
    """Do all parts of a run that are not done; returns the record, which is then in its file.

    A training that was stopped is resumed from its last checkpoint, an evaluation from its last
    finished step.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    if not (run.folder / OPTIONS_FILE).exists():
        write_whole(run.folder / OPTIONS_FILE, yaml.safe_dump(run.options, sort_keys=False))
    record = run.record or _train(run)
    for suite in run.evaluations:
        if suite not in record.evaluations:
            record = _evaluate(run, record, suite)
    return record


def _train(run: PlannedRun) -> RunRecord:
    """Train the network; returns the first record of the run."""
    folder = run.folder / "training"
    spent = _call(run.recipe, folder, run.folder / OPTIONS_FILE, mark="*/last.pt")
    report = Report.load(folder / _REPORT)
    record = RunRecord(
        name=run.name,
        options=run.options,
        training=_counts(report.single_accuracies(report.main)),  # others are references
        seconds={"training": spent.seconds},
        environment=report.environment,
        notes=report.warnings,
        cpu_seconds={"training": spent.cpu_seconds},
        cell=run.cell,
        validation=_selected(report, run),
        trained_in=report.environment,
    )
    record.save(run.folder / RECORD_FILE)
    return record


def _evaluate(run: PlannedRun, record: RunRecord, suite: str) -> RunRecord:
    """Evaluate the network by a suite; returns the record with the result."""
    folder = run.folder / suite
    path = run.folder / f"{suite}.yaml"
    options = run.evaluations[suite]
    network = f"{run.options['neuron']}_{run.options['mode']}"
    given = options | {
        "data_root": run.options["data_root"],
        "device": run.options["device"],
        "checkpoint": str(run.folder / "training" / network),
        "name": run.name,
    }
    write_whole(path, yaml.safe_dump(given, sort_keys=False))
    if _is_of_other_options(folder / _REPORT, load_recipe(run.evaluator), options):
        shutil.rmtree(folder)
    spent = _call(run.evaluator, folder, path, mark="progress/*")
    report = Report.load(folder / _REPORT)
    result = {
        "options": options,
        "eps": report.eps,
        "figures": _counts(report.accuracies),
        "alarm": report.footnote,
    }
    record = replace(
        record,
        evaluations=record.evaluations | {suite: result},
        seconds=record.seconds | {suite: spent.seconds},
        cpu_seconds=record.cpu_seconds | {suite: spent.cpu_seconds},
        ms_mppd=record.ms_mppd | {suite: _last_layer(report)},
        environment=report.environment,
    )
    record.save(run.folder / RECORD_FILE)
    return record


def _is_of_other_options(path: Path, recipe: Recipe, wanted: Mapping[str, Any]) -> bool:
    """Whether a report, left by a process that was killed before it wrote the record, was made with
    other options; one that lacks options of a newer recipe was made with their defaults.
    """
    if not path.is_file():
        return False
    configuration = Report.load(path).configuration
    if not configuration:  # of a recipe that does not write its options down
        return False
    made_with = recipe.defaults | configuration
    new = plain(recipe.decisive(wanted))
    return any(plain(made_with[name]) != value for name, value in new.items())


def _counts(found: Iterable[Accuracy]) -> dict[str, dict[str, int]]:
    return {one.name: {"correct": one.correct, "total": one.total} for one in found}


def _selected(report: Report, run: PlannedRun) -> dict[str, float]:
    """Validation accuracies of the epoch that was selected, that which selected it first, then that
    of clean images; empty if the report has no curves.
    """
    curve = report.curves.get(report.main, [])
    if not curve:
        return {}
    select = load_recipe(run.recipe).resolve(run.options).complete["select"]
    epochs: list[dict[str, float]] = [epoch["validation"] for epoch in curve]
    best = max(epochs, key=lambda found: found[select])
    first = {name: best[name] for name in (select, "clean")}
    return first | best


def _last_layer(report: Report) -> dict[str, float]:
    """MS-MPPD of the last spiking layer under each attack of the report, mean over time."""
    found = {}
    for entry in report.potential:
        layers = list(entry["layers"].values())
        if layers:
            found[entry["member"]] = statistics.fmean(layers[-1])
    return found


@dataclass(frozen=True)
class _Spent:
    """Time of a recipe."""

    seconds: float
    cpu_seconds: float


def _call(recipe: Path, folder: Path, options: Path, *, mark: str) -> _Spent:
    """Run a recipe with ``folder`` as output, and return the time it took.

    It is resumed if the folder holds files of the pattern ``mark``.
    """
    if (folder / _REPORT).is_file():  # killed between the report and the record
        return _Spent(0.0, 0.0)
    arguments = ["--config", str(options), "--output", str(folder)]
    if any(folder.glob(mark)):
        arguments.append("--resume")
    elif folder.exists():
        shutil.rmtree(folder)  # killed before there was anything to resume
    start, cpu_start = time.monotonic(), time.process_time()
    try:
        load_recipe(recipe).main(arguments)
    finally:
        AcceleratorState._reset_state(True)  # else the next recipe has its precision and device
    return _Spent(time.monotonic() - start, time.process_time() - cpu_start)


def _alone(folder: Path) -> Any:
    """Context in which this process holds the lock of a run, which the system frees if it is
    killed.

    It waits for a process of an earlier sweep that still performs the run.
    """
    lock = FileLock(folder / ".lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting: another process still performs {folder.name}")
        return lock.acquire()
