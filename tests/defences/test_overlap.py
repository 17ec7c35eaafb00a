"""MPD-SGR and threshold guarding on networks of the defences, against potentials by hand."""

import math

import pytest
import torch
from defences.neurons_by_hand import Rules, T, normals, numbers, spike_of
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.testing import assert_close

from sj_robust import DLIFNode, MPPDMonitor, SpikingClassifier
from sj_robust.defences import NoisyLIFNode, SurrogateOverlap
from sj_robust.training import ForwardPasses, Objective, ThresholdGuarding

TAU = 4.0
TRIANGLE = surrogate.PiecewiseQuadratic(alpha=1.0)


def normal(z):
    """The normal distribution function."""
    return 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def classifier_of(node, *, convolution):
    torch.manual_seed(0)
    flat = layer.Flatten()
    if convolution:
        first = layer.Conv2d(1, 3, 3)
        last = layer.Linear(12, 4)
        net = nn.Sequential(first, node, flat, last)
    else:
        first = layer.Linear(16, 6)
        last = layer.Linear(6, 4)
        net = nn.Sequential(flat, first, node, last)
    functional.set_step_mode(net.double(), "m")
    first.weight.data.mul_(4)
    return SpikingClassifier(net, T), first


def problem():
    return numbers(5, 1, 4, 4)


def charged(current):
    """Potentials before the reset under a constant current."""
    rules = Rules()
    v = torch.zeros_like(current)
    h_seq = []
    for _ in range(T):
        h = (1 - 1 / TAU) * v + current
        s = spike_of(h - 1.0)
        v = rules.after(h, s, 1.0)
        h_seq.append(h)
    return torch.stack(h_seq)


def value_of(penalty, classifier, x):
    y = torch.zeros(len(x), dtype=torch.int64)
    with penalty.observe(classifier):
        logits = classifier(x)
    return penalty.value(ForwardPasses(classifier, y, x, None, logits, None))


@pytest.mark.parametrize("convolution", [True, False])
@pytest.mark.parametrize("half_width", [1.0, 0.4])
def test_the_overlap_is_that_of_a_normal_distribution_per_channel_and_step(convolution, half_width):
    node = neuron.LIFNode(tau=TAU, decay_input=False, surrogate_function=TRIANGLE)
    classifier, first = classifier_of(node, convolution=convolution)
    x = problem()
    value = value_of(SurrogateOverlap(1.0, half_width=half_width), classifier, x)
    if convolution:
        current = nn.functional.conv2d(x, first.weight, first.bias)
    else:
        current = x.flatten(1) @ first.weight.T + first.bias
    shares = []
    for h in charged(current):
        for channel in range(h.shape[1]):
            z = h[:, channel].flatten() - 1.0
            mu = z.mean()
            squares = (z - mu) ** 2
            variance = squares.mean() + 1e-6
            sigma = variance.sqrt()
            upper = normal((mu + half_width) / sigma)
            shares.append(upper - normal((mu - half_width) / sigma))
    wanted = torch.stack(shares).mean()
    assert 0.05 < wanted < 0.95
    assert_close(value, wanted)
    (grad,) = torch.autograd.grad(value, first.weight)
    (wanted_grad,) = torch.autograd.grad(wanted, first.weight)
    assert wanted_grad.abs().max() > 1e-3
    assert_close(grad, wanted_grad)


def test_a_channel_that_is_always_the_same_has_a_finite_gradient():
    z = torch.zeros(4, 2, 3, dtype=torch.float64, requires_grad=True)
    cost = SurrogateOverlap(1.0).cost(z, None)
    assert_close(cost.detach(), torch.ones_like(cost))
    (grad,) = torch.autograd.grad(cost.sum(), z)
    assert bool(grad.isfinite().all())


def test_guarding_knows_the_potential_of_noisy_neurons_without_the_noise():
    noise = torch.Generator().manual_seed(2)
    node = NoisyLIFNode(TAU, noise_std=0.4, generator=noise)
    classifier, first = classifier_of(node, convolution=True)
    x = problem()
    classifier(x)
    noise.manual_seed(2)
    value = value_of(ThresholdGuarding(1.0, margin=0.7), classifier, x)
    current = nn.functional.conv2d(x, first.weight, first.bias)
    noise.manual_seed(2)
    v = torch.zeros_like(current)
    costs = []
    for _ in range(T):
        h = (1 - 1 / TAU) * v + current
        z = h - 1.0
        drawn = 0.4 * normals(current.shape, noise)
        s = spike_of(z + drawn)
        v = Rules().after(h, s, 1.0)
        cost = (0.7 - z.abs()).clamp(min=0)
        costs.append(cost)
    wanted = torch.stack(costs).mean()
    assert wanted > 0.05
    assert_close(value, wanted)
    (grad,) = torch.autograd.grad(value, first.weight)
    (wanted_grad,) = torch.autograd.grad(wanted, first.weight)
    assert_close(grad, wanted_grad)


def test_the_monitor_follows_noisy_neurons():
    classifier, _ = classifier_of(NoisyLIFNode(TAU), convolution=True)
    x = problem()
    classifier(x)
    with MPPDMonitor(classifier.net) as monitor:
        stats = monitor.compare(x, x + 0.1, forward=classifier)
    assert stats["1"].ms_mppd.mean() > 0


def test_a_rising_weight_follows_half_a_cosine_and_reaches_the_objective():
    linear = layer.Linear(16, 4)
    net = nn.Sequential(layer.Flatten(), linear, DLIFNode(T=T))
    functional.set_step_mode(net, "m")
    penalty = ThresholdGuarding(2.0, rising=True)
    objective = Objective(SpikingClassifier(net, T), rho=0.0, penalties=[penalty])
    x, y = torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 2])
    for progress, weight in ((0.0, 0.0), (1 / 3, 0.5), (0.5, 1.0), (1.0, 2.0)):
        penalty.progress = progress
        losses = objective(x, y)
        value = objective.penalty_values["threshold_guarding"]
        assert value > 0.01
        assert_close(losses.penalty, weight * value)
    assert ThresholdGuarding(2.0).present_weight == 2.0
