"""Events that a proof leaves open: no event that is ruled out is part of a set that breaks."""

import pytest
import torch
from proofs.event_balls import KINDS, all_of, tiny

from sj_robust.proofs.flips import Flips
from sj_robust.proofs.moves import Moves
from sj_robust.proofs.open_events import open_events, worst_with


@pytest.mark.parametrize("name", ["flips", "changed counts", "moves"])
def test_no_event_that_is_ruled_out_breaks_a_sample(name):
    kind = KINDS[name]
    ruled_out = 0
    broken = 0
    for seed, budget in ((3, 1), (5, 1), (9, 1), (12, 2)):
        model = tiny(seed)
        x, y = kind.classified(model, 2, seed=seed)
        ball = kind.ball(x, budget)
        found = open_events(model, x, y, ball)
        for number, sample in enumerate(x):
            every = all_of(ball, sample)
            breaks = model(every).argmax(1) != y[number]
            touched = every[breaks] != sample
            if kind.moves:
                touched &= sample > 0  # the event itself, and not where it goes
            is_open = found.is_open[number]
            lowers = found.falls[number] > 0
            assert not (touched.any(0) & lowers & ~is_open).any()
            if budget == 1:  # a single change that breaks is open
                assert (is_open & touched).flatten(1).any(1).all()
            broken += int(breaks.sum())
            if float(found.margin[number]) > 0:
                assert not is_open.any()
                assert not breaks.any()
            else:
                ruled_out += int((~is_open & lowers).sum())
    assert broken > 0
    assert ruled_out > 0


def test_falls_are_those_of_one_change_or_move():
    x = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1, 1)
    weights = torch.tensor([1.0, -2.0, 3.0]).view(1, 3, 1, 1, 1)
    assert Flips(1).falls(x, weights).flatten().tolist() == [1.0, 2.0, 0.0]
    assert Moves(1, 1).falls(x, weights).flatten().tolist() == [3.0, 0.0, 0.0]


def test_a_place_that_holds_two_events_counts_twice():
    falls = torch.tensor([[1.0, 0.5, 0.0]])
    once, twice = torch.tensor([1, 1, 1]), torch.tensor([2, 1, 1])
    assert worst_with(falls, once, 2).tolist() == [[1.5, 1.5, 1.0]]
    assert worst_with(falls, twice, 2).tolist() == [[2.0, 1.5, 1.0]]
    assert worst_with(falls, twice, 9).tolist() == [[2.5, 2.5, 2.5]]
    assert worst_with(falls, twice, 0).tolist() == [[0.0, 0.0, 0.0]]
