"""Pictures of defences.md, from defences/defences.csv.

python recipes/studies/defences_pictures.py
"""

from pathlib import Path

import tyro
from defences_tables import attacked, by_threat, number, rank_correlation
from matplotlib.figure import Figure
from tables import Options, panels

from sj_robust.core.shown import COLOURS, GREY, print_style, write_figure


def main(options: Options) -> None:
    """Both pictures."""
    draw_brackets(options.output)
    draw_mppd(options.output)


@print_style()
def draw_brackets(folder: Path) -> None:
    """From what is proved to what attacks leave, with the standard deviation of that, what they
    leave without the search over spikes, the paper's PGD and clean accuracy.
    """
    threats = by_threat(folder)
    figure, places = panels(len(threats), 0.8 + 0.24 * max(map(len, threats.values())))
    for panel, (title, rows) in zip(places, threats.items(), strict=True):
        ordered = sorted(rows, key=lambda row: number(row["at_most"]))
        for place, row in enumerate(ordered):
            low, high = number(row["proved"] or "0"), number(row["at_most"])
            panel.barh(place, high - low, left=low, height=0.6, color=COLOURS[0])
            spread = number(row["at_most_sd"] or "0")
            ends = [high - spread, high + spread]
            panel.plot(ends, [place, place], lw=1, color=GREY, label="± over seeds")
            without = number(row["no_spike_search"])
            panel.plot(without, place, "x", ms=4, color=GREY, label="no spike search")
            panel.plot(number(row["pgd"]), place, "o", ms=3, color=COLOURS[1], label="PGD-20")
            panel.plot(number(row["clean"]), place, "|", color=GREY, label="clean")
        panel.set_yticks(range(len(ordered)), [row["name"] for row in ordered])
        panel.set(xlim=(0, 100), xlabel="accuracy, %", title=", ".join(title))
    finish(figure, folder / "defences" / "brackets.png")


@print_style()
def draw_mppd(folder: Path) -> None:
    """MS-MPPD under attack against robust accuracy, a point per defence."""
    threats = by_threat(folder)
    figure, places = panels(len(threats), 3.2)
    for panel, (title, rows) in zip(places, threats.items(), strict=True):
        for row in rows:
            at = (number(row["ms_mppd"]), number(row["no_spike_search"]))
            mark, kind = ("o", "with AT") if attacked(row) else ("s", "without")
            panel.plot(*at, mark, color=COLOURS[attacked(row)], label=kind)
            panel.annotate(row["name"], at, (3, 3), textcoords="offset points", size=5)
        panel.margins(x=0.2)
        panel.set(xscale="log", xlabel="MS-MPPD under PGD-20")
        panel.set_ylabel("accuracy without spike search, %")
        panel.set_title(f"{', '.join(title)}: rank correlation {rank_correlation(rows)[0]:+.2f}")
    finish(figure, folder / "defences" / "ms_mppd.png")


def finish(figure: Figure, path: Path) -> None:
    """Name every kind of mark once, below the figure, and write it."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    figure.legend(by_label.values(), by_label, loc="outside lower center", ncols=2)
    write_figure(figure, path)


if __name__ == "__main__":
    main(tyro.cli(Options))
