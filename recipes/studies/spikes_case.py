"""What attacks leave of a network whose exact robust accuracy is known, as a table and a picture.

python recipes/studies/spikes_case.py             # a minute on one core

It writes spikes_case.csv and ../concepts/figures/spikes_case.png.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from tables import RESULTS, ROOT, Row, first_images, once
from torch import Tensor, nn

from sj_robust.attacks import SampleSeeds, ThreatModel, pgd
from sj_robust.core.shown import COLOURS, new_figure, write_figure
from sj_robust.evaluation import (
    Member,
    from_checkpoint,
    make_suite,
    search_estimators,
    worst_case,
)
from sj_robust.evaluation.run.suites import SuiteName
from sj_robust.ops import keep_heap

NETWORK = ROOT / "tests" / "attacks" / "ground_truth" / "dlif-T2.pt"
EPS = 0.05
ATTACKS = {
    "PGD-20": "PGD-20",
    "autoattack": "AutoAttack",
    "gradient": "gradient ensemble",
    "standard": "with spike search",
}
"""What is run, and what the picture calls it."""


@dataclass(frozen=True)
class Options:
    """What is run."""

    attacks: tuple[str, ...] = tuple(ATTACKS)
    images: int = 128
    output: Path = RESULTS
    picture: Path = RESULTS.parent / "concepts" / "figures" / "spikes_case.png"


def main(options: Options) -> None:
    """Run what is missing, and draw."""
    x, y = first_images("digits", options.images)
    grid = [{"eps": EPS, "attack": attack} for attack in options.attacks]
    rows = once(options.output / "spikes_case.csv", grid, partial(measured, x=x, y=y))
    draw(rows, options.picture)


def measured(eps: float, attack: str, x: Tensor, y: Tensor) -> dict[str, float]:
    """What an attack leaves of the images, in per cent, and the seconds of one thread."""
    model = from_checkpoint(NETWORK).model
    threat = ThreatModel("Linf", eps)
    began = time.process_time()
    report = worst_case(model, x, y, members(model, x, y, attack, threat), threat=threat)
    seconds = time.process_time() - began
    return {"left": round(100 * report.worst_case.accuracy, 2), "seconds": round(seconds, 1)}


def members(
    model: nn.Module, x: Tensor, y: Tensor, attack: str, threat: ThreatModel
) -> Sequence[Member]:
    """PGD-20 of the paper, or a suite with the estimators that are chosen for it."""
    if attack == "PGD-20":
        step = partial(pgd, eps=threat.eps, step_size=threat.eps / 8, steps=20)
        return [Member("pgd20", step, threat=threat)]
    if attack == "autoattack":
        return make_suite("autoattack", threat, classes=10).members
    seeds = SampleSeeds(range(len(y))).derived("sweep", 0)
    trials = search_estimators(model, x, y, threat=threat, seeds=seeds)
    chosen = [trial.estimator for trial in trials if trial.chosen]
    suite: SuiteName = "standard" if attack == "standard" else "gradient"
    return make_suite(suite, threat, chosen=chosen, classes=10).members


def draw(rows: list[Row], picture: Path) -> None:
    """A bar for each attack, and the exact value across them: with what is not decided."""
    verdicts = json.loads(NETWORK.with_suffix(".json").read_text(encoding="utf-8"))[str(EPS)]
    shares = [100 * verdicts.count(letter) / len(verdicts) for letter in "vu"]
    figure = new_figure(4.8, 3.2)
    axes = figure.subplots()
    width = 0.8 / len(ATTACKS)
    for place, row in enumerate(rows):
        at = (place - (len(rows) - 1) / 2) * width
        label = ATTACKS[row["attack"]]
        bar = axes.bar(at, float(row["left"]), 0.9 * width, color=COLOURS[place], label=label)
        axes.bar_label(bar, fmt="%.1f", fontsize=7)
    ends = (-0.45, 0.45)
    axes.fill_between(ends, shares[0], sum(shares), color="black", alpha=0.35, label="exact")
    axes.set_xticks([0], [f"Linf {EPS:g}"])
    axes.set(ylim=(75, 92), ylabel="robust accuracy, %")
    axes.legend(fontsize=7, ncols=3, loc="upper center")
    write_figure(figure, picture)


if __name__ == "__main__":
    torch.set_num_threads(1)
    keep_heap()
    main(tyro.cli(Options))
