"""The figure of a benchmark; needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab.benchmarking.results import Row, floor
from lab.figures.style import COLOURS, GREY, print_style


@print_style()
def plot_benchmark(rows: Sequence[Row], path: Path) -> None:
    """Time of every method, a column of panels per allocator and a row of them per shape, beside
    the time that moving the tensors takes.
    """
    allocators = list(dict.fromkeys(row.allocator for row in rows))
    shapes = list(dict.fromkeys(row.shape for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    width = 2.0 + 2.6 * len(allocators)
    height = 0.5 + len(shapes) * (0.5 + 0.14 * len(methods))
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(
        len(shapes),
        len(allocators),
        sharex="row",
        sharey=True,
        squeeze=False,
    )
    for line, shape in zip(panels, shapes, strict=True):
        of_shape = [row for row in rows if row.shape == shape]
        for axes, allocator in zip(line, allocators, strict=True):
            here = [row for row in of_shape if row.allocator == allocator]
            _draw(axes, here, methods)
            axes.set_title(f"[{shape.replace('x', ', ')}], {allocator}", loc="left")
    panels[0, 0].invert_yaxis()  # and the others with it
    figure.supxlabel(
        "forward + backward, ms; bar: median, whisker: quartiles, line: memory's speed",
        fontsize=7,
    )
    figure.savefig(path, dpi=200)


def _draw(axes: Axes, rows: Sequence[Row], methods: list[str]) -> None:
    """One race."""
    medians = [row.median for row in rows]
    below = [row.median - row.quartile1 for row in rows]
    above = [row.quartile3 - row.median for row in rows]
    axes.barh(
        [methods.index(row.method) for row in rows],
        medians,
        xerr=[below, above],
        color=COLOURS[0],
        ecolor=GREY,
    )
    axes.set_yticks(range(len(methods)), methods)
    axes.grid(visible=False, axis="y")
    for row in rows:
        axes.axvline(floor(row), color="black")
