"""Plants small faults in the Python files of a package and records which its tests notice; run by
hand.

``python tests/mutation/mutate.py --package perturbation --sample 60`` takes minutes and writes
``scores.json`` beside this file. The faults go into a copy of the tree, never into the tree itself.
What survived and why is written by hand into ``survivors.json``.
"""

import argparse
import contextlib
import gc
import importlib
import importlib.util
import json
import multiprocessing
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from importlib.metadata import entry_points, version
from itertools import accumulate
from pathlib import Path
from typing import Any

import coverage
import pytest

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
from mutation.mutants import Mutant, mutants_of, sample

ROOT = Path(__file__).resolve().parents[2]
SCORES = Path(__file__).with_name("scores.json")
PACKAGES: dict[
    str, dict[str, Any]
] = {  # folder of sj_robust: tests that answer for it, and those left out
    "perturbation": {
        "tests": [
            "tests/perturbation",
            "tests/neuron/test_stage.py",
            "tests/evaluation/test_pictures.py",
            "tests/test_shown.py",
            "sj_robust/perturbation",
        ]
    },
    "proofs": {"tests": ["tests/proofs", "tests/test_shown.py", "sj_robust/proofs"]},
    "ops": {
        "tests": ["tests/ops", "tests/neuron/test_stage.py", "sj_robust/ops"],
        "text": "triton_kernel.py",  # tests/ops/triton/mutate.py plants faults in it
        "left out": [  # of the texts of kernels, not of Python
            "tests/ops/cuda/test_shim.py",
            "tests/ops/cuda/test_nvrtc.py",
            "tests/ops/triton/test_ahead_of_time.py",
        ],
        "in child processes": {  # file, and who runs it out of sight
            "sj_robust/ops/heap.py": "tests/ops/test_heap.py",
            "sj_robust/ops/dlif/triton_launch.py": "tests/ops/triton/test_interpreter.py",
            "sj_robust/ops/bn_dlif/triton_launch.py": "tests/ops/triton/test_interpreter.py",
        },
    },
    "attacks": {"tests": ["tests/attacks", "sj_robust/attacks"]},
    "estimators": {"tests": ["tests/estimators", "sj_robust/estimators"]},
}
PRELOADED = (  # none of these may import sj_robust: every process imports the faulty copy itself
    "torch",
    "torchvision",
    "spikingjelly.activation_based.neuron",
    "spikingjelly.activation_based.monitor",
    "spikingjelly.activation_based.model",
    "sklearn.datasets",
    "matplotlib.pyplot",
    "_pytest.doctest",
)
FACTOR, FLOOR = (
    2,
    5,
)  # a faulty run may take so many times the CPU seconds of the clean one, and so many more
MEMORY = 8 << 30  # bytes of data that a faulty process may ask for


def main(arguments: list[str] | None = None) -> None:
    """Read the options, try the faults, write the scores."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--package", required=True, choices=PACKAGES, help="folder of sj_robust to plant faults in"
    )
    parser.add_argument(
        "--sample", type=int, default=60, help="number of faults, at least one per file (60)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which sample (0)")
    parser.add_argument(
        "--budget",
        type=float,
        default=8,
        help="CPU seconds of tests per fault, quick ones first (8)",
    )
    parser.add_argument(
        "--only",
        metavar="TEXT",
        help="faults of the sample with TEXT in their name; stores nothing",
    )
    options = parser.parse_args(arguments)
    package, table = f"sj_robust/{options.package}", PACKAGES[options.package]
    os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        paths = [
            path
            for path in sorted((tree / package).rglob("*.py"))
            if path.name != table.get("text")
        ]
        files = [(str(path.relative_to(tree)), path.read_bytes()) for path in paths]
        every = [mutant for name, source in files for mutant in mutants_of(name, source)]
        chosen = [
            one
            for one in sample(every, options.sample, options.seed)
            if (options.only or "") in one.key
        ]
        preload()
        print(f"running the tests of {package} once without a fault", flush=True)
        clean = measure(tree, table, package)
        if clean.failed:
            print(
                f"{len(clean.failed)} test(s) fail without a fault and are left out: "
                f"{clean.failed[:5]}"
            )
        outcomes = [
            attempt(tree, mutant, clean.selected(mutant, options.budget), clean)
            for mutant in chosen
        ]
    run = circumstances(package, table) | {
        "seed": options.seed,
        "budget": options.budget,
        "possible": len(every),
    }
    survived = [mutant.key for mutant, by in zip(chosen, outcomes, strict=True) if not by]
    killed = len(chosen) - len(survived)
    run |= {
        "mutants": len(chosen),
        "killed": killed,
        "seconds": round(time.monotonic() - began),
        "survived": survived,
    }
    if not options.only:
        scores = json.loads(SCORES.read_text()) if SCORES.exists() else {}
        scores[options.package] = run
        SCORES.write_text(json.dumps(scores, indent=2) + "\n")
    print(f"{options.package}: {killed} of {len(chosen)} noticed, {len(survived)} survived")


@dataclass
class Clean:
    """What the tests of a package run without a fault."""

    seconds: dict[str, float] = field(default_factory=dict)
    """CPU seconds of each test, its fixtures included."""
    lines: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """For each test the lines that it executes, by file."""
    failed: list[str] = field(default_factory=list)
    """Tests that do not pass without a fault."""

    def selected(self, mutant: Mutant, budget: float) -> list[str]:
        """Tests that execute the fault's lines, or if none does any line of its file, quick ones
        first.

        Together they take at most ``budget`` CPU seconds, but for a lone one.
        Lines outside of functions are executed by whatever imports the file first, which says
        nothing.
        """
        of_file = [
            test
            for test in self.lines
            if test not in self.failed and mutant.file in self.lines[test]
        ]
        wanted = set(range(mutant.line, mutant.end_line + 1)) if mutant.in_function else set()
        of_lines = [test for test in of_file if wanted & set(self.lines[test][mutant.file])]
        chosen = sorted(of_lines or of_file, key=lambda test: (self.seconds[test], test))
        spent = list(accumulate(self.seconds[test] for test in chosen))
        return [
            test for test, until in zip(chosen, spent, strict=True) if until <= budget
        ] or chosen[:1]


def measure(tree: Path, table: dict[str, Any], package: str) -> Clean:
    """Run the tests once without a fault and note what they execute."""
    tests = [*table["tests"], *(f"--ignore={path}" for path in table.get("left out", []))]
    code, result = forked(tree, tests, Measured(tree / package, tree), None)
    if result is None:
        raise RuntimeError(
            f"the tests of {package} ended with {code} before their end; see {tree / 'output'}"
        )
    clean = Clean(**result)
    for file, of_tests in table.get("in child processes", {}).items():
        every_line = list(range(1, 1 + len((tree / file).read_text(encoding="utf-8").splitlines())))
        for test in clean.lines:
            if test.startswith(of_tests):
                clean.lines[test][file] = every_line
    return clean


def attempt(tree: Path, mutant: Mutant, tests: list[str], clean: Clean) -> str:
    """The test that notices a fault, or another reason why it counts as noticed; empty if it
    survives.
    """
    path = tree / mutant.file
    source, status, began = path.read_bytes(), path.stat(), time.monotonic()
    path.write_bytes(mutant.applied(source))
    try:
        limit = FLOOR + FACTOR * sum(clean.seconds[test] for test in tests)
        files = list(dict.fromkeys(test.split("::")[0] for test in tests))
        code, result = forked(tree, ["-x", *files], Chosen(tests), limit) if tests else (0, {})
    finally:
        path.write_bytes(source)
        os.utime(
            path, ns=(status.st_atime_ns, status.st_mtime_ns)
        )  # the compiled file of the clean run holds again
    by = "" if code == 0 else (result or {}).get("by") or "import"
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        by = "time limit"
    said = f"killed by {by}" if by else "survived" if tests else "survived; no test runs it"
    print(f"{time.monotonic() - began:6.1f} s  {mutant.key} => {said}", flush=True)
    return by


def circumstances(package: str, table: dict[str, Any]) -> dict[str, Any]:
    """What the scores belong to."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()

    return {
        "commit": git("rev-parse", "HEAD")[:12],
        "uncommitted changes": bool(git("status", "--porcelain", "--", package, *table["tests"])),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": version("torch"),
        "spikingjelly": version("spikingjelly"),
    }


def copy_tree(to: Path) -> None:
    """Copy what git knows, as it lies here, and the compiled kernel."""
    known = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\0")
    kernels = [str(path.relative_to(ROOT)) for path in (ROOT / "sj_robust").rglob("*.so")]
    for name in [name for name in known if name and (ROOT / name).is_file()] + kernels:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, to / name)


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
    if "sj_robust" in sys.modules:
        raise RuntimeError("sj_robust is imported already: faults in the copy would not be seen")


class Chosen:
    """Runs these tests in their order, and says in ``result`` which one failed."""

    def __init__(self, tests: list[str]) -> None:
        self._order = {test: i for i, test in enumerate(tests)}
        self.result = {"by": ""}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = sorted(
            (one for one in items if one.nodeid in self._order),
            key=lambda one: self._order[one.nodeid],
        )

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.result["by"]:
            self.result["by"] = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        self.pytest_runtest_logreport(report)


class Measured:
    """Notes in ``result`` what a Clean holds; lines of a shared fixture count for every test that
    uses it.
    """

    def __init__(self, package: Path, tree: Path) -> None:
        self._tree = tree
        self._coverage = coverage.Coverage(data_file=None, config_file=False, source=[str(package)])
        self._contexts: dict[str, list[str]] = {}
        self._now, self._began = "", 0.0
        self.result: dict[str, Any] = {"seconds": {}, "lines": {}, "failed": []}

    def _switch(self, context: str) -> None:
        self._now = context
        self._coverage.switch_context(context)

    def pytest_sessionstart(self) -> None:
        self._coverage.start()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._switch(nodeid)
        self._began = cpu_seconds()

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Any:
        before = self._now
        if fixturedef.scope != "function":
            self._switch(f"fixture {fixturedef.argname}")
        try:
            return (yield)
        finally:
            self._switch(before)

    def pytest_runtest_call(self, item: Any) -> None:
        self._contexts[item.nodeid] = [
            item.nodeid,
            *(f"fixture {name}" for name in getattr(item, "fixturenames", ())),
        ]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and report.nodeid not in self.result["failed"]:
            self.result["failed"].append(report.nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.result["seconds"][nodeid] = round(cpu_seconds() - self._began, 3)

    def pytest_sessionfinish(self) -> None:
        self._coverage.stop()
        data, executed = self._coverage.get_data(), defaultdict(lambda: defaultdict(list))
        for file in data.measured_files():
            for line, contexts in data.contexts_by_lineno(file).items():
                for context in contexts:
                    executed[context][str(Path(file).relative_to(self._tree))].append(line)
        for test, contexts in self._contexts.items():
            lines = self.result["lines"][test] = {}
            for file, found in (pair for context in contexts for pair in executed[context].items()):
                lines[file] = lines.get(file, []) + found


def forked(
    tree: Path, arguments: list[str], plugin: Any, cpu_seconds: float | None
) -> tuple[int, dict[str, Any] | None]:
    """Exit code (of a signal, its negative) and the plugin's result of pytest in a process of its
    own.

    The process is forked from this one, where torch and SpikingJelly are imported already.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=tests_in, args=(tree, arguments, plugin, cpu_seconds, there))
    process.start()
    there.close()
    result = None
    with contextlib.suppress(EOFError):
        result = (
            here.recv()
            if here.poll(3600 if cpu_seconds is None else 60 + 12 * cpu_seconds)
            else None
        )
    process.join(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # it, and what the tests may have left running
    process.join()
    return (result or {}).pop("code", process.exitcode), result


def tests_in(
    tree: Path, arguments: list[str], plugin: Any, cpu_seconds: float | None, answer: Any
) -> None:
    """Run pytest in the copy of the tree; in the forked process."""
    os.setpgid(0, 0)
    output = os.open(tree / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.dont_write_bytecode = (
        cpu_seconds is not None
    )  # a faulty file is compiled anew, having another time of change
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    if cpu_seconds is not None:
        limit = int(cpu_seconds + time.process_time()) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    os.chdir(tree)
    ours = ROOT / "tests"
    sys.path[:] = [
        str(tree),
        str(tree / "tests"),
        *(path for path in sys.path if Path(path).resolve() not in (ours, ROOT)),
    ]
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])
    if not importlib.util.find_spec("sj_robust").origin.startswith(str(tree)):
        raise RuntimeError("the copy of sj_robust is not the one that is imported")
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--no-header",
        "--tb=line",
        "--hypothesis-seed=0",
        f"--rootdir={tree}",
    ]
    options += [
        "-W",
        "ignore::pytest.PytestAssertRewriteWarning",
        "-m",
        "",
    ]  # tests of every marker
    code = int(pytest.main([*options, *arguments], plugins=[plugin]))
    answer.send({"code": code, **plugin.result})
    answer.close()
    os._exit(code)


def cpu_seconds() -> float:
    """Of this process and of those it has waited for."""
    return sum(os.times()[:4])


if __name__ == "__main__":
    main()
