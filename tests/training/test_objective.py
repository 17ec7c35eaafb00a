"""What the objective runs, reports and refuses; its formulas are checked in test_training_step."""

import pytest
import torch

from sj_robust import SpikingClassifier
from sj_robust.models import NetworkSpec, build_network
from sj_robust.training import GradientSparsity, Objective, Penalty, ThresholdGuarding

T = 3


@pytest.fixture
def problem():
    torch.manual_seed(0)
    spec = NetworkSpec(image_shape=(2, 8, 8), classes=5, T=T, tau=5.0, channels=(4, 6))
    classifier = SpikingClassifier(build_network(spec), T).double()
    with torch.no_grad():
        classifier.train()
        for _ in range(5):
            classifier(torch.rand(16, 2, 8, 8, dtype=torch.float64))
    return classifier, torch.rand(6, 2, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0])


class Count(Penalty):
    """Counts what the objective does around it."""

    name = "count"

    def value(self, passes):
        self.passes = passes
        return passes.classifier.net.first.weight.square().sum()


def images_seen(classifier):
    """The images of every pass from now on."""
    seen = []
    classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    return seen


@pytest.mark.parametrize(
    ("options", "clean", "perturbed"),
    [
        ({}, True, True),
        ({"kappa": 0.0}, True, True),  # MS-MPPD compares both
        ({"kappa": 1.0}, True, True),
        ({"rho": 0.0}, True, True),
        ({"kappa": 0.0, "rho": 0.0}, False, True),
        ({"kappa": 1.0, "rho": 0.0}, True, False),
        ({"kappa": 0.0, "rho": 0.0, "loss": "trades"}, True, True),
        ({"kappa": 1.0, "rho": 0.0, "loss": "trades"}, True, True),
    ],
)
def test_only_the_passes_that_a_term_needs_are_run(problem, options, clean, perturbed):
    classifier, x, y = problem
    x_perturbed = (x + 0.2).clamp(0, 1)
    expected = [images for images, runs in ((x, clean), (x_perturbed, perturbed)) if runs]
    objective = Objective(classifier, **options)
    seen = images_seen(classifier)
    losses = objective(x, y, x_perturbed)
    assert len(seen) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    assert (losses.clean > 0, losses.perturbed > 0) == (clean, perturbed)
    losses.total.backward()
    assert all(
        p.grad is not None for p in classifier.parameters()
    )  # DDP waits for every one of them
    seen.clear()
    losses = objective(x, y)
    assert len(seen) == 1
    assert torch.equal(losses.total.detach(), losses.clean)


def test_parts_and_accuracy(problem):
    classifier, x, y = problem
    objective = Objective(classifier, kappa=0.25, rho=2.0).eval()
    losses = objective(x, y, x)
    assert losses.mppd == losses.penalty == 0
    assert losses.clean == losses.perturbed == losses.total
    with torch.no_grad():
        assert (
            losses.accuracy
            == losses.accuracy_perturbed
            == (classifier(x).argmax(1) == y).double().mean()
        )
    assert not any(part.requires_grad for part in losses[1:])
    losses = Objective(classifier, loss="trades", rho=0.0).eval()(x, y, x)
    assert losses.total == losses.clean


def test_penalties_are_weighted_summed_and_told_by_name(problem):
    classifier, x, y = problem
    count, absent = Count(0.5), GradientSparsity(0.0)
    objective = Objective(classifier, penalties=[count, absent, ThresholdGuarding(2.0)]).eval()
    losses = objective(x, y, x * 0.9)
    assert list(objective.penalty_values) == ["count", "threshold_guarding"]
    values = objective.penalty_values
    torch.testing.assert_close(
        losses.penalty, 0.5 * values["count"] + 2 * values["threshold_guarding"]
    )
    plain = Objective(classifier).eval()(x, y, x * 0.9)
    torch.testing.assert_close(losses.total, plain.total + losses.penalty)
    assert count.passes.logits is not None
    assert torch.equal(count.passes.first[0], x)
    assert not x.requires_grad


def test_the_same_step_twice_gives_the_same_numbers_whatever_ran_between(problem):
    classifier, x, y = problem
    penalties = [GradientSparsity(0.1), ThresholdGuarding(0.1)]
    objective = Objective(classifier, indicator="std", penalties=penalties).eval()
    objective.check_layers(x)
    first = objective(x, y, x * 0.9)
    classifier(x * 0.1)
    assert all(torch.equal(a, b) for a, b in zip(first, objective(x, y, x * 0.9), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kappa": 1.5}, "kappa"),
        ({"rho": -1.0}, "rho"),
        ({"norm": "l3"}, "norm"),
        ({"layers": ["nowhere"]}, "nowhere"),
        ({"loss": "mart"}, "loss must be one of .*'mart'"),
        ({"trades_weight": float("nan")}, "trades_weight"),
        ({"indicator": "rate"}, "indicator must be one of .*'rate'"),
        ({"penalties": [Count(1.0), Count(2.0)]}, "differ in name, got count, count"),
    ],
)
def test_wrong_use(problem, options, message):
    with pytest.raises(ValueError, match=message):
        Objective(problem[0], **options)
