"""Random crop, flip and cutout of training images."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sj_robust.core.randomness import SampleDraws, SampleSeeds, rand

__all__ = ["Augmentation"]


@dataclass(frozen=True)
class Augmentation:
    """Shift, mirror and cover images at random, all at once; what an image gets follows from its
    seed alone.

    训练图像的随机裁剪、翻转和遮挡。

    Equation: pad H and W by ``padding`` zeros on every side and crop [H, W] at an offset uniform on
    {0, ..., 2 padding}^2; mirror left and right with probability 1/2; set to zero the square of
    ``cutout`` pixels around a centre uniform on the image, rows [c - cutout/2, c + cutout/2) and
    columns alike, clipped at the borders.

    The five numbers of an image are drawn on the CPU from its own seed, so that they depend neither
    on the images beside it nor on the process or the device. Frames of one sample are all treated
    alike.

    Attributes:
        padding: Pixels that an image may be shifted by; 0 for no crop.
        flip: Whether images are mirrored.
        cutout: Side of the square, even; 0 for none.

    Raises:
        ValueError: If a number is out of range, or there is not one seed per image.

    Source: Ding et al. (ICML 2024), section 5, who take 4, flip and 16; cutout of DeVries and
    Taylor (2017, arXiv 1708.04552), whose square may lie partly outside of the image.

    Examples:
        >>> images = torch.rand(2, 3, 32, 32)
        >>> both = Augmentation()(images, [7, 8])
        >>> torch.equal(both[1:], Augmentation()(images[1:], [8]))
        True
    """

    padding: int = 4
    flip: bool = True
    cutout: int = 16

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise ValueError(f"padding must be >= 0, got {self.padding}")
        if self.cutout < 0 or self.cutout % 2:
            raise ValueError(
                f"cutout must be an even number of pixels, 0 for none, got {self.cutout}"
            )

    def __call__(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Images [N, C, H, W], or frames [N, T, C, H, W], of the same shape, dtype and device; the
        given ones stay.
        """
        if images.ndim < 4 or len(seeds) != len(images):
            raise ValueError(
                f"images must be [N, C, H, W] with one seed each, got shape {list(images.shape)} "
                f"and {len(seeds)} seeds"
            )
        height, width = images.shape[-2:]
        drawn = rand(
            (len(images), 5),
            SampleDraws(SampleSeeds(seeds).derived("augmentation")),
            dtype=torch.float64,
            device=torch.device("cpu"),
        )
        shifts = 2 * self.padding + 1
        sides = torch.tensor([shifts, shifts, 2 if self.flip else 1, height, width])
        top, left, mirrored, *centre = (drawn * sides).long().to(images.device).unbind(1)
        planes = images.reshape(len(images), -1, height, width)
        if self.padding or self.flip:
            planes = self._moved(planes, top, left, mirrored)
        if self.cutout:
            planes = planes.masked_fill(self._covered(planes, *centre), 0)
        return planes.reshape(images.shape)

    def _moved(self, planes: Tensor, top: Tensor, left: Tensor, mirrored: Tensor) -> Tensor:
        """Planes [N, K, H, W] cropped out of their padded selves, and mirrored."""
        height, width = planes.shape[2:]
        rows, columns = (torch.arange(side, device=planes.device) for side in (height, width))
        columns = torch.where(mirrored[:, None] > 0, width - 1 - columns, columns) + left[:, None]
        rows = rows + top[:, None]
        padded = F.pad(planes, [self.padding] * 4)
        pixels = (rows[:, :, None] * padded.shape[3] + columns[:, None, :]).flatten(1)
        moved = padded.flatten(2).gather(2, pixels[:, None].expand(-1, planes.shape[1], -1))
        return moved.view(planes.shape)

    def _covered(self, planes: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """Where the square lies, [N, 1, H, W]."""
        half = self.cutout // 2
        inside = []
        for side, centre in zip(planes.shape[2:], (row, column), strict=True):
            offset = torch.arange(side, device=planes.device) - centre[:, None]
            inside.append((offset >= -half) & (offset < half))
        return inside[0][:, None, :, None] & inside[1][:, None, None, :]
