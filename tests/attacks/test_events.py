"""Attacks on binary event frames: budget, known optima, reduction, a trained network, the worst
case.
"""

import itertools
from functools import partial
from typing import ClassVar

import pytest
import torch
from attacks.moving_bars import EVENT_ATTACKS, frames, moving_bars
from attacks.table import (
    Recorder,
    Trained,
    assert_within,
    fooled,
    linear_model,
    predicted,
    seeded,
    two_classes,
)
from covering import every_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sj_robust.attacks import count_flips, flip_events, random_flips
from sj_robust.attacks._event_search import FewestChanges


class TestBudget:
    @pytest.mark.parametrize("name", EVENT_ATTACKS)
    @settings(max_examples=6, deadline=None)
    @given(
        shape=st.sampled_from([(1, 1, 1, 1, 1), (0, 2, 2, 3, 3), (3, 2, 2, 2, 3), (2, 4, 1, 3, 2)]),
        share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
        flips=st.integers(0, 24),
        dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
        seed=st.integers(0, 10**6),
    )
    def test_binary_and_at_most_k_changes_of_the_allowed_kind(
        self, name, shape, share, flips, dtype, seed
    ):
        x = frames(*shape, seed=seed, share=share, dtype=dtype)
        flips = min(flips, x[0].numel()) if len(x) else flips
        flips -= flips % 2 if "moves" in name else 0  # two elements differ for each
        y = torch.randint(5, (shape[0],), generator=seeded(seed))
        before = x.clone()
        model = linear_model(x[:1].numel() or 1, dtype, seed) if len(x) else linear_model(36, dtype)
        x_adv = EVENT_ATTACKS[name](
            model,
            x,
            y,
            flips=flips,
            generator=seeded(seed),
        )
        assert_within(x_adv, x, None, flips)
        assert ((x_adv == 0) | (x_adv == 1)).all()
        assert ((x_adv - x).abs().flatten(1).sum(1) <= flips).all()
        if "add" in name:
            assert (x_adv >= x).all()
        if "remove" in name:
            assert (x_adv <= x).all()
        assert torch.equal(x, before)
        assert x_adv.data_ptr() != x.data_ptr() or x.numel() == 0

    @pytest.mark.slow
    def test_what_is_wrong_already_stays(self, bars):
        wrong = (bars.y + 1) % 4
        right = bars.model(bars.x).argmax(1) != wrong
        x_adv = flip_events(bars.model, bars.x, wrong, flips=5)
        assert int(right.sum()) > 24
        assert torch.equal(x_adv[right], bars.x[right])


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
            {"probes": 0, "queries": 0},
            {"steps": 1},
            {"steps": 40, "probes": 3},
        ],
    }

    @pytest.mark.parametrize(tuple(CHOICES), every_pair(CHOICES))
    def test_the_smallest_set_that_fools(self, row, allow, options):
        gains = [gain for gain in self.gains(row, allow) if gain > 0]
        sums = list(itertools.accumulate(gains))
        model, x, y = self.of_row(row)
        x_adv = flip_events(model, x, y, flips=20, allow=allow, **options)
        if sums[-1] <= 4:  # no set of these changes fools
            assert int(count_flips(x_adv, x)) == min(20, len(gains))  # but each is worth taking
            return
        least = next(count for count, total in enumerate(sums, 1) if total > 4)
        assert least > 1
        assert fooled(model, x_adv, y)
        assert int(count_flips(x_adv, x)) == least
        exact = flip_events(model, x, y, flips=least, allow=allow, **options)
        assert fooled(model, exact, y)

    @pytest.mark.parametrize("flips", [1, 2])
    @pytest.mark.parametrize("row", range(6))
    def test_too_small_a_budget_is_spent_on_the_largest_gains(self, row, flips):
        model, x, y = self.of_row(row)
        best = sum(self.gains(row, "both")[:flips])
        assert best < 4
        x_adv = flip_events(model, x, y, flips=flips)
        assert int(count_flips(x_adv, x)) == flips
        logits = model(x_adv)[0]
        left = logits[y] - logits[1 - y]
        assert left.item() == pytest.approx(4 - best, abs=1e-9)

    def test_further_runs_leave_what_is_fooled_alone(self):
        calls = []
        for restarts in (1, 3):
            model = Recorder(self.model(0))
            x_adv = flip_events(
                model, self.x[:1], self.y[:1], flips=20, restarts=restarts, reduce=False
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
        x_adv = flip_events(model, x, y, flips=12, target_classes=4)
        for row in range(24):
            everything = (x[row].flatten() - masks).abs().view(-1, 2, 2, 1, 3)
            fell = predicted(model, everything) != y[row]
            least = int(masks.sum(1)[fell].min())
            found = int(count_flips(x_adv[row : row + 1], x[row : row + 1]))
            assert found == least
        assert (model(x_adv).argmax(1) != y).all()

    def test_the_first_step_takes_the_largest_gains_of_the_margin(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(
                nn.Flatten(), nn.Linear(40, 16), nn.Tanh(), nn.Linear(16, 4)
            ).double()
        x = self.x.clone().requires_grad_()
        logits = model(x)
        y = logits.argmax(1)
        top = logits.topk(2, dim=1).values
        (grad,) = torch.autograd.grad((top[:, 1] - top[:, 0]).sum(), x)
        gain = (grad * (1 - 2 * x)).flatten(1)
        wanted = (gain >= gain.sort(dim=1, descending=True).values[:, 2:3]) & (gain > 0)
        x_adv = flip_events(
            model, self.x, y, flips=3, steps=1, probes=0, queries=0, keep_best=False, reduce=False
        )
        assert torch.equal((x_adv != self.x).flatten(1), wanted)


class TestReduction:
    @pytest.mark.slow
    def test_never_unfools_and_needs_fewer(self, bars):
        run = partial(
            flip_events,
            bars.model,
            bars.x,
            bars.y,
            flips=30,
            steps=5,
        )
        reduced = run(reduce=True, generator=seeded())
        grown = run(reduce=False, generator=seeded())
        fell = fooled(bars.model, grown, bars.y)
        assert int(fell.sum()) > 20
        assert torch.equal(fooled(bars.model, reduced, bars.y), fell)
        fewer = count_flips(reduced, bars.x)[fell]
        more = count_flips(grown, bars.x)[fell]
        assert (fewer <= more).all()
        assert int((fewer < more).sum()) > 10
        changed = (reduced != bars.x)[fell]
        assert bool(((grown != bars.x)[fell] | ~changed).all())  # a subset of what had grown

    @pytest.mark.slow
    def test_no_single_change_of_a_spiking_network_can_be_put_back(self, bars):
        x = bars.x[:24]
        y = bars.y[:24]
        x_adv = flip_events(
            bars.model,
            x,
            y,
            flips=30,
            steps=4,
            generator=seeded(1),
        )
        fell = fooled(bars.model, x_adv, y)
        changed = (x_adv != x).flatten(1) & fell[:, None]
        sample, element = changed.nonzero(as_tuple=True)
        back = x_adv[sample].flatten(1)
        number = torch.arange(len(back))
        back[number, element] = 1 - back[number, element]
        assert not fooled(bars.model, back.view_as(x_adv[sample]), y[sample]).any()
        assert len(back) > 40

    @pytest.mark.slow
    def test_further_runs_never_need_more(self, bars):
        x = bars.x[:12]
        y = bars.y[:12]
        run = partial(
            flip_events,
            bars.model,
            x,
            y,
            flips=15,
            queries=20,
            probes=5,
        )
        one = run(generator=seeded())
        several = run(generator=seeded(), target_classes=3, restarts=2)
        fell = fooled(bars.model, one, y)
        fell_to_several = fooled(bars.model, several, y)
        assert fell_to_several[fell].all()
        assert (count_flips(several, x) <= count_flips(one, x))[fell].all()
        assert int(fell_to_several.sum()) > int(fell.sum())


class TestTrainedNetwork:
    @pytest.mark.slow
    def test_accuracy_falls_with_the_budget_far_below_random_changes(self, bars):
        bars = Trained(bars.model, *moving_bars(128, seeded(1)))
        attacked = []
        control = []
        for flips in (0, 5, 20, 40):
            run = {"flips": flips, "generator": seeded()}
            searched = flip_events(bars.model, bars.x, bars.y, **run, reduce=False)
            attacked.append(bars.accuracy(searched))
            run["generator"] = seeded()
            drawn = random_flips(bars.model, bars.x, bars.y, **run, tries=10)
            control.append(bars.accuracy(drawn))
        assert attacked[0] == control[0] == bars.accuracy(bars.x) > 0.9
        assert attacked == sorted(attacked, reverse=True)
        assert attacked[1] < control[1]
        assert attacked[2] < control[2] - 0.5
        assert attacked[3] < 0.1

    @pytest.mark.slow
    def test_probes_and_queries_add_to_the_gradient(self, bars):
        run = partial(
            flip_events,
            bars.model,
            bars.x,
            bars.y,
            flips=10,
            reduce=False,
        )
        gradient = bars.accuracy(run(generator=seeded(), probes=0, queries=0))
        probed = bars.accuracy(run(generator=seeded(), queries=0))
        both = bars.accuracy(run(generator=seeded()))
        assert gradient > probed > both

    def test_a_network_without_a_gradient_falls_to_the_exchanges(self):
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
            flips=8,
            allow="remove",
            generator=seeded(),
        )
        assert fooled(Dead(), with_search, y)[y == 0].any()
        assert not torch.isnan(with_search).any()

    def test_calls_of_the_gradient_alone(self):
        calls = []
        model = linear_model(36)
        x = frames(3, 1, 1, 6, 6)
        y = model(x).argmin(1)  # the label no change of one event reaches

        def counted(images):
            calls.append(len(images))
            return model(images)

        right = model(x).argmax(1)
        flip_events(
            counted,
            x,
            right,
            flips=1,
            probes=0,
            queries=0,
            reduce=False,
        )
        assert sum(calls[:2]) == 6  # the frames themselves, and one gradient
        assert len(calls) <= 3
        calls.clear()
        assert torch.equal(flip_events(counted, x, y, flips=30), x)
        assert calls == [3]


class TestRandomFlips:
    def test_exactly_as_many_as_asked_or_allowed(self):
        x = frames(5, 3, 2, 4, 4, share=0.1)
        events = x.flatten(1).sum(1).long()
        found = count_flips(random_flips(None, x, flips=20), x).tolist()
        assert found == [20] * 5
        removed = count_flips(random_flips(None, x, flips=20, allow="remove"), x)
        assert torch.equal(removed, events.clamp(max=20))
        assert int(events.min()) < 20

    def test_uniform(self):
        x = torch.zeros(4000, 1, 2, 2, 3)
        x_adv = random_flips(None, x, flips=3, generator=seeded())
        found = x_adv.mean(0).flatten()
        expected = torch.full((12,), 0.25)
        torch.testing.assert_close(found, expected, atol=0.03, rtol=0)

    def test_more_tries_fool_more(self, bars):
        run = partial(
            random_flips,
            bars.model,
            bars.x,
            bars.y,
            flips=40,
            allow="remove",
        )
        once = bars.accuracy(run(tries=1, generator=seeded()))
        often = bars.accuracy(run(tries=30, generator=seeded()))
        assert often < once - 0.1

    def test_one_try_asks_no_model(self):
        def refuses(x):
            raise AssertionError("one try needs no model")

        x = frames(5, 3, 2, 4, 4, share=0.1)
        y = torch.zeros(5, dtype=torch.int64)
        alone, *others = (
            random_flips(model, x, labels, flips=6, generator=seeded())
            for model, labels in ((None, None), (refuses, None), (None, y), (refuses, y))
        )
        for other in others:
            assert torch.equal(alone, other)


def test_of_two_sets_of_changes_the_better_is_kept():
    """Fooling before not fooling, then fewer; among those that do not fool the higher loss."""
    best = FewestChanges(torch.zeros(1, 1, 2, 2, 2))
    rows = torch.zeros(1, dtype=torch.int64)
    for flips, fools, loss, taken in (
        (5, False, 1.0, True),
        (1, False, 0.5, False),
        (6, False, 2.0, True),
        (4, True, -5.0, True),
        (1, False, 9.0, False),
        (5, True, 9.0, False),
        (4, True, 9.0, False),
        (3, True, -9.0, True),
    ):
        before = best.changed.clone()
        best.offer(rows, torch.arange(8)[None] < flips, torch.tensor([fools]), torch.tensor([loss]))
        kept = int(best.changed.sum()), bool(best.fooled), float(best.loss)
        assert (kept == (flips, fools, loss)) is taken
        assert taken or torch.equal(best.changed, before)
