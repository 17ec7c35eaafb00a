"""The command: which faults of which package, tried one by one, and the file of scores."""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mutation import trial
from mutation.mutants import Mutant, all_mutants, sample

ROOT = Path(__file__).resolve().parents[2]
SCORES = Path(__file__).with_name("scores.json")
SURVIVORS = Path(__file__).with_name("survivors.json")
PACKAGES: dict[str, dict[str, Any]] = {  # folder of sj_robust: tests that answer for it, and those left out
    "perturbation": {"tests": ["tests/perturbation", "tests/neuron/test_fusion.py", "sj_robust/perturbation"]},
    "stability": {"tests": ["tests/stability", "sj_robust/stability"]},
    "ops": {
        "tests": ["tests/ops", "tests/neuron/test_fusion.py", "sj_robust/ops"],
        "left out": ["tests/ops/cuda/test_shim.py", "tests/ops/cuda/test_nvrtc.py"],  # of the CUDA text, not of Python
        "in child processes": {"sj_robust/ops/heap.py": "tests/ops/test_heap.py"},  # file, and who runs it out of sight
    },
    "attacks": {"tests": ["tests/attacks", "sj_robust/attacks"]},
}
FACTOR, FLOOR = 2, 5  # a faulty run may take so many times the CPU seconds of the traced clean one, and so many more


def main(arguments: list[str] | None = None) -> None:
    """Read the options, try the faults, write the scores."""
    options = _options(arguments)
    package = f"sj_robust/{options.package}"
    table = PACKAGES[options.package]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("MPLBACKEND", "Agg")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        trees = [Path(folder) / str(i) for i in range(options.jobs)]
        for tree in trees:
            tree.mkdir()
            trial.copy_tree(ROOT, tree)
        every = all_mutants(sources(trees[0], package))
        chosen = _chosen(every, options)
        trial.preload()
        for tree in trees:
            trial.warm(tree, table["tests"])
        kept = _kept(trees[0], options)
        coverage = _coverage(trees[0], table, package, kept, options.cases)
        if coverage.failed:
            print(f"{len(coverage.failed)} test(s) fail without a fault and are left out: {coverage.failed[:5]}")
        done = kept / ("thorough" if options.thorough else f"{options.budget:g}")
        outcomes = try_all(trees, chosen, coverage, budget=math.inf if options.thorough else options.budget, done=done)
    result = summary(chosen, outcomes)
    if options.again:
        result = merged(_stored(options), result, explained(options.package))
    seconds = round(time.monotonic() - began)
    run = {**_circumstances(options, package), "possible": len(every), **result, "seconds": seconds}
    _store(options.output, options.package, options.label, run)
    print(f"{options.package}: {run['killed']} of {run['mutants']} noticed, {len(run['survived'])} survived")


def try_all(
    trees: list[Path], mutants: list[Mutant], coverage: trial.Coverage, *, budget: float, done: Path
) -> list[trial.Outcome]:
    """What became of each fault, tried in as many processes as there are copies of the tree.

    Args:
        trees: The copies.
        mutants: The faults.
        coverage: What the tests execute.
        budget: CPU seconds of tests for one fault; infinite for all tests of the package, the selected ones first.
        done: Folder of what earlier runs on the same code came to, so that one that was cut off goes on.
    """
    done.mkdir(exist_ok=True)
    work = [(mutant, coverage, budget, done) for mutant in mutants]
    if len(trees) == 1:
        return [_try(trees[0], *one) for one in work]
    context = multiprocessing.get_context("fork")
    free = context.Queue()
    for tree in trees:
        free.put(tree)
    with context.Pool(len(trees), _take_tree, (free,)) as pool:
        return pool.starmap(_try_in_own_tree, work, chunksize=1)


def summary(mutants: list[Mutant], outcomes: list[trial.Outcome]) -> dict[str, Any]:
    """Numbers per file, the checks that noticed, and the faults that survived."""
    files: dict[str, dict[str, Any]] = {}
    survived = []
    for mutant, outcome in zip(mutants, outcomes, strict=True):
        of_file = files.setdefault(mutant.file, {"mutants": 0, "killed": 0})
        of_file["mutants"] += 1
        of_file["killed"] += outcome.killed
        if not outcome.killed:
            survived.append({"key": mutant.key, "line": mutant.line, "kind": mutant.kind, "note": outcome.by})
    killed = sum(outcome.killed for outcome in outcomes)
    return {
        "mutants": len(mutants),
        "killed": killed,
        "score": round(killed / max(len(mutants), 1), 3),
        "files": files,
        "survived": survived,
    }


def merged(stored: dict[str, Any], again: dict[str, Any], known: dict[str, str]) -> dict[str, Any]:
    """The numbers of a stored run, with what its survivors came to when those not yet explained were tried again."""
    files = {file: dict(numbers) for file, numbers in stored["files"].items()}
    for file, numbers in again["files"].items():
        files[file]["killed"] += numbers["killed"]
    kept = [entry for entry in stored["survived"] if entry["key"] in known]
    killed = stored["killed"] + again["killed"]
    survived = kept + again["survived"]
    mutants = killed + len(survived)
    return {
        "mutants": mutants,
        "killed": killed,
        "score": round(killed / mutants, 3),
        "gone": stored["mutants"] - mutants,  # the code they were planted in has changed
        "files": files,
        "survived": survived,
    }


def explained(package: str) -> dict[str, str]:
    """Faults that nothing need notice, and why: key and reason, written by hand."""
    reasons: dict[str, str] = json.loads(SURVIVORS.read_text()).get(package, {})
    return reasons


def sources(tree: Path, package: str) -> Iterator[tuple[str, bytes]]:
    """The Python files of a package: path from the root, and text."""
    for path in sorted((tree / package).rglob("*.py")):
        yield str(path.relative_to(tree)), path.read_bytes()


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(sys.modules["__main__"].__doc__ or "").split("\n")[0])
    parser.add_argument("--package", required=True, choices=PACKAGES, help="folder of sj_robust to plant faults in")
    parser.add_argument("--sample", type=int, default=60, help="number of faults, at least one per file (60)")
    parser.add_argument("--seed", type=int, default=0, help="which sample (0)")
    parser.add_argument("--jobs", type=int, default=1, help="faults tried at a time (1)")
    parser.add_argument("--label", default="after", help="name of this run in the file of scores (after)")
    parser.add_argument("--output", type=Path, default=SCORES, help="file of scores (scores.json beside this file)")
    parser.add_argument(
        "--again", metavar="LABEL", help="only the unexplained survivors of the run of this name, to see new tests work"
    )
    parser.add_argument("--budget", type=float, default=8, help="CPU seconds of tests per fault, quick tests first (8)")
    parser.add_argument("--cases", type=int, help="of each test at most so many cases, drawn by chance (all)")
    parser.add_argument("--thorough", action="store_true", help="all tests of the package, whatever they execute")
    return parser.parse_args(arguments)


def _chosen(every: list[Mutant], options: argparse.Namespace) -> list[Mutant]:
    if not options.again:
        return sample(every, options.sample, options.seed)
    keys = {entry["key"] for entry in _stored(options)["survived"]} - explained(options.package).keys()
    return [mutant for mutant in every if mutant.key in keys]


def _stored(options: argparse.Namespace) -> dict[str, Any]:
    return json.loads(options.output.read_text())[options.package][options.again]


def _kept(tree: Path, options: argparse.Namespace) -> Path:
    """Folder for what was found out about this very code and these tests, in the system's temporary folder."""
    digest = hashlib.sha256(version("spikingjelly").encode() + Path(trial.__file__).read_bytes())
    for folder in ("sj_robust", "tests"):
        for path in sorted((tree / folder).rglob("*.py")):
            if path.parent != tree / "tests" / "mutation":
                digest.update(path.read_bytes())
    folder = (
        Path(tempfile.gettempdir())
        / f"mutation-of-{options.package}-{options.cases or 'all'}-{digest.hexdigest()[:16]}"
    )
    folder.mkdir(exist_ok=True)
    return folder


def _coverage(tree: Path, table: dict[str, Any], package: str, kept: Path, cases: int | None) -> trial.Coverage:
    """What the tests execute, measured once."""
    file = kept / "coverage.json"
    if not file.exists():
        print(f"running the tests of {package} once without a fault", flush=True)
        coverage = trial.measure(tree, table["tests"], table.get("left out", []), package, cases)
        file.write_text(json.dumps(vars(coverage)))
    coverage = trial.Coverage(**json.loads(file.read_text()))
    for source, tests in table.get("in child processes", {}).items():
        every_line = list(range(1, 1 + len((tree / source).read_text(encoding="utf-8").splitlines())))
        for test, lines in coverage.lines.items():
            if test.startswith(tests):
                lines[source] = every_line
    return coverage


def _try(tree: Path, mutant: Mutant, coverage: trial.Coverage, budget: float, done: Path) -> trial.Outcome:
    before = done / f"{hashlib.sha256(mutant.key.encode()).hexdigest()[:16]}.json"
    if before.exists():
        return trial.Outcome(**json.loads(before.read_text()))
    path = tree / mutant.file
    source, status = path.read_bytes(), path.stat()
    path.write_bytes(mutant.applied(source))
    try:
        tests = coverage.selected(mutant.file, mutant.line, mutant.end_line, budget)
        limit = FLOOR + FACTOR * sum(coverage.seconds[test] for test in tests)
        outcome = trial.attempt(tree, tests, limit)
    finally:
        path.write_bytes(source)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    before.write_text(json.dumps(vars(outcome)))
    what = f"killed by {outcome.by}" if outcome.killed else f"survived; {outcome.by}".rstrip("; ")
    print(f"{outcome.seconds:6.1f} s  {mutant.key} => {what}", flush=True)
    return outcome


_OWN_TREE: list[Path] = []


def _take_tree(free: Any) -> None:
    _OWN_TREE.append(free.get())


def _try_in_own_tree(mutant: Mutant, coverage: trial.Coverage, budget: float, done: Path) -> trial.Outcome:
    return _try(_OWN_TREE[0], mutant, coverage, budget, done)


def _circumstances(options: argparse.Namespace, package: str) -> dict[str, Any]:
    changed = _git("status", "--porcelain", "--", package, *PACKAGES[options.package]["tests"])
    return {
        "commit": _git("rev-parse", "HEAD")[:12],
        "uncommitted changes": bool(changed),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": version("torch"),
        "spikingjelly": version("spikingjelly"),
        "seed": options.seed,
        "again": options.again,
        "cases": options.cases,
        "budget": None if options.thorough else options.budget,
    }


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def _store(output: Path, package: str, label: str, run: dict[str, Any]) -> None:
    scores = json.loads(output.read_text()) if output.exists() else {}
    scores.setdefault(package, {})[label] = run
    output.write_text(json.dumps(scores, indent=2) + "\n")
