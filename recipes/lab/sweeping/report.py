"""What a sweep leaves besides its runs, and shows on the terminal: tables with mean and spread over
the seeds, differences between runs of one seed, and the figure; all from the records alone.
"""

import fnmatch
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from scipy.special import stdtrit

from lab.figures.style import COLOURS, DOUBLE, MARKERS, legend, print_style, save
from lab.sweeping.runs import PlannedRun, RunRecord, names_in, value_text
from sj_robust.core.environment import CODE_KEY
from sj_robust.core.saved import csv_text, markdown_table, write_whole
from sj_robust.training.modes import MODES

_NOTHING = "–"
_RELEASES = ("torch", "spikingjelly", "sj_robust")
_RESULTS = ("figure", "mean", "standard_deviation", "seeds", "published", "source")
_CONTRAST = ("first", "second", "figure", "difference", "standard_error", "low", "high", "pairs")
_PUBLISHED = Path(__file__).with_name("published.yaml")
_LABELS_IN_A_LINE = 3


class Statistic:
    """Mean of a share over seeds, and its uncertainty, which is None for a single seed.

    The uncertainty is the standard deviation of the values (``spread``, with n - 1), the standard
    error of the mean (``error``), and its 95 % CI after Student, from ``low`` to ``high``.

    Examples:
        >>> found = Statistic([0.5, 0.7])
        >>> round(found.mean, 3), round(found.spread, 3), round(found.error, 3)
        (0.6, 0.141, 0.1)
    """

    spread: float | None = None
    error: float | None = None
    low: float | None = None
    high: float | None = None

    def __init__(self, values: Sequence[float]) -> None:
        """Summarise at least one value."""
        self.count = len(values)
        self.mean = statistics.fmean(values)
        if self.count > 1:
            self.spread = statistics.stdev(values)
            self.error = self.spread / math.sqrt(self.count)
            half = float(stdtrit(self.count - 1, 0.975)) * self.error
            self.low = self.mean - half
            self.high = self.mean + half


@dataclass(frozen=True)
class Cell:
    """Runs that differ only in their seed.

    Attributes:
        values: Value of each axis that has an effect on these runs.
        records: The runs, by seed.
    """

    values: dict[str, Any]
    records: list[RunRecord]

    @cached_property
    def figures(self) -> dict[str, dict[int, float]]:
        """By column the accuracy, or other measure, of each seed that has one."""
        found: dict[str, dict[int, float]] = {}
        for record in self.records:
            for column, value in (record.accuracies | record.measures).items():
                found.setdefault(column, {})[record.seed] = value
        return found

    def statistic(self, column: str) -> Statistic | None:
        """Mean and spread in a column; None if no run has an accuracy there."""
        values = self.figures.get(column)
        return Statistic(list(values.values())) if values else None


class Results:
    """The records of a sweep, gathered over their seeds in the order of the grid.

    Attributes:
        axes: Names of the options that the grid varies, and ``cell`` where cells have names.
        cells: The runs that are there.
    """

    def __init__(self, runs: Iterable[PlannedRun], axes: Sequence[str]) -> None:
        """Read the records of those runs that have one."""
        self.axes = axes
        self.cells: list[Cell] = []
        for run in runs:
            record = run.record
            cell = next((cell for cell in self.cells if cell.values == run.values), None)
            if cell is None:
                cell = Cell(run.values, [])
                self.cells.append(cell)
            if record is not None:
                cell.records.append(record)
        self.cells = [cell for cell in self.cells if cell.records]

    @property
    def records(self) -> list[RunRecord]:
        """All of them."""
        return [record for cell in self.cells for record in cell.records]

    def columns(self, patterns: Sequence[str] | None = None, *, few: bool = False) -> list[str]:
        """Columns that runs have accuracies in.

        Args:
            patterns: Those wanted, as shell patterns such as ``paper/*``, in this order; None for
                the recipe's own report, the paper's accuracies as the paper takes them (last
                iterate), and of every suite clean, control, worst case and verified.
            few: Without patterns, leave out what says little beside the others: with suites the
                recipe's own report, and their control and worst case beside ``everything``, the
                worst of both.
        """
        names = list(dict.fromkeys(name for record in self.records for name in record.accuracies))
        if patterns is not None:
            chosen = [fnmatch.filter(names, pattern) for pattern in patterns]
            return list(dict.fromkeys(name for some in chosen for name in some))
        usual = [name for name in names if _is_usual(name, names)]
        beside = ("/control", "/worst case")
        main = [name for name in usual if "/" in name and not name.endswith(beside)]
        return main if few and main else usual

    @property
    def everything(self) -> list[str]:
        """Columns of accuracies, then of other measures."""
        measures = (name for record in self.records for name in record.measures)
        return [*self.columns(["*"]), *dict.fromkeys(measures)]


def _is_usual(name: str, names: Sequence[str]) -> bool:
    suite, slash, accuracy = name.partition("/")
    if not slash or accuracy in ("clean", "control", "worst case", "everything", "verified"):
        return True
    has_last = f"{name}/last" in names
    is_special = "@" in accuracy or accuracy.startswith("control/")
    return suite == "paper" and not has_last and not is_special


def write_report(
    folder: Path,
    results: Results,
    console: Console,
    *,
    columns: Sequence[str] | None = None,
    contrast: Sequence[str] = (),
    plot: str = "rho",
) -> tuple[Path, ...]:
    """Write ``results.md``, ``results.csv``, a table for every contrast and the figure, and print
    the tables; the options are those of ``sweep.py``.

    Raises:
        FileNotFoundError: If there are no runs.
        ValueError: If a pattern fits nothing.
    """
    if not results.cells:
        raise FileNotFoundError(
            f"{folder} holds no finished run, so there is nothing to report; run the sweep first"
        )
    few = results.columns(columns, few=True)
    if not few:
        known = ", ".join(results.everything)
        raise ValueError(f"columns {columns} fit none of the figures there are: {known}")
    shown = results.columns(columns)
    parts = [_results_table(results, suite, shown) for suite in dict.fromkeys(map(_suite, shown))]
    files = {"results.csv": results_csv(results)}
    for option in contrast:
        rows = contrasts(results, option)
        others = [name for name in results.axes if name not in names_in(option)]
        parts.append(_contrast_table([row for row in rows if row["figure"] in few], option, others))
        files[f"contrast-{option.replace(',', '-')}.csv"] = csv_text([*others, *_CONTRAST], rows)
    if alarms := alarms_of(results):
        parts.append("\n".join(["**Not to be relied on**\n", *alarms]))
    text = "\n\n".join(parts) + "\n"
    console.print(text, markup=False)
    files = {"results.md": text} | files
    for name, content in files.items():
        write_whole(folder / name, content)
    drawn = plot_effect(results, plot, few, folder / f"effect-{plot}")
    return (*(folder / name for name in files), *drawn)


def results_csv(results: Results) -> str:
    """A line per cell and column."""
    lines = []
    for cell in results.cells:
        for column in results.everything:
            found = cell.statistic(column)
            if found is None:
                continue
            line = cell.values | {
                "figure": column,
                "mean": found.mean,
                "standard_deviation": found.spread,
                "seeds": found.count,
            }
            known = published(cell.records[0].options, column)
            if known is not None:
                line["published"] = round(known[0] / 100, 6)
                line["source"] = known[1]
            lines.append(line)
    return csv_text([*results.axes, *_RESULTS], lines)


def _suite(column: str) -> str:
    """Suite that a column is of; empty for the recipe's own report."""
    return column.partition("/")[0] if "/" in column else ""


def _results_table(results: Results, suite: str, columns: Sequence[str]) -> str:
    """``mean ± standard deviation`` in per cent over the grid, as Markdown, for the recipe's own
    report or a suite; a published accuracy stands behind it where there is one.
    """
    columns = [name for name in columns if _suite(name) == suite]
    rows = []
    sources = set()
    for cell in results.cells:
        found = [cell.statistic(column) for column in columns]
        seeds = max((one.count for one in found if one is not None), default=0)
        if seeds == 0:
            continue
        texts = [*_texts(cell.values, results.axes), str(seeds)]
        for column, one in zip(columns, found, strict=True):
            text = _NOTHING if one is None else f"{100 * one.mean:.1f}"
            if one is not None and one.spread is not None:
                text += f" ± {100 * one.spread:.1f}"
            if one is not None and one.count < seeds:
                text += f" (n = {one.count})"
            known = published(cell.records[0].options, column)
            if known is not None:
                text += f" [{known[0]:.2f}]"
                sources.add(known[1])
            texts.append(text)
        rows.append(texts)
    heads = [*results.axes, "seeds", *(column.removeprefix(f"{suite}/") for column in columns)]
    table = markdown_table(heads, rows, words=len(results.axes))
    note = (
        "mean ± standard deviation over the seeds, accuracy in per cent; n is the number of seeds "
        "where it is smaller"
    )
    if sources:
        note += f"; in brackets the published figure ({', '.join(sorted(sources))})"
    title = f"suite {suite}" if suite else "report of the training recipe"
    return f"**{title}**\n\n{table}\n\n{note}"


@cache
def papers() -> list[dict[str, Any]]:
    """What ``published.yaml`` holds."""
    found: list[dict[str, Any]] = yaml.safe_load(_PUBLISHED.read_text(encoding="utf-8"))
    return found


def published(options: Mapping[str, Any], column: str) -> tuple[float, str] | None:
    """The published accuracy for a run's setting in per cent, whatever its length of training, and
    its source; None if none is known.

    Examples:
        >>> setting = {"dataset": "cifar10", "model": "vgg11", "neuron": "dlif", "mode": "at"}
        >>> published(setting | {"rho": 0.0}, "paper/apgd_ce")
        (23.05, 'Ding et al. (ICML 2024)')
    """
    mode = MODES.get(options.get("mode", ""))
    if mode is not None and options.get("rho") is None:
        options = {**options, "rho": mode.rho}
    for paper in papers():
        for setting in paper["settings"]:
            known = {"dataset": "cifar10"} | setting["options"]
            if column in setting["percent"] and known.items() <= options.items():
                return setting["percent"][column], paper["source"]
    return None


def contrasts(results: Results, option: str) -> list[dict[str, Any]]:
    """What one option changes, the others and the seed being the same: each value minus the first
    one, a row of ``contrast-*.csv`` for every column.

    The option is an axis, or several with commas between, such as ``"norm,rho"``. An option without
    effect in one of the two cells, such as rho with mode none, need not be the same.
    """
    names = names_in(option)
    levels: dict[str, list[Cell]] = {}
    for cell in results.cells:
        if cell.values.keys() >= set(names):
            level = " ".join(value_text(cell.values[name]) for name in names)
            levels.setdefault(level, []).append(cell)
    rows = []
    for second, cells in list(levels.items())[1:]:
        first = next(iter(levels))
        for before in levels[first]:
            for after in cells:
                shared = before.values.keys() & after.values.keys() - set(names)
                if all(before.values[name] == after.values[name] for name in shared):
                    both = before.values | after.values
                    others = {name: both[name] for name in both if name not in names}
                    rows += [
                        others | {"first": first, "second": second} | row
                        for row in _differences(before, after, results.everything)
                    ]
    return rows


def _differences(before: Cell, after: Cell, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Figures of the second cell minus those of the first, over pairs of runs with the same
    seed.
    """
    rows = []
    for column in columns:
        minuends, subtrahends = (cell.figures.get(column, {}) for cell in (after, before))
        pairs = [minuends[seed] - subtrahends[seed] for seed in subtrahends if seed in minuends]
        if pairs:
            found = Statistic(pairs)
            row = {
                "figure": column,
                "difference": found.mean,
                "standard_error": found.error,
                "low": found.low,
                "high": found.high,
                "pairs": found.count,
            }
            rows.append(row)
    return rows


def _contrast_table(rows: Sequence[Mapping[str, Any]], option: str, others: Sequence[str]) -> str:
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
        figures = [row["figure"], difference, error, interval, str(row["pairs"])]
        texts.append([*_texts(row, others), level, *figures])
    heads = [*others, option, "figure", "difference", "standard error", "95 % CI", "pairs"]
    table = markdown_table(heads, texts, words=len(others) + 2)
    note = (
        "difference in accuracy in percentage points between runs of the same seed; * the "
        "interval (Student's t) excludes 0, as one row in twenty does by chance"
    )
    return f"**what {option} changes**\n\n{table}\n\n{note}"


def alarms_of(results: Results) -> list[str]:
    """Every alarm of an evaluation once, with the runs that it is about; and cells whose runs were
    trained with different code of one's own, or other releases. Other commits of this package are
    no reason.
    """
    alarms: dict[str, list[str]] = {}
    mixed = []
    for cell in results.cells:
        for record in cell.records:
            for suite, result in record.evaluations.items():
                if result["alarm"]:
                    alarms.setdefault(f"suite {suite}: {result['alarm']}", []).append(record.name)
        names = ", ".join(record.name for record in cell.records)
        trained: dict[str, list[str]] = {}
        for record in cell.records:
            for name, value in record.trained_in.items():
                trained.setdefault(name, []).append(value)
        for name, values in trained.items():
            versions = list(dict.fromkeys(values))
            if len(versions) > 1 and name.startswith(CODE_KEY):
                mixed.append(
                    f"- {names}: the code of the network changed between these runs of a cell"
                )
            if len(versions) > 1 and name in _RELEASES:
                versions_text = " and ".join(versions)
                mixed.append(f"- {names}: trained with {name} {versions_text}, in one cell")
    return [f"- {', '.join(runs)}, {alarm}" for alarm, runs in alarms.items()] + mixed


def _texts(values: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    return [value_text(values[name]) if name in values else _NOTHING for name in names]


def plot_effect(
    results: Results, option: str, columns: Sequence[str], path: Path
) -> tuple[Path, ...]:
    """Accuracy over an option of numbers, a line for every combination of the others, with a row of
    panels for every column of the tables and a panel in it for every training mode.

    Values stand side by side in equal steps, since those of a weight such as rho crowd on any scale
    that has room for 0. Bars are one standard deviation over the seeds to either side. A
    combination in which the option changes nothing is level, and in all panels of a row; a value at
    which another option changes nothing (``norm`` at rho 0) belongs to the lines of all values of
    the latter. Width and type are those of two columns in print, as in Figure 3 of Ding et al.
    (ICML 2024). Returns PNG and PDF; nothing is drawn if the option is no axis or has not two
    numbers as values.
    """
    from matplotlib.figure import Figure

    moving = [cell for cell in results.cells if option in cell.values]
    values = list(dict.fromkeys(value_text(cell.values[option]) for cell in moving))
    is_number = all(type(cell.values[option]) in (int, float) for cell in moving)
    if not columns or len(values) < 2 or not is_number:
        return ()
    values.sort(key=float)
    lines = _lines(results.cells, option)
    modes = list(dict.fromkeys(mode for mode, _ in lines if mode is not None))
    labels = list(dict.fromkeys(label for _, label in lines))
    height = 0.6 + 1.4 * len(columns) + 0.16 * len(labels) / _LABELS_IN_A_LINE
    with print_style():
        figure = Figure(figsize=(DOUBLE, height), layout="constrained")
        panels = figure.subplots(len(columns), len(modes), squeeze=False, sharey="row")
        for column, row in zip(columns, panels, strict=True):
            row[0].set_ylabel(column.replace("/", "\n") + ", %")
            for mode, panel in zip(modes, row, strict=True):
                own = {key: cells for key, cells in lines.items() if key[0] in (mode, None)}
                for number, ((_, label), cells) in enumerate(own.items()):
                    points = _points(cells, column, option, values)
                    panel.errorbar(
                        [place + 0.04 * number for place in points],  # bars apart
                        [100 * found.mean for found in points.values()],
                        yerr=[100 * (found.spread or 0.0) for found in points.values()],
                        label=label,
                        color=COLOURS[labels.index(label) % len(COLOURS)],
                        marker=MARKERS[labels.index(label) % len(MARKERS)],
                    )
                panel.set_xticks(range(len(values)), values)
        for mode, panel in zip(modes, panels[0], strict=True):
            panel.set_title(mode, loc="left")
        for panel in panels[-1]:
            panel.set_xlabel(option)
        legend(figure, panels.flat, loc="outside lower center", ncols=_LABELS_IN_A_LINE)
        pdf, png = save(figure, path.parent, path.name)
    return png, pdf


def _points(
    cells: Iterable[Cell], column: str, option: str, values: Sequence[str]
) -> dict[int, Statistic]:
    """Statistics by their place on the axis of values; a cell without the option is level."""
    points: dict[int, Statistic] = {}
    for cell in cells:
        found = cell.statistic(column)
        if found is None:
            continue
        places: Iterable[int] = range(len(values))
        if option in cell.values:
            places = [values.index(value_text(cell.values[option]))]
        for place in places:
            points[place] = found
    return dict(sorted(points.items()))


def _lines(cells: Sequence[Cell], option: str) -> dict[tuple[str | None, str], list[Cell]]:
    """By mode and label a line for every combination of the other options that no other one
    contains, with the cells that fit it; and, without a mode, one for every cell in which the
    option changes nothing.
    """
    lines: dict[tuple[str | None, str], list[Cell]] = {}
    others = [_without(option, cell.values) for cell in cells]
    for cell, setting in zip(cells, others, strict=True):
        if option not in cell.values:
            lines[None, _label(setting)] = [cell]
        elif not any(setting.items() < other.items() for other in others):
            key = str(setting.get("mode", "")), _label(_without("mode", setting))
            fitting = zip(cells, others, strict=True)
            own = [one for one, other in fitting if other.items() <= setting.items()]
            lines[key] = [one for one in own if option in one.values]
    return lines


def _without(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {other: value for other, value in values.items() if other != name}


def _label(values: Mapping[str, Any]) -> str:
    """Values in the legend: a word for itself, anything else behind the name of its option."""
    parts = []
    for name, value in values.items():
        parts.append(value if isinstance(value, str) else f"{name} {value_text(value)}")
    return ", ".join(parts)
