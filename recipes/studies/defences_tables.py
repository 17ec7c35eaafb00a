"""Tables of defences.md, from defences/defences.csv and defences/claims.csv.

python recipes/studies/defences_tables.py
"""

import math
from collections.abc import Sequence
from pathlib import Path

import tyro
from scipy.stats import spearmanr
from tables import Options, Row, groups, read_table, write_page

from sj_robust.core.saved import markdown_table

PAGE = "defences.md"
DATA = {"fashion_mnist": "Fashion-MNIST", "cifar10_pictures": "CIFAR-10 (JPEG)"}
STOCHASTIC = ("tgo", "stog", "rsc", "poisson")
"""Cells whose networks draw random numbers."""


def main(options: Options) -> None:
    """The page."""
    write_page(options.output / PAGE, tables(options.output))


def number(text: str) -> float:
    """A figure, NaN where there is none."""
    return float(text) if text else math.nan


def defence(cell: str) -> str:
    """The cell without adversarial training."""
    return cell.removesuffix("_at")


def attacked(row: Row) -> bool:
    """Whether it was trained on attacked images."""
    return row["cell"] == "at" or row["cell"].endswith("_at")


def by_threat(folder: Path) -> dict[tuple[str, ...], list[Row]]:
    """Rows of one data set and radius together, with the name of every defence."""
    claims = read_table(folder / "defences" / "claims.csv")
    names = {row["cell"]: row["defence"] for row in claims}
    rows = []
    for row in read_table(folder / "defences" / "defences.csv"):
        cell = row["cell"]
        name = names.get(cell) or f"{names[defence(cell)]}, AT"
        star = "*" if defence(cell) in STOCHASTIC else ""
        rows.append(row | {"name": f"{name}{star}", "data": DATA.get(row["data"], row["data"])})
    return groups(rows, "data", "radius")


def tables(folder: Path) -> dict[str, str]:
    """A table for every data set, the rank correlations, and what is left of the claims."""
    threats = by_threat(folder)
    lines = []
    for (data, radius), rows in threats.items():
        line = [f"{data}, {radius}"]
        for some in (rows, [row for row in rows if attacked(row)]):
            value, count = rank_correlation(some)
            line.append("–" if math.isnan(value) else f"{value:+.2f} ({count} rows)")
        lines.append(line)
    heads = ["MS-MPPD under PGD-20, *no spike search*", "all", "with AT"]
    found = {"correlations": markdown_table(heads, lines)}
    for data in dict.fromkeys(data for data, _ in threats):
        of_data = {radius: rows for (name, radius), rows in threats.items() if name == data}
        found[data] = table(of_data)
    return found | {"claims": claimed(threats, folder)}


def table(by_radius: dict[str, list[Row]]) -> str:
    """One data set, the most robust defence first, with a group of columns for every radius, and
    the cost of training where it was measured.
    """
    heads = ["defence", "clean, %"]
    lines: dict[str, list[str]] = {}
    costs: dict[str, str] = {}
    of_first = next(iter(by_radius.values()))
    for row in sorted(of_first, key=lambda row: -number(row["at_most"])):
        lines[row["cell"]] = [row["name"], row["clean"]]
        costs[row["cell"]] = row["cost"]
    for radius, rows in by_radius.items():
        at = f", {radius}" if len(by_radius) > 1 else ", %"
        heads += [f"{name}{at}" for name in ("PGD-20", "no spike search", "at most")]
        for row in rows:
            spread = f" ± {row['at_most_sd']}" if row["at_most_sd"] else ""
            most = f"**{row['at_most']}{spread}**"
            lines[row["cell"]] += [row["pgd"], row["no_spike_search"], most]
    if len(by_radius) == 1:  # measured once, so shown once
        cells = [[*line, costs[cell]] for cell, line in lines.items()]
        return markdown_table([*heads, "cost"], cells)
    return markdown_table(heads, list(lines.values()))


def claimed(threats: dict[tuple[str, ...], list[Row]], folder: Path) -> str:
    """What each paper claims, and what its defence adds here to robust accuracy, in points, alone
    and with AT.
    """
    bases = {"undefended", "at"}
    threats = {one: rows for one, rows in threats.items() if bases <= {row["cell"] for row in rows}}
    heads = ["defence", "claim in its own setting"]
    heads += [f"left at {', '.join(threat)}" for threat in threats]
    lines = []
    for row in read_table(folder / "defences" / "claims.csv"):
        if not row["claim"]:
            continue
        alone = defence(row["cell"])
        column = "no_spike_search" if alone in STOCHASTIC else "at_most"
        line = [row["defence"].removesuffix(", AT"), row["claim"]]
        for rows in threats.values():
            left = {one["cell"]: number(one[column]) for one in rows}
            gains = []
            for cell, base in ((alone, "undefended"), (f"{alone}_at", "at")):
                gain = left.get(cell, math.nan) - left[base]
                gains.append("–" if math.isnan(gain) else f"{gain:+.1f}")
            line.append(" / ".join(gains))
        lines.append(line)
    return markdown_table(heads, lines, words=2)


def rank_correlation(rows: Sequence[Row]) -> tuple[float, int]:
    """Spearman's correlation of MS-MPPD under attack with robust accuracy without the spike search,
    and the number of defences.
    """
    known = [row for row in rows if row["ms_mppd"] and row["no_spike_search"]]
    if len(known) < 3:
        return math.nan, len(known)
    pairs = [[float(row[name]) for row in known] for name in ("ms_mppd", "no_spike_search")]
    return float(spearmanr(*pairs).statistic), len(known)


if __name__ == "__main__":
    main(tyro.cli(Options))
