"""Images kept in memory as bytes, frames as bits, or left in their files."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

__all__ = [
    "FileImages",
    "Images",
    "Source",
    "StoredCounts",
    "StoredFrames",
    "StoredImages",
    "contents",
    "shuffled",
]


class StoredImages(Dataset[tuple[Tensor, ...]]):
    """Images as bytes, a quarter of the memory of float32; an item is converted when it is asked
    for. 内存中的图像。

    Args:
        pixels: uint8 [N, C, H, W], from 0 to ``white``.
        labels: Classes, integers [N].
        white: The value that becomes 1.

    Examples:
        >>> images = StoredImages(
        ...     torch.tensor([[[[0, 255]]]], dtype=torch.uint8), torch.tensor([3])
        ... )
        >>> images[0]
        (tensor([[[0., 1.]]]), tensor(3))
    """

    def __init__(self, pixels: Tensor, labels: Tensor, white: float = 255.0) -> None:
        """Keep the bytes; see the class."""
        self.pixels = pixels
        self.labels = labels.long()
        self.white = white

    def __len__(self) -> int:
        """Number of images."""
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        """Image float32 in [0, 1], [C, H, W], and its class, an int64 scalar."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, ...]]:
        """The images of a batch, converted all at once; torch's loader asks for them so."""
        values = self._values(self.pixels[indices])
        return list(zip(values, self.labels[indices], strict=True))

    def _values(self, pixels: Tensor) -> Tensor:
        """What several of the stored rows stand for."""
        return pixels.float().div_(self.white)


class StoredFrames(StoredImages):
    """Binary frames of events, eight values a byte. 内存中的二值事件帧。

    Args:
        bits: uint8 [N, bytes], as ``numpy.packbits`` packs the values of a sample.
        labels: Classes, integers [N].
        shape: (T, 2, H, W) of a sample.

    Examples:
        >>> bits = torch.tensor([[0b10100000]], dtype=torch.uint8)
        >>> frames = StoredFrames(bits, torch.tensor([3]), (1, 2, 1, 2))
        >>> frames[0]
        (tensor([[[[1., 0.]],
        <BLANKLINE>
                 [[1., 0.]]]]), tensor(3))
    """

    def __init__(self, bits: Tensor, labels: Tensor, shape: tuple[int, int, int, int]) -> None:
        """Keep the bits; see the class."""
        super().__init__(bits, labels)
        self.shape = shape

    def _values(self, pixels: Tensor) -> Tensor:
        values = np.unpackbits(pixels.numpy(), axis=-1, count=math.prod(self.shape))
        return torch.from_numpy(values).view(len(pixels), *self.shape).float()


class StoredCounts(StoredImages):
    """Frames of numbers of events, made from stored images when they are asked for.
    由存储图像生成的事件计数帧。

    Args:
        images: The images.
        frames: Numbers of events float32 [N, T, 2, H, W] of bytes [N, 1, H, W] and their white.
    """

    def __init__(self, images: StoredImages, frames: Callable[[Tensor, float], Tensor]) -> None:
        """Keep the images; see the class."""
        super().__init__(images.pixels, images.labels, images.white)
        self.frames = frames

    def _values(self, pixels: Tensor) -> Tensor:
        return self.frames(pixels, self.white)


class FileImages(Dataset[tuple[Tensor, ...]]):
    """Images (or samples of event frames) that stay in their files until they are asked for.
    按需读取的图像。

    Args:
        paths: N files.
        labels: Classes, int64 [N].
        read: The image of a file; a function that a worker process can be sent.
    """

    def __init__(
        self, paths: Sequence[Path], labels: Tensor, read: Callable[[Path], Tensor]
    ) -> None:
        """Keep the names; see the class."""
        self.paths = [str(path) for path in paths]
        self.labels = labels
        self.read = read

    def __len__(self) -> int:
        """Number of images."""
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        """Image float32 in [0, 1], [C, H, W] or frames [T, C, H, W], and its class, an int64
        scalar.
        """
        return self.read(Path(self.paths[index])), self.labels[index]


Images = StoredImages | FileImages | Subset[tuple[Tensor, ...]]


@dataclass(frozen=True)
class Source:
    """A data set as its files give it, before anything is held out of ``train``; see
    ``ImageSplits`` for its fields.
    """

    train: Images
    test: Images
    image_shape: tuple[int, int, int]
    classes: int
    validation: Images | None = None
    frames: bool = False
    class_names: tuple[str, ...] = ()


def contents(images: object) -> list[object]:
    """What tells images and labels from others: pixels, or names and sizes of files.
    数据内容。

    Raises:
        TypeError: If the data set is none of :func:`sj_robust.data.load_images`.

    Examples:
        >>> contents(StoredImages(torch.zeros(2, 1, 1, 1, dtype=torch.uint8), torch.zeros(2)))[1:]
        [255.0, tensor([0, 0])]
    """
    if isinstance(images, Subset):
        return [list(images.indices), *contents(images.dataset)]
    if isinstance(images, StoredFrames):
        return [images.pixels, list(images.shape), images.labels]
    if isinstance(images, StoredImages):
        return [images.pixels, images.white, images.labels]
    if isinstance(images, FileImages):
        return [[_file(Path(path)) for path in images.paths], images.labels]
    raise TypeError(f"images must be those of load_images, got {type(images).__name__}")


def _file(path: Path) -> tuple[str, int]:
    """Name of a file in its folder, and its size, wherever the data set lies."""
    return f"{path.parent.name}/{path.name}", path.stat().st_size


def shuffled(images: Images) -> Subset[tuple[Tensor, ...]]:
    """The same images in an order that never changes and does not follow their classes.
    固定乱序。
    """
    generator = torch.Generator().manual_seed(20240521)
    order = torch.randperm(len(images), generator=generator)
    return Subset(images, order.tolist())
