"""The figure of a sweep: accuracy over one option, as the paper's Figure 3 shows it over rho."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab.figures.style import COLOURS, DOUBLE, LINES, MARKERS, print_style, save
from lab.sweeping.grid import value_text
from lab.sweeping.summary import Cell, is_within

_MOST_TICKS = 8
_LEGEND_WIDTH = 110
"""Characters that fit into a line of the legend."""
_WORDS = {
    "lif": "LIF", "dlif": "DLIF", "plif": "PLIF", "if": "IF", "none": "undefended", "gaussian": "Gaussian", "at": "AT",
    "rat": "RAT", "pgd_at": "PGD-AT", "trades": "TRADES", "rho": r"weight of MS-MPPD, $\rho$",
    "apgd_ce": "APGD, cross entropy", "apgd_dlr": "APGD, DLR", "fgsm": "FGSM", "everything": "worst of all",
    "verified": "verified",
}  # fmt: skip


def plot_effect(
    cells: Sequence[Cell],
    axes: Mapping[str, Sequence[Any]],
    option: str,
    columns: Sequence[str],
    path: Path,
) -> tuple[Path, ...]:
    """Accuracy over an option of numbers, a line for every combination of the others, a panel for every column.

    Values stand side by side in equal steps, since those of a weight such as rho crowd on any scale that has room for
    0. Bars are one standard deviation over the seeds to either side. A combination in which the option changes nothing
    is a line across without markers; a value at which another option changes nothing (``norm`` at rho 0) belongs to the
    lines of all values of the latter. Width and type are those of two columns in print, as in Figure 3 of Ding et al.
    (ICML 2024). Returns PNG and PDF; nothing is drawn if the option is no axis or has not two numbers as values.
    """
    values = axes.get(option, ())
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if len(values) < 2 or not numbers or not columns:
        return ()
    places = sorted(map(float, values))
    lines = _lines(cells, option)
    across = min(3, len(columns))
    down = math.ceil(len(columns) / across)
    longest = max(len(label) for label in lines)
    beside = max(1, min(len(lines), _LEGEND_WIDTH // (longest + 8)))
    height = 0.3 + 1.75 * down + (0.16 * math.ceil(len(lines) / beside) if longest else 0.0)
    with print_style():
        figure = Figure(figsize=(DOUBLE, height), layout="constrained")
        panels = figure.subplots(down, across, squeeze=False)
        for number, (axes_, column) in enumerate(zip(panels.flat, columns, strict=False)):
            _panel(axes_, lines, option, column, places)
            axes_.set_title(_title(column, columns), loc="left")
            axes_.set_xlabel(_WORDS.get(option, option) if number + across >= len(columns) else "")
            axes_.set_ylabel("accuracy left, %" if number % across == 0 else "")
        for axes_ in panels.flat[len(columns) :]:
            axes_.set_axis_off()
        handles, labels = _legend(list(panels.flat)[: len(columns)])
        if any(labels):
            figure.legend(handles, labels, loc="outside lower center", ncols=beside, handlelength=3)
        pdf, png = save(figure, path.parent, path.name)
    return png, pdf


def _lines(cells: Sequence[Cell], option: str) -> dict[str, list[Cell]]:
    """Cells by the label of the line that they belong to."""
    others = [{name: value for name, value in cell.values.items() if name != option} for cell in cells]
    moving = [other for cell, other in zip(cells, others, strict=True) if option in cell.values]
    lines: dict[str, list[Cell]] = {}
    for other, cell in zip(others, cells, strict=True):
        wider = [line for line in moving if len(line) > len(other) and is_within(other, line)]
        for line in wider if wider and option in cell.values else [other]:
            members = lines.setdefault(", ".join(_said(name, value) for name, value in line.items()), [])
            if cell not in members:
                members.append(cell)
    return lines


def _said(name: str, value: Any) -> str:
    """A value in the legend: a word for itself, anything else behind the name of its option."""
    return _WORDS.get(value, value) if isinstance(value, str) and value[:1].isalpha() else f"{name} {value_text(value)}"


def _title(column: str, columns: Sequence[str]) -> str:
    """A figure in words, such as "PGD-7, last iterate" for ``pgd7/last``; with its suite where there are several."""
    suites = {name.partition("/")[0] if "/" in name else "" for name in columns}
    suite, _, figure = column.partition("/") if "/" in column else ("", "", column)
    text = _WORDS.get(figure, figure)
    if found := re.fullmatch(r"pgd(\d+)(/last)?(?:@(.+))?", figure):
        steps, last, eps = found.groups()
        text = f"PGD-{steps}{', last iterate' if last else ''}{f', eps {eps}' if eps else ''}"
    return text if len(suites) == 1 else f"{text} ({suite or 'training'})"


def _panel(axes: Axes, lines: Mapping[str, Sequence[Cell]], option: str, column: str, places: Sequence[float]) -> None:
    for number, (label, members) in enumerate(lines.items()):
        known = [(cell, figure) for cell in members if (figure := cell.statistic(column)) is not None]
        points = [(places.index(float(cell.values[option])), f) for cell, f in known if option in cell.values]
        points.sort(key=lambda point: point[0])
        look: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "label": label}
        dashes = LINES[(number + number // len(COLOURS)) % len(LINES)]
        if points:
            shift = 0.06 * (number - (len(lines) - 1) / 2) * min(1.0, 4 / len(lines))  # keeps bars apart
            axes.errorbar(
                [place + shift for place, _ in points],
                [100 * figure.mean for _, figure in points],
                yerr=[100 * (math.nan if figure.spread is None else figure.spread) for _, figure in points],
                linestyle=dashes,
                marker=MARKERS[(number + number // len(COLOURS)) % len(MARKERS)],
                elinewidth=0.7,
                capsize=1.5,
                **look,
            )
        for figure in (figure for cell, figure in known if option not in cell.values):
            middle, half = 100 * figure.mean, 100 * (figure.spread or 0.0)
            axes.axhline(middle, linestyle=dashes, **look)
            axes.axhspan(middle - half, middle + half, color=look["color"], alpha=0.1, linewidth=0)
    every = math.ceil(len(places) / _MOST_TICKS)
    axes.set_xticks(range(0, len(places), every), [value_text(place) for place in places[::every]])
    axes.set_xlim(-0.4, len(places) - 0.6)


def _legend(panels: Sequence[Axes]) -> tuple[list[Any], list[str]]:
    """Every label once, whichever panel has its line."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)
