"""Writes the record of proofs into certified.md and draws it, both from certified/record.csv.

python docs/results/record.py        # the tables of the page, and certified/record.png
"""

import re
from dataclasses import dataclass
from pathlib import Path

from rows import read_rows

from sj_robust.core.saved import markdown_table
from sj_robust.core.shown import COLOURS, new_figure, write_figure

PAGE = Path(__file__).with_name("certified.md")
FOLDER = Path(__file__).with_name("certified")
BEGINS = "<!-- record: begin -->\n\n"
ENDS = "\n\n<!-- record: end -->"
HUES = (*COLOURS, "#8c510a")
MARKERS = {"spiking": "o", "ReLU": "s", "1-Lipschitz": "^"}
LINKS = {
    r"arXiv ([\d.]+)": r"[arXiv \1](https://arxiv.org/abs/\1)",
    r"github\.com/(\S+)": r"[\1](https://github.com/\1)",
    r"(certified/|\.\./concepts/|^)([\w.-]+\.(csv|md|txt))$": r"[\2](\1\2)",
}
"""Sources as the table of figures has them, and as links."""


@dataclass(frozen=True)
class Row:
    """A published figure: one network on one data set at one radius.

    ``clean``, ``proved`` and ``attacked`` (what the attacks of the source leave) are per cent of
    all test images, empty where the source was not found to have them.
    """

    data: str
    radius: str
    network: str
    kind: str
    clean: str
    proved: str
    attacked: str
    source: str

    @property
    def task(self) -> str:
        """Data set and radius."""
        return f"{self.data.removesuffix(' (JPEG)')}, {self.radius}"

    @property
    def here(self) -> bool:
        """Whether it is a network of this repository."""
        return self.network.startswith("here")


def main() -> None:
    """Tables and figure."""
    rows = read_rows(FOLDER / "record.csv", Row)
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGINS)[0], text.split(ENDS)[1]
    PAGE.write_text(f"{before}{BEGINS}{tables(rows)}{ENDS}{after}", encoding="utf-8")
    draw(rows)


def tables(rows: list[Row]) -> str:
    """A Markdown table for each data set and radius, the most proved first, our own in bold."""
    blocks = []
    for task in dict.fromkeys(row.task for row in rows):
        of_task = [row for row in rows if row.task == task]
        of_task.sort(key=lambda row: float(row.proved or 0), reverse=True)
        blocks.append(f"### {task}\n\n{table(of_task)}")
    return "\n\n".join(blocks)


def table(rows: list[Row]) -> str:
    """Figures as Markdown."""
    heads = ["network", "kind", "source", "clean, %", "proved, %", "under attack, %"]
    cells = []
    for row in rows:
        proved = f"**{row.proved}**" if row.here else row.proved
        source = row.source
        for pattern, link in LINKS.items():
            source = re.sub(pattern, link, source)
        cells.append([row.network, row.kind, source, row.clean, proved, row.attacked])
    return markdown_table(heads, cells, words=3)


def draw(rows: list[Row]) -> None:
    """A point for each network of which clean accuracy is known, a colour for each task."""
    known = [row for row in rows if row.clean]
    tasks = dict.fromkeys(row.task for row in known)
    colours = dict(zip(tasks, HUES, strict=True))
    figure = new_figure(5.2, 5.0)
    axes = figure.subplots()
    axes.set_aspect("equal")
    axes.plot([20, 100], [20, 100], color="#bbbbbb", linewidth=1)
    axes.annotate("all correct images proved", (28, 30), rotation=45, fontsize=7)
    for row in known:
        colour = colours[row.task]
        filled = colour if row.here else "none"
        marker = MARKERS[row.kind] if row.proved else "v"
        height = float(row.proved or row.attacked)
        axes.plot(float(row.clean), height, marker, color=colour, markerfacecolor=filled)
    for task, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=task)
    for kind in dict.fromkeys(row.kind for row in known if row.here):
        axes.plot([], [], MARKERS[kind], color="#767676", label=f"{kind}, here")
    for kind, marker in MARKERS.items():
        label = f"{kind}, published"
        axes.plot([], [], marker, color="#767676", markerfacecolor="none", label=label)
    label = "spiking, published, not proved: under attack"
    axes.plot([], [], "v", color="#767676", markerfacecolor="none", label=label)
    axes.set_xlabel("clean accuracy, %")
    axes.set_ylabel("proved, %")
    axes.legend(fontsize=6, loc="upper left")
    write_figure(figure, FOLDER / "record.png")


if __name__ == "__main__":
    main()
