"""Data sets by name, split into training, validation and test images."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Subset, TensorDataset

from sj_robust.core.checks import check_choice, check_count, check_size
from sj_robust.core.datasets import (
    AUGMENTED,
    EVENT_DATASETS,
    IMAGE_FOLDER,
    SACCADES,
    check_dataset,
)
from sj_robust.data.augmentation import Augmentation
from sj_robust.data.events import event_frames
from sj_robust.data.files import OnUnreadable
from sj_robust.data.image_folder import image_folder
from sj_robust.data.saccades import saccade_frames
from sj_robust.data.stored import Images, Source, StoredImages
from sj_robust.data.torchvision_sets import CIFAR_STATISTICS, cifar, mnist, svhn

__all__ = ["ImageSplits", "load_images", "split_numbers"]


@dataclass(frozen=True)
class ImageSplits:
    """One data set in three parts; every item is an image [C, H, W] in [0, 1] and its class.
    划分后的图像数据集。

    Attributes:
        name: Name of the data set.
        train: Images to train on.
        validation: Images held out of the training set, used to select a network.
        test: Images for the final figures only.
        image_shape: (C, H, W) of one image or frame.
        classes: Number of classes.
        mean: Mean per channel that the network itself subtracts; None for a data set without one.
        std: Standard deviation per channel by which the network divides.
        frames: Whether an item is a sequence of binary event frames [T, C, H, W] instead.
        augmentation: Augmentation of the training images, and of no others; None for none.
        class_names: Names of the classes in order; empty if the classes have no names.
    """

    name: str
    train: Images | TensorDataset
    validation: Images | TensorDataset
    test: Images | TensorDataset
    image_shape: tuple[int, int, int]
    classes: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    frames: bool = False
    augmentation: Augmentation | None = None
    class_names: tuple[str, ...] = ()


def load_images(
    name: str,
    *,
    root: str | Path = "data",
    validation_fraction: float = 0.1,
    seed: int = 0,
    train_limit: int | None = None,
    test_limit: int | None = None,
    download: bool = False,
    T: int | None = None,
    counts: bool = False,
    on_unreadable: Literal["error", "skip"] = "error",
    augment: bool | Augmentation | None = None,
) -> ImageSplits:
    """Load a data set and hold out a validation split from its training images.
    加载数据集并划分验证集。

    Args:
        name: ``"digits"`` (ships with scikit-learn: 1797 images of 8x8; a fixed fifth is the test
            set), ``"fashion_mnist"``, ``"mnist"``, ``"cifar10"``, ``"cifar100"``, ``"svhn"``;
            ``"image_folder:PATH"`` for your own pictures in PATH/train/CLASS, PATH/test/CLASS and,
            if there are any, PATH/val/CLASS; ``"cifar10_dvs"``, ``"dvs128_gesture"`` or
            ``"n_mnist"`` for event data; ``"saccade:digits"``, ``"saccade:mnist"`` or
            ``"saccade:fashion_mnist"`` for events made from these images.
        root: Folder with the data, in the layout of torchvision or SpikingJelly. Not used for
            digits and image folders.
        validation_fraction: Share of the training images that is held out, unless there is a folder
            ``val``.
        seed: Decides which images are held out; the test images never depend on it.
        train_limit: Largest number of training images to use, including the validation split if it
            is held out from them.
        test_limit: Largest number of test images to use.
        download: Whether missing files may be downloaded.
        T: Frames per sample of event data, with the value 1 where there was any event; not used for
            images.
        counts: Whether frames of event data hold numbers of events instead; not used for images.
        on_unreadable: Whether a picture or recording that cannot be read is an error or is skipped
            with a warning.
        augment: Whether training images are augmented as by Ding et al. (crop, flip, Cutout), or
            the augmentation to use; None means only for CIFAR.

    Raises:
        TypeError: If ``augment`` or a number is something else.
        ValueError: If the name is unknown, a number is out of range, a file has the wrong content,
            the square of Cutout covers whole images, or event frames were to be rotated or resized.
        FileNotFoundError: If the data is missing; the message says which files are needed, where,
            and how to get them.
        ModuleNotFoundError: If a package that reads the files is missing.

    Examples:
        >>> splits = load_images("digits")
        >>> len(splits.train), len(splits.validation), len(splits.test)
        (1294, 143, 360)
    """
    for option, limit in (("train_limit", train_limit), ("test_limit", test_limit)):
        if limit is not None:
            check_count(option, limit)
    check_size("validation_fraction", validation_fraction)
    check_choice("on_unreadable", on_unreadable, ("error", "skip"))
    augmentation = _augmentation(name, augment)
    source = _source(name, Path(root), download, T, on_unreadable, counts=counts)
    train, validation = _held_out(
        source, seed=seed, train_limit=train_limit, fraction=validation_fraction
    )
    mean, std = CIFAR_STATISTICS.get(name, (None, None))
    height, width = source.image_shape[-2:]
    if augmentation is not None and augmentation.cutout >= 2 * max(height, width):
        raise ValueError(
            f"cutout {augmentation.cutout} covers images of {height}x{width} whole, wherever its "
            f"centre lies; give less than {2 * max(height, width)}, or 0 for none"
        )
    return ImageSplits(
        name=name,
        train=train,
        validation=validation,
        test=Subset(source.test, range(len(source.test))[:test_limit]),
        image_shape=source.image_shape,
        classes=source.classes,
        mean=mean,
        std=std,
        frames=source.frames,
        augmentation=augmentation,
        class_names=source.class_names,
    )


def _augmentation(name: str, augment: bool | Augmentation | None) -> Augmentation | None:
    """The augmentation of a data set of this name."""
    if augment is None:
        augment = name in AUGMENTED
    if augment is True:
        return Augmentation()
    if augment is False:
        return None
    if not isinstance(augment, Augmentation):
        raise TypeError(
            f"augment must be True, False, None or an Augmentation, got {type(augment).__name__}; "
            "write augment=Augmentation(...)"
        )
    if name in EVENT_DATASETS and (augment.rotation or augment.scale):
        raise ValueError(
            f"augment rotates or resizes frames of {name}, which would then hold fractions of "
            "events; use padding, flip and cutout alone"
        )
    return augment


def _source(
    name: str,
    root: Path,
    download: bool,
    T: int | None,
    on_unreadable: OnUnreadable,
    *,
    counts: bool = False,
) -> Source:
    check_dataset(name)
    if name.startswith(IMAGE_FOLDER):
        return image_folder(
            Path(name.removeprefix(IMAGE_FOLDER)).expanduser(), on_unreadable=on_unreadable
        )
    if name in EVENT_DATASETS:
        T = _checked_frames(T)
        if name not in SACCADES:
            return event_frames(
                name, root, T, counts=counts, download=download, on_unreadable=on_unreadable
            )
        images = SACCADES[name]
        source = _source(images, root, download, None, on_unreadable)
        cache = None if images == "digits" else images
        return saccade_frames(source, T, counts=counts, cache=cache)
    match name:
        case "digits":
            return _digits()
        case "mnist" | "fashion_mnist":
            return mnist(name, root, download=download)
        case "cifar10" | "cifar100":
            return cifar(name, root, download=download)
        case "svhn":
            return svhn(root, download=download)
    raise NotImplementedError(f"no loader for data set {name!r}")


def _checked_frames(T: int | None) -> int:
    """The number of frames per sample of event data."""
    if T is None or isinstance(T, bool) or T < 1:
        raise ValueError(
            "T must be an integer >= 1 for event data, the number of frames per recording, got "
            f"{T!r}"
        )
    return T


def split_numbers(
    images: int, *, seed: int, train_limit: int | None, fraction: float
) -> tuple[list[int], list[int]]:
    """Which of a number of images :func:`load_images` trains on and holds out.
    训练集与验证集的图像编号。

    Examples:
        >>> split_numbers(6, seed=0, train_limit=4, fraction=0.25)
        ([5, 3, 0], [2])
    """
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed)).tolist()
    order = order[:train_limit]
    held_out = int(fraction * len(order))
    return order[held_out:], order[:held_out]


def _held_out(
    source: Source, *, seed: int, train_limit: int | None, fraction: float
) -> tuple[Images, Images]:
    """Training and validation images; none are held out of a set that brings its own."""
    if source.validation is not None:
        fraction = 0.0
    train, held_out = split_numbers(
        len(source.train), seed=seed, train_limit=train_limit, fraction=fraction
    )
    if source.validation is not None:
        return Subset(source.train, train), source.validation
    if not (fraction > 0 and train and held_out):
        raise ValueError(
            f"validation_fraction must leave images on both sides, got {fraction} of "
            f"{len(train) + len(held_out)} images; give another share, or more images"
        )
    return Subset(source.train, train), Subset(source.train, held_out)


def _digits() -> Source:
    """The 1797 grey images of 8x8 that ship with scikit-learn, a fixed fifth of which is the test
    set.
    """
    spec = find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the digits ship with scikit-learn, which is not installed: pip install "
            "'sj_robust[recipes]'"
        )
    file = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if file.is_file():  # the import would take half as long as that of torch
        table = np.loadtxt(file, np.uint8, delimiter=",")
    else:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        table = np.column_stack((bunch.data, bunch.target)).astype(np.uint8)
    rows = torch.from_numpy(table)
    pixels = rows[:, :64].reshape(-1, 1, 8, 8)
    labels = rows[:, 64].long()
    # The set has no official split and is sorted by writer: a fixed shuffle, whatever the seed of
    # the run.
    generator = torch.Generator().manual_seed(20240521)
    order = torch.randperm(len(pixels), generator=generator)
    train, test = (
        StoredImages(pixels[part], labels[part], 16.0) for part in (order[360:], order[:360])
    )
    return Source(train=train, test=test, image_shape=(1, 8, 8), classes=10)
