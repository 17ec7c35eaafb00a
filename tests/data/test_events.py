import shutil
import sys

import pytest
import torch
from data.event_recordings import (
    frames_by_hand,
    pack_cifar10_dvs,
    pack_gestures,
    pack_n_mnist,
    trust,
)
from spikingjelly import configure
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


def as_set(part):
    return {(frames.numpy().tobytes(), int(label)) for frames, label in part}


def by_hand(chosen, height, width):
    return {(frames_by_hand(events, T, height, width).tobytes(), label) for label, events in chosen}


def test_n_mnist(tmp_path, monkeypatch):
    events = pack_n_mnist(tmp_path / "NMNIST")
    trust(monkeypatch, "n_mnist", tmp_path / "NMNIST")
    splits = load_images("n_mnist", root=tmp_path, T=T, validation_fraction=0.2)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [24, 6, 20]
    assert (splits.image_shape, splits.classes, splits.frames, splits.augmentation) == (
        (2, 34, 34),
        10,
        True,
        None,
    )
    frames, label = splits.train[0]
    assert (frames.shape, frames.dtype, label.dtype) == ((T, 2, 34, 34), torch.float32, torch.int64)
    assert set(frames.unique().tolist()) == {0.0, 1.0}
    train = [(label, value) for (part, label, _), value in events.items() if part == "Train"]
    test = [(label, value) for (part, label, _), value in events.items() if part == "Test"]
    assert as_set(splits.train) | as_set(splits.validation) == by_hand(train, 34, 34)
    assert as_set(splits.test) == by_hand(test, 34, 34)
    assert (
        len(
            {
                int(label)
                for _, label in load_images("n_mnist", root=tmp_path, T=T, test_limit=8).test
            }
        )
        > 3
    )
    # A second load reads what the first one made; the folder itself may be given, and other T stand
    # beside it.
    assert as_set(load_images("n_mnist", root=tmp_path / "NMNIST", T=T).test) == as_set(splits.test)
    assert load_images("n_mnist", root=tmp_path, T=2).test[0][0].shape == (2, 2, 34, 34)


@pytest.mark.slow
def test_cifar10_dvs_tests_on_the_first_tenth_of_every_class(tmp_path, monkeypatch):
    events = pack_cifar10_dvs(tmp_path, per_class=11)
    trust(monkeypatch, "cifar10_dvs", tmp_path)
    splits = load_images("cifar10_dvs", root=tmp_path, T=T)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [90, 10, 10]
    assert splits.image_shape == (2, 128, 128)
    test = [(label, value) for (label, number), value in events.items() if number == 0]
    train = [(label, value) for (label, number), value in events.items() if number > 0]
    assert as_set(splits.test) == by_hand(test, 128, 128)
    assert as_set(splits.train) | as_set(splits.validation) == by_hand(train, 128, 128)


def test_gestures(tmp_path, monkeypatch):
    events = pack_gestures(tmp_path)
    trust(monkeypatch, "dvs128_gesture", tmp_path)
    splits = load_images("dvs128_gesture", root=tmp_path, T=T)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [20, 2, 11]
    assert splits.classes == 11
    # Classes are numbered in the order of their folders' names, as SpikingJelly does it: 0, 1, 10,
    # 2, ...
    order = sorted(range(11), key=str)
    test = [
        (order.index(label), value)
        for (name, label), value in events.items()
        if name == "user24_led"
    ]
    assert as_set(splits.test) == by_hand(test, 128, 128)


def test_missing_archives_and_downloads(tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError,
        match=r"Train.zip, Test.zip not found in .*NMNIST.download. .*by hand from",
    ):
        load_images("n_mnist", root=tmp_path, T=T, download=True)
    with pytest.raises(
        FileNotFoundError, match=r"complete: airplane.zip, .* not found in .*--download.*figshare"
    ):
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
    with pytest.raises(
        FileNotFoundError,
        match=r"complete: cat.zip, deer.zip, .*failed \(OSError: no route to host\)",
    ):
        load_images("cifar10_dvs", root=tmp_path / "here", T=T, download=True)
    shutil.copy(there / "cat.zip", tmp_path / "here" / "CIFAR10DVS" / "download")
    splits = load_images(
        "cifar10_dvs", root=tmp_path / "here", T=T, download=True, validation_fraction=0.2
    )
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [8, 2, 10]


def test_archives_and_recordings_that_are_damaged_are_named(tmp_path, monkeypatch):
    pack_n_mnist(tmp_path, 1, 1)
    with pytest.raises(
        ValueError, match=r"download/Train.zip is damaged .*fetch it again from https"
    ):
        load_images("n_mnist", root=tmp_path, T=T)
    assert (tmp_path / "download" / "Train.zip").is_file()
    trust(monkeypatch, "n_mnist", tmp_path)
    load_images("n_mnist", root=tmp_path, T=T, validation_fraction=0.5)
    (tmp_path / "events_np" / "train" / "3" / "00003.npz").write_bytes(b"not events")
    with pytest.raises(
        ValueError,
        match=r"(?s)SpikingJelly (could not prepare NMNIST|made no frames of 1 .*00003.npz)",
    ):
        load_images("n_mnist", root=tmp_path, T=2)
    (tmp_path / "events_np" / "train" / "4" / "00004.npz").unlink()
    with pytest.raises(ValueError, match=r"no frames of 1 recordings: .*00004.bin.*keep download"):
        load_images("n_mnist", root=tmp_path, T=T)


def test_damaged_frames(tmp_path, monkeypatch):
    pack_n_mnist(tmp_path, 2, 1)
    trust(monkeypatch, "n_mnist", tmp_path)
    splits = load_images("n_mnist", root=tmp_path, T=T)
    folder = tmp_path / f"frames_number_{T}_split_by_number"
    train, test = folder / "train" / "3" / "00003.npz", folder / "test" / "3" / "00003.npz"
    content = bytearray(test.read_bytes())
    content[len(content) // 2] ^= 255
    test.write_bytes(content)
    with pytest.raises(UnreadableError, match=r"test/3/00003.npz cannot be read any more .*CRC"):
        list(splits.test)
    train.write_bytes(train.read_bytes()[:100])
    with pytest.raises(UnreadableError, match=r"train/3/00003.npz cannot be read any more"):
        list(image_loader(splits.train, 4)), list(image_loader(splits.validation, 4))
    with pytest.raises(
        UnreadableError, match=r"1 of 20 files in .*00003.npz .BadZipFile.*on_unreadable='skip'"
    ):
        load_images("n_mnist", root=tmp_path, T=T)
    with pytest.warns(UserWarning, match=r"1 of 20 files .*00003.npz.*left out"):
        splits = load_images("n_mnist", root=tmp_path, T=T, on_unreadable="skip")
    assert len(splits.train) + len(splits.validation) == 19


def test_frames_need_their_number(tmp_path):
    for T in (None, 0, True):
        with pytest.raises(ValueError, match=r"T must be an integer >= 1 for event data"):
            load_images("n_mnist", root=tmp_path, T=T)


def test_an_import_that_fails_says_what_to_install(monkeypatch):
    def fail(name):
        raise OSError("Could not load this library: _torchaudio.abi3.so")

    monkeypatch.setattr(module.importlib, "import_module", fail)
    with pytest.raises(
        ModuleNotFoundError,
        match=r"event data need torchaudio, .*fit torch \d.*install the torchaudio",
    ):
        module._host_class.__wrapped__("n_mnist", "NMNIST")
    assert "spikingjelly._event_data" not in sys.modules


def test_a_torchaudio_of_another_cuda_is_left_out(monkeypatch):
    load = module.importlib.import_module

    def fail(name, *package):
        if name.startswith("spikingjelly.datasets"):
            raise RuntimeError("PyTorch and TorchAudio were compiled with different CUDA versions")
        return load(name, *package)

    monkeypatch.setattr(module.importlib, "import_module", fail)
    assert module._host_class.__wrapped__("n_mnist", "NMNIST").__name__.endswith("MNIST")
    sys.modules.pop("spikingjelly._event_data", None)
