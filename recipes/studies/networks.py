"""What works with which network: SpikingJelly's model zoo and the patterns of its tutorials, built
small.

python recipes/studies/networks.py                        # what works, in the installed release
python recipes/studies/networks.py --names MSResNet loop  # whose names contain one of these words
python recipes/studies/networks.py --measure              # proofs and evaluations of the zoo

It writes networks.csv or networks_measured.csv, whose rows of other releases stay, and the tables
of networks.md. A few minutes on one core; with --measure about a minute per network.
"""

import importlib
import sys
import time
import warnings
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from networks_columns import COLUMNS, NETWORKS, left, outcome, proved
from tables import RESULTS, Row, groups, numbers, once, read_table, write_page

from sj_robust.core.saved import markdown_table

PAGE = "networks.md"
TITLES = {
    "evaluate": "`evaluate`",
    "compare": "`compare_potentials`",
    "gains": "gains",
    "verify": "`verify`",
    "replace": "`replace_neurons`",
    "tune": "fine-tuning",
}
TAKES = {"takes images": "images", "takes a sequence": "sequence", "takes one step": "steps"}
LARGE = ("SNASNet", "SpikeDHS")
"""Networks that are tried only where they are named."""


@dataclass(frozen=True)
class Options:
    """What is tried."""

    names: tuple[str, ...] = ()
    """Words in the names of networks; none: all but the largest."""
    measure: bool = False
    """Prove and evaluate the networks of the zoo."""
    output: Path = RESULTS


def main(options: Options) -> None:
    """Try what is not in the table, or what is named again."""
    sys.path.insert(0, str(NETWORKS.parent))
    module = importlib.import_module(NETWORKS.stem)
    sys.path.remove(str(NETWORKS.parent))
    rows = module.BOUNDED if options.measure else module.ROWS
    words = options.names or tuple(name for name in rows if not name.startswith(LARGE))
    chosen = {name: row for name, row in rows.items() if any(word in name for word in words)}
    grid = [{"release": version("spikingjelly"), "network": name} for name in chosen]
    tried = measured_row if options.measure else works_row
    path = options.output / ("networks_measured.csv" if options.measure else "networks.csv")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        once(path, grid, lambda release, network: tried(network, chosen[network]))
    write_page(options.output / PAGE, tables(options.output))


def works_row(name: str, row: Any) -> dict[str, str]:
    """What happens in every column: "yes", in how far, or why not."""
    return {column: outcome(tried, row) for column, tried in COLUMNS.items()}


def measured_row(name: str, row: Any) -> dict[str, str]:
    """Proofs and a short evaluation, with CPU seconds; slow networks on smaller images."""
    row = replace(row, shape=(3, 8, 8)) if name.startswith("SpikeDHS") else row
    cells = {}
    for column, tried in (("verify", proved), ("fast", left)):
        began = time.process_time()
        cells[column] = outcome(tried, row)
        cells[f"{column} seconds"] = str(round(time.process_time() - began, 1))
    return cells


def tables(folder: Path) -> dict[str, str]:
    """What works with which network, and what is proved and attacked."""
    found = read_table(folder / "networks.csv")
    measured = read_table(folder / "networks_measured.csv")
    heads = ["network", "SpikingJelly", "takes", *TITLES.values()]
    works = markdown_table(heads, grouped(found), words=len(heads))
    heads = ["SpikingJelly", "networks", "bounded", "both proved", "CPU s"]
    heads += ["attacked", "still correct", "CPU s"]
    by_release = groups(measured, "release").items()
    lines = [[release, *counted(rows)] for (release,), rows in by_release]
    proofs = markdown_table(heads, lines, words=len(heads))
    return {"networks": works, "measured": proofs}


def grouped(found: list[Row]) -> list[list[str]]:
    """Networks with equal cells share a row, but for zoo and tutorials."""
    releases = {row["release"] for row in found}
    names: dict[tuple[bool, tuple[str, ...]], list[str]] = {}
    for (name,), rows in groups(found, "network").items():
        there = [row["release"] for row in rows]
        called = rows[0]["takes"]
        kinds = [kind for start, kind in TAKES.items() if called.startswith(start)]
        shown = ["both" if len(there) == len(releases) else ", ".join(there)]
        shown.append(kinds[0] if kinds else "no")
        shown += [short(rows, column) for column in TITLES]
        of_zoo = name[0].isupper()
        names.setdefault((of_zoo, tuple(shown)), []).append(name)
    return [["; ".join(of_row), *cells] for (_, cells), of_row in names.items()]


def short(rows: list[Row], column: str) -> str:
    """What the releases say, once if it is the same."""
    cells = {row["release"]: row[column].partition(": ")[0] for row in rows}
    if len(set(cells.values())) == 1:
        return next(iter(cells.values()))
    return ", ".join(f"{text} ({release})" for release, text in cells.items())


def counted(rows: list[Row]) -> list[str]:
    """Number of networks, and of those that were bounded, attacked and robust, with seconds."""
    cells = [str(len(rows))]
    for column, best in (("verify", "2 of "), ("fast", "1 of ")):
        worked = [row for row in rows if row[column] and not row[column].startswith("no: ")]
        reached = sum(row[column].startswith(best) for row in worked)
        seconds = median(numbers(worked, f"{column} seconds"))
        cells += [str(len(worked)), str(reached), f"{seconds:.1f}"]
    return cells


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(tyro.cli(Options))
