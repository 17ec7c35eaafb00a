import hashlib

import pytest
import torch

from sj_robust.data import Augmentation, load_images


def stacked(dataset):
    """All images and labels of a part."""
    images, labels = zip(*dataset, strict=True)
    return torch.stack(images), torch.stack(labels)


def rows(dataset):
    return {image.numpy().tobytes() for image, _ in dataset}


def checksum(part):
    digest = hashlib.sha256()
    for image, label in part:
        digest.update(image.numpy().tobytes() + label.numpy().tobytes())
    return digest.hexdigest()[:16]


def test_digits():
    splits = load_images("digits", seed=3)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [1294, 143, 360]
    assert (splits.image_shape, splits.classes, splits.augmentation) == ((1, 8, 8), 10, None)
    assert load_images("digits", augment=True).augmentation == Augmentation()
    images = torch.cat([stacked(part)[0] for part in (splits.train, splits.validation, splits.test)])
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (0, 1)
    assert len({image.numpy().tobytes() for image in images}) > 1790  # the three parts do not overlap
    assert stacked(splits.test)[1].bincount().min() >= 20
    stored = splits.train.dataset.pixels  # a byte per value
    assert (stored.dtype, stored.shape) == (torch.uint8, (1437, 1, 8, 8))


def test_the_seed_moves_the_validation_split_and_never_the_test_images():
    one, same, other = (load_images("digits", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(stacked(one.validation)[0], stacked(same.validation)[0])
    assert torch.equal(stacked(one.train)[1], stacked(same.train)[1])
    assert rows(one.validation) != rows(other.validation)
    assert torch.equal(stacked(one.test)[0], stacked(other.test)[0])
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
        ("digits", {"on_unreadable": "ignore"}, r"on_unreadable must be 'error' or 'skip', got 'ignore'"),
        ("imagenet", {}, "digits, fashion_mnist, mnist, .*image_folder:PATH, cifar10_dvs"),
        ("digits", {"train_limit": 0}, "train_limit must be >= 1"),
        ("digits", {"validation_fraction": 0.0}, "validation_fraction"),
        ("digits", {"train_limit": 5}, "validation_fraction"),
    ],
)
def test_wrong_use(name, options, message):
    with pytest.raises(ValueError, match=message):
        load_images(name, **options)
