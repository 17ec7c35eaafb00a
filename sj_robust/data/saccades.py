"""Event frames made from images by three saccades of a camera, as in N-MNIST."""

import hashlib
import math
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sj_robust.core.folders import check_folder
from sj_robust.core.saved import load_tensors, whole_file
from sj_robust.data.stored import Source, StoredCounts, StoredFrames, StoredImages

__all__ = ["saccade_frames"]

_CORNERS = ((-1, 1), (0, -1), (1, 1), (-1, 1))
"""Where the saccades begin and end, (x, y) in units of their amplitude: an isosceles triangle."""

_STEPS = 16
"""Positions of the image in a saccade."""

_MOST_FRAMES = 3 * _STEPS
"""Frames of a sample at most: one for every position."""

_DARK = 0.1
"""Intensity that a black pixel reflects, in units of a white one's."""

_THRESHOLD = 0.3
"""Change of log intensity that makes an event."""

_MISMATCH = 0.05
"""The thresholds of the sensor's pixels are within this share of it, drawn once with a fixed
seed.
"""

_UNIT = 2**16
"""Log intensities are integers in units of 1 / 65536, so that every machine makes the same
events.
"""

_TOGETHER = 128
"""Images that are turned into events together."""

_VERSION = 1


def saccade_frames(
    source: Source, T: int, *, counts: bool = False, cache: str | None = None
) -> Source:
    """Images [1, H, W] as T frames [T, 2, H + 2a, W + 2a] of events each. 由图像生成事件帧。

    Equation: the image lies on black ground and moves along the triangle (-a, a), (0, -a), (a, a),
    (-a, a) in 48 steps, with a = 3 for 28 pixels. With I its intensity at a pixel of the camera,
    interpolated bilinearly, and r what the pixel remembers, at first L::

        L = log(I + 0.1),   |L - r| >= theta: an event, r moves by the multiple of theta towards L

    Frame t holds the steps 48 t / T to 48 (t + 1) / T, and of each pixel whether there was a fall
    (channel 0) or a rise (channel 1), or with ``counts`` how many. theta is 0.3, up to 5 % less or
    more at a pixel.

    Args:
        source: Images as bytes.
        T: Frames, 1 to 48.
        counts: Whether frames hold the numbers of events, which are made whenever a sample is asked
            for.
        cache: Name of the file where they are kept, in ``sj_robust`` in ``XDG_CACHE_HOME`` or
            ``~/.cache``; None for images that are few, whose events are made again.

    Raises:
        ValueError: If T is too large, or the file is damaged or cannot be written.

    Source: Orchard et al., "Converting Static Image Datasets to Spiking Neuromorphic Datasets
        Using Saccades" (Frontiers in Neuroscience 2015); events of a pixel as in ESIM (Rebecq et
        al., CoRL 2018).
    """
    if T > _MOST_FRAMES:
        raise ValueError(
            f"T must be <= {_MOST_FRAMES} for saccades, which have as many steps, got {T}"
        )
    train, test = source.train, source.test
    assert isinstance(train, StoredImages)
    assert isinstance(test, StoredImages)
    _, height, width = source.image_shape
    margin = 2 * _amplitude(height)
    shape = (T, 2, height + margin, width + margin)
    if counts:
        frames = partial(_counted, T=T)
        return replace(
            source,
            train=StoredCounts(train, frames),
            test=StoredCounts(test, frames),
            image_shape=shape[1:],
            frames=True,
        )
    if cache is None:
        bits = {"train": _bits(train, T), "test": _bits(test, T)}
    else:
        bits = _kept(train, test, T, cache)
    return Source(
        train=StoredFrames(bits["train"], train.labels, shape),
        test=StoredFrames(bits["test"], test.labels, shape),
        image_shape=shape[1:],
        classes=source.classes,
        frames=True,
        class_names=source.class_names,
    )


def _kept(train: StoredImages, test: StoredImages, T: int, name: str) -> dict[str, Tensor]:
    """Frames of a file of the cache folder, which is made if it is not there."""
    digest = hashlib.sha256()
    for part in (train, test):
        digest.update(part.pixels.numpy().tobytes())
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(home).expanduser() / "sj_robust"
    path = folder / f"saccade-{name}-T{T}-v{_VERSION}-{digest.hexdigest()[:12]}.pt"
    if not path.is_file():
        check_folder("XDG_CACHE_HOME", folder)  # before a minute of work
        bits = {"train": _bits(train, T), "test": _bits(test, T)}
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            torch.save(bits, file)
        return bits
    remedy = "remove it, and it is made again"
    found: dict[str, Tensor] = load_tensors(path, what="event frames of saccades", remedy=remedy)
    return found


def _bits(images: StoredImages, T: int) -> Tensor:
    """Frames of all images, 8 values a byte: uint8 [N, ceil(T * 2 * height * width / 8)]."""
    logs = _log_intensities(round(images.white))
    parts = []
    for pixels in torch.split(images.pixels, _TOGETHER):
        frames = _events(pixels[:, 0].int(), T, logs) > 0
        packed = np.packbits(frames.flatten(1).numpy(), axis=1)
        parts.append(torch.from_numpy(packed))
    return torch.cat(parts)


def _counted(pixels: Tensor, white: float, T: int) -> Tensor:
    """Numbers of events, float32 [N, T, 2, height, width], of images [N, 1, H, W] as bytes."""
    logs = _log_intensities(round(white))
    return _events(pixels[:, 0].int(), T, logs).float()


def _events(pixels: Tensor, T: int, logs: Tensor) -> Tensor:
    """Numbers of events, int32 [N, T, 2, height, width], of images [N, H, W] from 0 to white, whose
    log intensities are those of :func:`_log_intensities`.
    """
    amplitude = _amplitude(pixels.shape[1])
    ground = 2 * amplitude + 1
    padded = F.pad(pixels, (ground, ground, ground, ground))
    first, *positions = _positions(amplitude)
    remembered = logs[_seen(padded, amplitude, first)]
    size = remembered.shape[1:]
    thresholds = _thresholds(size)
    frames = torch.zeros(len(pixels), T, 2, *size, dtype=torch.int32)
    for step, position in enumerate(positions):
        change = logs[_seen(padded, amplitude, position)] - remembered
        number = change.abs() // thresholds
        frame = frames[:, step * T // _MOST_FRAMES]
        frame[:, 0] += number * (change < 0)
        frame[:, 1] += number * (change > 0)
        remembered = remembered + change.sign() * number * thresholds
    return frames


def _amplitude(side: int) -> int:
    """Largest shift of an image of so many pixels: 3 for 28, as N-MNIST has 34."""
    return max(1, round(3 * side / 28))


def _positions(amplitude: int) -> list[tuple[int, int]]:
    """Places (x, y) of the image in units of 1 / 16 pixel, the first before anything moves."""
    x, y = _CORNERS[0]
    found = [(amplitude * x * _STEPS, amplitude * y * _STEPS)]
    for to_x, to_y in _CORNERS[1:]:
        for step in range(1, _STEPS + 1):
            place_x = amplitude * (x * _STEPS + (to_x - x) * step)
            place_y = amplitude * (y * _STEPS + (to_y - y) * step)
            found.append((place_x, place_y))
        x, y = to_x, to_y
    return found


def _seen(padded: Tensor, amplitude: int, position: tuple[int, int]) -> Tensor:
    """Intensities that the camera sees, int64 [N, height, width] from 0 to 256 times white.

    Where nothing has moved its first pixel is at ``amplitude + 1`` of the padded image.
    """
    x, y = position
    start = _STEPS * (amplitude + 1)
    left, right_share = divmod(start - x, _STEPS)
    top, lower_share = divmod(start - y, _STEPS)
    left_share = _STEPS - right_share
    upper_share = _STEPS - lower_share
    margin = 2 * amplitude + 2
    height = padded.shape[1] - margin
    width = padded.shape[2] - margin
    rows = padded[:, top : top + height + 1]
    between = upper_share * rows[:, :-1] + lower_share * rows[:, 1:]
    columns = between[:, :, left : left + width + 1]
    seen = left_share * columns[:, :, :-1] + right_share * columns[:, :, 1:]
    return seen.long()


def _log_intensities(white: int) -> Tensor:
    """Log intensity of every value of :func:`_seen`, int32."""
    largest = _STEPS * _STEPS * white
    logs = []
    for value in range(largest + 1):
        log = math.log(value / largest + _DARK)
        logs.append(round(_UNIT * log))
    return torch.tensor(logs, dtype=torch.int32)


def _thresholds(size: torch.Size) -> Tensor:
    """Thresholds of the pixels, int32 [height, width]."""
    usual = round(_UNIT * _THRESHOLD)
    spread = round(usual * _MISMATCH)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(-spread, spread + 1, size, generator=generator)
    return (usual + drawn).int()
