"""Networks that were built to look robust: none gets a better verdict without a sign of it."""

from dataclasses import replace

import pytest
import torch
from evaluation.fooling import BORDER, FOOLING, GRID, UNDOING
from evaluation.short_suite import short_suite, shortened
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

from sj_robust import SpikingClassifier
from sj_robust.evaluation import Report, evaluate

torch.set_num_threads(1)

EPS = 0.12
Given = tuple[nn.Module, Tensor, Tensor]

# What an error names that refuses a network.
REFUSED = {
    "averages copies": "batch",
    "looks at the place": "batch",
    "remembers outside": "asked before",
    "shares its memory": "asked before",
    "remembers in a file": "open no file",
    "remembers in a module": "asked before",
    "caches": "asked before",
    "shakes by the clock": "state",
}
# One of the checks that fail, None where the attacks break a network all the same; and how many
# images more than of the honest one may be left.
FOUND = {
    "remembers": ("other_answers", 2),
    "gives another gradient": ("gradient_of_another", 2),
    "remembers in its copies": ("other_answers", 2),
    "steps more for gradients": ("gradient_of_another", 2),
    "turns gradients": ("gradient_of_another", 2),
    "detaches most pixels": ("gradient_of_another", 2),
    "knows that it is a copy": ("other_answers", 2),
    "counts": ("other_answers", 2),
    "answers attacks otherwise": ("other_answers", 2),
    "looks at its caller": ("other_answers", 2),
    "rounds": ("zero_gradients", 2),
    "rounds in place": ("zero_gradients", 2),
    "shakes by the image": (None, 0),
    "saturates": ("saturated_loss", 2),
    "wiggles": ("gradient_of_small_steps", 2),
    "undoes the border": ("larger_budget_fools_fewer", 3),
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


def evaluated(
    model: nn.Module, x: Tensor, y: Tensor, *, eps: float = EPS, whole_square: bool = False
) -> Report:
    def few(suite):
        short = short_suite(suite)
        plain = suite.plain[-1:] if whole_square else short.plain
        return replace(short, members=short.members[:2], control=(), plain=plain)

    with shortened(few):
        return evaluate(model, x, y, eps=eps, suite="fast", progress=False)


@pytest.fixture(scope="module")
def honest(given) -> Report:
    return evaluated(*given)


def test_an_honest_network_has_no_alarm_and_is_not_asked_more(honest):
    assert all(row["passed"] for row in honest.findings)
    assert not any(row.member.startswith("plain/") for row in honest.rows)
    assert honest.clean.correct >= 15
    assert honest.worst_case.correct <= 10


def quick(names, *first):
    """Cases by name, all but the first ones slow."""
    return [name if name in first else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", quick(REFUSED, "averages copies", "remembers outside"))
def test_a_network_that_is_no_function_of_an_image_is_refused(name, given):
    model, x, y = given
    with pytest.raises(ValueError, match=REFUSED[name]):
        evaluated(FOOLING[name](model), x, y)


@pytest.mark.parametrize("name", quick(FOUND, "remembers", "gives another gradient"))
def test_a_network_that_was_built_to_fool_gets_no_better_verdict(name, given, honest):
    model, x, y = given
    sign, more = FOUND[name]
    whole_square = sign == "gradient_of_small_steps"  # which only Square overcomes
    report = evaluated(FOOLING[name](model), x, y, whole_square=whole_square)
    failed = {row["name"] for row in report.findings if not row["passed"]}
    assert sign is None or sign in failed
    assert report.worst_case.correct <= honest.worst_case.correct + more


@pytest.mark.parametrize("name", quick(UNDOING, "the border"))
def test_a_network_that_knows_where_attacks_end_shows_it_in_a_smaller_ball(name, given):
    model, x, y = given
    x = (GRID * x).round() / GRID
    left = evaluated(model, x, y, eps=BORDER)
    assert all(row["passed"] for row in left.findings)
    report = evaluated(UNDOING[name](model), x, y, eps=BORDER)
    assert "larger_budget_fools_fewer" in {r["name"] for r in report.findings if not r["passed"]}
    assert report.worst_case.correct <= left.worst_case.correct + 5
