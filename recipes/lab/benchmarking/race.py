"""Methods take turns, each in its own process, so that neither the allocator nor a noisy minute
favours one.
"""

import json
import math
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from lab import paths_for_children
from lab.benchmarking.benchmarks import Benchmark
from lab.benchmarking.results import Results, Row
from lab.benchmarking.worker import COPIED_BYTES, COPY

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
WORKER = (sys.executable, "-P", "-m", "lab.benchmarking.worker")
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
