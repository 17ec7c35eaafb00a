"""Event frames made from images: the sensor written once more, and the file that keeps them."""

import errno
import math
import tempfile

import numpy as np
import pytest
import torch
from data.test_images import checksums, sizes
from data.test_torchvision_sets import write_mnist

from sj_robust.data import image_loader, load_images, saccades

CORNERS = [(-1, 1), (0, -1), (1, 1), (-1, 1)]
STEPS = 16


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sj_robust"


def intensity(image, row, column):
    """Of an image on black ground, between four pixels."""
    top, left = math.floor(row), math.floor(column)
    total = 0.0
    for y in (top, top + 1):
        for x in (left, left + 1):
            if 0 <= y < len(image) and 0 <= x < len(image[0]):
                total += (1 - abs(row - y)) * (1 - abs(column - x)) * image[y][x]
    return total


def seen_by_a_pixel(image, row, column, threshold):
    """Steps and numbers, with their sign, of the events of one pixel, whose log intensities are in
    units of 1 / 65536: where the image comes back to a place, a change is a multiple of the
    threshold.
    """
    amplitude = max(1, round(3 * len(image) / 28))
    x, y = (amplitude * part for part in CORNERS[0])
    places = [(x, y)]
    for end in CORNERS[1:]:
        to_x, to_y = (amplitude * part for part in end)
        for step in range(1, STEPS + 1):
            share = step / STEPS
            places.append((x + share * (to_x - x), y + share * (to_y - y)))
        x, y = to_x, to_y
    events = []
    remembered = None
    for step, (dx, dy) in enumerate(places):
        here = intensity(image, row - amplitude - dy, column - amplitude - dx)
        log = round(65536 * math.log(here + 0.1))
        if remembered is None:
            remembered = log
        number = abs(log - remembered) // threshold
        if number:
            sign = 1 if log > remembered else -1
            events.append((step - 1, sign * number))
            remembered += sign * number * threshold
    return events


def test_events_are_those_of_a_sensor_written_once_more(monkeypatch):
    monkeypatch.setattr(saccades, "_MISMATCH", 0.0)
    pixels = torch.tensor(np.random.default_rng(0).integers(0, 256, (1, 8, 8)), dtype=torch.int32)
    frames = saccades._events(pixels, 48, saccades._log_intensities(255))[0]
    assert frames.shape == (48, 2, 10, 10)
    image = (pixels[0].double() / 255).tolist()
    different = 0
    for row in range(10):
        for column in range(10):
            expected = torch.zeros(48, 2, dtype=torch.int32)
            for step, number in seen_by_a_pixel(image, row, column, 19661):
                expected[step, int(number > 0)] = abs(number)
            different += int(not torch.equal(expected, frames[:, :, row, column]))
    assert different <= 1  # intensities may be rounded differently
    assert (frames > 0).sum() > 500
    assert frames.max() > 1


CHECKSUMS = ["aa2b3ebb09359142", "35c352904e1430d1", "13c815a1ee3c3933"]


def test_the_digits_are_the_same_events_on_every_machine():
    splits = load_images("saccade:digits", T=4)
    assert splits.frames
    assert splits.image_shape == (2, 10, 10)
    assert splits.classes == 10
    assert sizes(splits) == [1294, 143, 360]
    assert checksums(splits) == CHECKSUMS
    x, y = splits.test[3]
    assert x.shape == (4, 2, 10, 10)
    assert x.dtype == torch.float32
    assert set(x.unique().tolist()) == {0.0, 1.0}
    assert int(y) == int(load_images("digits").test[3][1])
    first, labels = next(iter(image_loader(splits.test, 8)))
    assert first.shape == (8, 4, 2, 10, 10)
    assert torch.equal(first[3], x)
    assert labels[3] == y


def test_counts_are_the_numbers_of_the_events_of_binary_frames(cache):
    options = {"T": 3, "test_limit": 20}
    binary = load_images("saccade:digits", **options)
    counted = load_images("saccade:digits", counts=True, **options)
    fine = load_images("saccade:digits", counts=True, T=12, test_limit=20)
    assert counted.frames
    assert counted.image_shape == binary.image_shape
    for one, few, many in zip(binary.test, counted.test, fine.test, strict=True):
        assert few[0].dtype == torch.float32
        assert torch.equal((few[0] > 0).float(), one[0])
        assert torch.equal(many[0].view(3, 4, 2, 10, 10).sum(1), few[0])
        assert int(few[1]) == int(one[1])
    x, _ = next(iter(image_loader(counted.test, 20)))
    assert torch.equal(x[3], counted.test[3][0])
    assert x.max() > 2
    for frames, _ in binary.test:
        assert bool((frames.flatten(2).sum(2) > 0).all())  # both polarities in every saccade
    assert not cache.exists()


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_a_set_is_made_once_and_kept_whole(name, tmp_path, cache, monkeypatch):
    root = tmp_path / "data"
    write_mnist(root)
    made = load_images(f"saccade:{name}", root=root, T=3)
    (path,) = cache.iterdir()
    assert path.name.startswith(f"saccade-{name}-T3-v1-")
    with monkeypatch.context() as patched:
        patched.setattr(saccades, "_bits", None)  # nothing is made anew
        again = load_images(f"saccade:{name}", root=root, T=3)
    assert checksums(again) == checksums(made)
    assert sizes(made) == [36, 4, 20]
    load_images(f"saccade:{name}", root=root, T=2)
    write_mnist(root, train=30)
    load_images(f"saccade:{name}", root=root, T=3)
    assert len(list(cache.iterdir())) == 3  # other frames and other images are other files


def test_a_file_that_is_not_finished_is_not_there(tmp_path, cache, monkeypatch):
    write_mnist(tmp_path)

    def stopped(bits, file):
        file.write(b"begun")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            load_images("saccade:mnist", root=tmp_path, T=2)
    assert list(cache.iterdir()) == []
    assert len(load_images("saccade:mnist", root=tmp_path, T=2).test) == 20


def test_a_kept_file_is_read_where_nothing_can_be_written_and_a_damaged_one_is_refused(
    tmp_path, cache, monkeypatch
):
    write_mnist(tmp_path)
    made = load_images("saccade:mnist", root=tmp_path, T=2)

    def read_only(**arguments):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    assert checksums(load_images("saccade:mnist", root=tmp_path, T=2)) == checksums(made)
    with pytest.raises(ValueError, match="XDG_CACHE_HOME"):
        load_images("saccade:mnist", root=tmp_path, T=3)
    (path,) = cache.iterdir()
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=path.name):
        load_images("saccade:mnist", root=tmp_path, T=2)
