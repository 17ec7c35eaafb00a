"""The suites break networks whose gradients are masked, where the training surrogate reports them
robust.
"""

import pytest
import torch
from evaluation import masked
from torch import Tensor, nn

from sj_robust.attacks import SampleSeeds, ThreatModel
from sj_robust.evaluation import EstimatorSearch, make_suite, search_estimators, worst_case

pytestmark = pytest.mark.slow
torch.set_num_threads(1)


def left(model: nn.Module, members, x: Tensor, y: Tensor) -> float:
    return worst_case(model, x, y, members).everything.accuracy


def chosen_for(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel) -> list[str]:
    """Estimators that a short search picks."""
    settings = EstimatorSearch(
        ("training", "triangle:0.5", "atan:1", "atan:4"), steps=10, count=2, finalists=0
    )
    trials = search_estimators(
        model, x, y, threat=threat, settings=settings, seeds=SampleSeeds(range(len(x)))
    )
    return [trial.estimator for trial in trials if trial.chosen]


def test_the_fast_suite_breaks_a_narrow_surrogate(trained):
    honest = trained.model
    x = trained.x[:24]
    y = trained.y[:24]
    model = masked.with_neurons(honest, "surrogate_function", masked.NARROW)
    threat = ThreatModel("Linf", 0.12)
    chosen = chosen_for(model, x, y, threat)
    assert "training" not in chosen
    suite = make_suite("fast", threat, chosen=chosen, classes=10)
    worst = left(model, suite.members, x, y)
    control = left(model, suite.control, x, y)
    alone = left(model, suite.control[:1], x, y)
    assert round(24 * (control - worst)) >= 4  # images, though the control searches spikes too
    assert round(24 * (alone - worst)) >= 8
    # Without the mask the same suite comes to the same figure: the mask hid, it did not defend.
    assert worst == pytest.approx(left(honest, suite.members, x, y), abs=0.1)


def test_the_standard_suite_breaks_a_saturated_input(trained):
    x = trained.x[:12]
    y = trained.y[:12]
    model = masked.Before(masked.clamped, trained.model)
    threat = ThreatModel("Linf", 0.2)
    chosen = chosen_for(model, x, y, threat)
    suite = make_suite("standard", threat, chosen=chosen, classes=10)
    clean = left(model, (), x, y)
    control = make_suite("standard", threat, classes=10).control
    alone = left(model, control[:1], x, y)
    assert alone >= clean - 0.1
    assert left(model, suite.members, x, y) <= alone - 0.4
