import pickle
import struct
import sys

import numpy as np
import pytest
import torch
from scipy.io import savemat

from sj_robust.data import Augmentation, load_images

PYTHON = {
    "cifar10": ("cifar-10-batches-py", [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"], "labels"),
    "cifar100": ("cifar-100-python", ["train", "test"], "fine_labels"),
}


def text(value):
    """A string as Python 2 pickles it, which is how both sets are published."""
    raw = value.encode("latin1")
    return (b"U" + bytes([len(raw)]) if len(raw) < 256 else b"T" + struct.pack("<i", len(raw))) + raw


def array(values):
    """An array of bytes as numpy pickles it under Python 2."""
    shape = b"".join(b"J" + struct.pack("<i", side) for side in values.shape) + b"\x86"
    kind = b"cnumpy\ndtype\n" + text("u1") + b"K\x00K\x01\x87R(K\x03" + text("|") + b"NNN" + b"J\xff\xff\xff\xff" * 2
    head = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text("b") + b"\x87R(K\x01"
    return head + shape + kind + b"K\x00tb" + b"\x89" + text(values.tobytes().decode("latin1")) + b"tb"


def batch(pixels, labels, key="labels"):
    numbers = b"]" + b"".join(b"K" + bytes([label]) + b"a" for label in labels)
    pairs = {"batch_label": text("testing batch"), key: numbers, "data": array(pixels)}
    return b"\x80\x02}" + b"".join(text(name) + value + b"s" for name, value in pairs.items()) + b"."


def write_cifar(root, name, count=6, classes=10):
    """All batches; pixels and labels in the order of the files."""
    folder, files, key = PYTHON[name]
    (root / folder).mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (len(files) * count, 3072), dtype=np.uint8)
    labels = [(7 * number) % classes for number in range(len(files) * count)]
    for at, file in enumerate(files):
        part = slice(at * count, (at + 1) * count)
        (root / folder / file).write_bytes(batch(pixels[part], labels[part], key))
    return pixels.reshape(-1, 3, 32, 32), labels


def by_image(*parts):
    return {
        (image * 255).round().byte().numpy().tobytes(): (int(label), image.dtype, label.dtype)
        for part in parts
        for image, label in part
    }


def expected(pixels, labels):
    return {image.tobytes(): (label, torch.float32, torch.int64) for image, label in zip(pixels, labels, strict=True)}


def test_the_pickles_of_these_tests_are_pickles():
    values = np.arange(6, dtype=np.uint8).reshape(2, 3)
    content = pickle.loads(batch(values, [3, 4]), encoding="latin1")
    assert content["labels"] == [3, 4]
    assert (content["data"] == values).all()


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    ("name", "classes", "mean"),
    [("cifar10", 10, (0.4914, 0.4822, 0.4465)), ("cifar100", 100, (0.5071, 0.4867, 0.4408))],
)
def test_cifar(tmp_path, name, classes, mean, inside):
    pixels, labels = write_cifar(tmp_path, name, classes=classes)
    root = tmp_path / PYTHON[name][0] if inside else tmp_path
    splits = load_images(name, root=root, validation_fraction=0.2)
    train = len(labels) - 6
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [
        train - int(train * 0.2), int(train * 0.2), 6,
    ]  # fmt: skip
    assert (splits.image_shape, splits.classes, splits.mean) == ((3, 32, 32), classes, mean)
    assert splits.std is not None
    assert splits.augmentation == Augmentation(padding=4, flip=True, cutout=16)
    assert by_image(splits.train, splits.validation) == expected(pixels[:train], labels[:train])
    assert [int(label) for _, label in splits.test] == labels[train:]
    assert by_image(splits.test) == expected(pixels[train:], labels[train:])


def test_augmentation_can_be_forced(tmp_path):
    write_cifar(tmp_path, "cifar100")
    assert load_images("cifar100", root=tmp_path, augment=False, validation_fraction=0.2).augmentation is None
    assert load_images("digits").augmentation is None
    assert load_images("digits", augment=True).augmentation == Augmentation()


def run_me():
    raise AssertionError("a pickle was allowed to run code")


class Payload:
    def __reduce__(self):
        return run_me, ()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (batch(np.zeros((2, 3072), np.uint8), [1, 2])[:-100], "cannot be read as a batch of CIFAR"),
        (b"<html>not found</html>", "cannot be read as a batch of CIFAR"),
        (b"", "EOFError"),
        (pickle.dumps(Payload()), "UnpicklingError: it asks for .*run_me"),
        (pickle.dumps({"data": [1], "labels": []}), r"must hold bytes \[N, 3072\] and labels \[N\], got int64 \[1\]"),
        (batch(np.zeros((2, 3071), np.uint8), [1, 2]), r"must hold bytes .* got uint8 \[2, 3071\]"),
        (batch(np.zeros((2, 3072), np.uint8), [1]), "holds 2 images but 1 labels"),
        (batch(np.zeros((2, 3072), np.uint8), [1, 12]), "1 labels outside the classes 0 to 9, the first is 12"),
        (batch(np.zeros((2, 3072), np.uint8), [1, 2], "fine_labels"), "KeyError: 'labels'"),
    ],
)
def test_damaged_batches(tmp_path, content, reason):
    write_cifar(tmp_path, "cifar10")
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"data_batch_3 .*{reason}.*; fetch the file again"):
        load_images("cifar10", root=tmp_path)


def test_missing_batches(tmp_path):
    write_cifar(tmp_path, "cifar10")
    (tmp_path / "cifar-10-batches-py" / "data_batch_4").unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_images("cifar10", root=tmp_path)
    message = str(error.value)
    assert "CIFAR-10 is not complete: data_batch_4 not found in" in message
    assert str(tmp_path / "cifar-10-batches-py") in message
    assert f"CIFAR10('{tmp_path}', download=True)" in message
    assert "--download" in message


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100", "svhn"])
def test_a_download_that_fails_says_so_and_what_is_missing(tmp_path, monkeypatch, name):
    from torchvision import datasets

    kind = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "svhn": "SVHN"}.get(name, name.upper())
    asked = []

    def offline(root, **options):
        asked.append((root, options["download"]))
        raise OSError("Name or service not known")

    monkeypatch.setattr(datasets, kind, offline)
    with pytest.raises(FileNotFoundError, match=r"is not complete: .*The download failed \(OSError: Name or service"):
        load_images(name, root=tmp_path, download=True)
    assert asked == [(tmp_path, True)]
    with pytest.raises(FileNotFoundError, match="not complete"):
        load_images(name, root=tmp_path)
    assert len(asked) == 1


def test_a_download_brings_the_files(tmp_path, monkeypatch):
    from torchvision import datasets

    def fetch(root, *, split, download):
        write_svhn(root / f"{split}_32x32.mat", 8, seed=len(split))

    monkeypatch.setattr(datasets, "SVHN", fetch)
    splits = load_images("svhn", root=tmp_path, download=True, validation_fraction=0.25)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [6, 2, 8]


def write_svhn(path, count, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
    labels = (np.arange(count) % 10 + 1).astype(np.uint8)[:, None]
    savemat(path, {"X": pixels, "y": labels})
    return pixels.transpose(3, 2, 0, 1), [int(label) % 10 for label in labels[:, 0]]


def test_svhn(tmp_path):
    train = write_svhn(tmp_path / "train_32x32.mat", 22, seed=1)
    test = write_svhn(tmp_path / "test_32x32.mat", 11, seed=2)
    splits = load_images("svhn", root=tmp_path)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [20, 2, 11]
    assert (splits.image_shape, splits.classes, splits.mean, splits.augmentation) == ((3, 32, 32), 10, None, None)
    assert by_image(splits.train, splits.validation) == expected(*train)
    assert by_image(splits.test) == expected(*test)


@pytest.mark.parametrize("damage", ["cut", "foreign", "shape", "label", "count"])
def test_damaged_svhn(tmp_path, damage):
    write_svhn(tmp_path / "train_32x32.mat", 22, seed=1)
    path = tmp_path / "test_32x32.mat"
    pixels, labels = write_svhn(path, 11, seed=2)
    good = {"X": pixels.transpose(2, 3, 1, 0), "y": np.array(labels)[:, None]}
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "foreign":
        path.write_bytes(b"<html>")
    else:
        changed = {
            "shape": {"X": good["X"][:16]},
            "label": {"y": np.array([*labels[1:], 11])[:, None]},
            "count": {"y": good["y"][1:]},
        }[damage]
        savemat(path, good | changed)
    with pytest.raises(ValueError, match=r"test_32x32.mat .*; fetch the file again"):
        load_images("svhn", root=tmp_path)


def test_svhn_without_scipy(tmp_path, monkeypatch):
    for part in ("train", "test"):
        (tmp_path / f"{part}_32x32.mat").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ModuleNotFoundError, match=r"MATLAB files, which scipy reads; .*pip install scipy"):
        load_images("svhn", root=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"train_32x32.mat, test_32x32.mat not found"):
        load_images("svhn", root=tmp_path / "nowhere")
