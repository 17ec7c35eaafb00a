"""Pictures in folders, one folder per class."""

import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sj_robust.data.files import OnUnreadable, UnreadableError, first_few, one_line, readable
from sj_robust.data.stored import FileImages, Images, Source, StoredImages, shuffled

__all__ = ["image_folder"]

_ENDINGS = {
    ".bmp",
    ".gif",
    ".jfif",
    ".jpeg",
    ".jpg",
    ".pbm",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
}
_IN_MEMORY = 1 << 29
"""Bytes of decoded pictures that are kept in memory."""
_CALLED = {"train": "training", "val": "validation", "test": "test"}
"""Parts of a folder in the order in which they are used, and what their pictures are called."""
_FEW_TWICE = 0.01
"""Share of a part's pictures that may be in another part without a warning: large data sets have
some pictures twice.
"""
_EIGHT_BITS = {
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBX",
    "RGBa",
    "CMYK",
    "YCbCr",
    "HSV",
    "LAB",
}
"""Modes of Pillow with at most 8 bits per channel."""
_CUT_TO_EIGHT_BITS = (";16B", ";16L", ";16N")
"""Ends of the raw modes of 16 bits per channel, which Pillow reads into a mode of 8."""


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
    classes = _class_names(folder / "train")
    sizes: dict[Path, tuple[int, int]] = {}
    pixels: dict[Path, Tensor] = {}
    parts = {}
    for name in _CALLED:
        if name != "val" or (folder / name).is_dir():
            parts[name] = _labelled(folder / name, classes, on_unreadable, sizes, pixels)
    # sizes were found by threads, in any order; the first picture is the one with the first name
    first = parts["train"][0][0]
    others: list[Path] = []
    for paths, _ in parts.values():
        others += [path for path in paths if sizes[path] != sizes[first]]
    if others:
        named = [f"{path} is {_by(sizes[path])}" for path in others]
        raise ValueError(
            f"all pictures must have the size of the first one, {first}, {_by(sizes[first])} "
            f"pixels, but {len(others)} have another: {'; '.join(first_few(named))}. Resize or "
            "crop them, or omit them"
        )
    images: dict[str, Images] = {}
    for name, (paths, labels) in parts.items():
        if pixels.keys() >= set(paths):  # all of them were kept
            pictures = [pixels.pop(path) for path in paths]
            images[name] = StoredImages(torch.stack(pictures), labels)
        else:
            images[name] = FileImages(paths, labels, partial(_image, size=sizes[first]))
    digests = {
        name: list(map(_digest, part.pixels))
        for name, part in images.items()
        if isinstance(part, StoredImages)
    }
    _warn_of_shared_ones(digests, folder)
    train = images["train"]
    if isinstance(train, StoredImages):
        of_train = train.labels.tolist()
        held_out = "val" not in images
        _warn_of_repeated_ones(digests["train"], of_train, folder, held_out=held_out)
    validation = shuffled(images["val"]) if "val" in images else None
    return Source(
        train=images["train"],
        test=shuffled(images["test"]),
        image_shape=(3, *sizes[first]),
        classes=len(classes),
        validation=validation,
        class_names=tuple(classes),
    )


def _warn_of_shared_ones(digests: Mapping[str, Sequence[bytes]], folder: Path) -> None:
    """Warn if two parts share pictures, as far as they are in memory."""
    for earlier, later in combinations(digests, 2):
        known = set(digests[earlier])
        total = len(digests[later])
        count = sum(digest in known for digest in digests[later])
        if count > _FEW_TWICE * total:
            warnings.warn(
                f"{count} of {total} {_CALLED[later]} pictures of {folder} are also "
                f"{_CALLED[earlier]} pictures: an accuracy on them is no accuracy on new pictures; "
                "keep each picture in one part",
                stacklevel=2,
            )


def _warn_of_repeated_ones(
    digests: Sequence[bytes], labels: Sequence[int], folder: Path, *, held_out: bool
) -> None:
    """Warn if training pictures lie in several classes, or, where validation pictures are held out
    of them, occur several times.
    """
    classes: dict[bytes, list[int]] = {}
    for digest, label in zip(digests, labels, strict=True):
        classes.setdefault(digest, []).append(label)
    total = len(digests)
    repeated = sum(len(found) for found in classes.values() if len(found) > 1)
    if held_out and repeated > _FEW_TWICE * total:
        warnings.warn(
            f"{repeated} of {total} training pictures of {folder} occur several times: those held "
            "out for validation may be trained on, too; keep each picture once, or add a folder "
            "val",
            stacklevel=2,
        )
    torn = sum(len(set(found)) > 1 for found in classes.values())
    if torn > _FEW_TWICE * total:
        warnings.warn(
            f"{torn} training pictures of {folder} lie in several classes; keep each in one",
            stacklevel=2,
        )


def _digest(picture: Tensor) -> bytes:
    return hashlib.blake2b(picture.numpy().data).digest()


def _class_names(part: Path) -> list[str]:
    """Names of the folders of a part, at least two."""
    if not part.is_dir():
        raise FileNotFoundError(
            f"{part.resolve()} does not exist; an image folder holds train/CLASS/PICTURE and "
            "test/CLASS/PICTURE, and val/CLASS/PICTURE if you have validation pictures of your "
            "own"
        )
    inside = sorted(path for path in part.iterdir() if not path.name.startswith("."))
    for path in inside:
        if not path.exists():
            raise FileNotFoundError(f"{path} is a link that leads nowhere; mend or remove it")
    names = [path.name for path in inside if path.is_dir()]
    if len(names) < 2:
        raise FileNotFoundError(
            f"{part.resolve()} must hold a folder per class, at least two, got "
            f"{names or 'none'}; sort the pictures into {part.name}/CLASS/PICTURE"
        )
    return names


def _labelled(
    part: Path,
    classes: Sequence[str],
    on_unreadable: OnUnreadable,
    sizes: dict[Path, tuple[int, int]],
    pixels: dict[Path, Tensor],
) -> tuple[list[Path], Tensor]:
    """Pictures of a part that can be read, and their classes.

    The size of each picture is added to ``sizes``, and while there is room the picture to
    ``pixels``.
    """
    names = _class_names(part)
    if names != list(classes):
        foreign = sorted(set(names) - set(classes))
        lacking = sorted(set(classes) - set(names))
        train = part.with_name("train")
        found = [f"{part / name} is none of the classes of {train}" for name in foreign[:5]]
        found += [f"{part / name} is missing" for name in lacking[:5]]
        raise ValueError(
            f"{'; '.join(found)}. Every part must hold the same {len(classes)} classes, "
            f"{', '.join(first_few(classes, 10))}"
        )
    pictures: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        pictures += [(path, label) for path in _pictures(part / name)]

    def read(path: Path) -> None:
        picture = _picture(path)
        height, width = picture.shape[1:]
        sizes[path] = (int(height), int(width))
        # the pictures before it have the same size, or all are refused in the end
        if (len(pixels) + 1) * picture.numel() <= _IN_MEMORY:
            pixels[path] = picture

    paths, labels = readable(pictures, read, on_unreadable=on_unreadable, folder=part)
    filled = set(labels.tolist())
    empty = [str(part / name) for label, name in enumerate(classes) if label not in filled]
    if empty:
        raise FileNotFoundError(
            f"no pictures ({', '.join(sorted(_ENDINGS))}) in {', '.join(empty[:5])}"
        )
    return paths, labels


def _pictures(folder: Path) -> list[Path]:
    """Pictures below a folder, those behind links as well, sorted; links that lead nowhere are
    among them, whatever they are called, as pictures that cannot be read.
    """
    found: list[Path] = []
    # a link to one of these leads round in a circle
    seen = {parent.resolve() for parent in folder.absolute().parents}
    for inside, folders, names in os.walk(folder, followlinks=True):
        place = Path(inside).resolve()
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        found += [Path(inside, name) for name in names if not name.startswith(".")]
    pictures = [path for path in found if path.suffix.lower() in _ENDINGS and path.is_file()]
    return sorted([*pictures, *(path for path in found if not path.exists())])


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
            is_cut = any(_is_cut(codec, args) for codec, _, _, args in opened.tile)
            picture: Image.Image = opened
            if mode == "P" and "transparency" in opened.info:
                picture = opened.convert("RGBA")  # Pillow warns of the direct way to RGB
            pixels = np.array(picture.convert("RGB"))
    except Exception as error:  # a damaged picture raises anything
        raise UnreadableError(f"{path} ({one_line(error, 120)})") from error
    if is_cut or mode not in _EIGHT_BITS:
        raise UnreadableError(f"{path} (more than 8 bits per channel, mode {mode}; save it with 8)")
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _is_cut(codec: str, args: object) -> bool:
    """Whether Pillow cuts what a part of a file holds to 8 bits per channel."""
    if codec.startswith("ppm") and isinstance(args, tuple):
        _, largest = args
        return bool(largest > 255)
    return any(end in str(args) for end in _CUT_TO_EIGHT_BITS)


def _by(size: Sequence[int]) -> str:
    """Height and width as people write them, width first."""
    return f"{size[1]}x{size[0]}"
