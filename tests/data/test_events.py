import shutil
import sys
from pathlib import Path

import pytest
import torch
from data.event_recordings import (
    frames_by_hand,
    pack_cifar10_dvs,
    pack_gestures,
    pack_n_mnist,
    trust,
)
from data.test_images import sizes
from spikingjelly import configure
from torch.utils.data import ConcatDataset
from torchvision.datasets import utils

from sj_robust.data import events as module
from sj_robust.data import image_loader, load_images
from sj_robust.data.files import UnreadableError

T = 4


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """SpikingJelly 0.0.0.0.14 drops the error of a thread, and its threads failed once in a few
    thousand recordings.
    """
    monkeypatch.setattr(configure, "max_threads_number_for_datasets_preprocess", 1)


def load_n_mnist(root, T=T, **options):
    return load_images("n_mnist", root=root, T=T, **options)


def as_set(part):
    return {(frames.numpy().tobytes(), int(label)) for frames, label in part}


def by_hand(label, events, size):
    return frames_by_hand(events, T, size).tobytes(), label


def test_n_mnist(tmp_path, monkeypatch):
    events = pack_n_mnist(tmp_path / "NMNIST")
    trust(monkeypatch, "n_mnist", tmp_path / "NMNIST")
    splits = load_n_mnist(tmp_path, validation_fraction=0.2)
    assert sizes(splits) == [24, 6, 20]
    assert splits.image_shape == (2, 34, 34)
    assert splits.classes == 10
    assert splits.frames
    assert splits.augmentation is None
    frames, label = splits.train[0]
    assert frames.shape == (T, 2, 34, 34)
    assert frames.dtype == torch.float32
    assert label.dtype == torch.int64
    assert frames.unique().tolist() == [0.0, 1.0]
    expected = {"Train": set(), "Test": set()}
    for (part, label, _), recording in events.items():
        expected[part].add(by_hand(label, recording, 34))
    assert as_set(splits.train) | as_set(splits.validation) == expected["Train"]
    assert as_set(splits.test) == expected["Test"]
    # A second load reads what the first one made; the folder itself may be given, and other T stand
    # beside it.
    again = load_n_mnist(tmp_path / "NMNIST")
    assert as_set(again.test) == expected["Test"]
    shorter = load_n_mnist(tmp_path, T=2)
    frames, _ = shorter.test[0]
    assert frames.shape == (2, 2, 34, 34)
    counted = load_n_mnist(tmp_path, counts=True)
    for (numbers, _), (binary, _) in zip(counted.test, again.test, strict=True):
        assert torch.equal((numbers > 0).float(), binary)
        assert numbers.dtype == torch.float32
    together = load_n_mnist(tmp_path, T=1, counts=True)
    for (numbers, _), (whole, _) in zip(counted.test, together.test, strict=True):
        assert torch.equal(numbers.sum(0), whole[0])
    few = load_n_mnist(tmp_path, test_limit=8)
    labels = {int(label) for _, label in few.test}
    assert len(labels) > 3


@pytest.mark.slow
def test_cifar10_dvs_tests_on_the_first_tenth_of_every_class(tmp_path, monkeypatch):
    events = pack_cifar10_dvs(tmp_path, per_class=11)
    trust(monkeypatch, "cifar10_dvs", tmp_path)
    splits = load_images("cifar10_dvs", root=tmp_path, T=T)
    assert sizes(splits) == [90, 10, 10]
    assert splits.image_shape == (2, 128, 128)
    test = set()
    train = set()
    for (label, number), recording in events.items():
        part = test if number == 0 else train
        part.add(by_hand(label, recording, 128))
    assert as_set(splits.test) == test
    assert as_set(splits.train) | as_set(splits.validation) == train


def test_gestures(tmp_path, monkeypatch):
    events = pack_gestures(tmp_path)
    trust(monkeypatch, "dvs128_gesture", tmp_path)
    splits = load_images("dvs128_gesture", root=tmp_path, T=T)
    assert sizes(splits) == [20, 2, 11]
    assert splits.classes == 11
    # Classes are numbered in the order of their folders' names, as SpikingJelly does it.
    test = set()
    for number, label in enumerate([0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9]):
        recording = events["user24_led", label]
        test.add(by_hand(number, recording, 128))
    assert as_set(splits.test) == test


def test_missing_archives_are_named_and_fetched_if_that_is_asked_for(tmp_path, monkeypatch):
    for name, file in (("n_mnist", "Train.zip"), ("cifar10_dvs", "airplane.zip")):
        with pytest.raises(FileNotFoundError, match=file):
            load_images(name, root=tmp_path, T=T, download=name == "n_mnist")
    pack_cifar10_dvs(tmp_path / "there", per_class=2)
    trust(monkeypatch, "cifar10_dvs", tmp_path / "there")
    host = module._host_class("cifar10_dvs", "CIFAR10DVS")

    def online(url, root, filename, md5):
        Path(root).mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "there" / "download" / filename, Path(root) / filename)

    monkeypatch.setattr(utils, "download_url", online)
    for owner in host.__mro__:
        if hasattr(sys.modules.get(owner.__module__), "download_url"):
            monkeypatch.setattr(sys.modules[owner.__module__], "download_url", online)
    options = {"root": tmp_path / "here", "T": T, "validation_fraction": 0.2}
    splits = load_images("cifar10_dvs", **options, download=True)
    assert sizes(splits) == [8, 2, 10]


def test_what_is_damaged_is_refused(tmp_path, monkeypatch):
    pack_n_mnist(tmp_path, 2, 1)
    with pytest.raises(ValueError, match="Train.zip"):
        load_n_mnist(tmp_path)
    assert (tmp_path / "download" / "Train.zip").is_file()
    trust(monkeypatch, "n_mnist", tmp_path)
    load_n_mnist(tmp_path, validation_fraction=0.5)
    recordings = tmp_path / "events_np" / "train"
    (recordings / "3" / "00003.npz").write_bytes(b"not events")
    with pytest.raises(ValueError, match="events_np"):
        load_n_mnist(tmp_path, T=2)
    (recordings / "3" / "00003.npz").unlink()
    with pytest.raises(ValueError, match="29 of 30 recordings"):
        load_n_mnist(tmp_path, T=3)


def test_damaged_frames(tmp_path, monkeypatch):
    pack_n_mnist(tmp_path, 2, 1)
    trust(monkeypatch, "n_mnist", tmp_path)
    splits = load_n_mnist(tmp_path)
    folder = tmp_path / f"frames_number_{T}_split_by_number"
    train = folder / "train" / "3" / "00003.npz"
    test = folder / "test" / "3" / "00003.npz"
    content = bytearray(test.read_bytes())
    content[len(content) // 2] ^= 255
    test.write_bytes(content)
    with pytest.raises(UnreadableError, match="test/3/00003.npz"):
        list(splits.test)
    train.write_bytes(train.read_bytes()[:100])
    not_for_tests = ConcatDataset([splits.train, splits.validation])
    with pytest.raises(UnreadableError, match="train/3/00003.npz"):
        list(image_loader(not_for_tests, 4))
    with pytest.raises(UnreadableError, match="00003.npz"):
        load_n_mnist(tmp_path)
    with pytest.warns(UserWarning, match="00003.npz"):
        splits = load_n_mnist(tmp_path, on_unreadable="skip")
    assert len(splits.train) + len(splits.validation) == 19


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("error", [OSError("_torchaudio.abi3.so"), RuntimeError("another CUDA")])
def test_a_torchaudio_that_does_not_fit_is_left_out_or_named(monkeypatch, error, alone):
    load = module.importlib.import_module

    def fail(name, *package):
        if alone and not name.startswith("spikingjelly.datasets"):
            return load(name, *package)
        raise error

    monkeypatch.setattr(module.importlib, "import_module", fail)
    monkeypatch.setitem(sys.modules, "spikingjelly._event_data", None)
    if alone:
        assert module._host_class.__wrapped__("n_mnist", "NMNIST").__name__.endswith("MNIST")
    elif isinstance(error, OSError):
        with pytest.raises(ModuleNotFoundError, match="torchaudio"):
            module._host_class.__wrapped__("n_mnist", "NMNIST")
