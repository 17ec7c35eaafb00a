"""Writes a short report of finished trainings: commands, options, versions, epochs and figures.

python docs/results/trainings.py runs/a runs/b --output docs/results/certified/NAME.txt
"""

import argparse
import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from sj_robust.core.saved import write_whole
from sj_robust.training.journal import changed_options

RECIPES = Path(__file__).parents[2] / "recipes"
EPOCH = re.compile(r"^\S+ \S+ \S+ epoch \d+/\d+: .*$", re.MULTILINE)
COMMANDS = re.compile(r"^```text\n(.*?)\n```$", re.MULTILINE | re.DOTALL)
FIGURES = re.compile(r"^\S+ \S+ (\| accuracy, %.*?)^report\.json ", re.MULTILINE | re.DOTALL)
VERSIONS = ("python", "torch", "spikingjelly", "threads", "commit")


def main() -> None:
    """Write the reports of all runs into one file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of adv_train.py")
    parser.add_argument("--output", required=True, type=Path, help="the text file")
    options = parser.parse_args()
    texts = [report(run) for run in options.runs]
    write_whole(options.output, "\n".join(texts))


def report(run: Path) -> str:
    """The report of one run."""
    log = (run / "log.txt").read_text(encoding="utf-8")
    figures = FIGURES.findall(log)
    epochs = EPOCH.findall(log)
    if not figures or not epochs:
        raise SystemExit(f"{run} is not finished; finish it with adv_train.py --resume")
    commands = COMMANDS.findall((run / "README.md").read_text(encoding="utf-8"))[0]
    content = json.loads((run / "report.json").read_text(encoding="utf-8"))
    options = changed_options(content["configuration"], defaults())
    environment = ", ".join(f"{name} {values(log, name)}" for name in VERSIONS)
    return "\n".join([commands, f"options: {options}", environment, *epochs, figures[-1]])


def defaults() -> dict[str, Any]:
    """All options of adv_train.py as they are if none is given."""
    sys.path.insert(0, str(RECIPES))
    recipe, command_line = map(importlib.import_module, ("adv_train", "lab.command_line"))
    sys.path.remove(str(RECIPES))
    found: dict[str, Any] = command_line.plain(recipe.Options())
    return found


def values(log: str, name: str) -> str:
    """What the environment said each time that the run was started."""
    found = re.findall(rf"^  {name}: (.*)$", log, re.MULTILINE)
    return found[0] if len(set(found)) == 1 else " then ".join(found)


if __name__ == "__main__":
    main()
