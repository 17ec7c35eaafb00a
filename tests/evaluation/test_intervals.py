import pytest
import torch

from sj_robust.evaluation.intervals import (
    difference_interval,
    paired_difference_interval,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe (1998), table I
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0000),
    ],
)
def test_published_wilson_intervals(count, total, low, high):
    assert wilson_interval(count, total) == pytest.approx((low, high), abs=6e-5)


def test_paired_intervals_cover():
    """Of 20000 samples of a known difference 93 to 98 % lie in the interval."""
    total = 60
    draws = torch.rand(20000, total, generator=torch.Generator().manual_seed(0))
    gained = (draws < 0.05).sum(1).tolist()
    lost = (draws > 0.85).sum(1).tolist()
    pairs = (paired_difference_interval(b, c, total) for b, c in zip(gained, lost, strict=True))
    covered = [low <= 0.05 - 0.15 <= high for low, high in pairs]
    assert 0.93 < sum(covered) / len(covered) < 0.98


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (
            (56, 70),
            (48, 80),
            (-0.3339, -0.0524),
        ),  # Newcombe (1998), table II, method 10, signs turned
        ((9, 10), (3, 10), (-0.8090, -0.1705)),
        ((10, 10), (0, 20), (-1.0000, -0.6791)),
    ],
)
def test_published_differences(first, second, expected):
    assert difference_interval(*first, *second) == pytest.approx(expected, abs=6e-5)


def test_paired_intervals_are_narrower_and_antisymmetric():
    low, high = paired_difference_interval(5, 1, 100)
    assert (-high, -low) == pytest.approx(paired_difference_interval(1, 5, 100))
    wide_low, wide_high = difference_interval(50, 100, 54, 100)
    assert high - low < 0.5 * (wide_high - wide_low)
