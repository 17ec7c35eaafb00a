import shutil
import struct
import zlib
from functools import partial

import numpy as np
import pytest
import torch
from data.checksum import checksums, sizes
from PIL import Image
from torch.utils.data import ConcatDataset

from sj_robust.core.digest import fingerprint
from sj_robust.data import image_loader, load_images
from sj_robust.data.files import UnreadableError
from sj_robust.data.stored import FileImages, StoredImages, contents

CLASSES = ("cat", "dog", "emu")


def pixels(seed, *shape):
    draw = np.random.default_rng(seed)
    return draw.integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Two colour pictures per class and part, 6 high and 5 wide, four to train on."""
    for label, name in enumerate(CLASSES):
        train = tmp_path / "train" / name
        for number in range(4):
            picture(train / f"{number}.png", 10 * label + number)
        test = tmp_path / "test" / name
        for number in range(2):
            picture(test / f"{number}.png", 100 + 10 * label + number)
    return tmp_path


def picture(path, seed, height=6, width=5):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed, height, width, 3)).save(path)


def load(folder, **options):
    return load_images(f"image_folder:{folder}", **options)


def bytes_of(image):
    """An image [C, H, W] as bytes [H, W, C]."""
    values = (image * 255).round().byte()
    return values.permute(1, 2, 0).numpy().tobytes()


def found(part):
    return {(bytes_of(image), int(label)) for image, label in part}


def made(seeds):
    expected = set()
    for seed in seeds:
        image = pixels(seed, 6, 5, 3)
        label = seed % 100 // 10
        expected.add((image.tobytes(), label))
    return expected


def not_for_tests(splits):
    """Training and validation images."""
    return ConcatDataset([splits.train, splits.validation])


TRAIN = (0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23)
TEST = (100, 101, 110, 111, 120, 121)


def test_folders_without_validation_pictures(folder):
    splits = load(folder, validation_fraction=0.25)
    assert sizes(splits) == [9, 3, 6]
    assert splits.image_shape == (3, 6, 5)
    assert splits.classes == 3
    assert splits.class_names == CLASSES
    assert splits.mean is None
    assert splits.augmentation is None
    image, label = splits.train[0]
    assert image.dtype == torch.float32
    assert label.dtype == torch.int64
    assert found(not_for_tests(splits)) == made(TRAIN)
    assert found(splits.test) == made(TEST)
    again = load(folder, validation_fraction=0.25)
    assert found(again.validation) == found(splits.validation)
    few = load(folder, validation_fraction=0.5, test_limit=3)
    labels = {int(label) for _, label in few.test}
    assert len(labels) > 1


def test_what_fits_into_memory_is_decoded_once(folder, monkeypatch):
    stored = load(folder)
    monkeypatch.setattr("sj_robust.data.image_folder._IN_MEMORY", 0)
    read = load(folder)
    assert isinstance(stored.train.dataset, StoredImages)
    assert isinstance(read.train.dataset, FileImages)
    assert checksums(stored) == checksums(read)


@pytest.mark.parametrize("room", [1 << 20, 0])
def test_other_pictures_or_labels_have_other_contents(folder, monkeypatch, room):
    monkeypatch.setattr("sj_robust.data.image_folder._IN_MEMORY", room)

    def digest(path):
        return fingerprint(contents(load(path).train))

    before = digest(folder)
    elsewhere = folder / "elsewhere"
    for part in ("train", "test"):
        shutil.copytree(folder / part, elsewhere / part)
    assert digest(elsewhere) == before
    (elsewhere / "train" / "cat" / "0.png").rename(elsewhere / "train" / "dog" / "0a.png")
    assert digest(elsewhere) != before
    picture(folder / "train" / "cat" / "4.png", 300)
    assert digest(folder) != before


@pytest.mark.parametrize("events", [{}, {"T": 2}, {"T": 2, "counts": True}])
def test_seeds_choose_other_contents(events):
    name = "saccade:digits" if events else "digits"
    one, same, other = (load_images(name, seed=seed, **events) for seed in (0, 0, 1))
    digests = [fingerprint(contents(splits.train)) for splits in (one, same, other)]
    assert digests[0] == digests[1] != digests[2]
    with pytest.raises(TypeError, match="must be those of load_images, got list"):
        contents([])


def test_test_pictures_that_are_training_pictures_are_warned_of(folder, monkeypatch):
    shutil.copy(folder / "train" / "cat" / "0.png", folder / "test" / "dog" / "x.png")
    with pytest.warns(UserWarning, match="1 of 7 test pictures of .* are also training pictures"):
        load(folder)
    monkeypatch.setattr("sj_robust.data.image_folder._IN_MEMORY", 0)
    load(folder)


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [("train", "val", "4 validation .* training"), ("val", "test", "7 test .* validation")],
)
def test_validation_pictures_in_another_part_are_warned_of(folder, one, other, said):
    for label, name in enumerate(CLASSES):
        picture(folder / "val" / name / "v.png", 200 + 10 * label)
    load(folder)
    shutil.copy(next((folder / one / "cat").iterdir()), folder / other / "dog" / "x.png")
    expected = said.replace(" .* ", " pictures of .* are also ")
    with pytest.warns(UserWarning, match=f"^1 of {expected} pictures: an accuracy"):
        load(folder)


def test_training_pictures_that_occur_several_times_are_warned_of(folder):
    shutil.copy(folder / "train" / "cat" / "0.png", folder / "train" / "cat" / "again.jfif")
    with pytest.warns(UserWarning, match="^2 of 13 training pictures of .* occur several times"):
        load(folder)
    for label, name in enumerate(CLASSES):
        picture(folder / "val" / name / "v.png", 200 + 10 * label)
    load(folder)  # nothing is held out of them
    shutil.copy(folder / "train" / "cat" / "0.png", folder / "train" / "dog" / "cat.png")
    with pytest.warns(UserWarning, match="^1 training pictures of .* lie in several classes"):
        load(folder)


def test_validation_pictures_of_ones_own(folder):
    for label, name in enumerate(CLASSES):
        picture(folder / "val" / name / "v.png", 200 + 10 * label)
    splits = load(folder, train_limit=7)
    assert sizes(splits) == [7, 3, 6]
    assert found(splits.validation) == made([200, 210, 220])


def test_pictures_behind_links_are_read(folder, tmp_path):
    before = sizes(load(folder))
    elsewhere = tmp_path / "elsewhere"
    picture(elsewhere / "more" / "new.png", 77)
    (folder / "train" / CLASSES[0] / "linked").symlink_to(elsewhere / "more")
    (elsewhere / "more" / "around").symlink_to(elsewhere)
    (folder / "train" / CLASSES[0] / "back").symlink_to(folder / "train")
    (folder / "train" / CLASSES[0] / "top").symlink_to(folder)
    assert sizes(load(folder))[0] == before[0] + 1


@pytest.mark.filterwarnings("ignore:.*occur several times")  # a palette as GIF and as PNG
def test_every_kind_of_picture_becomes_rgb(folder):
    home = folder / "train" / "cat"
    for path in home.iterdir():
        path.unlink()
    grey = pixels(1, 6, 5)
    Image.fromarray(grey).save(home / "grey.png")
    bright = grey > 127
    Image.fromarray(bright).save(home / "bits.png")
    clear = pixels(2, 6, 5, 4)
    Image.fromarray(clear).save(home / "rgba.png")
    palette = Image.fromarray(grey // 16).convert("P")
    palette.putpalette(range(0, 144, 3))
    palette.save(home / "palette.gif")
    palette.info["transparency"] = bytes(range(16))
    palette.save(home / "palette.png", transparency=bytes(range(16)))
    picture(home / "photo.JPG", 4)
    (home / "notes.txt").write_text("no picture")
    (home / "._grey.png").write_bytes(b"what a Mac leaves behind")
    splits = load(folder, validation_fraction=0.1)
    cats = [image for image, label in not_for_tests(splits) if label == 0]
    assert len(cats) == 6
    for image in cats:
        assert image.shape == (3, 6, 5)
    looked_up = np.array(palette.convert("RGBA"))
    expected = [
        np.stack([grey] * 3, 2),
        np.stack([255 * bright.astype(np.uint8)] * 3, 2),
        clear[..., :3],
        looked_up[..., :3],
    ]
    values = {bytes_of(image) for image in cats}
    for image in expected:
        assert image.tobytes() in values


def text(path):
    path.write_bytes(b"<html>")


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def empty(path):
    path.write_bytes(b"")


def dangling(path):
    path.unlink()
    path.symlink_to("gone.png")


def sixteen_bits(path):
    values = pixels(0, 6, 5).astype(np.uint16) * 256
    Image.fromarray(values).save(path)


def sixteen_bits_of_colour(path, channels=3):
    """Pillow writes none."""
    lines = pixels(0, 6, 1 + 5 * channels * 2)
    lines[:, 0] = 0  # no filter
    colour = {2: 4, 3: 2, 4: 6}[channels]
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", 5, 6, 16, colour, 0, 0, 0),
        b"IDAT": zlib.compress(lines.tobytes()),
        b"IEND": b"",
    }
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in chunks.items():
        content += struct.pack(">I", len(data)) + name + data
        content += struct.pack(">I", zlib.crc32(name + data))
    path.write_bytes(content)


def sixteen_bits_of_colour_in_a_ppm(path):
    """Pillow knows a format by its first bytes."""
    path.write_bytes(b"P6 5 6 65535\n" + pixels(0, 6, 5, 6).tobytes())


@pytest.mark.parametrize(
    "damage",
    [
        text,
        cut,
        empty,
        dangling,
        sixteen_bits,
        sixteen_bits_of_colour,
        partial(sixteen_bits_of_colour, channels=2),
        partial(sixteen_bits_of_colour, channels=4),
        sixteen_bits_of_colour_in_a_ppm,
    ],
)
def test_pictures_that_cannot_be_read(folder, damage):
    damage(folder / "train" / "dog" / "2.png")
    message = r"1 of 12 files in .*train cannot be used: .*dog/2.png.*'skip'"
    with pytest.raises(UnreadableError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)
    with pytest.warns(UserWarning, match=r"1 of 12 files .*dog/2.png.*skipped"):
        splits = load(folder, on_unreadable="skip")
    assert len(splits.train) + len(splits.validation) == 11
    assert found(not_for_tests(splits)) < made(TRAIN)


def test_no_picture_left(folder):
    for path in (folder / "test" / "emu").iterdir():
        path.write_bytes(b"")
    missing = pytest.raises(FileNotFoundError, match=r"no pictures .*\.png.*test/emu")
    with pytest.warns(UserWarning, match="2 of 6 files"), missing:
        load(folder, on_unreadable="skip")
    for path in (folder / "test").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UnreadableError, match=r"6 of 6 files .*None remains"):
        load(folder, on_unreadable="skip")


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker")  # on a single core
@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_goes_bad_during_the_run_is_named(folder, workers, monkeypatch):
    no_room_for_all = 6 * 5 * 3 * 2
    monkeypatch.setattr("sj_robust.data.image_folder._IN_MEMORY", no_room_for_all)
    splits = load(folder)
    path = folder / "train" / "dog" / "2.png"
    empty(path)
    loader = image_loader(not_for_tests(splits), 2, workers)
    with pytest.raises(UnreadableError, match=r"^\S*dog/2.png \(.*\)$"):
        list(loader)
    picture(path, 0, height=7, width=7)
    with pytest.raises(UnreadableError, match=r"dog/2.png is 7x7 pixels and was 5x6 at the start$"):
        list(loader)


def test_folders_that_do_not_agree(folder):
    other = folder / "test" / "emu" / "other.png"
    picture(other, 0, height=8)
    message = r"first one, .*cat/0.png, 5x6 pixels, but 1 have .*: .*other.png is 5x8"
    with pytest.raises(ValueError, match=message):
        load(folder)
    other.unlink()
    (folder / "test" / "emu").rename(folder / "test" / "owl")
    message = r"test/owl is none of the classes of .*train; .*test/emu is missing. Every"
    with pytest.raises(ValueError, match=message):
        load(folder)
    (folder / "test" / "owl").rename(folder / "elsewhere")
    (folder / "test" / "emu").symlink_to("owl")
    with pytest.raises(FileNotFoundError, match="test/emu is a link that leads nowhere"):
        load(folder)
    (folder / "test" / "emu").unlink()
    message = r"test/emu is missing. Every part must hold the same 3 classes, cat, dog, emu"
    with pytest.raises(ValueError, match=message):
        load(folder)
    (folder / "test").rename(folder / "tset")
    message = r"/test does not exist; an image folder holds train/CLASS/PICTURE"
    with pytest.raises(FileNotFoundError, match=message):
        load(folder)
    flat = folder / "flat"
    (flat / "train").mkdir(parents=True)
    message = r"flat/train must hold a folder per class, at least two, got none"
    with pytest.raises(FileNotFoundError, match=message):
        load(flat)
