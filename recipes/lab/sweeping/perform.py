"""One run of a sweep: train, evaluate, write down; whatever an earlier attempt finished is kept."""

import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import yaml

from lab.sweeping.plan import OPTIONS_FILE, PlannedRun
from lab.sweeping.recipe import load_recipe
from lab.sweeping.record import RunRecord
from sj_robust._saved import write_whole
from sj_robust.evaluation.report import Report
from sj_robust.evaluation.robustness_report import RobustnessReport

__all__ = ["perform"]

_REPORT = "report.json"


def perform(run: PlannedRun) -> RunRecord:
    """Do what is missing of a run. 执行一次运行中尚未完成的部分。

    Training that was stopped goes on from its last checkpoint, an evaluation from its last record.

    Args:
        run: The run.

    Returns:
        The record, which is on disk when this returns.

    Raises:
        Exception: Whatever the recipes raise.
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
    figures = {s.attack: {"correct": s.correct, "total": s.total} for s in report.scores if s.network == network}
    timed = {"training": seconds}
    record = RunRecord(run.name, run.options, figures, {}, timed, report.environment, report.notes)
    record.save(run.folder)
    return record


def _evaluate(run: PlannedRun, record: RunRecord, suite: str) -> RunRecord:
    folder = run.folder / suite
    options = run.evaluations[suite]
    checkpoint = run.folder / "training" / f"{run.options['neuron']}_{run.options['mode']}"
    path = run.folder / f"{suite}.yaml"
    inherited = {name: run.options[name] for name in ("data_root", "device") if name in run.options}
    given = options | inherited | {"checkpoint": str(checkpoint), "output": None, "resume": False}
    write_whole(path, yaml.safe_dump(given, sort_keys=False))
    seconds = _call(run.evaluator, folder, path, "progress/*")
    report = RobustnessReport.load(folder / _REPORT)
    result = {
        "options": options,
        "eps": report.eps,
        "figures": {figure.name: {"correct": figure.correct, "total": figure.total} for figure in report.figures},
        "alarm": report.footnote,
    }
    record = replace(record.evaluated(suite, result, seconds), environment=report.environment)
    record.save(run.folder)
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
        if "accelerate.state" in sys.modules:  # its state would outlive the run, precision and device with it
            sys.modules["accelerate.state"].AcceleratorState._reset_state(True)
    return time.monotonic() - start
