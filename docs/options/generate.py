"""Pages of every option of each recipe: what ``--help-all`` says. The build of the site writes them
(docs/conf.py); they are not kept.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECIPES = ("adv_train", "evaluate", "sweep", "figures", "benchmark")


def page(name):
    """The page of one recipe."""
    command = ["python", f"recipes/{name}.py", "--help-all"]
    environment = os.environ | {"COLUMNS": "100", "PYTHONIOENCODING": "utf-8", "NO_COLOR": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, *command[1:]],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    _, _, told = done.stdout.partition("\n\n")  # without the usage
    said = f"What `{' '.join(command)}` prints."
    return f"# Options of {name}.py\n\n{said}\n\n```text\n{told.strip()}\n```\n"


def write():
    """Write all pages; one that has not changed keeps its time, by which Sphinx knows it."""
    for name in RECIPES:
        path = Path(__file__).with_name(f"{name}.md")
        text = page(name)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
