"""Rows as tables: one race on the terminal, all of them in Markdown."""

import math
from collections.abc import Sequence

from lab.benchmarking.benchmarks import BENCHMARKS, GPU_BENCHMARKS
from lab.benchmarking.results import TESTS, Row
from sj_robust._saved import markdown_table

_ALL = BENCHMARKS | GPU_BENCHMARKS


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
    heads = ["best" if head.endswith("this, best") else head for head in lines[0]]
    return heads, [list(cells.values()) for cells in lines]


def _cells(row: Row, rows: Sequence[Row]) -> dict[str, str]:
    benchmark = _ALL[row.subject]
    name = benchmark.peer_of(row.method)
    peer = next((other for other in rows if other.method == name), Row("", "", "", ""))
    cells = {
        "method": row.method,
        "median": _number(row.median, 1),
        "quartiles": f"{row.quartile1:.1f} - {row.quartile3:.1f}",
        "best": _number(row.best, 1),
        f"{benchmark.peer} / this, median": _number(peer.median / row.median, 2),
        f"{benchmark.peer} / this, best": _number(peer.best / row.best, 2),
    }
    if benchmark.passes > 0:
        median, best = 100 * floor(row) / row.median, 100 * floor(row) / row.best
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
        cells["note"] = row.reason.replace("|", "/")
    return cells


def _number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def markdown(rows: Sequence[Row]) -> list[str]:
    """Lines of a table for each race, and of one for the tests."""
    lines: list[str] = []
    for allocator, shape in dict.fromkeys((row.allocator, row.shape) for row in rows):
        race = [row for row in rows if (row.allocator, row.shape) == (allocator, shape)]
        if race[0].subject == TESTS:
            cells = [(row.method, row.outcome, row.reason.replace("|", "/")) for row in race]
            lines += [markdown_table(("tests", "outcome", "reason"), cells, words=3), ""]
            continue
        heads, texts = table(race)
        lines += [caption(race), "", markdown_table(heads, texts), ""]
    return lines
