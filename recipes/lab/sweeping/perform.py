"""One run of a sweep: train, evaluate, write down; whatever an earlier attempt finished is kept.

``python -m lab.sweeping.perform RUN`` is the process of a run, with its plan as JSON.
"""

import shutil
import signal
import sys
import time
import traceback
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from lab.sweeping.plan import OPTIONS_FILE, PlannedRun
from lab.sweeping.recipe import load_recipe
from lab.sweeping.record import RECORD_FILE, RunRecord
from sj_robust._saved import write_whole
from sj_robust.evaluation.report import Report
from sj_robust.evaluation.robustness_report import RobustnessReport

_REPORT = "report.json"


def main(plan: str) -> None:
    """Perform a run that nobody else performs; any error ends as the last line of what is
    printed.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(
        signal.SIGUSR2, lambda *_: signal.raise_signal(signal.SIGTERM)
    )  # of Slurm, before the time is up
    run = PlannedRun.from_json(plan)
    try:
        with _alone(run.folder):
            perform(run)
    except SystemExit as stop:
        sys.exit(
            f"the recipe gave up: {stop.code}"
            if isinstance(stop.code, str)
            else f"exit code {stop.code}"
        )
    except KeyboardInterrupt:
        sys.exit("stopped")
    except Exception as error:
        traceback.print_exc()
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")


def _alone(folder: Path) -> AbstractContextManager[Any]:
    """The run's lock, which a kill lets go of; waits for a process that an earlier sweep left when
    it was killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting: another process still performs {folder.name}")
        return lock.acquire()


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
    network = report.networks[0]
    figures = {
        s.attack: {"correct": s.correct, "total": s.total}
        for s in report.scores
        if s.network == network
    }
    times = {"training": seconds}
    record = RunRecord(run.name, run.options, figures, {}, times, report.environment, report.notes)
    record.save(run.folder / RECORD_FILE)
    return record


def _evaluate(run: PlannedRun, record: RunRecord, suite: str) -> RunRecord:
    folder = run.folder / suite
    options = run.evaluations[suite]
    checkpoint = run.folder / "training" / f"{run.options['neuron']}_{run.options['mode']}"
    path = run.folder / f"{suite}.yaml"
    inherited = {name: run.options[name] for name in ("data_root", "device") if name in run.options}
    given = options | inherited | {"checkpoint": str(checkpoint), "output": None, "resume": False}
    if "name" in given and given["name"] is None:
        given["name"] = run.name
    write_whole(path, yaml.safe_dump(given, sort_keys=False))
    seconds = _call(run.evaluator, folder, path, "progress/*")
    report = RobustnessReport.load(folder / _REPORT)
    result = {
        "options": options,
        "eps": report.eps,
        "figures": {
            one.name: {"correct": one.correct, "total": one.total} for one in report.accuracies
        },
        "alarm": report.footnote,
    }
    evaluations, times = record.evaluations | {suite: result}, record.seconds | {suite: seconds}
    record = replace(record, evaluations=evaluations, seconds=times, environment=report.environment)
    record.save(run.folder / RECORD_FILE)
    return record


def _call(recipe: Path, folder: Path, options: Path, mark: str) -> float:
    """Run a recipe into a folder, or go on there; returns seconds."""
    if (folder / _REPORT).is_file():  # killed between the report and the record
        return 0.0
    arguments = ["--config", str(options), "--output", str(folder)]
    if any(folder.glob(mark)):
        arguments.append("--resume=true")
    elif folder.exists():
        shutil.rmtree(folder)  # killed before there was anything to go on with
    start = time.monotonic()
    try:
        load_recipe(recipe).main(arguments)
    finally:
        if (
            "accelerate.state" in sys.modules
        ):  # its state would outlive the run, precision and device with it
            sys.modules["accelerate.state"].AcceleratorState._reset_state(True)
    return time.monotonic() - start


if __name__ == "__main__":
    main(sys.argv[1])
