"""The study of published defences: what its sweeps came to.

python recipes/sweep.py --sweep recipes/studies/defences_fashion_mnist.yaml --jobs 2
python recipes/sweep.py --sweep recipes/studies/defences_cifar10.yaml --jobs 2
python recipes/studies/defences.py         # the sweeps runs/defences_*, as far as they are

It adds every network and radius to defences/networks.csv, where those of other machines stay, and
their means to defences/defences.csv, where rows of more seeds stay.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import tyro
import yaml
from defences_tables import PAGE, tables
from tables import RESULTS, ROOT, Row, groups, merged, numbers, read_table, write_page

from sj_robust.core.eps import eps_text, parse_eps
from sj_robust.evaluation import Report

CELL = ("data", "radius", "cell")
SEARCHES = Path(__file__).with_name("defences_fashion_mnist.yaml")
"""Says what is searched in each cell, also for sweeps that take the values from there."""
FIGURES = {
    "clean": ("paper", "clean"),
    "pgd": ("paper", "pgd20/last"),
    "control": ("standard", "control"),
    "at_most": ("standard", "everything"),
    "proved": ("standard", "verified"),
}
"""Columns of the CSV file: suite and figure."""


@dataclass(frozen=True)
class Options:
    """Where the sweeps are."""

    runs: Path = ROOT / "runs"
    output: Path = RESULTS


def main(options: Options) -> None:
    """Read the sweeps, and draw."""
    folder = options.output / "defences"
    found: list[Row] = []
    for sweep_folder in sorted(options.runs.glob("defences_*")):
        sweep = yaml.safe_load((sweep_folder / "sweep.yaml").read_text(encoding="utf-8"))
        for record in sorted(sweep_folder.glob("runs/*/run.json")):
            found += rows_of(record, sweep)
    networks = merged(folder / "networks.csv", (*CELL, "seed"), found)
    if not networks:
        raise SystemExit(f"no network of defences_* is evaluated in {options.runs}; run a sweep")
    costs = {row["cell"]: row["relative"] for row in read_table(folder / "cost.csv")}
    table = folder / "defences.csv"
    known = {key: int(row["seeds"]) for key, (row,) in groups(read_table(table), *CELL).items()}
    rows = []
    for key, ours in groups(networks, *CELL).items():
        if known.get(key, 0) <= len(ours):
            cost = costs.get(key[2])
            rows.append(means(ours) | {"cost": f"{float(cost):.2f}" if cost else ""})
    merged(table, CELL, rows)
    write_page(options.output / PAGE, tables(options.output))


def means(networks: list[Row]) -> Row:
    """The row of networks that differ in their seeds: means and standard deviations in per cent."""
    if len({(row["images"], row["chosen"]) for row in networks}) > 1:
        raise ValueError(f"networks of {networks[0]['cell']} differ in images or options")
    row = {name: networks[0][name] for name in CELL}
    row["seeds"] = str(len(networks))
    for column in ("clean", "pgd", "control", "no_spike_search", "at_most"):
        values = [100 * value for value in numbers(networks, column)]
        row[column] = f"{fmean(values):.1f}" if values else ""
        row[f"{column}_sd"] = f"{stdev(values):.1f}" if len(values) > 1 else ""
    proved, mppd = numbers(networks, "proved"), numbers(networks, "ms_mppd")
    row["proved"] = f"{100 * fmean(proved):.1f}" if proved else ""
    row["ms_mppd"] = f"{fmean(mppd):.4g}" if mppd else ""
    return row | {"chosen": networks[0]["chosen"]}


def rows_of(path: Path, sweep: dict[str, Any]) -> Iterator[Row]:
    """A run of a sweep, by its record, at every radius where both of its evaluations are done:
    shares in [0, 1], and MS-MPPD under the paper's PGD.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    data = str(sweep["options"]["dataset"])
    by_radius: dict[str, dict[str, str]] = {}
    for name, own in sweep["evaluations"].items():
        given = {"suite": name} | sweep["evaluation_options"] | own
        by_radius.setdefault(eps_text(parse_eps(given["eps"])), {})[given["suite"]] = name
    for radius, suites in by_radius.items():
        if not set(suites.values()) <= record["evaluations"].keys():
            continue
        report = Report.load(path.parent / suites["standard"] / "report.json")
        row = {
            "data": data.rpartition("/")[2] if ":" in data else data,
            "radius": radius,
            "cell": record["cell"],
            "seed": str(record["options"]["seed"]),
        }
        for column, (suite, name) in FIGURES.items():
            counts = record["evaluations"][suites[suite]]["figures"].get(name)
            row[column] = str(counts["correct"] / counts["total"]) if counts else ""
        mppd = record.get("ms_mppd", {}).get(suites["paper"], {}).get("pgd20", "")
        row |= {"ms_mppd": str(mppd), "images": str(len(report.labels))}
        row |= {"chosen": chosen(record), "no_spike_search": str(without_spike_search(report))}
        yield row


def chosen(record: dict[str, Any]) -> str:
    """Name and value of the option of a run that its cell searches."""
    cells = yaml.safe_load(SEARCHES.read_text(encoding="utf-8"))["cells"]
    ((option, _),) = cells[record["cell"]]["search"].items()
    return f"{option} {record['options'][option]}"


def without_spike_search(report: Report) -> float:
    """Share of images that stand against all attacks but those that follow spikes."""
    standing = report.standing("clean")
    for row in report.attacks:
        kind = row.member.removeprefix("control/").partition("/")[0]
        if kind not in ("spike_search", "program"):
            standing -= report.broken(row)
    return len(standing) / len(report.labels)


if __name__ == "__main__":
    main(tyro.cli(Options))
