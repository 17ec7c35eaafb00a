"""What a sweep leaves besides its runs, and shows on the terminal; all from the records alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lab.sweeping.record import RunRecord
from lab.sweeping.summary import axes_in, cells_of, columns_of, contrasts
from lab.sweeping.tables import TextTable, contrast_csv, contrast_table, results_csv, results_tables
from sj_robust._saved import write_whole


def write_report(
    folder: Path,
    records: Sequence[RunRecord],
    console: Console,
    *,
    grid: Mapping[str, Sequence[Any]] | None = None,
    columns: Sequence[str] | None = None,
    contrast: Sequence[str] = (),
    plot: str = "rho",
) -> tuple[Path, ...]:
    """Write ``results.md``, ``results.csv``, a table for every contrast and the figure, and print
    the tables.

    The grid, from ``axes_of``, decides the order of values; the rest is as the options of
    ``sweep.py`` have it.

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
    chosen, everything = columns_of(records, columns), columns_of(records, ["*"])
    few = columns_of(records, columns, few=True)
    if not chosen:
        known = ", ".join(everything)
        raise ValueError(
            f"columns {list(columns or ())} fit none of the figures there are: {known}"
        )
    tables = results_tables(cells, axes, chosen)
    csvs = {"results.csv": results_csv(cells, axes, everything)}
    for option in contrast:
        rows = contrasts(cells, axes, option, everything)
        tables.append(contrast_table([row for row in rows if row.column in few], axes, option))
        csvs[f"contrast-{option.replace(',', '-')}.csv"] = contrast_csv(rows, axes, option)
    alarms = _alarms(records)
    parts = [table.markdown() for table in tables]
    parts += (
        ["**Not to be relied on**\n\n" + "\n".join(f"- {text}" for text in alarms)]
        if alarms
        else []
    )
    texts = {"results.md": "\n\n".join(parts) + "\n", **csvs}
    for name, text in texts.items():
        write_whole(folder / name, text)
    for table in tables:
        console.print(_shown(table), soft_wrap=False)
    for text in alarms:
        console.print(Text(text, style="bold red"))
    return (
        *(folder / name for name in texts),
        *plot_effect(cells, axes, plot, few, folder / f"effect-{plot}"),
    )


def _alarms(records: Sequence[RunRecord]) -> list[str]:
    """Every alarm once, with the runs that it is about."""
    runs: dict[tuple[str, str], list[str]] = {}
    for record in records:
        for suite, result in record.evaluations.items():
            if result["alarm"]:
                runs.setdefault((suite, result["alarm"]), []).append(record.name)
    return [f"{', '.join(names)}, suite {suite}: {alarm}" for (suite, alarm), names in runs.items()]


def _shown(table: TextTable) -> Table:
    result = Table(title=table.title, caption=table.note, caption_justify="left")
    for number, head in enumerate(table.heads):
        result.add_column(
            head, justify="left" if number < table.words else "right", overflow="fold"
        )
    for row in table.rows:
        result.add_row(*map(Text, row))
    return result
