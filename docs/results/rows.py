"""Rows of a table as dataclasses, in a CSV file from which a stopped measurement goes on."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

__all__ = ["read_rows", "write_rows"]


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
    with path.open("w", encoding="utf-8", newline="") as file:
        heads = [field.name for field in fields(rows[0])]
        writer = csv.DictWriter(file, heads, lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, rows))
