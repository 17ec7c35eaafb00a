"""Binary event frames through the whole evaluation: threat, balls, suite, report and page."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from attacks.moving_bars import frames
from evaluation.short_suite import short_suite, shortened
from torch import nn

from sj_robust.attacks import SampleSeeds, ThreatModel, count_flips, flip_events, random_flips
from sj_robust.attacks.logits import margin
from sj_robust.evaluation import Member, Report, make_suite
from sj_robust.evaluation import assess as whole
from sj_robust.evaluation.request import Request
from sj_robust.evaluation.run.member import crafted
from sj_robust.evaluation.subject import Subject

TEN = ThreatModel("L0", 10)
CHOSEN = ("pdsg", "atan:2", "assg")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("progress")


def few(suite):
    """The first attack, those at random and the last one; one of the control."""
    short = short_suite(suite)
    random = [one for one in short.members if one.attack.func is random_flips]
    members = (short.members[0], *random, short.members[-1])
    return replace(short, members=members, control=short.control[:1])


@pytest.fixture(scope="module")
def report(bars, folder) -> Report:
    """A whole evaluation, with few candidates and short searches."""
    with shortened(few):
        return evaluated(bars, folder=folder)


def evaluated(bars, batches=None, threat=TEN, folder=None):
    if batches is None:
        batches = [(bars.x[:6], bars.y[:6]), (bars.x[6:10], bars.y[6:10])]
    request = Request("events", threat, "bars", 4, folder=folder)
    return whole.assess(Subject("moving", bars.model, "three layers"), batches, request)


class TestBall:
    x, y, seeds = frames(3, 2, 2, 3, 3), torch.tensor([0, 1, 0]), SampleSeeds(range(3))

    def craft(self, change, most):
        """Crafted by an attack that puts ``change`` into the frames of the second sample."""

        def attack(model, x, y, *, generator):
            x[1].view(-1)[: len(change)] = change.to(x)
            return x

        member = Member("mine", attack, threat=ThreatModel("L0", most))
        return crafted(nn.Flatten(), self.x, self.y, member, seeds=self.seeds).x_adv

    def test_exactly_as_many_as_allowed(self):
        other = 1 - self.x[1].flatten()[:5]
        assert count_flips(self.craft(other, 5), self.x).tolist() == [0, 5, 0]
        with pytest.raises(
            ValueError, match=r"'mine' must change at most 4 elements per sample \(L0\), got 5"
        ):
            self.craft(other, 4)

    @pytest.mark.parametrize("value", [0.5, 1e-6, 1 - 1e-6])
    def test_frames_stay_binary(self, value):
        with pytest.raises(
            ValueError, match=r"'mine' must leave event frames binary \(0 or 1\) within an L0 ball"
        ):
            self.craft(torch.tensor([value]), 5)


class TestSuite:
    def test_its_make_up(self):
        suite = make_suite("events", TEN, chosen=CHOSEN, classes=4)
        names = [member.name for member in suite.members]
        assert names[:3] == [f"flips/{name}/r0" for name in CHOSEN]
        others = {
            "random_remove/training/r0",
            "random_both/training/r0",
            "flips_t/pdsg/r0",
            "flips/training/r0",
        }
        assert others <= set(names)
        for member in (*suite.members, *suite.control):
            assert member.threat == TEN
            assert member.attack.keywords["eps"] == TEN
            searched = member.attack.func is flip_events
            assert member.attack.keywords.get("reduce") is (False if searched else None)
        tries = [m.attack.keywords for m in suite.members if m.attack.func is random_flips]
        assert [(options["allow"], options["tries"]) for options in tries] == [
            ("remove", 200),
            ("both", 200),
        ]
        assert suite.search is not None

    @pytest.mark.parametrize("chosen", [(), ("training",), ("pdsg", "pdsg"), CHOSEN])
    @pytest.mark.parametrize("classes", [2, 3, 11])
    def test_the_control_runs_the_same_with_the_training_surrogate(self, chosen, classes):
        suite = make_suite("events", TEN, chosen=chosen, classes=classes)
        assert [m.attack for m in suite.control] == [m.attack for m in suite.members]
        assert {(m.estimator, m.group) for m in suite.control} == {("training", "control")}
        starts = [(member.name, member.seed) for member in (*suite.members, *suite.control)]
        assert len(set(starts)) == len(starts)
        targets = [m.attack.keywords.get("target_classes", 0) for m in suite.members]
        assert max(targets) == (0 if classes == 2 else min(3, classes - 1))

    def test_events_are_counted_and_other_suites_move_values(self):
        for name in ("paper", "fast", "standard", "gradient", "autoattack", "gradients"):
            with pytest.raises(
                ValueError,
                match=f"suite '{name}' does not fit a threat in L0; use the suite 'events'",
            ):
                make_suite(name, TEN, classes=4)
        for norm in ("Linf", "L2"):
            message = rf"'events' does not fit a threat in {norm}; .*ThreatModel\('L0', k\)"
            with pytest.raises(ValueError, match=message):
                make_suite("events", ThreatModel(norm, 0.5), classes=4)


@pytest.mark.slow
class TestReport:
    def test_the_worst_case_is_that_of_every_member(self, report):
        assert report.clean.accuracy > 0.9
        assert report.control is not None
        suite = [row.member for row in report.attacks if row.group == "suite"]
        assert all(report.worst_case.correct <= report.under(name).correct for name in suite)
        assert report.everything.correct <= min(report.worst_case.correct, report.control.correct)
        assert report.worst_case.correct <= report.clean.correct - 3
        assert all(report.within(row) and row.largest <= 10 for row in report.attacks)
        assert report.under("random_both/training/r0").total == 10

    def test_estimators_were_chosen_by_attacks_on_events(self, report):
        rows = {row["estimator"]: row for row in report.estimators}
        assert {"training", "pdsg", "atan:2"} <= rows.keys()
        assert not any(row["note"] for row in rows.values())
        first = next(name for name, row in rows.items() if row["chosen"])
        assert report.attacks[0].member == f"flips/{first}/r0"
        assert rows[first]["margin"] <= rows["training"]["margin"]

    def test_accuracy_over_the_number_of_changes(self, report):
        radii = [point.eps for point in report.over_eps]
        assert radii == ["0", "3", "5", "8", "10", "15", "20", "30", "40"]
        left = [point.correct for point in report.over_eps]
        assert left[0] == report.clean.correct
        assert left == sorted(left, reverse=True)
        assert left[-1] < 6
        assert all(point.attack.startswith("flips20, ") for point in report.over_eps[1:])

    def test_loads_back_equal_and_says_that_masking_was_not_diagnosed(self, report):
        again = Report.from_json(report.to_json())
        assert again == report
        assert (again.threat, again.eps, again.suite) == (TEN, "10", "events")
        assert report.findings == ()
        assert any("Gradient masking was not checked" in text for text in report.warnings)

    def test_firing_and_potential_of_every_spiking_layer(self, report):
        assert [row["layer"] for row in report.firing] == ["net.1", "net.3", "net.5"]
        assert all(0 < row["rate"] < 1 for row in report.firing)
        row = report.potential[0]
        assert row["samples"] == 6  # the first batch, of which all were right
        assert [len(steps) for steps in row["layers"].values()] == [6, 6, 6]
        assert all(max(steps) > 0 for steps in row["layers"].values())

    def test_page_and_figures_speak_of_events(self, report):
        pytest.importorskip("matplotlib", reason="figures need the extra `recipes`")
        page = report.page()
        assert "at most 10 events added or removed" in page
        assert "Accuracy over the number of changed events" in page
        assert "eps 10" not in page
        assert "over eps" not in page
        labels = [figure.axes[0].get_xlabel() for figure in report.figures().values()]
        assert labels[0] == "events added or removed"
        assert not any("eps" in label for label in labels)

    def test_transfer_does_not_end_at_the_border_of_the_source(self, bars):
        suite = make_suite("events", TEN, classes=4, surrogate_model=bars.model)
        there = suite.members[1]
        assert there.name == "transfer/flips"
        shorter = partial(there.attack.attack, queries=5)
        few = replace(there, attack=replace(there.attack, attack=shorter))
        x, y = bars.x[:8], bars.y[:8].clone()
        y[:4] = (y[:4] + 1) % 4  # the source is wrong already
        x_adv = crafted(nn.Flatten(), x, y, few, seeds=SampleSeeds(range(8))).x_adv
        plain = flip_events(bars.model, x, y, eps=10, reduce=False, generator=SampleSeeds(range(8)))
        assert bool((margin(bars.model(x_adv), y) < margin(bars.model(x), y)).all())
        fooled = bars.model(plain).argmax(1) != y
        assert int(fooled[4:].sum()) > 0
        further = (margin(bars.model(plain), y) - margin(bars.model(x_adv), y)).detach()
        assert float(further[fooled].mean()) > 0

    def test_what_is_done_is_not_done_again(self, bars, report, folder):
        with shortened(few):
            again = evaluated(bars, folder=folder)
        assert (
            replace(again, environment=report.environment) == report
        )  # seconds included; a commit may come between
        with pytest.raises(ValueError, match="threat"):
            evaluated(bars, folder=folder, threat=ThreatModel("L0", 11))


@pytest.mark.slow
def test_wrong_use(bars):
    images = [(torch.rand(2, 1, 2, 2).round(), torch.tensor([0, 1]))]
    with pytest.raises(
        ValueError, match=r"event frames \[N, T, 2, H, W\], got shape \(2, 1, 2, 2\)"
    ):
        evaluated(bars, batches=images)
    with pytest.raises(
        ValueError, match=r"got values from 0 to 3; for numbers of events pass counts"
    ):
        evaluated(bars, batches=[(bars.x * 3, bars.y)])  # counts per frame
