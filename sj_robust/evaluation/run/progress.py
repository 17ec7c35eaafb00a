"""Progress of an evaluation, in small files that survive an interruption."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import IO, Any, TypeVar

import torch
from torch import Tensor

from sj_robust.core.folders import locked
from sj_robust.core.saved import load_tensors, naming, whole_file, write_whole

__all__ = [
    "BatchLog",
    "Images",
    "Position",
    "Progress",
    "Step",
    "TimeLeft",
    "Watch",
    "another_evaluation",
    "computed_once",
    "gathered",
    "rank_and_world_size",
    "read",
]

_Part = TypeVar("_Part")
_HINTS = {
    "data": " (a loader that shuffles or augments gives other images in every pass: build it with "
    "shuffle=False, without random augmentation)"
}


class Progress:
    """Records per batch, one line each, which a killed process leaves whole or not at all.
    可断点续跑的进度记录。

    Every record is forced to disk before the next one is computed; a torn line at the end of a file
    is cut off when the batch is taken up again. The key, a fingerprint by name of all that decides
    the records, says what they belong to; without a folder nothing is kept.

    Raises:
        ValueError: If the folder holds records of another key.
    """

    def __init__(self, folder: Path | None, key: Mapping[str, str]) -> None:
        """Compare the key with the one on disk; see the class."""
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "key.json"
            if path.is_file():
                _check_key(read(path), key, folder)
            else:
                write_whole(path, json.dumps(dict(key), indent=2) + "\n")

    @contextmanager
    def batch(self, number: int, chain: int = 0) -> Iterator["BatchLog"]:
        """Open a chain of a batch: the steps known so far, to which others are added.

        Raises:
            BlockingIOError: If another process has taken up the batch.
        """
        if self._folder is None:
            yield BatchLog()
            return
        name = f"batch-{number:06d}" + (f"-{chain}" if chain else "")
        path = self._folder / f"{name}.jsonl"
        busy = f"{path} is being written by another process: is this evaluation running already?"
        with (
            locked(path.with_suffix(".lock"), busy),
            naming(path),
            path.open("ab") as file,
        ):
            records = [*_whole_records(path.read_bytes())]
            file.truncate(sum(length for _, length in records))
            yield BatchLog([Step(**record) for record, _ in records], file, path)


@dataclass(frozen=True)
class Step:
    """What one member did to one batch, as plain data; numbers are those of the batch.

    Attributes:
        member: Its name, ``"clean"`` for none.
        seen: Images that it looked at.
        fell: Those that are wrong afterwards.
        outside: Those of them that are further from the clean one than the threat allows.
        digests: Of those in ``fell`` that it made, the first digits of their fingerprints.
        largest: Largest distance.
        seconds: Time.
        warnings: What attack and network warned of.
        potential: MS-MPPD of every layer, where it was measured.
    """

    member: str
    seen: list[int]
    fell: list[int]
    outside: list[int] = field(default_factory=list)
    digests: str = ""
    largest: float = 0.0
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)
    potential: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Images:
    """What a member made of the images ``rows`` [n] of a batch, [n, ...]."""

    rows: Tensor
    x_adv: Tensor


@dataclass(frozen=True)
class BatchLog:
    """The steps of one batch in their order, the file where further ones go, and the images of
    members that later ones begin from.
    """

    steps: list[Step] = field(default_factory=list)
    file: IO[bytes] | None = None
    path: Path | None = None
    images: dict[int, Images] = field(default_factory=dict)

    def append(self, step: Step) -> None:
        """Add a step, on disk when this returns."""
        if self.file is not None:
            self.file.write(json.dumps(asdict(step), separators=(",", ":")).encode() + b"\n")
            self.file.flush()
            os.fsync(self.file.fileno())
        self.steps.append(step)

    def keep(self, number: int, images: Images) -> None:
        """Keep the images of a step, which is added afterwards."""
        self.images[number] = images
        if self.path is not None:
            with whole_file(self._place(self.path, number)) as file:
                torch.save({"rows": images.rows.cpu(), "x_adv": images.x_adv.cpu()}, file)

    def kept(self, number: int) -> Images:
        """The images of a step."""
        if number not in self.images:
            assert self.path is not None  # a step of an earlier run
            content = load_tensors(
                self._place(self.path, number),
                what="images of an evaluation",
                remedy="evaluate into another folder",
            )
            self.images[number] = Images(**content)
        return self.images[number]

    def forget(self) -> None:
        """Remove the images, when no member needs them any more."""
        self.images.clear()
        if self.path is not None:
            for place in self.path.parent.glob(f"{self.path.stem}-step-*.pt"):
                place.unlink()

    def _place(self, path: Path, number: int) -> Path:
        return path.with_name(f"{path.stem}-step-{number}.pt")


@dataclass(frozen=True)
class Position:
    """The progress of a run, for observers. 运行进度。

    Attributes:
        batch: Number of the batch, from 0.
        batches: Number of batches, of all processes.
        member: Name of the member that was run last, ``"clean"`` for none.
        done: Steps of this process that are done, each a member on a batch; steps of an earlier run
            included.
        total: Steps of this process.
        seconds_left: Estimate from the times of each member so far.
    """

    batch: int
    batches: int
    member: str
    done: int
    total: int
    seconds_left: float


def _silent(text: str) -> None:
    """Print nothing."""


@dataclass(frozen=True)
class Watch:
    """Observer of an evaluation. 进度回调。

    Attributes:
        say: Called with a line for each part.
        on_step: Called after every step; None for nobody.
    """

    say: Callable[[str], None] = _silent
    on_step: Callable[[Position], None] | None = None


class TimeLeft:
    """Estimate from the mean time of each member on its batches, since members differ by orders of
    magnitude.
    """

    def __init__(self, steps: Iterable[str]) -> None:
        """Nothing is done yet; ``steps`` names the member of each."""
        self._planned = Counter(steps)
        self._times: dict[str, list[float]] = {name: [] for name in self._planned}
        self.done, self.total = 0, self._planned.total()

    def add(self, name: str, seconds: float) -> None:
        """Count a step, a member on a batch."""
        self._times[name].append(seconds)
        self.done += 1

    def seconds(self) -> float:
        """Members that have not run yet are taken for as long as the mean of those that have."""
        usual = sum(map(sum, self._times.values())) / max(1, self.done)
        left = 0.0
        for name, times in self._times.items():
            left += fmean(times or [usual]) * (self._planned[name] - len(times))
        return left


def computed_once(path: Path | None, key: Mapping[str, str], compute: Callable[[], Any]) -> Any:
    """What ``compute`` returned, as JSON gives it back, from the file of an earlier run if there is
    one. 只计算一次。

    Raises:
        ValueError: If the file belongs to another key.

    Examples:
        >>> computed_once(None, {}, lambda: (1, 2))
        [1, 2]
    """
    if path is not None and path.is_file():
        content = read(path)
        _check_key(content["key"], key, path)
        return content["result"]
    text = json.dumps({"key": dict(key), "result": compute()})
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text + "\n")
    return json.loads(text)["result"]


def _check_key(found: object, wanted: Mapping[str, str], where: Path) -> None:
    if not isinstance(found, dict):
        raise ValueError(
            f"{where} holds no key of an evaluation: it is damaged; evaluate into another folder"
        )
    changed = [
        name
        for name in (*wanted, *(found.keys() - wanted.keys()))
        if found.get(name) != wanted.get(name)
    ]
    if changed:
        hints = [_HINTS[name] for name in changed if name in _HINTS]
        raise ValueError(
            another_evaluation(where, f"{', '.join(changed)} changed") + "".join(hints)
        )


def another_evaluation(where: Path, what: str) -> str:
    """The error message for a folder that belongs to another evaluation."""
    return (
        f"{where} holds the progress of another evaluation ({what}); results are never mixed: "
        "resume with the same network, images and options, or evaluate into another folder"
    )


def rank_and_world_size() -> tuple[int, int]:
    """Number of this process and number of processes; (0, 1) without ``torch.distributed``.
    进程编号与进程数。
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def gathered(records: dict[int, _Part]) -> dict[int, _Part]:
    """The numbered records of all processes, on each of them and in their order."""
    _, processes = rank_and_world_size()
    parts = [records] * processes
    if processes > 1:
        torch.distributed.all_gather_object(parts, records)
    found: dict[int, _Part] = {}
    for part in parts:
        found |= part
    return {number: found[number] for number in sorted(found)}


def read(path: Path) -> Any:
    """What a file of an evaluation holds; ValueError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); evaluate into another folder") from error


def _whole_records(content: bytes) -> Iterator[tuple[dict[str, Any], int]]:
    """The complete records that a file begins with, and how long each is."""
    for line in content.splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            return
        if not line.endswith(b"\n") or not isinstance(record, dict):
            return
        yield record, len(line)
