"""Data sets of torchvision: MNIST, Fashion-MNIST, CIFAR-10, CIFAR-100 and SVHN.

A missing file is a FileNotFoundError that says how to get it; a damaged or misnamed one, or one of
another set, is a ValueError.
"""

import gzip
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sj_robust.data.files import check_sum, one_line
from sj_robust.data.stored import Source, StoredImages

__all__ = ["CIFAR_STATISTICS", "cifar", "mnist", "svhn"]

CIFAR_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
"""Mean and standard deviation per channel, as Ding et al. (ICML 2024) take them."""

_MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_MNIST = {"mnist": ("MNIST", "MNIST"), "fashion_mnist": ("FashionMNIST", "Fashion-MNIST")}
# The files of both sets have the same names.
_FIRST_TEST_LABELS = {"mnist": [7, 2, 1, 0, 4, 1, 4, 9], "fashion_mnist": [9, 2, 1, 1, 6, 1, 4, 6]}


def mnist(name: str, root: Path, *, download: bool) -> Source:
    """``"mnist"`` or ``"fashion_mnist"``: 60,000 and 10,000 grey images of 28x28. 读取 MNIST 或
    Fashion-MNIST。

    ``root`` holds the four IDX files, gzipped or not, or torchvision's folder ``MNIST/raw`` or
    ``FashionMNIST/raw``.
    """
    from torchvision import datasets

    kind, title = _MNIST[name]
    folders = (root / kind / "raw", root)
    found = _located(
        kind, title, _MNIST_FILES, root, folders, download=download, endings=(".gz", "")
    )
    folder = found[_MNIST_FILES[0]].parent
    pixels, labels, test_pixels, test_labels = (_read_idx(found[file]) for file in _MNIST_FILES)
    shape = pixels.shape[1:]
    counts = [len(pixels), len(labels), len(test_pixels), len(test_labels)]
    belong = test_pixels.shape[1:] == shape and counts[::2] == counts[1::2] and len(shape) == 2
    if not belong or max(labels.max(), test_labels.max()) > 9:
        raise ValueError(
            f"{folder} must hold as many labels from 0 to 9 as images of one size, got {counts} "
            f"images and labels; fetch the files again"
        )
    first = test_labels[:8].tolist()
    for other, expected in _FIRST_TEST_LABELS.items():
        if first == expected and other != name:
            raise ValueError(
                f"{folder} holds {_MNIST[other][1]}, not {title}; use the data set {other!r}"
            )
    names = tuple(datasets.FashionMNIST.classes) if name == "fashion_mnist" else ()
    return Source(
        train=StoredImages(pixels.unsqueeze(1), labels),
        test=StoredImages(test_pixels.unsqueeze(1), test_labels),
        image_shape=(1, *shape),
        classes=10,
        class_names=names,
    )


def cifar(name: str, root: Path, *, download: bool) -> Source:
    """``"cifar10"`` or ``"cifar100"``: 50,000 and 10,000 colour images of 32x32. 读取 CIFAR。

    The labels of CIFAR-100 are its 100 fine ones. ``root`` is torchvision's folder, which holds
    ``cifar-10-batches-py`` or ``cifar-100-python``, or that folder itself. The files are pickles,
    which can run code when they are read, so they are read only if their MD5 sums are those of the
    published ones.
    """
    from torchvision import datasets

    classes = int(name.removeprefix("cifar"))
    known: Any = getattr(datasets, name.upper())
    sums = dict(known.train_list) | dict(known.test_list)
    sums[known.meta["filename"]] = known.meta["md5"]
    found = _located(
        name.upper(),
        f"CIFAR-{classes}",
        sums,
        root,
        folders=(root / known.base_folder, root),
        download=download,
    )
    for file, path in found.items():
        check_sum(path, sums[file])
    # The files may lie in the root itself, where torchvision would not look: its folder is joined
    # to the root.
    folder = found[known.meta["filename"]].parent.resolve()
    kind: Any = type(known.__name__, (known,), {"base_folder": str(folder)})
    read = kind(root, train=True), kind(root, train=False)
    parts = []
    for part in read:
        pixels = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        parts.append(StoredImages(pixels, torch.tensor(part.targets)))
    train, test = parts
    names = tuple(read[0].classes)
    return Source(
        train=train,
        test=test,
        image_shape=(3, 32, 32),
        classes=classes,
        class_names=names,
    )


def svhn(root: Path, *, download: bool) -> Source:
    """73,257 and 26,032 colour images of 32x32; the file's label 10 is the digit 0. 读取 SVHN。

    ``root`` or a folder ``SVHN`` in it holds ``train_32x32.mat`` and ``test_32x32.mat``.
    """
    from torchvision import datasets

    splits = ("train", "test")
    sums = {file: md5 for _, file, md5 in map(datasets.SVHN.split_list.get, splits)}
    found = _located(
        "SVHN",
        "SVHN",
        sums,
        root,
        folders=(root, root / "SVHN"),
        download=download,
        calls=[{"split": split} for split in splits],
    )
    for file, path in found.items():
        check_sum(path, sums[file])
    try:
        parts = [datasets.SVHN(found["train_32x32.mat"].parent, split=split) for split in splits]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "SVHN comes in MATLAB files, which scipy reads; it is not installed: pip install scipy"
        ) from error
    images = []
    for part in parts:
        pixels = torch.from_numpy(part.data.copy())
        images.append(StoredImages(pixels, torch.from_numpy(part.labels)))
    train, test = images
    return Source(train=train, test=test, image_shape=(3, 32, 32), classes=10)


def _located(
    kind: str,
    title: str,
    names: Iterable[str],
    root: Path,
    folders: Sequence[Path],
    *,
    download: bool,
    calls: Sequence[Mapping[str, str]] = ({},),
    endings: Sequence[str] = ("",),
) -> dict[str, Path]:
    """Path of every file in the folder that holds most of them, downloaded first if that is allowed
    and one is missing.

    Torchvision's class ``kind`` downloads into ``root``, with each of ``calls`` as its arguments.
    Of the ``endings`` that may follow a name the last one goes first.
    """
    found = _in_fullest(folders, names, endings)
    failure = ""
    if download and len(found) < len(list(names)):
        from torchvision import datasets

        try:
            for arguments in calls:
                getattr(datasets, kind)(root, **arguments, download=True)
        except (OSError, RuntimeError) as error:
            failure = f" The download failed ({one_line(error)})."
        found = _in_fullest(folders, names, endings)
    missing = [name for name in names if name not in found]
    if missing:
        places = " or ".join(str(folder.resolve()) for folder in folders)
        raise FileNotFoundError(
            f"{title} is not complete: {', '.join(missing)} not found in {places}.{failure} Get it "
            "with download=True (--download), or put torchvision's files there"
        )
    return found


def _in_fullest(
    folders: Sequence[Path], names: Iterable[str], endings: Sequence[str]
) -> dict[str, Path]:
    fullest: dict[str, Path] = {}
    for folder in folders:
        there = {}
        for name in names:
            for end in endings:
                path = folder / (name + end)
                if path.is_file():
                    there[name] = path
        if len(there) > len(fullest):
            fullest = there
    return fullest


def _read_idx(path: Path) -> Tensor:
    """The unsigned bytes of an IDX file, gzipped (name ends in ``.gz``) or not; torchvision reads
    no gzipped ones.

    Format: two zero bytes, the type (8: unsigned byte), the number of dimensions, every dimension
    as a big-endian 32-bit integer, then the values with the last dimension fastest.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}); fetch the file again") from error
    dimensions = 3 if "images" in path.name else 1
    header = 4 + 4 * dimensions
    shape = np.frombuffer(content[4:header].ljust(4 * dimensions, b"\0"), ">u4").tolist()
    kind = bytes([0, 0, 8, dimensions])
    if content[:4] != kind or len(content) != header + math.prod(shape) or 0 in shape:
        raise ValueError(
            f"{path} must be an IDX file of unsigned bytes in {dimensions} dimensions, got "
            f"{content[:4].hex(' ')}, shape {shape} and {len(content)} bytes; fetch the file again"
        )
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header)
    return values.view(shape)
