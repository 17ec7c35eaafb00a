"""Rows as tables: one race on the terminal, all of them in Markdown."""

import math
from collections.abc import Sequence

from lab.benchmarking.benchmarks import BENCHMARKS, GPU_BENCHMARKS
from lab.benchmarking.results import TESTS, Row
from sj_robust.core.saved import markdown_table

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
    heads = ["best" if head.endswith("this, best") else head for head in lines[0]]
    return heads, [list(cells.values()) for cells in lines]


def _cells(row: Row, rows: Sequence[Row]) -> dict[str, str]:
    benchmark = _ALL[row.subject]
    peer = _by_name(rows).get(benchmark.peer_of(row.method), _UNKNOWN)
    cells = {
        "method": row.method,
        "median": _number(row.median, 1),
        "quartiles": f"{row.quartile1:.1f} - {row.quartile3:.1f}",
        "best": _number(row.best, 1),
        f"{benchmark.peer} / this, median": _number(peer.median / row.median, 2),
        f"{benchmark.peer} / this, best": _number(peer.best / row.best, 2),
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
