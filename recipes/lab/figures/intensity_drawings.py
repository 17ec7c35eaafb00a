"""Drawings of how a perturbation's size shows in the membrane potential."""

import math
from dataclasses import astuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab.figures.style import COLOURS, DOUBLE, GREY, LINES, MARKERS, legend, letter
from sj_robust.core.shown import common_scale, heat_map
from sj_robust.perturbation.indicators import INDICATORS
from sj_robust.perturbation.intensity import IntensityCorrelation

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
            (place + shift, *ends)
            for place, ends in enumerate(map(astuple, found))
            if None not in ends
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
