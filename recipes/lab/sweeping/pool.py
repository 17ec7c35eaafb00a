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
from filelock import FileLock
from submitit.core.utils import environment_variables

from lab import paths_for_children
from lab.sweeping.perform import PATIENCE, Attempt
from lab.sweeping.plan import PlannedRun

Cluster = Literal["local", "slurm"]

_TIMEOUT = {"local": 10**6, "slurm": 24 * 60}
"""Minutes that a job may take, unless an option says otherwise."""


def executor_for(
    folder: Path,
    cluster: Cluster = "local",
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

    On this machine at most ``jobs`` run at a time, each with ``threads`` threads of torch; they
    share its GPUs in turn. On a cluster all are queued at once.

    When the iteration is left, by Ctrl-C for instance, the runs are asked to stop, and can be
    resumed later. When the process is killed, those on this machine stop by themselves, and those
    on a cluster go on; another sweep with one of these runs waits until it has ended.
    """
    local = executor.cluster == "local"
    slots = jobs if local else len(runs)
    environment = paths_for_children() | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": str(threads)}
    waiting = deque(runs)
    running: dict[int, tuple[PlannedRun, Any]] = {}  # by slot
    alive = FileLock(executor.folder / f"sweep-{os.getpid()}.lock") if local else None
    if alive is not None:
        alive.acquire()
    try:
        while waiting or running:
            free = [slot for slot in range(slots) if slot not in running]
            starting = free[: len(waiting)]
            if starting:
                with _interrupts_held(), environment_variables(**environment), executor.batch():
                    for slot in starting:
                        run = waiting.popleft()
                        attempt = Attempt(run)
                        if alive is not None:
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
        if alive is not None:
            _stop(left)
            alive.release()
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
    while not all(job.done() for job in jobs):
        if time.monotonic() >= ask_at:
            ask_at = time.monotonic() + PATIENCE
            for job in jobs:
                if not job.done():
                    os.kill(int(job.job_id), signal.SIGTERM)
        time.sleep(0.2)


def gpus_of(slot: int) -> str:
    """``CUDA_VISIBLE_DEVICES`` for a slot: one of the GPUs that this process sees, "" if none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        names = visible.split(",")
    else:
        names = [str(number) for number in range(torch.cuda.device_count())]
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
