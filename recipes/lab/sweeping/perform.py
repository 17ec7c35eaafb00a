"""Runs of a sweep as jobs of submitit, on this machine or on a Slurm cluster: each trains,
evaluates and writes its record; parts that an earlier attempt finished are kept.
"""

import os
import shutil
import signal
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import submitit
import torch
import yaml
from accelerate.state import AcceleratorState
from filelock import FileLock, Timeout
from submitit.core.utils import environment_variables
from submitit.helpers import DelayedSubmission

from lab import paths_for_children
from lab.sweeping.runs import OPTIONS_FILE, RECORD_FILE, PlannedRun, RunRecord, load_recipe
from sj_robust.core.saved import write_whole
from sj_robust.evaluation import Report
from sj_robust.evaluation.result import Accuracy
from sj_robust.training import TrainingInterrupted

LOG_FILE = "output.txt"
PATIENCE = 120.0
"""Seconds that runs have to write their checkpoints when they are asked to stop."""
_REPORT = "report.json"
_TIMEOUT = {"local": 10**6, "slurm": 24 * 60}
"""Minutes that a job may take, unless an option says otherwise."""


def executor_for(
    folder: Path,
    cluster: Literal["local", "slurm"] = "local",
    options: Mapping[str, Any] | None = None,
    *,
    jobs: int = 1,
) -> Any:
    """The executor of submitit for a sweep.

    Its own files are in ``folder/jobs``, which the nodes of a cluster must see as well. The options
    are parameters of submitit, such as ``{"slurm_partition": "gpu", "timeout_min": 600}``. Slurm
    performs ``jobs`` of the runs at a time.

    Raises:
        ValueError: If there is no such cluster, or an option is unknown.
    """
    parameters = {
        "name": "sweep",
        "timeout_min": _TIMEOUT[cluster],
        "stderr_to_stdout": True,
        "slurm_array_parallelism": jobs,
        **(options or {}),
    }

    def made(place: Path | str) -> Any:
        executor = submitit.AutoExecutor(place, cluster=cluster)
        executor.update_parameters(**parameters)
        return executor

    try:
        with TemporaryDirectory() as elsewhere:  # submitit makes its folder before it refuses
            made(elsewhere)
    except (AssertionError, NameError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"submitit cannot use cluster {cluster} with options {dict(options or {})}: "
            f"{' '.join(str(error).split())}"
        ) from error
    return made(folder / "jobs")


def perform_all(
    runs: Sequence[PlannedRun],
    executor: Any,
    *,
    jobs: int = 1,
    threads: int = 1,
) -> Iterator[tuple[PlannedRun, str | None]]:
    """Perform runs, each in a process of its own, and yield each as it ends, with its error in a
    line or None.

    On this machine at most ``jobs`` run at a time, each with ``threads`` threads of torch; they
    share its GPUs in turn. On a cluster all are queued at once.

    When the iteration is left, by Ctrl-C for instance, the runs are asked to stop, and can be
    resumed later. When the process is killed, those on this machine stop by themselves, and those
    on a cluster go on; another sweep with one of these runs waits until it has ended.
    """
    local = executor.cluster == "local"
    environment = paths_for_children() | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": str(threads)}
    alive = FileLock(executor.folder / f"sweep-{os.getpid()}.lock")
    waiting = deque(runs)
    running: dict[int, tuple[PlannedRun, Any]] = {}  # by slot
    with alive:
        try:
            while waiting or running:
                slots = range(jobs if local else len(runs))
                free = [slot for slot in slots if slot not in running][: len(waiting)]
                if free:
                    with _interrupts_held(), environment_variables(**environment), executor.batch():
                        for slot in free:
                            run = waiting.popleft()
                            attempt = Attempt(run)
                            if local:
                                lock = Path(alive.lock_file).absolute()
                                attempt = Attempt(run, gpus_of(slot), lock)
                            running[slot] = run, executor.submit(attempt)
                for slot, (run, job) in list(running.items()):
                    if job.done():
                        del running[slot]
                        yield run, _error(job)
                time.sleep(0.2)
        finally:
            left = [job for _, job in running.values()]
            if local:
                _stop(left)
            else:
                for job in left:
                    job.cancel(check=False)


def _error(job: Any) -> str | None:
    """The error of a job that has ended, in a line; None after success."""
    try:
        return job.result()  # type: ignore[no-any-return]  # what an Attempt returned
    except RuntimeError:  # of submitit, whose message is pages of the log
        return f"its process died (state {job.state})"


def _stop(jobs: Sequence[Any]) -> None:
    """Ask jobs on this machine to stop, and wait until they have; ask again after a while.

    submitit's ``cancel`` kills after a second, which is too short to write a checkpoint.
    """
    ask_at = time.monotonic()
    while left := [job for job in jobs if not job.done()]:
        if time.monotonic() >= ask_at:
            ask_at = time.monotonic() + PATIENCE
            for job in left:
                os.kill(int(job.job_id), signal.SIGTERM)
        time.sleep(0.2)


def gpus_of(slot: int) -> str:
    """``CUDA_VISIBLE_DEVICES`` for a slot: one of the GPUs that this process sees, "" if none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [*map(str, range(torch.cuda.device_count()))]
    return names[slot % len(names)] if names else ""


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold back Ctrl-C while processes are started.

    They inherit that and ignore Ctrl-C, which the terminal sends to all of them; this process asks
    each to stop, once.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
        self.run.folder.mkdir(parents=True, exist_ok=True)
        with (self.run.folder / LOG_FILE).open("ab") as log:  # all that this process prints
            os.dup2(log.fileno(), sys.stdout.fileno())
            os.dup2(log.fileno(), sys.stderr.fileno())
        try:
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


def _stop_with(sweep: Path) -> None:
    """Stop this process when the one that holds a lock is gone; the system frees that of one that
    was killed.
    """
    with FileLock(sweep).acquire(poll_interval=0.5):
        print("the sweep has ended: stopping", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os.kill(os.getpid(), signal.SIGKILL)


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
    text = yaml.safe_dump(given, sort_keys=False)
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        shutil.rmtree(folder, ignore_errors=True)  # of other options, killed before the record
    write_whole(path, text)
    spent = _call(run.evaluator, folder, path, mark="progress/*")
    report = Report.load(folder / _REPORT)
    result = {
        "options": options,
        "eps": report.eps,
        "figures": _counts(report.accuracies),
        "alarm": report.footnote,
    }
    layers = {entry["member"]: list(entry["layers"].values()) for entry in report.potential}
    last = {attack: statistics.fmean(found[-1]) for attack, found in layers.items() if found}
    record = replace(
        record,
        evaluations=record.evaluations | {suite: result},
        seconds=record.seconds | {suite: spent.seconds},
        cpu_seconds=record.cpu_seconds | {suite: spent.cpu_seconds},
        ms_mppd=record.ms_mppd | {suite: last},
        environment=report.environment,
    )
    record.save(run.folder / RECORD_FILE)
    return record


def _counts(found: Iterable[Accuracy]) -> dict[str, dict[str, int]]:
    return {one.name: {"correct": one.correct, "total": one.total} for one in found}


def _selected(report: Report, run: PlannedRun) -> dict[str, float]:
    """Validation accuracies of the epoch that was selected, that which selected it first, then that
    of clean images; empty if the report has no curves.
    """
    curve = report.curves.get(report.main, [])
    if not curve:
        return {}
    recipe = load_recipe(run.recipe)
    select = recipe.completed(recipe.read(run.options)).select
    epochs: list[dict[str, float]] = [epoch["validation"] for epoch in curve]
    best = max(epochs, key=lambda found: found[select])
    return {name: best[name] for name in (select, "clean")} | best


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
