"""Folders and files named by a user: checks before any work, and a lock."""

import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ["check_file", "check_folder", "check_names", "locked", "read_text"]

_LONGEST = 255
"""Bytes of a name in a file system."""
_LONGEST_PATH = 4095
"""Bytes of a path as a whole."""


def check_folder(name: str, folder: str | Path | None) -> Path | None:
    """A folder that is there or can be made, and that takes files; nothing is left in it.
    检查输出目录是否可写。

    Args:
        name: Name of the argument, for the message.
        folder: The folder; None for none.

    Raises:
        TypeError: If it is neither a path nor None.
        ValueError: If it is a file, lies in one, takes no files, or has a name too long.

    Examples:
        >>> check_folder("folder", "runs/mine").name
        'mine'
        >>> check_folder("folder", "")
        Traceback (most recent call last):
            ...
        TypeError: folder must be the path of a folder, got ''; use a str, a Path or None
    """
    if folder is None:
        return None
    if not isinstance(folder, str | Path) or not str(folder):
        raise TypeError(
            f"{name} must be the path of a folder, got {folder!r}; use a str, a Path or None"
        )
    path = Path(folder)
    check_names(name, path)
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        inside = "" if there == path else f"got {path}, "
        shown = path if there == path else there.name
        raise ValueError(
            f"{name} must be a folder, {inside}but {shown} is a file; give another path"
        )
    try:
        with tempfile.TemporaryFile(dir=there):
            return path
    except OSError as error:
        raise ValueError(
            f"{name} must be a folder that can be written, got {path} ({error.strerror}); give "
            "another path"
        ) from error


def check_file(path: str | Path, endings: Collection[str], remedy: str) -> Path:
    """A file to be written, in the format of its ending; else ValueError. 检查输出文件名。

    Args:
        path: The file.
        endings: The endings that it may have, such as ``".json"``.
        remedy: What to do for another one.

    Examples:
        >>> check_file("report.pdf", [".json"], "figures are written by plot(path=...)")
        Traceback (most recent call last):
            ...
        ValueError: path must end in .json, got 'report.pdf'; figures are written by plot(path=...)
    """
    if Path(path).suffix.lower() not in endings:
        raise ValueError(f"path must end in {', '.join(endings)}, got {str(path)!r}; {remedy}")
    check_names("path", Path(path))
    return Path(path)


def check_names(name: str, path: Path) -> None:
    """File systems take every name in a path; else ValueError. 检查路径中名称的长度。"""
    whole = len(os.fsencode(path))
    if whole > _LONGEST_PATH:
        raise ValueError(
            f"{name} must have at most {_LONGEST_PATH} bytes, as systems demand, got {whole}; give "
            "a shorter one"
        )
    longest = max((os.fsencode(part) for part in path.parts), key=len, default=b"")
    if len(longest) > _LONGEST:
        raise ValueError(
            f"{name} must have names of at most {_LONGEST} bytes, as file systems do, got one of "
            f"{len(longest)}, {longest[:40]!r}...; give a shorter one"
        )


@contextmanager
def locked(path: Path, message: str) -> Iterator[None]:
    """Hold a lock file, of which a killed process lets go. 持有锁文件。

    Args:
        path: The lock file, in a folder that exists.
        message: What to say if another process holds it.

    Raises:
        BlockingIOError: If another process holds it.

    Examples:
        >>> with locked(Path(tempfile.mkdtemp(), ".lock"), "another process is here"):
        ...     print("alone")
        alone
    """
    try:
        held = FileLock(path).acquire(timeout=0)
    except Timeout as error:
        raise BlockingIOError(message) from error
    with held:
        yield


def read_text(path: Path) -> str:
    """Text of a file in UTF-8.

    Raises:
        ValueError: If it is in another encoding.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} must be UTF-8 text, got byte {error.object[error.start]:#x} at place "
            f"{error.start}; save it as UTF-8"
        ) from error
