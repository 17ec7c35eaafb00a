"""Events that a proof leaves open: no event that is ruled out is part of a set that breaks."""

import torch
from proofs.moved import all_moved
from proofs.test_flips import all_changed
from proofs.test_moves import T, frames, tiny

from sj_robust.proofs.flips import Flips
from sj_robust.proofs.moves import Moves
from sj_robust.proofs.open_events import open_events, worst_with


def all_sets(ball, sample):
    """Every set of changes or of moves of a sample [T, *]."""
    if isinstance(ball, Flips):
        return all_changed(sample.flatten(), int(ball.budget)).view(-1, *sample.shape)
    return all_moved(sample, int(ball.budget), ball.largest_shift)


def test_no_event_that_is_ruled_out_breaks_a_sample():
    ruled_out = 0
    broken = 0
    for seed in range(3):
        model = tiny(seed)
        x = frames(2, T, 2, 3, 3, seed=seed).float()
        y = model(x).argmax(1)
        for ball in (Flips(2), Moves(2, 1)):
            found = open_events(model, x, y, ball)
            for number, sample in enumerate(x):
                every = all_sets(ball, sample)
                breaks = model(every).argmax(1) != y[number]
                touched = every[breaks] != sample
                if isinstance(ball, Moves):
                    touched &= sample > 0  # the event itself, and not where it goes
                lowers = found.falls[number] > 0
                assert not (touched.any(0) & lowers & ~found.is_open[number]).any()
                broken += int(breaks.sum())
                if float(found.margin[number]) > 0:
                    assert not found.is_open[number].any()
                    assert not breaks.any()
                else:
                    ruled_out += int((~found.is_open[number] & lowers).sum())
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
