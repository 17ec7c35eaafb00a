"""Runs tests on a copy of the tree in forked processes that find torch and SpikingJelly already imported."""

import contextlib
import gc
import hashlib
import importlib.util
import inspect
import json
import math
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

PRELOADED = (  # none of these may import sj_robust: every process imports the faulty copy itself
    "torch", "torchvision", "spikingjelly.activation_based.neuron", "spikingjelly.activation_based.monitor",
    "spikingjelly.activation_based.model", "sklearn.datasets", "matplotlib.pyplot", "_pytest.doctest",
)  # fmt: skip
COPIED = ("sj_robust", "tests", "recipes", "docs", "pyproject.toml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md")
MEMORY = 8 << 30  # bytes of data that a faulty process may ask for


@dataclass
class Coverage:
    """What the tests of a package run without a fault.

    Attributes:
        seconds: CPU seconds of each test, its fixtures included.
        lines: For each test the lines that it executes, by file.
        failed: Tests that do not pass without a fault.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    lines: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def selected(self, file: str, first: int, last: int, budget: float = math.inf) -> list[str]:
        """Tests that execute one of these lines, or if none does any line of the file, quick ones first.

        Args:
            file: File of the lines.
            first: First line.
            last: Last line.
            budget: CPU seconds that they may take together, one test at least; infinite for all tests, these in front.
        """
        passing = [test for test in self.lines if test not in self.failed]
        of_file = [test for test in passing if file in self.lines[test]]
        wanted = set(range(first, last + 1))
        of_lines = [test for test in of_file if wanted & set(self.lines[test][file])]
        chosen = self._quick_first(of_lines or of_file)
        if math.isinf(budget):
            return chosen + self._quick_first(set(passing) - set(chosen))
        spent = list(accumulate(self.seconds[test] for test in chosen))
        return [test for test, until in zip(chosen, spent, strict=True) if until <= budget] or chosen[:1]

    def _quick_first(self, tests: Iterable[str]) -> list[str]:
        return sorted(tests, key=lambda test: (self.seconds[test], test))


@dataclass(frozen=True)
class Outcome:
    """How the tests went: ``killed`` by the test ``by``, or survived."""

    killed: bool
    by: str
    seconds: float


def copy_tree(root: Path, to: Path) -> None:
    """Copy what the tests need; compiled files of Python are left behind."""
    for name in COPIED:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=shutil.ignore_patterns("__pycache__", "site", ".*"))
        elif source.exists():
            shutil.copy2(source, to / name)


def preload() -> None:
    """Import what is slow to import and has no faults, once."""
    for name in PRELOADED:
        try:
            importlib.import_module(name)
        except ImportError:
            print(f"{name} is not installed; tests that need it are skipped")
    for plugin in entry_points(group="pytest11"):
        plugin.load()
    gc.collect()
    gc.freeze()  # pytest collects garbage when it ends, and all of this would be looked through
    loaded = [name for name in sys.modules if name.split(".")[0] == "sj_robust"]
    if loaded:
        raise RuntimeError(f"sj_robust is imported already ({loaded[0]}): faults in the copy would not be seen")


def warm(tree: Path, paths: list[str]) -> None:
    """Compile the Python files without a fault; a faulty one has another time of change and is compiled anew."""
    _forked(tree, ["--collect-only", *paths], _Plugin(), None, compiled=True)


def measure(tree: Path, paths: list[str], skipped: list[str], package: str, cases: int | None = None) -> Coverage:
    """Run the tests once without a fault, of each at most so many cases, and note what they execute."""
    tracer = _Tracer(tree, package, cases)
    code, _, result = _forked(tree, [*paths, *(f"--ignore={path}" for path in skipped)], tracer, None)
    if result is None:
        raise RuntimeError(f"the tests of {package} ended with {code} before their end; see {tree / 'output'}")
    return Coverage(**result)


def attempt(tree: Path, tests: list[str], cpu_seconds: float) -> Outcome:
    """Run these tests in their order until one fails; longer than ``cpu_seconds`` counts as failed."""
    if not tests:
        return Outcome(False, "no test runs it", 0.0)
    files = list(dict.fromkeys(test.split("::")[0] for test in tests))
    code, seconds, result = _forked(tree, ["-x", *files], _Chosen(tests), cpu_seconds)
    if code == 0:
        return Outcome(False, "", seconds)
    if code == 5:  # pytest: no tests collected
        return Outcome(True, "no test is left", seconds)
    if code == -signal.SIGXCPU or code == -signal.SIGKILL:
        return Outcome(True, "time limit", seconds)
    return Outcome(True, (result or {}).get("by") or "import", seconds)


class _Plugin:
    """Sees the tests go by, from inside the forked process; ``result`` is what comes back."""

    def __init__(self) -> None:
        self.result: dict[str, Any] = {}

    def start(self) -> None:
        """Called in the new process."""


class _Chosen(_Plugin):
    def __init__(self, tests: list[str]) -> None:
        self._order = {test: i for i, test in enumerate(tests)}
        self.result = {"by": ""}

    def pytest_collection_modifyitems(self, items: list) -> None:
        items[:] = sorted(
            (item for item in items if item.nodeid in self._order), key=lambda item: self._order[item.nodeid]
        )

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.result["by"]:
            self.result["by"] = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.result["by"]:
            self.result["by"] = f"collection of {report.nodeid}"


class _Tracer(_Plugin):
    """Notes lines with ``sys.settrace``; those of a shared fixture count for every test that uses it."""

    def __init__(self, tree: Path, package: str, cases: int | None) -> None:
        self._cases = cases
        self._prefix = str(tree / package) + os.sep
        self._tree = tree
        self._hit: set[tuple[str, int]] = set()
        self._of_fixture: dict[str, set[tuple[str, int]]] = {}
        self._began = 0.0
        self.result = {"seconds": {}, "lines": {}, "failed": []}

    def start(self) -> None:
        sys.settrace(self._called)
        threading.settrace(self._called)

    def _called(self, frame: Any, event: str, argument: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(self._prefix) or not code.co_flags & inspect.CO_OPTIMIZED:
            return None  # of another folder, or a body of a module or class, which runs whenever it is imported
        return self._line

    def _line(self, frame: Any, event: str, argument: Any) -> Any:
        self._hit.add((frame.f_code.co_filename, frame.f_lineno))
        return self._line

    def pytest_collection_modifyitems(self, items: list) -> None:
        if self._cases is not None:
            drawn = sorted(items, key=lambda item: hashlib.sha256(item.nodeid.encode()).hexdigest())
            taken: Counter[str] = Counter()
            chosen = set()
            for item in drawn:
                test = item.nodeid.partition("[")[0]
                taken[test] += 1
                if taken[test] <= self._cases:
                    chosen.add(item)
            items[:] = [item for item in items if item in chosen]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._hit = set()
        self._began = _cpu_seconds()
        sys.settrace(self._called)  # torch.compile takes it away

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Any:
        before, self._hit = self._hit, set()
        try:
            return (yield)
        finally:
            if fixturedef.scope != "function":
                self._of_fixture.setdefault(fixturedef.argname, set()).update(self._hit)
            self._hit |= before

    def pytest_runtest_call(self, item: Any) -> None:
        for fixture in getattr(item, "fixturenames", ()):
            self._hit |= self._of_fixture.get(fixture, set())

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and report.nodeid not in self.result["failed"]:
            self.result["failed"].append(report.nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        lines: dict[str, list[int]] = {}
        for file, line in sorted(self._hit):
            lines.setdefault(str(Path(file).relative_to(self._tree)), []).append(line)
        self.result["lines"][nodeid] = lines
        self.result["seconds"][nodeid] = round(_cpu_seconds() - self._began, 3)


def _forked(
    tree: Path, arguments: list[str], plugin: _Plugin, cpu_seconds: float | None, *, compiled: bool = False
) -> tuple[int, float, dict[str, Any] | None]:
    """Exit code (of a signal, its negative), seconds and the plugin's result of pytest in a process of its own."""
    began = time.monotonic()
    answer = tree / "result.json"
    answer.unlink(missing_ok=True)
    process = os.fork()
    if process == 0:
        code = 70
        sys.dont_write_bytecode = not compiled
        try:
            code = _tests_in(tree, arguments, plugin, cpu_seconds)
            answer.write_text(json.dumps(plugin.result))
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 70
        finally:
            os._exit(code)
    deadline = began + (3600 if cpu_seconds is None else 60 + 12 * cpu_seconds)
    status = None
    while status is None:
        ended, seen = os.waitpid(process, os.WNOHANG)
        if ended:
            status = seen
        elif time.monotonic() > deadline:
            os.killpg(process, signal.SIGKILL)
            status = os.waitpid(process, 0)[1]
        else:
            time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)  # what the tests may have left running
    result = json.loads(answer.read_text()) if answer.exists() else None
    return os.waitstatus_to_exitcode(status), time.monotonic() - began, result


def _tests_in(tree: Path, arguments: list[str], plugin: _Plugin, cpu_seconds: float | None) -> int:
    os.setpgid(0, 0)
    output = os.open(tree / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if cpu_seconds is not None:
        limit = int(cpu_seconds + time.process_time()) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    os.chdir(tree)
    ours = Path(__file__).resolve().parents[1]
    sys.path[:] = [str(tree), str(tree / "tests"), *(path for path in sys.path if Path(path).resolve() != ours)]
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    if not importlib.util.find_spec("sj_robust").origin.startswith(str(tree)):
        raise RuntimeError("the copy of sj_robust is not the one that is imported")
    plugin.start()
    options = ["-q", "-p", "no:cacheprovider", "--no-header", "--tb=line", "--hypothesis-seed=0", f"--rootdir={tree}"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    return int(pytest.main([*options, *arguments], plugins=[plugin]))


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
