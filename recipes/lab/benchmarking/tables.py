"""Measurements as tables: one race on the terminal, all of them in Markdown."""

import math

from lab.benchmarking.benchmarks import BENCHMARKS
from lab.benchmarking.race import Measurement
from sj_robust._saved import markdown_table


def caption(rows: list[Measurement]) -> str:
    """What the rows of one race have in common."""
    first = rows[0]
    floor = (
        f"; moving the tensors takes {first.floor:.1f} ms"
        if BENCHMARKS[first.subject].is_layer
        else ""
    )
    return (
        f"{first.subject} [{first.shape.replace('x', ', ')}], {first.allocator}, "
        f"milliseconds{floor}"
    )


def columns(rows: list[Measurement]) -> tuple[str, ...]:
    """Names of the columns: a layer is compared with the speed of the memory too."""
    benchmark = BENCHMARKS[rows[0].subject]
    peer = benchmark.peer
    head = ("method", "median", "quartiles", "best", f"{peer} / this, median", "best")
    speed, unit = (
        ("speed of memory, median / best", "tensors")
        if benchmark.is_layer
        else ("images / s", "MB")
    )
    saved = (f"saved, {unit}",) if benchmark.has_one_graph else ()
    return (*head, speed, *saved, f"peak, {unit}", f"peak / {peer}")


def cells(row: Measurement, rows: list[Measurement]) -> tuple[str, ...]:
    """Text of one line of the table."""
    benchmark = BENCHMARKS[row.subject]
    peer = next((other for other in rows if other.method == benchmark.peer_of(row.method)), None)
    texts = [
        row.method,
        f"{row.median:.1f}",
        f"{row.quartile1:.1f} - {row.quartile3:.1f}",
        f"{row.best:.1f}",
    ]
    texts += (
        ["", ""]
        if peer is None
        else [f"{peer.median / row.median:.2f}", f"{peer.best / row.best:.2f}"]
    )
    if benchmark.is_layer:
        texts += [f"{100 * row.floor / row.median:.0f} % / {100 * row.floor / row.best:.0f} %"]
    else:
        texts += [f"{row.images_per_second:.0f}"]
    memory = (row.saved_mb, row.peak_mb) if benchmark.has_one_graph else (row.peak_mb,)
    unit, digits = (row.tensor_mb, 2) if benchmark.is_layer else (1.0, 0)
    texts += ["" if math.isnan(mb) else f"{mb / unit:.{digits}f}" for mb in memory]
    hidden = peer is None or math.isnan(row.peak_mb) or not peer.peak_mb > 0
    return (*texts, "" if peer is None or hidden else f"{row.peak_mb / peer.peak_mb:.2f}")


def markdown(rows: list[Measurement]) -> list[str]:
    """Lines of a table for each race."""
    lines = []
    for allocator, shape in dict.fromkeys((row.allocator, row.shape) for row in rows):
        of_race = [row for row in rows if (row.allocator, row.shape) == (allocator, shape)]
        table = markdown_table(columns(of_race), [cells(row, of_race) for row in of_race])
        lines += [caption(of_race), "", table, ""]
    return lines
