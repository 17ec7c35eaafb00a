"""The figure of a sweep: accuracy over one option, as the paper's Figure 3 shows it over rho."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lab.figures.style import COLOURS, DOUBLE, LINES, MARKERS, legend, print_style, save
from lab.sweeping.grid import value_text
from lab.sweeping.summary import Axes, Cell, Statistic

_LABELS_IN_A_LINE = 3


@dataclass(frozen=True)
class _Line:
    """The cells of one combination of the other options; without a mode it is in every panel."""

    label: str
    mode: str | None
    cells: list[Cell]


def plot_effect(
    cells: Sequence[Cell],
    axes: Axes,
    option: str,
    columns: Sequence[str],
    path: Path,
) -> tuple[Path, ...]:
    """Accuracy over an option of numbers, a line for every combination of the others, with a row of
    panels for every column of the tables and a panel in it for every training mode.

    Values stand side by side in equal steps, since those of a weight such as rho crowd on any scale
    that has room for 0. Bars are one standard deviation over the seeds to either side. A
    combination in which the option changes nothing is level, and in all panels of a row; a value at
    which another option changes nothing (``norm`` at rho 0) belongs to the lines of all values of
    the latter. Width and type are those of two columns in print, as in Figure 3 of Ding et al.
    (ICML 2024). Returns PNG and PDF; nothing is drawn if the option is no axis or has not two
    numbers as values.
    """
    values = axes.get(option, ())
    kinds = set(map(type, values))
    if not columns or len(values) < 2 or not kinds <= {int, float}:
        return ()
    values = sorted(values)
    lines = _lines(cells, option)
    modes = list(dict.fromkeys(line.mode for line in lines if line.mode is not None))
    labels = list(dict.fromkeys(line.label for line in lines))
    height = 0.6 + 1.4 * len(columns) + 0.16 * len(labels) / _LABELS_IN_A_LINE
    with print_style():
        figure = Figure(figsize=(DOUBLE, height), layout="constrained")
        panels = figure.subplots(len(columns), len(modes), squeeze=False, sharey="row")
        for column, row in zip(columns, panels, strict=True):
            row[0].set_ylabel(column.replace("/", "\n") + ", %")
            for mode, panel in zip(modes, row, strict=True):
                own = [line for line in lines if line.mode in (mode, None)]
                for number, line in enumerate(own):
                    points = _points(line, column, option, values)
                    panel.errorbar(
                        [place + 0.04 * number for place in points],  # bars apart
                        [100 * found.mean for found in points.values()],
                        yerr=[100 * (found.spread or 0.0) for found in points.values()],
                        label=line.label,
                        **_look(labels.index(line.label)),
                    )
                panel.set_xticks(range(len(values)), map(value_text, values))
        for mode, panel in zip(modes, panels[0], strict=True):
            panel.set_title(mode, loc="left")
        for panel in panels[-1]:
            panel.set_xlabel(option)
        legend(figure, panels.flat, loc="outside lower center", ncols=_LABELS_IN_A_LINE)
        pdf, png = save(figure, path.parent, path.name)
    return png, pdf


def _lines(cells: Sequence[Cell], option: str) -> list[_Line]:
    """A line for every combination of the other options that no other one contains, with the cells
    that fit it; and one for every cell in which the option changes nothing.
    """
    moving = [cell for cell in cells if option in cell.values]
    others = [_without(option, cell.values) for cell in moving]
    lines: dict[str, _Line] = {}
    for setting in others:
        if any(setting.items() < other.items() for other in others):
            continue
        label = _label(_without("mode", setting))
        line = _Line(label, str(setting.get("mode", "")), [])
        for cell, other in zip(moving, others, strict=True):
            if other.items() <= setting.items():
                line.cells.append(cell)
        lines[str(setting)] = line
    for cell in cells:
        if option not in cell.values:
            label = _label(cell.values)
            lines[label] = _Line(label, None, [cell])
    return list(lines.values())


def _points(
    line: _Line,
    column: str,
    option: str,
    values: Sequence[float],
) -> dict[int, Statistic]:
    """What is known at every value, by its position from left to right."""
    points: dict[int, Statistic] = {}
    for cell in line.cells:
        found = cell.statistic(column)
        if found is not None:
            own = [cell.values[option]] if option in cell.values else values
            for value in own:
                points[values.index(value)] = found
    return dict(sorted(points.items()))


def _look(number: int) -> dict[str, Any]:
    shape = number + number // len(COLOURS)
    return {
        "elinewidth": 0.7,
        "capsize": 1.5,
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": LINES[shape % len(LINES)],
        "marker": MARKERS[shape % len(MARKERS)],
    }


def _label(values: Mapping[str, Any]) -> str:
    """Values in the legend: a word for itself, anything else behind the name of its option."""
    parts = []
    for name, value in values.items():
        parts.append(value if isinstance(value, str) else f"{name} {value_text(value)}")
    return ", ".join(parts)


def _without(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {other: value for other, value in values.items() if other != name}
