"""Input gains of least gain, proven by duality and by search, and the gain as a term of the
training objective.
"""

import pytest
import torch
from covering import every_pair
from spikingjelly.activation_based import neuron
from torch import nn
from torch.testing import assert_close

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.proofs.gains import gain_penalty, l2_gain, optimal_input_gain, peak_gain
from sj_robust.proofs.gains.design import gain_scalars
from sj_robust.proofs.gains.gain import time_operator
from sj_robust.training import Objective, StabilityGain

CASES = [("l2", "mean"), ("l2", "response"), ("peak", "mean")]


CHOICES = {"case": CASES, "decay": [0.001, 0.5, 0.9, 0.99, 1.0], "T": [1, 2, 3, 8, 60, 400]}


@pytest.mark.parametrize(tuple(CHOICES), every_pair(CHOICES))
def test_optimal_gains_meet_their_dual_bound(case, decay, T):
    objective, held = case
    design = optimal_input_gain(decay, T, mean=0.7, objective=objective, held=held)
    assert design.gain == pytest.approx(design.lower_bound, rel=1e-9)
    assert (design.input_gain > 0).all()
    if held == "mean":
        assert float(design.input_gain.mean()) == pytest.approx(0.7)
    else:
        mean_response = float(design.response.mean())
        assert mean_response == pytest.approx(float(design.constant_response.mean()))
    assert design.gain <= design.constant_gain * (1 + 1e-12)
    operator = time_operator(decay, T)
    assert_close(design.response, operator @ design.input_gain)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize(("objective", "held"), CASES)
def test_no_other_gains_are_lower(objective, held, decay):
    T = 8
    measure = {"l2": l2_gain, "peak": peak_gain}[objective]
    design = optimal_input_gain(decay, T, objective=objective, held=held)
    c = torch.ones(T).double()
    if held == "response":
        c = time_operator(decay, T).sum(0)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, T, generator=generator).double()
    along = torch.outer(noise @ c, c) / c.square().sum()
    noise -= along  # so that what is held stays
    for size in (1e-4, 1e-2, 0.3):
        others = measure(decay, T, design.input_gain + size * noise)
        assert (others >= design.gain * (1 - 1e-10)).all()
        assert others.mean() > design.gain * (1 + 1e-9)


def test_what_the_best_gains_save_and_cost_at_the_decay_and_steps_of_the_paper():
    design = optimal_input_gain(0.99, 8)
    mean_response = float(design.response.mean() / design.constant_response.mean())
    assert round(mean_response, 3) == 0.706
    assert design.gain / mean_response > design.constant_gain
    held = optimal_input_gain(0.99, 8, held="response")
    assert round(held.gain, 3) == 5.139
    peak = optimal_input_gain(0.99, 8, objective="peak")
    assert round(peak.gain, 3) == 2.729
    assert round(peak.constant_gain, 3) == 2.732


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 6),
        DLIFNode(T=5, tau=4.0),
        nn.Linear(6, 5),
        DLIFNode(T=3, tau=50.0),
        nn.Linear(5, 3),
        neuron.LIFNode(tau=2.0, step_mode="m"),
    )
    with torch.no_grad():
        for node in (net[1], net[3]):
            node.input_gain.copy_(torch.randn(node.T))
    return net


@pytest.mark.parametrize("normalized", [False, True])
def test_penalty_is_the_sum_of_squared_exact_gains(net, normalized):
    expected = 0.0
    for node in (net[1], net[3]):
        gain = l2_gain(node.decay, node.T, node.input_gain).item()
        if normalized:
            gain /= node.input_gain.abs().mean().item()
        expected += gain**2
    options = {"normalized": True} if normalized else {}
    penalty = gain_penalty(net, **options)
    assert penalty.item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("normalized", [False, True])
def test_gradient_of_the_penalty(net, normalized):
    net.double()

    def penalty(*gains):  # of the network, which gradcheck moves in place
        return gain_penalty(net, normalized=normalized)

    gains = (net[1].input_gain, net[3].input_gain)
    assert torch.autograd.gradcheck(penalty, gains)


@pytest.mark.parametrize("normalized", [False, True])
def test_gains_of_zero_have_a_gradient_of_zero(net, normalized):
    gains = net[1].input_gain
    gains.data.zero_()
    gain_penalty(net, normalized=normalized).backward()
    assert gains.grad.tolist() == [0.0] * 5
    assert torch.isfinite(net[3].input_gain.grad).all()


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_gains_that_are_not_finite_make_the_loss_nan(net, normalized, value):
    net[1].input_gain.data[2] = value
    assert gain_penalty(net, normalized=normalized).isnan()


def test_scalars_for_the_log(net):
    scalars = gain_scalars(net)
    assert list(scalars) == ["l2_gain/1", "peak_gain/1", "l2_gain/3", "peak_gain/3"]
    p = net[3].input_gain
    l2 = l2_gain(0.98, 3, p).item()
    peak = peak_gain(0.98, 3, p).item()
    assert scalars["l2_gain/3"] == pytest.approx(l2, rel=1e-9)
    assert scalars["peak_gain/3"] == pytest.approx(peak, rel=1e-9)
    scalars = gain_scalars(net, T=6)
    of_lif = l2_gain(0.5, 6).item() / 2
    assert scalars["l2_gain/5"] == pytest.approx(of_lif, rel=1e-9)


@pytest.mark.parametrize("normalized", [False, True])
def test_the_training_objective_adds_the_weighted_penalty(normalized):
    torch.manual_seed(0)
    node = DLIFNode(T=4, tau=10.0)
    nn.init.uniform_(node.input_gain, 0.5, 1.5)
    net = nn.Sequential(
        nn.Flatten(2),
        nn.Linear(9, 12),
        node,
        nn.Linear(12, 3),
    )
    model = SpikingClassifier(net, T=4)
    x = torch.rand(6, 1, 3, 3)
    y = torch.arange(6) % 3
    gradients = []
    for weight in (0.0, 0.05):
        penalties = [StabilityGain(weight, normalized=normalized)]
        objective = Objective(model, rho=0.5, penalties=penalties).train()
        loss = objective(x, y, x + 0.1)
        gradients += torch.autograd.grad(loss.total, node.input_gain)
        assert ("stability_gain" in objective.penalty_values) == (weight > 0)
    value = gain_penalty(net, normalized=normalized)
    assert_close(loss.penalty, 0.05 * value.float())
    (of_value,) = torch.autograd.grad(value, node.input_gain)
    without, with_penalty = gradients
    assert_close(with_penalty - without, 0.05 * of_value)
