"""Digits and Fashion-MNIST as tensors in [0, 1], split into training, validation and test images."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from sj_robust.data.idx import read_idx

__all__ = ["DATASETS", "ImageSplits", "load_images"]


@dataclass(frozen=True)
class ImageSplits:
    """One data set in three parts; every item is an image [C, H, W] in [0, 1] and its class. 划分后的图像数据集。

    Attributes:
        name: Name of the data set.
        train: Images to train on.
        validation: Images held out of the training set, to select a network by.
        test: Images for the final figures only.
        image_shape: (C, H, W) of one image.
        classes: Number of classes.
    """

    name: str
    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset
    image_shape: tuple[int, int, int]
    classes: int


def load_images(
    name: str,
    *,
    root: str | Path = "data",
    validation_fraction: float = 0.1,
    seed: int = 0,
    train_limit: int | None = None,
    test_limit: int | None = None,
) -> ImageSplits:
    """Load a data set and hold a validation split out of its training images. 加载数据集并划分验证集。

    Args:
        name: ``"digits"`` (ships with scikit-learn: 1797 images of 8x8; a fixed fifth is the test set) or
            ``"fashion_mnist"`` (28x28).
        root: Folder with the data: the four IDX files themselves, gzipped or not, or torchvision's
            ``FashionMNIST/raw``. Not used by digits.
        validation_fraction: Share of the training images that is held out.
        seed: Decides which images are held out; the test images never depend on it.
        train_limit: Number of training images to use at most, the validation split included.
        test_limit: Number of test images to use at most.

    Returns:
        The three parts.

    Raises:
        ValueError: If the name is unknown, a number is out of range, or a file is not what it should be.
        FileNotFoundError: If the data is not there; the message says which files, where and how to get them.
        ModuleNotFoundError: If digits are asked for and scikit-learn is not installed.

    Example:
        >>> splits = load_images("digits")
        >>> len(splits.train), len(splits.validation), len(splits.test)
        (1294, 143, 360)
    """
    if name not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {name!r}")
    for option, limit in (("train_limit", train_limit), ("test_limit", test_limit)):
        if limit is not None and limit < 1:
            raise ValueError(f"{option} must be >= 1, or None for all images, got {limit}")
    train, test = DATASETS[name](Path(root))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:train_limit]
    held_out = int(validation_fraction * len(order))
    if not 0 < held_out < len(order):
        raise ValueError(
            f"validation_fraction must leave images on both sides, got {validation_fraction} of {len(order)} images"
        )
    return ImageSplits(
        name=name,
        train=_part(train, order[held_out:]),
        validation=_part(train, order[:held_out]),
        test=_part(test, torch.arange(len(test))[:test_limit]),
        image_shape=(1, train.pixels.shape[1], train.pixels.shape[2]),
        classes=int(train.labels.max()) + 1,
    )


@dataclass(frozen=True)
class _RawImages:
    """Grey images [N, H, W] whose values run from 0 to ``white``, and their classes [N]."""

    pixels: Tensor
    labels: Tensor
    white: float

    def __len__(self) -> int:
        return len(self.pixels)


def _part(raw: _RawImages, indices: Tensor) -> TensorDataset:
    return TensorDataset(raw.pixels[indices].float().div(raw.white).unsqueeze(1), raw.labels[indices].long())


def _digits(root: Path) -> tuple[_RawImages, _RawImages]:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits ship with scikit-learn, which is not installed: pip install 'sj_robust[recipes]'"
        ) from error
    bunch = load_digits()
    pixels, labels = torch.from_numpy(bunch.images), torch.from_numpy(bunch.target)
    # The set has no official split and is sorted by writer: a fixed shuffle, whatever the seed of the run.
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(20240521))
    train, test = order[360:], order[:360]
    return _RawImages(pixels[train], labels[train], 16.0), _RawImages(pixels[test], labels[test], 16.0)


def _fashion_mnist(root: Path) -> tuple[_RawImages, _RawImages]:
    folders = (root, root / "FashionMNIST" / "raw")
    found: dict[str, Path] = {}
    for name in _IDX_FILES:
        candidates = (folder / (name + ending) for folder in folders for ending in ("", ".gz"))
        path = next((path for path in candidates if path.is_file()), None)
        if path is not None:
            found[name] = path
    missing = [name for name in _IDX_FILES if name not in found]
    if missing:
        raise FileNotFoundError(
            f"Fashion-MNIST is not complete: {', '.join(missing)} (each may end in .gz) not found in "
            f"{' or '.join(str(folder.resolve()) for folder in folders)}. Get it with\n"
            f"  python -c \"from torchvision.datasets import FashionMNIST; FashionMNIST('{root}', download=True)\"\n"
            "or, on Debian and Ubuntu, apt-get install dataset-fashion-mnist and "
            "--data-root /usr/share/datasets/fashion-mnist"
        )
    tensors = []
    for name, path in found.items():
        tensor = read_idx(path)
        expected = 3 if "images" in name else 1
        if tensor.ndim != expected:
            raise ValueError(f"{path} must hold an array of {expected} dimensions, got {tensor.ndim}: is it misnamed?")
        tensors.append(tensor)
    for images, labels in (tensors[:2], tensors[2:]):
        if len(images) != len(labels):
            raise ValueError(
                f"{root} holds {len(images)} images but {len(labels)} labels: the files do not belong together"
            )
    return _RawImages(tensors[0], tensors[1], 255.0), _RawImages(tensors[2], tensors[3], 255.0)


_IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

DATASETS: dict[str, Callable[[Path], tuple[_RawImages, _RawImages]]] = {
    "digits": _digits,
    "fashion_mnist": _fashion_mnist,
}
"""Data sets by name: from the root folder to training and test images."""
