"""MNIST, CIFAR and SVHN from small files in the true formats, which torchvision takes for the
published ones.
"""

import gzip
import hashlib
import pickle
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data.checksum import checksum
from scipy.io import savemat
from torchvision import datasets

from sj_robust.data import Augmentation, load_images

IDX = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def drawn(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def idx(array):
    return struct.pack(f">{1 + array.ndim}I", 2048 + array.ndim, *array.shape) + array.tobytes()


def write_mnist(folder, *, gz=False, train=40, test=20, size=8):
    """The four files of MNIST or Fashion-MNIST."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels, labels = (
        drawn(0, train + test, size, size),
        (np.arange(train + test) % 10).astype(np.uint8),
    )
    arrays = (pixels[:train], labels[:train], pixels[train:], labels[train:])
    for name, content in zip(IDX, map(idx, arrays), strict=True):
        (folder / (name + ".gz" * gz)).write_bytes(gzip.compress(content) if gz else content)
    return pixels[:, None], labels


def write_cifar(root, name):
    """Six images a batch."""
    kind = getattr(datasets, name.upper())
    files = [file for file, _ in (*kind.train_list, *kind.test_list)]
    pixels, labels = (
        drawn(0, 6 * len(files), 3072),
        [7 * i % (100 if name == "cifar100" else 10) for i in range(36)],
    )
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    for at, file in enumerate(files):
        part = slice(6 * at, 6 * at + 6)
        key = "fine_labels" if name == "cifar100" else "labels"
        (folder / file).write_bytes(pickle.dumps({"data": pixels[part], key: labels[part]}))
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: ["a", "b"]}))
    return pixels.reshape(-1, 3, 32, 32), labels[: len(pixels)]


def write_svhn(root):
    """22 images to train on and 11 to test; digit 0 has the label 10."""
    parts = []
    for seed, (name, count) in enumerate({"train": 22, "test": 11}.items()):
        pixels, labels = drawn(seed, 32, 32, 3, count), np.arange(count) % 10 + 1
        savemat(root / f"{name}_32x32.mat", {"X": pixels, "y": labels.astype(np.uint8)[:, None]})
        parts.append((pixels.transpose(3, 2, 0, 1), labels % 10))
    return np.concatenate([pixels for pixels, _ in parts]), np.concatenate(
        [labels for _, labels in parts]
    )


@pytest.fixture
def trusted(monkeypatch):
    """Lets torchvision take the files of a folder for the published ones."""

    def trust(folder):
        def entries(listed):
            return [
                [file, hashlib.md5((folder / file).read_bytes()).hexdigest()] for file in listed
            ]

        for kind in (datasets.CIFAR10, datasets.CIFAR100):
            if (folder / kind.meta["filename"]).exists():
                monkeypatch.setattr(
                    kind, "train_list", entries(file for file, _ in kind.train_list)
                )
                monkeypatch.setattr(kind, "test_list", entries(file for file, _ in kind.test_list))
                monkeypatch.setattr(
                    kind, "meta", kind.meta | {"md5": entries([kind.meta["filename"]])[0][1]}
                )
        if (folder / "test_32x32.mat").exists():
            listed = {
                part: ["url", *entries([f"{part}_32x32.mat"])[0]] for part in ("train", "test")
            }
            monkeypatch.setattr(datasets.SVHN, "split_list", listed)

    return trust


def assert_holds(splits, pixels, labels, sizes):
    """Bytes and classes of the files, the last of which are the test set, which keeps its order."""
    assert (len(splits.train), len(splits.validation), len(splits.test)) == sizes
    assert splits.image_shape == pixels.shape[1:]

    def items(part):
        assert all(
            (image.dtype, label.dtype) == (torch.float32, torch.int64) for image, label in part
        )
        return [
            ((image * 255).round().byte().numpy().tobytes(), int(label)) for image, label in part
        ]

    expected = [(image.tobytes(), int(label)) for image, label in zip(pixels, labels, strict=True)]
    assert sorted(items(splits.train) + items(splits.validation)) == sorted(expected[: -sizes[2]])
    assert items(splits.test) == expected[-sizes[2] :]
    assert splits.train[0][0].max() <= 1


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize(("name", "kind"), [("fashion_mnist", "FashionMNIST"), ("mnist", "MNIST")])
def test_idx_files(tmp_path, name, kind, gz):
    for root, folder in (
        (tmp_path, tmp_path),
        (tmp_path / "torchvision", tmp_path / "torchvision" / kind / "raw"),
    ):
        pixels, labels = write_mnist(folder, gz=gz)
        splits = load_images(name, root=root)
        assert_holds(splits, pixels, labels, (36, 4, 20))
        assert (splits.mean, splits.augmentation) == (None, None)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    ("name", "classes", "mean", "sizes"),
    [
        ("cifar10", 10, (0.4914, 0.4822, 0.4465), (24, 6, 6)),
        ("cifar100", 100, (0.5071, 0.4867, 0.4408), (5, 1, 6)),
    ],
)
def test_cifar(tmp_path, trusted, name, classes, mean, sizes, inside):
    pixels, labels = write_cifar(tmp_path, name)
    folder = next(tmp_path.iterdir())
    trusted(folder)
    root = folder if inside else tmp_path
    splits = load_images(name, root=root, validation_fraction=0.2)
    assert_holds(splits, pixels, labels, sizes)
    assert (splits.classes, splits.mean) == (classes, mean)
    assert splits.std is not None
    assert splits.augmentation == Augmentation(padding=4, flip=True, cutout=16)
    assert load_images(name, root=root, augment=False, validation_fraction=0.2).augmentation is None


@pytest.mark.parametrize("folder", [".", "SVHN"])
def test_svhn(tmp_path, trusted, monkeypatch, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    pixels, labels = write_svhn(tmp_path / folder)
    trusted(tmp_path / folder)
    splits = load_images("svhn", root=tmp_path)
    assert_holds(splits, pixels, labels, (20, 2, 11))
    assert (splits.classes, splits.mean, splits.augmentation) == (10, None, None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"MATLAB files, which scipy reads; .*pip install scipy"
    ):
        load_images("svhn", root=tmp_path)


class Payload:
    def __reduce__(self):
        return pytest.fail, ("a pickle was allowed to run code",)


@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("cifar10", "cifar-10-batches-py/data_batch_3", pickle.dumps(Payload())),
        ("cifar10", "cifar-10-batches-py/batches.meta", b"<html>not found</html>"),
        ("cifar100", "cifar-100-python/test", b""),
        ("svhn", "test_32x32.mat", b"cut"),
    ],
)
def test_files_that_are_not_the_published_ones(tmp_path, trusted, name, file, content):
    write_svhn(tmp_path) if name == "svhn" else write_cifar(tmp_path, name)
    path = tmp_path / file
    trusted(path.parent)
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"{file} is damaged \(its MD5 sum is not \w+\); fetch it again"
    ):
        load_images(name, root=tmp_path)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (IDX[0], lambda old: old[:-9], IDX[0]),
        (f"{IDX[0]}.gz", lambda old: old[:-9], IDX[0]),
        (IDX[0], lambda old: old[:9], IDX[0]),
        (IDX[0], lambda old: b"<html>not found</html>", IDX[0]),
        (
            IDX[0],
            lambda old: idx(drawn(0, 40)),
            f"{IDX[0]} must hold an array of 3 dimensions, got 1: is it misnamed.",
        ),
        (IDX[1], lambda old: idx(drawn(0, 30)), "40 images but 30 labels"),
        (
            IDX[1],
            lambda old: old[:-1] + b"\n",
            f"{IDX[1]} holds 1 labels outside the classes 0 to 9, the first is 10",
        ),
    ],
)
def test_damaged_idx_files(tmp_path, file, change, message):
    write_mnist(tmp_path, gz=file.endswith(".gz"))
    path = tmp_path / file
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        load_images("fashion_mnist", root=tmp_path)


@pytest.mark.parametrize(
    ("name", "kind", "missing"),
    [
        ("mnist", "MNIST", IDX[1]),
        ("fashion_mnist", "FashionMNIST", IDX[1]),
        ("cifar10", "CIFAR10", "data_batch_4"),
        ("cifar100", "CIFAR100", "train"),
        ("svhn", "SVHN", "train_32x32.mat"),
    ],
)
def test_missing_files_are_named_with_the_way_to_get_them(
    tmp_path, monkeypatch, name, kind, missing
):
    asked = []

    def offline(self):
        asked.append(self.root)
        raise OSError("Name or service not known")

    monkeypatch.setattr(getattr(datasets, kind), "download", offline)
    write = {"mnist": write_mnist, "fashion_mnist": write_mnist, "svhn": write_svhn}.get(name)
    write_cifar(tmp_path, name) if write is None else write(tmp_path)
    (path,) = tmp_path.rglob(missing)
    path.unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_images(name, root=tmp_path)
    message = str(error.value)
    assert f"is not complete: {missing} " in message
    assert str(path.parent) in message
    assert "--download" in message
    assert f"from torchvision.datasets import {kind}; {kind}('{tmp_path}', " in message
    assert ("apt-get install dataset-fashion-mnist" in message) == (name == "fashion_mnist")
    assert asked == []
    with pytest.raises(
        FileNotFoundError,
        match=r"is not complete: .*The download failed \(OSError: Name or service",
    ):
        load_images(name, root=tmp_path, download=True)
    assert asked == [tmp_path]


def test_a_download_brings_the_files(tmp_path, trusted, monkeypatch):
    write_svhn(tmp_path)
    trusted(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(
        datasets.SVHN, "download", lambda self: shutil.copy(tmp_path / self.filename, self.root)
    )
    splits = load_images("svhn", root=tmp_path / "here", download=True)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [20, 2, 11]


@pytest.mark.skipif(
    not DEBIAN.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed"
)
def test_the_real_fashion_mnist():
    few = load_images("fashion_mnist", root=DEBIAN, train_limit=300, test_limit=60)
    assert [checksum(part) for part in (few.train, few.validation, few.test)] == [
        "dc0305748e096db2",
        "d08888bce3b0e227",
        "9cd95831aff8860d",
    ]
    splits = load_images("fashion_mnist", root=DEBIAN)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [
        54000,
        6000,
        10000,
    ]
    assert splits.test.dataset.labels.bincount().tolist() == [1000] * 10
    with pytest.raises(
        ValueError, match=r"holds Fashion-MNIST, not MNIST; use the data set 'fashion_mnist'"
    ):
        load_images("mnist", root=DEBIAN)
