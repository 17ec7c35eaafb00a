"""Draws proved over clean accuracy of networks, from certified/record.csv.

python docs/results/record.py                     # writes certified/record.png
"""

import csv
from pathlib import Path

from sj_robust.core.shown import COLOURS, new_figure, write_figure

FOLDER = Path(__file__).with_name("certified")
HUES = (*COLOURS, "#8c510a")
KINDS = {"spiking": "o", "ReLU": "s"}
"""Marker of each kind of network of which both figures are published."""


def main() -> None:
    """One point per network, one colour per task."""
    with (FOLDER / "record.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["clean"]]
    tasks = {f"{row['data'].removesuffix(' (JPEG)')}, {row['radius']}": None for row in rows}
    colours = dict(zip(tasks, HUES, strict=True))
    figure = new_figure(5.2, 5.0)
    axes = figure.subplots()
    axes.set_aspect("equal")
    axes.plot([20, 100], [20, 100], color="#bbbbbb", linewidth=1)
    axes.annotate("proved = clean", (28, 30), rotation=45, fontsize=7)
    for row in rows:
        task = f"{row['data'].removesuffix(' (JPEG)')}, {row['radius']}"
        colour = colours[task]
        marker = KINDS[row["kind"]]
        filled = colour if row["network"].startswith("here") else "none"
        x, y = float(row["clean"]), float(row["proved"])
        axes.plot(x, y, marker, color=colour, markerfacecolor=filled)
    for task, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=task)
    axes.plot([], [], "o", color="#767676", label="spiking, here")
    axes.plot([], [], "o", color="#767676", markerfacecolor="none", label="spiking, published")
    axes.plot([], [], "s", color="#767676", markerfacecolor="none", label="ReLU, published")
    axes.set_xlabel("clean accuracy, %")
    axes.set_ylabel("proved accuracy, %")
    axes.legend(fontsize=7, loc="upper left")
    write_figure(figure, FOLDER / "record.png")


if __name__ == "__main__":
    main()
