"""The figure of a sweep: accuracy over one option, as the paper's Figure 3 shows it over rho."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sj_robust.sweeping.grid import word
from sj_robust.sweeping.summary import Cell

__all__ = ["plot_effect"]

# Okabe and Ito's colours, without yellow, which white paper swallows; markers differ as well.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_TICKS = 6
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def plot_effect(
    cells: Sequence[Cell],
    axes: Mapping[str, Sequence[Any]],
    option: str,
    columns: Sequence[str],
    path: Path,
) -> tuple[Path, ...]:
    """Accuracy over an option of numbers, a line for every combination of the others. 绘制某选项的影响。

    The band is one standard deviation over the seeds to either side. A combination in which the option changes nothing
    is a dashed line across.

    Args:
        cells: The cells.
        axes: Values by option, from ``axes_in``.
        option: The axis that goes to the right.
        columns: Figures, a panel each.
        path: File without its ending.

    Returns:
        The PNG and the PDF; nothing is drawn if the option is no axis, has a single value or one that is no number.

    Source: Figure 3 of Ding et al. (ICML 2024).
    """
    values = axes.get(option, ())
    if len(values) < 2 or not all(isinstance(value, int | float) for value in values) or not columns:
        return ()
    lines: dict[str, list[Cell]] = {}
    for cell in cells:
        label = " ".join(word(value) for name, value in cell.values.items() if name != option)
        lines.setdefault(label, []).append(cell)
    across = min(3, len(columns))
    down = math.ceil(len(columns) / across)
    with rc_context({"pdf.fonttype": 42}):
        figure = Figure(figsize=(0.6 + 3.2 * across, 0.8 + 2.6 * down + 0.12 * len(lines)), layout="constrained")
        panels = figure.subplots(down, across, squeeze=False)
        for axes_, column in zip(panels.flat, columns, strict=False):
            _panel(axes_, lines, option, column)
        for axes_ in panels.flat[len(columns) :]:
            axes_.set_axis_off()
        handles, labels = panels.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
        paths = tuple(path.with_name(f"{path.name}.{ending}") for ending in ("png", "pdf"))
        figure.savefig(paths[0], dpi=150)
        figure.savefig(paths[1], metadata={"CreationDate": None})  # the same records give the same file
    return paths


def _panel(axes: Axes, lines: Mapping[str, Sequence[Cell]], option: str, column: str) -> None:
    for number, (label, members) in enumerate(lines.items()):
        color, marker = _COLORS[number % len(_COLORS)], _MARKERS[(number + number // len(_COLORS)) % len(_MARKERS)]
        known = [(cell, figure) for cell in members if (figure := cell.statistic(column)) is not None]
        points = [(float(cell.values[option]), figure) for cell, figure in known if option in cell.values]
        flat = [figure for cell, figure in known if option not in cell.values]
        means = [100 * figure.mean for _, figure in points]
        spreads = [100 * (figure.spread or 0.0) for _, figure in points]
        places = [place for place, _ in points]
        if points or not flat:
            axes.plot(places, means, color=color, marker=marker, markersize=5, label=label)
            low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
            high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
            axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)
        for figure in flat:
            middle, half = 100 * figure.mean, 100 * (figure.spread or 0.0)
            axes.axhline(middle, color=color, linestyle="--", linewidth=1.2, label=label)
            axes.axhspan(middle - half, middle + half, color=color, alpha=0.1, linewidth=0)
    axes.set_title(column, fontsize=9)
    places = sorted(
        {float(cell.values[option]) for members in lines.values() for cell in members if option in cell.values}
    )
    if len(places) <= _TICKS:
        axes.set_xticks(places, [word(place) for place in places])
    axes.set_xlabel(option, fontsize=9)
    axes.set_ylabel("accuracy left, %", fontsize=9)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)
