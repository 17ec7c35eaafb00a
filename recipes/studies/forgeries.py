r"""How many forged reports, out of 100, ``--leaderboard add`` accepts, and how many honest ones.

A network's own report is forged by at least 5 points: images that its attacks broke are said to
stand. The attacks meet every image again once; each try then looks up what they came to.

    python recipes/evaluate.py digits/dlif-at --test-limit 64 --eps 0.1 --output runs/1
    python recipes/evaluate.py digits/dlif-at --test-limit 64 --eps 0.1 --suite fast --output runs/2
    python recipes/evaluate.py digits/dlif-at --eps 0.1 --suite fast --output runs/3
    PYTHONPATH=recipes python recipes/studies/forgeries.py runs/1/report.json \
        runs/2/report.json runs/3/report.json --output docs/results/leaderboard/forgeries.csv
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import tyro
from lab.evaluating import read_once
from lab.leaderboard.submission import Met, Rerun
from tyro.conf import Positional

from sj_robust.core.saved import csv_text
from sj_robust.data import load_images
from sj_robust.evaluation import Report
from sj_robust.evaluation.result import DIGITS, Row
from sj_robust.evaluation.subject import from_checkpoint

ROUNDED = 0.12
"""Share of digests that are others where torch rounds in another way."""


@dataclass(frozen=True)
class Options:
    """Options of the study."""

    reports: Positional[list[Path]]
    """Reports of shipped networks."""
    output: Path
    """The table."""
    data_root: str = "data"
    """Folder of the data sets."""
    tries: int = 100
    """Tries of each case."""


def main(options: Options) -> None:
    """Write the table."""
    lines = []
    for path in options.reports:
        lines += cases(Report.load(path), options)
        options.output.write_text(csv_text(list(lines[0]), lines), encoding="utf-8")


@dataclass(frozen=True)
class Known(Rerun):
    """A rerun of which it is known what the first attack makes of every image, and what all break.

    Attributes:
        found: What the first attack makes of an image.
        early: Images that all attacks break where their search ends early.
        late: Those that they break at the end.
    """

    found: dict[int, Met]
    early: set[int]
    late: set[int]

    def met(self, numbers: Sequence[int]) -> dict[int, Met]:
        """What the first attack makes of images."""
        return {number: self.found[number] for number in numbers if number in self.found}

    def broken(self, numbers: Sequence[int], to_the_end: bool) -> set[int]:
        """Those of the images that any attack breaks."""
        return (self.late if to_the_end else self.early).intersection(numbers)


def cases(report: Report, options: Options) -> list[dict[str, str]]:
    """The lines of one network."""
    splits = load_images(report.dataset, root=options.data_root, test_limit=len(report.labels))
    network = from_checkpoint(str(report.configuration["checkpoint"]))
    rerun = Rerun.of(report, network, read_once(splits.test, 256))
    met = rerun.met(sorted(report.standing("clean")))
    early = {number for number, found in met.items() if found.digest}
    early |= rerun.broken(sorted(met.keys() - early), False)
    late = early | rerun.broken(sorted(met.keys() - early), True)
    known = Known(**vars(rerun), found=met, early=early, late=late)
    lost = sorted(report.standing("clean") - report.standing("everything"))
    many = ceil(0.05 * len(report.labels))
    hidden = sorted(lost, key=lambda number: (number not in early, met[number].lead))[-many:]
    forgeries: dict[str, Callable[[random.Random], list[int]]] = {
        "honest": lambda drawn: [],
        "at random": lambda drawn: drawn.sample(lost, many),
        "hardest to find": lambda drawn: hidden,
    }
    lines = []
    for name, choose in forgeries.items():
        for share in (0.0, ROUNDED, 1.0):
            accepted = 0
            for number in range(options.tries):
                drawn = random.Random(number)
                one = spoilt(forged(report, set(choose(drawn))), share, drawn)
                check = replace(known, report=one).few_fall(str(number).encode())
                accepted += bool(check.passed)
            line = {"network": report.name, "suite": report.suite}
            line |= {"images": str(len(report.labels)), "forged": name}
            line |= {"digests that differ": f"{share:.0%}", "accepted": str(accepted)}
            lines.append(line | {"of": str(options.tries)})
    return lines


def forged(report: Report, images: set[int]) -> Report:
    """The report with images that were broken said to stand."""
    rows = []
    for row in report.rows:
        if row.attacks and row.variant == report.main:
            row = without(row, images)
        rows.append(row)
    return replace(report, rows=tuple(rows))


def without(row: Row, images: set[int]) -> Row:
    """The row of an attack that did not break some images."""
    kept = [place for place, number in enumerate(row.fell) if number not in images]
    digests = [row.digests[DIGITS * place : DIGITS * (place + 1)] for place in kept]
    fell = [row.fell[place] for place in kept]
    return replace(row, fell=tuple(fell), outside=(), digests="".join(digests))


def spoilt(report: Report, share: float, drawn: random.Random) -> Report:
    """The report with a share of its digests changed."""
    rows = []
    for row in report.rows:
        parts = []
        for start in range(0, len(row.digests), DIGITS):
            changed = drawn.random() < share
            parts.append("f" * DIGITS if changed else row.digests[start : start + DIGITS])
        rows.append(replace(row, digests="".join(parts)))
    return replace(report, rows=tuple(rows))


if __name__ == "__main__":
    main(tyro.cli(Options))
