"""Pictures in folders, one folder per class."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sj_robust.data.files import OnUnreadable, UnreadableError, one_line, readable
from sj_robust.data.stored import FileImages, Images, Source, StoredImages, shuffled

__all__ = ["image_folder"]

_ENDINGS = {
    ".bmp",
    ".gif",
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
_IN_MEMORY = 1 << 29  # bytes
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


def image_folder(folder: Path, *, on_unreadable: OnUnreadable) -> Source:
    """Pictures of ``train``, ``test`` and, if it is there, ``val``, each with a folder per class.
    读取图像文件夹。

    Classes are the names of the folders in ``train``, sorted. Every picture becomes RGB: grey is
    repeated, a palette looked up, transparency dropped. All are decoded here, which finds the bad
    ones. Up to half a GiB of pixels stays in memory; the pictures of a larger folder are decoded
    again when they are asked for.

    Test and validation pictures come in a fixed shuffled order, so that the first ones are of all
    classes.
    """
    classes = _class_names(folder / "train")
    sizes: dict[Path, tuple[int, int]] = {}
    pixels: dict[Path, Tensor] = {}
    parts = {}
    for name in ("train", "val", "test"):
        if name != "val" or (folder / name).is_dir():
            parts[name] = _labelled(folder / name, classes, on_unreadable, sizes, pixels)
    # Threads find the sizes in any order.
    first = parts["train"][0][0]
    others = [path for paths, _ in parts.values() for path in paths if sizes[path] != sizes[first]]
    if others:
        named = "; ".join(f"{path} is {_by(sizes[path])}" for path in others[:5])
        raise ValueError(
            f"all pictures must have the size of the first one, {first}, {_by(sizes[first])} "
            f"pixels, but {len(others)} have another: "
            f"{named}{'; ...' if len(others) > 5 else ''}. Resize or crop them, or leave them out"
        )
    read = partial(_image, size=sizes[first])
    images: dict[str, Images] = {
        name: StoredImages(torch.stack([pixels.pop(path) for path in paths]), labels)
        if pixels.keys() >= set(paths)
        else FileImages(paths, labels, read)
        for name, (paths, labels) in parts.items()
    }
    validation = shuffled(images["val"]) if "val" in images else None
    return Source(
        images["train"], shuffled(images["test"]), (3, *sizes[first]), len(classes), validation
    )


def _class_names(part: Path) -> list[str]:
    if not part.is_dir():
        raise FileNotFoundError(
            f"{part.resolve()} does not exist; an image folder holds train/CLASS/PICTURE and "
            "test/CLASS/PICTURE, and val/CLASS/PICTURE if you have validation pictures of your "
            "own"
        )
    names = sorted(
        path.name for path in part.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
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
    """Pictures of a part that can be read, and classes; ``sizes`` and, while there is room,
    ``pixels`` take each.
    """
    names = _class_names(part)
    if names != list(classes):
        foreign, lacking = sorted(set(names) - set(classes)), sorted(set(classes) - set(names))
        found = [
            f"{part / name} is none of the classes of {part.with_name('train')}"
            for name in foreign[:5]
        ]
        found += [f"{part / name} is missing" for name in lacking[:5]]
        named = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
        raise ValueError(
            f"{'; '.join(found)}. Every part must hold the same {len(classes)} classes, {named}"
        )
    pictures = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((part / name).rglob("*"))
        if path.suffix.lower() in _ENDINGS and not path.name.startswith(".") and path.is_file()
    ]

    def read(path: Path) -> None:
        picture = _picture(path)
        sizes[path] = (int(picture.shape[1]), int(picture.shape[2]))
        if (len(pixels) + 1) * picture.numel() <= _IN_MEMORY:  # all have one size, or are refused
            pixels[path] = picture

    paths, labels = readable(pictures, read, on_unreadable=on_unreadable, folder=part)
    empty = [
        str(part / classes[label])
        for label in sorted(set(range(len(classes))) - set(labels.tolist()))
    ]
    if empty:
        raise FileNotFoundError(
            f"no pictures ({', '.join(sorted(_ENDINGS))}) in {', '.join(empty[:5])}"
        )
    return paths, labels


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
            # Pillow warns where a palette with transparency goes to RGB in one step.
            picture = (
                opened.convert("RGBA") if mode == "P" and "transparency" in opened.info else opened
            )
            pixels = np.array(picture.convert("RGB"))
    except Exception as error:  # a damaged picture raises anything
        raise UnreadableError(f"{path} ({one_line(error, 120)})") from error
    if mode not in _EIGHT_BITS:
        raise UnreadableError(f"{path} (more than 8 bits per channel, mode {mode}; save it with 8)")
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _by(size: Sequence[int]) -> str:
    """Height and width as people write them, width first."""
    return f"{size[1]}x{size[0]}"
