import shutil
import sys

import pytest
import torch
from data.checksum import sizes
from data.event_recordings import (
    frames_by_hand,
    pack_cifar10_dvs,
    pack_gestures,
    pack_n_mnist,
    trust,
)
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


def test_missing_archives_and_downloads(tmp_path, monkeypatch):
    message = r"Train.zip, Test.zip not found in .*NMNIST.download. .*by hand from"
    with pytest.raises(FileNotFoundError, match=message):
        load_n_mnist(tmp_path, download=True)
    message = r"complete: airplane.zip, .* not found in .*--download.*figshare"
    with pytest.raises(FileNotFoundError, match=message):
        load_images("cifar10_dvs", root=tmp_path, T=T)
    pack_cifar10_dvs(tmp_path / "there", per_class=2)
    trust(monkeypatch, "cifar10_dvs", tmp_path / "there")
    there = tmp_path / "there" / "download"

    def offline(url, root, filename, md5):
        if filename == "cat.zip":
            raise OSError("no route to host")
        root.mkdir(parents=True, exist_ok=True)
        shutil.copy(there / filename, root / filename)

    monkeypatch.setattr(utils, "download_url", offline)
    here = {"root": tmp_path / "here", "T": T, "download": True}
    message = r"complete: cat.zip, deer.zip, .*failed \(OSError: no route to host\)"
    with pytest.raises(FileNotFoundError, match=message):
        load_images("cifar10_dvs", **here)
    shutil.copy(there / "cat.zip", tmp_path / "here" / "CIFAR10DVS" / "download")
    splits = load_images("cifar10_dvs", **here, validation_fraction=0.2)
    assert sizes(splits) == [8, 2, 10]


def test_archives_and_recordings_that_are_damaged_are_named(tmp_path, monkeypatch):
    pack_n_mnist(tmp_path, 1, 1)
    message = r"download/Train.zip is damaged .*fetch it again from https"
    with pytest.raises(ValueError, match=message):
        load_n_mnist(tmp_path)
    assert (tmp_path / "download" / "Train.zip").is_file()
    trust(monkeypatch, "n_mnist", tmp_path)
    load_n_mnist(tmp_path, validation_fraction=0.5)
    (tmp_path / "events_np" / "train" / "3" / "00003.npz").write_bytes(b"not events")
    message = r"(?s)SpikingJelly (could not prepare NMNIST|made no frames of 1 .*00003.npz)"
    with pytest.raises(ValueError, match=message):
        load_n_mnist(tmp_path, T=2)
    (tmp_path / "events_np" / "train" / "4" / "00004.npz").unlink()
    with pytest.raises(ValueError, match=r"no frames of 1 recordings: .*00004.bin.*keep download"):
        load_n_mnist(tmp_path)


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
    with pytest.raises(UnreadableError, match=r"test/3/00003.npz cannot be read any more .*CRC"):
        list(splits.test)
    train.write_bytes(train.read_bytes()[:100])
    not_for_tests = ConcatDataset([splits.train, splits.validation])
    with pytest.raises(UnreadableError, match=r"train/3/00003.npz cannot be read any more"):
        list(image_loader(not_for_tests, 4))
    message = r"1 of 20 files in .*00003.npz .BadZipFile.*on_unreadable='skip'"
    with pytest.raises(UnreadableError, match=message):
        load_n_mnist(tmp_path)
    with pytest.warns(UserWarning, match=r"1 of 20 files .*00003.npz.*skipped"):
        splits = load_n_mnist(tmp_path, on_unreadable="skip")
    assert len(splits.train) + len(splits.validation) == 19


@pytest.mark.parametrize("T", [None, 0, True])
def test_frames_need_their_number(tmp_path, T):
    with pytest.raises(ValueError, match="T must be an integer >= 1 for event data"):
        load_n_mnist(tmp_path, T=T)


def test_an_import_that_fails_says_what_to_install(monkeypatch):
    def fail(name):
        raise OSError("Could not load this library: _torchaudio.abi3.so")

    monkeypatch.setattr(module.importlib, "import_module", fail)
    message = r"event data need torchaudio, .*fit torch \d.*install the torchaudio"
    with pytest.raises(ModuleNotFoundError, match=message):
        module._host_class.__wrapped__("n_mnist", "NMNIST")
    assert "spikingjelly._event_data" not in sys.modules


def test_a_torchaudio_of_another_cuda_is_left_out(monkeypatch):
    load = module.importlib.import_module

    def fail(name, *package):
        if name.startswith("spikingjelly.datasets"):
            raise RuntimeError("PyTorch and TorchAudio were compiled with different CUDA versions")
        return load(name, *package)

    monkeypatch.setattr(module.importlib, "import_module", fail)
    host = module._host_class.__wrapped__("n_mnist", "NMNIST")
    assert host.__name__.endswith("MNIST")
    sys.modules.pop("spikingjelly._event_data", None)
