import hashlib
from types import SimpleNamespace

import pytest
import torch

from sj_robust.data import Augmentation, images, load_images


def checksums(splits):
    """Of training, validation and test images."""
    found = []
    for part in (splits.train, splits.validation, splits.test):
        digest = hashlib.sha256()
        for image, label in part:
            digest.update(image.numpy().tobytes())
            digest.update(label.numpy().tobytes())
        found.append(digest.hexdigest()[:16])
    return found


def sizes(splits):
    """Numbers of training, validation and test images."""
    return [len(part) for part in (splits.train, splits.validation, splits.test)]


def rows(dataset):
    return {image.numpy().tobytes() for image, _ in dataset}


def test_digits():
    splits = load_images("digits", seed=3)
    assert splits.image_shape == (1, 8, 8)
    assert splits.classes == 10
    assert splits.augmentation is None
    stored = splits.train.dataset.pixels  # a byte per value
    assert stored.dtype == torch.uint8
    assert stored.shape == (1437, 1, 8, 8)
    assert load_images("digits", augment=False).augmentation is None
    chosen = Augmentation(cutout=14, rotation=10, scale=0.1)
    assert load_images("digits", augment=chosen).augmentation == chosen


def test_the_digits_where_the_file_of_scikit_learn_is_not(tmp_path, monkeypatch):
    read = checksums(load_images("digits"))
    elsewhere = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(images, "find_spec", lambda name: elsewhere)
    assert checksums(load_images("digits")) == read
    monkeypatch.setattr(images, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="scikit-learn"):
        load_images("digits")


def test_the_seed_moves_the_validation_split_and_never_the_test_images():
    one = load_images("digits", seed=0)
    other = load_images("digits", seed=1)
    assert rows(one.validation) != rows(other.validation)
    assert checksums(one)[2] == checksums(other)[2]
    together = rows(one.validation) | rows(one.train)
    assert rows(other.validation) | rows(other.train) == together


FEW = {"seed": 3, "train_limit": 200, "test_limit": 50}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["c24d418612d382a7", "acaad45f0953fe58", "d334356193f16b9d"]),
        (FEW, ["ee638186d4eaca78", "ad2fdca92a5c953b", "ec32bf93b0c436d4"]),
    ],
)
def test_the_digits_are_those_of_the_published_figures(options, expected):
    assert checksums(load_images("digits", **options)) == expected
