"""Is a network easier to prove robust if MS-MPPD was part of its training? What bounds prove over
eps, what attacks leave, and whether the measured perturbation of the potential predicts its bounds.

python recipes/sweep.py --sweep recipes/configs/sweeps/proved_digits_sweep.yaml --jobs 2
python docs/results/proved.py digits            # half a minute per network on one core
python docs/results/proved.py fashion_mnist     # after proved_fashion_mnist_sweep.yaml
python docs/results/proved.py cifar10           # networks that are there; pictures in data/
python docs/results/proved.py cifar10 dlif-at   # only these networks
python docs/results/proved.py                   # tables of the page and figures again

Networks of which a table has all rows are not proved again, so that a stopped command continues.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean as mean  # sum would round as the release of Python does
from typing import TYPE_CHECKING, Any

import torch
from rows import read_rows, write_rows
from torch import Tensor, nn

from sj_robust.attacks import SampleSeeds, ThreatModel, pgd
from sj_robust.core.eps import parse_eps
from sj_robust.core.saved import markdown_table
from sj_robust.core.shown import COLOURS, new_figure, print_style, write_figure
from sj_robust.data import image_loader, load_images
from sj_robust.evaluation import from_checkpoint, make_suite, search_estimators, worst_case
from sj_robust.perturbation import compare_potentials
from sj_robust.perturbation.association import spearman
from sj_robust.proofs import verify
from sj_robust.proofs.verification import Verification

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).with_name("proved")
PAGE = Path(__file__).with_suffix(".md")
CLASSES = 10
FEW = 6
"""Networks of which rank correlations say nothing."""
BEGINS, ENDS = "<!-- {}: begins -->\n", "\n<!-- {}: ends -->"


@dataclass(frozen=True)
class Study:
    """Networks of a data set, and where they are proved.

    Attributes:
        title: What the page calls the data.
        images: Test images, the first ones.
        radii: Linf radii as they are written, from small to large.
        measured: The radius of the perturbations whose effect on the potential is measured.
        shown: Radii in the table of the page; figure and CSV file have all.
        weights: Weights of MS-MPPD in the table of the page; empty for all.
    """

    title: str
    images: int
    radii: tuple[str, ...]
    measured: str
    shown: tuple[str, ...]
    weights: tuple[str, ...] = ()


RADII = ("0.002", "0.004", "0.008", "0.016")
OF_255 = ("0.5/255", "1/255", "2/255", "4/255")
ON_THE_LAST_LAYER = ("without", "1, last, l2", "3, last, l1", "3, last, l2")
STUDIES = {
    "digits": Study("Digits", 360, RADII, "0.008", shown=RADII[1:], weights=ON_THE_LAST_LAYER),
    "fashion_mnist": Study("Fashion-MNIST", 200, RADII, "0.008", shown=RADII[1:]),
    "cifar10": Study("CIFAR-10", 100, OF_255, "1/255", shown=OF_255[:3]),
}


@dataclass(frozen=True)
class Network:
    """A network and how it was trained."""

    name: str
    neuron: str
    rho: float
    layers: str
    norm: str
    seed: int
    checkpoint: Path
    data: str
    data_root: str


@dataclass(frozen=True)
class Row:
    """What is known of a network at a radius, in per cent of the images."""

    network: str
    neuron: str
    rho: float
    layers: str
    norm: str
    seed: int
    eps: str
    images: int
    clean: float
    intervals: float
    proved: float
    left: float
    seconds: float

    @property
    def cell(self) -> tuple[str, float, str, str]:
        """The training without its seed."""
        return self.neuron, self.rho, self.layers, self.norm


@dataclass(frozen=True)
class Layer:
    """A spiking layer at one radius, means over images, neurons and steps.

    Attributes:
        mppd: MS-MPPD under PGD-20.
        width: Mean square of the distance between the potential's bounds.
        undecided: Share of the spikes that the bounds leave undecided.
    """

    network: str
    layer: str
    mppd: float
    width: float
    undecided: float


def main() -> None:
    """Prove and attack what is missing, then write the page and the figures."""
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        measure(sys.argv[1], sys.argv[2:])
    for name in STUDIES:
        if (FOLDER / f"{name}.csv").exists():
            write_page(name)
            draw(name)


def measure(name: str, only: Sequence[str] = ()) -> None:
    """All networks of a study, or only some of them, one after the other."""
    study = STUDIES[name]
    rows, layers = tables(name)
    known = {row.network for row in rows}
    for network in networks(name):
        if network.name in known or (only and network.name not in only):
            continue
        found = proved(network, study)
        rows += found.rows
        layers += found.layers
        write_rows(FOLDER / f"{name}.csv", rows)
        write_rows(FOLDER / f"{name}_layers.csv", layers)
        shares = [f"{row.eps}: {row.proved} to {row.left}" for row in found.rows]
        print(network.name, ", ".join(shares), flush=True)


def tables(name: str) -> tuple[list[Row], list[Layer]]:
    """What earlier calls have found; a network counts if its layers were written, too."""
    layers = read_rows(FOLDER / f"{name}_layers.csv", Layer)
    whole = {layer.network for layer in layers}
    rows = read_rows(FOLDER / f"{name}.csv", Row)
    return [row for row in rows if row.network in whole], layers


def networks(name: str) -> Iterator[Network]:
    """Those of a sweep that are trained, or those for CIFAR-10 that are there."""
    if name == "cifar10":
        yield from cifar10_networks()
        return
    for record in sorted((ROOT / "runs" / f"proved_{name}_sweep").glob("runs/*/run.json")):
        content = json.loads(record.read_text(encoding="utf-8"))
        options = content["options"]
        yield Network(
            name=content["name"],
            neuron=options["neuron"],
            rho=options["rho"],
            layers=options["layers"] if options["rho"] else "",
            norm=options["norm"] if options["rho"] else "",
            seed=options["seed"],
            checkpoint=record.parent / "training" / f"{options['neuron']}_{options['mode']}",
            data=options["dataset"],
            data_root=options["data_root"],
        )


def cifar10_networks() -> Iterator[Network]:
    """Adversarial training at 4/255, one seed; see cifar10.md."""
    study = ROOT / "docs" / "results" / "cifar10" / "networks"
    plain = partial(
        Network, seed=0, data="image_folder:data/cifar10_pictures", data_root=str(ROOT / "data")
    )
    without, with_mppd = {"rho": 0.0, "layers": "", "norm": ""}, {"rho": 1.0, "layers": "last"}
    for neuron, where in (("lif", study), ("dlif", Path("cifar10"))):
        ending = ".pt" if neuron == "lif" else ""
        first, second = f"{neuron}-at", f"{neuron}-at-mppd"
        yield plain(first, neuron, **without, checkpoint=where / f"{first}{ending}")
        yield plain(second, neuron, **with_mppd, norm="l2", checkpoint=where / f"{second}{ending}")
    l1 = study / "dlif-at-l1.pt"
    yield plain("dlif-at-l1", "dlif", rho=3.0, layers="last", norm="l1", checkpoint=l1)


@dataclass(frozen=True)
class Found:
    """Rows of a network."""

    rows: list[Row]
    layers: list[Layer]


def proved(network: Network, study: Study) -> Found:
    """Prove a network at all radii, attack what is not proved, and measure its layers at one."""
    model = from_checkpoint(network.checkpoint).model.eval()
    test = load_images(
        network.data, root=network.data_root, train_limit=100, test_limit=study.images
    ).test
    x, y = next(iter(image_loader(test, study.images)))
    empty = Row(
        **{name: getattr(network, name) for name in ("neuron", "rho", "layers", "norm", "seed")},
        network=network.name,
        eps="",
        images=len(y),
        clean=0.0,
        intervals=0.0,
        proved=0.0,
        left=0.0,
        seconds=0.0,
    )
    rows: list[Row] = []
    layers: list[Layer] = []
    fallen = torch.zeros(len(y), dtype=torch.bool)
    chosen = estimators(model, x, y, parse_eps(study.radii[-1]))
    for eps in study.radii:
        began = time.process_time()
        bounds = verify(model, x, y, parse_eps(eps))
        intervals = verify(model, x, y, parse_eps(eps), method="ibp")
        right, safe = torch.tensor(bounds.correct), torch.tensor(bounds.verified)
        fallen |= ~right
        standing = (~safe & ~fallen).nonzero().squeeze(1)
        if len(standing):
            fallen[standing] = fell(model, x[standing], y[standing], parse_eps(eps), chosen)
        if bool((fallen & safe).any()):
            raise RuntimeError(f"{network.name}: an image proved at {eps} falls at a smaller eps")
        if eps == study.measured:
            layers = measured_layers(network.name, model, x, y, bounds)
        rows.append(
            replace(
                empty,
                eps=eps,
                clean=percent(right),
                intervals=percent(torch.tensor(intervals.verified)),
                proved=percent(safe),
                left=percent(~fallen),
                seconds=round(time.process_time() - began, 1),
            )
        )
    return Found(rows, layers)


def estimators(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> list[str]:
    """The gradient estimators that attack best at a radius, on the first images."""
    trials = search_estimators(
        model,
        x[:64],
        y[:64],
        threat=ThreatModel("Linf", eps),
        seeds=SampleSeeds(range(len(y[:64]))),
    )
    return [trial.estimator for trial in trials if trial.chosen]


def fell(model: nn.Module, x: Tensor, y: Tensor, eps: float, chosen: Sequence[str]) -> Tensor:
    """Which images fall to the suite ``fast``, [N]."""
    threat = ThreatModel("Linf", eps)
    suite = make_suite("fast", threat, chosen=chosen, classes=CLASSES)
    report = worst_case(model, x, y, suite.members, threat=threat)
    fallen = torch.zeros(len(y), dtype=torch.bool)
    for row in report.attacks:
        fallen[list(row.broken)] = True
    return fallen


def measured_layers(
    name: str, model: nn.Module, x: Tensor, y: Tensor, bounds: Verification
) -> list[Layer]:
    """MS-MPPD of every layer under PGD-20, beside the bounds of its potential."""
    seeds = SampleSeeds(range(len(y)))
    x_adv = pgd(model, x, y, eps=bounds.eps, step_size=bounds.eps / 8, steps=20, generator=seeds)
    with torch.no_grad():
        wrong = model(x_adv).argmax(1) != y
    if bool((wrong & torch.tensor(bounds.verified)).any()):
        raise RuntimeError(f"{name}: an image that is proved falls to PGD-20")
    moved = compare_potentials(model, x, x_adv)
    return [
        Layer(
            network=name,
            layer=layer.name,
            mppd=float(f"{float(moved[layer.name].ms_mppd.mean()):.4g}"),
            width=float(f"{mean(layer.potential):.4g}"),
            undecided=round(mean(layer.undecided), 4),
        )
        for layer in bounds.layers
    ]


def percent(holds: Tensor) -> float:
    """Share of the images, in per cent."""
    return round(100 * float(holds.double().mean()), 1)


def write_page(name: str) -> None:
    """Put the tables of a study between their marks in the page."""
    text = PAGE.read_text(encoding="utf-8")
    for (begins, ends), found in page_tables(name).items():
        before, rest = text.split(begins)
        text = f"{before}{begins}{found}{ends}{rest.split(ends)[1]}"
    PAGE.write_text(text, encoding="utf-8")


def page_tables(name: str) -> dict[tuple[str, str], str]:
    """The tables of a study, by the marks around them."""
    rows, layers = tables(name)
    picture = f"![Share proved and not broken; bounds over MS-MPPD](proved/{name}.png)"
    found = {
        "bracket": f"{bracket(name, rows)}\n\n{picture}",
        "layers": predicted(rows, layers),
    }
    marked = {}
    for part, text in found.items():
        begins, ends = (mark.format(f"{name} {part}") for mark in (BEGINS, ENDS))
        marked[begins, ends] = text
    return marked


def bracket(name: str, rows: Sequence[Row]) -> str:
    """What is proved and what attacks leave at the radii shown, means over the seeds."""
    study = STUDIES[name]
    radii = study.shown
    heads = ["neuron", "MS-MPPD", "clean", *radii, "intervals"]
    cells = []
    for cell in dict.fromkeys(row.cell for row in rows):
        if study.weights and weight(cell) not in study.weights:
            continue
        ours = [row for row in rows if row.cell == cell]
        at = {eps: [row for row in ours if row.eps == eps] for eps in radii}
        middle = at[study.measured]
        ends = [f"{spread(at[eps], 'proved')} / {spread(at[eps], 'left')}" for eps in radii]
        clean, intervals = spread(middle, "clean"), spread(middle, "intervals")
        cells.append([cell[0], weight(cell), clean, *ends, intervals])
    return markdown_table(heads, cells, words=2)


def weight(cell: tuple[str, float, str, str]) -> str:
    """The weight of MS-MPPD as a reader sees it."""
    _, rho, layers, norm = cell
    return f"{rho:g}, {layers}, {norm}" if rho else "without"


def spread(rows: Sequence[Row], what: str) -> str:
    """Mean of a column, and the standard deviation over the seeds if there are several."""
    values = torch.tensor([getattr(row, what) for row in rows], dtype=torch.float64)
    if len(values) < 2:
        return f"{float(values.mean()):.1f}"
    return f"{float(values.mean()):.1f} ± {float(values.std()):.1f}"


def predicted(rows: Sequence[Row], layers: Sequence[Layer]) -> str:
    """Rank correlations over the networks, layer by layer; of a few networks their last layers."""
    if len({one.network for one in layers}) < FEW:
        return measured_table(layers)
    heads = ["neuron", "layer", "networks", "MPPD, bounds", "MPPD, proved", "bounds, proved"]
    cells = []
    for neuron in dict.fromkeys(row.neuron for row in rows):
        names = {row.network for row in rows if row.neuron == neuron}
        for layer in dict.fromkeys(one.layer for one in layers):
            ours = [one for one in layers if one.layer == layer and one.network in names]
            shares = [share(one.network, rows) for one in ours]
            mppd, width, proof = (
                torch.tensor(values, dtype=torch.float64)
                for values in ([one.mppd for one in ours], [one.width for one in ours], shares)
            )
            found = [spearman(mppd, width), spearman(mppd, proof), spearman(width, proof)]
            figures = [f"{float(value):+.2f}" if value == value else "–" for value in found]
            cells.append([neuron, layer, str(len(ours)), *figures])
    return markdown_table(heads, cells, words=2)


def measured_table(layers: Sequence[Layer]) -> str:
    """What was measured of the last layer of every network."""
    heads = ["network", "MS-MPPD", "bounds of the potential", "undecided spikes, %"]
    last = {one.network: one for one in layers}
    cells = [
        [name, f"{one.mppd:g}", f"{one.width:g}", f"{100 * one.undecided:.1f}"]
        for name, one in last.items()
    ]
    return markdown_table(heads, cells, words=2)


def share(network: str, rows: Sequence[Row]) -> float:
    """What is proved of a network, on average over the radii."""
    return mean([row.proved for row in rows if row.network == network])


@print_style()
def draw(name: str) -> None:
    """The bracket over eps for each neuron and weight, and bounds of the potential over MPPD."""
    rows, layers = tables(name)
    neurons = list(dict.fromkeys(row.neuron for row in rows))
    figure = new_figure(7.2, 2.6)
    *panels, last = figure.subplots(1, len(neurons) + 1)
    for axes, neuron in zip(panels, neurons, strict=True):
        brackets(axes, [row for row in rows if row.neuron == neuron], STUDIES[name].radii)
        axes.set_title(f"{STUDIES[name].title}, {neuron.upper()}")
    potentials(last, rows, layers)
    write_figure(figure, FOLDER / f"{name}.png")


def brackets(axes: "Axes", rows: Sequence[Row], radii: Sequence[str]) -> None:
    """Proved (filled) and not broken (dashed), for each weight of the last layer's l2 form."""
    cells = [cell for cell in dict.fromkeys(row.cell for row in rows) if plain(cell)]
    at = [parse_eps(eps) for eps in radii]
    for cell, colour in zip(cells, COLOURS, strict=False):
        ours = [[row for row in rows if row.cell == cell and row.eps == eps] for eps in radii]
        low = [mean([row.proved for row in some]) for some in ours]
        high = [mean([row.left for row in some]) for some in ours]
        axes.plot(at, low, "o-", color=colour, label=f"rho {cell[1]:g}")
        axes.plot(at, high, "--", color=colour, linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(at, radii)
    axes.set_ylim(0, 100)
    axes.set_xlabel("Linf radius")
    axes.set_ylabel("proved; dashed: not broken, %")
    axes.legend()


def plain(cell: tuple[str, float, str, str]) -> bool:
    """Whether MS-MPPD is absent or that of the paper."""
    return cell[1] == 0 or cell[2:] == ("last", "l2")


def potentials(axes: "Axes", rows: Sequence[Row], layers: Sequence[Layer]) -> None:
    """Bounds of the potential over MS-MPPD: a colour for each layer, filled if it was trained
    with.
    """
    rho: dict[str, Any] = {row.network: row.rho for row in rows}
    for layer, colour in zip(dict.fromkeys(one.layer for one in layers), COLOURS, strict=False):
        for trained in (False, True):
            ours = [o for o in layers if o.layer == layer and bool(rho[o.network]) == trained]
            axes.loglog(
                [one.mppd for one in ours],
                [one.width for one in ours],
                "o",
                color=colour,
                markerfacecolor=colour if trained else "none",
                label=layer if trained else f"{layer}, without",
            )
    axes.set_xlabel("MS-MPPD under PGD-20")
    axes.set_ylabel("mean square bound of the potential")
    axes.legend(fontsize=5)


if __name__ == "__main__":
    main()
