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
from typing import Any

import torch
import tyro
from networks_columns import COLUMNS, NETWORKS, left, outcome, proved
from networks_tables import PAGE, tables
from tables import RESULTS, once, write_page

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


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(tyro.cli(Options))
