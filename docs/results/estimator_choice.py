"""What the second stage of the choice of estimators is worth: digits at Linf 0.1 and CIFAR-10 at
Linf 4/255.

python docs/results/estimator_choice.py     # with the pictures in data/cifar10_pictures, 15 minutes

Three estimators are chosen on 48 images: by the short attack alone, by both stages, or by the
longer attack of every candidate (one seed). What they leave together of other images, each with 60
steps of APGD-CE, is the figure. It writes estimator_choice.csv; what is there is not run again.
"""

import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from rows import read_rows, write_rows
from torch import Tensor, nn

from sj_robust.attacks import SampleSeeds, ThreatModel, apgd
from sj_robust.core.saved import markdown_table
from sj_robust.data import load_images
from sj_robust.evaluation import EstimatorSearch, Member, from_checkpoint, search_estimators
from sj_robust.evaluation.run.member import craft, fools
from sj_robust.models import pretrained
from sj_robust.ops import keep_heap

TABLE = Path(__file__).with_name("estimator_choice.csv")
STUDY = Path(__file__).parent / "cifar10" / "networks"
SEEDS = (0, 1, 2)
STEPS = 60
HELD = 200
PICTURES = "image_folder:data/cifar10_pictures"
DATA = {"digits": ("digits", 0.1), "cifar10": (PICTURES, 4 / 255)}
NETWORKS = (
    "digits/lif-at",
    "digits/dlif-at",
    "digits/dlif-at-mppd",
    "cifar10/lif-at",
    "cifar10/dlif-at-mppd",
)
RULES = {
    "short attack": EstimatorSearch(finalists=0),
    "two stages": EstimatorSearch(),
    "longer attack of all": EstimatorSearch(finalists=1_000),
}
RUNS = [*product(list(RULES)[:2], SEEDS), ("longer attack of all", 0)]


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
        self.model = network(name)
        test = load_images(data).test
        parts = zip(*(test[i] for i in range(min(len(test), 500))), strict=True)
        x, y = (torch.stack(part) for part in parts)
        seeds = SampleSeeds(range(len(y)))
        self.right = (~fools(self.model, x, y, seeds=seeds)).nonzero().flatten()
        self.x, self.y, self.seeds = x, y, seeds

    def row(self, rule: str, seed: int) -> Row:
        """Choose by a rule, and attack the images that were not used for it."""
        settings = RULES[rule]
        chosen_on, held = self.right[: settings.images], self.right[settings.images :][:HELD]
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
        left = 100 * float(self.stands(held, chosen).double().mean())
        return Row(self.name, rule, seed, round(left, 2), round(seconds, 1), " ".join(chosen))

    def stands(self, rows: Tensor, estimators: list[str]) -> Tensor:
        """Images that no estimator breaks, [N] bool."""
        x, y, seeds = self.x[rows], self.y[rows], self.seeds.rows(rows)

        def attack(model: nn.Module, x: Tensor, y: Tensor, *, generator: SampleSeeds) -> Tensor:
            return apgd(model, x, y, eps=self.threat.eps, steps=STEPS, generator=generator)

        stands = torch.ones(len(rows), dtype=torch.bool)
        for name in estimators:
            member = Member("held", attack, name, threat=self.threat)
            x_adv = craft(self.model, x, y, member, seeds=seeds)
            stands &= ~fools(self.model, x_adv, y, seeds=seeds)
        return stands


def network(name: str) -> nn.Module:
    """A network that comes with the package or is kept with the study on CIFAR-10."""
    kept = STUDY / f"{name.removeprefix('cifar10/')}.pt"
    if kept.exists():
        return from_checkpoint(kept).model
    return pretrained(name)


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
    print(table(saved()))


def saved() -> list[Row]:
    """The rows of all runs so far."""
    return read_rows(TABLE, Row)


def table(rows: list[Row]) -> str:
    """Markdown: what is left with each seed, its mean, and mean seconds."""
    cells = []
    for key in dict.fromkeys((row.network, row.rule) for row in rows):
        found = [row for row in rows if (row.network, row.rule) == key]
        left = " / ".join(f"{row.left:.1f}" for row in found)
        mean = sum(row.left for row in found) / len(found)
        seconds = sum(row.seconds for row in found) / len(found)
        cells.append([*key, left, f"{mean:.1f}", f"{seconds:.0f}"])
    return markdown_table(["network", "chosen by", "left, %", "mean", "seconds"], cells, words=2)


if __name__ == "__main__":
    main()
