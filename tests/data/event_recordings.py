"""Tiny event recordings in the raw formats of three data sets, packed as they are published."""

import hashlib
import shutil
import struct
import tarfile
from dataclasses import dataclass, fields
from itertools import product
from zipfile import ZipFile

import numpy as np

from sj_robust.core.datasets import RECORDINGS
from sj_robust.data import events

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


@dataclass(frozen=True)
class Events:
    """Times, rows, columns and polarities, sorted by time."""

    times: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    polarities: np.ndarray

    @classmethod
    def joined(cls, pieces):
        """One recording after the other."""
        columns = {}
        for field in fields(cls):
            parts = [getattr(piece, field.name) for piece in pieces]
            columns[field.name] = np.concatenate(parts)
        return cls(**columns)


def random_events(seed, count, size, start=0):
    """Events of a camera of size x size pixels."""
    draw = np.random.default_rng(seed)
    return Events(
        times=start + np.sort(draw.integers(0, 5000, count)),
        rows=draw.integers(0, size, count),
        columns=draw.integers(0, size, count),
        polarities=draw.integers(0, 2, count),
    )


def frames_by_hand(events, T, size):
    """Where there was any event, frame by frame, with an equal number of events per frame and the
    rest in the last.
    """
    frames = np.zeros((T, 2, size, size), dtype=np.float32)
    count = len(events.times)
    each = count // T
    for i in range(count):
        t = min(i // each, T - 1)
        frames[t, events.polarities[i], events.rows[i], events.columns[i]] = 1
    return frames


def aedat2(events):
    """CIFAR10-DVS: the camera's axes are exchanged and turned, and its polarity is reversed."""
    first = (127 - events.columns) << 8
    second = (127 - events.rows) << 1
    addresses = first | second | (1 - events.polarities)
    words = np.stack([addresses, events.times], 1)
    return b"#!AER-DAT2.0\r\n# Timestamps tick is 1 us\r\n" + words.astype(">u4").tobytes()


def atis(events):
    """N-MNIST: five bytes per event."""
    times = events.times
    words = [
        events.columns,
        events.rows,
        events.polarities << 7 | times >> 16,
        times >> 8 & 255,
        times & 255,
    ]
    return np.stack(words, 1).astype(np.uint8).tobytes()


def aedat3(events):
    """DVS128 Gesture: packets with a header of 28 bytes, here one of all events behind one of
    another type.
    """
    addresses = events.columns << 17 | events.rows << 2 | events.polarities << 1 | 1
    words = np.stack([addresses, events.times], 1)
    special = packet(0, 1, bytes(8))
    polarity = packet(1, len(words), words.astype("<u4").tobytes())
    return b"#!AER-DAT3.1\r\n#Format: RAW\r\n#!END-HEADER\r\n" + special + polarity


def packet(kind, count, content):
    header = struct.pack("<HHIIIIII", kind, 0, 8, 4, 0, count, count, count)
    return header + content


def pack_cifar10_dvs(folder, per_class=10):
    """A zip per class; the events by class and number."""
    events = {}
    (folder / "download").mkdir(parents=True)
    for label, name in enumerate(CIFAR_NAMES):
        with ZipFile(folder / "download" / f"{name}.zip", "w") as archive:
            for number in range(per_class):
                recording = random_events(100 * label + number, 40, 128)
                archive.writestr(f"{name}/cifar10_{name}_{number}.aedat", aedat2(recording))
                events[label, number] = recording
    return events


def pack_n_mnist(folder, train=3, test=2):
    """Train.zip and Test.zip; the events by part, class and number."""
    events = {}
    (folder / "download").mkdir(parents=True)
    for part, count, seed in (("Train", train, 0), ("Test", test, 1000)):
        with ZipFile(folder / "download" / f"{part}.zip", "w") as archive:
            for label, number in product(range(10), range(count)):
                recording = random_events(seed + 10 * label + number, 30, 34)
                file = f"{part}/{label}/{10 * number + label:05d}.bin"
                archive.writestr(file, atis(recording))
                events[part, label, number] = recording
    return events


def pack_gestures(folder):
    """Two recordings to train on and one to test, with eleven gestures each; the events by
    recording and class.
    """
    events = {}
    home = folder / "tree" / "DvsGesture"
    home.mkdir(parents=True)
    (folder / "download").mkdir()
    for name in ("user01_led", "user02_lab", "user24_led"):
        rows = ["class,startTime_usec,endTime_usec\n"]
        pieces = []
        for label in range(11):
            start = 10_000 * (label + 1)
            piece = random_events(len(name) + 7 * label, 24, 128, start)
            events[name, label] = piece
            pieces.append(piece)
            rows.append(f"{label + 1},{start},{start + 6000}\n")
        (home / f"{name}.aedat").write_bytes(aedat3(Events.joined(pieces)))
        (home / f"{name}_labels.csv").write_text("".join(rows))
    (home / "trials_to_train.txt").write_text("user01_led.aedat\nuser02_lab.aedat\n")
    (home / "trials_to_test.txt").write_text("user24_led.aedat\n")
    with tarfile.open(folder / "download" / "DvsGesture.tar.gz", "w:gz") as archive:
        archive.add(home, "DvsGesture")
    for name in ("gesture_mapping.csv", "LICENSE.txt", "README.txt"):
        (folder / "download" / name).write_text(name)
    shutil.rmtree(folder / "tree")
    return events


def trust(monkeypatch, name, folder):
    """Let SpikingJelly take the archives of a folder for the published ones."""
    host = events._host_class(name, RECORDINGS[name][0])
    listed = []
    for file, url, _ in host.resource_url_md5():
        content = (folder / "download" / file).read_bytes()
        listed.append((file, url, hashlib.md5(content).hexdigest()))
    monkeypatch.setattr(host, "resource_url_md5", staticmethod(lambda: listed))
