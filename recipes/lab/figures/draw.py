"""From saved numbers to figures."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from sj_robust.perturbation.intensity import IntensityCorrelation

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


_MOST_MAPS = 5


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


_DRAWINGS: Mapping[type[SavedResult], Callable[[Any], Figure]] = {
    OneNeuron: draw_neuron,
    InputGains: draw_gains,
    TrainingCurves: draw_curves,
    IntensityCorrelation: draw_heat_maps,
}
"""What draws the figure of each kind of numbers."""


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


def draw(data: SavedResult) -> Figure:
    """The figure that numbers are for.

    Examples:
        >>> len(draw(InputGains({"mine": {"0": [1.0, 0.5]}})).axes)
        1
    """
    with print_style():
        return _DRAWINGS[type(data)](data)


def redraw(path: Path) -> tuple[Path, ...]:
    """Draw a file of numbers beside it, as PDF and PNG; raises as :func:`load_figure`."""
    data = load_figure(path)
    return save(draw(data), path.parent, path.stem)
