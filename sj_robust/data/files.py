"""Unreadable files of a data set, found before a run or named during it."""

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

__all__ = ["OnUnreadable", "UnreadableError", "check_sum", "first_few", "one_line", "readable"]

OnUnreadable = Literal["error", "skip"]
"""What becomes of a file that cannot be read: an error, or a warning and it is left out."""


class UnreadableError(ValueError):
    """A file of a data set cannot be read; the message names it."""


def one_line(error: Exception, at_most: int = 200) -> str:
    """An error of another package in one line, its text cut off where it goes on for long.
    单行错误说明。

    Examples:
        >>> one_line(OSError("no   room"))
        'OSError: no room'
    """
    return f"{type(error).__name__}: {' '.join(str(error).split())[:at_most]}"


def first_few(names: Sequence[object], most: int = 5) -> list[str]:
    """The first names for a message, and ``"..."`` if there are more. 列出前几项。

    Examples:
        >>> first_few(["a", "b", "c"], most=2)
        ['a', 'b', '...']
    """
    more = ["..."] if len(names) > most else []
    return [*map(str, names[:most]), *more]


def check_sum(path: Path, md5: str, source: str = "") -> None:
    """Raise ValueError unless a file has its MD5 sum; the message says where to fetch it from.
    校验文件的 MD5。
    """
    from torchvision.datasets import utils

    if not utils.check_integrity(path, md5):
        where = f" from {source}" if source else ""
        raise ValueError(f"{path} is damaged (its MD5 sum is not {md5}); fetch it again{where}")


def readable(
    samples: Sequence[tuple[Path, int]],
    read: Callable[[Path], object],
    *,
    on_unreadable: OnUnreadable,
    folder: Path,
) -> tuple[list[Path], Tensor]:
    """Those files in ``folder`` that ``read`` reads without an UnreadableError, and their labels.
    检查哪些文件可读。

    Raises:
        UnreadableError: If some cannot be read and are not to be left out; or if none is left.
    """

    def problem(sample: tuple[Path, int]) -> str | None:
        try:
            read(sample[0])
        except UnreadableError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        problems = list(pool.map(problem, samples))
    bad = [text for text in problems if text is not None]
    if bad:
        more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
        names = "; ".join(bad[:5]) + more
        found = f"{len(bad)} of {len(samples)} files in {folder} cannot be used: {names}"
        if on_unreadable == "error":
            raise UnreadableError(f"{found}. Replace them, or omit them with on_unreadable='skip'")
        if len(bad) == len(samples):
            raise UnreadableError(f"{found}. None remains")
        warnings.warn(f"{found}. They are skipped", stacklevel=2)
    pairs = zip(samples, problems, strict=True)
    good = [sample for sample, text in pairs if text is None]
    paths = [path for path, _ in good]
    labels = [label for _, label in good]
    return paths, torch.tensor(labels, dtype=torch.int64)
