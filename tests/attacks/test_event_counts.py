"""Event attacks on frames that hold numbers of events, not 0 or 1 alone."""

import pytest
import torch
from attacks.table import seeded
from proofs.moved import all_moved
from torch import nn

from sj_robust.attacks import (
    ThreatModel,
    count_flips,
    count_moves,
    flip_events,
    move_events,
    random_flips,
    random_moves,
)
from sj_robust.core.randomness import SampleSeeds
from sj_robust.evaluation import Member
from sj_robust.evaluation.run.member import craft

T = 4


def frames(count=6, *, most=3, seed=0):
    drawn = torch.rand(count, T, 2, 3, 3, generator=seeded(seed))
    numbers = torch.randint(1, most + 1, drawn.shape, generator=seeded(seed + 1))
    return (drawn < 0.4) * numbers.float()


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(T * 18, 3))


MOVES = {"moves": 4, "largest_shift": 1}
ATTACKS = {
    "flips": (lambda *given, **more: flip_events(*given, flips=4, **more), ThreatModel("L0", 4)),
    "random flips": (
        lambda *given, **more: random_flips(*given, flips=4, tries=5, **more),
        ThreatModel("L0", 4),
    ),
    "moves": (
        lambda *given, **more: move_events(*given, **MOVES, **more),
        ThreatModel("moves", 4, largest_shift=1),
    ),
    "random moves": (
        lambda *given, **more: random_moves(*given, **MOVES, tries=5, **more),
        ThreatModel("moves", 4, largest_shift=1),
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_counts_stay_counts_within_the_budget(name):
    attack, threat = ATTACKS[name]
    for seed in range(3):
        model, x = linear(seed), frames(seed=seed)
        y = model(x).argmax(1)
        x_adv = attack(model, x, y, generator=seeded(seed))
        assert ((x_adv >= 0) & (x_adv == x_adv.round())).all()
        assert (threat.distance(x, x_adv) <= 4).all()
        assert threat.contains(x, x_adv).all()
        assert torch.equal(threat.project(x, x_adv), x_adv)
        assert not torch.equal(x_adv, x)
        if threat.norm == "moves":
            assert torch.equal(x_adv.sum(1), x.sum(1))
        else:
            assert torch.equal(count_flips(x_adv, x), (x_adv - x).abs().flatten(1).sum(1).long())
        member = Member(name, attack, threat=threat)
        seeds = SampleSeeds(range(len(x)))
        crafted = craft(model, x, y, member, seeds=seeds)
        assert threat.contains(x, crafted).all()


def test_an_event_joins_others_in_a_frame():
    x = torch.zeros(1, T, 2, 1, 1)
    x[0, :2, 0] = 2.0  # a binary frame would have no room
    weight = torch.tensor([0.0, 3.0, 1.0, 0.0]).repeat_interleave(2)

    def model(z):
        return torch.stack([torch.full((len(z),), 8.5), z.flatten(1) @ weight], 1)

    x_adv = move_events(model, x, torch.tensor([0]), moves=1, largest_shift=1)
    assert x_adv[0, :, 0].flatten().tolist() == [1.0, 3.0, 0.0, 0.0]
    found = count_moves(x_adv, x)
    assert (int(found.events), int(found.largest_shift)) == (1, 1)


def test_an_event_is_added_to_others_or_removed_from_them():
    x = torch.full((1, T, 1, 1, 1), 2.0)
    weight = torch.tensor([4.0, -3.0, 1.0, 0.0])

    def model(z):
        return torch.stack([torch.full((len(z),), 9.5), z.flatten(1) @ weight], 1)

    x_adv = flip_events(model, x, torch.tensor([0]), flips=2)
    assert x_adv.flatten().tolist() == [3.0, 1.0, 2.0, 2.0]


def test_moves_of_counts_are_counted_in_their_order_of_time():
    x = torch.tensor([2.0, 1.0, 0.0, 0.0]).view(1, T, 1, 1, 1)
    x_adv = torch.tensor([0.0, 1.0, 1.0, 1.0]).view(1, T, 1, 1, 1)
    found = count_moves(x_adv, x)
    assert [int(part) for part in found] == [2, 3, 5, 1]
    assert float(ThreatModel("moves", 2, largest_shift=2).distance(x, x_adv)) == float("inf")
    assert float(ThreatModel("moves", 3, largest_shift=2).distance(x, x_adv)) == 3


@pytest.mark.parametrize(("shift", "expected"), [(3, 1.0), (2, 2.0), (1, float("inf"))])
def test_events_in_between_make_way(shift, expected):
    """From frame 0 to frame 3 an event needs others that move on, if it may not go so far."""
    x = torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, T, 1, 1, 1)
    x_adv = torch.tensor([0.0, 1.0, 0.0, 1.0]).view(1, T, 1, 1, 1)
    assert float(ThreatModel("moves", 4, largest_shift=shift).distance(x, x_adv)) == expected


def test_a_move_that_nothing_can_make_way_for_is_outside_at_once():
    """Of 30 events in between there are a billion choices of others to move on."""
    steps = torch.arange(40)
    x = ((steps >= 5) & (steps < 35)).float()
    x_adv = x.clone()
    x[0], x_adv[-1] = 1.0, 1.0
    pair = [frames.view(1, 40, 1, 1, 1) for frames in (x, x_adv)]
    threat = ThreatModel("moves", 40, largest_shift=2)
    assert float(threat.distance(*pair)) == float("inf")


def test_distances_are_the_fewest_moves_of_all():
    for most in (1, 2):
        x = frames(1, most=most, seed=3)[:, :, :1, :2, :2]
        x = (x > 0).to(x) if most == 1 else x
        threat = ThreatModel("moves", 3, largest_shift=1)
        every = all_moved(x[0], 3, 1, binary=most == 1)
        assert threat.contains(x.expand_as(every), every).all()
        wider = all_moved(x[0], 3, 2, binary=most == 1)
        inside = threat.contains(x.expand_as(wider), wider)
        known = {tuple(one.flatten().tolist()) for one in every}
        expected = [tuple(one.flatten().tolist()) in known for one in wider]
        assert inside.tolist() == expected
        assert not all(expected)


def test_binary_frames_do_not_become_counts():
    x = torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, T, 1, 1, 1)
    stacked = torch.tensor([0.0, 2.0, 0.0, 0.0]).view(1, T, 1, 1, 1)
    assert float(ThreatModel("moves", 1).distance(x, stacked)) == float("inf")
    member = Member("mine", lambda model, z, y, **_: stacked, threat=ThreatModel("L0", 5))
    with pytest.raises(ValueError, match="must leave event frames binary"):
        craft(linear_of(T), x, torch.tensor([0]), member, seeds=SampleSeeds([0]))


def linear_of(size):
    return nn.Sequential(nn.Flatten(), nn.Linear(size, 2))
