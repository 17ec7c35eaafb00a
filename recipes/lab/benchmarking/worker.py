"""Body of one process of ``race``: checks and weighs a method, then times it whenever it is asked.

Every answer is one JSON object a line: what the method weighs, then milliseconds of a pass for
every line of standard input; or a reason, which is the last.
"""

import gc
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from ctypes import CDLL
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lab.benchmarking.benchmarks import BENCHMARKS, GPU_BENCHMARKS
from lab.benchmarking.task import Task
from sj_robust.core.host import quiet_triton

COPY = "copy"
COPIED_BYTES = 256 << 20
"""Whatever the shape and the allocator, so that neither caches nor page faults are part of it."""
NOT_HERE = "not installed: "
"""Begins the reason of what needs another package, a compiler or another machine."""


def answers(
    subject: str, method: str, shape: tuple[int, ...], device: str
) -> Iterator[dict[str, Any]]:
    """What the method weighs, then, as often as it is asked, what a pass takes."""
    try:
        with torch.device(device):
            task = made(subject, method, shape)
            task.check()
        benchmark = (BENCHMARKS | GPU_BENCHMARKS)[subject]
        if benchmark.cpu_time:
            torch.set_num_threads(1)
        meter = Meter(task, on_gpu=device == "cuda", cpu_time=benchmark.cpu_time)
        meter.times()  # what a library sets up at its first call does not count
        facts = {"peak_mb": meter.peak_bytes() / 1e6, "saved_mb": meter.saved_bytes() / 1e6}
        while True:
            if device == "cuda":
                torch.cuda.empty_cache()  # the memory belongs to whose turn it is
            yield facts
            meter.times()  # wakes threads and fills caches, as in a training step the layer before
            facts = meter.times()
    except ImportError as error:
        yield {"reason": f"{NOT_HERE}{error}"}
    except Exception as error:  # whatever goes wrong with one method is that method's affair
        words = f"{type(error).__name__}: {error}"
        yield {"reason": " ".join(words.split())[:400]}


def made(subject: str, method: str, shape: tuple[int, ...]) -> Task:
    """The task of a method, or that of the memory."""
    if method == COPY:
        return CopyTask()
    benchmark = (BENCHMARKS | GPU_BENCHMARKS)[subject]
    return benchmark.methods[method](shape)


class Meter:
    """Time and memory of a task."""

    def __init__(self, task: Task, *, on_gpu: bool, cpu_time: bool = False) -> None:
        """Say where the task runs, and whether the processor's time counts."""
        self._task = task
        self._on_gpu = on_gpu
        self._clock = time.process_time if cpu_time else time.perf_counter

    def _now(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
        return 1e3 * self._clock()

    def times(self) -> dict[str, float]:
        """Milliseconds of the forward and of the backward pass; results are dropped, as after a
        training step.
        """
        start = self._now()
        result = self._task.forward()
        middle = self._now()
        self._task.backward(result)
        return {"forward": middle - start, "backward": self._now() - middle}

    def saved_bytes(self) -> float:
        """Bytes that the graph keeps alive beyond the inputs; the last potential, a state, belongs
        to it. NaN where there are several graphs.
        """
        if not self._task.has_one_graph:
            return math.nan
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            result = self._task.forward()
        for tensor in self._task.inputs:
            sizes.pop(tensor.untyped_storage().data_ptr(), None)
        del result
        return sum(size for size in sizes.values() if size > 4096)  # without gains and thresholds

    def peak_bytes(self) -> float:
        """Growth of the memory at its highest during a pass, on a CPU that of the resident set; NaN
        where Linux does not tell.
        """
        for tensor in self._task.inputs:
            tensor.grad = None  # the gradients of this pass are part of its peak
        gc.collect()
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.times()
            return torch.cuda.max_memory_allocated() - before
        reset = Path("/proc/self/clear_refs")
        if not reset.exists():
            return math.nan
        libc = CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)  # what the allocator kept of earlier passes would hide the growth
        reset.write_text("5")  # peak := present
        before = _status_kilobytes("VmRSS:")
        self.times()
        return 1024 * (_status_kilobytes("VmHWM:") - before)


def _status_kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


class CopyTask(Task):
    """A copy between tensors that were written to before: what moves at the memory's speed."""

    def __init__(self) -> None:
        """Make both."""
        self._source, self._target = (torch.ones(COPIED_BYTES // 4) for _ in range(2))
        self.inputs = []

    def forward(self) -> None:
        """The copy."""
        self._target.copy_(self._source)


def main(subject: str, method: str, shape: str, threads: str, device: str) -> None:
    """Answer at once, and then every line of standard input."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    warnings.simplefilter("ignore")  # of peers; this package is silent
    quiet_triton()
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    for answer in answers(subject, method, tuple(json.loads(shape)), device):
        print(json.dumps(answer), file=out, flush=True)
        if not sys.stdin.readline():
            break


if __name__ == "__main__":
    main(*sys.argv[1:])
