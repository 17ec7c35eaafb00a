"""Attacks on binary event frames: what they leave as found, what they depend on, stochastic
networks, wrong use.
"""

from functools import partial

import pytest
import torch
from attacks.moving_bars import EVENT_ATTACKS, SIZE, T, frames, moving_bars, spiking_model
from attacks.table import left_as_it_was, linear_model, seeded
from torch import Tensor, nn

from sj_robust.attacks import SampleSeeds, count_flips, flip_events, random_flips
from sj_robust.attacks.events import check_frames
from sj_robust.classifier import SpikingEventClassifier
from sj_robust.evaluation.run.member import fools


@pytest.fixture(scope="module")
def double(bars) -> SpikingEventClassifier:
    """The trained network in float64, where a batch size moves no spike."""
    model = spiking_model().double().eval()
    model.load_state_dict(bars.model.state_dict())
    return model


def bars_and_labels(count: int) -> tuple[Tensor, Tensor]:
    x, y = moving_bars(count, seeded(2))
    return x.double(), y


SEARCHES_OF_EACH_KIND = ["last", "targets_and_restarts", "eot", "moves"]
OF_EACH_KIND = [*SEARCHES_OF_EACH_KIND, "random", "random_moves"]


class TestState:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", OF_EACH_KIND)
    def test_same_seed_same_result_and_another_seed_another(self, name, bars):
        x = bars.x[:3]
        y = bars.y[:3]
        run = partial(EVENT_ATTACKS[name], bars.model, flips=6)
        first = run(x, y, generator=seeded(5))
        other = run(x, y, generator=seeded(6))
        with torch.inference_mode():  # of the caller
            again = run(x.clone(), y, generator=seeded(5))
        assert torch.equal(again, first)
        if name != "eot":  # which draws next to nothing
            assert not torch.equal(first, other)
        assert ((first == 0) | (first == 1)).all()
        assert 0 < int(count_flips(first, x).max()) <= 6

    @pytest.mark.slow
    @pytest.mark.parametrize("name", OF_EACH_KIND)
    def test_a_result_depends_on_neither_neighbours_nor_batch_size(self, name, double):
        x, y = bars_and_labels(5)
        seeds = SampleSeeds(range(5))
        run = partial(EVENT_ATTACKS[name], double, flips=8)
        together = run(x, y, generator=seeds)
        for rows in (torch.tensor([4]), torch.tensor([3, 0, 2])):
            found = run(x[rows], y[rows], generator=seeds.rows(rows))
            assert torch.equal(found, together[rows])

    @pytest.mark.slow
    def test_neighbours_do_not_count_with_a_generator_either(self, double):
        x, y = bars_and_labels(3)
        others = torch.cat([x[:1], 1 - x[1:]]), torch.cat([y[:1], (y[1:] + 1) % 4])
        run = partial(flip_events, double, flips=12, restarts=2, queries=20)
        first = run(x, y, generator=seeded())
        second = run(*others, generator=seeded())
        assert torch.equal(first[0], second[0])

    @pytest.mark.parametrize("fail_at", [None, 1])
    @pytest.mark.parametrize("event_search", SEARCHES_OF_EACH_KIND, indirect=True)
    def test_network_and_generators_are_left_as_they_were(self, event_search, bars, fail_at):
        model = spiking_model()
        with left_as_it_was(model, fail_at):
            event_search(model, bars.x[:4], bars.y[:4], flips=4)


class TestStochasticNetwork:
    @pytest.mark.slow
    def test_confidence_outlives_fresh_draws(self, bars):
        class Noisy(nn.Module):
            def forward(self, x):
                return bars.model(x) + 0.5 * torch.randn(len(x), 4)

        seeds = SampleSeeds(range(20))
        x = bars.x[:20]
        y = bars.y[:20]
        run = partial(flip_events, Noisy(), x, y, flips=30, queries=0, probes=3, generator=seeds)
        held = []
        for options in ({}, {"confidence": 2, "eot_samples": 4}):
            fell = fools(Noisy(), run(**options), y, draws=5, seeds=seeds)
            held.append(int(fell.sum()))
        assert held[1] > held[0] + 5


X = frames(3, T, 2, SIZE, SIZE)
Y = torch.tensor([0, 1, 3])


BOTH = (flip_events, random_flips)
WRONG_OPTIONS = [
    (BOTH, {"flips": -1}, ValueError, r"flips must be >= 0, got -1"),
    (
        BOTH,
        {"flips": 1201},
        ValueError,
        r"flips must be <= 1200, the elements of a sample, got 1201",
    ),
    (BOTH, {"flips": 2.0}, TypeError, r"flips must be an integer, got float"),
    (BOTH, {"flips": True}, TypeError, r"flips must be an integer, got bool"),
    (
        BOTH,
        {"allow": "flip"},
        ValueError,
        r"allow must be one of \('both', 'add', 'remove'\), got 'flip'",
    ),
    (BOTH, {"generator": SampleSeeds([1])}, ValueError, r"one seed per image, 3, got 1"),
    (BOTH, {"generator": 7}, TypeError, r"generator must be a torch.Generator, got int"),
    ([flip_events], {"steps": 0}, ValueError, r"steps must be >= 1, got 0"),
    ([flip_events], {"restarts": 0}, ValueError, r"restarts must be >= 1"),
    ([flip_events], {"eot_samples": 0}, ValueError, r"eot_samples must be >= 1"),
    ([flip_events], {"probes": -1}, ValueError, r"probes must be >= 0, got -1"),
    ([flip_events], {"queries": 1.5}, TypeError, r"queries must be an integer, got float"),
    (
        [flip_events],
        {"target_classes": 5},
        ValueError,
        r"target_classes must be < 5, the number of classes, got 5",
    ),
    (
        [flip_events],
        {"confidence": -1.0},
        ValueError,
        r"confidence must be finite and >= 0, got -1",
    ),
    ([random_flips], {"tries": 0}, ValueError, r"tries must be >= 1"),
]


class TestWrongUse:
    @pytest.mark.parametrize(
        ("x", "error", "match"),
        [
            (
                X * 2.5,
                ValueError,
                r"binary event frames .* 0 to 2.5; for numbers of events pass counts=True.*x > 0",
            ),
            (X * 0.5, ValueError, r"binary event frames .* got values from 0 to 0.5"),
            (X * torch.nan, ValueError, r"x must be finite, got 3600 NaN"),
            (X.byte(), TypeError, r"floating point, got torch.uint8; use \(x > 0\).float\(\)"),
            (X.tolist(), TypeError, r"tensor of event frames, got list"),
            (
                X[0],
                ValueError,
                r"\[N, T, 2, H, W\], got shape \(6, 2, 10, 10\); add N with x.unsqueeze\(0\)",
            ),
            (X.flatten(3), ValueError, r"got shape \(3, 6, 2, 100\)"),
            (X.flatten(2), ValueError, r"got shape .*integrate the events"),
            (X.transpose(1, 2), ValueError, r"2 polarities \(1 if merged\), got 6 .*dimension 2"),
            (
                X.transpose(0, 1),
                ValueError,
                r"samples first, .*\(6, 3, .* for 3 labels; use x.transpose\(0, 1\)",
            ),
        ],
        ids=[
            "counts",
            "half",
            "nan",
            "bytes",
            "list",
            "no batch",
            "flat",
            "features",
            "polarity first",
            "time first",
        ],
    )
    def test_frames(self, event_attack, x, error, match):
        with pytest.raises(error, match=match):
            event_attack(linear_model(1200), x, Y, flips=3)

    def test_another_number_of_frames_than_the_network(self, event_search):
        with pytest.raises(ValueError, match=r"T = 6, got shape \(3, 5, 2, 10, 10\): 5 frames"):
            event_search(spiking_model(), X[:, :5], Y, flips=3)

    @pytest.mark.parametrize(
        ("attack", "options", "error", "match"),
        [(attack, *wrong) for attacks, *wrong in WRONG_OPTIONS for attack in attacks],
    )
    def test_options(self, attack, options, error, match):
        with pytest.raises(error, match=match):
            attack(linear_model(1200), X, Y, **{"flips": 3, **options})

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
