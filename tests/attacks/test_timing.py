"""Attacks in time on event frames: budgets, what stays, known optima, a trained network, the
threat.
"""

import itertools
from functools import partial

import pytest
import torch
from attacks.moving_bars import frames
from attacks.table import fooled, linear_model, seeded, two_classes
from evaluation.short_suite import shortened
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sj_robust.attacks import SampleSeeds, ThreatModel, count_moves, move_events, random_moves
from sj_robust.evaluation import Member, Report, make_suite
from sj_robust.evaluation import assess as whole
from sj_robust.evaluation.request import Request
from sj_robust.evaluation.run.member import craft
from sj_robust.evaluation.subject import Subject

T = 6
GUIDED = {
    "default": {},
    "gradient": {"probes": 0, "queries": 0},
    "random": {"tries": 20},
    "last": {"keep_best": False},
}


def attack_of(name):
    return partial(random_moves if name == "random" else move_events, **GUIDED[name])


@pytest.mark.parametrize("name", GUIDED)
@settings(max_examples=8, deadline=None)
@given(
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    moves=st.integers(0, 9),
    largest=st.sampled_from([None, 1, 2]),
    total=st.sampled_from([None, 1, 3, 8]),
    seed=st.integers(0, 10**6),
)
def test_binary_within_every_budget_and_each_pixel_keeps_its_events(
    name, share, moves, largest, total, seed
):
    x = frames(3, T, 2, 2, 3, seed=seed, share=share)
    model = linear_model(x[0].numel(), seed=seed)
    budget = {"moves": moves, "largest_shift": largest, "total_shift": total}
    x_adv = attack_of(name)(
        model,
        x,
        model(x).argmax(1),
        **budget,
        generator=seeded(seed),
    )
    assert ((x_adv == 0) | (x_adv == 1)).all()
    assert torch.equal(x_adv.sum(1), x.sum(1))  # per pixel and polarity
    found = int((x_adv != x).flatten(1).sum(1).max())
    assert found <= 2 * moves
    for row, row_adv in zip(
        x.flatten(2), x_adv.flatten(2), strict=True
    ):  # pairs by hand, in their order of time
        gone = row > row_adv
        new = row_adv > row
        shifts = []
        for pixel in range(12):
            left = gone[:, pixel].nonzero()[:, 0]
            came = new[:, pixel].nonzero()[:, 0]
            shifts += (left - came).abs().tolist()
        assert largest is None or max(shifts, default=0) <= largest
        assert total is None or sum(shifts) <= total


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

    @pytest.mark.parametrize("name", GUIDED)
    @pytest.mark.parametrize(
        ("budget", "falls"),
        [
            ({"moves": 1}, True),
            ({"moves": 0}, False),
            ({"moves": 1, "largest_shift": 3}, True),
            ({"moves": 1, "largest_shift": 2}, False),
            ({"moves": 5, "total_shift": 3}, True),
            ({"moves": 5, "total_shift": 2}, False),
        ],
    )
    def test_falls_exactly_at_the_budget_that_moves_it(self, name, budget, falls):
        x_adv = attack_of(name)(
            self.model,
            self.x,
            self.y,
            **budget,
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
            moves=1,
            largest_shift=largest,
            probes=0,
            queries=0,
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
        moves=4,
        steps=1,
        probes=0,
        queries=0,
        generator=seeded(),
    )
    found = [int(value) for value in count_moves(x_adv, x)[:1]]
    assert found == [1]


@pytest.mark.slow
def test_a_trained_network_falls_to_few_moves_and_random_ones_never_do_better(bars):
    x = bars.x[:16]
    y = bars.y[:16]
    for moves in (5, 40):
        budget = {"moves": moves, "largest_shift": 2}
        guided = move_events(bars.model, x, y, **budget, reduce=False, generator=seeded())
        drawn = random_moves(bars.model, x, y, **budget, tries=200, generator=seeded())
        fell = fooled(bars.model, guided, y)
        assert int(fell.sum()) >= int(fooled(bars.model, drawn, y).sum())
    assert int(fell.sum()) > 8


class TestThreat:
    x = TestOneEvent.x
    later = x.roll(2, dims=1)

    def test_distance(self):
        for limits, allowed in (
            ({}, True),
            ({"largest_shift": 1}, False),
            ({"total_shift": 2}, True),
        ):
            threat = ThreatModel("moves", 1, **limits)
            found = threat.distance(self.x, self.later).tolist()
            assert found == [1.0 if allowed else torch.inf]
            found = threat.project(self.x, self.later)
            assert torch.equal(found, self.later if allowed else self.x)
        added = self.x.clone()
        added[0, 3, 0, 0, 0] = 1.0
        found = ThreatModel("moves", 5).distance(self.x, added).tolist()
        assert found == [torch.inf]

    def test_a_member_that_leaves_it_is_refused(self):
        def crafted(attack, **limits):
            member = Member("mine", attack, threat=ThreatModel("moves", 1, **limits))
            return craft(
                nn.Flatten(), self.x, self.x[:, 0, 0, 0, 0].long(), member, seeds=SampleSeeds([0])
            )

        found = crafted(lambda model, x, y, *, generator: x.roll(2, dims=1))
        assert torch.equal(found, self.later)
        with pytest.raises(
            ValueError,
            match=r"move at most 1 events .*largest shift 1.* got inf .*shift is too large",
        ):
            crafted(lambda model, x, y, *, generator: x.roll(2, dims=1), largest_shift=1)
        with pytest.raises(ValueError, match=r"must leave event frames binary"):
            crafted(lambda model, x, y, *, generator: x / 2)

    def test_wrong_use(self):
        for arguments, match in (
            (("moves", 0), "integer >= 1 for moves, the number of moved events, got 0"),
            (("moves", 3, -1), "largest_shift must be >= 1, got -1"),
            (("L0", 3, 1), "largest_shift limits moves of events, got 1 for L0; omit it"),
        ):
            with pytest.raises(ValueError, match=match):
                ThreatModel(*arguments)
        y = TestOneEvent.y
        with pytest.raises(ValueError, match="moves must be >= 0, got -1"):
            move_events(TestOneEvent.model, self.x, y, moves=-1)
        with pytest.raises(
            ValueError,
            match=r"binary event frames \(0 or 1\), got values from 0 to 0.5",
        ):
            random_moves(None, self.x / 2, moves=1)
        with pytest.raises(ValueError, match="tries > 1 need model and y"):
            random_moves(None, self.x, moves=1, tries=2)

    def test_the_suite_moves_with_its_control(self):
        threat = ThreatModel("moves", 9, largest_shift=2)
        suite = make_suite("events", threat, chosen=["pdsg"], classes=4)
        budget = {"moves": 9, "largest_shift": 2, "total_shift": None}
        for member in (*suite.members, *suite.control):
            assert budget.items() <= member.attack.keywords.items()
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


@pytest.mark.slow
def test_a_whole_evaluation_and_its_report(bars):
    threat = ThreatModel("moves", 15, largest_shift=2)
    subject = Subject("bars", bars.model, "three layers")
    few = [(bars.x[:6], bars.y[:6])]
    with shortened():
        report = whole.assess(subject, few, Request("events", threat, "bars", 4, control=False))
    assert report.budget == "at most 15 events moved in time, each by at most 2 frames"
    assert report.worst_case.correct < report.clean.correct
    assert all(map(report.within, report.attacks))
    again = Report.from_json(report.to_json())
    assert (again, again.threat) == (report, threat)
