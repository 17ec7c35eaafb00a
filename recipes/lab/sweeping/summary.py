"""Statistics over the runs of a sweep: mean and spread over seeds, and differences between runs of
one seed.
"""

import fnmatch
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.special import stdtrit

from lab.sweeping.grid import names_in, value_text, values_in
from lab.sweeping.record import RunRecord

Axes = Mapping[str, Sequence[Any]]
"""Values by option, from ``axes_in``."""


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

    def by_seed(self, column: str) -> dict[int, float]:
        """Accuracy, or other measure, of each run that has one in a column."""
        found = {}
        for record in self.records:
            figures = record.accuracies | record.measures
            if column in figures:
                found[record.seed] = figures[column]
        return found

    def statistic(self, column: str) -> Statistic | None:
        """Mean and spread in a column; None if no run has an accuracy there."""
        values = self.by_seed(column).values()
        return Statistic(list(values)) if values else None


def axes_in(records: Iterable[RunRecord], grid: Axes | None = None) -> dict[str, list[Any]]:
    """Options of the grid, and others in which runs differ, with their values: those of the grid
    first, in its order.

    The records hold the options that have an effect, as ``load_records`` gives them.

    Examples:
        >>> runs = [RunRecord("a", {"mode": "at", "rho": rho, "seed": 0}) for rho in (0.0, 1.0)]
        >>> axes_in(runs), axes_in(runs, {"rho": [1, 0]})
        ({'rho': [0.0, 1.0]}, {'rho': [1.0, 0.0]})
    """
    grid = grid or {}
    found = values_in(record.options for record in records)
    axes = {}
    for name in dict.fromkeys([*grid, *found]):
        values = found.get(name, [])
        order = grid.get(name, [])
        fewest = 1 if name in grid else 2
        if name != "seed" and len(values) >= fewest:
            axes[name] = sorted(values, key=lambda value: _rank(value, order))
    return axes


def _rank(value: Any, order: Sequence[Any]) -> tuple[int, float, str]:
    """Values of the grid in its order, then numbers by size, then words."""
    if value in order:
        return order.index(value), 0.0, ""
    is_number = type(value) in (int, float)
    return len(order), value if is_number else math.inf, json.dumps(value)


def cells_of(records: Iterable[RunRecord], axes: Axes) -> list[Cell]:
    """Runs gathered over their seeds, in the order of the axes.

    Examples:
        >>> runs = [
        ...     RunRecord(f"seed{seed}", {"mode": "at", "rho": 1.0, "seed": seed})
        ...     for seed in (1, 0)
        ... ]
        >>> [
        ...     (cell.values, [run.name for run in cell.records])
        ...     for cell in cells_of(runs, {"rho": [1.0]})
        ... ]
        [({'rho': 1.0}, ['seed0', 'seed1'])]
    """
    cells: dict[tuple[int, ...], Cell] = {}
    for record in sorted(records, key=lambda record: record.seed):
        values = {name: record.options[name] for name in axes if name in record.options}
        place = _place(values, axes)
        cell = cells.setdefault(place, Cell(values, []))
        cell.records.append(record)
    return [cells[place] for place in sorted(cells)]


def columns_of(
    records: Iterable[RunRecord],
    patterns: Sequence[str] | None = None,
    *,
    few: bool = False,
) -> list[str]:
    """Columns that runs have accuracies in.

    Args:
        records: The runs.
        patterns: Those wanted, as shell patterns such as ``paper/*``, in this order; None for the
            recipe's own report, the paper's accuracies as the paper takes them (last iterate), and
            of every suite clean, control, worst case and verified.
        few: Without patterns, leave out what says little beside the others: with suites the
            recipe's own report, and their control and worst case beside ``everything``, the worst
            of both.

    Examples:
        >>> counts = {"correct": 9, "total": 10}
        >>> columns_of([RunRecord("a", {"seed": 0}, {"clean": counts, "pgd20": counts})], ["pgd*"])
        ['pgd20']
    """
    names = list(values_in(record.accuracies for record in records))
    if patterns is None:
        usual = [name for name in names if _is_usual(name, names)]
        beside = ("/control", "/worst case")
        main = [name for name in usual if "/" in name and not name.endswith(beside)]
        return main if few and main else usual
    chosen: list[str] = []
    for pattern in patterns:
        chosen += fnmatch.filter(names, pattern)
    return list(dict.fromkeys(chosen))


def _is_usual(name: str, names: Sequence[str]) -> bool:
    suite, slash, accuracy = name.partition("/")
    if not slash or accuracy in ("clean", "control", "worst case", "everything", "verified"):
        return True
    has_last = f"{name}/last" in names
    is_special = "@" in accuracy or accuracy.startswith("control/")
    return suite == "paper" and not has_last and not is_special


def contrasts(
    cells: Sequence[Cell],
    axes: Axes,
    option: str,
    columns: Sequence[str],
) -> list[dict[str, Any]]:
    """What one option changes, the others and the seed being the same: each value minus the first
    one, a row of ``contrast-*.csv`` for every column.

    The option is an axis, or several with commas between, such as ``"norm,rho"``. An option without
    effect in one of the two cells, such as rho with mode none, need not be the same.

    Raises:
        ValueError: If the option is no axis.
    """
    names = names_in(option)
    for name in names:
        if name not in axes:
            raise ValueError(
                f"a contrast needs an option in which runs differ ({', '.join(axes)}), got {name!r}"
            )
    own = {name: axes[name] for name in names}
    levels: dict[tuple[int, ...], list[Cell]] = {}
    for cell in cells:
        if cell.values.keys() >= own.keys():
            place = _place(cell.values, own)
            levels.setdefault(place, []).append(cell)
    order = sorted(levels)
    rows = []
    for level in order[1:]:
        for first in levels[order[0]]:
            for second in levels[level]:
                rows += _differences(first, second, names, columns)
    return rows


def _differences(
    first: Cell,
    second: Cell,
    names: Sequence[str],
    columns: Sequence[str],
) -> list[dict[str, Any]]:
    """Accuracy of the second cell minus that of the first, over pairs of runs with the same seed;
    no row if an option other than ``names`` has another value in the two cells.
    """
    before = {name: first.values[name] for name in names}
    after = {name: second.values[name] for name in names}
    shared = first.values.keys() & second.values.keys()
    if any(first.values[name] != second.values[name] for name in shared.difference(names)):
        return []
    both = first.values | second.values
    rows = []
    for column in columns:
        subtrahends = first.by_seed(column)
        minuends = second.by_seed(column)
        seeds = [seed for seed in subtrahends if seed in minuends]
        if seeds:
            found = Statistic([minuends[seed] - subtrahends[seed] for seed in seeds])
            row = {name: value for name, value in both.items() if name not in names}
            row |= {
                "first": " ".join(map(value_text, before.values())),
                "second": " ".join(map(value_text, after.values())),
                "figure": column,
                "difference": found.mean,
                "standard_error": found.error,
                "low": found.low,
                "high": found.high,
                "pairs": found.count,
            }
            rows.append(row)
    return rows


def _place(values: Mapping[str, Any], axes: Axes) -> tuple[int, ...]:
    """Position on every axis, -1 where the option changes nothing."""
    place = []
    for name, known in axes.items():
        place.append(known.index(values[name]) if name in values else -1)
    return tuple(place)
