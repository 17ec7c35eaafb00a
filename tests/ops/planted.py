"""Plants faults in the texts of kernels: what the tools for C++, CUDA and Triton share."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from mutation.mutate import ROOT, copy_tree

__all__ = ["ROOT", "copy_tree", "first_failure", "try_faults"]
Fault = tuple[str, str, str]
"""A file, a text that occurs in it once, and the faulty text in its place."""


def try_faults(
    faults: Mapping[str, Fault],
    noticed_by: Callable[[str, str], str | None],
    only: str,
    results: Path,
) -> None:
    """Print which check notices each fault, by what is wrong, of those with ``only`` in their
    names; store that of all.

    ``noticed_by`` takes a file and its faulty text, and returns None where the fault survives.
    """
    chosen = {wrong: fault for wrong, fault in faults.items() if only in wrong}
    for wrong, (file, text, _) in chosen.items():
        count = (ROOT / file).read_text(encoding="utf-8").count(text)
        assert count == 1, f"{wrong}: the text to change occurs {count} times"
    found: dict[str, str | None] = {}
    for wrong, (file, text, faulty) in chosen.items():
        found[wrong] = noticed_by(
            file, (ROOT / file).read_text(encoding="utf-8").replace(text, faulty)
        )
        print(f"{wrong}: {found[wrong] or 'survived'}", flush=True)
    noticed = sum(result is not None for result in found.values())
    print(f"{noticed} of {len(found)} noticed")
    if not only:
        results.write_text(
            json.dumps({"mutants": len(found), "noticed": noticed, "by": found}, indent=2) + "\n"
        )


def first_failure(tree: Path, *arguments: str, **environment: str) -> str | None:
    """The first test that fails in a copy of the tree, ``crash`` where pytest names none, None
    where none fails.
    """
    path = os.pathsep.join(str(tree / folder) for folder in ("", "tests", "recipes"))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *arguments],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )
    failed = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if run.returncode == 0:
        return None
    return failed[0].split(" - ")[0] if failed else "crash"
