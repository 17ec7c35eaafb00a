"""Rows of a table as dataclasses, in a CSV file from which a stopped measurement goes on."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, fields
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar, Protocol, TypeVar

from sj_robust.core.saved import csv_text, markdown_table, write_whole

__all__ = ["read_rows", "seeds_table", "write_rows"]


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


_Row = TypeVar("_Row", bound=_Dataclass)


def read_rows(path: Path, kind: type[_Row]) -> list[_Row]:
    """Rows of earlier runs, whose fields are text or numbers; none if there is no file."""
    if not path.exists():
        return []
    types: dict[str, Any] = {field.name: field.type for field in fields(kind)}
    rows = []
    with path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            values = {name: types[name](text) for name, text in line.items()}
            rows.append(kind(**values))
    return rows


def write_rows(path: Path, rows: Sequence[_Dataclass]) -> None:
    """All rows, of which there is one or more."""
    heads = [field.name for field in fields(rows[0])]
    write_whole(path, csv_text(heads, map(asdict, rows)))


class _OfASeed(Protocol):
    left: float
    seconds: float


def seeds_table(heads: Sequence[str], rows: Sequence[_OfASeed], names: Sequence[str]) -> str:
    """Markdown: for each combination of the fields ``names``, whose rows stand together, what is
    left with each seed, its mean, and the mean of the seconds.
    """
    cells = []
    for _, group in groupby(rows, key=attrgetter(*names)):
        found = list(group)
        words = [str(getattr(found[0], name)) for name in names]
        each = " / ".join(f"{row.left:.1f}" for row in found)
        left = mean(row.left for row in found)
        seconds = mean(row.seconds for row in found)
        cells.append([*words, each, f"{left:.1f}", f"{seconds:.0f}"])
    return markdown_table([*heads, "accuracy, %", "mean", "seconds"], cells, words=len(names))
