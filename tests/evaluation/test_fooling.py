"""Networks that were built to look robust: none gets a better verdict without a sign of it."""

from dataclasses import replace

import pytest
import torch
from evaluation.fooling import FOOLING
from evaluation.short_suite import short_suite, shortened
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

from sj_robust import SpikingClassifier
from sj_robust.evaluation import Report, evaluate

torch.set_num_threads(1)

EPS = 0.12
Given = tuple[nn.Module, Tensor, Tensor]

# The error that refuses a network, or one of the checks that fail.
VERDICTS = {
    "remembers": "other_answers",
    "gives another gradient": "gradient_of_another",
    "averages copies": ValueError,
    "remembers in its copies": "other_answers",
    "remembers outside": ValueError,
    "turns gradients": "gradient_of_another",
    "detaches most pixels": "gradient_of_another",
    "counts": "other_answers",
    "looks at the place": ValueError,
    "answers attacks otherwise": "other_answers",
    "looks at its caller": "other_answers",
    "rounds": "zero_gradients",
    "shakes by the clock": ValueError,
    "shakes by the image": "gradient_of_another",
    "saturates": "saturated_loss",
}


@pytest.fixture(scope="module")
def given() -> Given:
    """Images around four patterns, and spikes of random features that least squares read."""
    draw = torch.Generator().manual_seed(0)
    patterns = torch.rand(4, 1, 4, 4, generator=draw)
    y = torch.arange(80) % 4
    x = (patterns[y] + 0.15 * torch.randn(80, 1, 4, 4, generator=draw)).clamp(0, 1)
    features = nn.Linear(16, 48), neuron.LIFNode(step_mode="m")
    net = nn.Sequential(nn.Flatten(2), *features, nn.Linear(48, 4))
    with torch.no_grad():
        features[0].weight.copy_(torch.randn(48, 16, generator=draw))
        features[0].bias.copy_(torch.randn(48, generator=draw))
        rates = SpikingClassifier(net[:3], T=4)(x)
        target = nn.functional.one_hot(y, 4) - 0.25
        ridge = torch.linalg.solve(rates.T @ rates + torch.eye(48), rates.T @ target)
        net[3].weight.copy_(10 * ridge.T)
        net[3].bias.zero_()
    return SpikingClassifier(net, T=4).eval(), x[:16], y[:16]


def evaluated(model: nn.Module, x: Tensor, y: Tensor) -> Report:
    def few(suite):
        short = short_suite(suite)
        return replace(short, members=short.members[:2], control=())

    with shortened(few):
        return evaluate(model, x, y, eps=EPS, suite="fast", progress=False)


@pytest.fixture(scope="module")
def honest(given) -> Report:
    return evaluated(*given)


def test_an_honest_network_has_no_alarm_and_is_not_asked_more(honest):
    assert all(row["passed"] for row in honest.findings)
    assert not any(row.member.startswith("plain/") for row in honest.rows)
    assert honest.clean.correct >= 15
    assert honest.worst_case.correct <= 10


@pytest.mark.parametrize("name", FOOLING)
def test_a_network_that_was_built_to_fool(name, given, honest):
    model, x, y = given
    expected = VERDICTS[name]
    fooling = FOOLING[name](model)
    if not isinstance(expected, str):
        with pytest.raises(expected):
            evaluated(fooling, x, y)
        return
    report = evaluated(fooling, x, y)
    assert expected in {row["name"] for row in report.findings if not row["passed"]}
    assert report.worst_case.correct <= honest.worst_case.correct + 1
