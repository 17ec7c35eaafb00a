"""The record of proofs: the tables of certified.md and certified/record.png, both drawn from
certified/record.csv, which is filled in by hand.

python recipes/studies/record.py

A row is a published figure: one network on one data set at one radius. Clean, proved and attacked
(what the attacks of the source leave) are per cent of all test images, empty where the source was
not found to have them; networks of this repository begin with "here".
"""

import re
from pathlib import Path

import tyro
from tables import Options, Row, groups, read_table, write_page

from sj_robust.core.saved import markdown_table
from sj_robust.core.shown import COLOURS, new_figure, write_figure

PAGE = "certified.md"
HUES = (*COLOURS, "#8c510a")
MARKERS = {"spiking": "o", "ReLU": "s", "1-Lipschitz": "^"}
LINKS = {
    r"arXiv ([\d.]+)": r"[arXiv \1](https://arxiv.org/abs/\1)",
    r"github\.com/(\S+)": r"[\1](https://github.com/\1)",
    r"(certified/|\.\./concepts/|^)([\w.-]+\.(csv|md|txt))$": r"[\2](\1\2)",
}
"""Sources as the CSV file has them, and as links."""


def main(options: Options) -> None:
    """Tables and figure."""
    draw(read_table(options.output / "certified" / "record.csv"), options.output / "certified")
    write_page(options.output / PAGE, tables(options.output))


def task(row: Row) -> str:
    """Data set and radius."""
    return f"{row['data'].removesuffix(' (JPEG)')}, {row['radius']}"


def is_here(row: Row) -> bool:
    """Whether it is a network of this repository."""
    return row["network"].startswith("here")


def tables(folder: Path) -> dict[str, str]:
    """For each data set and radius the most proved published network, and our own in bold."""
    rows = read_table(folder / "certified" / "record.csv")
    heads = ["data, radius", "network", "kind", "source", "clean, %", "proved, %", "attacked, %"]
    cells = []
    for (title,), of_task in groups([{"task": task(row)} | row for row in rows], "task").items():
        kinds = set()
        for row in sorted(of_task, key=lambda row: float(row["proved"] or 0), reverse=True):
            kind = "proved" if row["proved"] else "not proved"
            if kind in kinds and not is_here(row):
                continue
            kinds |= set() if is_here(row) else {kind}
            proved = f"**{row['proved']}**" if is_here(row) else row["proved"]
            words = [title, row["network"], row["kind"], link(row["source"])]
            cells.append([*words, row["clean"], proved, row["attacked"]])
            title = ""
    return {"record": markdown_table(heads, cells, words=4)}


def link(source: str) -> str:
    """A source as Markdown."""
    for pattern, target in LINKS.items():
        source = re.sub(pattern, target, source)
    return source


def draw(rows: list[Row], folder: Path) -> None:
    """A point for each network of which clean accuracy is known, a colour for each task."""
    known = [row for row in rows if row["clean"]]
    colours = dict(zip(dict.fromkeys(map(task, known)), HUES, strict=True))
    figure = new_figure(5.2, 5.0)
    axes = figure.subplots()
    axes.set_aspect("equal")
    axes.plot([20, 100], [20, 100], color="#bbbbbb", linewidth=1)
    axes.annotate("all correct images proved", (28, 30), rotation=45, fontsize=7)
    for row in known:
        colour = colours[task(row)]
        filled = colour if is_here(row) else "none"
        marker = MARKERS[row["kind"]] if row["proved"] else "v"
        height = float(row["proved"] or row["attacked"])
        axes.plot(float(row["clean"]), height, marker, color=colour, markerfacecolor=filled)
    for title, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=title)
    for kind in dict.fromkeys(row["kind"] for row in known if is_here(row)):
        axes.plot([], [], MARKERS[kind], color="#767676", label=f"{kind}, here")
    published = {f"{kind}, published": marker for kind, marker in MARKERS.items()}
    published["spiking, published, not proved: under attack"] = "v"
    for label, marker in published.items():
        axes.plot([], [], marker, color="#767676", markerfacecolor="none", label=label)
    axes.set(xlabel="clean accuracy, %", ylabel="proved, %")
    axes.legend(fontsize=6, loc="upper left")
    write_figure(figure, folder / "record.png")


if __name__ == "__main__":
    main(tyro.cli(Options))
