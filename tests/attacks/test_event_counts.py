"""Event attacks on frames that hold numbers of events, not 0 or 1 alone."""

from functools import partial

import pytest
import torch
from attacks.table import seeded
from proofs.event_balls import all_moved
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


MOVES = {"moves": 4, "largest_shift": 1, "counts": True}
FOUR = ThreatModel("L0", 4, counts=True)
FOUR_MOVED = ThreatModel("moves", 4, largest_shift=1, counts=True)
ATTACKS = {
    "flips": (partial(flip_events, flips=4, counts=True), FOUR),
    "removals": (partial(flip_events, flips=4, counts=True, allow="remove"), FOUR),
    "random flips": (partial(random_flips, flips=4, counts=True, tries=5), FOUR),
    "moves": (partial(move_events, **MOVES), FOUR_MOVED),
    "random moves": (partial(random_moves, **MOVES, tries=5), FOUR_MOVED),
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

    x_adv = move_events(model, x, torch.tensor([0]), moves=1, largest_shift=1, counts=True)
    assert x_adv[0, :, 0].flatten().tolist() == [1.0, 3.0, 0.0, 0.0]
    found = count_moves(x_adv, x)
    assert (int(found.events), int(found.largest_shift)) == (1, 1)


def test_an_event_is_added_to_others_or_removed_from_them():
    x = torch.full((1, T, 1, 1, 1), 2.0)
    weight = torch.tensor([4.0, -3.0, 1.0, 0.0])
    y = torch.tensor([0])

    def model(z):
        return torch.stack([torch.full((len(z),), 100.0), z.flatten(1) @ weight], 1)

    attack = partial(flip_events, model, x, y, counts=True, queries=0)
    assert attack(flips=3).flatten().tolist() == [5.0, 2.0, 2.0, 2.0]
    assert attack(flips=3, allow="remove").flatten().tolist() == [2.0, 0.0, 2.0, 2.0]
    assert attack(flips=10).flatten().tolist() == [10.0, 0.0, 2.0, 2.0]  # 8 of a value, no more


def test_moves_of_counts_are_counted_in_their_order_of_time():
    x = torch.tensor([2.0, 1.0, 0.0, 0.0]).view(1, T, 1, 1, 1)
    x_adv = torch.tensor([0.0, 1.0, 1.0, 1.0]).view(1, T, 1, 1, 1)
    found = count_moves(x_adv, x)
    assert [int(part) for part in found] == [2, 3, 5, 1]
    two, three = (ThreatModel("moves", m, largest_shift=2, counts=True) for m in (2, 3))
    assert float(two.distance(x, x_adv)) == float("inf")
    assert float(three.distance(x, x_adv)) == 3


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
        threat = ThreatModel("moves", 3, largest_shift=1, counts=most > 1)
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


@pytest.mark.parametrize("name", ATTACKS)
def test_a_sample_alone_has_the_result_that_it_has_beside_any_other(name):
    """Neighbours with more events, with fewer and with none: what a sample becomes is its own."""
    attack, _ = ATTACKS[name]
    model = linear()
    parts = [frames(3, most=most, seed=most) for most in (1, 3, 11)]
    x = torch.cat([*parts, torch.zeros(1, T, 2, 3, 3)])
    y = model(x).argmax(1)
    seeds = SampleSeeds(range(len(x)))
    together = attack(model, x, y, generator=seeds)
    assert not torch.equal(together, x)
    for rows in ([1], [4], [8], [9], [0, 4], [9, 1, 8]):
        rows = torch.tensor(rows)
        apart = attack(model, x[rows], y[rows], generator=seeds.rows(rows))
        assert torch.equal(apart, together[rows]), rows


def test_the_projection_of_counts_keeps_the_largest_changes_and_counts():
    x = torch.tensor([[5.0, 0.0, 1.0, 2.0]])
    for most, wanted, expected in (
        (4, [2.0, 9.0, 1.0, 2.0], [5.0, 4.0, 1.0, 2.0]),
        (10, [2.0, 9.0, 1.0, 2.0], [4.0, 9.0, 1.0, 2.0]),
        (3, [4.6, 0.4, -7.0, 3.6], [5.0, 0.0, 0.0, 4.0]),
        (2, [5.0, 0.0, 1.0, 2.0], [5.0, 0.0, 1.0, 2.0]),
    ):
        threat = ThreatModel("L0", most, counts=True)
        found = threat.project(x, torch.tensor([wanted]))
        assert found.tolist() == [expected]
        assert float(threat.distance(x, found)) <= most


@pytest.mark.parametrize("seed", range(20))
def test_a_projection_of_counts_is_the_nearest_sample_of_the_ball(seed):
    x = torch.randint(0, 4, (5, 6), generator=seeded(seed)).float()
    wanted = x + torch.randint(-5, 6, x.shape, generator=seeded(seed + 100))
    threat = ThreatModel("L0", 1 + seed % 7, counts=True)
    found = threat.project(x, wanted)
    assert threat.contains(x, found).all()
    assert threat.holds_events(found).all()
    reachable = wanted.clamp(min=0)
    left = (found - reachable).abs().sum(1)
    distance = (reachable - x).abs().sum(1)
    assert torch.equal(left, (distance - threat.eps).clamp(min=0))


def test_only_event_frames_hold_counts():
    with pytest.raises(ValueError, match="counts says what event frames hold, got it for Linf"):
        ThreatModel("Linf", 0.1, counts=True)
    with pytest.raises(TypeError, match="counts must be True or False, got 'yes'"):
        ThreatModel("L0", 1, counts="yes")
    twos = torch.full((1, T, 2, 1, 1), 2.0)
    for attack in (random_flips, random_moves):
        budget = {"flips": 1} if attack is random_flips else {"moves": 1}
        with pytest.raises(ValueError, match="for numbers of events pass counts=True"):
            attack(None, twos, **budget)
    assert not ThreatModel("L0", 1).contains(torch.zeros(1, 2), torch.tensor([[1.0, 1.0]]))
    for bad in (-1.0, 0.5, float("inf")):
        x_adv = torch.tensor([[bad, 0.0]])
        assert not ThreatModel("L0", 9, counts=True).contains(torch.zeros(1, 2), x_adv)
