"""Rows of a GPU as tables and as a chart."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from lab.benchmarking.gpu_plan import COPY, Part
from lab.benchmarking.gpu_run import TESTS, GpuRow, Store
from sj_robust._saved import markdown_table


def gigabytes_per_second(row: GpuRow, part: Part) -> float:
    """Bytes that have to move over the time that passed: the achieved bandwidth."""
    if row.method == COPY:
        return 2 * row.tensor_mb / row.forward
    return part.passes * row.tensor_mb / row.median


def per_image(row: GpuRow) -> float:
    """Milliseconds per sample, since the batch may have been made smaller."""
    return row.median / int(row.shape.split("x")[1])


def markdown(store: Store, plan: Mapping[str, Part], command: str) -> str:
    """The page of a run: what was tested, and a table for each part, precision and shape."""
    where = store.where
    lines = [
        f"`{command}`: {where['device']}, torch {where['torch']}, SpikingJelly "
        f"{where['spikingjelly']}, CuPy {where['cupy']}, Triton {where['triton']}, commit "
        f"{where['commit'][:12]}.",
        "",
    ]
    tests = [row for row in store.rows if row.part == TESTS]
    if tests:
        failed = [row.method for row in tests if row.reason]
        sentence = (
            f"Tests that fail: {', '.join(failed)}." if failed else "No test of `tests/gpu` fails."
        )
        if skipped := [
            row.method for row in tests if not row.reason and "passed" not in row.outcome
        ]:
            sentence += f" Tests that did not run: {', '.join(skipped)}."
        cells = [(row.method, row.outcome or "no outcome", _cell(row.reason)) for row in tests]
        lines += [sentence, "", markdown_table(("test", "outcome", "reason"), cells), ""]
    for name, part in plan.items():
        for precision, wanted in dict.fromkeys(
            (row.precision, row.wanted) for row in store.rows if row.part == name
        ):
            rows = [
                row
                for row in store.rows
                if (row.part, row.precision, row.wanted) == (name, precision, wanted)
            ]
            lines += [caption(name, rows, part), "", table(rows, part), ""]
    return "\n".join(lines)


def caption(name: str, rows: Sequence[GpuRow], part: Part) -> str:
    """What the rows of one table have in common."""
    text = f"{name}, {rows[0].precision}, [{rows[0].wanted.replace('x', ', ')}], milliseconds"
    if (copy := _copy_among(rows)) is None:
        return text
    speed = gigabytes_per_second(copy, part)
    least = part.passes * copy.tensor_mb / speed
    return (
        f"{text}; a copy reaches {speed:.0f} GB/s, at which the {part.passes:g} passes take "
        f"{least:.3g} ms"
    )


def table(rows: Sequence[GpuRow], part: Part) -> str:
    """One table; a row without a figure has its reason."""
    is_layer = not math.isnan(part.passes)
    speed = ("GB/s", "of a copy") if is_layer else ("images / s",)
    peers = [
        peer for peer in part.peers if any(row.method == peer and not row.reason for row in rows)
    ]
    head = (
        "method",
        "forward",
        "backward",
        "both",
        "quartiles",
        "host",
        *speed,
        *(f"{peer} / this" for peer in peers),
        "peak, MB",
        "note",
    )
    of = {row.method: row for row in rows}
    copy = _copy_among(rows)
    lines = []
    for row in rows:
        note = (
            "" if row.shape == row.wanted else f"memory was short: [{row.shape.replace('x', ', ')}]"
        )
        if row.reason:
            lines.append((row.method, *[""] * (len(head) - 2), _cell(row.reason)))
            continue
        cells = [
            row.method,
            f"{row.forward:.3g}",
            f"{row.backward:.3g}",
            f"{row.median:.3g}",
            f"{row.quartile1:.3g} - {row.quartile3:.3g}",
            f"{row.host:.3g}",
        ]
        if is_layer:
            reached = gigabytes_per_second(row, part)
            share = (
                "" if copy is None else f"{100 * reached / gigabytes_per_second(copy, part):.0f} %"
            )
            cells += [f"{reached:.0f}", share]
        else:
            cells.append(f"{1e3 / per_image(row):.0f}")
        cells += [
            "" if row.method == COPY else f"{per_image(of[peer]) / per_image(row):.2f}"
            for peer in peers
        ]
        cells += ["" if math.isnan(row.peak_mb) else f"{row.peak_mb:.0f}", note]
        lines.append(tuple(cells))
    return markdown_table(head, lines)


def _copy_among(rows: Sequence[GpuRow]) -> GpuRow | None:
    return next((row for row in rows if row.method == COPY and not row.reason), None)


def _cell(text: str) -> str:
    """Text that does not end a cell of a table."""
    return text.replace("|", "/")


def plot(store: Store, plan: Mapping[str, Part], path: Path) -> None:
    """A panel per part: achieved bandwidth of the layers, images per second of networks."""
    from matplotlib.figure import Figure

    from lab.figures.style import COLOURS, print_style  # imports matplotlib

    shown = {
        name: [row for row in store.rows if row.part == name and not row.reason] for name in plan
    }
    shown = {name: rows for name, rows in shown.items() if rows}
    if not shown:
        raise ValueError("nothing is measured yet, so there is nothing to draw")
    heights = [max(4, len(rows)) for rows in shown.values()]
    with print_style():
        figure = Figure(
            figsize=(6.75, 0.6 * len(shown) + 0.14 * sum(heights)), layout="constrained"
        )
        panels = figure.subplots(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (name, rows) in zip(panels, shown.items(), strict=True):
            part = plan[name]
            is_layer = not math.isnan(part.passes)
            rows = sorted(rows, key=lambda row: (row.precision, row.wanted))
            values = [
                gigabytes_per_second(row, part) if is_layer else 1e3 / per_image(row)
                for row in rows
            ]
            colours = [COLOURS[part.methods.index(row.method) % len(COLOURS)] for row in rows]
            axes.barh(range(len(rows)), values, color=colours)
            labels = [
                f"{row.method}, {row.precision} [{row.shape.replace('x', ', ')}]" for row in rows
            ]
            axes.set_yticks(range(len(rows)), labels, fontsize=5)
            axes.invert_yaxis()
            axes.grid(visible=False, axis="y")
            axes.set_xlabel("GB/s" if is_layer else "images / s")
            axes.set_title(name, loc="left")
        figure.savefig(path, dpi=200)
