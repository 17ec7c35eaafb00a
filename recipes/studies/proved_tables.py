"""Tables of proved.md and its pictures, from the CSV files in proved/.

python recipes/studies/proved_tables.py
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import tyro
from matplotlib.axes import Axes
from scipy.stats import spearmanr
from tables import Options, Row, groups, numbers, read_table, with_spread, write_page

from sj_robust.core.eps import parse_eps
from sj_robust.core.saved import markdown_table
from sj_robust.core.shown import COLOURS, new_figure, print_style, write_figure

PAGE = "proved.md"
TITLES = {"digits": "Digits", "fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}
RADII = dict.fromkeys(TITLES, ("0.002", "0.004", "0.008", "0.016"))
RADII["cifar10"] = ("0.5/255", "1/255", "2/255", "4/255")
SHOWN = {name: radii[2:] for name, radii in RADII.items()} | {"cifar10": RADII["cifar10"][:2]}
"""Radii in the table of the page; figure and CSV file have all."""
WEIGHTS = ("without", "1, last, l2", "3, last, l2")
"""Weights of MS-MPPD in the tables of the page."""


def main(options: Options) -> None:
    """The page and all pictures."""
    for name in TITLES:
        draw(name, options.output)
    write_page(options.output / PAGE, tables(options.output))


def tables(folder: Path) -> dict[str, str]:
    """Two tables for every data set in the CSV files."""
    found = {}
    for name in TITLES:
        rows = of_data(name, "networks", folder)
        picture = f"![Share proved and not broken; bounds over MS-MPPD](proved/{name}.png)"
        found[f"{name} bracket"] = f"{bracket(name, rows)}\n\n{picture}"
        found[f"{name} layers"] = predicted(rows, of_data(name, "layers", folder))
    return found


def of_data(name: str, table: str, folder: Path) -> list[Row]:
    """Rows of one data set."""
    return [row for row in read_table(folder / "proved" / f"{table}.csv") if row["data"] == name]


def weight(row: Row) -> str:
    """The weight of MS-MPPD as a reader sees it."""
    rho = float(row["rho"])
    return f"{rho:g}, {row['layers']}, {row['norm']}" if rho else "without"


def bracket(name: str, rows: Sequence[Row]) -> str:
    """What is proved and what attacks leave at the radii shown, means over the seeds."""
    cells = []
    measured = "1/255" if name == "cifar10" else "0.008"
    for (neuron, *_), ours in groups(rows, "neuron", "rho", "layers", "norm").items():
        if weight(ours[0]) not in WEIGHTS:
            continue
        at = {eps: found for (eps,), found in groups(ours, "eps").items()}
        ends = []
        for eps in SHOWN[name]:
            low, high = numbers(at[eps], "proved"), numbers(at[eps], "left")
            ends.append(f"{with_spread(low)} / {with_spread(high)}")
        middle = [with_spread(numbers(at[measured], what)) for what in ("clean", "intervals")]
        cells.append([neuron, weight(ours[0]), middle[0], *ends, middle[1]])
    return markdown_table(["neuron", "MS-MPPD", "clean", *SHOWN[name], "intervals"], cells, words=2)


def predicted(rows: Sequence[Row], layers: Sequence[Row]) -> str:
    """Rank correlations over the networks, layer by layer; of a few networks their last layers."""
    of_network = groups(rows, "network")
    if len(of_network) < 6:
        last = {row["network"]: row for row in layers}
        cells = []
        for name, row in last.items():
            figures = [f"{float(row[column]):g}" for column in ("mppd", "width")]
            cells.append([name, *figures, f"{100 * float(row['undecided']):.1f}"])
        heads = ["network", "MS-MPPD", "bounds of the potential", "undecided spikes, %"]
        return markdown_table(heads, cells, words=2)
    shares = {name: fmean(numbers(found, "proved")) for (name,), found in of_network.items()}
    neurons = {name: found[0]["neuron"] for (name,), found in of_network.items()}
    cells = []
    for neuron in dict.fromkeys(neurons.values()):
        ours = [row for row in layers if neurons[row["network"]] == neuron]
        for (layer,), found in groups(ours, "layer").items():
            mppd, width = numbers(found, "mppd"), numbers(found, "width")
            proved = [shares[row["network"]] for row in found]
            pairs = ((mppd, width), (mppd, proved), (width, proved))
            figures = [f"{spearmanr(*pair).statistic:+.2f}" for pair in pairs]
            cells.append([neuron, layer, str(len(found)), *figures])
    heads = ["neuron", "layer", "networks", "MPPD, bounds", "MPPD, proved", "bounds, proved"]
    return markdown_table(heads, cells, words=2)


@print_style()
def draw(name: str, folder: Path) -> None:
    """The bracket over eps for each neuron and weight, and bounds of the potential over MPPD."""
    rows = of_data(name, "networks", folder)
    by_neuron = groups(rows, "neuron")
    figure = new_figure(7.2, 2.6)
    *panels, last = figure.subplots(1, len(by_neuron) + 1)
    for axes, ((neuron,), found) in zip(panels, by_neuron.items(), strict=True):
        brackets(axes, found, RADII[name])
        axes.set_title(f"{TITLES[name]}, {neuron.upper()}")
    rho = {row["network"]: float(row["rho"]) for row in rows}
    by_layer = groups(of_data(name, "layers", folder), "layer")
    for ((layer,), found), colour in zip(by_layer.items(), COLOURS, strict=False):
        for trained in (False, True):
            ours = [row for row in found if bool(rho[row["network"]]) == trained]
            look = {"color": colour, "markerfacecolor": colour if trained else "none"}
            label = layer if trained else f"{layer}, without"
            last.loglog(numbers(ours, "mppd"), numbers(ours, "width"), "o", label=label, **look)
    last.set(xlabel="MS-MPPD under PGD-20", ylabel="mean square bound of the potential")
    last.legend(fontsize=5)
    write_figure(figure, folder / "proved" / f"{name}.png")


def brackets(axes: Axes, rows: Sequence[Row], radii: Sequence[str]) -> None:
    """Proved (filled) and not broken (dashed), for each weight of the last layer's l2 form."""
    shown = [row for row in rows if (row["layers"], row["norm"]) in (("", ""), ("last", "l2"))]
    at = [parse_eps(eps) for eps in radii]
    for ((rho,), found), colour in zip(groups(shown, "rho").items(), COLOURS, strict=False):
        by_radius = groups(found, "eps")
        low = [fmean(numbers(by_radius[(eps,)], "proved")) for eps in radii]
        high = [fmean(numbers(by_radius[(eps,)], "left")) for eps in radii]
        axes.plot(at, low, "o-", color=colour, label=f"rho {float(rho):g}")
        axes.plot(at, high, "--", color=colour, linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(at, radii)
    axes.set(ylim=(0, 100), xlabel="Linf radius", ylabel="proved; dashed: not broken, %")
    axes.legend()


if __name__ == "__main__":
    main(tyro.cli(Options))
