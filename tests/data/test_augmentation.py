import numpy as np
import pytest
import torch

from sj_robust.core.randomness import SampleDraws, SampleSeeds, rand
from sj_robust.data import Augmentation


def numbers(seed):
    """The five uniform numbers of an image."""
    draws = SampleDraws(SampleSeeds([seed]).derived("augmentation"))
    return rand((1, 5), draws, dtype=torch.float64, device=torch.device("cpu"))[0].tolist()


def by_hand(image, seed, padding, flip, cutout):
    """One image [C, H, W], pixel by pixel."""
    depth, height, width = image.shape
    top, left, mirror, row, column = numbers(seed)
    top, left = (int(number * (2 * padding + 1)) for number in (top, left))
    row, column = int(row * height), int(column * width)
    result = np.zeros((depth, height, width), dtype=np.float32)
    for i in range(height):
        for j in range(width):
            if (
                row - cutout // 2 <= i < row + cutout // 2
                and column - cutout // 2 <= j < column + cutout // 2
            ):
                continue
            across = width - 1 - j if flip and mirror >= 0.5 else j
            source = (i + top - padding, across + left - padding)
            if 0 <= source[0] < height and 0 <= source[1] < width:
                result[:, i, j] = image[:, source[0], source[1]]
    return torch.from_numpy(result)


@pytest.mark.parametrize(
    ("padding", "flip", "cutout"),
    [(4, True, 16), (2, False, 0), (0, True, 0), (0, False, 6), (3, True, 20), (0, False, 40)],
)
def test_as_by_hand(padding, flip, cutout):
    images = torch.rand(12, 3, 10, 13, generator=torch.Generator().manual_seed(0))
    seeds = list(range(100, 112))
    result = Augmentation(padding, flip, cutout)(images, seeds)
    expected = [
        by_hand(image.numpy(), seed, padding, flip, cutout)
        for image, seed in zip(images, seeds, strict=True)
    ]
    assert torch.equal(result, torch.stack(expected))
    assert result.dtype == images.dtype


def test_an_image_does_not_depend_on_its_neighbours():
    images = torch.rand(9, 3, 32, 32)
    before, state = images.clone(), torch.get_rng_state()
    seeds = [2**61 + 17 * number for number in range(9)]
    together = Augmentation()(images, seeds)
    assert torch.equal(images, before)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(Augmentation(0, False, 0)(images, seeds), images)
    order = [4, 0, 8, 2]
    assert torch.equal(Augmentation()(images[order], [seeds[at] for at in order]), together[order])
    assert not torch.equal(Augmentation()(images, [seed + 1 for seed in seeds]), together)
    assert torch.equal(Augmentation()(images.double(), seeds), together.double())


def test_frames_of_one_sample_are_treated_alike():
    frames = (torch.rand(4, 5, 2, 12, 12) < 0.2).float()
    result = Augmentation(cutout=4)(frames, [1, 2, 3, 4])
    for t in range(5):
        assert torch.equal(result[:, t], Augmentation(cutout=4)(frames[:, t], [1, 2, 3, 4]))
    assert set(result.unique().tolist()) == {0.0, 1.0}


def test_wrong_use():
    for use, message in (
        (lambda: Augmentation(padding=-1), r"padding must be >= 0, got -1"),
        (
            lambda: Augmentation(cutout=15),
            r"cutout must be an even number of pixels, 0 for none, got 15",
        ),
        (
            lambda: Augmentation()(torch.rand(2, 1, 8, 8), [1]),
            r"one seed each, got shape \[2, 1, 8, 8\] and 1 seeds",
        ),
        (lambda: Augmentation()(torch.rand(1, 8, 8), [1]), r"must be \[N, C, H, W\]"),
        (lambda: Augmentation()(torch.rand(1, 1, 8, 8), [-1]), r"seeds must lie in \[0, 2\*\*62\)"),
    ):
        with pytest.raises(ValueError, match=message):
            use()
