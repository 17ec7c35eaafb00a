"""The tool on a small tree whose faults are known, and the stored scores."""

import json
import subprocess
import sys

import pytest
from mutation.mutants import mutants_of, sample
from mutation.mutate import PACKAGES, ROOT, SCORES

CODE = '''\
"""Adds up."""


def at_least(x, low):
    """Not under 3."""
    if x < low:
        return low
    return x


def empty(stack):
    while stack:
        stack.pop()
    return stack


def untested(n):
    return n + 1
'''
TESTS = """\
from sj_robust.toy.numbers import at_least, empty

def test_at_least():
    assert (at_least(1, 2), at_least(3, 2)) == (2, 3)

def test_empty():
    assert empty([1, 2]) == []
"""
COMMAND = """\
from pathlib import Path
from mutation import mutate
mutate.ROOT, mutate.SCORES, mutate.FLOOR, mutate.PRELOADED = Path.cwd(), Path("scores.json"), 2, ()
mutate.PACKAGES["toy"] = {"tests": ["tests/toy"]}
mutate.main(["--package", "toy", "--sample", "1000"])
"""


@pytest.mark.slow
def test_every_fault_of_a_tree_comes_to_what_it_must(tmp_path):
    tree = tmp_path
    for name, text in {
        "sj_robust/__init__.py": "",
        "sj_robust/toy/__init__.py": "",
        "sj_robust/toy/numbers.py": CODE,
        "tests/toy/test_numbers.py": TESTS,
    }.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
    subprocess.run(["git", "add", "."], cwd=tree, check=True)
    result = subprocess.run(
        [sys.executable, "-c", COMMAND],
        cwd=tree,
        env={"PYTHONPATH": str(ROOT / "tests"), "PATH": "/usr/bin:/bin", "TMPDIR": str(tree)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [
        line.split("numbers.py::", 1)[1] for line in result.stdout.splitlines() if " => " in line
    ]
    found, by = (
        dict(line.split(" => ") for line in lines),
        "killed by tests/toy/test_numbers.py::test_",
    )
    assert found == {
        # where both are equal it does not matter
        "at_least: comparison: x < low -> (x <= low)": "survived",
        "at_least: comparison: x < low -> (x >= low)": f"{by}at_least",
        "at_least: wrong return: low -> None": f"{by}at_least",
        "at_least: wrong return: x -> None": f"{by}at_least",
        "empty: condition negated: stack -> (not (stack))": f"{by}empty",
        "empty: statement removed: stack.pop() -> pass": "killed by time limit",
        "empty: wrong return: stack -> None": f"{by}empty",
        "untested: constant: 1 -> 0": "survived",
        "untested: constant: 1 -> 2": "survived",
        "untested: operator: n + 1 -> (n - 1)": "survived",
        "untested: wrong return: n + 1 -> None": "survived",
    }
    assert (tree / "sj_robust/toy/numbers.py").read_text() == CODE, (
        "the tree itself stays as it was"
    )
    run = json.loads((tree / "scores.json").read_text())["toy"]
    assert (run["mutants"], run["killed"], run["possible"]) == (11, 6, 11)
    survived = {name for name, said in found.items() if said == "survived"}
    assert set(run["survived"]) == {f"sj_robust/toy/numbers.py::{name}" for name in survived}


def test_a_sample_has_a_share_of_every_file_and_keeps_its_order_when_code_is_added():
    small, large = b"def f(x):\n    return x\n", b"def f(x):\n    return x + 1 < 2 * x\n"
    mutants = mutants_of("small.py", small) + mutants_of("large.py", large)
    chosen = sample(mutants, 4, seed=1)
    assert [mutant.file for mutant in chosen] == ["large.py"] * 3 + ["small.py"]
    assert sample(mutants, 1000, seed=1) != mutants
    assert set(sample(mutants, 1000, seed=1)) == set(mutants)
    assert sample(mutants, 4, seed=1) == chosen
    assert sample(mutants, 4, seed=2) != chosen
    moved = mutants_of("small.py", small) + mutants_of("large.py", b"A = B\n\n" + large)
    assert [mutant.key for mutant in sample(moved, 4, seed=1)] == [mutant.key for mutant in chosen]


def test_tests_named_for_a_package_exist():
    for table in PACKAGES.values():
        children = table.get("in child processes", {})
        for path in (*table["tests"], *table.get("left out", []), *children, *children.values()):
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize("package", json.loads(SCORES.read_text()))
def test_stored_scores_add_up_and_are_those_of_the_page_and_every_survivor_is_explained(package):
    run = json.loads(SCORES.read_text())[package]
    assert run["killed"] + len(run["survived"]) == run["mutants"]
    noticed = f"{run['killed']} ({100 * run['killed'] / run['mutants']:.0f} %)"
    row = [package, f"{run['mutants']} of {run['possible']}", noticed, str(len(run["survived"]))]
    assert f"| {' | '.join(row)} |" in (ROOT / "docs/mutation.md").read_text(encoding="utf-8")
    reasons = json.loads(SCORES.with_name("survivors.json").read_text())[package]
    assert reasons.keys() == set(run["survived"])
    for reason in reasons.values():
        assert reason.split(": ")[0] in (
            "same result",
            "only speed",
            "only text",
            "only looks",
            "not tested",
        ), reason
