"""Cells of a sweep that have names: each starts from a preset, and chooses the value of one option
on validation images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lab.command_line import read_file
from lab.sweeping.grid import by_name, expand, value_text, values_in
from lab.sweeping.plan import PlannedRun
from sj_robust.core.saved import csv_text

_KEYS = ("config", "options", "search")


@dataclass(frozen=True)
class NamedCell:
    """A cell of a sweep.

    Attributes:
        name: Its name, which begins the names of its runs.
        preset: Options of adv_train.py in its preset.
        options: Those that it sets itself, which override those of the whole sweep.
        values: Combinations among which it chooses; a single empty one without a search.
    """

    name: str
    preset: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    values: tuple[dict[str, Any], ...] = ({},)

    @property
    def searches(self) -> bool:
        """Whether it has a choice."""
        return len(self.values) > 1

    @property
    def searched(self) -> list[str]:
        """Names of the options of which it chooses values."""
        return list(values_in(self.values))


@dataclass(frozen=True)
class Trial:
    """What one value of a searched option came to.

    Attributes:
        cell: Name of the cell.
        value: The option with its value, as text.
        validation: Accuracy on the validation images under the attack that selects the epoch.
        clean: Accuracy on the clean ones.
        chosen: Whether it is the best of its cell.
    """

    cell: str
    value: str
    validation: float
    clean: float
    chosen: bool


def read_cells(given: Mapping[str, Any]) -> list[NamedCell]:
    """Cells from their plain form: by name a mapping of ``config`` (a file, or a preset's name),
    ``options`` and ``search``, which are all optional.

    Raises:
        ValueError: If a cell has another key or no mapping where one is needed, or searches among
            fewer than two values.

    Examples:
        >>> (cell,) = read_cells({"at": {"options": {"mode": "at"}, "search": {"lr": [0.1, 0.2]}}})
        >>> cell.options, cell.values
        ({'mode': 'at'}, ({'lr': 0.1}, {'lr': 0.2}))
    """
    cells = []
    for name, content in given.items():
        if not isinstance(name, str):
            raise ValueError(f"the name of a cell must be text, got {name!r}; put it in quotes")
        parts = by_name(content, f"cell {name}", "{options: {mode: at}}")
        unknown = [key for key in parts if key not in _KEYS]
        if unknown:
            raise ValueError(
                f"a cell has {', '.join(_KEYS)}, got {unknown[0]!r} in {name}; options of "
                "adv_train.py belong in its options"
            )
        search = by_name(parts.get("search"), f"search of cell {name}", "{lr: [0.1, 0.2]}")
        values = tuple(expand(search))
        if "search" in parts and len(values) < 2:
            raise ValueError(
                f"a search needs two values or more, got {parts['search']} in {name}; put a "
                "single one in its options"
            )
        config = parts.get("config")
        own = by_name(parts.get("options"), f"options of cell {name}", "{mode: at}")
        cells.append(
            NamedCell(
                name,
                preset={} if config is None else read_file(Path(str(config))),
                options=own,
                values=values,
            )
        )
    return cells


def check_search(cell: NamedCell, runs: Sequence[PlannedRun]) -> None:
    """Raise ValueError unless each value of a cell is a run of its own, of those planned."""
    if len(runs) < len(cell.values):
        texts = "; ".join(map(_text, cell.values))
        raise ValueError(
            f"a search needs values that make different runs, two of cell {cell.name} make the "
            f"same one ({texts}); remove equal values, null beside the value that it stands for, "
            "and options without effect"
        )


def compared(cell: NamedCell, runs: Sequence[PlannedRun]) -> list[Trial]:
    """The values of a cell by their accuracies on validation images, the best one chosen; empty
    while a training is missing.

    The first criterion is the accuracy that selects the epoch, the second that of clean images; of
    equal ones the first value is taken. ``runs`` stand in the order of ``cell.values``.
    """
    records = [run.record for run in runs]
    found = []
    for record in records:
        if record is None:
            continue
        if not record.validation:
            raise ValueError(
                f"run {record.name} of an earlier version has no validation accuracies to compare; "
                "use another --output"
            )
        selecting = next(iter(record.validation.values()))
        found.append((selecting, record.validation["clean"]))
    if len(found) < len(cell.values):
        return []
    best = found.index(max(found))
    trials = []
    for index, (values, (validation, clean)) in enumerate(zip(cell.values, found, strict=True)):
        trials.append(Trial(cell.name, _text(values), validation, clean, index == best))
    return trials


def trials_csv(trials: Sequence[Trial]) -> str:
    """A line per value that was tried."""
    return csv_text(list(Trial.__dataclass_fields__), map(asdict, trials))


def _text(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value_text(value)}" for name, value in values.items())
