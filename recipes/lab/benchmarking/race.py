"""Methods take turns, each in its own process, so that neither the allocator nor a noisy minute
favours one.
"""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lab import paths_for_children
from lab.benchmarking.benchmarks import BENCHMARKS
from lab.benchmarking.task import times_of

ALLOCATORS: Mapping[str, Mapping[str, str]] = {
    "malloc": {},
    "reuse": {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
        "MALLOC_TOP_PAD_": str(1 << 28),
    },
}
"""Environment of glibc's allocator: ``malloc`` maps every large tensor afresh, ``reuse`` keeps the
heap.
"""


@dataclass(frozen=True)
class Measurement:
    """One method at one shape. Times in milliseconds, memory in megabytes.

    Attributes:
        subject: Name in :data:`BENCHMARKS`.
        allocator: Name in :data:`ALLOCATORS`.
        shape: Shape of the input, as text.
        median: Of forward plus backward, as quartiles and best are.
        forward: Median of the forward pass alone, as that of the backward pass.
        saved_mb: What the graph keeps beyond inputs and parameters; NaN where there are several.
        peak_mb: Growth of the resident set at its highest; NaN where the heap is reused, which
            hides it.
        tensor_mb: The input of a layer, the frames of a network.
        copy: Milliseconds of the fastest copy of that tensor in the same race; NaN for networks.
    """

    subject: str
    allocator: str
    shape: str
    method: str
    median: float
    quartile1: float
    quartile3: float
    best: float
    forward: float
    backward: float
    saved_mb: float
    peak_mb: float
    tensor_mb: float
    copy: float

    @property
    def floor(self) -> float:
        """Milliseconds that moving a layer's tensors takes: 2 passes forward and 3 backward, a copy
        being 2.
        """
        return 2.5 * self.copy

    @property
    def images_per_second(self) -> float:
        """Images, or rows of a layer's input, in a second of median passes."""
        return 1e3 * int(self.shape.split("x")[1]) / self.median


def race(
    subject: str,
    methods: Sequence[str],
    shape: tuple[int, ...],
    *,
    rounds: int,
    threads: int,
    allocator: str = "malloc",
    environ: Mapping[str, str] | None = None,
) -> tuple[list[Measurement], dict[str, str]]:
    """Time every method at one shape [T, N, *] in ``rounds`` turns, of which a spread needs two.

    Returns:
        Measurements in the order of ``methods``, and the methods that are not installed with the
        reason.

    Raises:
        RuntimeError: If a process dies, or a method is wrong: it is never timed.
    """
    benchmark = BENCHMARKS[subject]
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")
    }
    variables = {**inherited, **paths_for_children(), **ALLOCATORS[allocator], **(environ or {})}
    workers: dict[str, subprocess.Popen[str]] = {}
    facts: dict[str, Any] = {}
    missing: dict[str, str] = {}
    try:
        for method in (*methods, *(["copy"] if benchmark.is_layer else [])):
            arguments = [subject, method, json.dumps(shape), str(threads)]
            workers[method] = _started(
                arguments, {**variables, **benchmark.variables.get(method, {})}
            )
            facts[method] = _answer(workers[method], method)
            if "wrong" in facts[method]:
                raise RuntimeError(facts[method]["wrong"])
            if "missing" in facts[method]:
                missing[method] = facts[method]["missing"]
                workers.pop(method).communicate()
        times = _taken_in_turns(workers, rounds)
    finally:
        for worker in workers.values():
            worker.communicate()
    copy = min((forward for forward, _ in times.pop("copy", ())), default=math.nan)
    text = "x".join(map(str, shape))
    hidden = {} if allocator == "malloc" else {"peak_mb": math.nan}
    measurements = [
        Measurement(
            subject,
            allocator,
            text,
            method,
            copy=copy,
            **times_of(passes),
            **facts[method] | hidden,
        )
        for method, passes in times.items()
    ]
    return measurements, missing


def _started(arguments: Sequence[str], variables: Mapping[str, str]) -> "subprocess.Popen[str]":
    """A process that weighs one method and then waits for its turns; Ctrl-C reaches this one alone,
    which ends it.
    """
    command = [sys.executable, "-P", "-m", "lab.benchmarking.worker", *arguments]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=dict(variables),
        process_group=0,
    )


def _taken_in_turns(
    workers: "Mapping[str, subprocess.Popen[str]]", rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds of the forward and the backward pass of every round, by method; another one
    begins each round.
    """
    times: dict[str, list[tuple[float, float]]] = {method: [] for method in workers}
    turns = list(workers.items())
    for number in range(rounds if turns else 0):
        first = number % len(turns)
        for method, worker in turns[first:] + turns[:first]:
            time.sleep(0.05)  # threads of the pass before wait by spinning, for milliseconds
            assert worker.stdin is not None  # a pipe
            worker.stdin.write("pass\n")
            worker.stdin.flush()
            times[method].append(_answer(worker, method))
    return times


def _answer(worker: "subprocess.Popen[str]", method: str) -> Any:
    assert worker.stdout is not None  # a pipe
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(
            f"the process of {method!r} ended with code {worker.wait()}; its own message stands "
            "above"
        )
    return json.loads(line)
