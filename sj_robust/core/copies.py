"""Tasks shared among copies of this process."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any, TypeVar

import torch

__all__ = ["in_copies", "possible_copies"]

_Found = TypeVar("_Found")
_Tell = Callable[..., object]
_SECONDS = 0.2  # between two looks at what the copies tell
_PR_SET_PDEATHSIG = 1
_MEMORY = 2 * 2**30
"""Bytes that a copy may need at least."""
_given: list[Any] = []  # to a copy


def possible_copies() -> int:
    """How many copies of this process may compute at a time, in the main thread, if no other
    processes share the work: as many as torch has threads, on Linux without a GPU (whose threads
    for gradients a copy would not have), and as there is memory for.
    """
    shared = torch.distributed.is_available() and torch.distributed.is_initialized()
    first = threading.current_thread() is threading.main_thread()
    if sys.platform != "linux" or torch.accelerator.is_available() or shared or not first:
        return 1
    import resource  # which Windows has not

    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return max(1, min(torch.get_num_threads(), free // max(peak, _MEMORY)))


def in_copies(
    task: Callable[[int, _Tell], _Found], count: int, copies: int, tell: _Tell
) -> Iterator[tuple[int, _Found]]:
    """What a task returns for the numbers below ``count``, in the order in which they end.

    Copies of this process (``fork``) take the numbers in turn, each computing in one thread; they
    end with this process. What the task tells is told here. Fewer calls than copies are made in
    this process, one after the other with all threads.

    Args:
        task: Called with a number and with what it may tell to; its result is copied, and should
            hold no tensors.
        count: Number of calls.
        copies: Copies that compute at a time; with 1, this process does.
        tell: Called with what a task tells.

    Raises:
        Exception: What a task raises; the others are stopped.
        BrokenProcessPool: If a copy was killed.
    """
    if copies <= 1 or count < copies:
        for number in range(count):
            yield number, task(number, tell)
        return
    context = multiprocessing.get_context("fork")
    told = context.SimpleQueue()
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(copies, context, initializer=_begin, initargs=(task, told.put))
    left: dict[Future[Any], int] = {}
    try:
        with warnings.catch_warnings():
            # of threads, which a copy has not: it computes in one of its own
            warnings.simplefilter("ignore", DeprecationWarning)
            left = {pool.submit(_run, number): number for number in range(count)}
        while left:
            done, _ = wait(left, timeout=_SECONDS, return_when=FIRST_COMPLETED)
            while not told.empty():
                tell(*told.get())
            for future in done:
                yield left.pop(future), future.result()
        while not told.empty():
            tell(*told.get())
    finally:
        if left:
            for copy in set(multiprocessing.active_children()) - others:
                copy.kill()
        pool.shutdown(cancel_futures=True)


def _begin(task: Callable[[int, _Tell], object], put: Callable[[tuple[Any, ...]], None]) -> None:
    """What a copy does first; an interrupt is for this process, which then stops the copies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(1)
    _given[:] = task, lambda *what: put(what)


def _run(number: int) -> object:
    """One call in a copy."""
    task, tell = _given
    return task(number, tell)
