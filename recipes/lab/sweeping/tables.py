"""Tables of a sweep: Markdown, CSV and terminal, all from the same cells."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lab.sweeping.grid import word
from lab.sweeping.published import published
from lab.sweeping.summary import Cell, Contrast, Statistic

__all__ = ["TextTable", "contrast_csv", "contrast_table", "markdown", "results_csv", "results_tables"]

_NOTHING = "–"


@dataclass(frozen=True)
class TextTable:
    """A table of words. 文本表格。

    Attributes:
        title: What it shows.
        heads: Names of the columns.
        rows: Cells, a row each.
        words: How many columns at the left hold words; the others hold numbers.
        note: How to read it.
    """

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int
    note: str = ""


def results_tables(cells: Sequence[Cell], axes: Mapping[str, Sequence[Any]], columns: Sequence[str]) -> list[TextTable]:
    """Mean and spread over the grid, a table for the recipe's own report and one per suite. 结果表格。

    Args:
        cells: Rows.
        axes: Values by option, from ``axes_in``.
        columns: Figures, from ``columns_of``.

    Returns:
        Tables with ``mean ± standard deviation`` in per cent, and a published figure behind it where there is one.
    """
    tables = []
    for suite in dict.fromkeys(column.partition("/")[0] if "/" in column else "" for column in columns):
        here = [column for column in columns if (column.startswith(f"{suite}/") if suite else "/" not in column)]
        rows, sources = [], set()
        for cell in cells:
            texts = []
            for column in here:
                figure = published(cell.options, column)
                texts.append(_with_spread(cell.statistic(column)))
                if figure is not None:
                    texts[-1] = f"{texts[-1]} [{figure.percent:.2f}]"
                    sources.add(figure.source)
            if any(cell.statistic(column) for column in here):
                rows.append((*_values(cell, axes), str(len(cell.records)), *texts))
        note = "mean ± standard deviation over the seeds, accuracy left in per cent"
        note += f"; in brackets the published figure ({', '.join(sorted(sources))})" if sources else ""
        title = f"suite {suite}" if suite else "report of the training recipe"
        heads = (*axes, "seeds", *(column.removeprefix(f"{suite}/") for column in here))
        tables.append(TextTable(title, heads, tuple(rows), len(axes), note))
    return tables


def contrast_table(rows: Sequence[Contrast], axes: Mapping[str, Sequence[Any]], option: str) -> TextTable:
    """What one option changes, a row per pair of cells and figure. 配对差异表格。

    Args:
        rows: From ``contrasts``.
        axes: Values by option.
        option: The option that differs.

    Returns:
        The table, in percentage points; a star marks an interval that leaves out 0.
    """
    others = [name for name in axes if name not in {part.strip() for part in option.split(",")}]
    texts = []
    for row in rows:
        change = f"{_level(row.first)} → {_level(row.second)}"
        names = [word(row.values[name]) if name in row.values else _NOTHING for name in others]
        interval = row.difference.interval
        numbers = [
            f"{100 * row.difference.mean:+.2f}{' *' if row.clear else ''}",
            _NOTHING if row.difference.error is None else f"{100 * row.difference.error:.2f}",
            _NOTHING if interval is None else f"{100 * interval[0]:+.2f} to {100 * interval[1]:+.2f}",
            str(row.difference.count),
        ]
        texts.append((*names, change, row.column, *numbers))
    heads = (*others, option, "figure", "difference", "standard error", "95 % interval", "pairs")
    note = (
        "difference of the accuracy left in percentage points between runs of the same seed; * the interval (Student's "
        "t) leaves out 0. Many rows are compared: one in twenty does so by chance"
    )
    return TextTable(f"what {option} changes", heads, tuple(texts), len(others) + 2, note)


def markdown(table: TextTable) -> str:
    """A table as Markdown, title and note included. Markdown 表格。

    Args:
        table: The table.

    Returns:
        Text.

    Examples:
        >>> print(markdown(TextTable("runs", ("mode", "clean"), (("at", "95.0"),), 1, "per cent")))
        **runs**
        <BLANKLINE>
        | mode | clean |
        | --- | ---: |
        | at | 95.0 |
        <BLANKLINE>
        per cent
    """
    marks = ["---"] * table.words + ["---:"] * (len(table.heads) - table.words)
    lines = [f"| {' | '.join(row)} |" for row in (table.heads, tuple(marks), *table.rows)]
    return "\n".join([f"**{table.title}**", "", *lines, "", table.note])


def results_csv(cells: Sequence[Cell], axes: Mapping[str, Sequence[Any]], columns: Sequence[str]) -> str:
    """A line per cell and figure, for other programs: shares, not per cent. CSV 格式的结果。

    Args:
        cells: The cells.
        axes: Values by option.
        columns: Figures.

    Returns:
        Text.
    """
    heads = [*axes, "figure", "mean", "standard_deviation", "seeds", "published", "source"]
    rows = []
    for cell in cells:
        for column in columns:
            figure = cell.statistic(column)
            if figure is None:
                continue
            known = published(cell.options, column)
            beside = ["", ""] if known is None else [round(known.percent / 100, 6), known.source]
            spread = "" if figure.spread is None else figure.spread
            rows.append([*(cell.values.get(n, "") for n in axes), column, figure.mean, spread, figure.count, *beside])
    return _csv(heads, rows)


def contrast_csv(rows: Sequence[Contrast], axes: Mapping[str, Sequence[Any]], option: str) -> str:
    """The contrasts for other programs, a line each. CSV 格式的配对差异。

    Args:
        rows: From ``contrasts``.
        axes: Values by option.
        option: The option that differs.

    Returns:
        Text.
    """
    others = [name for name in axes if name not in {part.strip() for part in option.split(",")}]
    heads = [*others, "first", "second", "figure", "difference", "standard_error", "low", "high", "pairs"]
    lines = []
    for row in rows:
        low, high = row.difference.interval or ("", "")
        error = "" if row.difference.error is None else row.difference.error
        ends = [row.difference.mean, error, low, high, row.difference.count]
        lines.append(
            [*(row.values.get(n, "") for n in others), _level(row.first), _level(row.second), row.column, *ends]
        )
    return _csv(heads, lines)


def _csv(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([heads, *rows])
    return text.getvalue()


def _with_spread(figure: Statistic | None) -> str:
    if figure is None:
        return _NOTHING
    return f"{100 * figure.mean:.1f}" + ("" if figure.spread is None else f" ± {100 * figure.spread:.1f}")


def _values(cell: Cell, axes: Mapping[str, Sequence[Any]]) -> list[str]:
    return [word(cell.values[name]) if name in cell.values else _NOTHING for name in axes]


def _level(values: Mapping[str, Any]) -> str:
    return " ".join(map(word, values.values()))
