"""Choice of gradient estimators: which are strong, which add something, and what cannot be tried."""

import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType

import pytest
import torch

from sj_robust.attacks import SampleSeeds, ThreatModel, gaussian
from sj_robust.evaluation import EstimatorSearch, search_estimators

THREAT = ThreatModel("Linf", 0.03)


@dataclass(frozen=True)
class Scaled:
    """A stand-in estimator: crafts on logits whose dependence on the image is cut to the first pixels."""

    pixels: int | None

    @contextmanager
    def __call__(self, model):
        if self.pixels is None:
            raise ValueError("this network has no such neuron")

        def crafted_on(x):
            flat = x.flatten(1)
            seen = torch.cat([flat[:, : self.pixels], flat[:, self.pixels :].detach()], 1)
            return model(seen.view_as(x))

        yield crafted_on


@pytest.fixture
def stand_ins(monkeypatch):
    """Estimators that use 1 ("weak") or 18 ("half") or all pixels, and one that cannot be used."""

    def estimator(name):
        pixels = {"weak": 1, "half": 18, "full": 36, "training": 36, "impossible": None}
        if name.removesuffix("+detach") not in pixels:
            raise ValueError(f"unknown estimator {name!r}")
        return Scaled(pixels[name.removesuffix("+detach")])

    module = ModuleType("sj_robust.estimators")
    module.estimator = estimator
    monkeypatch.setitem(sys.modules, module.__name__, module)


def search(digits, rows=slice(None), *, threat=THREAT, attack=None, **settings):
    model, x, y = digits
    settings = EstimatorSearch(**{"candidates": [], "steps": 5} | settings)
    seeds = SampleSeeds(range(40)).rows(torch.arange(40)[rows])
    return search_estimators(model, x[rows], y[rows], threat=threat, settings=settings, attack=attack, seeds=seeds)


@pytest.mark.usefixtures("stand_ins")
class TestSearch:
    def test_stronger_estimators_come_first_and_are_chosen(self, digits):
        trials = search(digits, candidates=["weak", "half", "impossible"], count=1, images=30)
        order = [trial.estimator for trial in trials if "+" not in trial.estimator]
        assert order == ["training", "half", "weak", "impossible"]
        assert [trial.estimator for trial in trials if trial.chosen] == ["training"]
        by_name = {trial.estimator: trial for trial in trials}
        assert by_name["training"].margin < by_name["half"].margin < by_name["weak"].margin < 1
        assert by_name["impossible"].note == "ValueError: this network has no such neuron"
        assert not by_name["impossible"].chosen

    def test_nothing_is_chosen_that_adds_nothing(self, digits):
        trials = search(digits, candidates=["full"], images=30)
        assert [trial.estimator for trial in trials if trial.chosen] == ["training"]  # "full" is the same

    def test_only_the_first_correct_images_count_and_the_result_is_repeatable(self, digits):
        model, x, y = digits
        first = (model(x).argmax(1) == y).nonzero().flatten()[:10]
        options = {"candidates": ["half", "weak"], "steps": 7}
        runs = [
            search(digits, images=10, **options),
            search(digits, images=10, **options),
            search(digits, first, **options),
        ]
        assert len({tuple(replace(trial, seconds=0) for trial in trials) for trials in runs}) == 1
        assert 0 < runs[0][0].margin < 1

    def test_another_attack_and_l2(self, digits):
        (trial,) = search(digits, attack=partial(gaussian, std=0.0))
        assert (trial.robust_accuracy, trial.margin) == (1, pytest.approx(1))
        (trial,) = search(digits, threat=ThreatModel("L2", 0.5))
        assert trial.margin < 1

    def test_wrong_use(self, digits):
        with pytest.raises(ValueError, match="images that are classified right, got none among 5"):
            search(digits, slice(0, 40, 8))
        with pytest.raises(ValueError, match="unknown estimator 'atna:4'"):
            search(digits, candidates=["half", "atna:4"])
        with pytest.raises(ValueError, match="steps must be >= 1, got 0"):
            EstimatorSearch(steps=0)
