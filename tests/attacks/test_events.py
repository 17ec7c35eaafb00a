"""Attacks on event frames: known optima, reduction, numbers of events, a trained network, the suite
of moves.
"""

import itertools
from functools import partial
from typing import ClassVar

import pytest
import torch
from attacks.moving_bars import frames
from attacks.table import Recorder, fooled, linear_model, predicted, seeded, two_classes
from covering import every_pair
from proofs.event_balls import all_moved
from torch import nn

from sj_robust.attacks import (
    SampleSeeds,
    ThreatModel,
    count_flips,
    count_moves,
    flip_events,
    move_events,
    random_flips,
    random_moves,
)
from sj_robust.evaluation import Member, make_suite
from sj_robust.evaluation.run.member import crafted

T = 6
OUTSIDE = float("inf")
"""The distance of frames that no moves lead to."""
GRADIENT = {"probes": 0, "queries": 0}


def line(*values):
    """Frames of one sample with one value each."""
    return torch.tensor(values).view(1, -1, 1, 1, 1)


def against(score, weight):
    """A model of two classes: one has this score, the other the weighted sum of all values."""

    def model(z):
        other = z.flatten(1) @ torch.tensor(weight)
        return torch.stack([torch.full_like(other, score), other], 1)

    return model


class TestLinearOptimum:
    """On a linear model of two classes the k largest gains are the best k changes."""

    weight = torch.randn(40, generator=seeded(3), dtype=torch.float64)
    x = frames(6, 2, 2, 2, 5, seed=4, dtype=torch.float64)
    y = torch.tensor([1, 1, 1, 0, 0, 0])
    # A wide lead on every sample, so that several changes are needed.
    bias = torch.tensor([4.0, 4.0, 4.0, -4.0, -4.0, -4.0], dtype=torch.float64)

    def model(self, row: int):
        bias = self.bias[row] - self.x[row].flatten() @ self.weight
        return two_classes(lambda x: x.flatten(1) @ self.weight + bias)

    def gains(self, row: int, allow: str) -> list[float]:
        """Gains of the allowed changes for the attacker, the largest first."""
        sign = -1 if self.y[row] == 1 else 1
        gains = []
        for weight, event in zip(self.weight.tolist(), self.x[row].flatten().tolist(), strict=True):
            kind = "remove" if event else "add"
            if allow in ("both", kind):
                gains.append(sign * weight * (1 - 2 * event))
        return sorted(gains, reverse=True)

    def of_row(self, row: int):
        """Model, frames and label of one sample."""
        rows = slice(row, row + 1)
        return self.model(row), self.x[rows], self.y[rows]

    CHOICES: ClassVar = {
        "row": range(6),
        "allow": ["both", "add", "remove"],
        "options": [
            {},
            GRADIENT,
            {"steps": 1},
            {"steps": 40, "probes": 3},
        ],
    }

    @pytest.mark.parametrize(tuple(CHOICES), every_pair(CHOICES))
    def test_the_smallest_set_that_fools(self, row, allow, options):
        gains = [gain for gain in self.gains(row, allow) if gain > 0]
        sums = list(itertools.accumulate(gains))
        model, x, y = self.of_row(row)
        x_adv = flip_events(model, x, y, eps=20, allow=allow, **options)
        if sums[-1] <= 4:  # no set of these changes fools
            assert int(count_flips(x_adv, x)) == min(20, len(gains))  # but each is worth taking
            return
        least = next(count for count, total in enumerate(sums, 1) if total > 4)
        assert least > 1
        assert fooled(model, x_adv, y)
        assert int(count_flips(x_adv, x)) == least
        exact = flip_events(model, x, y, eps=least, allow=allow, **options)
        assert fooled(model, exact, y)

    @pytest.mark.parametrize("flips", [1, 2])
    @pytest.mark.parametrize("row", range(6))
    def test_too_small_a_budget_is_spent_on_the_largest_gains(self, row, flips):
        model, x, y = self.of_row(row)
        best = sum(self.gains(row, "both")[:flips])
        assert best < 4
        x_adv = flip_events(model, x, y, eps=flips)
        assert int(count_flips(x_adv, x)) == flips
        logits = model(x_adv)[0]
        left = logits[y] - logits[1 - y]
        assert left.item() == pytest.approx(4 - best, abs=1e-9)

    def test_further_runs_leave_what_is_fooled_alone(self):
        calls = []
        for restarts in (1, 3):
            model = Recorder(self.model(0))
            x_adv = flip_events(
                model, self.x[:1], self.y[:1], eps=20, restarts=restarts, reduce=False
            )
            assert model.model(x_adv).argmax(1) != self.y[0]
            calls.append(len(model.seen))
        assert calls[0] == calls[1]

    def test_of_several_classes_by_brute_force(self):
        """All sets of changes of 12 elements are tried, for every one of 24 samples."""
        model = linear_model(12, torch.float64, seed=7)
        x = frames(24, 2, 2, 1, 3, seed=8, dtype=torch.float64)
        y = model(x).argmax(1)
        masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=12)), dtype=torch.float64)
        x_adv = flip_events(model, x, y, eps=12, target_classes=4)
        for row in range(24):
            everything = (x[row].flatten() - masks).abs().view(-1, 2, 2, 1, 3)
            fell = predicted(model, everything) != y[row]
            least = int(masks.sum(1)[fell].min())
            found = int(count_flips(x_adv[row : row + 1], x[row : row + 1]))
            assert found == least
        assert (model(x_adv).argmax(1) != y).all()


def test_success_has_the_confidence_that_is_asked_for():
    x = frames(6, 2, 2, 2, 5, seed=4)
    model = two_classes(lambda x: x.flatten(1).sum(1) - 9.5)
    y = predicted(model, x)
    for confidence, least in ((0.0, 0.5), (1.5, 1.5)):
        x_adv = flip_events(model, x, y, eps=20, confidence=confidence)
        lead = model(x_adv)[:, 1] * (1 - 2 * y)
        assert lead.tolist() == [least] * 6


@pytest.mark.slow
def test_on_a_trained_network_the_search_uses_all_its_means(bars):
    """No single change can be put back; probes and exchanges add to the gradient; all of them are
    better than what is drawn, and further runs never need more.
    """
    x = bars.x[:16]
    y = bars.y[:16]
    run = partial(flip_events, bars.model, x, y, eps=12, generator=SampleSeeds(range(16)))
    grown = run(reduce=False)
    reduced = run()
    fell = fooled(bars.model, grown, y)
    assert torch.equal(fooled(bars.model, reduced, y), fell)
    fewer = count_flips(reduced, x)[fell] < count_flips(grown, x)[fell]
    assert fewer.sum() > 3
    assert ((grown != x) | (reduced == x))[fell].all()  # a subset of what had grown
    changed = (reduced != x).flatten(1) & fell[:, None]
    sample, element = changed.nonzero(as_tuple=True)
    back = reduced[sample].flatten(1)
    number = torch.arange(len(back))
    back[number, element] = 1 - back[number, element]
    assert not fooled(bars.model, back.view_as(x[sample]), y[sample]).any()
    left = [
        int(fooled(bars.model, run(**options), y).sum()) for options in (GRADIENT, {"queries": 0})
    ]
    drawn = random_flips(bars.model, x, y, eps=12, tries=10, generator=seeded())
    assert int(fooled(bars.model, drawn, y).sum()) < left[0] < left[1] < int(fell.sum())
    several = run(target_classes=3, restarts=2)
    assert fooled(bars.model, several, y)[fell].all()
    assert (count_flips(several, x) <= count_flips(reduced, x))[fell].all()


def test_a_network_without_a_gradient_falls_to_the_exchanges():
    class Dead(nn.Module):
        def forward(self, x):
            many = x.flatten(1).sum(1)
            step = (many > 5.5).float() + 0 * many
            return torch.stack([step, torch.full_like(many, 0.5)], dim=1)

    x = frames(6, 2, 2, 3, 3, share=0.2)
    x[:, 0, 0, 0] = 1.0
    y = (x.flatten(1).sum(1) < 5.5).long()
    assert int(y.sum()) < 6
    with_search = flip_events(
        Dead(),
        x,
        y,
        eps=8,
        allow="remove",
        generator=seeded(),
    )
    assert fooled(Dead(), with_search, y)[y == 0].any()
    assert not torch.isnan(with_search).any()


class TestRandomFlips:
    def test_exactly_as_many_as_asked_or_allowed(self):
        x = frames(5, 3, 2, 4, 4, share=0.1)
        events = x.flatten(1).sum(1).long()
        found = count_flips(random_flips(None, x, eps=20), x).tolist()
        assert found == [20] * 5
        removed = count_flips(random_flips(None, x, eps=20, allow="remove"), x)
        assert torch.equal(removed, events.clamp(max=20))
        assert int(events.min()) < 20

    def test_uniform(self):
        x = torch.zeros(4000, 1, 2, 2, 3)
        x_adv = random_flips(None, x, eps=3, generator=seeded())
        found = x_adv.mean(0).flatten()
        expected = torch.full((12,), 0.25)
        torch.testing.assert_close(found, expected, atol=0.03, rtol=0)

    def test_more_tries_fool_more(self):
        x = frames(40, 2, 2, 3, 3)
        model = linear_model(36)
        y = predicted(model, x)
        run = partial(random_flips, model, x, y, eps=8)
        fell = [int(fooled(model, run(tries=n, generator=seeded()), y).sum()) for n in (1, 30)]
        assert fell[1] > fell[0] + 5

    def test_one_try_asks_no_model(self):
        def refuses(x):
            raise AssertionError("one try needs no model")

        x = frames(5, 3, 2, 4, 4, share=0.1)
        y = torch.zeros(5, dtype=torch.int64)
        alone, *others = (
            random_flips(model, x, labels, eps=6, generator=seeded())
            for model, labels in ((None, None), (refuses, None), (None, y), (refuses, y))
        )
        for other in others:
            assert torch.equal(alone, other)

    @pytest.mark.parametrize(("flips", "made"), [(12, 12), (24, 24), (300, 24)])
    def test_of_counts_spend_their_budget(self, flips, made):
        ones = torch.ones(2, 3, 2, 2, 2)
        x_adv = random_flips(
            None, ones, eps=ThreatModel("L0", flips, counts=True), generator=seeded(0)
        )
        assert count_flips(x_adv, ones).tolist() == [made, made]


def test_an_event_joins_others_in_a_frame():
    x = torch.zeros(1, 4, 2, 1, 1)
    x[0, :2, 0] = 2.0  # a binary frame would have no room
    model = against(8.5, [0.0, 0.0, 3.0, 3.0, 1.0, 1.0, 0.0, 0.0])
    y = torch.tensor([0])
    x_adv = move_events(model, x, y, eps=ThreatModel("moves", 1, largest_shift=1, counts=True))
    assert x_adv[0, :, 0].flatten().tolist() == [1.0, 3.0, 0.0, 0.0]
    found = count_moves(x_adv, x)
    assert int(found.events) == 1
    assert int(found.largest_shift) == 1


@pytest.mark.parametrize(
    ("eps", "options", "expected"),
    [
        (3, {}, [5.0, 2.0, 2.0, 2.0]),
        (3, {"allow": "remove"}, [2.0, 0.0, 2.0, 2.0]),
        (10, {}, [10.0, 0.0, 2.0, 2.0]),  # 8 of a value, no more
    ],
)
def test_an_event_is_added_to_others_or_removed_from_them(eps, options, expected):
    x = line(2.0, 2.0, 2.0, 2.0)
    model = against(100.0, [4.0, -3.0, 1.0, 0.0])
    x_adv = flip_events(
        model, x, torch.tensor([0]), eps=ThreatModel("L0", eps, counts=True), queries=0, **options
    )
    assert x_adv.flatten().tolist() == expected


def test_moves_of_counts_are_counted_in_their_order_of_time():
    x = line(2.0, 1.0, 0.0, 0.0)
    x_adv = line(0.0, 1.0, 1.0, 1.0)
    found = count_moves(x_adv, x)
    assert [int(part) for part in found] == [2, 3, 5, 1]
    for budget, distance in ((2, OUTSIDE), (3, 3)):
        threat = ThreatModel("moves", budget, largest_shift=2, counts=True)
        assert float(threat.distance(x, x_adv)) == distance


def test_a_move_that_nothing_can_make_way_for_is_outside_at_once():
    """Of 30 events in between there are a billion choices of others to move on."""
    between = [1.0] * 30
    x = line(1.0, *[0.0] * 4, *between, *[0.0] * 5)
    x_adv = line(*[0.0] * 5, *between, *[0.0] * 4, 1.0)
    threat = ThreatModel("moves", 40, largest_shift=2)
    assert float(threat.distance(x, x_adv)) == OUTSIDE


@pytest.mark.parametrize("binary", [True, False])
def test_distances_are_the_fewest_moves_of_all(binary):
    x = frames(1, 4, 1, 2, 2, seed=3, share=0.4)
    if not binary:
        x *= torch.randint(1, 3, x.shape, generator=seeded(4))
    threat = ThreatModel("moves", 3, largest_shift=1, counts=not binary)
    every = all_moved(x[0], 3, 1, binary=binary)
    assert threat.contains(x.expand_as(every), every).all()
    wider = all_moved(x[0], 3, 2, binary=binary)
    inside = threat.contains(x.expand_as(wider), wider).tolist()
    known = set(map(tuple, every.flatten(1).tolist()))
    expected = [tuple(one) in known for one in wider.flatten(1).tolist()]
    assert inside == expected
    assert not all(expected)


@pytest.mark.parametrize("value", [1e9, 1e30, 0.5, float("nan"), float("inf")])
def test_what_are_no_moves_is_far_away(value):
    x = line(1.0, 0.0, 0.0)
    x_adv = line(1.0, value, 0.0)
    threat = ThreatModel("moves", 2, counts=True)
    assert threat.distance(x, x_adv).tolist() == [OUTSIDE]
    assert torch.equal(threat.project(x, x_adv), x)


def test_what_is_no_number_of_events_is_not_counted():
    x = line(1.0, 0.0, 0.0)
    assert count_flips(line(1.0, 1e30, 0.0), x).tolist() == [2**53]
    assert count_moves(line(0.5, 0.5, 0.0), x).paired.tolist() == [False]


class TestOneEvent:
    """A network that decides by the time of one event: class 1 from frame 3 on; the event comes in
    frame 0.
    """

    x = torch.zeros(1, T, 2, 2, 2)
    x[0, 0, 1, 0, 1] = 1.0
    y = torch.tensor([0])

    @staticmethod
    def model(images):
        when = (images[:, :, 1, 0, 1] * torch.arange(float(T))).sum(1)
        return torch.stack([torch.full_like(when, 2.5), when], dim=1)

    @pytest.mark.parametrize(
        "attack",
        [
            move_events,
            partial(move_events, **GRADIENT),
            partial(move_events, keep_best=False),
            partial(random_moves, tries=20),
        ],
        ids=["default", "gradient", "last", "random"],
    )
    @pytest.mark.parametrize(
        ("budget", "falls"),
        [
            (1, True),
            (0, False),
            (ThreatModel("moves", 1, largest_shift=3), True),
            (ThreatModel("moves", 1, largest_shift=2), False),
            (ThreatModel("moves", 5, largest_shift=99), True),
            (ThreatModel("moves", 5, total_shift=3), True),
            (ThreatModel("moves", 5, total_shift=2), False),
        ],
    )
    def test_falls_exactly_at_the_budget_that_moves_it(self, attack, budget, falls):
        x_adv = attack(
            self.model,
            self.x,
            self.y,
            eps=budget,
            generator=seeded(),
        )
        found = bool(self.model(x_adv).argmax(1) != self.y)
        assert found is falls


def test_of_single_moves_the_best_is_found_on_a_linear_model():
    weight = torch.randn(T * 8, generator=seeded(3))
    model = two_classes(lambda x: x.flatten(1) @ weight - 100)
    x = frames(5, T, 2, 2, 2, seed=4)
    y = torch.zeros(5, dtype=torch.int64)
    for largest in (1, T - 1):
        x_adv = move_events(
            model,
            x,
            y,
            eps=ThreatModel("moves", 1, largest_shift=largest),
            **GRADIENT,
        )
        found = (x_adv - x).flatten(1) @ weight
        best = []
        for row in x.flatten(2):
            w = weight.view(T, 8)
            cells = itertools.product(range(T), range(T), range(8))
            possible = (
                (a, b, i)
                for a, b, i in cells
                if row[a, i] and not row[b, i] and abs(a - b) <= largest
            )
            best.append(max(float(w[b, i] - w[a, i]) for a, b, i in possible))
        torch.testing.assert_close(found, torch.tensor(best), atol=1e-5, rtol=0)


def test_needless_moves_are_put_back():
    model = TestOneEvent.model
    x = TestOneEvent.x.clone()
    y = TestOneEvent.y
    x[0, 1:3, 0] = 1.0  # events that do not count
    x_adv = move_events(
        model,
        x,
        y,
        eps=4,
        steps=1,
        **GRADIENT,
        generator=seeded(),
    )
    found = [int(value) for value in count_moves(x_adv, x)[:1]]
    assert found == [1]


class TestThreat:
    x = TestOneEvent.x
    later = x.roll(2, dims=1)

    def test_a_member_that_leaves_it_is_refused(self):
        def made(attack, **limits):
            member = Member("mine", attack, threat=ThreatModel("moves", 1, **limits))
            return crafted(
                nn.Flatten(), self.x, self.x[:, 0, 0, 0, 0].long(), member, seeds=SampleSeeds([0])
            ).x_adv

        found = made(lambda model, x, y, *, generator: x.roll(2, dims=1))
        assert torch.equal(found, self.later)
        with pytest.raises(
            ValueError,
            match=r"move at most 1 events .*largest shift 1.* got inf .*shift is too large",
        ):
            made(lambda model, x, y, *, generator: x.roll(2, dims=1), largest_shift=1)
        with pytest.raises(ValueError, match=r"must leave event frames binary"):
            made(lambda model, x, y, *, generator: x / 2)

    def test_the_suite_moves_with_its_control(self):
        threat = ThreatModel("moves", 9, largest_shift=2)
        suite = make_suite("events", threat, chosen=["pdsg"], classes=4)
        for member in (*suite.members, *suite.control):
            assert member.attack.keywords["eps"] == threat
        kinds = [member.name.split("/")[0] for member in suite.members]
        assert kinds == [
            "moves",
            "random_moves",
            "moves",
            "moves",
            "moves_t",
            "random_moves",
            "moves",
        ]
        with pytest.raises(ValueError, match="'standard' does not fit a threat in moves"):
            make_suite("standard", threat, classes=4)
