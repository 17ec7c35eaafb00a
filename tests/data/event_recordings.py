"""Tiny event recordings in the raw formats of three data sets, packed as they are published."""

import hashlib
import shutil
import struct
import tarfile
from itertools import product
from zipfile import ZipFile

import numpy as np

from sj_robust.data import EVENT_DATASETS, events

CIFAR_NAMES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


def random_events(seed, count, height, width, start=0):
    """Times, rows, columns and polarities, sorted by time."""
    draw = np.random.default_rng(seed)
    times = start + np.sort(draw.integers(0, 5000, count))
    return (
        times,
        draw.integers(0, height, count),
        draw.integers(0, width, count),
        draw.integers(0, 2, count),
    )


def frames_by_hand(events, T, height, width):
    """Where there was any event, frame by frame, with an equal number of events per frame and the
    rest in the last.
    """
    times, rows, columns, polarities = events
    frames = np.zeros((T, 2, height, width), dtype=np.float32)
    each = len(times) // T
    for number, (row, column, polarity) in enumerate(zip(rows, columns, polarities, strict=True)):
        frames[min(number // each, T - 1), polarity, row, column] = 1
    return frames


def aedat2(events):
    """CIFAR10-DVS: the camera's axes are exchanged and turned, and its polarity is reversed."""
    times, rows, columns, polarities = events
    words = np.stack([(127 - columns) << 8 | (127 - rows) << 1 | (1 - polarities), times], 1)
    return b"#!AER-DAT2.0\r\n# Timestamps tick is 1 us\r\n" + words.astype(">u4").tobytes()


def atis(events):
    """N-MNIST: five bytes per event."""
    times, rows, columns, polarities = events
    words = [columns, rows, polarities << 7 | times >> 16, times >> 8 & 255, times & 255]
    return np.stack(words, 1).astype(np.uint8).tobytes()


def aedat3(events):
    """DVS128 Gesture: packets with a header of 28 bytes, here one of all events behind one of
    another type.
    """
    times, rows, columns, polarities = events
    words, count = np.stack([columns << 17 | rows << 2 | polarities << 1 | 1, times], 1), len(times)
    special = struct.pack("<HHIIIIII", 0, 0, 8, 4, 0, 1, 1, 1) + bytes(8)
    polarity = (
        struct.pack("<HHIIIIII", 1, 0, 8, 4, 0, count, count, count) + words.astype("<u4").tobytes()
    )
    return b"#!AER-DAT3.1\r\n#Format: RAW\r\n#!END-HEADER\r\n" + special + polarity


def pack_cifar10_dvs(folder, per_class=10):
    """A zip per class; the events by class and number."""
    events = {}
    (folder / "download").mkdir(parents=True)
    for label, name in enumerate(CIFAR_NAMES):
        with ZipFile(folder / "download" / f"{name}.zip", "w") as archive:
            for number in range(per_class):
                events[label, number] = random_events(100 * label + number, 40, 128, 128)
                archive.writestr(
                    f"{name}/cifar10_{name}_{number}.aedat", aedat2(events[label, number])
                )
    return events


def pack_n_mnist(folder, train=3, test=2):
    """Train.zip and Test.zip; the events by part, class and number."""
    events = {}
    (folder / "download").mkdir(parents=True)
    for part, count in (("Train", train), ("Test", test)):
        with ZipFile(folder / "download" / f"{part}.zip", "w") as archive:
            for label, number in product(range(10), range(count)):
                key = (part, label, number)
                events[key] = random_events(
                    1000 * (part == "Test") + 10 * label + number, 30, 34, 34
                )
                archive.writestr(f"{part}/{label}/{10 * number + label:05d}.bin", atis(events[key]))
    return events


def pack_gestures(folder):
    """Two recordings to train on and one to test, with eleven gestures each; the events by
    recording and class.
    """
    events = {}
    home = folder / "tree" / "DvsGesture"
    home.mkdir(parents=True)
    (folder / "download").mkdir()
    names = {"user01_led": "train", "user02_lab": "train", "user24_led": "test"}
    for name in names:
        rows, pieces = ["class,startTime_usec,endTime_usec"], []
        for label in range(11):
            start = 10_000 * (label + 1)
            events[name, label] = random_events(len(name) + 7 * label, 24, 128, 128, start)
            pieces.append(events[name, label])
            rows.append(f"{label + 1},{start},{start + 6000}")
        merged = [np.concatenate(parts) for parts in zip(*pieces, strict=True)]
        (home / f"{name}.aedat").write_bytes(aedat3(merged))
        (home / f"{name}_labels.csv").write_text("\n".join(rows) + "\n")
    for part in ("train", "test"):
        lines = [f"{name}.aedat\n" for name, its in names.items() if its == part]
        (home / f"trials_to_{part}.txt").write_text("".join(lines))
    with tarfile.open(folder / "download" / "DvsGesture.tar.gz", "w:gz") as archive:
        archive.add(home, "DvsGesture")
    for name in ("gesture_mapping.csv", "LICENSE.txt", "README.txt"):
        (folder / "download" / name).write_text(name)
    shutil.rmtree(folder / "tree")
    return events


def trust(monkeypatch, name, folder):
    """Let SpikingJelly take the archives of a folder for the published ones."""
    host = events._host_class(name, EVENT_DATASETS[name][0])
    listed = [
        (file, url, hashlib.md5((folder / "download" / file).read_bytes()).hexdigest())
        for file, url, _ in host.resource_url_md5()
    ]
    monkeypatch.setattr(host, "resource_url_md5", staticmethod(lambda: listed))
