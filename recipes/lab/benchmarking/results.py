"""Rows of a benchmark in a CSV file: tables and charts are made of them, and a run that was stopped
goes on there.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sj_robust.core.saved import write_whole

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
        median: Of forward plus backward, as quartiles and best are.
        forward: Median of the forward pass alone, as that of the backward pass.
        saved_mb: What the graph keeps beyond inputs and parameters; NaN where there are several.
        peak_mb: Growth of the memory at its highest; NaN where the heap is reused, which hides it.
        tensor_mb: The input of a layer, the frames of a network.
        copy: Milliseconds of the fastest copy of that tensor in the same race; NaN for networks.
        reason: Why there is no figure; what a test says that failed.
        outcome: What tests gave.
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
        """What the row is of."""
        return self.subject, self.allocator, self.shape, self.method


_KINDS = {field.name: field.type for field in fields(Row)}


class Results:
    """Rows and where they were measured; in a file, if there is a path.

    What an earlier call left in the file stays if it was measured there as well, with the same code
    and versions; otherwise it is set aside, since one table cannot hold both.
    """

    def __init__(self, path: Path | None, where: Mapping[str, str]) -> None:
        """Read what is there."""
        self.path, self.where = path, dict(where)
        self._known: dict[tuple[str, ...], Row] = {}
        if path is None or not path.is_file():
            return
        before, rows = load(path)
        # tables are written into the repository, which changes its commit; the code has a digest
        if before | {"commit": ""} == self.where | {"commit": ""}:
            self._known = {row.key: row for row in rows}
            return
        with path.with_suffix(".earlier.csv").open("a", encoding="utf-8") as earlier:
            earlier.write(path.read_text(encoding="utf-8"))

    def has(self, row: Row) -> bool:
        """Whether this is known already, and is no failure."""
        known = self._known.get(row.key)
        return known is not None and not known.reason

    @property
    def rows(self) -> list[Row]:
        """All rows, the first known first."""
        return list(self._known.values())

    def add(self, rows: Sequence[Row]) -> None:
        """Keep rows, on disk as well; what failed before is replaced."""
        for row in rows:
            self._known[row.key] = row
        if self.path is None:
            return
        text = io.StringIO()
        columns = [*_KINDS, *self.where]
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            writer.writerow(asdict(row) | self.where)
        write_whole(self.path, text.getvalue())


def load(path: Path) -> tuple[dict[str, str], list[Row]]:
    """Where the rows of a file were measured, and the rows.

    Raises:
        ValueError: If it is a file of something else.
    """
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    head = lines[0] if lines else {}
    if not {"subject", "method", "median"} <= head.keys():
        raise ValueError(f"{path} holds no measurements of this recipe; move it elsewhere")
    where = {name: head[name] for name in head if name not in _KINDS}
    return where, [_row(line) for line in lines]


def _row(line: Mapping[str, str]) -> Row:
    """A row, also of an earlier release, which had no reasons."""
    values: dict[str, Any] = {}
    for name, text in line.items():
        if name in _KINDS:
            values[name] = text if _KINDS[name] is str else float(text)
    return Row(**values)
