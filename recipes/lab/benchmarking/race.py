"""Methods take turns, each in its own process, so that neither the allocator nor a noisy minute
favours one; tests run before, since a wrong kernel has no speed.

As a script it is the body of such a process: it checks and weighs a method, then times it whenever
it is asked. Every answer is one JSON object a line: what the method weighs, then milliseconds of a
pass for every line of standard input; or a reason, which is the last.
"""

import gc
import json
import math
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from ctypes import CDLL
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
"""Seconds that a method may take to be checked and weighed, or for its turn."""
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

    def run(
        self,
        methods: Sequence[str],
        *,
        rounds: int,
        threads: int,
        environ: Mapping[str, str],
    ) -> list[Row]:
        """Time these methods in ``rounds`` turns, of which a spread needs two.

        One that is missing, wrong, out of memory, dead or silent for too long is a row with the
        reason, and the others go on.
        """
        if not methods:
            return []
        device = "cuda" if self.allocator == "cuda" else "cpu"
        shape = json.dumps(self.shape)
        is_layer = self.benchmark.passes > 0
        racers: list[Racer] = []
        try:
            for method in [*methods, COPY] if is_layer else methods:
                command = [*WORKER, self.subject, method, shape, str(threads), device]
                racer = Racer(method, command, self._variables(method, environ))
                racers.append(racer)
                racer.weigh()
            for number in range(rounds):
                first = number % len(racers)  # another one begins each round
                for racer in racers[first:] + racers[:first]:
                    racer.take_turn()
        finally:
            for racer in racers:
                racer.end()
        copies = [racer.best for racer in racers if racer.method == COPY]
        tensor_bytes = self.benchmark.element_bytes * math.prod(self.shape)
        figures = {
            "tensor_mb": tensor_bytes / 1e6,
            "copy": min(copies, default=math.nan) * tensor_bytes / COPIED_BYTES,
        }
        if self.allocator == "reuse":
            figures["peak_mb"] = math.nan  # a heap that is kept hides its growth
        return [
            replace(self.row(racer.method), **racer.figures() | figures)
            for racer in racers
            if racer.method != COPY
        ]

    def _variables(self, method: str, environ: Mapping[str, str]) -> dict[str, str]:
        """The environment of a method's process."""
        variables = {**os.environ, **paths_for_children(), **environ}
        for name in ALLOCATORS["reuse"]:
            variables.pop(name, None)
        variables.update(ALLOCATORS[self.allocator])
        variables.update(self.benchmark.variables.get(method, {}))
        return variables


class Racer:
    """A method and its process, which ends with the first thing that goes wrong."""

    def __init__(self, method: str, command: Sequence[str], variables: Mapping[str, str]) -> None:
        """Start the process."""
        self.method = method
        self.reason = ""
        self._weight: dict[str, float] = {}
        self._passes: list[dict[str, float]] = []
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # :meth:`end` closes it
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=dict(variables),
            process_group=0,  # Ctrl-C reaches this process alone, which ends the others
        )

    def weigh(self) -> None:
        """Wait until the method is checked and weighed."""
        self._weight = self._answer()

    def take_turn(self) -> None:
        """Time one pass."""
        if self.reason:
            return
        time.sleep(0.05)  # threads of the pass before wait by spinning, for milliseconds
        with suppress(BrokenPipeError):  # it died, which the answer tells
            print(file=self._process.stdin, flush=True)
        found = self._answer()
        if not self.reason:
            self._passes.append(found)

    def end(self) -> None:
        """Stop the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    @property
    def best(self) -> float:
        """Milliseconds of the fastest pass."""
        return min(map(_total, self._passes), default=math.nan)

    def figures(self) -> dict[str, Any]:
        """Fields of the row: the reason, or times and memory."""
        if self.reason:
            return {"reason": self.reason}
        quartiles = statistics.quantiles(map(_total, self._passes), method="inclusive")
        return self._weight | {
            "median": quartiles[1],
            "quartile1": quartiles[0],
            "quartile3": quartiles[2],
            "best": self.best,
            "forward": statistics.median(each["forward"] for each in self._passes),
            "backward": statistics.median(each["backward"] for each in self._passes),
        }

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None  # a pipe
        ready, _, _ = select.select([self._process.stdout], [], [], LIMIT)
        if not ready:
            return self._failed(f"{TOO_LONG}{LIMIT:g} s")
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            last = last_line(self._errors.read())
            return self._failed(f"the process ended with code {self._process.wait()}: {last}")
        found: dict[str, Any] = json.loads(line)
        return self._failed(found["reason"]) if "reason" in found else found

    def _failed(self, reason: str) -> dict[str, float]:
        """Keep the reason, and give back processor and memory at once."""
        self.reason = reason
        self._process.kill()
        return {}


def _total(found: Mapping[str, float]) -> float:
    return found["forward"] + found["backward"]


def last_line(text: str) -> str:
    """The last thing that a process said."""
    lines = text.strip().splitlines() or ["it said nothing"]
    return lines[-1][:300]


OPERATOR = ("ops/test_dlif.py", "ops/test_cpp.py")
ONE_PASS = ("ops/test_bn_dlif.py", "neuron/test_stage.py", "neuron/test_stage_seen.py")
_OF = {
    "neuron": OPERATOR,
    "instruction_sets": OPERATOR,
    "scaling": OPERATOR,
    "training_step": (*OPERATOR, *ONE_PASS, "training/test_training_step.py"),
    "joint_step": ("ops/test_trains.py", "proofs/test_training_bounds.py"),
    "joint_scaling": ("ops/test_trains.py", "proofs/test_joint.py"),
    "verify": (*OPERATOR, *ONE_PASS, "ops/test_trains.py", "proofs/test_verification.py"),
}
"""Tests of what is timed; of what is not named, those of operator and one pass."""
_ON_GPU = ("cupy", "triton", "not cupy and not triton")
"""Tests of one kernel run apart from those of another, which they may take along."""
_SHORT = ("-W", "default", "--disable-warnings", "--tb=line", "-rN")
"""Warnings are no errors: one of a driver or of a newer package would make a kernel seem to be
missing.
"""


def refuse_unless_tests_pass(tests: Path, what: str, environ: Mapping[str, str]) -> None:
    """Run the tests of what is timed, with the instruction set that will be timed.

    Raises:
        SystemExit: If one fails.
    """
    files = _OF.get(what, (*OPERATOR, *ONE_PASS))
    result = _pytest([str(tests / name) for name in files], environ)
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
            result = _pytest(arguments, {}, limit)
            *said, outcome = result.stdout.strip().splitlines() or ["it said nothing"]
            reason = ""
            if result.returncode not in (0, 5):  # 5: there are no such tests
                reason = " ".join([f"code {result.returncode}", *said[-1:]])
            results.add([replace(row, outcome=outcome, reason=reason)])
            say(f"{outcome} {reason}")


def _pytest(
    arguments: list[str], environ: Mapping[str, str], limit: float | None = None
) -> "subprocess.CompletedProcess[str]":
    options = ["-q", "--no-header", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    variables = {**os.environ, **paths_for_children(), **environ}
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env=variables, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, -9, f"{TOO_LONG}{limit:g} s", "")


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
