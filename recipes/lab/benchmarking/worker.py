"""Body of one process of ``race``.

It weighs a method once, then runs two passes per order and times the second.
"""

import gc
import json
import math
import mmap
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from ctypes import CDLL, c_size_t, c_void_p
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lab.benchmarking.benchmarks import BENCHMARKS
from lab.benchmarking.task import Task
from sj_robust._host import quiet_triton
from sj_robust.ops.dlif import cpp


def main(subject: str, method: str, shape: tuple[int, ...], threads: int) -> None:
    """Answer every line of standard input with the milliseconds of the second of two passes,
    forward and backward.
    """
    warnings.simplefilter("ignore")  # of peers; this package is silent
    quiet_triton()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    facts: dict[str, Any] = {}
    if method == "copy":
        once = _copy(shape, threads)
        once()
    else:
        try:
            task = BENCHMARKS[subject].methods[method](shape)
        except ImportError as error:
            _answer({"missing": str(error)})
            return
        except RuntimeError:
            if cpp.unavailable_reason() is None:  # otherwise that is what the backend says
                raise
            _answer({"missing": cpp.unavailable_reason()})
            return
        try:
            task.check()
        except ValueError as error:
            _answer({"wrong": str(error)})
            return
        once = partial(_timed_pass, task)
        once()  # what a library sets up at its first call does not count
        facts = {
            "tensor_mb": task.tensor_bytes / 1e6,
            "peak_mb": _peak_bytes(task) / 1e6,
            "saved_mb": _saved_bytes(task) / 1e6 if BENCHMARKS[subject].has_one_graph else math.nan,
        }
    _answer(facts)
    for _ in sys.stdin:
        once()  # wakes threads and fills caches, which in a training step the layer before has done
        _answer(once())


def _answer(value: Any) -> None:
    print(json.dumps(value), flush=True)


def _timed_pass(task: Task) -> tuple[float, float]:
    """Milliseconds of the forward and of the backward pass; results are dropped, as after a
    training step.
    """
    start = time.perf_counter()
    result = task.forward()
    middle = time.perf_counter()
    task.backward(result)
    return 1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)


def _saved_bytes(task: Task) -> int:
    """Bytes that the graph keeps alive beyond the inputs; the last potential, a state, belongs to
    it.
    """
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = task.forward()
    for tensor in task.inputs:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del result
    return sum(
        size for size in storages.values() if size > 4096
    )  # gains and thresholds do not count


def _peak_bytes(task: Task) -> float:
    """Growth of the resident set at its highest during a pass; NaN where Linux does not tell."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return float("nan")

    def kilobytes(name: str) -> int:
        return next(
            int(line.split()[1])
            for line in status.read_text().splitlines()
            if line.startswith(name)
        )

    for tensor in task.inputs:
        tensor.grad = None  # the gradients of this pass are part of its peak
    gc.collect()
    if hasattr(libc := CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what the allocator kept of earlier passes would hide the growth
    reset.write_text("5")  # peak := present
    before = kilobytes("VmRSS:")
    _timed_pass(task)
    return 1024 * (kilobytes("VmHWM:") - before)


def _copy(shape: tuple[int, ...], threads: int) -> Callable[[], tuple[float, float]]:
    """Milliseconds to copy one tensor at the speed of this memory: memcpy by every thread, huge
    pages where there are.

    Measured on 256 MB, whatever the shape and the allocator, so that neither caches nor page faults
    are part of it.
    """
    memcpy = CDLL(None).memcpy
    memcpy.argtypes = (c_void_p, c_void_p, c_size_t)
    size = 256 << 20
    source, target = _pages(size), _pages(size)
    share = size // threads

    def once() -> tuple[float, float]:
        parts = [
            threading.Thread(
                target=memcpy,
                args=(target.data_ptr() + i * share, source.data_ptr() + i * share, share),
            )
            for i in range(threads)
        ]
        start = time.perf_counter()
        for part in parts:
            part.start()
        for part in parts:
            part.join()
        return 1e3 * (time.perf_counter() - start) * 4 * math.prod(shape) / size, 0.0

    return once


def _pages(size: int) -> Tensor:
    """Bytes that were written to: untouched ones all share one page."""
    pages = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8).fill_(1)


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2], tuple(json.loads(sys.argv[3])), int(sys.argv[4]))
    except BrokenPipeError:
        os._exit(
            1
        )  # who asked was stopped and reads no more; an ordinary exit would complain of that again
