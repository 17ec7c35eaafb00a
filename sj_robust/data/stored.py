"""Images held in memory as bytes or left in their files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

__all__ = ["FileImages", "Images", "Source", "StoredImages", "shuffled"]


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
        return self.pixels[index].float().div(self.white), self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, ...]]:
        """The images of a batch, converted all at once; torch's loader asks for them so."""
        return list(
            zip(self.pixels[indices].float().div_(self.white), self.labels[indices], strict=True)
        )


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


def shuffled(images: Images) -> Subset[tuple[Tensor, ...]]:
    """The same images in an order that never changes and does not follow their classes.
    固定乱序。
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(20240521))
    return Subset(images, order.tolist())
