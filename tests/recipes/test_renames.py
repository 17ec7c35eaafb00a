"""A field that an option goes to is renamed in a copy of the tree: strict mypy must notice each.

``python tests/recipes/test_renames.py`` shows what mypy says to each.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RENAMED = [
    ("sj_robust/training/plan.py", "momentum", "recipes/adv_train.py"),
    ("sj_robust/training/objective.py", "rho", "recipes/adv_train.py"),
    ("sj_robust/models/build.py", "tau", "recipes/adv_train.py"),
    ("sj_robust/training/modes.py", "guard_margin", "recipes/adv_train.py"),
    ("sj_robust/data/images.py", "validation_fraction", "recipes/adv_train.py"),
    ("sj_robust/evaluation/assess.py", "draws", "recipes/evaluate.py"),
    ("recipes/adv_train.py", "kappa", "recipes/adv_train.py"),
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The sources and what mypy knows of them, so that only what a change reaches is looked at again."""
    folder = tmp_path_factory.mktemp("copy")
    copied(folder)
    assert complaints(folder) == ""
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("file", "name", "user"), RENAMED, ids=[f"{file}-{name}" for file, name, _ in RENAMED])
def test_a_renamed_field_is_noticed(copy, file, name, user):
    path = copy / file
    before = path.read_text(encoding="utf-8")
    path.write_text(renamed(before, name), encoding="utf-8")
    try:
        found = complaints(copy)
    finally:
        path.write_text(before, encoding="utf-8")
    assert re.search(rf'^{re.escape(user)}:\d+: error: .*"{name}"', found, re.MULTILINE), found


def copied(folder):
    """Copy what mypy looks at."""
    for name in ("sj_robust", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "configs"))
    shutil.copy(ROOT / "pyproject.toml", folder)


def renamed(text, name):
    """The name changed where it is declared, as a field or a parameter; its readers stay as they are."""
    pattern = rf"^( +){name}(: \w+(?: \| None)? = )"
    changed, count = re.subn(pattern, rf"\1{name}_renamed\2", text, count=1, flags=re.MULTILINE)
    assert count == 1, f"{name} is not declared any more; name another field"
    return changed


def complaints(folder):
    """What mypy says, empty where it finds nothing."""
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(folder / ".mypy_cache"), "--no-error-summary"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        copied(Path(name))
        print(f"nothing renamed: {complaints(Path(name)) or 'nothing found'}")
        for file, field, _ in RENAMED:
            path = Path(name) / file
            before = path.read_text(encoding="utf-8")
            path.write_text(renamed(before, field), encoding="utf-8")
            print(f"{field} of {file}:\n{complaints(Path(name))}")
            path.write_text(before, encoding="utf-8")
