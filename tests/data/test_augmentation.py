import itertools
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform

from sj_robust.core.randomness import SampleDraws, SampleSeeds, rand
from sj_robust.data import Augmentation


def numbers(seed, count=5, purpose="augmentation"):
    """Uniform numbers of an image."""
    draws = SampleDraws(SampleSeeds([seed]).derived(purpose))
    drawn = rand((1, count), draws, dtype=torch.float64, device=torch.device("cpu"))
    return drawn[0].tolist()


def near(i, middle, size):
    """Whether a row or column lies in the square that is cut out."""
    return middle - size // 2 <= i < middle + size // 2


def by_hand(image, seed, *, padding, flip, cutout):
    """One image [C, H, W], pixel by pixel."""
    depth, height, width = image.shape
    top, left, mirror, row, column = numbers(seed)
    places = 2 * padding + 1
    down = int(top * places) - padding
    right = int(left * places) - padding
    row = int(row * height)
    column = int(column * width)
    flipped = flip and mirror >= 0.5
    result = torch.zeros(depth, height, width)
    for i, j in itertools.product(range(height), range(width)):
        cut_out = near(i, row, cutout) and near(j, column, cutout)
        y = i + down
        x = right + (width - 1 - j if flipped else j)
        inside = 0 <= y < height and 0 <= x < width
        if inside and not cut_out:
            result[:, i, j] = image[:, y, x]
    return result


USUAL = {"padding": 4, "flip": True, "cutout": 16}
NOTHING = {"padding": 0, "flip": False, "cutout": 0}


@pytest.mark.parametrize(
    "options",
    [
        USUAL,
        NOTHING | {"padding": 2},
        NOTHING | {"flip": True},
        NOTHING | {"cutout": 6},
        USUAL | {"padding": 3, "cutout": 20},
        NOTHING | {"cutout": 40},
    ],
    ids=str,
)
def test_as_by_hand(options):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(12, 3, 10, 13, generator=generator)
    seeds = range(100, 112)
    result = Augmentation(**options)(images, list(seeds))
    assert result.dtype == images.dtype
    for image, seed, augmented in zip(images, seeds, result, strict=True):
        assert torch.equal(augmented, by_hand(image, seed, **options))


def rotated_by_scipy(image, seed, *, rotation, scale):
    """One image [C, H, W] in float64, each pixel from the point that is rotated onto it."""
    angle, size = numbers(seed, 2, "rotation and size")
    angle = math.radians(rotation) * (2 * angle - 1)
    size = 1 + scale * (2 * size - 1)
    to_source = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / size
    centre = (np.array(image.shape[1:]) - 1) / 2
    planes = [
        affine_transform(
            plane, to_source, centre - to_source @ centre, order=1, mode="grid-constant"
        )
        for plane in image.numpy()
    ]
    return torch.from_numpy(np.stack(planes))


@pytest.mark.parametrize("rotation", [0, 10.0, 180])
@pytest.mark.parametrize("scale", [0, 0.25])
def test_rotation_and_size_as_scipy(rotation, scale):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 2, 9, 14, generator=generator, dtype=torch.float64)
    seeds = list(range(40, 46))
    options = NOTHING | {"rotation": rotation, "scale": scale}
    result = Augmentation(**options)(images, seeds)
    expected = [
        rotated_by_scipy(image, seed, rotation=rotation, scale=scale)
        for image, seed in zip(images, seeds, strict=True)
    ]
    torch.testing.assert_close(result, torch.stack(expected), rtol=0, atol=1e-12)
    assert torch.equal(result, images) == (rotation == scale == 0)
    white = Augmentation(**options)(torch.ones(6, 2, 9, 14), seeds)
    assert 0 <= white.min() <= white.max() <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rotated_in_float32(dtype):
    images = torch.rand(2, 1, 224, 224, generator=torch.Generator().manual_seed(0)).to(dtype)
    augment = Augmentation(**NOTHING, rotation=20, scale=0.1)
    result = augment(images, [1, 2])
    assert torch.equal(result, augment(images.float(), [1, 2]).to(dtype))
    assert 0 <= result.min() <= result.max() <= 1


def test_images_are_rotated_before_they_are_cropped_and_covered():
    images = torch.rand(5, 1, 12, 12)
    seeds = list(range(5))
    turned = Augmentation(**NOTHING, rotation=30, scale=0.2)(images, seeds)
    together = Augmentation(padding=2, cutout=4, rotation=30, scale=0.2)(images, seeds)
    assert torch.equal(together, Augmentation(padding=2, cutout=4)(turned, seeds))


@pytest.mark.parametrize("options", [{}, {"rotation": 10, "scale": 0.1}], ids=str)
def test_an_image_does_not_depend_on_its_neighbours(options):
    images = torch.rand(9, 3, 32, 32)
    before = images.clone()
    state = torch.get_rng_state()
    augment = Augmentation(**options)
    seeds = [2**61 + 17 * number for number in range(9)]
    together = augment(images, seeds)
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)
    order = [4, 0, 8, 2]
    their_seeds = [seeds[number] for number in order]
    some = augment(images[order], their_seeds)
    assert torch.equal(some, together[order])
    other_seeds = [seed + 1 for seed in seeds]
    others = augment(images, other_seeds)
    assert not torch.equal(others, together)
    precise = augment(images.double(), seeds)
    torch.testing.assert_close(precise, together.double(), rtol=0, atol=1e-4 if options else 0)
    nothing = Augmentation(**NOTHING)
    assert torch.equal(nothing(images, seeds), images)


def test_frames_of_one_sample_are_treated_alike():
    frames = (torch.rand(4, 5, 2, 12, 12) < 0.2).float()
    seeds = [1, 2, 3, 4]
    for options in ({}, {"rotation": 10, "scale": 0.1}):
        augment = Augmentation(cutout=4, **options)
        result = augment(frames, seeds)
        for t in range(5):
            alone = augment(frames[:, t], seeds)
            assert torch.equal(result[:, t], alone)
    assert Augmentation(cutout=4)(frames, seeds).unique().tolist() == [0.0, 1.0]
