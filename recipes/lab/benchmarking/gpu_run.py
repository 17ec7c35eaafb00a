"""The first hour on a GPU: its tests, then the rows of the plan, each kept on disk as soon as it is
known.

A test or a row that fails, hangs or takes its process along leaves a row with the reason. A run
that was stopped goes on where it was: what is measured is not measured again, what failed is tried
again.
"""

import json
import math
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from lab import paths_for_children
from lab.benchmarking.gpu_plan import Part

TESTS = "tests"
"""Part of the rows that are tests."""
_BACKENDS = ("cpp", "cupy", "triton", "eager", "reference")
_WORKER = ("-P", "-m", "lab.benchmarking.gpu_worker")


@dataclass(frozen=True)
class GpuRow:
    """One row: a measurement in milliseconds and megabytes, a group of tests, or why there is none.

    Attributes:
        part: Name in the plan, or :data:`TESTS`.
        method: Name of the method, or of the test.
        precision: Of :class:`Part`; empty for tests.
        wanted: Shape of the plan, as text.
        shape: Shape that was measured, with a smaller batch where memory was short.
        reason: Why there is no figure; empty if there is one, and for tests that passed.
        outcome: What tests gave.
        host: Time until the calls returned, whose work may go on.
    """

    part: str
    method: str
    precision: str = ""
    wanted: str = ""
    shape: str = ""
    reason: str = ""
    outcome: str = ""
    median: float = math.nan
    quartile1: float = math.nan
    quartile3: float = math.nan
    best: float = math.nan
    forward: float = math.nan
    backward: float = math.nan
    host: float = math.nan
    peak_mb: float = math.nan
    tensor_mb: float = math.nan

    @property
    def key(self) -> tuple[str, ...]:
        """What the row is of."""
        return self.part, self.method, self.precision, self.wanted


class Store:
    """The rows of a run in a file of JSON lines, whose first line says where they were measured.

    Rows of another machine, other releases or other kernels are set aside in a file beside it,
    since one table cannot hold both.
    """

    def __init__(self, path: Path, where: Mapping[str, str]) -> None:
        """Read what an earlier call left."""
        self.path, self.where = path, dict(where)
        self._rows: dict[tuple[str, ...], GpuRow] = {}
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        before = _parsed(text.partition("\n")[0])
        # the commit may differ, since tables are written into the repository
        lines = text.splitlines() if before | {"commit": ""} == self.where | {"commit": ""} else []
        if text and not lines:
            with path.with_suffix(".earlier.jsonl").open("a", encoding="utf-8") as earlier:
                earlier.write(f"{text.rstrip()}\n")
        for line in lines[1:]:
            try:
                row = GpuRow(**json.loads(line))
            except (
                TypeError,
                ValueError,
            ):  # a head, a row of other fields, the last line of a run that was killed
                continue
            self._rows[row.key] = row
        if not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.where) + "\n", encoding="utf-8")
        elif not text.endswith("\n"):
            self._append("")

    def add(self, row: GpuRow) -> GpuRow:
        """Keep a row on disk; returns it."""
        self._rows[row.key] = row
        self._append(json.dumps(asdict(row)))
        return row

    def _append(self, line: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")

    def has(self, row: GpuRow) -> bool:
        """Whether this is known already, and is no failure."""
        kept = self._rows.get(row.key)
        return kept is not None and not kept.reason

    @property
    def rows(self) -> list[GpuRow]:
        """All rows, the first known first."""
        return list(self._rows.values())


def load(path: Path) -> Store:
    """A file of an earlier call, for its tables and charts."""
    with path.open(encoding="utf-8") as file:
        return Store(path, json.loads(file.readline()))


def _row(
    part: str, method: str, precision: str, wanted: Sequence[int], facts: Mapping[str, Any]
) -> GpuRow:
    """A row of the plan from what a worker says of it."""
    measured = {name: value for name, value in facts.items() if name not in ("done", "shape")}
    planned, shape = ("x".join(map(str, sizes)) for sizes in (wanted, facts.get("shape", wanted)))
    return GpuRow(part, method, precision, planned, shape, **measured)


def measure_part(
    name: str,
    part: Part,
    store: Store,
    *,
    device: str,
    rounds: int,
    limit: float = 300.0,
    worker: Sequence[str] = _WORKER,
) -> Iterator[GpuRow]:
    """Measure what the store does not have yet; each row comes, and is kept, as soon as it is
    known.

    The device is ``"cuda"``, or ``"cpu"`` to try all of this without a GPU; ``limit`` seconds a row
    may take, and ``worker`` is how Python starts the process of a method.
    """
    for method in part.methods:
        row = partial(_row, name, method)
        cases = [case for case in part.cases if not store.has(row(*case, {}))]
        while cases:
            variables = {**os.environ, **paths_for_children(), **part.variables.get(method, {})}
            command = [
                sys.executable,
                *worker,
                name,
                method,
                device,
                str(rounds),
                json.dumps(cases),
            ]
            finished, reason = 0, ""
            for facts in _answers(command, variables, limit):
                yield store.add(row(*cases[finished], facts))
                finished, reason = finished + 1, facts.get("reason", "")
            cases = cases[
                max(finished, 1) :
            ]  # a process that died is followed by another one for the rest
            if reason == _too_long(limit):  # one that hung is not: an hour is soon over
                for case in cases:
                    yield store.add(
                        row(*case, {"reason": f"not tried: a row of this method {reason}"})
                    )
                break


def _answers(
    command: Sequence[str], variables: Mapping[str, str], limit: float
) -> Iterator[dict[str, Any]]:
    """What a worker says of its cases; if it dies or hangs, the last is why."""
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=dict(variables),
            process_group=0,
        ) as process,
    ):
        assert process.stdout is not None  # a pipe
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_forward, args=(process.stdout, lines), daemon=True).start()
        begun, done = 0, 0
        try:
            for line in iter(partial(lines.get, timeout=limit), ""):
                said = _parsed(line)
                begun += "begun" in said
                if "done" in said:
                    done += 1
                    yield said
            process.wait()
            if begun > done or begun == 0:
                errors.seek(0)
                last = (errors.read().strip().splitlines() or ["it said nothing"])[-1]
                yield {"reason": f"the process ended with code {process.returncode}: {last[:300]}"}
        except queue.Empty:
            yield {"reason": _too_long(limit)}
        finally:
            process.kill()


def _too_long(limit: float) -> str:
    return f"took longer than {limit:g} s"


def _forward(stream: Any, lines: "queue.Queue[str]") -> None:
    for line in stream:
        lines.put(line)
    lines.put("")


def _parsed(line: str) -> dict[str, Any]:
    """An answer; what a library prints is none."""
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def run_tests(
    folder: Path,
    store: Store,
    *,
    limit: float = 480.0,
    began: Callable[[str], None] = lambda name: None,
) -> Iterator[GpuRow]:
    """Run the tests of a folder, each function and backend in a process of its own, where a crash
    is its own affair.

    A backend one of whose tests takes longer than ``limit`` seconds runs no more of them.
    Warnings are no errors: one of a driver or of a newer package would make a kernel seem to be
    missing.
    """
    pytest = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--no-header",
        "-p",
        "no:cacheprovider",
        "-W",
        "default",
    ]
    listed = _run([*pytest, "--collect-only", str(folder)], limit)
    identifiers = re.findall(r"^(\S+\.py::\w+)(\[.*\])?$", listed.stdout, flags=re.MULTILINE)
    if not identifiers:
        yield store.add(
            GpuRow(TESTS, folder.name, reason=f"pytest finds no tests: {_last_line(listed)}")
        )
    groups = dict.fromkeys((test, _backend(parameters)) for test, parameters in identifiers)
    hung = set()
    for test, backend in groups:
        if backend == "cpp":  # so the tests try themselves where there is no GPU
            continue
        name = f"{test.rpartition('::')[2]}{f' [{backend}]' if backend else ''}"
        if store.has(GpuRow(TESTS, name)):
            continue
        began(name)
        if backend in hung:
            row = GpuRow(
                TESTS, name, reason=f"not run: another test of {backend} {_too_long(limit)}"
            )
        else:
            file = folder / test.split("::")[0].rpartition("/")[2]
            row = _tested(name, [*pytest, f"{file}::{name.split()[0]}"], backend, limit)
        if backend and row.reason.endswith(_too_long(limit)):
            hung.add(backend)
        yield store.add(row)


def _backend(parameters: str) -> str:
    return next((name for name in _BACKENDS if re.search(rf"\b{name}\b", parameters)), "")


def _tested(name: str, command: Sequence[str], backend: str, limit: float) -> GpuRow:
    """The outcome of one process of tests, as pytest writes it into a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outcome.xml"
        result = _run(
            [*command, *(["-k", backend] if backend else []), f"--junitxml={path}"], limit
        )
        if not path.is_file():
            return GpuRow(
                TESTS, name, reason=f"no outcome, code {result.returncode}: {_last_line(result)}"
            )
        suite = next(ElementTree.parse(path).iter("testsuite"))
    count = {
        kind: int(suite.attrib.get(kind, 0)) for kind in ("tests", "failures", "errors", "skipped")
    }
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    outcome = ", ".join(
        f"{number} {word}"
        for number, word in ((passed, "passed"), (failed, "failed"), (count["skipped"], "skipped"))
        if number
    )
    said = [
        " ".join(found.attrib.get("message", "").split())
        for kind in ("failure", "error", "skipped")
        for found in suite.iter(kind)
    ]
    if failed:
        return GpuRow(TESTS, name, reason=said[0][:300] or "failed", outcome=outcome)
    return GpuRow(TESTS, name, outcome=outcome + (f" ({said[0][:200]})" if said else ""))


def _run(command: Sequence[str], limit: float) -> "subprocess.CompletedProcess[str]":
    environ = {**os.environ, **paths_for_children()}
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env=environ, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, -9, "", _too_long(limit))


def _last_line(result: "subprocess.CompletedProcess[str]") -> str:
    lines = (result.stdout + result.stderr).strip().splitlines() or ["it said nothing"]
    return lines[-1][:300]
