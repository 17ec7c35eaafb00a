"""Processes that perform runs: each handles many, and one that dies takes only its own run with it."""

import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from lab.sweeping.perform import perform
from lab.sweeping.plan import PlannedRun

__all__ = ["LOG_FILE", "Outcome", "perform_all"]

LOG_FILE = "output.txt"

_PATIENCE = 120.0
"""Seconds that interrupted runs have to write their checkpoints."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended. 一次运行的结局。

    Attributes:
        run: The run.
        seconds: Time it took.
        error: Why it failed, in one line; None if it is finished.
    """

    run: PlannedRun
    seconds: float
    error: str | None = None


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    run: PlannedRun | None = None
    started: float = 0.0

    def give(self, run: PlannedRun) -> None:
        self.run, self.started = run, time.monotonic()
        self.pipe.send(run)

    def outcome(self) -> Outcome:
        """What the worker says of its run, or that it died."""
        assert self.run is not None
        try:
            error: str | None = self.pipe.recv()
        except EOFError:
            self.process.join()
            error = f"its process died ({_exit(self.process.exitcode)})"
        run, self.run = self.run, None
        return Outcome(run, time.monotonic() - self.started, error)


def perform_all(runs: Sequence[PlannedRun], *, jobs: int = 1, threads: int = 1, devices: int = 0) -> Iterator[Outcome]:
    """Perform runs in ``jobs`` processes, and yield each as it ends. 多进程执行全部运行。

    What a run prints is in its ``output.txt``. A process whose parent is gone ends at once. When the iteration is left,
    by Ctrl-C for instance, runs are asked to stop, and what they leave can be resumed.

    Args:
        runs: The runs.
        jobs: Processes.
        threads: Threads of torch in each.
        devices: GPUs that processes take turns with; below two, every process sees what this one does.

    Yields:
        How each run ended.

    Raises:
        ValueError: If ``jobs`` or ``threads`` is < 1.
    """
    if jobs < 1 or threads < 1:
        raise ValueError(f"jobs and threads must be >= 1, got {jobs} and {threads}")
    waiting = deque(runs)
    workers: dict[int, _Worker] = {}
    try:
        while waiting or workers:
            for place in range(jobs):
                if waiting and place not in workers:
                    workers[place] = _start(place, threads, devices)
                    workers[place].give(waiting.popleft())
            ready = connection.wait([worker.pipe for worker in workers.values()])
            for place, worker in list(workers.items()):
                if worker.pipe not in ready:
                    continue
                outcome = worker.outcome()
                if waiting and worker.process.is_alive():
                    worker.give(waiting.popleft())
                else:
                    worker.pipe.close()
                    del workers[place]
                yield outcome
    finally:
        _stop(list(workers.values()))


def _start(place: int, threads: int, devices: int) -> _Worker:
    environ = {"OMP_NUM_THREADS": str(threads)}
    if devices > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        environ["CUDA_VISIBLE_DEVICES"] = visible[place % devices] if len(visible) > 1 else str(place % devices)
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, threads), name=f"sweep-{place}")
    with _environ(environ), _interrupts_held():
        process.start()
    there.close()
    return _Worker(process, here)


def _stop(workers: Sequence[_Worker]) -> None:
    """Ask once, as Ctrl-C does, then wait, then insist."""
    for worker in workers:
        if worker.process.pid is not None and worker.process.is_alive():
            os.kill(worker.process.pid, signal.SIGINT)
        worker.pipe.close()  # nothing more comes
    deadline = time.monotonic() + _PATIENCE
    for worker in workers:
        worker.process.join(max(0.0, deadline - time.monotonic()))
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


def _serve(pipe: Connection, threads: int) -> None:
    """Life of a worker: runs come in, and for each an error or None goes out."""
    if os.name == "posix":
        os.setpgid(0, 0)  # Ctrl-C reaches the parent alone, which passes it on once
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # drops one that came before
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(threads)
    while True:
        try:
            run = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            with _output_to(run.folder / LOG_FILE):
                error = _performed(run)
        except OSError as problem:
            error = f"{run.folder} cannot be written ({problem})"
        try:
            pipe.send(error)
        except BrokenPipeError:
            return


def _performed(run: PlannedRun) -> str | None:
    """Perform a run; any error ends as a line, with its traceback in the log."""
    try:
        perform(run)
    except SystemExit as stop:
        return f"the recipe gave up: {stop.code}" if isinstance(stop.code, str) else f"exit code {stop.code}"
    except KeyboardInterrupt:
        return "stopped"
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _die_with_parent() -> None:
    """Nobody reads what an orphan finds, and a new sweep would write into the same folders."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Both outputs of this process and its children go to the end of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = [os.dup(number) for number in (1, 2)]
    with path.open("ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number, old in zip((1, 2), saved, strict=True):
            os.dup2(old, number)
            os.close(old)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits, in a process started meanwhile until it lets go: it would die with a traceback."""
    if os.name != "posix":
        yield
        return
    resource_tracker.ensure_running()  # which would let interrupts through when it is started later
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _environ(values: Mapping[str, str]) -> Iterator[None]:
    """Variables of the environment that a child is to start with."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _exit(code: int | None) -> str:
    return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
