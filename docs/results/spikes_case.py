"""What attacks leave of a network whose exact robust accuracy is known, as a table and a picture.

python docs/results/spikes_case.py                # a minute on one core

It writes spikes_case.csv, row by row (what is there is not run again), and draws
../concepts/figures/spikes_case.png from it.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rows import read_rows, write_rows
from torch import Tensor, nn

from sj_robust.attacks import SampleSeeds, ThreatModel, pgd
from sj_robust.core.shown import COLOURS, new_figure, write_figure
from sj_robust.data import image_loader, load_images
from sj_robust.evaluation import (
    Member,
    from_checkpoint,
    make_suite,
    search_estimators,
    worst_case,
)
from sj_robust.ops import keep_heap

HERE = Path(__file__).parent
KNOWN = HERE.parents[1] / "tests" / "attacks" / "ground_truth"
TABLE = HERE / "spikes_case.csv"
FIGURE = HERE.parent / "concepts" / "figures" / "spikes_case.png"
NETWORK = "dlif-T2"
RADII = (0.05,)
IMAGES = 128
ATTACKS = {
    "PGD-20": "PGD-20",
    "autoattack": "AutoAttack",
    "gradient": "gradient ensemble",
    "standard": "with spike search",
}
"""What is run, and what the picture calls it."""


@dataclass(frozen=True)
class Row:
    """What an attack leaves of the images, in per cent, and the seconds of one thread."""

    eps: float
    attack: str
    left: float
    seconds: float


def main() -> None:
    """Run what is missing, and draw."""
    torch.set_num_threads(1)
    keep_heap()
    rows = read_rows(TABLE, Row)
    done = {(row.eps, row.attack) for row in rows}
    for eps in RADII:
        for attack in ATTACKS:
            if (eps, attack) not in done:
                rows.append(measured(eps, attack))
                print(rows[-1], flush=True)
                write_rows(TABLE, rows)
    draw(rows)


def measured(eps: float, attack: str) -> Row:
    """An attack on all images; those that fell are asked again by the evaluation."""
    model = from_checkpoint(KNOWN / f"{NETWORK}.pt").model
    test = load_images("digits", test_limit=IMAGES).test
    x, y = next(iter(image_loader(test, IMAGES)))
    threat = ThreatModel("Linf", eps)
    began = time.process_time()
    report = worst_case(model, x, y, members(model, x, y, attack, threat), threat=threat)
    seconds = time.process_time() - began
    return Row(eps, attack, round(100 * report.worst_case.accuracy, 2), round(seconds, 1))


def members(
    model: nn.Module, x: Tensor, y: Tensor, attack: str, threat: ThreatModel
) -> Sequence[Member]:
    """PGD-20 of the paper, or a suite with the estimators that are chosen for it."""
    if attack == "PGD-20":
        step = partial(pgd, eps=threat.eps, step_size=threat.eps / 8, steps=20)
        return [Member("pgd20", step, threat=threat)]
    if attack == "autoattack":
        return make_suite("autoattack", threat, classes=10).members
    seeds = SampleSeeds(range(IMAGES)).derived("sweep", 0)
    trials = search_estimators(model, x, y, threat=threat, seeds=seeds)
    chosen = [trial.estimator for trial in trials if trial.chosen]
    suite = "standard" if attack == "standard" else "gradient"
    return make_suite(suite, threat, chosen=chosen, classes=10).members


def exact(eps: float) -> tuple[float, float]:
    """Bounds of the exact value in per cent: what is verified, and with it what is not decided."""
    content = json.loads((KNOWN / f"{NETWORK}.json").read_text(encoding="utf-8"))
    verdicts = content[str(eps)]
    verified, unknown = verdicts.count("v"), verdicts.count("u")
    return 100 * verified / IMAGES, 100 * (verified + unknown) / IMAGES


def draw(rows: list[Row]) -> None:
    """A group of bars for each radius, and the exact value across it."""
    figure = new_figure(4.8, 3.2)
    axes = figure.subplots()
    width = 0.8 / len(ATTACKS)
    for place, (attack, title) in enumerate(ATTACKS.items()):
        left = [row.left for eps in RADII for row in rows if (row.eps, row.attack) == (eps, attack)]
        at = [group + (place - (len(ATTACKS) - 1) / 2) * width for group in range(len(RADII))]
        bars = axes.bar(at, left, 0.9 * width, color=COLOURS[place], label=title)
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    for group, eps in enumerate(RADII):
        low, high = exact(eps)
        label = "exact" if group == 0 else None
        ends = (group - 0.45, group + 0.45)
        axes.fill_between(ends, low, high, color="black", alpha=0.35, linewidth=1.5, label=label)
    axes.set_xticks(range(len(RADII)), [f"Linf {eps:g}" for eps in RADII])
    axes.set_ylim(75, 92)
    axes.set_ylabel("robust accuracy, %")
    axes.legend(fontsize=7, ncols=3, loc="upper center")
    write_figure(figure, FIGURE)


if __name__ == "__main__":
    main()
