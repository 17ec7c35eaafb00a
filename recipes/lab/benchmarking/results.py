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

from sj_robust._saved import write_whole

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

    def same_as(self, other: "Row") -> bool:
        """Whether both are of one method at one shape."""
        mine = (self.subject, self.allocator, self.shape, self.method)
        return mine == (other.subject, other.allocator, other.shape, other.method)


_KINDS = {field.name: field.type for field in fields(Row)}


class Results:
    """Rows and where they were measured; in a file, if there is a path.

    What an earlier call left in the file stays if it was measured there as well, with the same code
    and versions; otherwise it is set aside, since one table cannot hold both.
    """

    def __init__(self, path: Path | None, where: Mapping[str, str]) -> None:
        """Read what is there."""
        self.path, self.where = path, dict(where)
        self.rows: list[Row] = []
        if path is None or not path.is_file():
            return
        before, rows = load(path)
        if _without_commit(before) == _without_commit(self.where):
            self.rows = rows
            return
        with path.with_suffix(".earlier.csv").open("a", encoding="utf-8") as earlier:
            earlier.write(path.read_text(encoding="utf-8"))

    def has(self, row: Row) -> bool:
        """Whether this is known already, and is no failure."""
        return any(row.same_as(kept) and not kept.reason for kept in self.rows)

    def add(self, rows: Sequence[Row]) -> None:
        """Keep rows, on disk as well; what failed before is replaced."""
        for row in rows:
            self.rows = [kept for kept in self.rows if not row.same_as(kept)] + [row]
        if self.path is None:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, [*_KINDS, *self.where], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) | self.where for row in self.rows)
        write_whole(self.path, text.getvalue())


def load(path: Path) -> tuple[dict[str, str], list[Row]]:
    """Where the rows of a file were measured, and the rows.

    Raises:
        ValueError: If it is a file of something else.
    """
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    try:
        rows = [_row(line) for line in lines]
        where = {name: text for name, text in lines[0].items() if name not in _KINDS}
    except (IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no measurements of this recipe; move it elsewhere"
        ) from error
    return where, rows


def _row(line: Mapping[str, str]) -> Row:
    """A row, also of an earlier release, which had no reasons."""
    values: dict[str, Any] = {}
    for name in line.keys() & _KINDS.keys():
        values[name] = line[name] if _KINDS[name] is str else float(line[name])
    return Row(**values)


def _without_commit(where: Mapping[str, str]) -> dict[str, str]:
    """Tables are written into the repository, which changes its commit; the code has a digest."""
    return {name: value for name, value in where.items() if name != "commit"}
