"""Methods take turns, each in its own process, so that neither the allocator nor a noisy minute favours one."""

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["ALLOCATORS", "Measurement", "race"]

ALLOCATORS: Mapping[str, Mapping[str, str]] = {
    "malloc": {},
    "reuse": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 28)},
}
"""Environment of glibc's allocator: ``malloc`` maps every large tensor afresh, ``reuse`` keeps the heap."""


@dataclass(frozen=True)
class Measurement:
    """One method at one shape. Times in milliseconds, memory in units of the input tensor.

    Attributes:
        allocator: Name in :data:`ALLOCATORS`.
        shape: Shape of the input, as text.
        method: Name of the method.
        median: Median of forward plus backward; ``quartile1`` and ``quartile3`` are its spread.
        best: Fastest forward plus backward.
        forward: Median of the forward pass alone; ``backward`` likewise.
        saved: What the graph keeps beyond the input.
        peak: Growth of the resident set at its highest.
        copy: Milliseconds of the fastest copy of the tensor in the same race.
    """

    allocator: str
    shape: str
    method: str
    median: float
    quartile1: float
    quartile3: float
    best: float
    forward: float
    backward: float
    saved: float
    peak: float
    copy: float

    @property
    def floor(self) -> float:
        """Milliseconds that moving the tensors takes: 2 passes forward and 3 backward, a copy being 2."""
        return 2.5 * self.copy


def race(
    methods: Iterable[str],
    shape: tuple[int, ...],
    *,
    rounds: int,
    threads: int,
    allocator: str = "malloc",
    environ: Mapping[str, str] | None = None,
) -> tuple[list[Measurement], dict[str, str]]:
    """Time every method at one shape, in turns.

    Args:
        methods: Names out of ``sj_robust.benchmarking.METHODS``.
        shape: Shape [T, N, *] of the input currents.
        rounds: Timed passes per method, >= 2.
        threads: Threads of torch.
        allocator: Name in :data:`ALLOCATORS`.
        environ: More environment variables of the processes.

    Returns:
        Measurements in the order of ``methods``, and the methods that are not installed with the reason.

    Raises:
        RuntimeError: If a process dies; a method that does not equal the reference is never timed.
    """
    if rounds < 2:
        raise ValueError(f"rounds must be >= 2 to have a spread, got {rounds}")
    variables = {**os.environ, **ALLOCATORS[allocator], **(environ or {})}
    workers: dict[str, subprocess.Popen[str]] = {}
    facts: dict[str, Any] = {}
    missing: dict[str, str] = {}
    seconds: dict[str, list[tuple[float, float]]] = {}
    try:
        for method in (*methods, "copy"):
            command = [sys.executable, "-m", "sj_robust.benchmarking.worker", method, json.dumps(shape), str(threads)]
            worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables)
            workers[method] = worker
            facts[method] = _answer(worker, method)
            if "missing" in facts[method]:
                missing[method] = facts[method]["missing"]
                workers.pop(method).communicate()
            seconds[method] = []
        for _ in range(rounds):
            for method, worker in workers.items():
                assert worker.stdin is not None  # a pipe, see above
                worker.stdin.write("pass\n")
                worker.stdin.flush()
                seconds[method].append(_answer(worker, method))
    finally:
        for worker in workers.values():
            worker.communicate()
    copy = 1e3 * min(forward for forward, _ in seconds["copy"])
    measurements = [
        _measurement(allocator, shape, method, seconds[method], facts[method], copy)
        for method in workers
        if method != "copy"
    ]
    return measurements, missing


def _answer(worker: "subprocess.Popen[str]", method: str) -> Any:
    assert worker.stdout is not None  # a pipe
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"the process of {method!r} ended with code {worker.wait()}; its own message stands above")
    return json.loads(line)


def _measurement(
    allocator: str,
    shape: tuple[int, ...],
    method: str,
    seconds: list[tuple[float, float]],
    facts: dict[str, float],
    copy: float,
) -> Measurement:
    forward, backward = zip(*seconds, strict=True)
    totals = [1e3 * (f + b) for f, b in seconds]
    quartiles = statistics.quantiles(totals, method="inclusive")
    return Measurement(
        allocator=allocator,
        shape="x".join(map(str, shape)),
        method=method,
        median=statistics.median(totals),
        quartile1=quartiles[0],
        quartile3=quartiles[2],
        best=min(totals),
        forward=1e3 * statistics.median(forward),
        backward=1e3 * statistics.median(backward),
        saved=facts.get("saved_tensors", math.nan),
        peak=facts.get("peak_tensors", math.nan),
        copy=copy,
    )
