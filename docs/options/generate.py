"""Pages of every option of each recipe: what ``--help-all`` says.

python docs/options/generate.py             # write docs/options/*.md
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
    said = f"What `{' '.join(command)}` prints. Written by `python docs/options/generate.py`."
    return f"# Options of {name}.py\n\n{said}\n\n```text\n{told.strip()}\n```\n"


if __name__ == "__main__":
    for name in RECIPES:
        Path(__file__).with_name(f"{name}.md").write_text(page(name), encoding="utf-8")
