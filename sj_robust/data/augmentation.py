"""Random rotation, scaling, crop, flip and Cutout of training images."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sj_robust.core.checks import check_count, check_number, check_size, check_switch
from sj_robust.core.randomness import SampleDraws, SampleSeeds, rand

__all__ = ["Augmentation"]


@dataclass(frozen=True)
class Augmentation:
    """Rotate, resize, shift, mirror and partly cover images at random, determined by the seed of
    each image.

    训练图像的随机旋转、缩放、裁剪、翻转和遮挡。

    Equation: rotate the image around its centre by an angle uniform on
    [-``rotation``, ``rotation``] and enlarge it by a factor uniform on
    [1 - ``scale``, 1 + ``scale``], with bilinear interpolation and zeros outside the image; pad H
    and W by ``padding`` zeros on every side and crop [H, W] at an offset uniform on
    {0, ..., 2 padding}^2; mirror left and right with probability 1/2; set to zero the square of
    ``cutout`` pixels around a centre uniform on the image, rows [c - cutout/2, c + cutout/2) and
    columns alike, clipped at the borders.

    The numbers of an image are drawn on the CPU from its own seed, so that they depend neither on
    the other images of the batch nor on the process or the device. All frames of a sample are
    treated in the same way.

    Attributes:
        padding: Largest shift of an image in pixels; 0 for no crop.
        flip: Whether images are mirrored.
        cutout: Side of the square, even; 0 for none.
        rotation: Largest angle in degrees, at most 180; 0 for no rotation.
        scale: Largest relative change of size, below 1; 0 for none.

    Raises:
        TypeError: If a value has the wrong type, or images that are rotated or resized are not
            floating point.
        ValueError: If a number is out of range, or there is not one seed per image.

    Source: Ding et al. (ICML 2024), section 5, who use padding 4, flips and cutout 16; cutout of
    DeVries and Taylor (2017, arXiv 1708.04552), whose square may lie partly outside the image.
    Rotation and scaling are not in the paper.

    Examples:
        >>> images = torch.rand(2, 3, 32, 32)
        >>> both = Augmentation()(images, [7, 8])
        >>> torch.equal(both[1:], Augmentation()(images[1:], [8]))
        True
    """

    padding: int = 4
    flip: bool = True
    cutout: int = 16
    rotation: float = 0.0
    scale: float = 0.0

    def __post_init__(self) -> None:
        check_count("padding", self.padding, least=0)
        check_switch("flip", self.flip)
        check_count("cutout", self.cutout, least=0)
        if self.cutout % 2:
            raise ValueError(
                f"cutout must be an even number of pixels, 0 for none, got {self.cutout}"
            )
        check_number("rotation", check_size("rotation", self.rotation), most=180.0)
        if check_size("scale", self.scale) >= 1:
            raise ValueError(
                f"scale must be below 1, got {self.scale}; 0.1 gives sizes from 0.9 to 1.1"
            )

    def __call__(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Augmented copies of images [N, C, H, W], or of frames [N, T, C, H, W]."""
        if images.ndim < 4 or len(seeds) != len(images):
            raise ValueError(
                f"images must be [N, C, H, W] with one seed each, got shape {list(images.shape)} "
                f"and {len(seeds)} seeds"
            )
        height, width = images.shape[-2:]
        uniform = _drawn(5, SampleSeeds(seeds).derived("augmentation"))
        offsets = 2 * self.padding + 1
        orientations = 2 if self.flip else 1
        choices = torch.tensor([offsets, offsets, orientations, height, width])
        drawn = (uniform * choices).long().to(images.device)
        top, left, mirrored, row, column = drawn.unbind(1)
        planes = images.reshape(len(images), -1, height, width)
        if self.rotation or self.scale:
            planes = self._rotated(planes, SampleSeeds(seeds).derived("rotation and size"))
        if self.padding or self.flip:
            planes = self._moved(planes, top, left, mirrored)
        if self.cutout:
            rows = self._in_square(row, height)
            columns = self._in_square(column, width)
            square = rows[:, None, :, None] & columns[:, None, None, :]
            planes = planes.masked_fill(square, 0)
        return planes.reshape(images.shape)

    def _rotated(self, planes: Tensor, seeds: SampleSeeds) -> Tensor:
        """Planes [N, K, H, W], rotated and resized around their centre, in float32 at least, since
        torch's interpolation of half precision on the CPU gives NaN for some sizes.

        ``to_source`` [N, 2, 3] maps a pixel of the result to the point of the image whose value it
        gets. Both are in torch's coordinates, which run from -1 to 1 over the width and the height.
        """
        if not planes.is_floating_point():
            raise TypeError(
                f"rotation and scale need floating-point images, got {planes.dtype}; use "
                "x.float() / 255"
            )
        height, width = planes.shape[-2:]
        angle, size = (2 * _drawn(2, seeds) - 1).unbind(1)
        angle = math.radians(float(self.rotation)) * angle
        shrink = 1 / (1 + float(self.scale) * size)
        to_source = torch.zeros(len(planes), 2, 3, dtype=torch.float64)
        to_source[:, 0, 0] = to_source[:, 1, 1] = shrink * angle.cos()
        to_source[:, 0, 1] = -shrink * angle.sin() * height / width
        to_source[:, 1, 0] = shrink * angle.sin() * width / height
        precise = planes.to(torch.promote_types(planes.dtype, torch.float32))
        points = F.affine_grid(to_source.to(precise), list(planes.shape), align_corners=False)
        rotated = F.grid_sample(precise, points, padding_mode="zeros", align_corners=False)
        darkest = precise.amin((2, 3), keepdim=True).clamp(max=0)
        brightest = precise.amax((2, 3), keepdim=True).clamp(min=0)
        rotated = rotated.clamp(darkest, brightest)  # rounding may exceed them by 1 part in 10^7
        return rotated.to(planes.dtype)

    def _moved(self, planes: Tensor, top: Tensor, left: Tensor, mirrored: Tensor) -> Tensor:
        """Planes [N, K, H, W], padded, cropped and mirrored.

        Pixel (i, j) of the result is pixel (top + i, left + j) of the padded plane; j counts from
        the right where it is mirrored.
        """
        channels, height, width = planes.shape[1:]
        padded = F.pad(planes, [self.padding] * 4)
        i = torch.arange(height, device=planes.device)
        j = torch.arange(width, device=planes.device)
        rows = top[:, None] + i
        is_mirrored = mirrored[:, None] > 0
        columns = left[:, None] + torch.where(is_mirrored, width - 1 - j, j)
        pixels = rows[:, :, None] * padded.shape[3] + columns[:, None, :]
        of_all_channels = pixels.view(-1, 1, height * width).expand(-1, channels, -1)
        moved = padded.flatten(2).gather(2, of_all_channels)
        return moved.view(planes.shape)

    def _in_square(self, centre: Tensor, side: int) -> Tensor:
        """Which of the rows (or columns) the square around a centre [N] covers, [N, side] bool."""
        half = self.cutout // 2
        offset = torch.arange(side, device=centre.device) - centre[:, None]
        return (offset >= -half) & (offset < half)


def _drawn(numbers: int, seeds: SampleSeeds) -> Tensor:
    """Uniform numbers on [0, 1) per seed, [N, numbers] float64 on the CPU."""
    shape = (len(seeds), numbers)
    return rand(shape, SampleDraws(seeds), dtype=torch.float64, device=torch.device("cpu"))
