"""Gains of events that move along a line, and what stands in their way."""

import pytest
import torch
import torch.nn.functional as F
from proofs.event_balls import (
    KINDS,
    T,
    by_step,
    entering,
    extremes,
    frames,
    lines_reached,
    weights,
)
from torch.testing import assert_close

from sj_robust.proofs import moves
from sj_robust.proofs.moves import MovedEvents


def binary_lines(steps):
    """All of so many frames, [2**steps, steps]."""
    values = torch.tensor([0.0, 1.0]).double()
    return torch.cartesian_prod(*[values] * steps)


def convolved(z):
    """Of frames [N, T, 1, H, W], step by step."""
    source = weights()
    kernel = source(3, 1, 2, 2)
    bias = source(3)
    return F.conv2d(by_step(z), kernel, bias)


def each_convolved(every):
    return convolved(every).unflatten(0, (-1, T))


@pytest.mark.parametrize("kind", ["moves", "moved counts"])
@pytest.mark.parametrize(("budget", "shift"), [(2, 2), (3, 1)])
def test_a_step_is_bounded_exactly_for_longer_and_for_more_moves(budget, shift, kind):
    kind = KINDS[kind]
    x = kind.apart(1, T, 1, 2, 3, seed=5)
    ball = MovedEvents.of(x, budget, shift, counts=kind.counts)
    found = convolved(entering(x, ball))
    low, high = extremes(each_convolved, x[0], ball)
    assert_close(found.least, low)
    assert_close(found.most, high)


def test_a_step_whose_events_are_in_each_others_way_is_bounded():
    x = frames(1, T, 1, 2, 3, seed=5)
    ball = MovedEvents.of(x, 2, 1)
    found = convolved(entering(x, ball))
    low, high = extremes(each_convolved, x[0], ball)
    assert (found.least <= low + 1e-12).all()
    assert (found.most >= high - 1e-12).all()
    assert (found.most > high + 1e-9).any()


def test_an_event_between_events_leaves_only_if_they_make_way():
    """One move by one frame cannot empty the first of 1, 1, 0; two can."""
    line = torch.tensor([1.0, 1.0, 0.0]).double()
    x = line.view(1, T, 1, 1, 1)
    _, with_one_move = MovedEvents(1, 1).reach(x)
    _, with_two_moves = MovedEvents(2, 1).reach(x)
    assert with_one_move.flatten().tolist() == [0.0, 1.0, 0.0]
    assert with_two_moves.flatten().tolist() == [1.0, 1.0, 0.0]
    assert (0, 1, 1) in lines_reached(line, 2, 1, binary=True)


@pytest.mark.parametrize("steps", [2, 4, 5])
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_gains_of_binary_lines_are_those_of_all_their_moves(steps, shift):
    ball = MovedEvents(2, min(shift, steps - 1))
    lines = binary_lines(steps)
    weights = frames(len(lines), steps, seed=steps, most=9) - 4
    for line, own, gains in zip(lines, weights, ball.gains(lines, weights), strict=True):
        one, two = best_gains(line, own, ball)
        # exact if what the second move adds is not more than the first
        expected = [max(one, two / 2), two]
        none_behind = F.pad(gains, (0, 2))
        assert none_behind.cumsum(0)[:2].tolist() == pytest.approx(expected)


def best_gains(line, weights, ball):
    """What one move adds to the weighted sum of a line at most, and what up to two add."""
    one = two = 0.0
    for after, price in lines_reached(line, 2, ball.largest_shift, binary=True).items():
        gain = float((weights * (torch.tensor(after) - line)).sum())
        two = max(two, gain)
        if price <= 1:
            one = max(one, gain)
    return one, two


def test_gains_without_a_list_are_not_smaller(monkeypatch):
    ball = MovedEvents(2, 1)
    lines = binary_lines(4)
    weights = frames(len(lines), 4, seed=1, most=9)
    listed = ball.gains(lines, weights).sum(1)
    monkeypatch.setattr(moves, "_LISTED", 0)
    moves._listed_moves.cache_clear()
    alone = ball.gains(lines, weights).sum(1)
    moves._listed_moves.cache_clear()
    assert (alone >= listed - 1e-12).all()
    assert (alone > listed + 1e-9).any()


def test_rows_with_several_frames_have_no_bounds_of_moves():
    x = frames(1, T, 1, 2, 2)
    ball = MovedEvents.of(x, 1, 1)
    weight = weights()(3, 12)

    def function(z):
        return F.linear(z.flatten(1), weight)

    summed = F.linear(entering(x, ball).flatten(1), weight)
    assert summed.changes is None
    low, high = extremes(function, x[0], ball)
    assert (summed.least <= low).all()
    assert (summed.most >= high).all()


def test_moves_of_counts_may_share_a_place():
    x = torch.ones(1, 2, 1, 1, 1)
    onto = torch.tensor([[[[[-1.0]]], [[[0.0]]]]])
    assert MovedEvents(1, 1).lowest(x, onto).flatten().tolist() == [1.0, 1.0]
    assert MovedEvents(1, 1, counts=True).lowest(x, onto).flatten().tolist() == [2.0, 0.0]
