"""Attacks on binary event frames: budget, known optima, reduction, a trained network, state, wrong use."""

import itertools
import random
from functools import partial
from typing import NamedTuple

import pytest
import torch
from attacks.moving_bars import SIZE, T, moving_bars, spiking_model, trained_model
from attacks.table import linear_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sj_robust.attacks import Member, SampleSeeds, craft, fools, worst_case
from sj_robust.attacks.events import check_frames, count_flips, flip_events, random_flips
from sj_robust.classifier import SpikingEventClassifier
from sj_robust.evaluation.runner import run_suite
from sj_robust.evaluation.threat import ThreatModel

VARIANTS = {
    "default": flip_events,
    "add": partial(flip_events, allow="add"),
    "remove": partial(flip_events, allow="remove"),
    "gradient_only": partial(flip_events, probes=0, queries=0),
    "one_step": partial(flip_events, steps=1, probes=0, queries=5),
    "last": partial(flip_events, keep_best=False, reduce=False, queries=3),
    "targets_and_restarts": partial(flip_events, target_classes=2, restarts=3, probes=2, queries=3),
    "eot": partial(flip_events, eot_samples=2, confidence=0.5, probes=2, queries=3),
    "random": random_flips,
    "random_add": partial(random_flips, allow="add", tries=3),
    "random_remove": partial(random_flips, allow="remove", tries=3),
}


@pytest.fixture(params=VARIANTS)
def variant(request):
    return VARIANTS[request.param]


@pytest.fixture(params=[name for name in VARIANTS if "random" not in name])
def search_variant(request):
    return VARIANTS[request.param]


def frames(*shape: int, seed: int = 0, share: float = 0.3, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share).to(dtype)


def two_classes(weight: Tensor, bias: float):
    """Class 1 where the weighted events exceed a bound."""
    return lambda x: torch.stack([torch.zeros_like(x.flatten(1)[:, 0]), x.flatten(1) @ weight + bias], dim=1)


class Trained(NamedTuple):
    model: SpikingEventClassifier
    x: Tensor
    y: Tensor

    def accuracy(self, x: Tensor) -> float:
        with torch.no_grad():
            return float((self.model(x).argmax(1) == self.y).float().mean())


@pytest.fixture(scope="module")
def bars() -> Trained:
    return Trained(trained_model(), *moving_bars(32, torch.Generator().manual_seed(1)))


@pytest.fixture(scope="module")
def double(bars) -> SpikingEventClassifier:
    """The trained network in float64, where a batch size moves no spike."""
    model = spiking_model().double().eval()
    model.load_state_dict(bars.model.state_dict())
    return model


def bars_and_labels(count: int) -> tuple[Tensor, Tensor]:
    x, y = moving_bars(count, torch.Generator().manual_seed(2))
    return x.double(), y


class TestBudget:
    @pytest.mark.parametrize("name", VARIANTS)
    @settings(max_examples=6, deadline=None)
    @given(
        shape=st.sampled_from([(1, 1, 1, 1, 1), (0, 2, 2, 3, 3), (3, 2, 2, 2, 3), (2, 4, 1, 3, 2)]),
        share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
        flips=st.integers(0, 24),
        dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
        seed=st.integers(0, 10**6),
    )
    def test_binary_and_at_most_k_changes_of_the_allowed_kind(self, name, shape, share, flips, dtype, seed):
        x = frames(*shape, seed=seed, share=share, dtype=dtype)
        flips = min(flips, x[0].numel()) if len(x) else flips
        y = torch.randint(5, (shape[0],), generator=torch.Generator().manual_seed(seed))
        before = x.clone()
        model = linear_model(x[:1].numel() or 1, dtype, seed) if len(x) else linear_model(36, dtype)
        x_adv = VARIANTS[name](model, x, y, flips=flips, generator=torch.Generator().manual_seed(seed))
        assert x_adv.shape == x.shape
        assert x_adv.dtype == dtype
        assert not x_adv.requires_grad
        assert bool(((x_adv == 0) | (x_adv == 1)).all())
        assert bool(((x_adv - x).abs().flatten(1).sum(1) <= flips).all())
        if "add" in name:
            assert bool((x_adv >= x).all())
        if "remove" in name:
            assert bool((x_adv <= x).all())
        assert torch.equal(x, before)
        assert x_adv.data_ptr() != x.data_ptr() or x.numel() == 0

    def test_on_a_spiking_network(self, variant, bars):
        x_adv = variant(bars.model, bars.x[:8], bars.y[:8], flips=6, generator=torch.Generator().manual_seed(0))
        assert bool(((x_adv == 0) | (x_adv == 1)).all())
        assert int(count_flips(x_adv, bars.x[:8]).max()) <= 6
        assert not torch.equal(x_adv, bars.x[:8])

    def test_what_is_wrong_already_stays(self, bars):
        wrong = (bars.y + 1) % 4
        right = bars.model(bars.x).argmax(1) != wrong
        x_adv = flip_events(bars.model, bars.x, wrong, flips=5)
        assert int(right.sum()) > 24
        assert torch.equal(x_adv[right], bars.x[right])


class TestLinearOptimum:
    """On a linear model of two classes the k largest gains are the best k changes."""

    weight = torch.randn(40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = frames(6, 2, 2, 2, 5, seed=4, dtype=torch.float64)
    y = torch.tensor([1, 1, 1, 0, 0, 0])
    # A wide lead on every sample, so that several changes are needed.
    bias = torch.tensor([4.0, 4.0, 4.0, -4.0, -4.0, -4.0], dtype=torch.float64)

    def model(self, row: int):
        return two_classes(self.weight, float(self.bias[row] - self.x[row].flatten() @ self.weight))

    def gains(self, row: int, allow: str) -> list[float]:
        """Gains of the allowed changes for the attacker, the largest first."""
        sign = -1 if self.y[row] == 1 else 1
        return sorted(
            (
                sign * float(w) * (1 - 2 * float(event))
                for w, event in zip(self.weight, self.x[row].flatten(), strict=True)
                if allow == "both" or (event == 0) == (allow == "add")
            ),
            reverse=True,
        )

    @pytest.mark.parametrize("options", [{}, {"probes": 0, "queries": 0}, {"steps": 1}, {"steps": 40, "probes": 3}])
    @pytest.mark.parametrize("allow", ["both", "add", "remove"])
    @pytest.mark.parametrize("row", range(6))
    def test_the_smallest_set_that_fools(self, row, allow, options):
        gains = [gain for gain in self.gains(row, allow) if gain > 0]
        sums = list(itertools.accumulate(gains))
        model, x, y = self.model(row), self.x[row : row + 1], self.y[row : row + 1]
        if sums[-1] <= 4:  # no set of these changes fools
            x_adv = flip_events(model, x, y, flips=20, allow=allow, **options)
            assert int(count_flips(x_adv, x)) == min(20, len(gains))  # but each is worth taking
            return
        least = next(count for count, total in enumerate(sums, 1) if total > 4)
        assert least > 1
        x_adv = flip_events(model, x, y, flips=20, allow=allow, **options)
        assert model(x_adv).argmax(1) != y
        assert int(count_flips(x_adv, x)) == least
        exact = flip_events(model, x, y, flips=least, allow=allow, **options)
        assert model(exact).argmax(1) != y

    @pytest.mark.parametrize("flips", [1, 2])
    @pytest.mark.parametrize("row", range(6))
    def test_too_small_a_budget_is_spent_on_the_largest_gains(self, row, flips):
        model, x, y = self.model(row), self.x[row : row + 1], self.y[row : row + 1]
        best = sum(self.gains(row, "both")[:flips])
        assert best < 4
        x_adv = flip_events(model, x, y, flips=flips)
        assert int(count_flips(x_adv, x)) == flips
        left = float(model(x_adv)[0, y].sum() - model(x_adv)[0, 1 - y].sum())
        assert left == pytest.approx(4 - best, abs=1e-9)

    def test_of_several_classes_by_brute_force(self):
        """All sets of changes of 12 elements are tried, for every one of 24 samples."""
        model = linear_model(12, torch.float64, seed=7)
        x = frames(24, 2, 2, 1, 3, seed=8, dtype=torch.float64)
        y = model(x).argmax(1)
        masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=12)), dtype=torch.float64)
        x_adv = flip_events(model, x, y, flips=12, target_classes=4)
        for row in range(24):
            everything = (x[row].flatten() - masks).abs().view(-1, 2, 2, 1, 3)
            fooled = model(everything).argmax(1) != y[row]
            least = int(masks.sum(1)[fooled].min())
            assert int(count_flips(x_adv[row : row + 1], x[row : row + 1])) == least
        assert bool((model(x_adv).argmax(1) != y).all())

    def test_the_first_step_takes_the_largest_gains_of_the_margin(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Flatten(), nn.Linear(40, 16), nn.Tanh(), nn.Linear(16, 4)).double()
        x = self.x.clone().requires_grad_()
        logits = model(x)
        y = logits.argmax(1)
        top = logits.topk(2, dim=1).values
        (grad,) = torch.autograd.grad((top[:, 1] - top[:, 0]).sum(), x)
        gain = (grad * (1 - 2 * x)).flatten(1)
        wanted = (gain >= gain.sort(dim=1, descending=True).values[:, 2:3]) & (gain > 0)
        x_adv = flip_events(model, self.x, y, flips=3, steps=1, probes=0, queries=0, keep_best=False, reduce=False)
        assert torch.equal((x_adv != self.x).flatten(1), wanted)


class TestReduction:
    def test_never_unfools_and_needs_fewer(self, bars):
        run = partial(flip_events, bars.model, bars.x, bars.y, flips=30, steps=5)
        reduced, grown = (run(reduce=reduce, generator=torch.Generator().manual_seed(0)) for reduce in (True, False))
        fooled = bars.model(grown).argmax(1) != bars.y
        assert int(fooled.sum()) > 20
        assert torch.equal(bars.model(reduced).argmax(1) != bars.y, fooled)
        fewer, more = count_flips(reduced, bars.x)[fooled], count_flips(grown, bars.x)[fooled]
        assert bool((fewer <= more).all())
        assert int((fewer < more).sum()) > 10
        changed = (reduced != bars.x)[fooled]
        assert bool(((grown != bars.x)[fooled] | ~changed).all())  # a subset of what had grown

    def test_no_single_change_of_a_spiking_network_can_be_put_back(self, bars):
        x_adv = flip_events(bars.model, bars.x[:24], bars.y[:24], flips=30, steps=4)
        tried = 0
        for row in range(24):
            if bars.model(x_adv[row : row + 1]).argmax(1) == bars.y[row]:
                continue
            changed = (x_adv[row] != bars.x[row]).flatten().nonzero().flatten()
            for element in changed.tolist():
                back = x_adv[row : row + 1].clone()
                back.view(-1)[element] = 1 - back.view(-1)[element]
                assert bars.model(back).argmax(1) == bars.y[row]
                tried += 1
        assert tried > 40

    def test_further_runs_never_need_more(self, bars):
        x, y = bars.x[:24], bars.y[:24]
        one, several = (
            flip_events(
                bars.model, x, y, flips=15, queries=20, probes=5, generator=torch.Generator().manual_seed(0), **options
            )
            for options in ({}, {"target_classes": 3, "restarts": 2})
        )
        fooled = bars.model(one).argmax(1) != y
        assert bool((bars.model(several).argmax(1) != y)[fooled].all())
        assert bool((count_flips(several, x) <= count_flips(one, x))[fooled].all())
        assert int((bars.model(several).argmax(1) != y).sum()) > int(fooled.sum())


class TestTrainedNetwork:
    def test_accuracy_falls_with_the_budget_far_below_random_changes(self, bars):
        budgets = (0, 5, 10, 20, 40)
        attacked, control = (
            [
                bars.accuracy(attack(bars.model, bars.x, bars.y, flips=k, generator=torch.Generator().manual_seed(0)))
                for k in budgets
            ]
            for attack in (partial(flip_events, reduce=False), partial(random_flips, tries=10))
        )
        assert attacked[0] == control[0] == bars.accuracy(bars.x) > 0.9
        assert attacked == sorted(attacked, reverse=True)
        assert attacked[1] < control[1]
        assert attacked[2] < control[2] - 0.2
        assert attacked[3] < control[3] - 0.5
        assert attacked[4] < 0.1

    def test_probes_and_queries_add_to_the_gradient(self, bars):
        run = partial(flip_events, bars.model, bars.x, bars.y, flips=10, reduce=False)
        settings = ({"probes": 0, "queries": 0}, {"queries": 0}, {})
        gradient, probed, both = (
            bars.accuracy(run(generator=torch.Generator().manual_seed(0), **options)) for options in settings
        )
        assert gradient > probed > both

    def test_a_network_without_a_gradient_falls_to_the_exchanges(self):
        class Dead(nn.Module):
            def forward(self, x):
                many = x.flatten(1).sum(1)
                return torch.stack([(many > 5.5).float() + 0 * many, torch.full_like(many, 0.5)], dim=1)

        x = frames(6, 2, 2, 3, 3, share=0.2)
        x[:, 0, 0, 0] = 1.0
        y = (x.flatten(1).sum(1) < 5.5).long()
        assert int(y.sum()) < 6
        with_search = flip_events(Dead(), x, y, flips=8, allow="remove", generator=torch.Generator().manual_seed(0))
        assert bool((Dead()(with_search).argmax(1) != y)[y == 0].any())
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
        flip_events(counted, x, right, flips=1, probes=0, queries=0, reduce=False)
        assert sum(calls[:2]) == 6  # the frames themselves, and one gradient
        assert len(calls) <= 3
        calls.clear()
        assert torch.equal(flip_events(counted, x, y, flips=30), x)
        assert calls == [3]


class TestRandomFlips:
    def test_exactly_as_many_as_asked_or_allowed(self):
        x = frames(5, 3, 2, 4, 4, share=0.1)
        events = x.flatten(1).sum(1).long()
        assert count_flips(random_flips(None, x, flips=20), x).tolist() == [20] * 5
        removed = count_flips(random_flips(None, x, flips=20, allow="remove"), x)
        assert torch.equal(removed, events.clamp(max=20))
        assert int(events.min()) < 20

    def test_uniform(self):
        x = torch.zeros(4000, 1, 2, 2, 3)
        x_adv = random_flips(None, x, flips=3, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(x_adv.mean(0).flatten(), torch.full((12,), 0.25), atol=0.03, rtol=0)

    def test_more_tries_fool_more(self, bars):
        once, often = (
            bars.accuracy(
                random_flips(
                    bars.model,
                    bars.x,
                    bars.y,
                    flips=40,
                    allow="remove",
                    tries=tries,
                    generator=torch.Generator().manual_seed(0),
                )
            )
            for tries in (1, 30)
        )
        assert often < once - 0.1


class TestState:
    def test_same_seed_same_result_and_another_seed_another(self, variant, bars):
        x, y = bars.x[:5], bars.y[:5]
        results = [
            variant(bars.model, x, y, flips=6, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)
        ]
        assert torch.equal(results[0], results[1])
        if variant not in (VARIANTS["gradient_only"], VARIANTS["eot"]):  # which draw next to nothing
            assert not torch.equal(results[0], results[2])

    @pytest.mark.parametrize("name", [name for name in VARIANTS if name != "eot"])
    def test_a_result_depends_on_neither_neighbours_nor_batch_size(self, name, double):
        (x, y), seeds = bars_and_labels(5), SampleSeeds(range(5))
        run = partial(VARIANTS[name], double, flips=8)
        together = run(x, y, generator=seeds)
        for rows in (torch.tensor([4]), torch.tensor([3, 0, 2])):
            assert torch.equal(run(x[rows], y[rows], generator=seeds.rows(rows)), together[rows])

    def test_neighbours_do_not_count_with_a_generator_either(self, double):
        x, y = bars_and_labels(6)
        others = torch.cat([x[:1], 1 - x[1:]]), torch.cat([y[:1], (y[1:] + 1) % 4])
        first, second = (
            flip_events(double, *batch, flips=12, restarts=2, queries=20, generator=torch.Generator().manual_seed(0))
            for batch in ((x, y), others)
        )
        assert torch.equal(first[0], second[0])

    @pytest.mark.parametrize("fail", [False, True], ids=["ends", "raises"])
    def test_modes_gradients_and_global_random_state_stay(self, search_variant, bars, fail):
        class Noisy(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = spiking_model()

            def forward(self, x):
                assert not any(module.training for module in self.modules())
                return self.inner(x) + 0.01 * torch.randn(len(x), 4)

        model = Noisy()
        for number, module in enumerate(model.modules()):
            module.training = number % 3 != 0
        modes = [module.training for module in model.modules()]
        handle = model.inner.net[2].register_forward_hook(lambda *_: 1 / 0) if fail else None
        before = torch.get_rng_state(), random.getstate()
        try:
            search_variant(model, bars.x[:4], bars.y[:4], flips=4)
        except ZeroDivisionError:
            assert handle
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        assert [module.training for module in model.modules()] == modes
        assert all(parameter.grad is None for parameter in model.parameters())

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_works_in_any_grad_mode_of_the_caller(self, search_variant, bars, context):
        x, y = bars.x[:4], bars.y[:4]
        wanted = search_variant(bars.model, x, y, flips=4, generator=torch.Generator().manual_seed(0))
        with context():
            got = search_variant(bars.model, x.clone(), y, flips=4, generator=torch.Generator().manual_seed(0))
        assert torch.equal(got, wanted)


class TestStochasticNetwork:
    def test_confidence_outlives_fresh_draws(self, bars):
        class Noisy(nn.Module):
            def forward(self, x):
                return bars.model(x) + 0.5 * torch.randn(len(x), 4)

        seeds = SampleSeeds(range(20))
        x, y = bars.x[:20], bars.y[:20]
        held = [
            int(fools(Noisy(), attack(Noisy(), x, y, flips=30, generator=seeds), y, draws=5, seeds=seeds).sum())
            for attack in (
                partial(flip_events, queries=0, probes=3),
                partial(flip_events, queries=0, probes=3, confidence=2, eot_samples=4),
            )
        ]
        assert held[1] > held[0] + 5


class TestWorstCase:
    ESTIMATORS = ("training", "atan:4", "pdsg", "straight_through")

    def members(self, flips: int) -> list[Member]:
        attack = partial(flip_events, flips=flips, reduce=False, probes=2, queries=10)
        return [Member(f"flips/{name}", attack, name, group="") for name in self.ESTIMATORS]

    def test_over_several_estimators(self, bars):
        x, y, seeds = bars.x[:32], bars.y[:32], SampleSeeds(range(32))
        result = worst_case(bars.model, x, y, self.members(10), seeds=seeds)
        alone = [float((outcome.attacked & ~outcome.fooled).double().mean()) for outcome in result.outcomes]
        assert 0 < result.robust_accuracy < min(alone)  # estimators fool different samples
        fooled = result.fooled_by >= 0
        assert bool((bars.model(result.x_adv).argmax(1) != y)[fooled].all())
        assert bool(((result.x_adv == 0) | (result.x_adv == 1)).all())
        assert int(count_flips(result.x_adv, x).max()) <= 10

    def test_in_a_resumable_run_with_its_control(self, bars, tmp_path):
        """On binary frames k changes are an L2 distance of sqrt(k), which the run and its report check."""
        radius = 10**0.5
        attack = partial(flip_events, flips=10, reduce=False, probes=2, queries=5)
        members = [
            Member("flips", attack, ball=("L2", radius)),
            Member("control/random", partial(random_flips, flips=10, tries=5), group="control", ball=("L2", radius)),
        ]
        run = partial(run_suite, bars.model, threat=ThreatModel("L2", radius), members=members)
        whole = [(bars.x[:12], bars.y[:12])]
        outcome = run(whole, folder=tmp_path)
        assert all(member.largest == pytest.approx(radius) and not member.outside for member in outcome.members)
        assert len(outcome.members[0].fooled) > len(outcome.members[1].fooled)
        assert run(whole, folder=tmp_path) == outcome
        too_far = [Member("flips", partial(random_flips, flips=11), ball=("L2", radius))]
        with pytest.raises(ValueError, match="must stay within L2 distance"):
            run_suite(bars.model, whole, too_far, threat=ThreatModel("L2", radius))

    def test_an_estimator_is_applied(self, bars):
        x, y, seeds = bars.x[:16], bars.y[:16], SampleSeeds(range(16))
        attack = partial(flip_events, flips=6, probes=0, queries=0, keep_best=False, reduce=False)
        first, second = (
            craft(bars.model, x, y, Member("flips", attack, name), seeds=seeds) for name in ("training", "atan:2")
        )
        assert not torch.equal(first, second)


X, Y = frames(3, T, 2, SIZE, SIZE), torch.tensor([0, 1, 3])


class TestWrongUse:
    @pytest.mark.parametrize(
        ("x", "error", "match"),
        [
            (
                X * 3,
                ValueError,
                r"binary event frames \(0 or 1\), got values from 0 to 3; integrated counts .*\(x > 0\)",
            ),
            (X * 0.5, ValueError, r"binary event frames .* got values from 0 to 0.5"),
            (X * torch.nan, ValueError, r"binary event frames"),
            (X.byte(), TypeError, r"floating point, got torch.uint8; use \(x > 0\).float\(\)"),
            (X.tolist(), TypeError, r"tensor of event frames, got list"),
            (X[0], ValueError, r"\[N, T, 2, H, W\], got shape \(6, 2, 10, 10\); add N with x.unsqueeze\(0\)"),
            (X.flatten(3), ValueError, r"got shape \(3, 6, 2, 100\)"),
            (X.flatten(2), ValueError, r"got shape .*integrate the events"),
            (X.transpose(1, 2), ValueError, r"2 polarities \(1 if merged\), got 6 .*dimension 2"),
        ],
        ids=["counts", "half", "nan", "bytes", "list", "no batch", "flat", "features", "polarity first"],
    )
    def test_frames(self, variant, x, error, match):
        with pytest.raises(error, match=match):
            variant(linear_model(1200), x, Y, flips=3)

    def test_time_first(self, variant):
        with pytest.raises(
            ValueError, match=r"samples first, .*got shape \(6, 3, .* for 3 labels; use x.transpose\(0, 1\)"
        ):
            variant(linear_model(600), X.transpose(0, 1), Y, flips=3)

    def test_another_number_of_frames_than_the_network(self, search_variant):
        with pytest.raises(ValueError, match=r"T = 6, got shape \(3, 5, 2, 10, 10\): 5 frames"):
            search_variant(spiking_model(), X[:, :5], Y, flips=3)

    @pytest.mark.parametrize(
        ("options", "error", "match"),
        [
            ({"flips": -1}, ValueError, r"flips must be >= 0, got -1"),
            ({"flips": 1201}, ValueError, r"flips must be <= 1200, the elements of a sample, got 1201"),
            ({"flips": 2.0}, TypeError, r"flips must be an integer, got float"),
            ({"flips": True}, TypeError, r"flips must be an integer, got bool"),
            (
                {"flips": 2, "allow": "flip"},
                ValueError,
                r"allow must be one of \('both', 'add', 'remove'\), got 'flip'",
            ),
            ({"flips": 2, "generator": SampleSeeds([1])}, ValueError, r"one seed per image, 3, got 1"),
            ({"flips": 2, "generator": 7}, TypeError, r"generator must be a torch.Generator, got int"),
        ],
    )
    @pytest.mark.parametrize("attack", [flip_events, random_flips])
    def test_options_of_both(self, attack, options, error, match):
        with pytest.raises(error, match=match):
            attack(linear_model(1200), X, Y, **options)

    @pytest.mark.parametrize(
        ("options", "error", "match"),
        [
            ({"steps": 0}, ValueError, r"steps must be >= 1, got 0"),
            ({"restarts": 0}, ValueError, r"restarts must be >= 1"),
            ({"eot_samples": 0}, ValueError, r"eot_samples must be >= 1"),
            ({"probes": -1}, ValueError, r"probes must be >= 0, got -1"),
            ({"queries": 1.5}, TypeError, r"queries must be an integer, got float"),
            ({"target_classes": 5}, ValueError, r"target_classes must be < 5, the number of classes, got 5"),
            ({"confidence": -1.0}, ValueError, r"confidence must be finite and >= 0, got -1"),
        ],
    )
    def test_options(self, options, error, match):
        with pytest.raises(error, match=match):
            flip_events(linear_model(1200), X, Y, flips=3, **options)

    def test_models(self):
        with pytest.raises(TypeError, match="model must be a callable"):
            flip_events(None, X, Y, flips=3)
        with pytest.raises(ValueError, match="at least 2 classes, got 1"):
            flip_events(lambda x: x.flatten(1)[:, :1], X, Y * 0, flips=3)
        with pytest.raises(RuntimeError, match="no gradient reaches the images"):
            flip_events(lambda x: linear_model(1200)(x.detach()), X, Y * 0, flips=3)
        with pytest.raises(ValueError, match=r"tries > 1 need model and y .*, got tries=2"):
            random_flips(None, X, flips=3, tries=2)

    def test_labels_and_counts(self):
        with pytest.raises(TypeError, match="y must be int64"):
            flip_events(linear_model(1200), X, Y.int(), flips=3)
        with pytest.raises(ValueError, match=r"shape of x, \[3, 6, 2, 10, 10\]"):
            count_flips(X[:1], X)
        check_frames(X)
