import gzip
import hashlib
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from sj_robust.data import load_images

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def write_fashion_mnist(folder, *, gz=False, train=40, test=20, size=8):
    """The four files in the true format, written independently of the reader."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (train + test, size, size), dtype=np.uint8)
    labels = (np.arange(train + test) % 10).astype(np.uint8)
    contents = [
        struct.pack(">IIII", 2051, train, size, size) + pixels[:train].tobytes(),
        struct.pack(">II", 2049, train) + labels[:train].tobytes(),
        struct.pack(">IIII", 2051, test, size, size) + pixels[train:].tobytes(),
        struct.pack(">II", 2049, test) + labels[train:].tobytes(),
    ]
    for name, content in zip(NAMES, contents, strict=True):
        (folder / (name + ".gz" * gz)).write_bytes(gzip.compress(content) if gz else content)
    return pixels, labels


def stacked(dataset):
    """All images and labels of a part."""
    images, labels = zip(*dataset, strict=True)
    return torch.stack(images), torch.stack(labels)


def rows(dataset):
    return {image.numpy().tobytes() for image, _ in dataset}


def test_digits():
    splits = load_images("digits", seed=3)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [1294, 143, 360]
    assert (splits.image_shape, splits.classes) == ((1, 8, 8), 10)
    images = torch.cat([stacked(part)[0] for part in (splits.train, splits.validation, splits.test)])
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (0, 1)
    assert len({image.numpy().tobytes() for image in images}) > 1790  # the three parts do not overlap
    assert stacked(splits.test)[1].bincount().min() >= 20


def test_the_seed_moves_the_validation_split_and_never_the_test_images():
    one, same, other = (load_images("digits", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(stacked(one.validation)[0], stacked(same.validation)[0])
    assert torch.equal(stacked(one.train)[1], stacked(same.train)[1])
    assert rows(one.validation) != rows(other.validation)
    assert torch.equal(stacked(one.test)[0], stacked(other.test)[0])
    assert rows(one.validation) | rows(one.train) == rows(other.validation) | rows(other.train)


def checksum(part):
    digest = hashlib.sha256()
    for image, label in part:
        digest.update(image.numpy().tobytes() + label.numpy().tobytes())
    return digest.hexdigest()[:16]


@pytest.mark.parametrize(
    ("options", "sums"),
    [
        ({}, ["c24d418612d382a7", "acaad45f0953fe58", "d334356193f16b9d"]),
        (
            {"seed": 3, "train_limit": 200, "test_limit": 50},
            ["ee638186d4eaca78", "ad2fdca92a5c953b", "ec32bf93b0c436d4"],
        ),
    ],
)
def test_the_digits_are_those_of_the_published_figures(options, sums):
    splits = load_images("digits", **options)
    assert [checksum(part) for part in (splits.train, splits.validation, splits.test)] == sums


def test_limits():
    splits = load_images("digits", train_limit=50, test_limit=7)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [45, 5, 7]


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize(
    ("name", "folder"),
    [("fashion_mnist", "."), ("fashion_mnist", "FashionMNIST/raw"), ("mnist", "."), ("mnist", "MNIST/raw")],
)
def test_idx_files(tmp_path, name, folder, gz):
    pixels, labels = write_fashion_mnist(tmp_path / folder, gz=gz)
    splits = load_images(name, root=tmp_path)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [36, 4, 20]
    assert splits.image_shape == (1, 8, 8)
    images, classes = stacked(splits.test)
    assert torch.equal(images[:, 0], torch.from_numpy(pixels[40:]).float() / 255)
    assert classes.tolist() == labels[40:].tolist()
    paired = {image.tobytes(): int(label) for image, label in zip(pixels[:40], labels[:40], strict=True)}
    for image, label in (*splits.train, *splits.validation):
        assert paired[(image[0] * 255).round().byte().numpy().tobytes()] == label


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist():
    few = load_images("fashion_mnist", root=DEBIAN, train_limit=300, test_limit=60)
    assert [checksum(part) for part in (few.train, few.validation, few.test)] == [
        "dc0305748e096db2", "d08888bce3b0e227", "9cd95831aff8860d",
    ]  # fmt: skip
    splits = load_images("fashion_mnist", root=DEBIAN)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [54000, 6000, 10000]
    labels = splits.test.images.labels
    assert labels.bincount().tolist() == [1000] * 10
    assert labels[:5].tolist() == [9, 2, 1, 1, 6]
    with pytest.raises(ValueError, match=r"holds Fashion-MNIST, not MNIST; use the data set 'fashion_mnist'"):
        load_images("mnist", root=DEBIAN)


def test_missing_files_are_named_with_the_way_to_get_them(tmp_path):
    write_fashion_mnist(tmp_path)
    (tmp_path / NAMES[1]).unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_images("fashion_mnist", root=tmp_path)
    message = str(error.value)
    assert NAMES[1] in message
    assert NAMES[0] not in message
    assert str(tmp_path) in message
    assert "FashionMNIST" in message
    assert "apt-get install dataset-fashion-mnist" in message


@pytest.mark.parametrize("damage", ["cut", "foreign", "gz", "count", "swapped"])
def test_damaged_files(tmp_path, damage):
    write_fashion_mnist(tmp_path, gz=damage == "gz")
    images = tmp_path / (NAMES[0] + ".gz" * (damage == "gz"))
    if damage in ("cut", "gz"):
        images.write_bytes(images.read_bytes()[:-9])
    elif damage == "foreign":
        images.write_bytes(b"<html>not found</html>")
    elif damage == "count":
        write_fashion_mnist(tmp_path / "other", train=30)
        shutil.copy(tmp_path / "other" / NAMES[1], tmp_path / NAMES[1])
    else:
        shutil.copy(tmp_path / NAMES[1], tmp_path / NAMES[0])
    with pytest.raises(ValueError, match=NAMES[0] if damage != "count" else "40 images but 30 labels"):
        load_images("fashion_mnist", root=tmp_path)


def test_a_label_outside_the_classes(tmp_path):
    write_fashion_mnist(tmp_path)
    path = tmp_path / NAMES[1]
    path.write_bytes(path.read_bytes()[:-1] + bytes([10]))
    with pytest.raises(ValueError, match=rf"{NAMES[1]} holds 1 labels outside the classes 0 to 9, the first is 10"):
        load_images("mnist", root=tmp_path)


def test_an_image_in_memory_takes_a_byte_per_value():
    images = load_images("digits").train.images
    assert (images.pixels.dtype, images.pixels.shape) == (torch.uint8, (1437, 1, 8, 8))


def test_wrong_use():
    with pytest.raises(ValueError, match=r"on_unreadable must be 'error' or 'skip', got 'ignore'"):
        load_images("digits", on_unreadable="ignore")
    with pytest.raises(ValueError, match="digits, fashion_mnist, mnist, .*image_folder:PATH, cifar10_dvs"):
        load_images("imagenet")
    with pytest.raises(ValueError, match="train_limit must be >= 1"):
        load_images("digits", train_limit=0)
    with pytest.raises(ValueError, match="validation_fraction"):
        load_images("digits", validation_fraction=0.0)
    with pytest.raises(ValueError, match="validation_fraction"):
        load_images("digits", train_limit=5)
