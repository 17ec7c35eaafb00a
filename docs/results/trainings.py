"""Keeps of trainings what shows that they took place: commands, versions, epochs and figures.

python docs/results/trainings.py runs/a runs/b --output docs/results/certified/NAME.txt
"""

import argparse
import re
from pathlib import Path

from sj_robust.core.saved import write_whole

EPOCH = re.compile(r"^\S+ \S+ \S+ epoch \d+/\d+: .*$", re.MULTILINE)
COMMANDS = re.compile(r"^```text\n(.*?)\n```$", re.MULTILINE | re.DOTALL)
FIGURES = re.compile(r"^\S+ \S+ (\| accuracy, %.*?)^report\.json ", re.MULTILINE | re.DOTALL)
VERSIONS = ("python", "torch", "spikingjelly", "threads", "commit")


def main() -> None:
    """One text of all runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of adv_train.py")
    parser.add_argument("--output", required=True, type=Path, help="the text file")
    options = parser.parse_args()
    texts = [report(run) for run in options.runs]
    write_whole(options.output, "\n".join(texts))


def report(run: Path) -> str:
    """What is kept of a finished run."""
    log = (run / "log.txt").read_text(encoding="utf-8")
    figures = FIGURES.findall(log)
    if not figures:
        raise SystemExit(f"{run} has no figures yet; continue it with --resume")
    commands = COMMANDS.findall((run / "README.md").read_text(encoding="utf-8"))[0]
    environment = ", ".join(f"{name} {found(log, name)}" for name in VERSIONS)
    return "\n".join([commands, environment, *EPOCH.findall(log), figures[-1]])


def found(log: str, name: str) -> str:
    """The value of an environment's line, or of each process that ran a part, in order."""
    values = re.findall(rf"^  {name}: (.*)$", log, re.MULTILINE)
    return " then ".join(dict.fromkeys(values))


if __name__ == "__main__":
    main()
