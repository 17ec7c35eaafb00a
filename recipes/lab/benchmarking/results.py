"""Rows of a benchmark in a CSV file, from which tables and charts are made; a run that was stopped
measures only what is not in it.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sj_robust.core.saved import csv_text, write_whole

TESTS = "gpu_tests"
"""Subject of the rows that are tests."""


@dataclass(frozen=True)
class Row:
    """One method at one shape, or a group of tests. Times in milliseconds, memory in megabytes.

    Attributes:
        subject: Name of the benchmark, or :data:`TESTS`.
        allocator: Name in :data:`lab.benchmarking.race.ALLOCATORS`.
        shape: Shape of the input, as text.
        method: Name of the method, or of the tests.
        median: Time of forward plus backward.
        quartile1: First quartile of the same.
        quartile3: Third quartile of the same.
        best: Shortest of the same.
        forward: Median of the forward pass alone.
        backward: Median of the backward pass alone.
        saved_mb: What the graph keeps beyond inputs and parameters; NaN if there are several
            graphs.
        peak_mb: Largest growth of the memory; NaN if the heap is reused, which hides it.
        tensor_mb: Size of the input of a layer, or of the frames of a network.
        copy: Time of the fastest copy of that tensor in the same race; NaN for networks.
        reason: Why there is no figure, or the message of a failed test.
        outcome: Result of a group of tests.
    """

    subject: str
    allocator: str
    shape: str
    method: str
    median: float = math.nan
    quartile1: float = math.nan
    quartile3: float = math.nan
    best: float = math.nan
    forward: float = math.nan
    backward: float = math.nan
    saved_mb: float = math.nan
    peak_mb: float = math.nan
    tensor_mb: float = math.nan
    copy: float = math.nan
    reason: str = ""
    outcome: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What was measured: a file holds one row of each key."""
        return self.subject, self.allocator, self.shape, self.method


_KINDS = {field.name: field.type for field in fields(Row)}
"""Type of every column."""


class Results:
    """Rows, and the machine, code and versions they were measured with; kept in a file if there is
    a path.

    Rows of an earlier call stay in the file if they were measured with the same; otherwise they are
    moved to a file beside it, since one table cannot hold both.
    """

    def __init__(self, path: Path | None, where: Mapping[str, str]) -> None:
        """Read the rows in the file, if there is one."""
        self.path = path
        self.where = dict(where)
        self._known: dict[tuple[str, ...], Row] = {}
        if path is None or not path.is_file():
            return
        before, rows = load(path)
        # The commit is not compared: it changes when tables are committed. The code has a digest.
        if before | {"commit": ""} == self.where | {"commit": ""}:
            self._known = {row.key: row for row in rows}
            return
        with path.with_suffix(".earlier.csv").open("a", encoding="utf-8") as earlier:
            earlier.write(path.read_text(encoding="utf-8"))

    def has(self, row: Row) -> bool:
        """Whether a row of the same key is known that is not a failure."""
        known = self._known.get(row.key)
        return known is not None and not known.reason

    @property
    def rows(self) -> list[Row]:
        """All rows, in the order in which they were added."""
        return list(self._known.values())

    def add(self, rows: Sequence[Row]) -> None:
        """Add rows, which replace earlier ones with the same key, and write the file."""
        for row in rows:
            self._known[row.key] = row
        if self.path is None:
            return
        lines = [asdict(row) | self.where for row in self.rows]
        write_whole(self.path, csv_text([*_KINDS, *self.where], lines))


def load(path: Path) -> tuple[dict[str, str], list[Row]]:
    """What the rows of a file were measured with, and the rows.

    Raises:
        ValueError: If the file holds something else.
    """
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    head = lines[0] if lines else {}
    if not {"subject", "method", "median"} <= head.keys():
        raise ValueError(f"{path} holds no measurements of this recipe; move it elsewhere")
    where = {name: head[name] for name in head if name not in _KINDS}
    return where, [_row(line) for line in lines]


def _row(line: Mapping[str, str]) -> Row:
    """A row from a line; columns that an earlier release did not write have their defaults."""
    values: dict[str, Any] = {}
    for name, text in line.items():
        if name in _KINDS:
            values[name] = text if _KINDS[name] is str else float(text)
    return Row(**values)
