from types import SimpleNamespace

import pytest
import torch
from data.checksum import checksum

from sj_robust.data import Augmentation, images, load_images


def rows(dataset):
    return {image.numpy().tobytes() for image, _ in dataset}


def test_digits():
    splits = load_images("digits", seed=3)
    assert (splits.image_shape, splits.classes, splits.augmentation) == ((1, 8, 8), 10, None)
    assert load_images("digits", augment=True).augmentation == Augmentation()
    assert load_images("digits", augment=True, cutout=0).augmentation == Augmentation(cutout=0)
    with pytest.raises(
        ValueError, match="cutout must be an even number of pixels, 0 for none, got 3"
    ):
        load_images("digits", cutout=3)
    stored = splits.train.dataset.pixels  # a byte per value
    assert (stored.dtype, stored.shape) == (torch.uint8, (1437, 1, 8, 8))


def test_the_digits_where_the_file_of_scikit_learn_is_not(tmp_path, monkeypatch):
    read = checksum(load_images("digits").test)
    monkeypatch.setattr(
        images, "find_spec", lambda _: SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    )
    assert checksum(load_images("digits").test) == read
    monkeypatch.setattr(images, "find_spec", lambda _: None)
    with pytest.raises(
        ModuleNotFoundError, match=r"scikit-learn, which is not installed: pip install 'sj_robust"
    ):
        load_images("digits")


def test_the_seed_moves_the_validation_split_and_never_the_test_images():
    one, other = (load_images("digits", seed=seed) for seed in (0, 1))
    assert rows(one.validation) != rows(other.validation)
    assert checksum(one.test) == checksum(other.test)
    assert rows(one.validation) | rows(one.train) == rows(other.validation) | rows(other.train)


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


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "digits",
            {"on_unreadable": "ignore"},
            r"on_unreadable must be 'error' or 'skip', got 'ignore'",
        ),
        ("imagenet", {}, "digits, fashion_mnist, mnist, .*image_folder:PATH, cifar10_dvs"),
        ("digits", {"train_limit": 0}, "train_limit must be >= 1"),
        ("digits", {"validation_fraction": 0.0}, "validation_fraction"),
        ("digits", {"train_limit": 5}, "validation_fraction"),
    ],
)
def test_wrong_use(name, options, message):
    with pytest.raises(ValueError, match=message):
        load_images(name, **options)
