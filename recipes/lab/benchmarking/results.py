"""Rows of a benchmark in a CSV file, as tables and as a chart; a run that was stopped measures only
what is not in it.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.benchmarking.benchmarks import BENCHMARKS, GPU_BENCHMARKS
from sj_robust.core.saved import csv_text, markdown_table, write_whole
from sj_robust.core.shown import COLOURS, GREY, new_figure, print_style, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TESTS = "gpu_tests"
"""Subject of the rows that are tests."""


@dataclass(frozen=True)
class Row:
    """One method at one shape, or a group of tests. Times in milliseconds, memory in megabytes.

    Attributes:
        subject: Name of the benchmark, or :data:`TESTS`.
        allocator: Name in :data:`lab.benchmarking.race.ALLOCATORS`.
        shape: Shape of the input, as text.
        method: Name of the method, or of the tests.
        median: Time of forward plus backward.
        quartile1: First quartile of the same.
        quartile3: Third quartile of the same.
        best: Shortest of the same.
        forward: Median of the forward pass alone.
        backward: Median of the backward pass alone.
        saved_mb: What the graph keeps beyond inputs and parameters; NaN if there are several
            graphs.
        peak_mb: Largest growth of the memory; NaN if the heap is reused, which hides it.
        tensor_mb: Size of the input of a layer, or of the frames of a network.
        copy: Time of the fastest copy of that tensor in the same race; NaN for networks.
        reason: Why there is no figure, or the message of a failed test.
        outcome: Result of a group of tests.
    """

    subject: str
    allocator: str
    shape: str
    method: str
    median: float = math.nan
    quartile1: float = math.nan
    quartile3: float = math.nan
    best: float = math.nan
    forward: float = math.nan
    backward: float = math.nan
    saved_mb: float = math.nan
    peak_mb: float = math.nan
    tensor_mb: float = math.nan
    copy: float = math.nan
    reason: str = ""
    outcome: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What was measured: a file holds one row of each key."""
        return self.subject, self.allocator, self.shape, self.method


_KINDS = {field.name: field.type for field in fields(Row)}
"""Type of every column."""


class Results:
    """Rows, and the machine, code and versions they were measured with; kept in a file if there is
    a path.

    Rows of an earlier call stay in the file if they were measured with the same; otherwise they are
    moved to a file beside it, since one table cannot hold both.
    """

    def __init__(self, path: Path | None, where: Mapping[str, str]) -> None:
        """Read the rows in the file, if there is one."""
        self.path = path
        self.where = dict(where)
        self._known: dict[tuple[str, ...], Row] = {}
        if path is None or not path.is_file():
            return
        before, rows = load(path)
        # The commit is not compared: it changes when tables are committed. The code has a digest.
        if before | {"commit": ""} == self.where | {"commit": ""}:
            self._known = {row.key: row for row in rows}
            return
        with path.with_suffix(".earlier.csv").open("a", encoding="utf-8") as earlier:
            earlier.write(path.read_text(encoding="utf-8"))

    def has(self, row: Row) -> bool:
        """Whether a row of the same key is known that is not a failure."""
        known = self._known.get(row.key)
        return known is not None and not known.reason

    @property
    def rows(self) -> list[Row]:
        """All rows, in the order in which they were added."""
        return list(self._known.values())

    def add(self, rows: Sequence[Row]) -> None:
        """Add rows, which replace earlier ones with the same key, and write the file."""
        for row in rows:
            self._known[row.key] = row
        if self.path is None:
            return
        lines = [asdict(row) | self.where for row in self.rows]
        write_whole(self.path, csv_text([*_KINDS, *self.where], lines))


def load(path: Path) -> tuple[dict[str, str], list[Row]]:
    """What the rows of a file were measured with, and the rows.

    Raises:
        ValueError: If the file holds something else.
    """
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    head = lines[0] if lines else {}
    if not {"subject", "method", "median"} <= head.keys():
        raise ValueError(f"{path} holds no measurements of this recipe; move it elsewhere")
    where = {name: head[name] for name in head if name not in _KINDS}
    return where, [_row(line) for line in lines]


def _row(line: Mapping[str, str]) -> Row:
    """A row from a line; columns that an earlier release did not write have their defaults."""
    values: dict[str, Any] = {}
    for name, text in line.items():
        if name in _KINDS:
            values[name] = text if _KINDS[name] is str else float(text)
    return Row(**values)


_ALL = BENCHMARKS | GPU_BENCHMARKS
_UNKNOWN = Row(subject="", allocator="", shape="", method="")  # of a peer that was not measured


def floor(row: Row) -> float:
    """Milliseconds that moving a layer's tensors takes, a copy being two passes; NaN for others."""
    return _ALL[row.subject].passes / 2 * row.copy


def caption(rows: Sequence[Row]) -> str:
    """What the rows of one race have in common."""
    first = rows[0]
    shape = first.shape.replace("x", ", ")
    text = f"{first.subject} [{shape}], {first.allocator}, milliseconds"
    if math.isnan(first.copy):
        return text
    text += f"; moving the tensors takes {floor(first):.1f} ms"
    if first.allocator == "cuda":
        text += f", a copy reaches {2 * first.tensor_mb / first.copy:.0f} GB/s"
    return text


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Heads and lines of one race; a row without a figure has its reason."""
    lines = [_cells(row, rows) for row in rows]
    return list(lines[0]), [list(cells.values()) for cells in lines]


def _cells(row: Row, rows: Sequence[Row]) -> dict[str, str]:
    benchmark = _ALL[row.subject]
    peer = _by_name(rows).get(benchmark.peer_of(row.method), _UNKNOWN)
    cells = {
        "method": row.method,
        "median": _number(row.median, 1),
        "quartiles": f"{row.quartile1:.1f} - {row.quartile3:.1f}",
        "best": _number(row.best, 1),
        f"{benchmark.peer} / this, median": _number(peer.median / row.median, 2),
        "ratio, best": _number(peer.best / row.best, 2),
    }
    if benchmark.passes > 0:
        median = 100 * floor(row) / row.median
        best = 100 * floor(row) / row.best
        cells["speed of memory, median / best"] = f"{median:.0f} % / {best:.0f} %"
        cells["saved, tensors"] = _number(row.saved_mb / row.tensor_mb, 2)
        cells["peak, tensors"] = _number(row.peak_mb / row.tensor_mb, 2)
    else:
        images = int(row.shape.split("x")[1])
        cells["images / s"] = _number(1e3 * images / row.median, 0)
        if any(not math.isnan(other.saved_mb) for other in rows):
            cells["saved, MB"] = _number(row.saved_mb, 0)
        cells["peak, MB"] = _number(row.peak_mb, 0)
    peak = row.peak_mb / peer.peak_mb if peer.peak_mb > 0 else math.nan
    cells[f"peak / {benchmark.peer}"] = _number(peak, 2)
    if row.reason:
        cells = dict.fromkeys(cells, "") | {"method": row.method}
    if any(other.reason for other in rows):
        cells["note"] = _in_a_cell(row.reason)
    return cells


def _by_name(rows: Sequence[Row]) -> dict[str, Row]:
    return {row.method: row for row in rows}


def _number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def markdown(rows: Sequence[Row]) -> list[str]:
    """Lines of a table for each race, and of one for the tests."""
    lines: list[str] = []
    races: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        races.setdefault((row.allocator, row.shape), []).append(row)
    for race in races.values():
        if race[0].subject == TESTS:
            texts = [[row.method, row.outcome, _in_a_cell(row.reason)] for row in race]
            lines.append(markdown_table(["tests", "outcome", "reason"], texts, words=3))
        else:
            heads, texts = table(race)
            lines += [caption(race), "", markdown_table(heads, texts)]
        lines.append("")
    return lines


def _in_a_cell(text: str) -> str:
    return text.replace("|", "/")


@print_style()
def draw(rows: Sequence[Row], path: Path) -> None:
    """Time of every method, a column of panels per allocator and a row of them per shape, beside
    the time that moving the tensors takes; nothing without figures.
    """
    rows = [row for row in rows if not math.isnan(row.median)]
    if not rows:
        return
    allocators = list(dict.fromkeys(row.allocator for row in rows))
    shapes = list(dict.fromkeys(row.shape for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    width = 2.0 + 2.6 * len(allocators)
    height = 0.5 + len(shapes) * (0.5 + 0.14 * len(methods))
    figure = new_figure(width, height)
    size = len(shapes), len(allocators)
    panels = figure.subplots(*size, sharex="row", sharey=True, squeeze=False)
    for line, shape in zip(panels, shapes, strict=True):
        of_shape = [row for row in rows if row.shape == shape]
        for axes, allocator in zip(line, allocators, strict=True):
            here = [row for row in of_shape if row.allocator == allocator]
            _draw_race(axes, here, methods)
            axes.set_title(f"[{shape.replace('x', ', ')}], {allocator}", loc="left")
    panels[0, 0].invert_yaxis()  # and the others with it
    figure.supxlabel(
        "forward + backward, ms; bar: median, whisker: quartiles, line: memory's speed",
        fontsize=7,
    )
    write_figure(figure, path)


def _draw_race(axes: "Axes", rows: Sequence[Row], methods: list[str]) -> None:
    """One race."""
    medians = [row.median for row in rows]
    below = [row.median - row.quartile1 for row in rows]
    above = [row.quartile3 - row.median for row in rows]
    places = [methods.index(row.method) for row in rows]
    axes.barh(places, medians, xerr=[below, above], color=COLOURS[0], ecolor=GREY)
    axes.set_yticks(range(len(methods)), methods)
    axes.grid(visible=False, axis="y")
    for row in rows:
        axes.axvline(floor(row), color="black")
