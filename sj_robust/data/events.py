"""Event data of SpikingJelly as frames, binary or of numbers of events."""

import importlib
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import spikingjelly
import torch
from torch import Tensor

from sj_robust.core.datasets import RECORDINGS
from sj_robust.data.files import (
    OnUnreadable,
    UnreadableError,
    check_sum,
    one_line,
    readable,
)
from sj_robust.data.stored import FileImages, Source, shuffled

__all__ = ["event_frames"]


def event_frames(
    name: str,
    root: Path,
    T: int,
    *,
    counts: bool,
    download: bool,
    on_unreadable: OnUnreadable,
) -> Source:
    """Recordings of an event camera as T frames [T, 2, H, W] each. 事件数据的帧。

    SpikingJelly unpacks the archives, writes the events of every recording and integrates them:
    frame t counts the events from number t N/T to (t+1) N/T of N. It does so once and keeps the
    frames in the folder. Here every count above 0 becomes 1, unless ``counts`` are wanted.

    ``root`` is SpikingJelly's folder of this data set (with ``download`` or ``events_np`` in it),
    or one that holds it under the name of SpikingJelly's class, such as ``CIFAR10DVS``. Of these
    data sets SpikingJelly can fetch only CIFAR10-DVS. It has no official split: the first tenth of
    every class, by the number in the file's name, is the test set (0 to 99 of 1000). Test
    recordings come in a fixed shuffled order.
    """
    kind, classes = RECORDINGS[name]
    host = _host_class(name, kind)
    folder = root / kind
    if any((root / part).is_dir() for part in ("download", "extract", "events_np")):
        folder = root
    _check_archives(kind, host, folder, download)
    height, width = host.get_H_W()
    shape = (T, 2, height, width)
    parts = []
    for recordings in _prepared(name, host, folder, T):
        found = len({label for _, label in recordings})
        if found != classes:
            raise ValueError(
                f"{folder} must hold recordings of {classes} classes, got {found} in "
                f"{recordings[0][0].parents[1]}; {_AGAIN.format(T=T)}"
            )
        check = partial(_check_frames, shape=shape)
        kept = readable(recordings, check, on_unreadable=on_unreadable, folder=folder)
        parts.append(FileImages(*kept, partial(_frames, shape=shape, counts=counts)))
    train, test = parts
    return Source(
        train=train,
        test=shuffled(test),
        image_shape=(2, height, width),
        classes=classes,
        frames=True,
    )


_AGAIN = (
    "remove events_np, extract, frames_number_{T}_split_by_number and everything that ends in "
    ".building there (keep download) and start again"
)


def _check_archives(kind: str, host: Any, folder: Path, download: bool) -> None:
    """Raise an error if an archive is missing that SpikingJelly is not to fetch, or is damaged,
    which SpikingJelly would remove.
    """
    if (folder / "events_np").is_dir():
        return
    missing = []
    for file, url, md5 in host.resource_url_md5():
        path = folder / "download" / file
        if path.is_file():
            check_sum(path, md5, url)
        else:
            missing.append(f"{path.name} from {url}")
    if missing and not (download and host.downloadable()):
        way = "use download=True (--download)" if host.downloadable() else "download it by hand"
        raise FileNotFoundError(
            f"{kind} is not complete in {(folder / 'download').resolve()}: {', '.join(missing)} "
            f"not found; {way}"
        )
    (folder / "download").mkdir(parents=True, exist_ok=True)  # SpikingJelly fetches into it


def _prepared(name: str, host: Any, folder: Path, T: int) -> list[list[tuple[Path, int]]]:
    """Frame files and classes of training and test set, made by SpikingJelly if they are not there
    yet.
    """
    load = partial(host, str(folder), data_type="frame", frames_number=T, split_by="number")
    try:
        with redirect_stdout(sys.stderr):  # SpikingJelly may print two lines per recording
            if name == "cifar10_dvs":
                samples = _ninety_ten(load().samples)
            else:
                samples = [load(train=True).samples, load(train=False).samples]
    except Exception as error:  # SpikingJelly raises anything
        raise ValueError(
            f"SpikingJelly could not prepare {host.__name__} in {folder} "
            f"({one_line(error, 300)}); {_AGAIN.format(T=T)}"
        ) from error
    _check_complete(folder, T)
    return [_with_paths(part) for part in samples]


def _with_paths(samples: Sequence[tuple[str, int]]) -> list[tuple[Path, int]]:
    return [(Path(path), label) for path, label in samples]


def _check_complete(folder: Path, T: int) -> None:
    """Raise ValueError if a recording has no frames: a release of SpikingJelly leaves out those
    that fail, with no error.
    """
    stages = {"extract": 0, "events_np": 0, f"frames_number_{T}_split_by_number": 0}
    for stage in stages:
        files = (folder / stage).rglob("*.*")
        stages[stage] = sum(path.suffix in (".aedat", ".bin", ".npy", ".npz") for path in files)
    recordings, events, frames = stages.values()
    if (folder / "extract" / "DvsGesture").is_dir():  # there a file holds many recordings
        recordings = events
    if frames < max(recordings, events):
        raise ValueError(
            f"SpikingJelly made frames of {frames} of {max(recordings, events)} recordings: others "
            f"are damaged or were interrupted; in {folder}, {_AGAIN.format(T=T)}"
        )


def _ninety_ten(samples: Sequence[tuple[str, int]]) -> list[list[tuple[str, int]]]:
    """Training and test set of a data set without a split: a tenth of every class, by the number in
    the name.
    """
    train, test = [], []
    for label in sorted({label for _, label in samples}):
        same = sorted((sample for sample in samples if sample[1] == label), key=_number)
        count = max(1, len(same) // 10)
        test += same[:count]
        train += same[count:]
    return [train, test]


def _number(sample: tuple[str, int]) -> tuple[int, str]:
    """Last number in the name of a file, -1 if there is none, and its path."""
    path, _ = sample
    numbers = re.findall(r"\d+", Path(path).stem)
    number = int(numbers[-1]) if numbers else -1
    return number, path


def _check_frames(path: Path, shape: tuple[int, ...]) -> None:
    """Raise UnreadableError if a file of frames is damaged, as far as its table of contents and
    its header tell.
    """
    try:
        with ZipFile(path) as archive, archive.open("frames.npy") as content:
            np.lib.format.read_magic(content)
            found = np.lib.format.read_array_header_1_0(content)[0]
    except (OSError, EOFError, KeyError, ValueError, BadZipFile) as error:
        raise UnreadableError(f"{path} ({one_line(error, 120)})") from error
    if found != shape:
        raise UnreadableError(f"{path} (frames {list(found)} instead of {list(shape)})")


def _frames(path: Path, shape: tuple[int, ...], *, counts: bool) -> Tensor:
    """Frames [T, 2, H, W] of one recording."""
    try:
        with path.open("rb") as file, np.load(file) as content:
            frames = content["frames"]
    except Exception as error:  # a damaged archive raises anything
        raise UnreadableError(f"{path} cannot be read any more ({one_line(error, 120)})") from error
    if frames.shape != shape:
        raise UnreadableError(f"{path} holds frames {list(frames.shape)} instead of {list(shape)}")
    return torch.from_numpy(frames if counts else frames > 0).float()


@cache
def _host_class(module: str, kind: str) -> Any:
    """A class of ``spikingjelly.datasets``, imported only now."""
    try:
        found = getattr(importlib.import_module(f"spikingjelly.datasets.{module}"), kind)
    except (ImportError, OSError, RuntimeError) as error:
        found = getattr(_alone(module, error), kind)
    return _with_readable_recordings(found) if hasattr(found, "read_aedat_save_to_np") else found


def _alone(module: str, failure: Exception) -> ModuleType:
    """A module of ``spikingjelly.datasets``, imported without the other ones, one of which needs a
    torchaudio that fits torch.

    For that the folder becomes a package of another name, without running its ``__init__``.
    """
    name = "spikingjelly._event_data"
    package = ModuleType(name)
    package.__path__ = [str(Path(folder) / "datasets") for folder in spikingjelly.__path__]
    sys.modules[name] = package
    try:
        return importlib.import_module(f"{name}.{module}")
    except (ImportError, OSError) as error:
        del sys.modules[name]
        lacking = getattr(failure, "name", None) or "torchaudio"
        raise ModuleNotFoundError(
            f"SpikingJelly's event data need {lacking}, which is missing or does not fit torch "
            f"{torch.__version__} ({one_line(failure)}); install the {lacking} that belongs to "
            "it, from the index that torch came from"
        ) from error


def _with_readable_recordings(host: Any) -> Any:
    """CIFAR10DVS of SpikingJelly 0.0.0.0.14 with another reader of recordings: its own calls
    ``np.fromstring``, which numpy 2.3 no longer has.
    """

    class CIFAR10DVS(host):
        @staticmethod
        def create_events_np_files(extract_root: str, events_np_root: str) -> None:
            for recording in sorted(Path(extract_root).rglob("*.aedat")):
                target = Path(events_np_root) / recording.parent.name
                target.mkdir(exist_ok=True)
                t, x, y, p = _aedat2(recording)
                np.savez(target / f"{recording.stem}.npz", t=t, x=x, y=y, p=p)

    return CIFAR10DVS


def _aedat2(path: Path) -> Sequence[np.ndarray[Any, Any]]:
    """Times, x, y and polarities of the events of a DVS128 in an AEDAT 2.0 file, the picture
    turned as SpikingJelly turns it.

    The file has lines that begin with #, then two big-endian 32-bit words per event: its address
    and its time. Bit 0 of the address is the polarity, bits 1 to 7 and 8 to 14 are the pixel.
    """
    content = path.read_bytes()
    start = 0
    while content[start : start + 1] == b"#":
        start = content.index(b"\n", start) + 1
    if (len(content) - start) % 8:
        raise UnreadableError(
            f"{path} must hold 8 bytes per event after its header, got {len(content) - start} bytes"
        )
    words = np.frombuffer(content, dtype=">u4", offset=start).astype(np.int64)
    address = words[::2]
    time = words[1::2]
    x = 127 - ((address >> 8) & 0x7F)
    y = 127 - ((address >> 1) & 0x7F)
    polarity = 1 - (address & 1)
    return time, x, y, polarity
