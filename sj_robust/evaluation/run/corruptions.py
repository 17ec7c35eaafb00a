"""Common corruptions of images at five severities, by imagecorruptions (extra ``corruptions``)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sj_robust.core.checks import check_choice
from sj_robust.core.randomness import SampleSeeds

__all__ = ["CORRUPTIONS", "Corruption", "corrupted", "default_corruptions"]

CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
"""The fifteen common corruptions, in the order of their source."""

_SEEDED = (
    "impulse_noise",
    "glass_blur",
)  # which the library does not draw from NumPy's global generator
_LEAST = 32  # pixels to a side that the library asks for


@dataclass(frozen=True)
class Corruption:
    """One common corruption at one severity. 一种常见图像损坏及其强度。

    Attributes:
        kind: ``"gaussian_noise"``, ``"shot_noise"``, ``"impulse_noise"``, ``"defocus_blur"``,
            ``"glass_blur"``, ``"motion_blur"``, ``"zoom_blur"``, ``"snow"``, ``"frost"``,
            ``"fog"``, ``"brightness"``, ``"contrast"``, ``"elastic_transform"``, ``"pixelate"`` or
            ``"jpeg_compression"``.
        level: Severity, 1 to 5.

    Raises:
        ValueError: If the corruption or the severity does not exist.

    Source: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions
        and Perturbations" (ICLR 2019).

    Examples:
        >>> Corruption("fog", 3).level
        3
    """

    kind: str
    level: int

    def __post_init__(self) -> None:
        check_choice("corruption", self.kind, CORRUPTIONS)
        if isinstance(self.level, bool) or self.level not in (1, 2, 3, 4, 5):
            raise ValueError(
                f"severity of {self.kind} must be an integer from 1 to 5, got {self.level!r}"
            )


def default_corruptions(images: Tensor) -> tuple[Corruption, ...]:
    """Every corruption at every severity. 全部损坏类型与强度。

    Raises:
        ValueError: If these are no images of one or three channels.
        ModuleNotFoundError: If imagecorruptions is not installed.
    """
    check_images_to_corrupt(images)
    return tuple(Corruption(kind, severity) for kind in CORRUPTIONS for severity in range(1, 6))


def check_images_to_corrupt(images: Tensor) -> None:
    """Images have one or three channels, and what corrupts them is installed; raises as
    :func:`default_corruptions`.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            "corruptions need images [N, C, H, W] of 1 or 3 channels, got shape "
            f"{tuple(images.shape)}; event frames have the suite stress"
        )
    _library()


def corrupted(x: Tensor, corruption: Corruption, *, seed: int, start: int = 0) -> Tensor:
    """Images with a corruption, each from its own seed; they pass through 8 bits. 添加常见损坏。

    Images below 32 pixels to a side, which the library refuses, are extended by their edge and cut
    again. Severities are those of ImageNet-C, and harder on small images than those of CIFAR-10-C.
    ``x`` is [N, C, H, W] in [0, 1] of one or three channels; ``start`` is the number of its first
    image in the data set, part of that image's seed.

    Raises:
        ModuleNotFoundError: If imagecorruptions is not installed.
    """
    corrupt = _library()
    high, wide = (max(0, _LEAST - size) for size in x.shape[2:])
    top, left = high // 2, wide // 2
    margin = ((top, high - top), (left, wide - left), (0, 0))
    cut = (slice(top, top + x.shape[2]), slice(left, left + x.shape[3]))
    bytes_of_images = (x * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    seeds = (
        SampleSeeds(range(start, start + len(x)))
        .derived(corruption.kind, corruption.level, seed)
        .seeds
    )
    state = np.random.get_state()  # noqa: NPY002  # the library draws from NumPy's global generator
    found = []
    try:
        for image, own in zip(bytes_of_images, seeds, strict=True):
            np.random.seed(own % 2**32)  # noqa: NPY002
            options = {"seed": own % 2**31} if corruption.kind in _SEEDED else {}
            pixels = np.pad(image, margin, mode="edge")
            done = corrupt(
                pixels, severity=corruption.level, corruption_name=corruption.kind, **options
            )[cut]
            found.append(done if x.shape[1] == 3 else done.mean(2, keepdims=True))
    finally:
        np.random.set_state(state)  # noqa: NPY002
    corrupted_images = torch.from_numpy(np.stack(found))
    return corrupted_images.permute(0, 3, 1, 2).to(x) / 255


def _library() -> Callable[..., Any]:
    try:
        from imagecorruptions import corrupt
    except ImportError as error:
        raise ModuleNotFoundError(
            f"the suite corruptions needs imagecorruptions ({error}): pip install "
            "'sj_robust[corruptions]'"
        ) from error
    corruption: Callable[..., Any] = corrupt
    return corruption
