"""The figure of a benchmark; needs matplotlib."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from lab.benchmarking.race import Measurement
from lab.figures.style import COLOURS, GREY, print_style

_COLOURS = [
    GREY if colour == "#000000" else colour for colour in COLOURS
]  # whiskers and lines are black

_HATCHES = ("", "////", "....")
"""Of the first methods, and of those beyond the number of colours."""


@print_style()
def plot_benchmark(measurements: Sequence[Measurement], path: Path) -> None:
    """Time of every method at every shape, a panel per allocator, beside the time that moving the
    tensors takes.
    """
    allocators, shapes, methods = (
        list(dict.fromkeys(getattr(m, name) for m in measurements))
        for name in ("allocator", "shape", "method")
    )
    figure = Figure(
        figsize=(3.6 * len(allocators) + 1.4, 0.8 + 0.13 * len(shapes) * len(methods)),
        layout="constrained",
    )
    panels = figure.subplots(1, len(allocators), squeeze=False, sharey=True)[0]
    for axes, allocator in zip(panels, allocators, strict=True):
        here = [m for m in measurements if m.allocator == allocator]
        height = 0.8 / len(methods)
        for index, method in enumerate(methods):
            rows = [m for m in here if m.method == method]
            places = [shapes.index(m.shape) + index * height for m in rows]
            spread = [
                [m.median - m.quartile1 for m in rows],
                [m.quartile3 - m.median for m in rows],
            ]
            axes.barh(
                places, [m.median for m in rows], height, xerr=spread, label=method, **_look(index)
            )
        for place, shape in enumerate(shapes):
            floor = min(m.floor for m in here if m.shape == shape)
            if not math.isnan(floor):
                axes.plot(
                    [floor, floor],
                    [place - height / 2, place + 0.8 - height / 2],
                    color="black",
                    linewidth=1.2,
                )
        if max(m.median for m in here) > 10 * min(m.median for m in here):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_xlim(left=0)  # where bars differ by little, their length has to be the time
        axes.set_yticks(
            [place + 0.4 - height / 2 for place in range(len(shapes))],
            [s.replace("x", ", ") for s in shapes],
        )
        axes.set_xlabel("forward + backward, ms")
        axes.set_title(allocator, loc="left")
        axes.grid(visible=False, axis="y")
    panels[0].invert_yaxis()  # and the others with it
    figure.supxlabel("bar: median, whisker: quartiles, line: memory's speed", fontsize=7)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=200)


def _look(index: int) -> dict[str, Any]:
    """Colour and hatch of a method."""
    hatch = _HATCHES[index // len(_COLOURS) % len(_HATCHES)]
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "hatch": hatch,
        "alpha": 0.55 if hatch else 1.0,
    }
