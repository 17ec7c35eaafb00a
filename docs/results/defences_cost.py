"""What training with each defence of the study costs: processor time of an epoch relative to that
without a defence.

python docs/results/defences_cost.py --data-root data

Every cell of defences_fashion_mnist_sweep.yaml is trained for one and for three epochs on a few
images, all cells in turn, three times; half the difference is an epoch without what a run does
once. Writes defences/cost.csv. About 15 minutes on one core.
"""

import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from rows import write_rows

ROOT = Path(__file__).parents[2]
SWEEP = ROOT / "recipes" / "configs" / "sweeps" / "defences_fashion_mnist_sweep.yaml"
TABLE = Path(__file__).with_name("defences") / "cost.csv"
PLAIN = "undefended"
REPEATS = 3
EPOCHS = (1, 3)
SHORT = {"train_limit": 640, "test_limit": 10, "select": "clean", "reference": False}


@dataclass(frozen=True)
class Cost:
    """Processor seconds of an epoch, relative to the undefended training of the same repeat."""

    cell: str
    seconds: float
    relative: float
    least: float
    most: float


def main() -> None:
    """Measure all cells in turn, and write the table."""
    sweep = yaml.safe_load(SWEEP.read_text(encoding="utf-8"))
    given = sys.argv[1:]
    seconds: dict[str, list[float]] = {}
    for repeat in range(REPEATS):
        for cell, own in sweep["cells"].items():
            options = sweep["options"] | SHORT | own.get("options", {})
            few, many = (trained(own, options | {"epochs": epochs}, given) for epochs in EPOCHS)
            epoch = (many - few) / (EPOCHS[1] - EPOCHS[0])
            seconds.setdefault(cell, []).append(epoch)
            print(f"{repeat + 1}/{REPEATS} {cell}: {epoch:.2f} s an epoch", flush=True)
    write_rows(TABLE, [cost(cell, seconds) for cell in seconds])


def trained(cell: dict[str, Any], options: dict[str, Any], given: list[str]) -> float:
    """Processor seconds of a training."""
    with tempfile.TemporaryDirectory() as folder:
        files = [cell["config"]] if "config" in cell else []
        own = Path(folder) / "options.yaml"
        own.write_text(yaml.safe_dump(options), encoding="utf-8")
        command = [sys.executable, str(ROOT / "recipes" / "adv_train.py")]
        for file in [*files, str(own)]:
            command += ["--config", file]
        command += ["--output", f"{folder}/run", *given]
        before = spent()
        subprocess.run(
            command,
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        return spent() - before


def spent() -> float:
    """Processor seconds of all processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def cost(cell: str, seconds: dict[str, list[float]]) -> Cost:
    """The median over the repeats, and the range."""
    ratios = [own / plain for own, plain in zip(seconds[cell], seconds[PLAIN], strict=True)]
    return Cost(
        cell=cell,
        seconds=round(median(seconds[cell]), 3),
        relative=round(median(ratios), 2),
        least=round(min(ratios), 2),
        most=round(max(ratios), 2),
    )


if __name__ == "__main__":
    main()
