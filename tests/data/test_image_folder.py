"""Picture folders: which images they give, what is refused, what is warned of."""

import re
import shutil

import numpy as np
import pytest
import torch
from data.test_images import checksums, sizes
from PIL import Image
from torch.utils.data import ConcatDataset

from sj_robust.core.digest import fingerprint
from sj_robust.data import image_loader, load_images
from sj_robust.data.files import UnreadableError
from sj_robust.data.stored import contents

CLASSES = ("cat", "dog", "emu")
TRAIN = [10 * label + number for label in range(3) for number in range(4)]
TEST = [100 + 10 * label + number for label in range(3) for number in range(2)]
VAL = [200, 210, 220]
ROOM = "sj_robust.data.image_folder._IN_MEMORY"


def pixels(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def picture(path, seed, height=6, width=5):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed, height, width, 3)).save(path)


def fill(folder, part, seeds):
    for seed in seeds:
        name = CLASSES[seed % 100 // 10]
        picture(folder / part / name / f"{seed % 10}.png", seed)


@pytest.fixture
def folder(tmp_path):
    """Colour pictures, 6 high and 5 wide: per class four to train on and two to test."""
    fill(tmp_path, "train", TRAIN)
    fill(tmp_path, "test", TEST)
    return tmp_path


def load(folder, **options):
    return load_images(f"image_folder:{folder}", **options)


def bytes_of(image):
    """An image [C, H, W] as bytes [H, W, C]."""
    return (image * 255).round().byte().permute(1, 2, 0).numpy().tobytes()


def found(*parts):
    return {(bytes_of(image), int(label)) for image, label in ConcatDataset(parts)}


def made(seeds):
    return {(pixels(seed, 6, 5, 3).tobytes(), seed % 100 // 10) for seed in seeds}


@pytest.mark.parametrize("own_validation", [False, True])
@pytest.mark.parametrize("room", [1 << 29, 0])
def test_every_picture_is_in_its_part_with_its_class(folder, monkeypatch, room, own_validation):
    monkeypatch.setattr(ROOM, room)
    if own_validation:
        fill(folder, "val", VAL)
    splits = load(folder, validation_fraction=0.25)
    assert sizes(splits) == ([12, 3, 6] if own_validation else [9, 3, 6])
    assert (splits.image_shape, splits.classes) == ((3, 6, 5), 3)
    assert splits.class_names == CLASSES
    image, label = splits.train[0]
    assert (image.dtype, label.dtype) == (torch.float32, torch.int64)
    assert found(splits.train, splits.validation) == made(TRAIN + VAL * own_validation)
    if own_validation:
        assert found(splits.validation) == made(VAL)
    assert found(splits.test) == made(TEST)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(20240521))
    assert [int(label) for _, label in splits.test] == [int(i) // 2 for i in order]
    assert checksums(load(folder, validation_fraction=0.25)) == checksums(splits)
    few = load(folder, test_limit=3)
    assert len({int(label) for _, label in few.test}) > 1


@pytest.mark.parametrize("room", [1 << 29, 0])
def test_other_pictures_or_labels_have_other_contents(folder, monkeypatch, room):
    monkeypatch.setattr(ROOM, room)
    elsewhere = folder / "elsewhere"
    for part in ("train", "test"):
        shutil.copytree(folder / part, elsewhere / part)
    digests = []
    for change in (str, lambda path: path.rename(elsewhere / "train" / "dog" / "0a.png")):
        change(elsewhere / "train" / "cat" / "0.png")
        digests.append(fingerprint(contents(load(elsewhere).train)))
    assert fingerprint(contents(load(folder).train)) == digests[0] != digests[1]


@pytest.mark.parametrize("events", [{}, {"T": 2}, {"T": 2, "counts": True}])
def test_seeds_choose_other_contents(events):
    name = "saccade:digits" if events else "digits"
    one, same, other = (load_images(name, seed=seed, **events) for seed in (0, 0, 1))
    digests = [fingerprint(contents(splits.train)) for splits in (one, same, other)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("val", "source", "target", "said"),
    [
        (False, "train/cat/0.png", "test/cat/x.png", ["several parts"]),
        (True, "val/cat/0.png", "test/cat/x.png", ["several parts"]),
        (True, "train/cat/0.png", "val/dog/x.png", ["several parts", "several classes"]),
        (False, "train/cat/0.png", "train/cat/x.jfif", ["several times"]),
        (True, "train/cat/0.png", "train/cat/x.png", []),
        (True, "train/cat/0.png", "train/dog/x.png", ["several classes"]),
    ],
)
def test_pictures_that_lie_in_two_places_are_warned_of(folder, recwarn, val, source, target, said):
    if val:
        fill(folder, "val", VAL)
    load(folder)
    assert not recwarn.list
    shutil.copy(folder / source, folder / target)
    load(folder)
    words = [re.search("several \\w+", str(warning.message))[0] for warning in recwarn.list]
    assert words == said


def test_every_kind_of_picture_becomes_rgb(folder):
    home = folder / "train" / "cat"
    for path in home.iterdir():
        path.unlink()
    grey, clear = pixels(1, 6, 5), pixels(2, 6, 5, 4)
    bright = grey > 127
    palette = Image.fromarray(grey // 16).convert("P")
    palette.putpalette(range(0, 144, 3))
    palette.info["transparency"] = bytes(range(16))
    palette.save(home / "palette.png", transparency=bytes(range(16)))
    for name, values in {"grey.png": grey, "bits.pbm": bright, "rgba.png": clear}.items():
        Image.fromarray(values).save(home / name)
    picture(home / "inside" / "photo.JPG", 4)
    (home / "notes.txt").write_text("no picture")
    (home / "._grey.png").write_bytes(b"what a Mac leaves behind")
    splits = load(folder)
    cats = {image for image, label in found(splits.train, splits.validation) if label == 0}
    expected = [np.stack([grey] * 3, 2), np.stack([255 * bright.astype(np.uint8)] * 3, 2)]
    expected += [clear[..., :3], np.array(palette.convert("RGBA"))[..., :3]]
    assert cats > {image.tobytes() for image in expected}
    assert len(cats) == 5


def sixteen_bits(path):
    Image.fromarray(pixels(0, 6, 5).astype(np.uint16) * 256).save(path)


def dangling(path):
    path.unlink()
    path.symlink_to("gone.png")


DAMAGES = {
    "text": lambda path: path.write_bytes(b"<html>"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:60]),
    "empty": lambda path: path.write_bytes(b""),
    "dangling": dangling,
    "16 bits": sixteen_bits,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_picture_that_cannot_be_read_is_named_or_skipped(folder, damage):
    DAMAGES[damage](folder / "train" / "dog" / "2.png")
    with pytest.raises(UnreadableError, match="dog/2.png"):
        load(folder)
    with pytest.warns(UserWarning, match="dog/2.png"):
        splits = load(folder, on_unreadable="skip")
    assert found(splits.train, splits.validation) == made(set(TRAIN) - {12})
    for path in (folder / "train").rglob("*.png"):
        path.unlink()
        path.write_bytes(b"")
    with pytest.raises(UnreadableError, match="None remains"):
        load(folder, on_unreadable="skip")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_goes_bad_during_the_run_is_named(folder, workers, monkeypatch):
    monkeypatch.setattr(ROOM, 6 * 5 * 3 * 2)  # no room for all
    splits = load(folder)
    path = folder / "train" / "dog" / "2.png"
    loader = image_loader(ConcatDataset([splits.train, splits.validation]), 2, workers)
    for damage in (DAMAGES["empty"], lambda path: picture(path, 0, height=7, width=7)):
        damage(path)
        with pytest.raises(UnreadableError, match=r"^\S*dog/2.png .*$"):
            list(loader)


MISFITS = {
    "another size": (lambda folder: picture(folder / "test/emu/x.png", 0, 8), ValueError, "x.png"),
    "another class": (
        lambda folder: (folder / "test/emu").rename(folder / "test/owl"),
        ValueError,
        "owl",
    ),
    "a class less": (lambda folder: shutil.rmtree(folder / "test/emu"), ValueError, "emu"),
    "one class": (
        lambda folder: [shutil.rmtree(folder / "train" / name) for name in CLASSES[1:]],
        ValueError,
        "at least two",
    ),
    "an empty class": (
        lambda folder: [path.unlink() for path in (folder / "test/emu").iterdir()],
        FileNotFoundError,
        "emu",
    ),
    "no test": (lambda folder: shutil.rmtree(folder / "test"), FileNotFoundError, "/test"),
    "nothing": (lambda folder: shutil.rmtree(folder / "train"), FileNotFoundError, "/train"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_folders_that_do_not_agree_are_refused(folder, name):
    change, error, word = MISFITS[name]
    change(folder)
    with pytest.raises(error, match=word):
        load(folder)
