"""The figure of a sweep: accuracy over one option, as the paper's Figure 3 shows it over rho."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab.figures.style import COLOURS, DOUBLE, GREY, LINES, MARKERS, legend, print_style, save
from lab.sweeping.grid import value_text
from lab.sweeping.summary import Cell, is_within

_MOST_TICKS = 8
_LEGEND_WIDTH = 110
"""Characters that fit into a line of the legend."""
_WORDS = {
    "lif": "LIF",
    "dlif": "DLIF",
    "plif": "PLIF",
    "if": "IF",
    "none": "undefended",
    "gaussian": "Gaussian",
    "at": "AT",
    "rat": "RAT",
    "pgd_at": "PGD-AT",
    "trades": "TRADES",
    "rho": r"weight of MS-MPPD, $\rho$",
    "apgd_ce": "APGD, cross entropy",
    "apgd_dlr": "APGD, DLR",
    "fgsm": "FGSM",
    "everything": "worst of all",
    "verified": "verified",
}


def plot_effect(
    cells: Sequence[Cell],
    axes: Mapping[str, Sequence[Any]],
    option: str,
    columns: Sequence[str],
    path: Path,
) -> tuple[Path, ...]:
    """Accuracy over an option of numbers, a line for every combination of the others, a panel for
    every column.

    Values stand side by side in equal steps, since those of a weight such as rho crowd on any scale
    that has room for
    0. Bars are one standard deviation over the seeds to either side. A combination in which the
      option changes nothing
    is a line across without markers; a value at which another option changes nothing (``norm`` at
    rho 0) belongs to the lines of all values of the latter. More lines than there are colours go
    into a column of panels per training mode, with a row per figure, a colour per neuron and thin
    grey lines across for modes in which the option changes nothing. Width and type are those of two
    columns in print, as in Figure 3 of Ding et al. (ICML 2024). Returns PNG and PDF; nothing is
    drawn if the option is no axis or has not two numbers as values.
    """
    values = axes.get(option, ())
    numbers = all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in values
    )
    if len(values) < 2 or not numbers or not columns:
        return ()
    places = sorted(map(float, values))
    lines = _lines(cells, option)
    facets = _facets(lines, option)
    by_mode = len(facets) > 1
    across, high = (len(facets), 1.3) if by_mode else (min(3, len(columns)), 1.75)
    down = len(columns) if by_mode else math.ceil(len(columns) / across)
    labels = {line.label for own in facets.values() for line in own}
    beside = max(1, min(len(labels), _LEGEND_WIDTH // (max(map(len, labels)) + 8)))
    height = 0.3 + high * down + (0.16 * math.ceil(len(labels) / beside) if any(labels) else 0)
    with print_style():
        figure = Figure(figsize=(DOUBLE, height), layout="constrained")
        panels = figure.subplots(down, across, squeeze=False, sharey="row" if by_mode else "none")
        pairs = [(column, own) for column in columns for own in facets]
        for number, (axes_, (column, facet)) in enumerate(zip(panels.flat, pairs, strict=False)):
            _panel(axes_, facets[facet], option, column, places)
            title = _title(column, columns)
            if by_mode:
                axes_.set_title(facet if number < across else "", loc="left")
                title = re.sub(r"(,?) (?=last|\(|cross)", r"\1\n", title) + ", %"
            else:
                axes_.set_title(title, loc="left")
                title = "accuracy left, %"
            axes_.set_xlabel(_WORDS.get(option, option) if number + across >= len(pairs) else "")
            axes_.set_ylabel(title if number % across == 0 else "")
        for axes_ in panels.flat[len(pairs) :]:
            axes_.set_axis_off()
        legend(
            figure,
            panels.flat[: len(pairs)],
            loc="outside lower center",
            ncols=beside,
            handlelength=3,
        )
        pdf, png = save(figure, path.parent, path.name)
    return png, pdf


@dataclass(frozen=True)
class _Line:
    """A combination of the options beside the one that is drawn over: its label, cells and look."""

    values: Mapping[str, Any]
    label: str
    cells: list[Cell]
    look: Mapping[str, Any]

    @property
    def mode(self) -> str:
        return str(self.values.get("mode"))

    def moves_with(self, option: str) -> bool:
        return any(option in cell.values for cell in self.cells)


def _lines(cells: Sequence[Cell], option: str) -> list[_Line]:
    """A line for every combination, each with a look of its own."""
    others = [
        {name: value for name, value in cell.values.items() if name != option} for cell in cells
    ]
    moving = [other for cell, other in zip(cells, others, strict=True) if option in cell.values]
    lines: dict[str, _Line] = {}
    for other, cell in zip(others, cells, strict=True):
        wider = [line for line in moving if len(line) > len(other) and is_within(other, line)]
        for values in wider if wider and option in cell.values else [other]:
            label, number = _label(values), len(lines)
            look = _look(number, number + number // len(COLOURS))
            members = lines.setdefault(label, _Line(values, label, [], look)).cells
            if cell not in members:
                members.append(cell)
    return list(lines.values())


def _look(colour: int, shape: int) -> dict[str, Any]:
    return {
        "color": COLOURS[colour % len(COLOURS)],
        "linestyle": LINES[shape % len(LINES)],
        "marker": MARKERS[shape % len(MARKERS)],
    }


def _facets(lines: Sequence[_Line], option: str) -> dict[str, list[_Line]]:
    """Lines by the title of their column: all in one, or by training mode where they are too many
    for one panel.
    """
    modes = list(dict.fromkeys(line.mode for line in lines))
    if len(lines) <= len(COLOURS) or len(modes) < 2:
        return {"": list(lines)}
    moving = {line.mode for line in lines if line.moves_with(option)}
    neurons = list(dict.fromkeys(line.values.get("neuron") for line in lines))
    still = [line for line in lines if line.mode not in moving]
    still = [
        replace(line, look=_look(0, number) | {"color": GREY}) for number, line in enumerate(still)
    ]
    facets: dict[str, list[_Line]] = {}
    shapes: dict[str, int] = {}
    for line in sorted(lines, key=lambda line: modes.index(line.mode)):
        if line.mode in moving:
            rest = {name: value for name, value in line.values.items() if name != "mode"}
            kind = str({name: value for name, value in rest.items() if name != "neuron"})
            look = _look(
                neurons.index(line.values.get("neuron")), shapes.setdefault(kind, len(shapes))
            )
            facets.setdefault(line.mode, []).append(replace(line, label=_label(rest), look=look))
    return {_WORDS.get(mode, mode): [*own, *still] for mode, own in facets.items()}


def _label(values: Mapping[str, Any]) -> str:
    """Values in the legend: a word for itself, anything else behind the name of its option."""
    return ", ".join(
        _WORDS.get(value, value)
        if isinstance(value, str) and value[:1].isalpha()
        else f"{name} {value_text(value)}"
        for name, value in values.items()
    )


def _title(column: str, columns: Sequence[str]) -> str:
    """A figure in words, such as "PGD-7, last iterate" for ``pgd7/last``; with its suite where
    there are several.
    """
    suites = {name.partition("/")[0] if "/" in name else "" for name in columns}
    suite, _, figure = column.partition("/") if "/" in column else ("", "", column)
    text = _WORDS.get(figure, figure)
    if found := re.fullmatch(r"pgd(\d+)(/last)?(?:@(.+))?", figure):
        steps, last, eps = found.groups()
        text = f"PGD-{steps}{', last iterate' if last else ''}{f', eps {eps}' if eps else ''}"
    return text if len(suites) == 1 else f"{text} ({suite or 'training'})"


def _panel(
    axes: Axes, lines: Sequence[_Line], option: str, column: str, places: Sequence[float]
) -> None:
    moving = sum(line.moves_with(option) for line in lines)
    for number, line in enumerate(lines):
        known = [
            (cell, figure) for cell in line.cells if (figure := cell.statistic(column)) is not None
        ]
        points = [
            (places.index(float(cell.values[option])), f)
            for cell, f in known
            if option in cell.values
        ]
        points.sort(key=lambda point: point[0])
        if points:
            shift = 0.06 * (number - (moving - 1) / 2) * min(1.0, 4 / moving)  # keeps bars apart
            axes.errorbar(
                [place + shift for place, _ in points],
                [100 * figure.mean for _, figure in points],
                yerr=[
                    100 * (math.nan if figure.spread is None else figure.spread)
                    for _, figure in points
                ],
                elinewidth=0.7,
                capsize=1.5,
                label=line.label,
                **line.look,
            )
        for figure in (figure for cell, figure in known if option not in cell.values):
            middle, half = 100 * figure.mean, 100 * (figure.spread or 0.0)
            across = {name: value for name, value in line.look.items() if name != "marker"}
            axes.axhline(middle, label=line.label, **across)
            axes.axhspan(
                middle - half, middle + half, color=line.look["color"], alpha=0.1, linewidth=0
            )
    every = math.ceil(len(places) / _MOST_TICKS)
    axes.set_xticks(range(0, len(places), every), [value_text(place) for place in places[::every]])
    axes.set_xlim(-0.4, len(places) - 0.6)
