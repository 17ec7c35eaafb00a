"""What the penalties watch and refuse; their formulas are checked in test_training_step."""

from dataclasses import dataclass

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.testing import assert_close
from training.step_by_hand import T, potentials

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.defences import (
    HomeostaticNode,
    NoisyLIFNode,
    OrthogonalEncoder,
    StochasticGate,
)
from sj_robust.neuron import fuse
from sj_robust.training import (
    ForwardPasses,
    GradientSparsity,
    Objective,
    ThresholdGuarding,
    WeightMagnitude,
)

TRIANGLE = surrogate.PiecewiseQuadratic(alpha=1.0)


def classifier_of(*nodes, step_mode="m"):
    """One hidden layer per neuron, 6 features in and 4 classes out, in float64."""
    torch.manual_seed(0)
    net = nn.Sequential()
    for node in nodes:
        net.extend([layer.Linear(6, 6), node])
    net.append(layer.Linear(6, 4))
    for linear in net[::2]:
        linear.weight.data.mul_(4)
    functional.set_step_mode(net.double(), step_mode)
    return SpikingClassifier(net, T)


def lif(**options):
    return neuron.LIFNode(surrogate_function=TRIANGLE, **options)


def dlif(gains, **options):
    node = DLIFNode(T=T, **options)
    node.input_gain.data = torch.tensor(gains)
    return node


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(5, 6, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0, 1, 2, 3, 0])


def clean_pass(classifier, x, y, logits):
    """What penalties are told of a step without perturbed images."""
    return ForwardPasses(
        classifier=classifier,
        y=y,
        x=x,
        x_perturbed=None,
        logits=logits,
        logits_perturbed=None,
    )


@dataclass(frozen=True)
class Guarded:
    """A neuron, and its dynamics written out by hand."""

    node: nn.Module
    decay: float
    gain: list[float]
    v_reset: float | None = 0.0
    detach: bool = False


GUARDED = {
    "LIF soft": Guarded(
        node=lif(tau=4.0, decay_input=False, v_reset=None),
        decay=0.75,
        gain=[1.0] * T,
        v_reset=None,
    ),
    "LIF reset 0.4": Guarded(
        node=lif(tau=4.0, v_reset=0.4),
        decay=0.75,
        gain=[0.25] * T,
        v_reset=0.4,
    ),
    "LIF detached": Guarded(
        node=lif(tau=2.0, detach_reset=True),
        decay=0.5,
        gain=[0.5] * T,
        detach=True,
    ),
    "IF": Guarded(
        node=neuron.IFNode(surrogate_function=TRIANGLE),
        decay=1.0,
        gain=[1.0] * T,
    ),
    "DLIF soft": Guarded(
        node=dlif([0.5, 1.5, 1.0], tau=4.0, v_reset=None),
        decay=0.75,
        gain=[0.5, 1.5, 1.0],
        v_reset=None,
    ),
}


@pytest.mark.parametrize("step_mode", ["m", "s"])
@pytest.mark.parametrize("kind", GUARDED)
def test_guarding_equals_the_potentials_by_hand_in_both_step_modes(problem, kind, step_mode):
    x, y = problem
    case = GUARDED[kind]
    classifier = classifier_of(case.node, step_mode=step_mode)
    penalty = ThresholdGuarding(1.0, margin=0.7)
    with penalty.observe(classifier):
        logits = classifier(x)
    value = penalty.value(clean_pass(classifier, x, y, logits))
    linear = classifier.net[0]
    currents = x @ linear.weight.T + linear.bias
    h, _ = potentials(
        currents.expand(T, -1, -1),
        decay=case.decay,
        gain=case.gain,
        v_reset=case.v_reset,
        detach=case.detach,
    )
    distance = (h - 1).abs()
    expected = (0.7 - distance).clamp(min=0).mean()
    assert expected > 0.01
    assert_close(value, expected)
    (grad,) = torch.autograd.grad(value, linear.weight)
    (wanted,) = torch.autograd.grad(expected, linear.weight)
    assert wanted.abs().max() > 1e-3
    assert_close(grad, wanted)


def test_guarding_does_not_change_the_network_and_leaves_no_hook(problem):
    x, _ = problem
    classifier = classifier_of(lif(), lif())
    before = classifier(x)
    penalty = ThresholdGuarding(1.0)
    with penalty.observe(classifier):
        assert torch.equal(classifier(x), before)
    for module in classifier.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def penalised_step(*, fused):
    """Penalty and gradient of a network with batch norm before its neuron."""
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(1, 3, 3),
        layer.BatchNorm2d(3),
        DLIFNode(T=T),
        layer.Flatten(),
        layer.Linear(12, 4),
    )
    if fused:
        fuse(net)
    functional.set_step_mode(net, "m")
    classifier = SpikingClassifier(net, T)
    objective = Objective(classifier, penalties=[ThresholdGuarding(1.0)], rho=0.0)
    losses = objective(torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 3]))
    losses.total.backward()
    return losses.penalty, net[0].weight.grad


def test_guarding_sees_neurons_that_run_fused_with_batch_norm_otherwise():
    penalty, grad = penalised_step(fused=True)
    expected, expected_grad = penalised_step(fused=False)
    assert expected > 1e-3
    assert expected_grad.abs().max() > 1e-3
    assert_close(penalty, expected)
    assert_close(grad, expected_grad)


def test_sparsity_tends_to_the_l1_norm_of_the_gradient():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 8),
        nn.Tanh(),
        nn.Linear(8, 4),
    ).double()
    x = torch.rand(3, 6, dtype=torch.float64).requires_grad_()
    y = torch.tensor([3, 0, 2])
    logits = net(x)
    right = logits[torch.arange(3), y]
    is_right = nn.functional.one_hot(y, 4).bool()
    wrong = logits.masked_fill(is_right, -torch.inf).max(1).values
    probability = torch.sigmoid(right - wrong)
    (grad,) = torch.autograd.grad(probability.sum(), x, retain_graph=True)
    l1 = grad.abs().sum(1)
    passes = clean_pass(net, x, y, logits)
    coarse = GradientSparsity(1.0, h=1e-2).value(passes)
    assert_close(coarse.detach(), l1.mean(), rtol=1e-2, atol=0)
    fine = GradientSparsity(1.0, h=1e-5).value(passes)
    assert_close(fine.detach(), l1.mean(), rtol=1e-4, atol=0)
    squared = GradientSparsity(1.0, h=1e-5, squared=True).value(passes)
    expected = l1.square().mean()
    assert_close(squared.detach(), expected, rtol=1e-4, atol=0)


def test_magnitude_is_that_of_convolutions_and_linear_layers_alone():
    node, gate = HomeostaticNode(T, step_mode="m"), StochasticGate()
    net = nn.Sequential(layer.Conv2d(1, 2, 3), node, layer.Flatten(), layer.Linear(8, 4), gate)
    functional.set_step_mode(net, "m")
    encoder = OrthogonalEncoder((1, 4, 4), T)
    encoder.skew.data.fill_(0.1)
    model = SpikingClassifier(net, T, encoder)
    x = torch.rand(2, 1, 4, 4)
    passes = clean_pass(model, x, torch.tensor([0, 1]), model(x))
    expected = net[0].weight.abs().sum() + net[3].weight.abs().sum()
    assert node.rate.ndim > 1
    assert_close(WeightMagnitude(1.0).value(passes), expected)
    shared = nn.Sequential(net[3], net[3])
    passes = clean_pass(shared, x, torch.tensor([0, 1]), torch.rand(2, 4))
    assert_close(WeightMagnitude(1.0).value(passes), net[3].weight.abs().sum())


def test_random_layers_draw_the_same_in_the_passes_that_are_compared():
    """Otherwise the noise divided by a small h would be the penalty."""
    torch.manual_seed(0)
    net = nn.Sequential(layer.Flatten(), layer.Linear(16, 12), NoisyLIFNode(2.0))
    net.append(layer.Linear(12, 3))
    net[1].weight.data.mul_(3)
    functional.set_step_mode(net.double(), "m")
    model = SpikingClassifier(net, T)
    x, y = torch.rand(4, 1, 4, 4).double(), torch.tensor([0, 1, 2, 0])
    objective = Objective(model, kappa=0.5, penalties=[GradientSparsity(1.0, h=1e-9)])
    objective.train()
    for seed in range(5):
        torch.manual_seed(seed)
        assert objective(x, y, x.clone()).mppd == 0
        assert objective.penalty_values["gradient_sparsity"] < 10
    assert objective(x, y, (x + 0.3).clamp(max=1)).mppd > 0
