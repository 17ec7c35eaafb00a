"""What the runs of a sweep say together: mean and spread over seeds, and differences between runs
of one seed.
"""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from scipy.special import stdtrit

from lab.sweeping.grid import same_value
from lab.sweeping.record import RunRecord


@dataclass
class Statistic:
    """Mean of a share over seeds, and what needs more than one of them, otherwise None.

    Those are the standard deviation of one value (``spread``, with n - 1), the standard error of
    the mean and its 95 % interval after Student.

    Examples:
        >>> found = Statistic((0.5, 0.7))
        >>> round(found.mean, 3), round(found.spread, 3), round(found.error, 3)
        (0.6, 0.141, 0.1)
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        self.count, self.mean = len(self.values), statistics.fmean(self.values)
        self.spread: float | None = None
        self.error: float | None = None
        self.interval: tuple[float, float] | None = None
        if self.count > 1:
            self.spread = statistics.stdev(self.values)
            self.error = self.spread / math.sqrt(self.count)
            half = float(stdtrit(self.count - 1, 0.975)) * self.error
            self.interval = self.mean - half, self.mean + half


@dataclass(frozen=True)
class Cell:
    """Runs that differ in their seed alone, by seed, and the value of each axis that changes
    something here.
    """

    values: dict[str, Any]
    records: tuple[RunRecord, ...]

    @property
    def options(self) -> dict[str, Any]:
        """Options that all runs share, and the seed of the first."""
        return self.records[0].options

    def by_seed(self, column: str) -> dict[int, float]:
        """Accuracy of each run that has one in a column."""
        return {
            record.seed: record.accuracies[column]
            for record in self.records
            if column in record.accuracies
        }

    def statistic(self, column: str) -> Statistic | None:
        """Mean and spread in a column; None if no run has an accuracy there."""
        values = tuple(self.by_seed(column).values())
        return Statistic(values) if values else None


@dataclass(frozen=True)
class Contrast:
    """Difference between two values of an option, over pairs of runs with the same seed.

    Attributes:
        values: Values of the other axes, without those that change nothing in both cells.
        first: Values that are subtracted.
        second: Values that they are subtracted from.
        column: Name of the accuracy.
        difference: Second minus first, by pair.
    """

    values: dict[str, Any]
    first: dict[str, Any]
    second: dict[str, Any]
    column: str
    difference: Statistic

    @property
    def clear(self) -> bool:
        """Whether the 95 % interval leaves out 0."""
        interval = self.difference.interval
        return interval is not None and (interval[0] > 0 or interval[1] < 0)


def axes_in(
    records: Sequence[RunRecord], grid: Mapping[str, Sequence[Any]] | None = None
) -> dict[str, list[Any]]:
    """Options in which runs differ, with their values: those of the grid first, in its order.

    The records hold the options that have an effect, as ``load_records`` gives them. Options of the
    grid with a single value are left out where there are others.

    Examples:
        >>> runs = [RunRecord("a", {"mode": "at", "rho": rho, "seed": 0}) for rho in (1.0, 0.0)]
        >>> axes_in(runs), axes_in(runs, {"rho": [1, 0]})
        ({'rho': [0.0, 1.0]}, {'rho': [1.0, 0.0]})
    """
    found: dict[str, list[Any]] = {}
    for record in records:
        for name, value in record.options.items():
            values = found.setdefault(name, []) if name != "seed" else []
            if not any(same_value(value, other) for other in values):
                values.append(value)
    order = dict(grid or {})
    names = [
        name
        for name in (*order, *(name for name in found if name not in order))
        if len(found.get(name, ())) > 1
    ]
    names = names or [name for name in order if name in found][:1]
    return {
        name: sorted(found[name], key=lambda value: _sort_key(value, order.get(name, ())))
        for name in names
    }


def cells_of(records: Sequence[RunRecord], axes: Mapping[str, Sequence[Any]]) -> list[Cell]:
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
    gathered: dict[tuple[int, ...], list[RunRecord]] = {}
    for record in records:
        options = record.options
        indices = tuple(
            _index(options[name], axes[name]) if name in options else -1 for name in axes
        )
        gathered.setdefault(indices, []).append(record)
    cells = []
    for indices, members in sorted(gathered.items()):
        values = {
            name: axes[name][index] for name, index in zip(axes, indices, strict=True) if index >= 0
        }
        cells.append(Cell(values, tuple(sorted(members, key=lambda record: record.seed))))
    return cells


def columns_of(
    records: Iterable[RunRecord], patterns: Sequence[str] | None = None, *, few: bool = False
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
    names = list(dict.fromkeys(name for record in records for name in record.accuracies))
    if patterns is None:
        usual = [name for name in names if _is_usual(name, names)]
        main = [
            name for name in usual if "/" in name and not name.endswith(("/control", "/worst case"))
        ]
        return main if few and main else usual
    return list(
        dict.fromkeys(name for pattern in patterns for name in names if fnmatchcase(name, pattern))
    )


def contrasts(
    cells: Sequence[Cell], axes: Mapping[str, Sequence[Any]], option: str, columns: Sequence[str]
) -> list[Contrast]:
    """What one option changes, the others and the seed being the same: each value minus the first
    one.

    The option is an axis, or several with commas between, such as ``"norm,rho"``. An option without
    effect in one of the two cells, such as rho with mode none, need not be the same.

    Raises:
        ValueError: If the option is no axis.
    """
    names = [name.strip() for name in option.split(",")]
    for name in names:
        if name not in axes:
            raise ValueError(
                f"a contrast needs an option in which runs differ ({', '.join(axes)}), got {name!r}"
            )
    with_effect = [cell.values for cell in cells if cell.values.keys() >= set(names)]
    places = {tuple(_index(values[name], axes[name]) for name in names) for values in with_effect}
    levels = [
        {name: axes[name][index] for name, index in zip(names, place, strict=True)}
        for place in sorted(places)
    ]
    rows = []
    for level in levels[1:]:
        firsts = [cell for cell in cells if is_within(levels[0], cell.values)]
        seconds = [cell for cell in cells if is_within(level, cell.values)]
        for first, second in (
            (one, other) for one in firsts for other in seconds if _alike(one, other, names)
        ):
            shared = {
                name: value
                for name, value in (first.values | second.values).items()
                if name not in names
            }
            for column in columns:
                minuends, subtrahends = second.by_seed(column), first.by_seed(column)
                found = tuple(
                    minuends[seed] - subtrahends[seed] for seed in subtrahends if seed in minuends
                )
                if found:
                    rows.append(Contrast(shared, levels[0], level, column, Statistic(found)))
    return rows


def is_within(part: Mapping[str, Any], whole: Mapping[str, Any]) -> bool:
    """Whether all values of the one are values of the other."""
    return all(name in whole and same_value(value, whole[name]) for name, value in part.items())


def _alike(one: Cell, other: Cell, apart: Sequence[str]) -> bool:
    shared = (one.values.keys() & other.values.keys()) - set(apart)
    return all(same_value(one.values[name], other.values[name]) for name in shared)


def _index(value: Any, values: Sequence[Any]) -> int:
    return next(index for index, other in enumerate(values) if same_value(value, other))


def _sort_key(value: Any, order: Sequence[Any]) -> tuple[int, int, float, str]:
    """Values of the grid in its order, then numbers by size, then words."""
    for index, other in enumerate(order):
        if same_value(value, other):
            return index, 0, 0.0, ""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return len(order), 0 if is_number else 1, float(value) if is_number else 0.0, json.dumps(value)


def _is_usual(name: str, names: Sequence[str]) -> bool:
    suite, slash, accuracy = name.partition("/")
    if not slash or accuracy in ("clean", "control", "worst case", "everything", "verified"):
        return True
    taken_last = f"{name}/last" not in names
    return (
        suite == "paper"
        and taken_last
        and "@" not in accuracy
        and not accuracy.startswith("control/")
    )
