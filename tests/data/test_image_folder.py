import numpy as np
import pytest
import torch
from PIL import Image

from sj_robust.data import image_loader, load_images
from sj_robust.data.files import UnreadableError
from sj_robust.data.stored import FileImages, StoredImages

CLASSES = ("cat", "dog", "emu")


def pixels(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Two colour pictures per class and part, 6 high and 5 wide, four to train on."""
    for part, count in (("train", 4), ("test", 2)):
        for label, name in enumerate(CLASSES):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                seed = 100 * (part == "test") + 10 * label + number
                Image.fromarray(pixels(seed, 6, 5, 3)).save(
                    tmp_path / part / name / f"{number}.png"
                )
    return tmp_path


def load(folder, **options):
    return load_images(f"image_folder:{folder}", **options)


def found(part):
    return {
        ((image * 255).round().byte().permute(1, 2, 0).numpy().tobytes(), int(label))
        for image, label in part
    }


def made(seeds):
    return {(pixels(seed, 6, 5, 3).tobytes(), seed % 100 // 10) for seed in seeds}


def test_folders_without_validation_pictures(folder):
    splits = load(folder, validation_fraction=0.25)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [9, 3, 6]
    assert (splits.image_shape, splits.classes, splits.mean, splits.augmentation) == (
        (3, 6, 5),
        3,
        None,
        None,
    )
    image, label = splits.train[0]
    assert (image.dtype, label.dtype) == (torch.float32, torch.int64)
    train = [10 * label + number for label in range(3) for number in range(4)]
    assert found(splits.train) | found(splits.validation) == made(train)
    assert found(splits.test) == made(
        [100 + 10 * label + number for label in range(3) for number in range(2)]
    )
    again = load(folder, validation_fraction=0.25)
    assert found(again.validation) == found(splits.validation)
    assert (
        len({int(label) for _, label in load(folder, validation_fraction=0.5, test_limit=3).test})
        > 1
    )


def test_what_fits_into_memory_is_decoded_once(folder, monkeypatch):
    parts = []
    for room in (None, 0):
        if room is not None:
            monkeypatch.setattr("sj_robust.data.image_folder._IN_MEMORY", room)
        splits = load(folder)
        assert isinstance(splits.train.dataset, StoredImages if room is None else FileImages)
        parts.append([*image_loader(splits.train, 4), *image_loader(splits.test, 4)])
    for (image, label), (wanted, wanted_label) in zip(*parts, strict=True):
        assert torch.equal(image, wanted)
        assert torch.equal(label, wanted_label)


def test_validation_pictures_of_ones_own(folder):
    for label, name in enumerate(CLASSES):
        (folder / "val" / name).mkdir(parents=True)
        Image.fromarray(pixels(200 + 10 * label, 6, 5, 3)).save(folder / "val" / name / "v.png")
    splits = load(folder, train_limit=7)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [7, 3, 6]
    assert found(splits.validation) == made([200, 210, 220])


def test_every_kind_of_picture_becomes_rgb(folder):
    home = folder / "train" / "cat"
    grey = pixels(1, 6, 5)
    for path in home.iterdir():
        path.unlink()
    Image.fromarray(grey).save(home / "grey.png")
    clear = np.concatenate([pixels(2, 6, 5, 3), pixels(3, 6, 5, 1)], 2)
    Image.fromarray(clear).save(home / "rgba.png")
    palette = Image.fromarray(grey // 16).convert("P")
    palette.putpalette([3 * number for number in range(256)][:48])
    palette.save(home / "palette.gif")
    palette.info["transparency"] = bytes(range(16))
    palette.save(home / "palette.png", transparency=bytes(range(16)))
    Image.fromarray(grey > 127).save(home / "bits.png")
    Image.fromarray(pixels(4, 6, 5, 3)).save(home / "photo.JPG", quality=95)
    (home / "notes.txt").write_text("no picture")
    (home / "._grey.png").write_bytes(b"what a Mac leaves behind")
    splits = load(folder, validation_fraction=0.1)
    cats = [image for image, label in (*splits.train, *splits.validation) if label == 0]
    assert len(cats) == 6
    assert all(image.shape == (3, 6, 5) for image in cats)
    values = {(image * 255).round().byte().permute(1, 2, 0).numpy().tobytes() for image in cats}
    looked_up = np.array(palette.convert("RGBA"))[..., :3]
    for expected in (
        np.stack([grey] * 3, 2),
        clear[..., :3],
        looked_up,
        np.stack([(grey > 127) * 255] * 3, 2),
    ):
        assert expected.astype(np.uint8).tobytes() in values


@pytest.mark.parametrize("damage", ["text", "cut", "empty", "sixteen bits"])
def test_pictures_that_cannot_be_read(folder, damage):
    bad = folder / "train" / "dog" / "2.png"
    content = bad.read_bytes()
    bad.write_bytes(
        {"text": b"<html>", "cut": content[: len(content) // 2], "empty": b""}.get(damage, content)
    )
    if damage == "sixteen bits":
        Image.fromarray(pixels(0, 6, 5).astype(np.uint16) * 256).save(bad)
    with pytest.raises(
        UnreadableError, match=r"1 of 12 files in .*train cannot be used: .*dog/2.png.*'skip'"
    ) as error:
        load(folder)
    assert "\n" not in str(error.value)
    with pytest.warns(UserWarning, match=r"1 of 12 files .*dog/2.png.*left out"):
        splits = load(folder, on_unreadable="skip")
    assert len(splits.train) + len(splits.validation) == 11
    assert found(splits.train) | found(splits.validation) < made(
        [10 * i + j for i in range(3) for j in range(4)]
    )


def test_no_picture_left(folder):
    for path in (folder / "test" / "emu").iterdir():
        path.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="2 of 6 files"),
        pytest.raises(FileNotFoundError, match=r"no pictures .*\.png.*test/emu"),
    ):
        load(folder, on_unreadable="skip")
    for path in (folder / "test").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UnreadableError, match=r"6 of 6 files .*None is left"):
        load(folder, on_unreadable="skip")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_goes_bad_during_the_run_is_named(folder, workers, monkeypatch):
    monkeypatch.setattr(
        "sj_robust.data.image_folder._IN_MEMORY", 6 * 5 * 3 * 2
    )  # no room for all of a part
    splits = load(folder)
    path = folder / "train" / "dog" / "2.png"
    path.write_bytes(b"")
    loader = image_loader(splits.train, 2, workers)
    at_fault = any(
        "dog/2.png" in splits.train.dataset.paths[index] for index in splits.train.indices
    )
    part = loader if at_fault else image_loader(splits.validation, 2, workers)
    with pytest.raises(UnreadableError, match=r"^\S*dog/2.png \(.*\)$"):
        list(part)
    Image.fromarray(pixels(0, 7, 7, 3)).save(path)
    with pytest.raises(UnreadableError, match=r"dog/2.png is 7x7 pixels and was 5x6 at the start$"):
        list(part)


def test_folders_that_do_not_agree(folder):
    other = folder / "test" / "emu" / "other.png"
    Image.fromarray(pixels(0, 8, 5, 3)).save(other)
    with pytest.raises(
        ValueError, match=r"first one, .*cat/0.png, 5x6 pixels, but 1 have .*: .*other.png is 5x8"
    ):
        load(folder)
    other.unlink()
    (folder / "test" / "emu").rename(folder / "test" / "owl")
    with pytest.raises(
        ValueError,
        match=r"test/owl is none of the classes of .*train; .*test/emu is missing. Every",
    ):
        load(folder)
    (folder / "test" / "owl").rename(folder / "elsewhere")
    with pytest.raises(
        ValueError,
        match=r"test/emu is missing. Every part must hold the same 3 classes, cat, dog, emu",
    ):
        load(folder)
    (folder / "test").rename(folder / "tset")
    with pytest.raises(
        FileNotFoundError, match=r"/test does not exist; an image folder holds train/CLASS/PICTURE"
    ):
        load(folder)
    flat = folder / "flat"
    (flat / "train").mkdir(parents=True)
    with pytest.raises(
        FileNotFoundError, match=r"flat/train must hold a folder per class, at least two, got none"
    ):
        load(flat)
