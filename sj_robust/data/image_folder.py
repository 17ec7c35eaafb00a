"""Pictures in folders, one folder per class, which torchvision finds."""

import hashlib
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sj_robust.data.files import OnUnreadable, UnreadableError, first_few, one_line, readable
from sj_robust.data.stored import FileImages, Images, Source, StoredImages, shuffled

__all__ = ["image_folder"]

_MORE_ENDINGS = (".gif", ".jfif", ".pbm")
"""Of pictures, beside those of torchvision."""
_IN_MEMORY = 1 << 29
"""Bytes of decoded pictures that are kept in memory."""
_PARTS = ("train", "val", "test")
_FEW_TWICE = 0.01
"""Share of the smallest part's pictures that may occur twice without a warning, as in large data
sets some do.
"""


def image_folder(folder: Path, *, on_unreadable: OnUnreadable) -> Source:
    """Pictures of ``train``, ``test`` and, if it is there, ``val``, each with a folder per class.
    读取图像文件夹。

    Classes are the names of the folders in ``train``, sorted. Every picture becomes RGB: grey is
    repeated, a palette looked up, transparency dropped. All pictures are decoded here, so that bad
    ones are found. Up to half a GiB of pixels stays in memory; beyond that, pictures are decoded
    again when they are needed.

    Test and validation pictures come in a fixed shuffled order, so that the first ones are of all
    classes.
    """
    pixels: dict[Path, Tensor] = {}
    sizes: dict[Path, tuple[int, int]] = {}

    def read(path: Path) -> None:
        picture = _picture(path)
        height, width = picture.shape[1:]
        sizes[path] = (int(height), int(width))
        # the pictures before it have the same size, or all are refused in the end
        if (len(pixels) + 1) * picture.numel() <= _IN_MEMORY:
            pixels[path] = picture

    parts: dict[str, tuple[list[Path], Tensor]] = {}
    classes: list[str] = []
    for name in _PARTS:
        if name == "val" and not (folder / name).is_dir():
            continue
        found, pictures = _listed(folder / name)
        classes = classes or found
        if found != classes or len(classes) < 2:
            raise ValueError(
                f"{folder / name} must hold the classes of {folder / 'train'}, at least two "
                f"({', '.join(first_few(classes, 10))}), got {', '.join(first_few(found, 10))}"
            )
        parts[name] = readable(pictures, read, on_unreadable=on_unreadable, folder=folder / name)
    size = _one_size(sizes)
    images: dict[str, Images] = {}
    seen: dict[bytes, list[tuple[str, int]]] = {}
    for name, (paths, labels) in parts.items():
        if pixels.keys() >= set(paths):  # all of them were kept
            stored = StoredImages(torch.stack([pixels.pop(path) for path in paths]), labels)
            images[name] = stored
            for picture, label in zip(stored.pixels, labels.tolist(), strict=True):
                seen.setdefault(_digest(picture), []).append((name, label))
        else:
            images[name] = FileImages(paths, labels, partial(_image, size=size))
    fewest = min(map(len, images.values()))
    _warn_of_repeated(seen, folder, held_out="val" not in images, fewest=fewest)
    return Source(
        train=images["train"],
        test=shuffled(images["test"]),
        image_shape=(3, *size),
        classes=len(classes),
        validation=shuffled(images["val"]) if "val" in images else None,
        class_names=tuple(classes),
    )


def _listed(part: Path) -> tuple[list[str], list[tuple[Path, int]]]:
    """Classes of a part, and its pictures with their numbers."""
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS

    endings = (*IMG_EXTENSIONS, *_MORE_ENDINGS)

    def is_picture(path: str) -> bool:
        return path.lower().endswith(endings) and not Path(path).name.startswith(".")

    try:
        found = ImageFolder(part, is_valid_file=is_picture)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{part.resolve()} must hold a folder of pictures for each class ({error}); an image "
            "folder holds train/CLASS/PICTURE and test/CLASS/PICTURE, and val/CLASS/PICTURE if "
            "you have validation pictures of your own"
        ) from error
    return found.classes, [(Path(path), label) for path, label in found.samples]


def _one_size(sizes: dict[Path, tuple[int, int]]) -> tuple[int, int]:
    """The size that all pictures have."""
    first = min(sizes)  # threads found them in any order
    others = [f"{path} is {_by(sizes[path])}" for path in sizes if sizes[path] != sizes[first]]
    if others:
        raise ValueError(
            f"all pictures must have the size of {first}, {_by(sizes[first])} pixels, but "
            f"{len(others)} have another: {'; '.join(first_few(others))}. Resize or crop them, or "
            "omit them"
        )
    return sizes[first]


def _warn_of_repeated(
    seen: dict[bytes, list[tuple[str, int]]], folder: Path, *, held_out: bool, fewest: int
) -> None:
    """Warn of pictures, as far as they are in memory, that lie in several parts or classes, or
    several times among those of which validation pictures are held out; ``fewest`` are in a part.
    """
    several = [found for found in seen.values() if len(found) > 1]
    parts = [{name for name, _ in found} for found in several]
    classes = [{label for _, label in found} for found in several]
    counts = {
        "in several parts: an accuracy on them is none on new pictures": sum(
            len(names) > 1 for names in parts
        ),
        "in several classes": sum(len(labels) > 1 for labels in classes),
        "several times in train, of which some are held out": held_out
        * sum(names == {"train"} for names in parts),
    }
    for where, count in counts.items():
        if count > _FEW_TWICE * fewest:
            warnings.warn(
                f"{count} pictures of {folder} lie {where}; keep each in one place", stacklevel=3
            )


def _digest(picture: Tensor) -> bytes:
    return hashlib.blake2b(picture.numpy().data).digest()


def _image(path: Path, size: tuple[int, int]) -> Tensor:
    """A picture as float32 in [0, 1], [3, H, W]."""
    picture = _picture(path)
    if tuple(picture.shape[1:]) != size:
        raise UnreadableError(
            f"{path} is {_by(picture.shape[1:])} pixels and was {_by(size)} at the start"
        )
    return picture.float().div(255)


def _picture(path: Path) -> Tensor:
    """A picture as uint8 [3, H, W]."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            mode = opened.mode
            picture: Image.Image = opened
            if mode == "P" and "transparency" in opened.info:
                picture = opened.convert("RGBA")  # Pillow warns of the direct way to RGB
            pixels = np.array(picture.convert("RGB"))
    except Exception as error:  # a damaged picture raises anything
        raise UnreadableError(f"{path} ({one_line(error, 120)})") from error
    if mode.startswith(("I", "F")):
        raise UnreadableError(f"{path} (more than 8 bits per channel, mode {mode}; save it with 8)")
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _by(size: Sequence[int]) -> str:
    """Height and width as people write them, width first."""
    return f"{size[1]}x{size[0]}"
