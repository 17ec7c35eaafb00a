"""Whether the number of draws changes what an evaluation finds of a stochastic network.

python docs/results/draws.py       # runs/draws keeps what is finished

It trains TGO and StoG on the digits, evaluates both by the suite paper with 10 and with 50 draws,
and writes defences/draws.csv. About half an hour on one core.
"""

import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rows import write_rows

from sj_robust.core.saved import markdown_table
from sj_robust.evaluation import Report

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "runs" / "draws"
TABLE = Path(__file__).with_name("defences") / "draws.csv"
DRAWS = (10, 50)
TRAINING = {
    "tgo": "--channels 16 32 --epochs 20 --lr 0.1 --eps 0.06 --eval-eps 0.06",
    "stog": "--channels 16 32 --epochs 20 --lr 0.1 --eps 0.06 --eval-eps 0.06",
}
"""Options of adv_train.py beside the preset, for the digits."""
EVALUATION = "--suite paper --eps 0.06 --test-limit 40 --no-control --no-proofs"


@dataclass(frozen=True)
class Row:
    """What an evaluation with so many draws found, in per cent of the images."""

    network: str
    draws: int
    images: int
    clean: str
    pgd20: str
    at_most: str
    interval: str


def main() -> None:
    """Train and evaluate what is not there yet; write and show the table."""
    rows = []
    for preset, options in TRAINING.items():
        run = RUNS / preset
        folder = run / "training"
        words = f"--config defences/{preset} --dataset digits --train-limit 1437 --no-reference"
        recipe("adv_train.py", [*words.split(), *options.split()], folder)
        (network,) = [path.parent for path in folder.glob("*/best.pt")]
        for draws in DRAWS:
            output = run / str(draws)
            given = [str(network), *EVALUATION.split(), "--draws", str(draws)]
            recipe("evaluate.py", given, output)
            rows.append(row(preset, draws, Report.load(output / "report.json")))
            TABLE.parent.mkdir(exist_ok=True)
            write_rows(TABLE, rows)
    heads = [field.name for field in fields(Row)]
    print(markdown_table(heads, [list(map(str, asdict(one).values())) for one in rows]))
    for few, many in zip(rows[::2], rows[1::2], strict=True):
        low, high = map(float, few.interval.split(" to "))
        told = "within" if low <= float(many.at_most) <= high else "outside"
        print(f"{few.network}: {many.draws} draws end {told} the interval of {few.draws}")


def recipe(name: str, words: list[str], output: Path) -> None:
    """Run a recipe, or go on with it, unless its report is there."""
    if (output / "report.json").exists():
        return
    command = [sys.executable, str(ROOT / "recipes" / name), *words, "--output", str(output)]
    if output.exists():
        command.append("--resume")
    subprocess.run(command, cwd=ROOT, check=True)


def row(network: str, draws: int, report: Report) -> Row:
    """The figures of a report."""
    return Row(
        network=network,
        draws=draws,
        images=len(report.labels),
        clean=report.clean.percent,
        pgd20=report.under("pgd20").percent,
        at_most=report.everything.percent,
        interval=report.everything.interval_text,
    )


if __name__ == "__main__":
    main()
