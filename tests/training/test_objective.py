"""What the objective runs, reports and refuses; its formulas are checked in test_training_step."""

import pytest
import torch
from torch.testing import assert_close

from sj_robust import SpikingClassifier
from sj_robust.models import NetworkSpec, build_network
from sj_robust.training import GradientSparsity, Objective, Penalty, ThresholdGuarding

T = 3


@pytest.fixture
def problem():
    torch.manual_seed(0)
    spec = NetworkSpec(
        image_shape=(2, 8, 8),
        classes=5,
        T=T,
        tau=5.0,
        channels=(4, 6),
    )
    classifier = SpikingClassifier(build_network(spec), T).double().train()
    with torch.no_grad():
        for _ in range(5):
            classifier(torch.rand(16, 2, 8, 8).double())
    x = torch.rand(6, 2, 8, 8).double()
    y = torch.arange(6) % 5
    return classifier, x, y


class Count(Penalty):
    """Counts what the objective does around it."""

    name = "count"

    def value(self, passes):
        self.passes = passes
        return passes.classifier.net.first.weight.square().sum()


def images_seen(classifier):
    """The images of every pass from now on."""
    seen = []

    def note(module, args):
        seen.append(args[0].detach().clone())

    classifier.register_forward_pre_hook(note)
    return seen


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({}, "both"),
        ({"kappa": 0.0}, "both"),  # MS-MPPD compares both
        ({"kappa": 1.0}, "both"),
        ({"rho": 0.0}, "both"),
        ({"kappa": 0.0, "rho": 0.0}, "perturbed"),
        ({"kappa": 1.0, "rho": 0.0}, "clean"),
        ({"kappa": 0.0, "rho": 0.0, "loss": "trades"}, "both"),
        ({"kappa": 1.0, "rho": 0.0, "loss": "trades"}, "both"),
    ],
)
def test_only_the_passes_that_a_term_needs_are_run(problem, options, passes):
    classifier, x, y = problem
    x_perturbed = (x + 0.2).clamp(0, 1)
    expected = {
        "both": [x, x_perturbed],
        "clean": [x],
        "perturbed": [x_perturbed],
    }
    objective = Objective(classifier, **options)
    seen = images_seen(classifier)
    losses = objective(x, y, x_perturbed)
    assert_close(seen, expected[passes], rtol=0, atol=0)
    assert (losses.clean > 0) == (passes != "perturbed")
    assert (losses.perturbed > 0) == (passes != "clean")
    losses.total.backward()
    for parameter in classifier.parameters():
        assert parameter.grad is not None  # DDP waits for every one of them
    seen.clear()
    losses = objective(x, y)
    assert len(seen) == 1
    assert torch.equal(losses.total.detach(), losses.clean)


def test_parts_and_accuracy(problem):
    classifier, x, y = problem
    objective = Objective(classifier, kappa=0.25, rho=2.0).eval()
    losses = objective(x, y, x)
    assert losses.mppd == 0
    assert losses.penalty == 0
    assert losses.perturbed == losses.clean
    assert losses.total == losses.clean
    with torch.no_grad():
        right = classifier(x).argmax(1) == y
    assert losses.accuracy == right.double().mean()
    assert losses.accuracy_perturbed == losses.accuracy
    for part in losses[1:]:
        assert not part.requires_grad
    trades = Objective(classifier, loss="trades", rho=0.0).eval()
    losses = trades(x, y, x)
    assert losses.total == losses.clean


def test_penalties_are_weighted_summed_and_told_by_name(problem):
    classifier, x, y = problem
    count = Count(0.5)
    penalties = [count, GradientSparsity(0.0), ThresholdGuarding(2.0)]
    objective = Objective(classifier, penalties=penalties).eval()
    losses = objective(x, y, x * 0.9)
    values = objective.penalty_values
    assert list(values) == ["count", "threshold_guarding"]
    weighted = 0.5 * values["count"] + 2 * values["threshold_guarding"]
    assert_close(losses.penalty, weighted)
    plain = Objective(classifier).eval()
    without = plain(x, y, x * 0.9)
    assert_close(losses.total, without.total + losses.penalty)
    assert count.passes.logits is not None
    assert torch.equal(count.passes.first[0], x)
    assert not x.requires_grad
