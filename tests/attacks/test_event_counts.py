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
OUTSIDE = float("inf")
"""The distance of frames that no moves lead to."""


def frames(count=6, *, most=3, seed=0):
    drawn = torch.rand(count, T, 2, 3, 3, generator=seeded(seed))
    numbers = torch.randint(1, most + 1, drawn.shape, generator=seeded(seed + 1))
    return (drawn < 0.4) * numbers.float()


def line(*values):
    """Frames of one sample with one value each."""
    return torch.tensor(values).view(1, -1, 1, 1, 1)


def linear(features=T * 18, *, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(features, 3))


def against(score, weight):
    """A model of two classes: one has this score, the other the weighted sum of all values."""

    def model(z):
        other = z.flatten(1) @ torch.tensor(weight)
        own = torch.full_like(other, score)
        return torch.stack([own, other], 1)

    return model


FLIPS = {"flips": 4, "counts": True}
MOVES = {"moves": 4, "largest_shift": 1, "counts": True}
ATTACKS = {
    "flips": partial(flip_events, **FLIPS),
    "removals": partial(flip_events, **FLIPS, allow="remove"),
    "random flips": partial(random_flips, **FLIPS, tries=5),
    "moves": partial(move_events, **MOVES),
    "random moves": partial(random_moves, **MOVES, tries=5),
}


def threat_of(name):
    if "moves" in name:
        return ThreatModel("moves", 4, largest_shift=1, counts=True)
    return ThreatModel("L0", 4, counts=True)


@pytest.mark.parametrize("name", ATTACKS)
def test_counts_stay_counts_within_the_budget(name):
    attack = ATTACKS[name]
    threat = threat_of(name)
    for seed in range(3):
        model = linear(seed=seed)
        x = frames(seed=seed)
        y = model(x).argmax(1)
        x_adv = attack(model, x, y, generator=seeded(seed))
        assert not torch.equal(x_adv, x)
        assert (x_adv >= 0).all()
        assert torch.equal(x_adv, x_adv.round())
        assert (threat.distance(x, x_adv) <= 4).all()
        assert threat.contains(x, x_adv).all()
        assert torch.equal(threat.project(x, x_adv), x_adv)
        if threat.norm == "moves":
            assert torch.equal(x_adv.sum(1), x.sum(1))
        else:
            changes = (x_adv - x).abs().flatten(1).sum(1)
            assert torch.equal(count_flips(x_adv, x), changes.long())
        member = Member(name, attack, threat=threat)
        crafted = craft(model, x, y, member, seeds=SampleSeeds(range(len(x))))
        assert threat.contains(x, crafted).all()


def test_an_event_joins_others_in_a_frame():
    x = torch.zeros(1, T, 2, 1, 1)
    x[0, :2, 0] = 2.0  # a binary frame would have no room
    model = against(8.5, [0.0, 0.0, 3.0, 3.0, 1.0, 1.0, 0.0, 0.0])
    y = torch.tensor([0])
    x_adv = move_events(model, x, y, moves=1, largest_shift=1, counts=True)
    assert x_adv[0, :, 0].flatten().tolist() == [1.0, 3.0, 0.0, 0.0]
    found = count_moves(x_adv, x)
    assert int(found.events) == 1
    assert int(found.largest_shift) == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"flips": 3}, [5.0, 2.0, 2.0, 2.0]),
        ({"flips": 3, "allow": "remove"}, [2.0, 0.0, 2.0, 2.0]),
        ({"flips": 10}, [10.0, 0.0, 2.0, 2.0]),  # 8 of a value, no more
    ],
)
def test_an_event_is_added_to_others_or_removed_from_them(options, expected):
    x = line(2.0, 2.0, 2.0, 2.0)
    model = against(100.0, [4.0, -3.0, 1.0, 0.0])
    x_adv = flip_events(model, x, torch.tensor([0]), counts=True, queries=0, **options)
    assert x_adv.flatten().tolist() == expected


def test_moves_of_counts_are_counted_in_their_order_of_time():
    x = line(2.0, 1.0, 0.0, 0.0)
    x_adv = line(0.0, 1.0, 1.0, 1.0)
    found = count_moves(x_adv, x)
    assert [int(part) for part in found] == [2, 3, 5, 1]
    for budget, distance in ((2, OUTSIDE), (3, 3)):
        threat = ThreatModel("moves", budget, largest_shift=2, counts=True)
        assert float(threat.distance(x, x_adv)) == distance


@pytest.mark.parametrize(("shift", "expected"), [(3, 1.0), (2, 2.0), (1, OUTSIDE)])
def test_events_in_between_make_way(shift, expected):
    """From frame 0 to frame 3 an event needs others that move on, if it may not go so far."""
    threat = ThreatModel("moves", 4, largest_shift=shift)
    distance = threat.distance(line(1.0, 1.0, 0.0, 0.0), line(0.0, 1.0, 0.0, 1.0))
    assert float(distance) == expected


def test_a_move_that_nothing_can_make_way_for_is_outside_at_once():
    """Of 30 events in between there are a billion choices of others to move on."""
    between = [1.0] * 30
    x = line(1.0, *[0.0] * 4, *between, *[0.0] * 5)
    x_adv = line(*[0.0] * 5, *between, *[0.0] * 4, 1.0)
    threat = ThreatModel("moves", 40, largest_shift=2)
    assert float(threat.distance(x, x_adv)) == OUTSIDE


@pytest.mark.parametrize("binary", [True, False])
def test_distances_are_the_fewest_moves_of_all(binary):
    x = frames(1, most=1 if binary else 2, seed=3)[:, :, :1, :2, :2]
    threat = ThreatModel("moves", 3, largest_shift=1, counts=not binary)
    every = all_moved(x[0], 3, 1, binary=binary)
    assert threat.contains(x.expand_as(every), every).all()
    wider = all_moved(x[0], 3, 2, binary=binary)
    inside = threat.contains(x.expand_as(wider), wider).tolist()
    known = set(map(tuple, every.flatten(1).tolist()))
    expected = [tuple(one) in known for one in wider.flatten(1).tolist()]
    assert inside == expected
    assert not all(expected)


def test_binary_frames_do_not_become_counts():
    x = line(1.0, 1.0, 0.0, 0.0)
    stacked = line(0.0, 2.0, 0.0, 0.0)
    assert float(ThreatModel("moves", 1).distance(x, stacked)) == OUTSIDE
    member = Member("mine", lambda model, z, y, **_: stacked, threat=ThreatModel("L0", 5))
    y = torch.tensor([0])
    with pytest.raises(ValueError, match="must leave event frames binary"):
        craft(linear(T), x, y, member, seeds=SampleSeeds([0]))


@pytest.mark.parametrize("name", ATTACKS)
def test_a_sample_alone_has_the_result_that_it_has_beside_any_other(name):
    """Neighbours with more events, with fewer and with none: what a sample becomes is its own."""
    attack = ATTACKS[name]
    model = linear()
    parts = [frames(3, most=most, seed=most) for most in (1, 3, 11)]
    x = torch.cat([*parts, torch.zeros(1, T, 2, 3, 3)])
    y = model(x).argmax(1)
    seeds = SampleSeeds(range(len(x)))
    together = attack(model, x, y, generator=seeds)
    assert not torch.equal(together, x)
    for rows in ([1], [8], [9], [0, 4], [9, 1, 8]):
        rows = torch.tensor(rows)
        apart = attack(model, x[rows], y[rows], generator=seeds.rows(rows))
        assert torch.equal(apart, together[rows]), rows


@pytest.mark.parametrize(
    ("most", "wanted", "expected"),
    [
        (4, [2.0, 9.0, 1.0, 2.0], [5.0, 4.0, 1.0, 2.0]),
        (10, [2.0, 9.0, 1.0, 2.0], [4.0, 9.0, 1.0, 2.0]),
        (3, [4.6, 0.4, -7.0, 3.6], [5.0, 0.0, 0.0, 4.0]),
        (2, [5.0, 0.0, 1.0, 2.0], [5.0, 0.0, 1.0, 2.0]),
    ],
)
def test_the_projection_of_counts_keeps_the_largest_changes_and_counts(most, wanted, expected):
    x = torch.tensor([[5.0, 0.0, 1.0, 2.0]])
    threat = ThreatModel("L0", most, counts=True)
    found = threat.project(x, torch.tensor([wanted]))
    assert found.tolist() == [expected]
    assert float(threat.distance(x, found)) <= most


def test_a_projection_of_counts_is_the_nearest_sample_of_the_ball():
    for seed in range(20):
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


def test_what_frames_hold_is_said_and_checked():
    with pytest.raises(ValueError, match="counts says what event frames hold, got it for Linf"):
        ThreatModel("Linf", 0.1, counts=True)
    with pytest.raises(TypeError, match="counts must be True or False, got 'yes'"):
        ThreatModel("L0", 1, counts="yes")
    twos = torch.full((1, T, 2, 1, 1), 2.0)
    with pytest.raises(ValueError, match="for numbers of events pass counts=True"):
        random_flips(None, twos, flips=1)
    with pytest.raises(ValueError, match="for numbers of events pass counts=True"):
        random_moves(None, twos, moves=1)


@pytest.mark.parametrize("value", [-1.0, 0.5, OUTSIDE])
def test_what_is_no_number_of_events_is_outside(value):
    x = torch.zeros(1, 2)
    x_adv = torch.tensor([[value, 0.0]])
    assert not ThreatModel("L0", 9, counts=True).contains(x, x_adv)
    assert not ThreatModel("L0", 1).contains(x, torch.ones(1, 2))


@pytest.mark.parametrize(("flips", "made"), [(12, 12), (24, 24), (300, 24)])
def test_random_flips_spend_their_budget(flips, made):
    ones = torch.ones(2, 3, 2, 2, 2)
    x_adv = random_flips(None, ones, flips=flips, counts=True, generator=seeded(0))
    assert count_flips(x_adv, ones).tolist() == [made, made]


def test_a_budget_larger_than_the_frames():
    ones = torch.ones(2, 3, 2, 2, 2)
    model = linear(24)
    y = model(ones).argmax(1)
    x_adv = flip_events(model, ones, y, flips=300, counts=True)
    assert (model(x_adv).argmax(1) != y).all()


@pytest.mark.parametrize("value", [1e9, 1e30, 0.5, float("nan"), float("inf")])
def test_what_are_no_moves_is_far_away(value):
    x = line(1.0, 0.0, 0.0)
    x_adv = line(1.0, value, 0.0)
    threat = ThreatModel("moves", 2, counts=True)
    assert threat.distance(x, x_adv).tolist() == [OUTSIDE]
    assert torch.equal(threat.project(x, x_adv), x)


def test_what_cannot_be_counted_is_refused():
    x = line(1.0, 0.0, 0.0)
    for value in (float("nan"), float("inf")):
        for count in (count_flips, count_moves):
            with pytest.raises(ValueError, match="x_adv must be finite"):
                count(line(1.0, value, 0.0), x)
    assert count_flips(line(1.0, 1e30, 0.0), x).tolist() == [2**53]
    assert count_moves(line(0.5, 0.5, 0.0), x).paired.tolist() == [False]
