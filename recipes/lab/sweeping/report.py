"""What a sweep leaves besides its runs, and shows on the terminal; all from the records alone."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lab.sweeping.grid import names_in, value_text, values_in
from lab.sweeping.published_accuracies import published_accuracy
from lab.sweeping.record import RunRecord
from lab.sweeping.summary import Axes, Cell, axes_in, cells_of, columns_of, contrasts
from sj_robust.core.environment import CODE_KEY
from sj_robust.core.saved import csv_text, markdown_table, write_whole

_NOTHING = "–"
_RELEASES = ("torch", "spikingjelly", "sj_robust")
_RESULTS = ("figure", "mean", "standard_deviation", "seeds", "published", "source")
_CONTRAST = ("first", "second", "figure", "difference", "standard_error", "low", "high", "pairs")


def write_report(
    folder: Path,
    records: Sequence[RunRecord],
    console: Console,
    *,
    grid: Axes | None = None,
    columns: Sequence[str] | None = None,
    contrast: Sequence[str] = (),
    plot: str = "rho",
) -> tuple[Path, ...]:
    """Write ``results.md``, ``results.csv``, a table for every contrast and the figure, and print
    the tables.

    The grid, as options with their values, decides the order of values; the rest is as the options
    of ``sweep.py`` have it.

    Raises:
        FileNotFoundError: If there are no runs.
        ValueError: If a pattern fits nothing, or a contrast names no axis.
    """
    from lab.sweeping.plot import plot_effect  # imports matplotlib

    if not records:
        raise FileNotFoundError(
            f"{folder} holds no finished run, so there is nothing to report; run the sweep first"
        )
    axes = axes_in(records, grid)
    cells = cells_of(records, axes)
    everything = columns_of(records, ["*"]) + list(values_in(one.measures for one in records))
    few = columns_of(records, columns, few=True)
    if not few:
        known = ", ".join(everything)
        raise ValueError(f"columns {columns} fit none of the figures there are: {known}")
    parts = results_tables(cells, axes, columns_of(records, columns))
    files = {"results.csv": results_csv(cells, axes, everything)}
    for option in contrast:
        others = [name for name in axes if name not in names_in(option)]
        rows = contrasts(cells, axes, option, everything)
        shown = [row for row in rows if row["figure"] in few]
        parts.append(contrast_table(shown, option, others))
        files[f"contrast-{option.replace(',', '-')}.csv"] = csv_text([*others, *_CONTRAST], rows)
    alarms = [*_alarms(records), *_mixed(cells)]
    if alarms:
        parts.append("\n".join(["**Not to be relied on**\n", *alarms]))
    text = "\n\n".join(parts) + "\n"
    console.print(text, markup=False)
    files = {"results.md": text} | files
    for name, content in files.items():
        write_whole(folder / name, content)
    drawn = plot_effect(cells, axes, plot, few, folder / f"effect-{plot}")
    return (*(folder / name for name in files), *drawn)


def results_tables(
    cells: Sequence[Cell],
    axes: Axes,
    columns: Sequence[str],
) -> list[str]:
    """``mean ± standard deviation`` in per cent over the grid, as Markdown: a table for the
    recipe's own report, one per suite.

    A published accuracy stands behind it where there is one.
    """
    suites: dict[str, list[str]] = {}
    for column in columns:
        suite = column.partition("/")[0] if "/" in column else ""
        suites.setdefault(suite, []).append(column)
    tables = []
    for suite, own in suites.items():
        tables.append(_results_table(cells, axes, suite, own))
    return tables


def _results_table(
    cells: Sequence[Cell],
    axes: Axes,
    suite: str,
    columns: Sequence[str],
) -> str:
    rows = []
    sources = set()
    of_fewer = False
    for cell in cells:
        counts = [len(cell.by_seed(column)) for column in columns]
        seeds = max(counts)
        if seeds == 0:
            continue
        of_fewer = of_fewer or any(0 < count < seeds for count in counts)
        texts = [*_texts(cell.values, axes), str(seeds)]
        for column in columns:
            text = _with_spread(cell, column, seeds)
            known = published_accuracy(cell.records[0].options, column)
            if known:
                text += f" [{known.percent:.2f}]"
                sources.add(known.source)
            texts.append(text)
        rows.append(texts)
    heads = [*axes, "seeds", *(column.removeprefix(f"{suite}/") for column in columns)]
    table = markdown_table(heads, rows, words=len(axes))
    note = "mean ± standard deviation over the seeds, accuracy in per cent"
    if of_fewer:
        note += "; n is the number of seeds where it is smaller"
    if sources:
        note += f"; in brackets the published figure ({', '.join(sorted(sources))})"
    title = f"suite {suite}" if suite else "report of the training recipe"
    return f"**{title}**\n\n{table}\n\n{note}"


def results_csv(
    cells: Sequence[Cell],
    axes: Axes,
    columns: Sequence[str],
) -> str:
    """A line per cell and column."""
    lines = []
    for cell in cells:
        for column in columns:
            found = cell.statistic(column)
            if found is None:
                continue
            line = cell.values | {
                "figure": column,
                "mean": found.mean,
                "standard_deviation": found.spread,
                "seeds": found.count,
            }
            known = published_accuracy(cell.records[0].options, column)
            if known:
                line["published"] = round(known.percent / 100, 6)
                line["source"] = known.source
            lines.append(line)
    return csv_text([*axes, *_RESULTS], lines)


def contrast_table(
    rows: Sequence[Mapping[str, Any]],
    option: str,
    others: Sequence[str],
) -> str:
    """What one option changes in percentage points, as Markdown; a star marks an interval that
    leaves out 0.
    """
    texts = []
    for row in rows:
        difference = f"{100 * row['difference']:+.2f}"
        error = interval = _NOTHING
        if row["pairs"] > 1:
            error = f"{100 * row['standard_error']:.2f}"
            interval = f"{100 * row['low']:+.2f} to {100 * row['high']:+.2f}"
            if row["low"] > 0 or row["high"] < 0:
                difference += " *"
        level = f"{row['first']} → {row['second']}"
        line = [
            *_texts(row, others),
            level,
            row["figure"],
            difference,
            error,
            interval,
            str(row["pairs"]),
        ]
        texts.append(line)
    heads = [
        *others,
        option,
        "figure",
        "difference",
        "standard error",
        "95 % CI",
        "pairs",
    ]
    table = markdown_table(heads, texts, words=len(others) + 2)
    note = (
        "difference in accuracy in percentage points between runs of the same seed; * the "
        "interval (Student's t) excludes 0, as one row in twenty does by chance"
    )
    return f"**what {option} changes**\n\n{table}\n\n{note}"


def _alarms(records: Sequence[RunRecord]) -> list[str]:
    """Every alarm once, with the runs that it is about."""
    runs: dict[str, list[str]] = {}
    for record in records:
        for suite, result in record.evaluations.items():
            alarm = result["alarm"]
            if alarm:
                runs.setdefault(f"suite {suite}: {alarm}", []).append(record.name)
    return [f"- {', '.join(names)}, {alarm}" for alarm, names in runs.items()]


def _mixed(cells: Iterable[Cell]) -> list[str]:
    """Cells whose runs were trained with different code of one's own, or other releases; other
    commits of this package are no reason.
    """
    found = []
    for cell in cells:
        runs = ", ".join(record.name for record in cell.records)
        trained = values_in(record.trained_in for record in cell.records)
        code = [name for name in trained if name.startswith(CODE_KEY)]
        if any(len(trained[name]) > 1 for name in code):
            found.append(f"- {runs}: the code of the network changed between these runs of a cell")
        for name in _RELEASES:
            if len(trained.get(name, [])) > 1:
                versions = " and ".join(trained[name])
                found.append(f"- {runs}: trained with {name} {versions}, in one cell")
    return found


def _with_spread(cell: Cell, column: str, seeds: int) -> str:
    """Mean and spread, and the number of runs they are of where it is not ``seeds``."""
    found = cell.statistic(column)
    if found is None:
        return _NOTHING
    spread = "" if found.spread is None else f" ± {100 * found.spread:.1f}"
    fewer = "" if found.count == seeds else f" (n = {found.count})"
    return f"{100 * found.mean:.1f}{spread}{fewer}"


def _texts(values: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    return [value_text(values[name]) if name in values else _NOTHING for name in names]
