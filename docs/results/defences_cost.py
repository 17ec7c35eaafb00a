"""What training with each defence of the study costs: time for an image relative to that without a
defence.

python docs/results/defences_cost.py --data-root data

Every cell of defences_fashion_mnist_sweep.yaml is trained on a few images, all cells in turn, three
times, on one thread; the time is that of the training steps of all epochs but the first, as the
recipe reports it. Writes defences/cost.csv. About 15 minutes on a core with nothing else to do.
"""

import os
import re
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
SHORT = {
    "train_limit": 1280,
    "test_limit": 1,
    "epochs": 3,
    "select": "clean",
    "reference": False,
}
_SPEED = re.compile(r"(\d+) images/s")


@dataclass(frozen=True)
class Cost:
    """Milliseconds for an image, and relative to the undefended training of the same repeat."""

    cell: str
    milliseconds: float
    relative: float
    least: float
    most: float


def main() -> None:
    """Measure all cells in turn, and write the table."""
    sweep = yaml.safe_load(SWEEP.read_text(encoding="utf-8"))
    given = sys.argv[1:]
    times: dict[str, list[float]] = {}
    for repeat in range(REPEATS):
        for cell, own in sweep["cells"].items():
            options = sweep["options"] | SHORT | own.get("options", {})
            time = milliseconds(own, options, given)
            times.setdefault(cell, []).append(time)
            print(f"{repeat + 1}/{REPEATS} {cell}: {time:.2f} ms an image", flush=True)
    write_rows(TABLE, [cost(cell, times) for cell in times])


def milliseconds(cell: dict[str, Any], options: dict[str, Any], given: list[str]) -> float:
    """Time of a training for an image, median of all epochs but the first."""
    with tempfile.TemporaryDirectory() as folder:
        files = [cell["config"]] if "config" in cell else []
        own = Path(folder) / "options.yaml"
        own.write_text(yaml.safe_dump(options), encoding="utf-8")
        command = [sys.executable, str(ROOT / "recipes" / "adv_train.py")]
        for file in [*files, str(own)]:
            command += ["--config", file]
        command += ["--output", f"{folder}/run", *given]
        done = subprocess.run(
            command,
            cwd=ROOT,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    speeds = [float(speed) for speed in _SPEED.findall(done.stdout)]
    return 1000 / median(speeds[1:])


def cost(cell: str, times: dict[str, list[float]]) -> Cost:
    """The median over the repeats, and the range."""
    ratios = [own / plain for own, plain in zip(times[cell], times[PLAIN], strict=True)]
    return Cost(
        cell=cell,
        milliseconds=round(median(times[cell]), 3),
        relative=round(median(ratios), 2),
        least=round(min(ratios), 2),
        most=round(max(ratios), 2),
    )


if __name__ == "__main__":
    main()
