"""Tables of a sweep, all from the same cells: words for Markdown and the terminal, shares for other
programs as CSV.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lab.sweeping.grid import value_text
from lab.sweeping.published_accuracies import published_accuracy
from lab.sweeping.summary import Cell, Contrast, Statistic
from sj_robust._saved import markdown_table

Axes = Mapping[str, Sequence[Any]]
"""Values by option, from ``axes_in``."""

_NOTHING = "–"


@dataclass(frozen=True)
class TextTable:
    """A table of words, of which the first ``words`` columns hold words and the others numbers.

    Examples:
        >>> print(TextTable("runs", ("mode", "clean"), (("at", "95.0"),), 1, "per cent").markdown())
        **runs**
        <BLANKLINE>
        | mode | clean |
        | --- | ---: |
        | at | 95.0 |
        <BLANKLINE>
        per cent
    """

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int
    note: str

    def markdown(self) -> str:
        """The table as Markdown, title and note included."""
        table = markdown_table(self.heads, self.rows, words=self.words)
        return f"**{self.title}**\n\n{table}\n\n{self.note}"


def results_tables(cells: Sequence[Cell], axes: Axes, columns: Sequence[str]) -> list[TextTable]:
    """``mean ± standard deviation`` in per cent over the grid: a table for the recipe's own report,
    one per suite.

    A published accuracy stands behind it where there is one.
    """
    tables = []
    for suite in dict.fromkeys(
        column.partition("/")[0] if "/" in column else "" for column in columns
    ):
        here = [
            column
            for column in columns
            if (column.startswith(f"{suite}/") if suite else "/" not in column)
        ]
        rows, sources = [], set()
        for cell in cells:
            texts = []
            for column in here:
                texts.append(_with_spread(cell.statistic(column)))
                if known := published_accuracy(cell.options, column):
                    texts[-1] += f" [{known.percent:.2f}]"
                    sources.add(known.source)
            if any(cell.statistic(column) for column in here):
                rows.append((*_texts(cell.values, axes), str(len(cell.records)), *texts))
        note = "mean ± standard deviation over the seeds, accuracy left in per cent"
        note += (
            f"; in brackets the published figure ({', '.join(sorted(sources))})" if sources else ""
        )
        title = f"suite {suite}" if suite else "report of the training recipe"
        heads = (*axes, "seeds", *(column.removeprefix(f"{suite}/") for column in here))
        tables.append(TextTable(title, heads, tuple(rows), len(axes), note))
    return tables


def results_csv(cells: Sequence[Cell], axes: Axes, columns: Sequence[str]) -> str:
    """A line per cell and column."""
    lines: list[list[Any]] = [
        [*axes, "figure", "mean", "standard_deviation", "seeds", "published", "source"]
    ]
    for cell in cells:
        for column in columns:
            if found := cell.statistic(column):
                known = published_accuracy(cell.options, column)
                beside = [round(known.percent / 100, 6), known.source] if known else ["", ""]
                values = [cell.values.get(name) for name in axes]
                lines.append([*values, column, found.mean, found.spread, found.count, *beside])
    return _csv(lines)


def contrast_table(rows: Sequence[Contrast], axes: Axes, option: str) -> TextTable:
    """What one option changes in percentage points, a row per contrast; a star marks an interval
    that leaves out 0.
    """
    others = _others(axes, option)
    texts = []
    for row in rows:
        found = row.difference
        low_high = found.interval and " to ".join(f"{100 * end:+.2f}" for end in found.interval)
        texts.append(
            (
                *_texts(row.values, others),
                f"{_level(row.first)} → {_level(row.second)}",
                row.column,
                f"{100 * found.mean:+.2f}{' *' if row.clear else ''}",
                _NOTHING if found.error is None else f"{100 * found.error:.2f}",
                low_high or _NOTHING,
                str(found.count),
            )
        )
    heads = (*others, option, "figure", "difference", "standard error", "95 % interval", "pairs")
    note = (
        "difference of the accuracy left in percentage points between runs of the same seed; * "
        "the interval (Student's t) leaves out 0. Many rows are compared: one in twenty does so "
        "by chance"
    )
    return TextTable(f"what {option} changes", heads, tuple(texts), len(others) + 2, note)


def contrast_csv(rows: Sequence[Contrast], axes: Axes, option: str) -> str:
    """A line per contrast."""
    others = _others(axes, option)
    heads = ["first", "second", "figure", "difference", "standard_error", "low", "high", "pairs"]
    lines: list[list[Any]] = [[*others, *heads]]
    for row in rows:
        found = row.difference
        values = [row.values.get(name) for name in others]
        numbers = [found.mean, found.error, *(found.interval or (None, None)), found.count]
        lines.append([*values, _level(row.first), _level(row.second), row.column, *numbers])
    return _csv(lines)


def _csv(lines: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def _others(axes: Axes, option: str) -> list[str]:
    return [name for name in axes if name not in {part.strip() for part in option.split(",")}]


def _with_spread(found: Statistic | None) -> str:
    if found is None:
        return _NOTHING
    return f"{100 * found.mean:.1f}" + (
        "" if found.spread is None else f" ± {100 * found.spread:.1f}"
    )


def _texts(values: Mapping[str, Any], names: Sequence[str] | Axes) -> list[str]:
    return [value_text(values[name]) if name in values else _NOTHING for name in names]


def _level(values: Mapping[str, Any]) -> str:
    return " ".join(map(value_text, values.values()))
