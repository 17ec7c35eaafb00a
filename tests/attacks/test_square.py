"""Square Attack: a proposal against the same written out in loops, and ties."""

import math

import numpy as np
import pytest
import torch
from attacks.table import Recorder, linear_model, predicted, seeded, two_classes

from sj_robust.attacks import SampleSeeds, ThreatModel
from sj_robust.attacks import square as square_attack
from sj_robust.attacks.square import _L2, _Linf, break_ties, square_rows
from sj_robust.core.randomness import SampleDraws, rand
from sj_robust.core.threat import linf_bounds

SHAPE = (3, 2, 6, 9)  # samples, channels, height and width


def images(*, low=0.4, high=0.6, seed=0):
    return low + (high - low) * torch.rand(SHAPE, dtype=torch.float64, generator=seeded(seed))


def numbers(seed=1):
    """Two corners, an orientation and a sign per channel, of every sample."""
    return torch.rand(
        3,
        5 + 2,
        dtype=torch.float64,
        generator=seeded(seed),
    )


def square(pair, side):
    """Rows and columns of a square of an image, from two numbers in [0, 1)."""
    height, width = SHAPE[2:]
    top = int(pair[0] * (height - side + 1))
    left = int(pair[1] * (width - side + 1))
    return slice(top, top + side), slice(left, left + side)


def hill(height, width):
    """1 / k^2 for every square of half width < k around the middle that holds the pixel, of length
    1.
    """
    values = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            distance = max(abs(i - height // 2), abs(j - width // 2))
            values[i, j] = sum(1 / k**2 for k in range(distance + 1, max(height, width) // 2 + 2))
    return values / np.linalg.norm(values)


def pyramid(side, is_upright):
    halves = np.concatenate([hill(side // 2, side), -hill(side - side // 2, side)])
    halves /= np.linalg.norm(halves)
    return halves if is_upright else halves.T


def l2_by_hand(best, x, numbers, area, eps):
    """Algorithm 3 of Andriushchenko et al. (2020) for one image [C, H, W] far from the border of
    [0, 1].
    """
    c, h, w = best.shape
    side = max(round(math.sqrt(area * h * w)), 3)
    side = min(side + (side % 2 == 0), h, w)
    delta = best - x
    raised = square(numbers[:2], side)
    emptied = square(numbers[2:4], side)
    unused = max(eps**2 - (delta**2).sum(), 0.0)
    result = delta.copy()
    for k in range(c):
        held = delta[k][raised]
        shape = pyramid(side, numbers[4] >= 0.5) * (1 if numbers[5 + k] < 0.5 else -1)
        shape = shape + held / (np.linalg.norm(held) + 1e-12)
        outside = delta[k].copy()
        outside[raised] = 0.0
        energy = (held**2).sum() + (outside[emptied] ** 2).sum()
        result[k][emptied] = 0.0
        result[k][raised] = shape / np.linalg.norm(shape) * math.sqrt(unused / c + energy)
    return x + result * (eps / np.linalg.norm(result))


@pytest.mark.parametrize("area", [0.8, 0.3, 0.1, 0.001])
def test_linf_gives_one_square_of_the_area_one_colour_per_channel(area):
    x = images()
    drawn = numbers()
    eps = 0.1
    best = x + 0.01
    found = _Linf(*linf_bounds(x, eps=eps)).propose(best, drawn, area)
    side = min(max(round(math.sqrt(area * 6 * 9)), 1), 6)
    for n in range(3):
        expected = best[n].clone()
        rows, columns = square(drawn[n, :2].tolist(), side)
        for k in range(2):
            up = drawn[n, 5 + k] < 0.5
            expected[k, rows, columns] = x[n, k, rows, columns] + (eps if up else -eps)
        torch.testing.assert_close(found[n], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("area", [0.8, 0.3, 0.1, 0.001])
@pytest.mark.parametrize("length", [0.0, 0.2, 0.3])
def test_l2_moves_length_from_one_window_to_another(area, length):
    x = images()
    drawn = numbers()
    eps = 0.3
    delta = images(low=-1.0, high=1.0, seed=2)
    best = x + length * delta / delta.flatten(1).norm(dim=1)[:, None, None, None]
    found = _L2(x, ThreatModel("L2", eps)).propose(best, drawn, area)
    for n in range(3):
        expected = l2_by_hand(
            best[n].numpy(),
            x[n].numpy(),
            drawn[n].tolist(),
            area,
            eps,
        )
        np.testing.assert_allclose(
            found[n].numpy(),
            expected,
            rtol=0,
            atol=1e-9,
        )


def test_numbers_are_drawn_for_256_queries_at_once():
    """So that a seed gives the same images in the next release."""
    x = images().float()
    seeds = SampleSeeds(range(3))
    ball = ThreatModel("Linf", 0.1)
    recorder = Recorder(
        two_classes(lambda x: 1 + 0 * x.sum((1, 2, 3)))
    )  # nothing is better than the first image
    square_rows(
        recorder,
        x,
        torch.ones(3, dtype=torch.int64),
        seeds,
        ball=ball,
        queries=258,
    )
    first, *proposals = recorder.seen
    for query, (block, place), area in (
        (255, (0, 255), 0.05),
        (256, (1, 0), 0.05),
        (257, (1, 1), 0.05),
    ):
        drawn = rand(
            (3, 256, 7), SampleDraws(seeds.derived(block)), dtype=torch.float32, device=x.device
        )
        proposal = _Linf(*linf_bounds(x, eps=0.1)).propose(first, drawn[:, place], area)
        assert torch.equal(proposals[query], proposal)


def test_the_winner_of_a_tie_stands_alone_and_all_else_stays():
    logits = torch.randint(-2, 3, (200, 6), generator=seeded()).float() / 4
    logits[0] = 0.0
    broken = break_ties(logits, logits.argmax(1))
    assert torch.equal(broken.argmax(1), logits.argmax(1))
    assert ((broken == broken.amax(1, keepdim=True)).sum(1) == 1).all()
    changed = broken != logits
    assert 0 < int(changed.any(1).sum()) < 200
    assert changed.sum(1).max() == 1
    torch.testing.assert_close(broken, logits, rtol=2e-7, atol=1e-30)
    assert torch.equal(broken, break_ties(logits, logits.argmax(1)))


def test_a_winner_found_in_another_precision_stays_the_winner_and_gradients_pass():
    exact = torch.tensor([[1.0, 1.0 + 1e-12, 0.0], [2.0, 1.0, 0.0]], dtype=torch.float64)
    rounded = exact.float().requires_grad_()
    assert rounded.argmax(1).tolist() == [0, 0]
    broken = break_ties(rounded, exact.argmax(1))
    assert broken.argmax(1).tolist() == [1, 0]
    assert broken.data_ptr() != rounded.data_ptr()
    (grad,) = torch.autograd.grad((broken * torch.tensor([1.0, 2.0, 3.0])).sum(), rounded)
    assert grad.tolist() == [[1.0, 2.0, 3.0]] * 2


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.12), ("L2", 0.7)])
def test_the_search_goes_on_at_a_tie_that_the_label_wins(norm, eps):
    linear = linear_model(36, seed=3)
    counts = Recorder(lambda x: torch.floor(linear(x)))  # whole numbers, as spike counts are
    x = torch.rand(40, 1, 6, 6, generator=seeded(4))
    y = predicted(counts, x)
    x_adv = square_attack(
        counts,
        x,
        y,
        eps=ThreatModel(norm, eps),
        queries=300,
        generator=SampleSeeds(range(40)),
    )
    standing = predicted(counts, x_adv) == y
    last = counts.sizes[-2]
    # the last query was about every image that is not fooled, and may itself have fooled some
    assert last >= int(standing.sum())
    top = counts(x_adv).topk(2).values
    found = int((standing & (top[:, 0] == top[:, 1])).sum())
    assert found > 0
    assert 0 < last < 40
