"""What the second stage of the choice of estimators is worth: digits at Linf 0.1 and CIFAR-10 at
Linf 4/255.

python docs/results/estimator_choice.py     # with the pictures in data/cifar10_pictures, 15 minutes

Three estimators are chosen on 48 images: by the short attack alone, by both stages, or by the
longer attack of every candidate (one seed). What they leave together of other images, each with 60
steps of APGD-CE, is the figure. It writes estimator_choice.csv; what is there is not run again.
"""

import time
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from rows import read_rows, seeds_table, write_rows
from torch import Tensor

from sj_robust.attacks import SampleSeeds, ThreatModel, apgd
from sj_robust.data import image_loader, load_images
from sj_robust.evaluation import (
    EstimatorSearch,
    Member,
    from_checkpoint,
    search_estimators,
    worst_case,
)
from sj_robust.evaluation.run.member import fools
from sj_robust.ops import keep_heap

TABLE = Path(__file__).with_name("estimator_choice.csv")
STUDY = Path(__file__).parent / "cifar10" / "networks"
SEEDS = (0, 1, 2)
STEPS = 60
LOADED = 500
HELD = 200
PICTURES = "image_folder:data/cifar10_pictures"
DATA = {"digits": ("digits", 0.1), "cifar10": (PICTURES, 4 / 255)}
"""Images and radius."""
NETWORKS = {
    "digits/lif-at": Path("digits/lif-at"),
    "digits/dlif-at": Path("digits/dlif-at"),
    "digits/dlif-at-mppd": Path("digits/dlif-at-mppd"),
    "cifar10/lif-at": STUDY / "lif-at.pt",
    "cifar10/dlif-at-mppd": Path("cifar10/dlif-at-mppd"),
}
"""Networks in the package, and one that is kept with the study on CIFAR-10."""
LONGER = "longer attack of all"
RULES = {
    "short attack": EstimatorSearch(finalists=0),
    "two stages": EstimatorSearch(),
    LONGER: EstimatorSearch(finalists=1_000),
}
RUNS = [*product(("short attack", "two stages"), SEEDS), (LONGER, 0)]


@dataclass(frozen=True)
class Row:
    """What three estimators leave of the correctly classified images, in per cent, and how many
    seconds of the CPU their choice took.
    """

    network: str
    rule: str
    seed: int
    left: float
    seconds: float
    estimators: str


class Measured:
    """A network with images to choose on and others to attack."""

    def __init__(self, name: str) -> None:
        """Load both."""
        self.name = name
        data, eps = DATA[name.split("/")[0]]
        self.threat = ThreatModel("Linf", eps)
        self.model = from_checkpoint(NETWORKS[name]).model
        self.x, self.y = next(iter(image_loader(load_images(data).test, LOADED)))
        self.seeds = SampleSeeds(range(len(self.y)))
        wrong = fools(self.model, self.x, self.y, seeds=self.seeds)
        self.right = (~wrong).nonzero().flatten()

    def row(self, rule: str, seed: int) -> Row:
        """Choose by a rule, and attack the images that were not used for it."""
        settings = RULES[rule]
        chosen_on = self.right[: settings.images]
        held = self.right[settings.images :][:HELD]
        began = time.process_time()
        trials = search_estimators(
            self.model,
            self.x[chosen_on],
            self.y[chosen_on],
            threat=self.threat,
            settings=settings,
            seeds=self.seeds.rows(chosen_on).derived("sweep", seed),
        )
        seconds = time.process_time() - began
        chosen = [trial.estimator for trial in trials if trial.chosen]
        return Row(
            network=self.name,
            rule=rule,
            seed=seed,
            left=round(self.left(held, chosen), 2),
            seconds=round(seconds, 1),
            estimators=" ".join(chosen),
        )

    def left(self, rows: Tensor, estimators: list[str]) -> float:
        """Images that no estimator breaks, in per cent."""
        attack = partial(apgd, eps=self.threat.eps, steps=STEPS)
        members = [Member(name, attack, name, threat=self.threat) for name in estimators]
        report = worst_case(
            self.model,
            self.x[rows],
            self.y[rows],
            members,
            threat=self.threat,
            seeds=self.seeds.rows(rows),
        )
        return 100 * report.worst_case.accuracy


def main() -> None:
    """Every network, rule and seed; rows that are there are kept."""
    torch.set_num_threads(1)
    keep_heap()
    for name in NETWORKS:
        known = {(row.rule, row.seed) for row in saved() if row.network == name}
        missing = [one for one in RUNS if one not in known]
        if not missing:
            continue
        measured = Measured(name)
        for rule, seed in missing:
            row = measured.row(rule, seed)
            print(row, flush=True)
            write_rows(TABLE, [*saved(), row])
    print(seeds_table(["network", "chosen by"], saved(), ["network", "rule"]))


def saved() -> list[Row]:
    """The rows of all runs so far."""
    return read_rows(TABLE, Row)


if __name__ == "__main__":
    main()
