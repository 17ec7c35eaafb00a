"""Whether more forwards find anything more of a network that draws random numbers.

python docs/results/draws.py       # keeps what is finished

It trains four stochastic defences on the digits. Each is attacked by APGD with the gradient
averaged over 1 to 10 forwards, whose results are judged by 50 draws (defences/gradient_draws.csv),
and evaluated by the suite fast with 10 and with 50 draws (defences/draws.csv). About 15 minutes on
one core.
"""

import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import product
from pathlib import Path

import torch
from rows import read_rows, seeds_table, write_rows

from sj_robust.attacks import SampleSeeds, ThreatModel, apgd
from sj_robust.core.saved import markdown_table
from sj_robust.data import image_loader, load_images
from sj_robust.evaluation import Member, Report, from_checkpoint, worst_case
from sj_robust.ops import keep_heap

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "runs" / "draws"
FOLDER = Path(__file__).with_name("defences")
DRAWS_TABLE = FOLDER / "draws.csv"
SAMPLES_TABLE = FOLDER / "gradient_draws.csv"
PRESETS = ("tgo", "stog", "rsc", "poisson")
EPS = 0.06
THREAT = ThreatModel("Linf", EPS)
TRAINING = (
    "--dataset digits --train-limit 1437 --channels 16 32 --epochs 20 --lr 0.1 --no-reference "
    f"--eps {EPS} --eval-eps {EPS}"
)
"""Options of adv_train.py beside the preset."""
EVALUATION = f"--suite fast --eps {EPS} --test-limit 100 --no-control --no-proofs"
DRAWS = (10, 50)
IMAGES = 100
STEPS = 100
JUDGED = 50
RUNS_OF_APGD = tuple(product(("training", "triangle:0.5"), (1, 3, 10), range(3)))
"""Estimators, forwards that a gradient averages over, and seeds."""


@dataclass(frozen=True)
class Averaged:
    """What APGD leaves, in per cent of the images, if a gradient averages over so many forwards,
    and its CPU seconds.
    """

    network: str
    estimator: str
    forwards: int
    seed: int
    left: float
    seconds: float


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation with so many draws found, in per cent of the images."""

    network: str
    draws: int
    images: int
    clean: str
    at_most: str
    interval: str


def main() -> None:
    """Train, attack and evaluate what is not there yet; show the tables."""
    torch.set_num_threads(1)
    keep_heap()
    FOLDER.mkdir(exist_ok=True)
    evaluated = []
    for preset in PRESETS:
        run = RUNS / preset
        recipe("adv_train.py", ["--config", f"defences/{preset}", *TRAINING.split()], run)
        (network,) = [path.parent for path in run.glob("*/best.pt")]
        attack(preset, network)
        for draws in DRAWS:
            output = RUNS / f"{preset}-{draws}"
            words = [str(network), *EVALUATION.split(), "--draws", str(draws)]
            recipe("evaluate.py", words, output)
            report = Report.load(output / "report.json")
            evaluated.append(
                Evaluated(
                    network=preset,
                    draws=draws,
                    images=len(report.labels),
                    clean=report.clean.percent,
                    at_most=report.everything.percent,
                    interval=report.everything.interval_text,
                )
            )
        write_rows(DRAWS_TABLE, evaluated)
    show(evaluated)


def recipe(name: str, words: list[str], output: Path) -> None:
    """Run a recipe, or go on with it, unless its report is there."""
    if (output / "report.json").exists():
        return
    command = [sys.executable, str(ROOT / "recipes" / name), *words, "--output", str(output)]
    if output.exists():
        command.append("--resume")
    subprocess.run(command, cwd=ROOT, check=True)


def attack(preset: str, network: Path) -> None:
    """APGD with every estimator, number of forwards and seed that are not in the table yet."""
    rows = read_rows(SAMPLES_TABLE, Averaged)
    known = {(row.network, row.estimator, row.forwards, row.seed) for row in rows}
    missing = [run for run in RUNS_OF_APGD if (preset, *run) not in known]
    if not missing:
        return
    model = from_checkpoint(network).model
    x, y = next(iter(image_loader(load_images("digits").test, IMAGES)))
    for estimator, forwards, seed in missing:
        made = partial(apgd, eps=EPS, steps=STEPS, eot_samples=forwards, keep_best=False)
        member = Member("apgd", made, estimator, threat=THREAT)
        began = time.process_time()
        report = worst_case(
            model,
            x,
            y,
            [member],
            threat=THREAT,
            draws=JUDGED,
            seeds=SampleSeeds(range(len(y))).derived("run", seed),
        )
        row = Averaged(
            network=preset,
            estimator=estimator,
            forwards=forwards,
            seed=seed,
            left=round(100 * report.worst_case.accuracy, 2),
            seconds=round(time.process_time() - began, 1),
        )
        print(row, flush=True)
        rows.append(row)
        write_rows(SAMPLES_TABLE, rows)


def show(evaluated: list[Evaluated]) -> None:
    """Both tables as Markdown, and whether more draws end in the interval of few."""
    names = ("network", "estimator", "forwards")
    print(seeds_table(names, read_rows(SAMPLES_TABLE, Averaged), names))
    heads = [field.name for field in fields(Evaluated)]
    print(markdown_table(heads, [list(map(str, asdict(row).values())) for row in evaluated]))
    for few, many in zip(evaluated[::2], evaluated[1::2], strict=True):
        low, high = map(float, few.interval.split(" to "))
        told = "within" if low <= float(many.at_most) <= high else "outside"
        print(f"{few.network}: {many.draws} draws end {told} the interval of {few.draws}")


if __name__ == "__main__":
    main()
