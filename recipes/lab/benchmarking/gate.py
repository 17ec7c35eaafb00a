"""Tests before anything is timed: a wrong kernel has no speed."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from lab import paths_for_children
from lab.benchmarking.race import TOO_LONG
from lab.benchmarking.results import TESTS, Results, Row

_OPERATOR = ("ops/test_dlif.py", "ops/test_cpp.py")
_ONE_PASS = ("ops/test_bn_dlif.py", "neuron/test_stage.py", "neuron/test_stage_seen.py")
_OF = {
    "neuron": _OPERATOR,
    "instruction_sets": _OPERATOR,
    "scaling": _OPERATOR,
    "training_step": (*_OPERATOR, *_ONE_PASS, "training/test_training_step.py"),
    "joint_step": ("ops/test_trains.py", "proofs/test_training_bounds.py"),
    "joint_scaling": ("ops/test_trains.py", "proofs/test_joint.py"),
    "verify": (*_OPERATOR, *_ONE_PASS, "ops/test_trains.py", "proofs/test_verification.py"),
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
    files = _OF.get(what, (*_OPERATOR, *_ONE_PASS))
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
