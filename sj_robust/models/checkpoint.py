"""Checkpoints, written atomically."""

import glob
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sj_robust.core.environment import CODE_KEY
from sj_robust.core.saved import load_tensors, whole_file

__all__ = ["check_same_run", "load_checkpoint", "load_run", "save_checkpoint"]

_FORMAT = "sj_robust.checkpoint"
_VERSION = 1
_RUN = (
    "description",
    "model",
    "optimizer",
    "scheduler",
    "scaler",
    "epoch",
    "batch",
    "sums",
    "history",
    "random",
)
"""Parts of a checkpoint from which a run can be resumed."""

_NOT_ALWAYS_RECORDED = ("images and labels", CODE_KEY)
"""Parts of a description that are compared only where both have them: checkpoints of earlier
releases lack them, and code has another digest for each version of Python.
"""


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically: ``path`` always holds a complete one, the old or the new.
    原子写入检查点。

    Unfinished files of this checkpoint are removed if the processes that wrote them are gone.

    Args:
        path: The file; its folder must exist.
        content: Tensors and plain Python values, as accepted by ``torch.load(weights_only=True)``.

    Raises:
        OSError: If it cannot be written (for example, if the disk is full); an earlier checkpoint
            is then still intact.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> save_checkpoint(folder / "last.pt", {"epoch": 3})
        >>> load_checkpoint(folder / "last.pt")["epoch"]
        3
    """
    path = Path(path)
    head = {"format": _FORMAT, "version": _VERSION, "digest": _digest(content)}
    try:
        with whole_file(path) as file:
            torch.save(head | content, file)
    except NotImplementedError:  # a RuntimeError, but not one of writing
        raise
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError if a write fails
        raise OSError(_not_written(path, error)) from error
    for unfinished in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if _is_left_over(unfinished):
            unfinished.unlink(missing_ok=True)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, without running any code that the file may contain.
    读取检查点。

    Args:
        path: A file written by :func:`save_checkpoint`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, was written by another program, or has a newer format.

    Examples:
        >>> load_checkpoint("nowhere/last.pt")
        Traceback (most recent call last):
        ...
        FileNotFoundError: no checkpoint at nowhere/last.pt; start the run without --resume
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; start the run without --resume")
    content: Any = load_tensors(path, what="a checkpoint", remedy="use another checkpoint")
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(
            f"{path} is not a checkpoint of sj_robust (no format mark {_FORMAT!r}); check the "
            "path. For a bare state_dict, give a function that builds the network and loads it "
            "(evaluate.py --network mynet.py:build), or start from it (adv_train.py --model "
            "mynet.py:build --pretrained FILE)"
        )
    if content.get("version") != _VERSION:
        raise ValueError(
            f"{path} has checkpoint version {content.get('version')}, this release reads "
            f"{_VERSION}; update sj_robust"
        )
    digest = content.pop("digest", None)
    saved = {name: content[name] for name in content if name not in ("format", "version")}
    if digest != _digest(saved):
        raise ValueError(
            f"{path} is damaged: it does not hold what was saved; use another checkpoint"
        )
    return content


def load_run(path: Path) -> dict[str, Any]:
    """Read a checkpoint from which a run is to be resumed. 读取用于续训的检查点。

    Raises:
        FileNotFoundError, ValueError: As :func:`load_checkpoint`; also if a part is missing that
            the training needs.
    """
    try:
        content = load_checkpoint(path)
    except ValueError as error:
        best = path.with_name("best.pt")
        remedy = ""
        if best.is_file():
            remedy = f"; {best}, a checkpoint of the best epoch, can take its name"
        raise ValueError(f"{error}{remedy}") from error
    missing = [name for name in _RUN if name not in content]
    if missing:
        raise ValueError(
            f"{path} holds no {', '.join(missing)}: it has weights, but a run cannot continue "
            "from it; start a new run with another --output"
        )
    return content


def check_same_run(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[str, ...]:
    """Raise ValueError if the description in a checkpoint is that of a run with other options.
    检查选项是否一致。

    Returns:
        What could not be compared, since the checkpoint does not record it.
    """
    new = _flat(wanted)
    old = _flat(saved)
    unrecorded = []
    names = []
    for name in new | old:
        if old.get(name) == new.get(name):
            continue
        of_both = name in old and name in new
        if of_both or not name.startswith(_NOT_ALWAYS_RECORDED):
            names.append(name)
        elif name in new:
            unrecorded.append(name)
    if not names:
        return tuple(unrecorded)
    differences = [f"{name}: {old.get(name)!r} there, {new.get(name)!r} now" for name in names]
    raise ValueError(
        f"the checkpoint is of a run with other options ({', '.join(differences)}); resume with "
        "the same ones, or start a new run in another folder"
    )


def _digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of all names and values, which does not depend on how the file stores them."""
    found = hashlib.sha256()
    for part in _parts(content):
        found.update(part)
    return found.hexdigest()


def _parts(value: Any) -> Iterator[bytes | memoryview]:
    """A value as bytes, those of its parts one after the other."""
    if isinstance(value, torch.Tensor):
        yield f"{value.dtype} {list(value.shape)}".encode()
        flat = value.detach().cpu().contiguous().flatten()
        yield flat.view(torch.uint8).numpy().data
    elif isinstance(value, Mapping):
        yield f"{len(value)}".encode()
        for name, one in value.items():
            yield from _parts(name)
            yield from _parts(one)
    elif isinstance(value, list | tuple):
        yield f"{len(value)}".encode()
        for one in value:
            yield from _parts(one)
    else:
        yield f"{value!r} ".encode()


def _flat(description: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options without their groups, whose names become part of their own: ``"group.option"``."""
    flat: dict[str, Any] = {}
    for name, value in description.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _is_left_over(unfinished: Path) -> bool:
    """Whether the process that writes this file, whose number is in its name, is gone."""
    number = unfinished.suffixes[-2].removeprefix(".")
    if os.name != "posix" or not number.isdigit():  # elsewhere signal 0 is not a mere question
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # it belongs to another user, or is no process number
        return False
    return False


def _not_written(path: Path, error: OSError | RuntimeError) -> str:
    """What could not be written and why, what is left, and the remedy."""
    if not path.parent.is_dir():
        return (
            f"{path} could not be written: the folder {path.parent} is gone; create it, and "
            "continue with --resume"
        )
    reason = str(error)
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    left = "the earlier checkpoint there is intact" if path.exists() else "there was none before"
    return (
        f"{path} could not be written ({reason}); {left}. Free some space, then continue with "
        "--resume"
    )
