"""Fields that options go to are renamed in a copy of the tree: strict mypy must notice each of
them.
"""

import re
import shutil
import subprocess
import sys
from shlex import split

import pytest
from launch import ROOT

RENAMED = {  # where it is declared, its name, and the recipe that wires it
    "sj_robust/training/plan.py": ("momentum", "recipes/adv_train.py"),
    "sj_robust/training/objective.py": ("rho", "recipes/adv_train.py"),
    "sj_robust/models/build.py": ("tau", "recipes/adv_train.py"),
    "sj_robust/training/certified.py": ("surrogate_width", "recipes/adv_train.py"),
    "sj_robust/data/images.py": ("validation_fraction", "recipes/adv_train.py"),
    "sj_robust/evaluation/request.py": ("draws", "recipes/evaluate.py"),
    "recipes/adv_train.py": ("kappa", "recipes/adv_train.py"),
}


@pytest.mark.slow
def test_renamed_fields_are_noticed(tmp_path):
    for name in ("sj_robust", "recipes"):
        shutil.copytree(
            ROOT / name,
            tmp_path / name,
            ignore=shutil.ignore_patterns("__pycache__", "*.so", "configs"),
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for file, (name, _) in RENAMED.items():
        text = (tmp_path / file).read_text(encoding="utf-8")
        pattern = rf"^( +){name}(: \w+(?: \| None)? = )"
        text, count = re.subn(pattern, rf"\1{name}_renamed\2", text, count=1, flags=re.MULTILINE)
        assert count == 1, f"{name} is not declared any more; name another field"
        (tmp_path / file).write_text(text, encoding="utf-8")
    # Packages from elsewhere are left out, which would take most of the time.
    command = [
        sys.executable,
        *split("-m mypy --cache-dir"),
        str(tmp_path / "cache"),
        "--no-site-packages",
    ]
    command += sorted({user for _, user in RENAMED.values()})
    found = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False
    ).stdout
    for name, user in RENAMED.values():
        assert re.search(rf'^{re.escape(user)}:\d+: error: .*"{name}"', found, re.MULTILINE), (
            f"{name}\n{found}"
        )
