"""Tables of networks.md, from networks.csv and networks_measured.csv.

python recipes/studies/networks_tables.py
"""

import textwrap
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import tyro
from tables import RESULTS, Row, groups, numbers, read_table, write_page

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
REASON = 110
"""Characters of a reason."""


@dataclass(frozen=True)
class Options:
    """Where the CSV files are."""

    output: Path = RESULTS


def main(options: Options) -> None:
    """The page."""
    write_page(options.output / PAGE, tables(options.output))


def tables(folder: Path) -> dict[str, str]:
    """What works with which network, what is proved and attacked, and why others do not work."""
    found = read_table(folder / "networks.csv")
    measured = read_table(folder / "networks_measured.csv")
    heads = ["network", "SpikingJelly", "takes", "returns", *TITLES.values()]
    works = markdown_table(heads, grouped(found), words=len(heads))
    heads = ["SpikingJelly", "networks", "bounded", "both proved", "CPU s"]
    heads += ["attacked", "still correct", "CPU s"]
    by_release = groups(measured, "release").items()
    lines = [[release, *counted(rows)] for (release,), rows in by_release]
    proofs = markdown_table(heads, lines, words=len(heads))
    return {"networks": works, "measured": proofs, "reasons": explained(found, measured)}


def grouped(found: list[Row]) -> list[list[str]]:
    """Networks with equal cells share a row, but for zoo and tutorials."""
    releases = {row["release"] for row in found}
    names: dict[tuple[bool, tuple[str, ...]], list[str]] = {}
    for (name,), rows in groups(found, "network").items():
        there = [row["release"] for row in rows]
        called = rows[0]["takes"]
        kinds = [kind for start, kind in TAKES.items() if called.startswith(start)]
        shown = ["both" if len(there) == len(releases) else ", ".join(there)]
        shown += [kinds[0], called.partition("returns ")[2]] if kinds else ["no", "no"]
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


def explained(found: list[Row], measured: list[Row]) -> str:
    """Reasons, each once, with the networks and columns that it concerns."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for rows, columns in ((found, list(TITLES)), (measured, ["verify"])):
        for (name,), of_network in groups(rows, "network").items():
            for column in columns:
                for row in of_network:
                    add_reason(reasons, row[column], name, TITLES[column])
    lines = []
    for why, concerned in reasons.items():
        by_titles: dict[tuple[str, ...], list[str]] = {}
        for name, titles in concerned.items():
            by_titles.setdefault(tuple(titles), []).append(name)
        places = []
        for of_reason, names in by_titles.items():
            where = "all" if len(of_reason) == len(TITLES) else ", ".join(of_reason)
            places.append(f"{'; '.join(names)} ({where})")
        lines.append(f"- {'; '.join(places)}: {why}")
    return "\n".join(lines)


def add_reason(reasons: dict[str, dict[str, list[str]]], cell: str, name: str, title: str) -> None:
    """Note why a cell does not say yes, without the list of what has bounds."""
    text = cell.partition(": ")[2].partition("; there are for ")[0]
    text = text.replace("|", "\\|").replace("*", "\\*").replace("<", "\\<")
    if text:
        why = textwrap.shorten(text, REASON, placeholder=" ...")
        titles = reasons.setdefault(why, {}).setdefault(name, [])
        if title not in titles:
            titles.append(title)


if __name__ == "__main__":
    main(tyro.cli(Options))
