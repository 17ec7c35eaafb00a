"""The folder that a run of a recipe leaves behind."""

import errno
import glob
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from sj_robust.core.saved import write_whole

__all__ = ["CONFIGURATION_FILE", "open_run_folder", "removed_if_unused", "run_to_resume"]

CONFIGURATION_FILE = "config.yaml"

_WRITTEN_FIRST = {CONFIGURATION_FILE, "README.md", "log.txt"}
"""Files of a run that say nothing of its work."""


def run_to_resume(
    output: str | None, stem: str, root: Path = Path("runs"), mark: str = "*/last.pt"
) -> Path:
    """The folder of an earlier run: ``output``, or the newest ``root/stem-NUMBER`` with a
    checkpoint.

    查找要继续的运行。

    Args:
        output: The folder, None for the newest.
        stem: Name of a folder under ``root`` up to its number.
        root: Where folders with numbers are.
        mark: Files, as a glob pattern, that tell a run with something to continue with from one
            that failed at its start.

    Raises:
        FileNotFoundError: If there is no such run with a configuration in it.

    Examples:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> (root / "digits-7" / "dlif").mkdir(parents=True)
        >>> for file in ("config.yaml", "dlif/last.pt"):
        ...     (root / "digits-7" / file).touch()
        >>> run_to_resume(None, "digits", root).name
        'digits-7'
    """
    if output is None:  # a run that failed at its start has nothing to go on with
        numbers = [
            number for number in _numbers(stem, root) if any((root / f"{stem}-{number}").glob(mark))
        ]
        if not numbers:
            raise FileNotFoundError(
                f"no run to resume: no folder {root / stem}-NUMBER holds one that can go on; give "
                "the run's folder with --output"
            )
        folder = root / f"{stem}-{max(numbers)}"
    else:
        folder = Path(output)
    if not (folder / CONFIGURATION_FILE).is_file():
        raise FileNotFoundError(
            f"no run to resume: {folder / CONFIGURATION_FILE} is missing; give the run's folder "
            "with --output"
        )
    return folder


def open_run_folder(
    output: str | None,
    stem: str,
    configuration: Mapping[str, Any],
    accelerator: Accelerator,
    *,
    resume: bool = False,
    root: Path = Path("runs"),
) -> Path:
    """Make the folder of a run, with its configuration in it; the same on every process.
    创建运行目录。

    Args:
        output: The folder, None for the first free ``root/stem-NUMBER``.
        stem: Name of a new folder under ``root`` up to its number.
        configuration: Options in plain data.
        accelerator: The processes, the first of which makes the folder.
        resume: Whether ``output`` is an earlier run to be continued, which is left as it is.
        root: Where folders with numbers are.

    Raises:
        FileExistsError: If ``output`` holds anything and is not to be resumed.
        OSError: If the folder cannot be made or written.

    Examples:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> folder = open_run_folder(None, "digits", {"T": 4}, Accelerator(cpu=True), root=root)
        >>> folder.name, (folder / CONFIGURATION_FILE).read_text().strip()
        ('digits-1', 'T: 4')
    """
    folders = [""]
    if accelerator.is_main_process:
        if resume and output is not None:
            folder = Path(output)
        else:
            folder = _new_folder(output, stem, root, configuration)
        folders = [str(folder)]
    if accelerator.num_processes > 1:
        broadcast_object_list(folders)
    return Path(folders[0])


@contextmanager
def removed_if_unused(folder: Path, *, resume: bool) -> Iterator[None]:
    """Take a new folder away if the run is refused, or misses a file, before it leaves anything.
    清理未使用的运行目录。

    Args:
        folder: Folder of the run.
        resume: Whether it is an earlier run's, which stays.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "run"
        >>> folder.mkdir()
        >>> with removed_if_unused(folder, resume=False):
        ...     raise ValueError("no such suite")
        Traceback (most recent call last):
            ...
        ValueError: no such suite
        >>> folder.exists()
        False
    """
    try:
        yield
    except (ValueError, FileNotFoundError):
        if not resume and {path.name for path in folder.rglob("*")} <= _WRITTEN_FIRST:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _new_folder(
    output: str | None, stem: str, root: Path, configuration: Mapping[str, Any]
) -> Path:
    """Make the folder, with the configuration in it."""
    folder = root if output is None else Path(output)
    if output is not None and folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} is not empty: continue its run with --resume, or change --output"
        )
    text = yaml.safe_dump(dict(configuration), sort_keys=False)
    try:
        if output is None:
            folder = _next_folder(stem, root)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / CONFIGURATION_FILE, text)
    except OSError as error:
        full = error.errno == errno.ENOSPC
        first = "free some space and start again, or " if full else ""
        raise OSError(
            f"{folder} cannot be written ({error.strerror}); {first}give another --output"
        ) from error
    return folder


def _next_folder(stem: str, root: Path) -> Path:
    """Make the folder of the next number, which no other process has at the same time."""
    root.mkdir(parents=True, exist_ok=True)
    while True:
        folder = root / f"{stem}-{max(_numbers(stem, root), default=0) + 1}"
        try:
            folder.mkdir()
        except FileExistsError:  # another process was faster
            continue
        return folder


def _numbers(stem: str, root: Path) -> list[int]:
    """Numbers of the folders there are."""
    endings = (path.name.removeprefix(f"{stem}-") for path in root.glob(f"{glob.escape(stem)}-*"))
    return [int(ending) for ending in endings if ending.isdigit()]
