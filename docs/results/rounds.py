"""What seeds and rounds of the suite standard are worth: the digits at Linf 0.1.

python docs/results/rounds.py                    # every network and seed, half an hour on one core
python docs/results/rounds.py digits/lif-at      # only this network

A run of two rounds says what one of them leaves as well. Seconds are those of one thread of the
CPU, with those of the choice of estimators; the suite gradient is run with the first seed and the
same estimators. It writes rounds.csv; what is there is not run again.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from rows import read_rows, seeds_table, write_rows
from torch import Tensor, nn

from sj_robust.attacks import SampleSeeds, ThreatModel
from sj_robust.data import image_loader, load_images
from sj_robust.evaluation.run.estimator_search import search_estimators
from sj_robust.evaluation.run.loop import Asked, Job, run_batch
from sj_robust.evaluation.run.member import Member
from sj_robust.evaluation.run.progress import BatchLog
from sj_robust.evaluation.run.suites import make_suite
from sj_robust.evaluation.run.variant import Variant
from sj_robust.models import pretrained
from sj_robust.ops import keep_heap

TABLE = Path(__file__).with_name("rounds.csv")
NETWORKS = ("digits/lif-at", "digits/dlif-at", "digits/dlif-at-mppd")
SEEDS = (0, 1, 2)
ROUNDS = 2
THREAT = ThreatModel("Linf", 0.1)


@dataclass(frozen=True)
class Row:
    """What a suite leaves of the images, in per cent, and its seconds of the CPU."""

    network: str
    seed: int
    suite: str
    rounds: int
    left: float
    seconds: float
    estimators: str


class Measured:
    """A network with the estimators of one seed."""

    def __init__(self, name: str, seed: int) -> None:
        """Choose the estimators."""
        self.name, self.seed = name, seed
        self.model: nn.Module = pretrained(name)
        test = load_images("digits").test
        self.x, self.y = next(iter(image_loader(test, len(test))))
        self.images = SampleSeeds(range(len(self.y)))
        began = time.process_time()
        trials = search_estimators(
            self.model,
            self.x,
            self.y,
            threat=THREAT,
            seeds=self.images.derived("sweep", seed),
        )
        self.seconds = time.process_time() - began
        self.chosen = [trial.estimator for trial in trials if trial.chosen]

    def gradient(self) -> list[Row]:
        """The suite of gradient attacks."""
        suite = make_suite("gradient", THREAT, chosen=self.chosen, classes=10)
        return [self.row("gradient", 1, self.steps(suite.members))]

    def standard(self) -> list[Row]:
        """The suite with the search: what every round leaves."""
        suite = make_suite("standard", THREAT, chosen=self.chosen, classes=10, rounds=ROUNDS)
        steps = self.steps(suite.members)
        ends = [i for i, member in enumerate(suite.members, 2) if member.takes_starts]
        ends[-1] = len(steps)  # with the program
        return [self.row("standard", n, steps[:end]) for n, end in enumerate(ends, 1)]

    def steps(self, members: Sequence[Member]) -> list[tuple[Tensor, float]]:
        """Images that stand, [N] bool, and seconds: of no attack and of every member."""
        job = Job(
            Variant(members, seed=self.seed),
            self.model,
            self.x,
            self.y,
            0,
            self.images.derived("image", self.seed),
            Asked(THREAT),
        )
        stands = torch.ones_like(self.y, dtype=torch.bool)
        steps = []
        began = time.process_time()
        for step in run_batch(job, BatchLog()):
            stands = stands.clone()
            stands[step.fell] = False
            assert not step.outside
            now = time.process_time()
            steps.append((stands, now - began))
            began = now
        return steps

    def row(self, suite: str, rounds: int, steps: Sequence[tuple[Tensor, float]]) -> Row:
        """The figures of a suite that ends with the last one of some steps."""
        left = 100 * float(steps[-1][0].double().mean())
        seconds = self.seconds + sum(taken for _, taken in steps)
        names = " ".join(self.chosen)
        return Row(self.name, self.seed, suite, rounds, round(left, 2), round(seconds, 1), names)


def main() -> None:
    """Every network and seed; rows that are there are kept."""
    torch.set_num_threads(1)
    keep_heap()
    names = sys.argv[1:] or NETWORKS
    runs = [*product(["standard"], SEEDS, names), *product(["gradient"], SEEDS[:1], names)]
    for suite, seed, name in runs:
        if (suite, seed, name) in {(row.suite, row.seed, row.network) for row in saved()}:
            continue
        measured = Measured(name, seed)
        rows = measured.gradient() if suite == "gradient" else measured.standard()
        for row in rows:
            print(row, flush=True)
        write_rows(TABLE, sorted([*saved(), *rows], key=place))
    names = ("network", "suite", "rounds")
    in_order = sorted(saved(), key=lambda row: (NETWORKS.index(row.network), row.suite, row.rounds))
    print(seeds_table(names, in_order, names))


def saved() -> list[Row]:
    """The rows of all runs so far."""
    return read_rows(TABLE, Row)


def place(row: Row) -> tuple[int, int, str, int]:
    """Where a row stands in the table."""
    return NETWORKS.index(row.network), row.seed, row.suite, row.rounds


if __name__ == "__main__":
    main()
