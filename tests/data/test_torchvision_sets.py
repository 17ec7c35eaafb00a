"""MNIST, CIFAR and SVHN from small files in the true formats, which torchvision takes for the
published ones.
"""

import gzip
import hashlib
import pickle
import shutil
import struct
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from data.test_images import checksums, sizes
from scipy.io import savemat
from torchvision import datasets

from sj_robust.data import Augmentation, load_images

IDX = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
IMAGES, LABELS = IDX[:2]
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def drawn(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def idx(array):
    return struct.pack(f">{1 + array.ndim}I", 2048 + array.ndim, *array.shape) + array.tobytes()


def write_mnist(folder, *, gz=False, train=40, test=20, size=8):
    """The four files of MNIST or Fashion-MNIST."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = drawn(0, train + test, size, size)
    labels = (np.arange(train + test) % 10).astype(np.uint8)
    arrays = (pixels[:train], labels[:train], pixels[train:], labels[train:])
    for name, array in zip(IDX, arrays, strict=True):
        if gz:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))
    return pixels[:, None], labels


def write_cifar(root, name):
    """Six images a batch."""
    kind = getattr(datasets, name.upper())
    classes = 100 if name == "cifar100" else 10
    key = "fine_labels" if name == "cifar100" else "labels"
    files = [file for file, _ in (*kind.train_list, *kind.test_list)]
    pixels = drawn(0, 6 * len(files), 3072)
    labels = [7 * i % classes for i in range(len(pixels))]
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    for number, file in enumerate(files):
        part = slice(6 * number, 6 * number + 6)
        content = {"data": pixels[part], key: labels[part]}
        (folder / file).write_bytes(pickle.dumps(content))
    names = {kind.meta["key"]: ["a", "b"]}
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps(names))
    return pixels.reshape(-1, 3, 32, 32), labels


def write_svhn(root):
    """22 images to train on and 11 to test; digit 0 has the label 10."""
    pixels = []
    labels = []
    for seed, name, count in ((0, "train", 22), (1, "test", 11)):
        images = drawn(seed, 32, 32, 3, count)
        digits = np.arange(1, count + 1)
        written = (digits - 1) % 10 + 1
        content = {"X": images, "y": written.astype(np.uint8)[:, None]}
        savemat(root / f"{name}_32x32.mat", content)
        pixels.append(images.transpose(3, 2, 0, 1))
        labels.append(digits % 10)
    return np.concatenate(pixels), np.concatenate(labels)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def trusted(monkeypatch):
    """Lets torchvision take the files of a folder for the published ones."""
    return partial(trust, monkeypatch)


def trust(monkeypatch, folder):
    for kind in (datasets.CIFAR10, datasets.CIFAR100):
        meta = folder / kind.meta["filename"]
        if meta.exists():
            train = [[file, md5(folder / file)] for file, _ in kind.train_list]
            test = [[file, md5(folder / file)] for file, _ in kind.test_list]
            monkeypatch.setattr(kind, "train_list", train)
            monkeypatch.setattr(kind, "test_list", test)
            monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5(meta)})
    if (folder / "test_32x32.mat").exists():
        listed = {}
        for part in ("train", "test"):
            file = f"{part}_32x32.mat"
            listed[part] = ["url", file, md5(folder / file)]
        monkeypatch.setattr(datasets.SVHN, "split_list", listed)


def items(part):
    """Bytes and class of every image."""
    found = []
    for image, label in part:
        assert image.dtype == torch.float32
        assert label.dtype == torch.int64
        assert image.max() <= 1
        values = (image * 255).round().byte()
        found.append((values.numpy().tobytes(), int(label)))
    return found


def assert_holds(splits, pixels, labels, expected_sizes):
    """Bytes and classes of the files, the last of which are the test set, which keeps its order."""
    assert sizes(splits) == expected_sizes
    assert splits.image_shape == pixels.shape[1:]
    expected = [(image.tobytes(), int(label)) for image, label in zip(pixels, labels, strict=True)]
    first_test = len(expected) - len(splits.test)
    others = items(splits.train) + items(splits.validation)
    assert sorted(others) == sorted(expected[:first_test])
    assert items(splits.test) == expected[first_test:]


WRITE = {
    "mnist": write_mnist,
    "fashion_mnist": write_mnist,
    "cifar10": partial(write_cifar, name="cifar10"),
    "cifar100": partial(write_cifar, name="cifar100"),
    "svhn": write_svhn,
}


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("inside", [".", "FashionMNIST/raw", "MNIST/raw"])
def test_idx_files(tmp_path, inside, gz):
    name = "mnist" if inside == "MNIST/raw" else "fashion_mnist"
    pixels, labels = write_mnist(tmp_path / inside, gz=gz)
    splits = load_images(name, root=tmp_path)
    assert_holds(splits, pixels, labels, [36, 4, 20])
    assert splits.class_names[:1] == (("T-shirt/top",) if name == "fashion_mnist" else ())
    assert splits.mean is splits.augmentation is None


MEANS = {"cifar10": (0.4914, 0.4822, 0.4465), "cifar100": (0.5071, 0.4867, 0.4408)}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    ("name", "expected"), [("cifar10", [24, 6, 6]), ("cifar100", [5, 1, 6]), ("svhn", [18, 4, 11])]
)
def test_files_with_a_checksum(tmp_path, trusted, name, expected, inside):
    home = tmp_path if name != "svhn" or inside else tmp_path / "SVHN"
    home.mkdir(exist_ok=True)
    pixels, labels = WRITE[name](home)
    folder = next(tmp_path.iterdir()) if name != "svhn" else home
    trusted(folder)
    options = {"root": folder if inside else tmp_path, "validation_fraction": 0.2}
    splits = load_images(name, **options)
    assert_holds(splits, pixels, labels, expected)
    assert splits.classes == (100 if name == "cifar100" else 10)
    assert splits.mean == MEANS.get(name)
    usual = Augmentation(padding=4, flip=True, cutout=16) if name in MEANS else None
    assert splits.augmentation == usual
    assert load_images(name, **options, augment=False).augmentation is None


def test_a_missing_package_is_named(tmp_path, trusted, monkeypatch):
    write_svhn(tmp_path)
    trusted(tmp_path)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ModuleNotFoundError, match="pip install scipy"):
        load_images("svhn", root=tmp_path)


class Payload:
    def __reduce__(self):
        return pytest.fail, ("a pickle was allowed to run code",)


DAMAGES = [
    ("cifar10", "data_batch_3", lambda old: pickle.dumps(Payload())),
    ("cifar10", "batches.meta", lambda old: b"<html>not found</html>"),
    ("cifar100", "test", lambda old: b""),
    ("svhn", "test_32x32.mat", lambda old: b"cut"),
    ("fashion_mnist", IMAGES, lambda old: old[:-9]),
    ("fashion_mnist", f"{IMAGES}.gz", lambda old: old[:-9]),
    ("fashion_mnist", IMAGES, lambda old: old[:9]),
    ("fashion_mnist", IMAGES, lambda old: b"<html>not found</html>"),
    ("fashion_mnist", IMAGES, lambda old: b"\0\0\x0d" + old[3:]),
    ("fashion_mnist", IMAGES, lambda old: idx(drawn(0, 40))),
    ("fashion_mnist", IMAGES, lambda old: idx(drawn(0, 0, 28, 28))),
    ("fashion_mnist", IMAGES, lambda old: idx(drawn(0, 40, 32, 32))),
    ("fashion_mnist", LABELS, lambda old: idx(np.zeros(30, np.uint8))),
    ("fashion_mnist", LABELS, lambda old: old[:-1] + b"\n"),
]


@pytest.mark.parametrize(("name", "file", "change"), DAMAGES)
def test_a_damaged_file_is_refused(tmp_path, trusted, name, file, change):
    options = {"gz": True} if file.endswith(".gz") else {}
    WRITE[name](tmp_path, **options)
    (path,) = tmp_path.rglob(file)
    trusted(path.parent)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=path.parent.name):
        load_images(name, root=tmp_path)


@pytest.mark.parametrize(
    ("name", "kind", "missing"),
    [
        ("mnist", "MNIST", LABELS),
        ("fashion_mnist", "FashionMNIST", LABELS),
        ("cifar10", "CIFAR10", "data_batch_4"),
        ("cifar100", "CIFAR100", "train"),
        ("svhn", "SVHN", "train_32x32.mat"),
    ],
)
def test_a_missing_file_is_named_and_fetched_if_that_is_asked_for(
    tmp_path, monkeypatch, name, kind, missing
):
    WRITE[name](tmp_path)
    (path,) = tmp_path.rglob(missing)
    path.unlink()
    asked = []

    def offline(self):
        asked.append(self.root)
        raise OSError("Name or service not known")

    monkeypatch.setattr(getattr(datasets, kind), "download", offline)
    for download in (False, True):
        with pytest.raises(FileNotFoundError, match=missing):
            load_images(name, root=tmp_path, download=download)
        assert asked == [tmp_path] * download


def test_a_download_brings_the_files(tmp_path, trusted, monkeypatch):
    write_svhn(tmp_path)
    trusted(tmp_path)
    (tmp_path / "here").mkdir()

    def download(self):
        shutil.copy(tmp_path / self.filename, self.root)

    monkeypatch.setattr(datasets.SVHN, "download", download)
    splits = load_images("svhn", root=tmp_path / "here", download=True)
    assert sizes(splits) == [20, 2, 11]


@pytest.mark.skipif(
    not DEBIAN.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed"
)
def test_the_real_fashion_mnist():
    few = load_images("fashion_mnist", root=DEBIAN, train_limit=300, test_limit=60)
    assert checksums(few) == ["dc0305748e096db2", "d08888bce3b0e227", "9cd95831aff8860d"]
    with pytest.raises(ValueError, match="fashion_mnist"):
        load_images("mnist", root=DEBIAN)
