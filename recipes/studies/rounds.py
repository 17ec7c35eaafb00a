"""What seeds and rounds of the suite standard are worth: the digits at Linf 0.1.

python recipes/studies/rounds.py      # every network and seed, an hour on one core

The seconds are those of the suite. It writes rounds.csv and the table of search.md.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
import tyro
from tables import RESULTS, each, first_images, groups, numbers, once, read_table, write_page

from sj_robust.core.saved import markdown_table
from sj_robust.evaluation import evaluate
from sj_robust.evaluation.run.suites import SuiteName
from sj_robust.models import pretrained
from sj_robust.ops import keep_heap

PAGE = "search.md"


@dataclass(frozen=True)
class Options:
    """What is evaluated."""

    networks: tuple[str, ...] = ("digits/lif-at", "digits/dlif-at", "digits/dlif-at-mppd")
    seeds: tuple[int, ...] = (0, 1, 2)
    rounds: tuple[int, ...] = (1, 2)
    images: int = 360
    output: Path = RESULTS


def main(options: Options) -> None:
    """The suite gradient with the first seed, and standard with every seed and number of rounds."""

    def measured(network: str, seed: int, suite: SuiteName, rounds: int) -> dict[str, object]:
        x, y = first_images("digits", options.images)
        report = evaluate(
            pretrained(network),
            x,
            y,
            eps=0.1,
            suite=suite,
            rounds=rounds,
            seed=seed,
            progress=False,
        )
        estimators = {row.estimator: None for row in report.attacks if row.kind == "attack"}
        return {
            "left": round(100 * report.worst_case.accuracy, 2),
            "seconds": round(report.worst_case.seconds, 1),
            "estimators": " ".join(estimators),
        }

    grid = []
    for network in options.networks:
        runs = [("gradient", options.seeds[0], 1)]
        runs += [("standard", seed, rounds) for seed in options.seeds for rounds in options.rounds]
        for suite, seed, rounds in runs:
            grid.append({"network": network, "seed": seed, "suite": suite, "rounds": rounds})
    once(options.output / "rounds.csv", grid, measured)
    write_page(options.output / PAGE, tables(options.output))


def tables(folder: Path) -> dict[str, str]:
    """Accuracy with each seed, its mean, and seconds, also relative to gradient."""
    rows = sorted(read_table(folder / "rounds.csv"), key=lambda row: (row["suite"], row["rounds"]))
    cells = []
    for (network,), of_network in groups(rows, "network").items():
        base = 0.0
        for (suite, rounds), found in groups(of_network, "suite", "rounds").items():
            seconds = fmean(numbers(found, "seconds"))
            base = base or seconds
            name = f"`{suite}`" if rounds == "1" else f"`{suite}`, {rounds} rounds"
            mean = f"{fmean(numbers(found, 'left')):.1f}" if len(found) > 1 else ""
            line = [f"`{network}`", name, each(found, "left"), mean]
            cells.append([*line, f"{seconds:.0f}", f"{seconds / base:.2g}"])
    heads = ["network", "suite", "accuracy, %", "mean", "seconds", "of `gradient`"]
    return {"rounds": markdown_table(heads, cells, words=2)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    keep_heap()
    main(tyro.cli(Options))
