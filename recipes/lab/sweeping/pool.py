"""Runs of a sweep as jobs of submitit, on this machine or on a Slurm cluster; one that dies takes
only itself along.
"""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import submitit

from lab import paths_for_children
from lab.sweeping.plan import PlannedRun

LOG_FILE = "output.txt"
Cluster = Literal["local", "slurm"]

_PATIENCE = 120.0
"""Seconds that runs have to write their checkpoints when they are asked to stop."""
_LONG = {"local": 10**6, "slurm": 24 * 60}
"""Minutes after which submitit ends a job, if nothing else is asked for."""


@dataclass(frozen=True)
class EndedRun:
    """How a run ended: after so many seconds, with an error in one line or with None."""

    run: PlannedRun
    seconds: float
    error: str | None = None


def executor_for(
    folder: Path, cluster: Cluster = "local", options: Mapping[str, Any] | None = None
) -> Any:
    """The executor of submitit for a sweep; its own files are in ``jobs/``, which a cluster has to
    see too.

    The options are parameters of submitit, such as ``{"slurm_partition": "gpu", "timeout_min":
    600}``.

    Raises:
        ValueError: If the cluster is not there or an option is unknown.
    """
    parameters = {
        "name": "sweep",
        "timeout_min": _LONG[cluster],
        "stderr_to_stdout": True,
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
    runs: Sequence[PlannedRun], executor: Any, *, jobs: int = 1, threads: int = 1, devices: int = 0
) -> Iterator[EndedRun]:
    """Perform runs, each in a process of its own, at most ``jobs`` at a time, and yield each as it
    ends.

    When the iteration is left, by Ctrl-C for instance, runs are asked to stop, and what they leave
    can be resumed. Runs whose sweep is killed go on, as on a cluster; a run that is planned again
    meanwhile waits for them.

    Each has so many ``threads`` of torch, and takes turns with the GPUs of this machine
    (``devices``); below two, it sees what this process sees.
    """
    waiting, local = deque(runs), executor.cluster == "local"
    running: dict[int, tuple[Any, PlannedRun, float]] = {}
    try:
        while waiting or running:
            for slot in range(jobs):
                if waiting and slot not in running:
                    run = waiting.popleft()
                    environ: dict[str, str | None] = {
                        "OMP_NUM_THREADS": str(threads),
                        **paths_for_children(),
                    }
                    if local:
                        environ["CUDA_VISIBLE_DEVICES"] = _visible(slot, devices)
                    with _interrupts_held():
                        running[slot] = (
                            executor.submit(_attempt(run, environ, local)),
                            run,
                            time.monotonic(),
                        )
            for slot, (job, run, started) in list(running.items()):
                if job.done():
                    del running[slot]
                    yield EndedRun(run, time.monotonic() - started, _error(job))
            time.sleep(0.1)
    finally:
        _stop([job for job, _, _ in running.values()], local)


def _attempt(
    run: PlannedRun, environ: Mapping[str, str | None], local: bool
) -> Callable[[], str | None]:
    """What a job does: the run in a process of its own, whose end it tells. Pickled whole, so that
    no path matters.

    Signals of a cluster reach the run itself; on this machine they are passed on.
    """
    command = [sys.executable, "-P", "-u", "-m", "lab.sweeping.perform", run.to_json()]
    log, patience = run.folder.absolute() / LOG_FILE, _PATIENCE

    def attempt() -> str | None:
        variables = {
            name: value for name, value in {**os.environ, **environ}.items() if value is not None
        }
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as file:
                process = subprocess.Popen(
                    command,
                    env=variables,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    process_group=0,
                )
        except OSError as problem:
            return f"{log.parent} cannot be written ({problem})"

        def stop(number: int, frame: object) -> None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGALRM, lambda *_: process.kill())
            signal.setitimer(signal.ITIMER_REAL, patience)
            process.terminate()

        if local:
            signal.signal(signal.SIGTERM, stop)
        try:
            code = process.wait()
        finally:
            if local:
                # nothing is left to end, unless submitit's time limit ended the wait
                process.terminate()
        if code < 0:
            return f"its process died (signal {signal.Signals(-code).name})"
        return (
            log.read_text(encoding="utf-8", errors="replace").rstrip().rpartition("\n")[2]
            if code
            else None
        )

    return attempt


def _error(job: Any) -> str | None:
    """What the attempt tells, or that it could not tell anything."""
    try:
        return job.result()  # type: ignore[no-any-return]  # what the attempt returned
    except RuntimeError:  # submitit's own, and they hold pages of its log
        return f"its job ended without a result (state {job.state}); see {job.paths.stdout}"


def _stop(jobs: Sequence[Any], local: bool) -> None:
    """Ask, on this machine as often as it takes until each has heard it, and wait."""
    for job in () if local else jobs:
        job.cancel(check=False)
    while left := [job for job in jobs if not job.done()]:
        for job in left if local else ():
            os.kill(int(job.job_id), signal.SIGTERM)  # its own cancel() kills after a second
        time.sleep(0.5)


def _visible(slot: int, devices: int) -> str | None:
    """``CUDA_VISIBLE_DEVICES`` for a slot; submitit would hide all GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if devices > 1:
        names = (visible or "").split(",")
        visible = names[slot % devices] if len(names) > 1 else str(slot % devices)
    return visible


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
