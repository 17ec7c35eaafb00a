"""From saved numbers to figures."""

import math
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

from lab.figures.data import InputGains, OneNeuron, TrainingCurves
from lab.figures.style import (
    COLOURS,
    DOUBLE,
    GREY,
    LINES,
    MARKERS,
    SINGLE,
    legend,
    letter,
    print_style,
    save,
)
from sj_robust.core.saved import SavedResult, saved_format
from sj_robust.core.shown import common_scale, heat_map
from sj_robust.perturbation.intensity import INDICATORS, IntensityCorrelation

_BLUE, _ORANGE, _GREEN, _PINK, _AMBER, _BLACK = COLOURS[:6]
_MOST_LINES = len(COLOURS)

Dashes = str | tuple[int, tuple[int, ...]]
"""As matplotlib takes them."""


@dataclass(frozen=True)
class _Run:
    """One of the two runs of a neuron: the end of its names in the data, and how it looks."""

    end: str
    label: str
    colour: str
    dashes: Dashes
    height: float  # of the marks of its spikes, in thresholds


@dataclass(frozen=True)
class _Distance:
    """A distance of two runs: its name in the data, and how it looks."""

    name: str
    label: str
    colour: str
    dashes: Dashes
    marker: str


_RUNS = (
    _Run("", "clean", _BLUE, "-", height=1.1),
    _Run("_perturbed", "perturbed", _ORANGE, "--", height=1.1 + 0.13),
)
_DISTANCES = (
    _Distance("full", "with reset", _BLACK, "-", "o"),
    _Distance("simplified", "without reset (MPPD)", _GREEN, "--", "s"),
    _Distance("std", "STD", _AMBER, "-.", "^"),
    _Distance("tasad", "TASAD", _PINK, (0, (4, 1, 1, 1)), "D"),
)


def draw_neuron(data: OneNeuron) -> Figure:
    """Potentials above, what tells them apart below; constant perturbation on the left, Gaussian on
    the right.
    """
    figure = Figure(figsize=(DOUBLE, 4.2), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    titles = {
        "constant": (
            "(a) current {current:g}, perturbed by {shift:+g}",
            "(b) the two runs of (a) compared",
        ),
        "gaussian": (
            "(c) current {current:g}, perturbed by noise of std {std:g}",
            "(d) the two runs of (c) compared",
        ),
    }
    for column, (name, case) in enumerate(data.cases.items()):
        upper, lower = panels[:, column]
        _potentials(upper, case, data.settings["v_threshold"])
        _distances(lower, case)
        for axes, title in zip((upper, lower), titles[name], strict=True):
            letter(axes, title.format(**data.settings))
        lower.set_xlabel("time step")
    panels[0, 0].set_ylabel("membrane potential")
    panels[1, 0].set_ylabel("perturbation, distance")
    legend(figure, panels[:, 0], loc="outside upper center", columnspacing=1.2, handlelength=2.2)
    return figure


def _potentials(axes: Axes, case: dict[str, list[float]], v_threshold: float) -> None:
    """Potentials after the reset, and a mark above the threshold for every spike."""
    axes.axhline(v_threshold, color=GREY, linewidth=0.8, linestyle=":", label="threshold")
    for run in _RUNS:
        axes.plot(case[f"v{run.end}"], run.dashes, color=run.colour, label=run.label)
        fired = [step for step, spike in enumerate(case[f"spike{run.end}"]) if spike]
        heights = [v_threshold * run.height] * len(fired)
        axes.plot(fired, heights, "|", color=run.colour, markersize=6, markeredgewidth=1.4)


def _distances(axes: Axes, case: dict[str, list[float]]) -> None:
    axes.axhline(0, color=GREY, linewidth=0.6)
    for offset, one in enumerate(_DISTANCES):
        axes.plot(
            case[one.name],
            label=one.label,
            color=one.colour,
            linestyle=one.dashes,
            marker=one.marker,
            markevery=(offset, 5),
            markersize=3,
        )


def draw_gains(data: InputGains) -> Figure:
    """A panel per network: a line per layer, or a map if there are more layers than lines can be
    told apart.
    """
    count = len(data.networks)
    most = max(map(len, data.networks.values()))
    down = math.ceil(count / 2)
    wide = SINGLE if count == 1 else DOUBLE
    tall = 2.3 if most <= _MOST_LINES else 0.9 + 0.16 * most  # a map needs a row per layer
    figure = Figure(figsize=(wide, tall * down), layout="constrained")
    panels = figure.subplots(down, min(count, 2), squeeze=False)
    for axes, (name, layers) in zip(panels.flat, data.networks.items(), strict=False):
        steps = max(map(len, layers.values()))
        if len(layers) <= _MOST_LINES:
            _lines_of_gains(axes, layers)
        else:
            _map_of_gains(figure, axes, layers, steps)
        axes.set_xticks(range(steps))
        axes.set_xlabel("time step")
        letter(axes, name)
    for axes in panels.flat[count:]:
        axes.set_axis_off()
    return figure


def _lines_of_gains(axes: Axes, layers: dict[str, list[float]]) -> None:
    axes.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
    for index, (layer, gains) in enumerate(layers.items()):
        axes.plot(
            range(len(gains)),
            gains,
            color=COLOURS[index],
            linestyle=LINES[index],
            marker=MARKERS[index],
            label=_short(layer),
        )
    axes.set_ylabel("input gain p[t]")
    axes.legend(
        title="layer",
        title_fontsize=7,
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        borderpad=0,
    )
    axes.margins(y=0.15)


def _map_of_gains(figure: Figure, axes: Axes, layers: dict[str, list[float]], steps: int) -> None:
    grid = [[*gains, *[math.nan] * (steps - len(gains))] for gains in layers.values()]
    values = [value for gains in layers.values() for value in gains]
    # White is the gain that a neuron starts with.
    farthest = max(0.01, *(abs(value - 1) for value in values))
    scale = Normalize(1 - farthest, 1 + farthest)
    image = axes.imshow(grid, aspect="auto", cmap="PuOr_r", norm=scale)
    axes.set_yticks(range(len(layers)), [_short(layer) for layer in layers])
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, label="input gain p[t]")


def draw_curves(data: TrainingCurves) -> Figure:
    """Validation accuracy on the left, MS-MPPD in training on the right; one colour per network."""
    figure = Figure(figsize=(DOUBLE, 2.7), layout="constrained")
    accuracy, perturbation = figure.subplots(1, 2)
    _validation_curves(accuracy, data)
    _mppd_curves(perturbation, data)
    for axes in (accuracy, perturbation):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _validation_curves(axes: Axes, data: TrainingCurves) -> None:
    """A line per network and attack; the legend names the attacks, whose dashes are the same for
    every network.
    """
    dashes: dict[str, Any] = {}
    for index, records in enumerate(data.networks.values()):
        epochs = [record["epoch"] for record in records]
        every = max(1, len(epochs) // 6)
        for attack in records[0]["validation"]:
            dashes.setdefault(attack, LINES[len(dashes) % len(LINES)])
            values = [100 * record["validation"][attack] for record in records]
            axes.plot(
                epochs,
                values,
                color=_colour(index),
                linestyle=dashes[attack],
                marker=_marker(index),
                markevery=(index, every),
                markersize=3,
            )
    for attack, line in dashes.items():
        axes.plot([], [], color=GREY, linestyle=line, label=attack)
    letter(axes, "(a) validation accuracy, %")
    axes.set_ylim(0, 102)
    axes.legend(loc="lower right", ncols=len(dashes))


def _mppd_curves(axes: Axes, data: TrainingCurves) -> None:
    """A line per network, of the epochs that had it in their loss; the legend names networks."""
    is_empty = True
    for index, (name, records) in enumerate(data.networks.items()):
        shown = [record for record in records if record["losses"].get("mppd", 0.0) > 0]
        is_empty = is_empty and not shown
        axes.plot(
            [record["epoch"] for record in shown],
            [record["losses"]["mppd"] for record in shown],
            color=_colour(index),
            marker=_marker(index),
            label=name if shown else f"{name} (not in its loss)",
        )
    letter(axes, "(b) MS-MPPD in training")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if is_empty:
        axes.set_yticks([])
    axes.legend(loc="upper right")


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _marker(index: int) -> str:
    return MARKERS[index % len(MARKERS)]


def _short(layer: str) -> str:
    """The name without what the classifier puts before every layer."""
    return layer.removeprefix("net.")


_NAMES = {
    "mppd_l1": "MPPD, l1",
    "mppd_l2": "MPPD, l2",
    "mppd_max": "MPPD, max",
    "full": "with reset, l2",
    "std": "STD",
    "tasad": "TASAD",
}
_LOOKS = dict(
    zip(INDICATORS, zip(COLOURS, LINES, MARKERS, strict=True), strict=False)
)  # more looks than names
_MOST_MAPS = 5
_FEW_LAYERS = 4


def draw_intensity(data: IntensityCorrelation) -> Figure:
    """A row per direction: indicators over eps, their correlation with it, and whether they tell
    who is fooled.
    """
    rows = len(data.directions)
    figure = Figure(figsize=(DOUBLE, 0.4 + 2.0 * rows), layout="constrained")
    panels = figure.subplots(rows, 4, squeeze=False)
    for row, direction in enumerate(data.directions):
        means, correlations, neurons, errors = panels[row]
        _means(means, data, direction)
        _by_layer(correlations, data, direction, "spearman")
        _by_layer(neurons, data, direction, "per_neuron")
        _by_layer(errors, data, direction, "auroc_same_size")
        errors.axhline(0.5, color=GREY, linewidth=0.8, linestyle=":")
        titles = (
            f"{direction}, last layer",
            "whole layer and eps",
            "one neuron and eps",
            "fooled, at one eps",
        )
        for axes, title in zip(panels[row], titles, strict=True):
            letter(axes, title)
        means.set_ylabel("share of the largest")
        means.set_xlabel("eps")
        correlations.set_ylabel("Spearman's correlation")
        errors.set_ylabel("AUROC")
        for axes in (correlations, neurons, errors):
            axes.set_xlabel("spiking layer")
    legend(figure, panels[0, :1], loc="outside upper center", columnspacing=1.2, handlelength=2.2)
    return figure


def _means(axes: Axes, data: IntensityCorrelation, direction: str) -> None:
    """Every indicator of the last layer, and the accuracy, as shares of their largest value."""
    last = data.means[direction][data.layers[-1]]
    for name, (colour, line, marker) in _LOOKS.items():
        top = max(last[name])
        shares = [value / top if top else 0.0 for value in last[name]]
        axes.plot(data.eps, shares, color=colour, linestyle=line, marker=marker, label=_NAMES[name])
    axes.plot(
        data.eps, data.accuracy[direction], color=GREY, linewidth=2.2, alpha=0.5, label="accuracy"
    )
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.05)


def _by_layer(axes: Axes, data: IntensityCorrelation, direction: str, measure: str) -> None:
    """Value and interval of a measure: side by side at each of a few layers, as lines with bands
    over many.
    """
    layers = len(data.layers)
    few = layers <= _FEW_LAYERS
    for index, (name, (colour, line, marker)) in enumerate(_LOOKS.items()):
        found = [data.associations[direction][layer][name][measure] for layer in data.layers]
        shift = 0.7 * ((index + 0.5) / len(_LOOKS) - 0.5) if few else 0.0
        kept = [
            (place + shift, *value_and_ends)
            for place, value_and_ends in enumerate(map(astuple, found))
            if None not in value_and_ends
        ]
        if not kept:
            continue
        places, values, low, high = map(list, zip(*kept, strict=True))
        if few:
            axes.vlines(places, low, high, color=colour, linewidth=0.9)
            axes.plot(places, values, linestyle="", marker=marker, color=colour)
        else:
            axes.plot(
                places,
                values,
                linestyle=line,
                marker=marker,
                markevery=(index % 3, 3),
                color=colour,
            )
            axes.fill_between(places, low, high, color=colour, alpha=0.12, linewidth=0)
    ticks = range(0, layers, math.ceil(layers / 6))
    axes.set_xticks(ticks, [str(place + 1) for place in ticks])
    axes.set_xlim(-0.6, layers - 0.4)
    axes.grid(visible=False, axis="x")


def draw_heat_maps(data: IntensityCorrelation) -> Figure:
    """MS-MPPD of every layer and step: a row per direction, a column per size, one scale for
    all.
    """
    shown = _spread_out(len(data.eps))
    rows, layers = len(data.directions), len(data.layers)
    figure = Figure(
        figsize=(DOUBLE, 0.6 + rows * (0.75 + max(0.13 * layers, 0.5))), layout="constrained"
    )
    panels = figure.subplots(rows, len(shown), squeeze=False, sharex=True, sharey=True)
    maps = [sizes for kind in data.per_step.values() for sizes in kind.values()]
    scale = common_scale(value for sizes in maps for index in shown for value in sizes[index])
    for row, direction in enumerate(data.directions):
        for column, index in enumerate(shown):
            axes = panels[row, column]
            mesh = heat_map(
                axes,
                {layer: data.per_step[direction][layer][index] for layer in data.layers},
                scale,
            )
            if row == 0:
                axes.set_title(f"eps {data.eps[index]:.3g}")
        places = range(0, layers, math.ceil(layers / 12))
        panels[row, 0].set_yticks(
            [place + 0.5 for place in places], [str(place + 1) for place in places]
        )
        panels[row, 0].set_ylabel(f"{direction}\nspiking layer")
    for axes in panels[-1]:
        axes.set_xlabel("time step")
    figure.colorbar(mesh, ax=list(panels.flat), label="MS-MPPD", pad=0.01, aspect=12 * rows)
    return figure


def _spread_out(count: int) -> list[int]:
    """Places of at most five sizes, the first and the last among them."""
    shown = min(count, _MOST_MAPS)
    return sorted({round(place * (count - 1) / (shown - 1)) for place in range(shown)})


_DRAWINGS: Mapping[type[SavedResult], Mapping[str, Callable[[Any], Figure]]] = {
    OneNeuron: {"": draw_neuron},
    InputGains: {"": draw_gains},
    TrainingCurves: {"": draw_curves},
    IntensityCorrelation: {"": draw_intensity, "_heat_maps": draw_heat_maps},
}
"""What draws the figures of each kind of numbers, by what they add to the name of the file with the
numbers.
"""


def load_figure(path: Path) -> SavedResult:
    """The numbers that the ``save`` of a figure's data wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else, is damaged or of another version.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "gains.json"
        >>> InputGains({"mine": {"0": [1.0, 0.5]}}).save(path)
        >>> load_figure(path)
        InputGains(networks={'mine': {'0': [1.0, 0.5]}})
    """
    kinds = {kind.saved_as: kind for kind in _DRAWINGS}
    found = saved_format(path.read_text(encoding="utf-8", errors="replace"))
    return kinds.get(found or "", OneNeuron).load(path)


def draw(data: SavedResult) -> dict[str, Figure]:
    """The figures that numbers are for, by what they add to the name of the file with the numbers.

    Examples:
        >>> list(draw(InputGains({"mine": {"0": [1.0, 0.5]}})))
        ['']
    """
    with print_style():
        return {end: make(data) for end, make in _DRAWINGS[type(data)].items()}


def redraw(path: Path) -> tuple[Path, ...]:
    """Draw a file of numbers beside it, as PDF and PNG; raises as :func:`load_figure`."""
    data = load_figure(path)
    files: list[Path] = []
    for end, figure in draw(data).items():
        files += save(figure, path.parent, path.stem + end)
    return tuple(files)
