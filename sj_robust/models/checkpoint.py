"""Checkpoints that are either whole or not there."""

import glob
import hashlib
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch

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


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint so that ``path`` always holds a whole one, the old or the new.
    原子写入检查点。

    What an earlier process that was killed while it wrote this checkpoint left behind is removed.

    Args:
        path: The file; its folder exists.
        content: Tensors and plain Python values, all that ``torch.load(weights_only=True)``
            accepts.

    Raises:
        OSError: If it cannot be written (such as a full disk); an earlier checkpoint is then still
            intact.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> save_checkpoint(folder / "last.pt", {"epoch": 3})
        >>> load_checkpoint(folder / "last.pt")["epoch"]
        3
    """
    try:
        with whole_file(path) as file:
            torch.save(
                {"format": _FORMAT, "version": _VERSION, "digest": _digest(content), **content},
                file,
            )
    except NotImplementedError:
        raise
    except (
        OSError,
        RuntimeError,
    ) as error:  # torch reports a failed write of its archive as a RuntimeError
        raise OSError(_not_written(path, error)) from error
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        leftover.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, without running any code that the file may hold. 读取检查点。

    Args:
        path: A file written by :func:`save_checkpoint`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, was written by something else, or by a newer format.

    Examples:
        >>> load_checkpoint(Path("nowhere") / "last.pt")
        Traceback (most recent call last):
        ...
        FileNotFoundError: no checkpoint at nowhere/last.pt; start the run without --resume
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; start the run without --resume")
    content: Any = load_tensors(path, what="a checkpoint", remedy="resume from another one")
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(
            f"{path} is not a checkpoint of sj_robust (no format mark {_FORMAT!r}); check the "
            "path. Of a bare state_dict give a function that builds the network and loads it "
            "(evaluate.py --network mynet.py:build), or start from it (adv_train.py --model "
            "mynet.py:build --pretrained FILE)"
        )
    if content.get("version") != _VERSION:
        raise ValueError(
            f"{path} has checkpoint version {content.get('version')}, this release reads "
            f"{_VERSION}; update sj_robust"
        )
    digest = content.pop(
        "digest", None
    )  # older files have none, only the sums of the archive that each file has
    if digest not in (
        None,
        _digest({name: content[name] for name in content if name not in ("format", "version")}),
    ):
        raise ValueError(
            f"{path} is damaged: it does not hold what was saved; resume from another one"
        )
    return content


def load_run(path: Path) -> dict[str, Any]:
    """Read a checkpoint that a run is to go on from. 读取用于续训的检查点。

    Raises:
        FileNotFoundError, ValueError: As :func:`load_checkpoint`, and if a part is missing that the
            training needs.
    """
    try:
        content = load_checkpoint(path)
    except ValueError as error:
        best = path.with_name("best.pt")
        remedy = (
            f"; {best}, a checkpoint of the best epoch, can take its name" if best.is_file() else ""
        )
        raise ValueError(f"{error}{remedy}") from error
    missing = [name for name in _RUN if name not in content]
    if missing:
        raise ValueError(
            f"{path} holds no {', '.join(missing)}: it keeps weights, but no run can go on from "
            "it; start one with another --output"
        )
    return content


def check_same_run(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise ValueError if the description in a checkpoint is that of a run with other options.
    检查选项是否一致。
    """
    old, new = _flat(saved), _flat(wanted)
    names = [name for name in (*new, *(old.keys() - new.keys())) if old.get(name) != new.get(name)]
    if names:
        differences = ", ".join(
            f"{name}: {old.get(name)!r} there, {new.get(name)!r} now" for name in names
        )
        raise ValueError(
            f"the checkpoint is of a run with other options ({differences}); resume with the "
            "same ones"
        )


def _digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of all values, whatever lies around them in the file."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.update(f"{value.dtype} {list(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping | list | tuple):
            found.update(f"{len(value)}".encode())
            for one in chain.from_iterable(value.items()) if isinstance(value, Mapping) else value:
                add(one)
        else:
            found.update(f"{value!r} ".encode())

    add(content)
    return found.hexdigest()


def _flat(description: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested groups of options as one level, with the groups in the names."""
    flat: dict[str, Any] = {}
    for name, value in description.items():
        flat |= (
            _flat(value, f"{prefix}{name}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{name}": value}
        )
    return flat


def _not_written(path: Path, error: OSError | RuntimeError) -> str:
    """What failed, what is left, and what helps."""
    if not path.parent.is_dir():
        return (
            f"{path} could not be written: the folder {path.parent} is gone; make it, and go on "
            "with --resume"
        )
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    left = "the earlier checkpoint there is intact" if path.exists() else "there was none before"
    return (
        f"{path} could not be written ({reason}); {left}. Free some space, then continue with "
        "--resume"
    )
