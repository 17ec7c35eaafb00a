"""Files of a data set: where they are, how they are fetched, and what to do where they are missing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sj_robust.data.unreadable import one_line

__all__ = ["Wanted", "located"]


@dataclass(frozen=True)
class Wanted:
    """Files that make up a data set.

    Attributes:
        title: Name of the data set in a message.
        files: Names of the files.
        folders: Where each may lie.
        download: Fetches all of them.
        command: The same on a command line.
        endings: What may follow a name, such as ``.gz``.
        hint: What else can be done, a sentence that follows the command.
    """

    title: str
    files: Sequence[str]
    folders: Sequence[Path]
    download: Callable[[], object]
    command: str
    endings: tuple[str, ...] = ("",)
    hint: str = ""

    def found(self) -> dict[str, Path]:
        """The files that are there."""
        paths = {name: self._path(name) for name in self.files}
        return {name: path for name, path in paths.items() if path is not None}

    def _path(self, name: str) -> Path | None:
        candidates = (folder / (name + ending) for folder in self.folders for ending in self.endings)
        return next((path for path in candidates if path.is_file()), None)


def located(wanted: Wanted, *, download: bool) -> dict[str, Path]:
    """Path of every file, downloaded first if that is allowed and one is missing. 查找或下载数据文件。

    Args:
        wanted: The files.
        download: Whether they may be fetched.

    Returns:
        Paths by the names of ``wanted.files``, in their order.

    Raises:
        FileNotFoundError: If a file is missing; the message says which, where it was looked for and how to get it.
    """
    found, failure = wanted.found(), ""
    if download and len(found) < len(wanted.files):
        try:
            wanted.download()
        except (OSError, RuntimeError) as error:
            failure = f"The download failed ({one_line(error)}). "
        found = wanted.found()
    missing = [name for name in wanted.files if name not in found]
    if missing:
        also = f" (each may end in {' or '.join(filter(None, wanted.endings))})" if any(wanted.endings) else ""
        raise FileNotFoundError(
            f"{wanted.title} is not complete: {', '.join(missing)}{also} not found in "
            f"{' or '.join(str(folder.resolve()) for folder in wanted.folders)}. {failure}"
            f"Get it with download=True (--download), or with\n  {wanted.command}\n{wanted.hint}".rstrip()
        )
    return found
