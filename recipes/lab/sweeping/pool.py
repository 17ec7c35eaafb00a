"""Runs of a sweep as jobs of submitit, on this machine or on a Slurm cluster."""

import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import submitit
import torch
from submitit.core.utils import environment_variables

from lab import paths_for_children
from lab.sweeping.perform import Attempt
from lab.sweeping.plan import PlannedRun

Cluster = Literal["local", "slurm"]

_PATIENCE = 120.0
"""Seconds that runs have to write their checkpoints when they are asked to stop."""
_LONG = {"local": 10**6, "slurm": 24 * 60}
"""Minutes that a job may take, if nothing else is asked for."""


def executor_for(
    folder: Path,
    cluster: Cluster = "local",
    options: Mapping[str, Any] | None = None,
    *,
    jobs: int = 1,
) -> Any:
    """The executor of submitit for a sweep; its own files are in ``jobs/``, which a cluster has to
    see too.

    The options are parameters of submitit, such as ``{"slurm_partition": "gpu", "timeout_min":
    600}``. Slurm performs ``jobs`` of the runs at a time.

    Raises:
        ValueError: If the cluster is not there or an option is unknown.
    """
    parameters = {
        "name": "sweep",
        "timeout_min": _LONG[cluster],
        "stderr_to_stdout": True,
        "slurm_array_parallelism": jobs,
        **(options or {}),
    }
    try:
        executor = submitit.AutoExecutor(folder / "jobs", cluster=cluster)
        executor.update_parameters(**parameters)
    except (AssertionError, NameError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"submitit cannot use cluster {cluster} with options {dict(options or {})}: "
            f"{' '.join(str(error).split())}"
        ) from error
    return executor


def perform_all(
    runs: Sequence[PlannedRun],
    executor: Any,
    *,
    jobs: int = 1,
    threads: int = 1,
) -> Iterator[tuple[PlannedRun, str | None]]:
    """Perform runs, each in a process of its own, and yield each as it ends, with its error in a
    line or None.

    On this machine there are at most ``jobs`` at a time, each with so many ``threads`` of torch,
    and they take turns with its GPUs. On a cluster all are queued at once.

    When the iteration is left, by Ctrl-C for instance, runs are asked to stop, and what they leave
    can be resumed. Runs whose sweep is killed go on, as on a cluster; a run that is planned again
    meanwhile waits for them.
    """
    local = executor.cluster == "local"
    slots = range(jobs if local else len(runs))
    environment = paths_for_children() | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": str(threads)}
    waiting = deque(runs)
    running: dict[int, tuple[PlannedRun, Any]] = {}
    try:
        while waiting or running:
            free = [slot for slot in slots if slot not in running][: len(waiting)]
            if free:
                with _interrupts_held(), environment_variables(**environment), executor.batch():
                    for slot in free:
                        run = waiting.popleft()
                        attempt = Attempt(run, gpus_of(slot) if local else None)
                        running[slot] = run, executor.submit(attempt)
            for slot, (run, job) in list(running.items()):
                if job.done():
                    del running[slot]
                    yield run, _error(job)
            time.sleep(0.2)
    finally:
        stop = _stop if local else _cancel
        stop([job for _, job in running.values()])


def _error(job: Any) -> str | None:
    try:
        return job.result()  # type: ignore[no-any-return]  # what an Attempt returned
    except RuntimeError:  # submitit's own, and they hold pages of its log
        return f"its process died (state {job.state})"


def _stop(jobs: Sequence[Any]) -> None:
    """Ask jobs of this machine to stop, once more if they do not, and wait.

    Their own ``cancel`` kills after a second, which is too short for a checkpoint.
    """
    asked = -_PATIENCE
    while not all(job.done() for job in jobs):
        if time.monotonic() > asked + _PATIENCE:
            asked = time.monotonic()
            for job in jobs:
                if not job.done():
                    os.kill(int(job.job_id), signal.SIGTERM)
        time.sleep(0.2)


def _cancel(jobs: Sequence[Any]) -> None:
    for job in jobs:
        job.cancel(check=False)


def gpus_of(slot: int) -> str:
    """``CUDA_VISIBLE_DEVICES`` for a slot: one of those that this process sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
    return names[slot % len(names)] if names else ""


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits, in processes started meanwhile for ever: it reaches this one alone, which
    passes it on once.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
