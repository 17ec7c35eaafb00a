"""One run of a sweep: train, evaluate, write down; whatever an earlier attempt finished is kept."""

import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from accelerate.state import AcceleratorState
from filelock import FileLock, Timeout
from submitit.helpers import DelayedSubmission

from lab.sweeping.plan import OPTIONS_FILE, PlannedRun
from lab.sweeping.recipe import load_recipe
from lab.sweeping.record import RECORD_FILE, RunRecord
from sj_robust.core.saved import write_whole
from sj_robust.evaluation import Report
from sj_robust.evaluation.result import Accuracy
from sj_robust.training import TrainingInterrupted

LOG_FILE = "output.txt"
_REPORT = "report.json"


@dataclass(frozen=True)
class Attempt:
    """What a job of submitit does: a run, in a process of its own.

    SIGTERM lets a training write a checkpoint and ends the job. So does SIGUSR2, with which
    submitit and Slurm announce that its time is up, and the job is queued again.

    Attributes:
        run: The run.
        gpus: What it sees of this machine's GPUs, as in ``CUDA_VISIBLE_DEVICES``; None leaves that
            to the cluster.
    """

    run: PlannedRun
    gpus: str | None = None

    def __call__(self) -> str | None:
        """Perform the run; returns the error in a line, or None after success."""
        queue_again: Any = signal.getsignal(signal.SIGUSR2)  # submitit's
        out_of_time: list[int] = []

        def announce(number: int, frame: object) -> None:
            out_of_time.append(number)
            signal.raise_signal(signal.SIGTERM)

        signal.signal(signal.SIGTERM, signal.default_int_handler)
        signal.signal(signal.SIGUSR2, announce)
        if self.gpus is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpus  # submitit hides them all
        try:
            self.run.folder.mkdir(parents=True, exist_ok=True)
            with (self.run.folder / LOG_FILE).open("ab") as log:
                os.dup2(log.fileno(), sys.stdout.fileno())
                os.dup2(log.fileno(), sys.stderr.fileno())
            with _alone(self.run.folder):
                perform(self.run)
        except (KeyboardInterrupt, TrainingInterrupted):
            if out_of_time:
                queue_again(signal.SIGUSR2, None)
            sys.exit("stopped")
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            return f"{type(error).__name__}: {' '.join(str(error).split())}"
        return None

    def checkpoint(self) -> DelayedSubmission:
        """What submitit queues again when the time of the job is up: the same, which goes on."""
        return DelayedSubmission(self)


def perform(run: PlannedRun) -> RunRecord:
    """Do what is missing of a run; returns the record, which is on disk then.

    Training that was stopped goes on from its last checkpoint, an evaluation from its last record.
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
    folder = run.folder / "training"
    seconds = _call(run.recipe, folder, run.folder / OPTIONS_FILE, "*/last.pt")
    report = Report.load(folder / _REPORT)
    own = [row.member for row in report.of(report.main)]  # other networks are references
    record = RunRecord(
        name=run.name,
        options=run.options,
        training=_counts(map(report.under, own)),
        seconds={"training": seconds},
        environment=report.environment,
        notes=report.warnings,
    )
    record.save(run.folder / RECORD_FILE)
    return record


def _evaluate(run: PlannedRun, record: RunRecord, suite: str) -> RunRecord:
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
    seconds = _call(run.evaluator, folder, path, "progress/*")
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
        seconds=record.seconds | {suite: seconds},
        environment=report.environment,
    )
    record.save(run.folder / RECORD_FILE)
    return record


def _counts(found: Iterable[Accuracy]) -> dict[str, dict[str, int]]:
    return {one.name: {"correct": one.correct, "total": one.total} for one in found}


def _call(recipe: Path, folder: Path, options: Path, mark: str) -> float:
    """Run a recipe into a folder, or go on there; returns seconds."""
    if (folder / _REPORT).is_file():  # killed between the report and the record
        return 0.0
    arguments = ["--config", str(options), "--output", str(folder)]
    if any(folder.glob(mark)):
        arguments.append("--resume")
    elif folder.exists():
        shutil.rmtree(folder)  # killed before there was anything to go on with
    start = time.monotonic()
    try:
        load_recipe(recipe).main(arguments)
    finally:
        AcceleratorState._reset_state(True)  # precision and device would outlive the run
    return time.monotonic() - start


def _alone(folder: Path) -> Any:
    """The run's lock, which a kill lets go of; waits for a process that an earlier sweep left when
    it was killed.
    """
    lock = FileLock(folder / ".lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting: another process still performs {folder.name}")
        return lock.acquire()
