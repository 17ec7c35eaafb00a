"""Keep the tables of a sweep: its results.csv and contrast-*.csv become rows of sweeps.csv and
contrasts.csv in docs/results, which have those of every sweep of the pages.

python recipes/studies/sweeps.py digits runs/digits_sweep
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tables import RESULTS, Row, read_table, replace_rows

FIGURES = ("figure", "mean", "standard_deviation", "seeds", "published", "source")
DIFFERENCES = ("first", "second", "figure", "difference", "standard_error", "low", "high", "pairs")


@dataclass(frozen=True)
class Options:
    """Which sweep."""

    study: Annotated[str, tyro.conf.Positional]
    """Its name in the tables; rows that have it are replaced."""
    folder: Annotated[Path, tyro.conf.Positional]
    """The sweep's folder."""
    output: Path = RESULTS


def main(options: Options) -> None:
    """Replace the rows of the sweep in both tables."""
    found = read_table(options.folder / "results.csv")
    key = {"study": options.study}
    replace_rows(options.output / "sweeps.csv", key, [kept(row, FIGURES) for row in found])
    differences = []
    for path in sorted(options.folder.glob("contrast-*.csv")):
        option = path.stem.removeprefix("contrast-")
        differences += [{"of": option} | kept(row, DIFFERENCES) for row in read_table(path)]
    replace_rows(options.output / "contrasts.csv", key, differences)


def kept(row: Row, columns: Sequence[str]) -> Row:
    """The options of a row in one cell, such as neuron=lif, rho=1; and its figures."""
    options = [f"{name}={value}" for name, value in row.items() if name not in columns]
    return {"cell": ", ".join(options)} | {name: row[name] for name in columns}


if __name__ == "__main__":
    main(tyro.cli(Options))
