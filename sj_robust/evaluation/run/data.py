"""Images and labels of an evaluation, read, checked and hashed once."""

import tempfile
from collections.abc import Iterable, Iterator, Sized
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import IO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sj_robust.attacks.events import check_frames
from sj_robust.core.checks import check_labels, check_samples
from sj_robust.core.digest import fingerprint
from sj_robust.core.threat import ThreatModel
from sj_robust.data import image_loader

__all__ = ["Batches", "Data", "check_data", "given_data"]

Batches = Iterable[tuple[Tensor, ...]]
"""Images and labels in batches."""

_IN_MEMORY = 2 * 2**30
"""Bytes of images that are kept in memory; further ones lie in a temporary file."""
_ALIGNMENT = 64


@dataclass(frozen=True, eq=False)
class Data:
    """Images with labels in batches, as one pass over them gave them. 评估数据，只读取一次。

    Whoever evaluates takes the batches from here, so that a loader is read once, by
    :meth:`of`. What it gives in that pass counts for the whole evaluation, every batch of it: one
    that shuffles or augments gives one order and one augmentation, and other ones to the next
    evaluation, whose folder then refuses them. Images are copied, so that nobody else can change
    them; above 2 GB the further ones lie in a temporary file that is mapped into memory.

    Attributes:
        batches: Images [n, ...] and labels [n] of every batch.
        digests: Digest of every image.

    Raises:
        ValueError: If there are no images.

    Examples:
        >>> x, y = torch.rand(3, 4), torch.tensor([0, 1, 1])
        >>> data = Data.of([(x[:2], y[:2]), (x[2:], y[2:])])
        >>> len(data), data.labels, data[1][0].shape
        (2, (0, 1, 1), torch.Size([1, 4]))
    """

    batches: tuple[tuple[Tensor, Tensor], ...]
    digests: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.digests:
            raise ValueError("x must contain at least one image, got none; give test images")

    @classmethod
    def of(cls, batches: "Batches | Data") -> "Data":
        """What one pass over the batches gives, without empty ones; data stay what they are.

        Raises:
            TypeError: If images are not floating point or labels not int64.
            ValueError: If images or labels do not fit, batches are unlike, or there are no images.
        """
        if isinstance(batches, Data):
            return batches
        kept: list[tuple[Tensor, Tensor]] = []
        with closing(_Store()) as store:
            for number, batch in enumerate(batches, 1):
                x, y = _images_and_labels(batch)
                if x.shape[:1] == y.shape[:1] == (0,):
                    continue
                check_samples(x)
                check_labels(y, x)
                if kept:
                    _check_alike(x, kept[0][0], number)
                kept.append((store.keep(x), y.detach().clone()))
        digests: list[str] = []
        for x, _ in kept:
            digests += map(fingerprint, x)
        return cls(tuple(kept), tuple(digests))

    @classmethod
    def of_tensors(cls, x: Tensor, y: Tensor, batch_size: int) -> "Data":
        """Images [N, ...] and labels [N] that are in memory already, and are not copied.

        Raises:
            TypeError: As :meth:`of`.
            ValueError: As :meth:`of`.
        """
        check_samples(x)
        check_labels(y, x)
        batches = zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True)
        return cls(tuple(batches), tuple(map(fingerprint, x)))

    @cached_property
    def labels(self) -> tuple[int, ...]:
        """Class of every image."""
        found: list[int] = []
        for _, y in self:
            found += y.tolist()
        return tuple(found)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of images in every batch."""
        return tuple(len(y) for _, y in self)

    @property
    def batch_size(self) -> int:
        """Number of images in the largest batch, for whatever else runs several at a time."""
        return max(self.sizes)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of all images and labels in their order, whatever the batch size."""
        return fingerprint([self.digests, self.labels])

    def first(self, count: int) -> "Data":
        """The first images in their batches, without a copy. 前若干图像。"""
        few = []
        left = count
        for x, y in self:
            if left > 0:
                few.append((x[:left], y[:left]))
            left -= len(y)
        return Data(tuple(few), self.digests[:count])

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """All images and labels as two tensors on a device."""
        x, y = (torch.cat(parts) for parts in zip(*self, strict=True))
        return x.to(device), y.to(device)

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Images and labels of one batch."""
        return self.batches[index]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every batch."""
        return iter(self.batches)


def given_data(
    x: Tensor | Batches | Dataset[tuple[Tensor, ...]], y: Tensor | None, batch_size: int
) -> Data:
    """What a user gives for images and labels: two tensors, a data set, a loader or batches.
    用户给出的图像与标签。

    Raises:
        TypeError: As :meth:`Data.of`.
        ValueError: As :meth:`Data.of`; and if ``y`` is missing, or given beside labels, or images
            of a data set differ in size.
    """
    if isinstance(x, Tensor):
        if y is None:
            raise ValueError(
                "y must hold the labels of x, got None; or give a DataLoader in place of x and y"
            )
        return Data.of_tensors(x, y, batch_size)
    if not isinstance(x, Iterable | Dataset) or isinstance(x, str | bytes | dict | np.ndarray):
        raise TypeError(
            "x must be a tensor of images, a data set or batches (images, labels), got "
            f"{type(x).__name__}; give torch.as_tensor(x) and labels y, or a DataLoader"
        )
    if y is not None:
        raise ValueError(
            f"y must be None where x brings its own labels, got both with x a {type(x).__name__}"
        )
    batches = image_loader(x, batch_size) if isinstance(x, Dataset) else x
    try:
        return Data.of(batches)
    except RuntimeError:
        if isinstance(batches, DataLoader):
            _check_sizes(batches.dataset)
        raise


def _check_sizes(dataset: object) -> None:
    """Raise ValueError where images differ in size, of which a loader makes no batch."""
    if not isinstance(dataset, Dataset) or not isinstance(dataset, Sized):
        return
    first: list[int] | None = None
    for index in range(len(dataset)):
        image = dataset[index][0]
        if not isinstance(image, Tensor):
            return
        shape = list(image.shape)
        first = first or shape
        if shape != first:
            raise ValueError(
                f"x must hold images of shape {first} as x[0], got {shape} in x[{index}]; resize "
                "or crop all images to the same size"
            )


def _images_and_labels(batch: object) -> tuple[Tensor, Tensor]:
    """The two tensors that a batch begins with."""
    parts = batch[:2] if isinstance(batch, list | tuple) else ()
    if len(parts) < 2 or not all(isinstance(part, Tensor) for part in parts):
        raise TypeError(
            "every batch of x must be a pair of tensors (images, labels), got "
            f"{type(batch).__name__}; give a tensor of images and labels y, or a DataLoader"
        )
    return parts[0], parts[1]


def _check_alike(x: Tensor, first: Tensor, number: int) -> None:
    """Images of a batch go together with those of the first one."""
    if x.shape[1:] != first.shape[1:]:
        raise ValueError(
            f"batch {number} of x must hold images of shape {list(first.shape[1:])} as the first, "
            f"got {list(x.shape[1:])}; resize or crop all images to the same size"
        )
    if x.dtype != first.dtype:
        raise ValueError(
            f"batch {number} of x must be {first.dtype} as the first, got {x.dtype}; convert all "
            f"images with x.to({first.dtype})"
        )


def check_data(data: Data, threat: ThreatModel) -> None:
    """For a threat of events, raise an error unless all samples are event frames that it allows.

    Raises:
        ValueError: If frames have another shape or hold another value.
    """
    if threat.of_events:
        for x, _ in data:
            check_frames(x, counts=threat.counts)


class _Store:
    """Copies of tensors, in memory as long as they fit."""

    def __init__(self) -> None:
        self._left = _IN_MEMORY
        self._file: IO[bytes] | None = None

    def keep(self, x: Tensor) -> Tensor:
        """A copy of ``x`` that nobody else knows."""
        size = x.numel() * x.element_size()
        with torch.inference_mode(False):
            if size == 0 or size <= self._left:
                self._left -= size
                return x.detach().clone()
            return self._mapped(x.detach().cpu().contiguous(), size)

    def close(self) -> None:
        """Close the file, which lives on as long as it is mapped."""
        if self._file is not None:
            self._file.close()

    def _mapped(self, x: Tensor, size: int) -> Tensor:
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  close() closes it
        start = self._file.seek(0, 2)
        start += -start % _ALIGNMENT
        self._file.seek(start)
        self._file.write(x.reshape(-1).view(torch.uint8).numpy().data)
        self._file.flush()
        content = np.memmap(self._file, np.uint8, "r+", start, (size,))
        return torch.from_numpy(content).view(x.dtype).view(x.shape)
