"""What spike_search finds beyond gradient attacks, and what each of its parts is worth at equal
cost.

python docs/results/spike_search.py                 # every network and seed, minutes on one core
python docs/results/spike_search.py ablation        # only this part

Every row begins with the images of the same four APGD runs, and is counted in seconds of one thread
of the CPU. AutoAttack of its authors (extra `attacks`) begins at the images
themselves. It writes spike_search.csv, row by row; what is there is not run again.
"""

import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rows import read_rows, write_rows
from torch import Tensor, nn

from sj_robust.attacks import SampleSeeds, ThreatModel, apgd, square
from sj_robust.attacks._spike_walk import STAGES, Plan
from sj_robust.attacks.spike_search import searched
from sj_robust.core.checks import check_images
from sj_robust.data import image_loader, load_images
from sj_robust.estimators import estimator
from sj_robust.evaluation import from_checkpoint
from sj_robust.models import pretrained
from sj_robust.ops import keep_heap

HERE = Path(__file__).parent
KNOWN = HERE.parents[1] / "tests" / "attacks" / "ground_truth"
TABLE = HERE / "spike_search.csv"
SEEDS = (0, 1, 2)
MOVES = ("elements", "patch", "cross", "flip", "guided_flip")
STANDARD = Plan(MOVES, forwards=6_000)
VARIANTS = {
    "spike_search": STANDARD,
    "no flips": replace(STANDARD, moves=("elements", "patch", "cross")),
    "flips alone": replace(STANDARD, moves=("flip", "guided_flip")),
    "nothing learned": replace(
        STANDARD, moves=("elements", "patch", "cross", "flip"), forwards=8_300, choice=1, rate=0.0
    ),
    "all go on": replace(
        STANDARD, stages=tuple(stage._replace(near=math.inf) for stage in STAGES), forwards=1_800
    ),
    "fewer go on": replace(
        STANDARD, stages=tuple(stage._replace(near=stage.near / 4) for stage in STAGES)
    ),
    "one rival": replace(STANDARD, rivals=1),
    "no heat": replace(STANDARD, heat=0.0),
    "20,000 forwards": replace(STANDARD, forwards=20_000),
}
"""The search, what it would be without one of its parts, in as many seconds, and a longer one."""
ESTIMATORS = ("atan:8+detach", "sigmoid:8", "training", "atan:4", "triangle:0.5", "atan:2")
LOSSES = ("ce", "dlr", "ce", "ce")
MORE_STARTS = 8


@dataclass(frozen=True)
class Case:
    """A network, a radius, and what is run on it."""

    network: str
    eps: float
    images: int
    variants: tuple[str, ...]
    long: tuple[int, ...] = ()  # forwards of more searches with more time, with the first seed
    autoattack: bool = False  # whether the authors' AutoAttack runs as well, with the first seed
    more_starts: bool = False  # whether the search also begins with more APGD runs


SHORT = ("spike_search",)
OF_CHAINS = ("spike_search", "one rival", "no heat", "all go on", "fewer go on")
CASES = {
    "ablation": Case("digits/dlif-at", 0.1, 128, tuple(VARIANTS), more_starts=True),
    "ground_truth_0.05": Case("dlif-T2.pt", 0.05, 128, SHORT, (50_000,)),
    "ground_truth_0.1": Case("dlif-T2.pt", 0.1, 128, SHORT, (50_000,)),
    "two_layers_0.05": Case("dlif-T2-two-layers.pt", 0.05, 128, OF_CHAINS),
    "two_layers_0.1": Case("dlif-T2-two-layers.pt", 0.1, 128, OF_CHAINS),
    "digits_dlif-at-mppd": Case("digits/dlif-at-mppd", 0.1, 360, SHORT, (50_000, 100_000), True),
    "digits_dlif-at": Case("digits/dlif-at", 0.1, 360, SHORT, (50_000, 100_000), True),
    "digits_lif-at": Case("digits/lif-at", 0.1, 360, SHORT, (50_000, 100_000), True),
}


@dataclass(frozen=True)
class Row:
    """What one attack leaves of the images; the starts' own seconds are not in those of others."""

    case: str
    attack: str
    seed: int
    left: float
    seconds: float


class Measured:
    """One network with the starts of one seed."""

    def __init__(self, name: str, seed: int) -> None:
        """Run the starts."""
        self.name, self.seed, self.case = name, seed, CASES[name]
        self.model = network(self.case.network)
        test = load_images("digits", test_limit=self.case.images).test
        self.x, self.y = next(iter(image_loader(test, self.case.images)))
        self.seeds = SampleSeeds(range(len(self.x))).derived("seed", seed)
        self.standing = self.right(self.x)
        began = time.process_time()
        self.starts = torch.stack([self.start(number) for number in range(len(LOSSES))])
        self.seconds = time.process_time() - began

    def right(self, images: Tensor) -> Tensor:
        """Which images the network gets right, asked again; all of them lie in the ball."""
        check_images(images)
        assert bool(ThreatModel("Linf", self.case.eps).contains(self.x, images).all())
        with torch.no_grad():
            return self.model(images).argmax(1) == self.y

    def start(self, number: int) -> Tensor:
        """What one of the first attacks finds; who falls is left out from then on."""
        found = self.climbed(number, self.standing)
        self.standing = self.standing & self.right(found)
        return found

    def climbed(self, number: int, rows: Tensor, steps: int = 50) -> Tensor:
        """APGD with one estimator and loss after the other on some of the images."""
        name = ESTIMATORS[number % len(ESTIMATORS)]
        loss = LOSSES[number % len(LOSSES)]
        own = self.seeds.rows(rows).derived("apgd", number)
        images = self.x.clone()
        applied = nullcontext(self.model) if name == "training" else estimator(name)(self.model)
        with applied as model:
            images[rows] = apgd(
                model,
                self.x[rows],
                self.y[rows],
                eps=self.case.eps,
                loss=loss,
                steps=steps,
                generator=own,
            )
        return images

    def search(self, plan: Plan, more: int = 0) -> Tensor:
        """The search on what stands, with more starts than there are."""
        rows = self.standing
        images = self.x.clone()
        ball = ThreatModel("Linf", self.case.eps)
        own = self.seeds.rows(rows).derived("search")
        others = [self.climbed(len(LOSSES) + number, rows) for number in range(more)]
        starts = torch.stack([*self.starts, *others])
        images[rows] = searched(
            self.model, self.x[rows], self.y[rows], starts[:, rows], ball, plan, own
        )
        return images

    def more_apgd(self, seconds: float) -> Tensor:
        """Runs of 100 steps until the time is over."""
        end = time.process_time() + seconds
        rows, images = self.standing, self.x.clone()
        number = len(LOSSES)
        while time.process_time() < end and bool(rows.any()):
            found = self.climbed(number, rows, steps=100)
            images[rows] = found[rows]
            rows = rows & self.right(images)
            number += 1
        return images

    def more_square(self, seconds: float) -> Tensor:
        """Square with as many queries as the time allows."""
        began = time.process_time()
        self.squared(100)
        queries = 100 * seconds / (time.process_time() - began)
        return self.squared(max(100, round(queries)))

    def squared(self, queries: int) -> Tensor:
        """Square on what stands."""
        rows, images = self.standing, self.x.clone()
        own = self.seeds.rows(rows).derived("square")
        images[rows] = square(
            self.model,
            self.x[rows],
            self.y[rows],
            eps=self.case.eps,
            queries=queries,
            generator=own,
        )
        return images

    def autoattack(self) -> Tensor:
        """AutoAttack standard of its authors on every image."""
        from pyautoattack import AutoAttack

        threat = ThreatModel("Linf", self.case.eps)
        library = AutoAttack(self.model, norm="Linf", eps=self.case.eps, seed=self.seed)
        images, _ = library.run_standard_evaluation(self.x, self.y, batch_size=len(self.x))
        return threat.project(self.x, images)

    def row(self, attack: str, run: Callable[[], Tensor]) -> Row:
        """What an attack leaves, and the seconds that it took."""
        began = time.process_time()
        images = run()
        seconds = time.process_time() - began
        standing = self.right(images)
        if attack != "AutoAttack":  # which does not know the starts
            standing = standing & self.standing
        return self.row_of(attack, standing, seconds)

    def row_of(self, attack: str, standing: Tensor, seconds: float) -> Row:
        """The images [N] that stand, in per cent, and the seconds, both rounded."""
        left = 100 * float(standing.double().mean())
        return Row(self.name, attack, self.seed, round(left, 2), round(seconds, 2))


def network(name: str) -> nn.Module:
    """A network that ships, or one of those whose exact robust accuracy is known."""
    if not name.endswith(".pt"):
        return pretrained(name)
    return from_checkpoint(KNOWN / name).model


def main() -> None:
    """Every case and seed; rows that are there are kept."""
    torch.set_num_threads(1)
    keep_heap()
    rows = read_rows(TABLE, Row)
    for name in sys.argv[1:] or CASES:
        for seed in SEEDS:
            measure(name, seed, rows)
    print(table(rows))


def measure(name: str, seed: int, rows: list[Row]) -> None:
    """What is missing of one network and seed."""
    case = CASES[name]
    attacks = [*case.variants, "more APGD", "Square"]
    many = f"spike_search, {MORE_STARTS} more starts"
    attacks += [many] if case.more_starts else []
    longer = {f"spike_search, {forwards} forwards": forwards for forwards in case.long}
    if seed == SEEDS[0]:
        attacks += [*longer, *(["AutoAttack"] if case.autoattack else [])]
    have = {row.attack: row for row in rows if (row.case, row.seed) == (name, seed)}
    if set(attacks) <= set(have):
        return
    measured = Measured(name, seed)
    if "starts" not in have:
        rows.append(measured.row_of("starts", measured.standing, measured.seconds))
    for attack in attacks:
        if attack in have:
            continue
        if attack in VARIANTS:
            run = partial(measured.search, VARIANTS[attack])
        elif attack == many:
            run = partial(measured.search, STANDARD, MORE_STARTS)
        elif attack == "more APGD":
            run = partial(measured.more_apgd, have["spike_search"].seconds)
        elif attack == "Square":
            run = partial(measured.more_square, have["spike_search"].seconds)
        elif attack == "AutoAttack":
            run = measured.autoattack
        else:
            run = partial(measured.search, replace(STANDARD, forwards=longer[attack]))
        have[attack] = measured.row(attack, run)
        rows.append(have[attack])
        print(have[attack], flush=True)
        write_rows(TABLE, rows)


def table(rows: list[Row]) -> str:
    """Markdown: what is left after each attack with each seed, and its mean seconds."""
    lines = ["| network | attack | accuracy, % | seconds |", "| --- | --- | ---: | ---: |"]
    for case, attack in dict.fromkeys((row.case, row.attack) for row in rows):
        found = [row for row in rows if (row.case, row.attack) == (case, attack)]
        left = " / ".join(f"{row.left:.1f}" for row in found)
        seconds = sum(row.seconds for row in found) / len(found)
        lines.append(f"| {case.replace('_', ' ')} | {attack} | {left} | {seconds:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
