"""Results and checkpoints on disk: JSON with a header, atomic writes, tensors without code."""

import csv
import io
import json
import math
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Self

import torch

from sj_robust.core.folders import check_file

__all__ = [
    "SavedResult",
    "csv_text",
    "load_tensors",
    "markdown_cells",
    "markdown_table",
    "naming",
    "plain",
    "saved_format",
    "whole_file",
    "write_whole",
]

_KEPT = 60
"""Letters of a file's name, of up to 4 bytes each, that its temporary name has too; a file system
takes 255 bytes.
"""


class SavedResult:
    """Base of a dataclass of plain data that lies on disk as JSON and loads back equal.
    可保存并读回的结果。

    A subclass gives what errors call it, its format and its version as class arguments, and has a
    :meth:`_content` and :meth:`_from_content` of its own where fields are not plain.

    Examples:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Margin(SavedResult, what="a margin", format="mine", version=1):
        ...     value: float
        >>> Margin.from_json(Margin(0.5).to_json())
        Margin(value=0.5)
    """

    saved_as: ClassVar[str]
    """The format that the file names."""
    _what: ClassVar[str]
    _version: ClassVar[int]

    def __init_subclass__(cls, *, what: str, format: str, version: int) -> None:
        super().__init_subclass__()
        cls._what, cls.saved_as, cls._version = what, format, version

    def to_json(self) -> str:
        """The result as JSON text, which :meth:`from_json` reads back equal."""
        return json.dumps(
            {"format": self.saved_as, "version": self._version} | self._content(),
            indent=2,
            allow_nan=False,
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The result that :meth:`to_json` wrote.

        Raises:
            ValueError: If the text is not JSON, something else or of another version, or
                contradicts itself.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:  # also a number that is too long
            raise ValueError(
                f"{cls._what} must be JSON ({error}); the file is damaged or something else"
            ) from error
        if not isinstance(content, dict) or content.pop("format", None) != cls.saved_as:
            raise ValueError(
                f"not {cls._what}: the text must be an object of format {cls.saved_as!r}"
            )
        found = content.pop("version", None)
        if found != cls._version:
            raise ValueError(
                f"not {cls._what} of this release: version must be {cls._version}, got {found}; "
                "update sj_robust"
            )
        try:
            return cls._from_content(content)
        except (TypeError, KeyError, AttributeError, OverflowError) as error:
            raise ValueError(
                f"a field of {cls._what} is missing or unknown ({error}); the file is damaged"
            ) from error

    def save(self, path: str | Path) -> None:
        """Write the result as JSON; the file is whole or not there.

        Raises:
            ValueError: If the path does not end in ``.json``, or its name is too long.
        """
        file = check_file(path, [".json"], f"{self._what} is JSON")
        write_whole(file, self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The result that :meth:`save` wrote; raises as :meth:`from_json`, naming the file."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{Path(path)}: {error}") from error

    def _content(self) -> dict[str, Any]:
        # every subclass is a dataclass
        return asdict(self)  # type: ignore[call-overload, no-any-return]

    @classmethod
    def _from_content(cls, content: dict[str, Any]) -> Self:
        return cls(**content)


def csv_text(heads: Sequence[str], lines: Iterable[Mapping[str, Any]]) -> str:
    """CSV with a head, whose columns are ``heads``; numbers are written so that they are read back
    equal. CSV 文本。

    Examples:
        >>> print(csv_text(["attack", "eps"], [{"attack": "pgd", "eps": 0.1}]), end="")
        attack,eps
        pgd,0.1
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, heads, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """Markdown of a table whose first ``words`` columns hold words, the others numbers; bars and
    line breaks in cells are escaped. Markdown 表格。

    Examples:
        >>> print(markdown_table(["attack", "%"], [["clean", "95.0"]]))
        | attack | % |
        | --- | ---: |
        | clean | 95.0 |
    """
    marks = ["---"] * words + ["---:"] * (len(heads) - words)
    lines = []
    for row in (heads, marks, *rows):
        cells = [" ".join(cell.replace("|", r"\|").splitlines()) for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def markdown_cells(line: str) -> list[str]:
    """The cells of a line of :func:`markdown_table`. Markdown 表格一行的单元格。

    Examples:
        >>> markdown_cells(markdown_table(["a | b", "%"], []).splitlines()[0])
        ['a | b', '%']
    """
    return [cell.replace(r"\|", "|") for cell in line[2:-2].split(" | ")]


def saved_format(text: str) -> str | None:
    """The format that a text says it is of; None if it says nothing. 读取结果文件的格式。"""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    found = content.get("format") if isinstance(content, dict) else None
    return found if isinstance(found, str) else None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Context of writing a file, whose name a failure has that comes with none, such as that of a
    full disk.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that is written atomically: it gets its name when all of it is on the disk.
    原子写文件。

    It lies under a temporary name in the same folder until then, and is removed if the writing
    fails.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{path.parent} is no folder that exists; make it, then write {path.name}"
        )
    temporary = path.with_name(f".{path.name[:_KEPT]}.{os.getpid()}.tmp")
    try:
        with naming(path), temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)  # the new name itself
        finally:
            os.close(handle)


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that it is whole, in its old or its new form, whenever the process is
    killed. 原子写文件。

    Args:
        path: The file; its folder exists.
        text: Its content.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "note.txt"
        >>> write_whole(path, "done")
        >>> path.read_text()
        'done'
    """
    with whole_file(path) as file:
        file.write(text.encode())


def load_tensors(path: Path, *, what: str, remedy: str) -> Any:
    """Tensors and plain values of ``torch.save``, on the CPU; no code that the file may hold is
    run. 安全读取张量。

    The error names what it was read as, such as ``"a checkpoint"``, and the remedy.

    Raises:
        ValueError: If the file is damaged, or holds more than tensors and plain values.
    """
    try:
        if zipfile.is_zipfile(path):  # whose checksums torch writes, and does not look at
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
                if damaged is not None:
                    raise zipfile.BadZipFile(damaged)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file
        raise ValueError(
            f"{path} cannot be read as {what} ({type(error).__name__}): it is damaged, or holds "
            "more than tensors and plain values, such as a whole pickled network, which would "
            f"run code; {remedy}"
        ) from error


def plain(value: Any) -> Any:
    """The value as JSON gives it back: lists for tuples, text for keys, paths and numbers that are
    not finite.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a report holds plain data only, got {type(value).__name__}")
