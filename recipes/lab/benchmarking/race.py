"""Methods take turns, each in a process of its own, so that neither the allocator nor a noisy
minute favours one; tests run before, since a wrong kernel has no speed.

As a script it is the body of such a process: it checks, weighs and times a method, and answers with
one JSON object: what the method weighs and the milliseconds of its passes, or a reason.
"""

import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from ctypes import CDLL
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark.utils.timer import timer

from lab import paths_for_children
from lab.benchmarking.benchmarks import BENCHMARKS, GPU_BENCHMARKS, Benchmark
from lab.benchmarking.layers import Task
from lab.benchmarking.results import TESTS, Results, Row
from sj_robust.core.host import quiet_triton

COPY = "copy"
COPIED_BYTES = 256 << 20
"""Whatever the shape and the allocator, so that neither caches nor page faults are part of it."""
NOT_HERE = "not installed: "
"""Begins the reason of what needs another package, a compiler or another machine."""
ALLOCATORS: Mapping[str, Mapping[str, str]] = {
    "malloc": {},
    "reuse": {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
        "MALLOC_TOP_PAD_": str(1 << 28),
    },
    "cuda": {},
}
"""Environment of glibc's allocator: ``malloc`` maps every large tensor afresh, ``reuse`` keeps the
heap; ``cuda`` is torch's on a GPU.
"""
LIMIT = 600.0
"""Seconds that a turn of a method may take."""
TURNS = 3
TOO_LONG = "took longer than "
WORKER = (sys.executable, "-P", "-m", "lab.benchmarking.race")
"""Starts the process of a method."""


@dataclass(frozen=True)
class Race:
    """Methods of a benchmark, by the names of both, at one shape [T, N, *] and with one
    allocator.
    """

    subject: str
    benchmark: Benchmark
    methods: tuple[str, ...]
    shape: tuple[int, ...]
    allocator: str

    def row(self, method: str) -> Row:
        """The row of a method, without figures."""
        return Row(self.subject, self.allocator, "x".join(map(str, self.shape)), method)

    def left(self, results: Results) -> list[str]:
        """Methods that are not measured yet."""
        return [method for method in self.methods if not results.has(self.row(method))]

    def run(self, methods: Sequence[str], *, rounds: int, threads: int) -> list[Row]:
        """Time these methods ``rounds`` times, of which a spread needs two, in a few turns.

        One that is missing, wrong, out of memory, dead or silent for too long is a row with the
        reason, and the others go on.
        """
        is_layer = self.benchmark.passes > 0
        names = [*methods, COPY] if methods and is_layer else list(methods)
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for turn in range(min(TURNS, rounds)):
            passes = len(range(turn, rounds, TURNS))
            for method in names:
                if not any("reason" in answer for answer in answers[method]):
                    answers[method].append(self._answer(method, passes, threads))
            names.reverse()  # another one begins the next turn
        found = {method: _figures(answers[method]) for method in answers}
        copy = found.pop(COPY, {}).get("best", math.nan)
        tensor_bytes = self.benchmark.element_bytes * math.prod(self.shape)
        figures = {"tensor_mb": tensor_bytes / 1e6, "copy": copy * tensor_bytes / COPIED_BYTES}
        if self.allocator == "reuse":
            figures["peak_mb"] = math.nan  # a heap that is kept hides its growth
        return [replace(self.row(method), **found[method] | figures) for method in methods]

    def _answer(self, method: str, passes: int, threads: int) -> dict[str, Any]:
        """What a process of its own says of a method."""
        device = "cuda" if self.allocator == "cuda" else "cpu"
        words = [self.subject, method, json.dumps(self.shape), str(threads), device, str(passes)]
        try:
            done = _run([*WORKER, *words], self._variables(method), LIMIT)
        except subprocess.TimeoutExpired:
            return {"reason": f"{TOO_LONG}{LIMIT:g} s"}
        if done.stdout:
            return json.loads(done.stdout)  # type: ignore[no-any-return]  # an object
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        return {"reason": f"the process ended with code {done.returncode}: {lines[-1][:300]}"}

    def _variables(self, method: str) -> dict[str, str]:
        """The environment of a method's process."""
        own = {name: os.environ[name] for name in os.environ if name not in ALLOCATORS["reuse"]}
        more = self.benchmark.variables.get(method, {})
        return {**own, **paths_for_children(), **ALLOCATORS[self.allocator], **more}


def _figures(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Fields of a row from the answers of its turns: the reason, or times and memory."""
    last = answers[-1]
    if "reason" in last:
        return last
    passes = [one for answer in answers for one in answer.pop("passes")]
    total = [one["forward"] + one["backward"] for one in passes]
    quartiles = statistics.quantiles(total, method="inclusive")
    return last | {
        "median": quartiles[1],
        "quartile1": quartiles[0],
        "quartile3": quartiles[2],
        "best": min(total),
        "forward": statistics.median(one["forward"] for one in passes),
        "backward": statistics.median(one["backward"] for one in passes),
    }


_LAYERS = ("ops/test_kernels.py", "neuron/test_stage.py", "neuron/test_stage_seen.py")
TESTS_OF = {
    "neuron": ("ops/test_kernels.py",),
    "training_step": (*_LAYERS, "training/test_training_step.py"),
    "joint_step": ("ops/test_trains.py", "proofs/test_training_bounds.py"),
}
"""Tests of what is timed; of what is not named, those of layers."""
_ON_GPU = ("cupy", "triton", "not cupy and not triton")
"""Tests of one kernel run apart from those of another, which they may take along."""
_SHORT = ("-W", "default", "--disable-warnings", "--tb=line", "-rN")
"""Warnings are no errors: one of a driver or of a newer package would make a kernel seem to be
missing.
"""


def refuse_unless_tests_pass(tests: Path, what: str) -> None:
    """Run the tests of what is timed.

    Raises:
        SystemExit: If one fails.
    """
    files = TESTS_OF.get(what, _LAYERS)
    result = _pytest([str(tests / name) for name in files])
    if result.returncode != 0:
        tail = f"{result.stdout[-2000:]}{result.stderr[-500:]}"
        raise SystemExit(f"the tests of what is timed fail, so nothing is timed:\n{tail}")


def run_gpu_tests(
    folder: Path, results: Results, say: Callable[[str], None], *, limit: float = 480.0
) -> None:
    """Run the tests of a folder, those of each file and kernel in a process of its own, where a
    crash is its own affair; each is a row.
    """
    for path in sorted(folder.glob("test_*.py")):
        for kernel in _ON_GPU:
            row = Row(TESTS, "cuda", "", f"{path.name}, {kernel}")
            if results.has(row):
                continue
            say(row.method)
            arguments = [str(path), "-k", kernel, *_SHORT]
            result = _pytest(arguments, limit)
            *said, outcome = result.stdout.strip().splitlines() or ["it said nothing"]
            reason = ""
            if result.returncode not in (0, 5):  # 5: there are no such tests
                reason = " ".join([f"code {result.returncode}", *said[-1:]])
            results.add([replace(row, outcome=outcome, reason=reason)])
            say(f"{outcome} {reason}")


def _pytest(arguments: list[str], limit: float | None = None) -> "subprocess.CompletedProcess[str]":
    options = ["-q", "--no-header", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    try:
        return _run(command, {**os.environ, **paths_for_children()}, limit)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, -9, f"{TOO_LONG}{limit:g} s", "")


def _run(
    command: Sequence[str], variables: Mapping[str, str], limit: float | None
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=variables, timeout=limit
    )


def answer(
    subject: str, method: str, shape: tuple[int, ...], device: str, passes: int
) -> dict[str, Any]:
    """What the method weighs and what its passes take, or why it has no figures."""
    try:
        with torch.device(device):
            task = made(subject, method, shape)
            task.check()
        benchmark = (BENCHMARKS | GPU_BENCHMARKS)[subject]
        if benchmark.cpu_time:
            torch.set_num_threads(1)
        meter = Meter(task, on_gpu=device == "cuda", cpu_time=benchmark.cpu_time)
        meter.times()  # what a library sets up at its first call does not count
        found = {"peak_mb": meter.peak_bytes() / 1e6, "saved_mb": meter.saved_bytes() / 1e6}
        meter.times()  # wakes threads and fills caches, as in a training step the layer before
        return found | {"passes": [meter.times() for _ in range(passes)]}
    except ImportError as error:
        return {"reason": f"{NOT_HERE}{error}"}
    except Exception as error:  # whatever goes wrong with one method is that method's affair
        words = f"{type(error).__name__}: {error}"
        return {"reason": " ".join(words.split())[:400]}


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
        self._clock = time.process_time if cpu_time else timer  # which waits for a GPU

    def times(self) -> dict[str, float]:
        """Milliseconds of the forward and of the backward pass; results are dropped, as after a
        training step.
        """
        start = self._clock()
        result = self._task.forward()
        middle = self._clock()
        self._task.backward(result)
        end = self._clock()
        return {"forward": 1e3 * (middle - start), "backward": 1e3 * (end - middle)}

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


def main(subject: str, method: str, shape: str, threads: str, device: str, passes: str) -> None:
    """Measure, and say what was found."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    warnings.simplefilter("ignore")  # of peers; this package is silent
    quiet_triton()
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    found = answer(subject, method, tuple(json.loads(shape)), device, int(passes))
    print(json.dumps(found), file=out, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
