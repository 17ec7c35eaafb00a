"""The user's data set as pairs of an image and its class, each item checked when it is read."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["CheckedImages"]

_TRIED = 32
"""Images that are read at once, by which most data sets of mixed items are told."""


class CheckedImages(Dataset[tuple[Tensor, Tensor]]):
    """Images alike and their classes of a data set whose items are such pairs.
    检查用户数据集的样本。

    Args:
        name: Name of the argument, for the message.
        dataset: The data set, which has a length.

    Raises:
        TypeError: If an item is no pair of an image, as a tensor, and a class number.
        ValueError: If there are no images, or one is unlike the first in shape or dtype.

    Examples:
        >>> images = CheckedImages("data", [(torch.zeros(1, 2, 2), 3)])
        >>> images[0][1]
        tensor(3)
    """

    def __init__(self, name: str, dataset: Any) -> None:
        """Read the first items; see the class."""
        self.name = name
        self.dataset = dataset
        self._first: Tensor | None = None
        if not len(self):
            raise ValueError(f"{name} must contain at least one image, got none")
        for index in range(min(len(self), _TRIED)):
            image, _ = self[index]
            if self._first is None:
                self._first = image

    def __len__(self) -> int:
        """Number of images."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image and its class, an int64 scalar."""
        item = self.dataset[index]
        which = f"{self.name}[{index}]"
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise TypeError(
                f"{which} must be a pair (image, class), got {_shown(item)}; wrap the data set in "
                "one whose __getitem__ returns such a pair"
            )
        image, label = item
        if not isinstance(image, Tensor):
            raise TypeError(
                f"the image of {which} must be a tensor [C, H, W], got {_shown(image)}; add "
                "torchvision's ToTensor to the transforms of the data set"
            )
        number = torch.as_tensor(label) if isinstance(label, int | np.generic | Tensor) else None
        if number is None or number.ndim or number.dtype not in _INTEGERS:
            raise TypeError(
                f"the class of {which} must be an integer, got {_shown(label)}; number the classes "
                "from 0, and give label.argmax() of a one-hot label"
            )
        first = image if self._first is None else self._first
        if image.shape != first.shape or image.dtype != first.dtype:
            raise ValueError(
                f"the image of {which} must be {_shown(first)} as that of {self.name}[0] is, got "
                f"{_shown(image)}; resize or crop all images to the same size, in one dtype"
            )
        return image, number.long()


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _shown(value: object) -> str:
    """A value in a few words."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, dict):
        return f"a dict of {', '.join(map(repr, value))}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {', '.join(map(_shown, value))}"
    return type(value).__name__
