"""Input gains of least gain, proven by duality and by search, and the gain as a term of the
training objective.
"""

import pytest
import torch
from spikingjelly.activation_based import neuron
from torch import nn

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.perturbation.gains import (
    gain_penalty,
    gain_scalars,
    l2_gain,
    optimal_input_gain,
    peak_gain,
    time_operator,
)
from sj_robust.training import Objective, StabilityGain

CASES = [("l2", "mean"), ("l2", "response"), ("peak", "mean")]


@pytest.mark.parametrize("T", [1, 2, 3, 8, 60, 400])
@pytest.mark.parametrize("decay", [0.001, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize(("objective", "held"), CASES)
def test_optimal_gains_meet_their_dual_bound(objective, held, decay, T):
    design = optimal_input_gain(decay, T, mean=0.7, objective=objective, held=held)
    assert design.gain == pytest.approx(design.lower_bound, rel=1e-9)
    assert (design.input_gain > 0).all()
    if held == "mean":
        assert float(design.input_gain.mean()) == pytest.approx(0.7)
    else:
        assert float(design.response.mean()) == pytest.approx(
            float(design.constant_response.mean())
        )
    assert design.gain <= design.constant_gain * (1 + 1e-12)
    torch.testing.assert_close(design.response, time_operator(decay, T) @ design.input_gain)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize(("objective", "held"), CASES)
def test_no_other_gains_are_lower(objective, held, decay):
    T, measure = 8, {"l2": l2_gain, "peak": peak_gain}[objective]
    design = optimal_input_gain(decay, T, objective=objective, held=held)
    c = time_operator(decay, T).sum(0) if held == "response" else torch.ones(T, dtype=torch.float64)
    noise = torch.randn(200, T, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise -= (noise @ c)[:, None] * c / c.square().sum()
    for size in (1e-4, 1e-2, 0.3):
        others = measure(decay, T, design.input_gain + size * noise)
        assert (others >= design.gain * (1 - 1e-10)).all()
        assert others.mean() > design.gain * (1 + 1e-9)


def test_what_the_best_gains_save_and_cost_at_the_decay_and_steps_of_the_paper():
    design = optimal_input_gain(0.99, 8)
    mean_response = design.response.mean() / design.constant_response.mean()
    assert round(float(mean_response), 3) == 0.706
    assert design.gain / mean_response > design.constant_gain
    held = optimal_input_gain(0.99, 8, held="response")
    assert round(held.gain, 3) == 5.139
    peak = optimal_input_gain(0.99, 8, objective="peak")
    assert (round(peak.gain, 3), round(peak.constant_gain, 3)) == (2.729, 2.732)


def test_wrong_use_of_the_design():
    for options, message in (
        ({"mean": 0.0}, "mean must be > 0"),
        ({"objective": "l1"}, "objective must be 'l2' or 'peak', got 'l1'"),
        ({"held": "final"}, "held must be"),
        ({"objective": "peak", "held": "response"}, "for the peak hold the mean"),
        ({"decay": 1.5}, "decay must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            optimal_input_gain(**{"decay": 0.5, "T": 4} | options)


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
    expected = sum(
        float(l2_gain(node.decay, node.T, node.input_gain)) ** 2
        / (float(node.input_gain.detach().abs().mean()) ** 2 if normalized else 1)
        for node in (net[1], net[3])
    )
    options = {"normalized": True} if normalized else {}
    assert gain_penalty(net, **options).item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("normalized", [False, True])
def test_gradient_of_the_penalty(net, normalized):
    net.double()
    gains = net[1].input_gain, net[3].input_gain  # which gradcheck moves in place
    assert torch.autograd.gradcheck(lambda *gains: gain_penalty(net, normalized=normalized), gains)


@pytest.mark.parametrize("normalized", [False, True])
def test_gains_of_zero_have_a_gradient_of_zero_and_those_that_are_not_finite_make_the_loss_nan(
    net, normalized
):
    gains = net[1].input_gain
    gains.data.zero_()
    gain_penalty(net, normalized=normalized).backward()
    assert gains.grad.tolist() == [0.0] * 5
    assert torch.isfinite(net[3].input_gain.grad).all()
    for value in (torch.nan, torch.inf):
        gains.data[2] = value
        assert gain_penalty(net, normalized=normalized).isnan()


def test_scalars_for_the_log(net):
    scalars = gain_scalars(net)
    assert list(scalars) == ["l2_gain/1", "peak_gain/1", "l2_gain/3", "peak_gain/3"]
    p = net[3].input_gain
    assert scalars["l2_gain/3"] == pytest.approx(float(l2_gain(0.98, 3, p)), rel=1e-9)
    assert scalars["peak_gain/3"] == pytest.approx(float(peak_gain(0.98, 3, p)), rel=1e-9)
    assert gain_scalars(net, T=6)["l2_gain/5"] == pytest.approx(
        float(l2_gain(0.5, 6)) / 2, rel=1e-9
    )


def test_a_network_without_learnable_gains():
    with pytest.raises(
        ValueError,
        match="needs a network with DLIF neurons, Sequential has none; .* replace_neurons",
    ):
        gain_penalty(nn.Sequential(neuron.IFNode()))


@pytest.mark.parametrize("normalized", [False, True])
def test_the_training_objective_adds_the_weighted_penalty(normalized):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(2), nn.Linear(9, 12), DLIFNode(T=4, tau=10.0), nn.Linear(12, 3))
    nn.init.uniform_(net[2].input_gain, 0.5, 1.5)
    x, y = torch.rand(6, 1, 3, 3), torch.arange(6) % 3
    losses, gradients = [], []
    for weight in (0.0, 0.05):
        penalties = [StabilityGain(weight, normalized=normalized)]
        objective = Objective(SpikingClassifier(net, T=4), rho=0.5, penalties=penalties).train()
        losses.append(objective(x, y, x + 0.1))
        gradients.append(torch.autograd.grad(losses[-1].total, net[2].input_gain)[0])
        assert ("stability_gain" in objective.penalty_values) == (weight > 0)
    value = gain_penalty(net, normalized=normalized)
    torch.testing.assert_close(losses[1].penalty, 0.05 * value.float())
    (of_value,) = torch.autograd.grad(value, net[2].input_gain)
    torch.testing.assert_close(gradients[1] - gradients[0], 0.05 * of_value)
