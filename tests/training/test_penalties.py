"""What the penalties watch and refuse; their formulas are checked in test_training_step."""

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from training.step_by_hand import T, potentials

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.neuron import fuse
from sj_robust.training import (
    ForwardPasses,
    GradientSparsity,
    Objective,
    Penalty,
    ThresholdGuarding,
)

TRIANGLE = surrogate.PiecewiseQuadratic(alpha=1.0)


def classifier_of(*nodes, step_mode="m"):
    """One hidden layer per neuron, 6 features in and 4 classes out, in float64."""
    torch.manual_seed(0)
    layers = [part for node in nodes for part in (layer.Linear(6, 6), node)]
    net = nn.Sequential(*layers, layer.Linear(6, 4)).double()
    functional.set_step_mode(net, step_mode)
    for part in net:
        if isinstance(part, nn.Linear):
            part.weight.data.mul_(4)
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
    return torch.rand(5, 6, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])


@pytest.mark.parametrize("step_mode", ["m", "s"])
@pytest.mark.parametrize(
    ("node", "dynamics"),
    [
        (
            lif(tau=4.0, decay_input=False, v_reset=None),
            {"decay": 0.75, "gain": [1.0] * T, "v_reset": None},
        ),
        (lif(tau=4.0, v_reset=0.4), {"decay": 0.75, "gain": [0.25] * T, "v_reset": 0.4}),
        (lif(tau=2.0, detach_reset=True), {"decay": 0.5, "gain": [0.5] * T, "detach": True}),
        (neuron.IFNode(surrogate_function=TRIANGLE), {"decay": 1.0, "gain": [1.0] * T}),
        (
            dlif([0.5, 1.5, 1.0], tau=4.0, v_reset=None),
            {"decay": 0.75, "gain": [0.5, 1.5, 1.0], "v_reset": None},
        ),
    ],
)
def test_guarding_equals_the_potentials_by_hand_in_both_step_modes(
    problem, node, dynamics, step_mode
):
    x, y = problem
    classifier = classifier_of(node, step_mode=step_mode)
    penalty = ThresholdGuarding(1.0, margin=0.7)
    with penalty.observe(classifier):
        logits = classifier(x)
    value = penalty.value(ForwardPasses(classifier, y, x, None, logits, None))
    weight = classifier.net[0].weight
    currents = (x @ weight.T + classifier.net[0].bias).expand(T, -1, -1)
    h, _ = potentials(currents, **dynamics)
    expected = (0.7 - (h - 1).abs()).clamp(min=0).mean()
    assert expected > 0.01
    torch.testing.assert_close(value, expected)
    for got, wanted in zip(
        *(torch.autograd.grad(v, weight) for v in (value, expected)), strict=True
    ):
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(got, wanted)


def test_guarding_does_not_change_the_network_and_leaves_no_hook(problem):
    x, _ = problem
    classifier = classifier_of(lif(), lif())
    before = classifier(x)
    penalty = ThresholdGuarding(1.0)
    with penalty.observe(classifier):
        assert torch.equal(classifier(x), before)
    with pytest.raises(ZeroDivisionError), penalty.observe(classifier):
        raise ZeroDivisionError
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in classifier.modules())


def test_guarding_sees_neurons_that_run_fused_with_batch_norm_otherwise(problem):
    def penalty_and_gradient(fused):
        torch.manual_seed(0)
        parts = [
            layer.Conv2d(1, 3, 3),
            layer.BatchNorm2d(3),
            DLIFNode(T=T),
            layer.Flatten(),
            layer.Linear(12, 4),
        ]
        net = nn.Sequential(*parts)
        if fused:
            fuse(net)
        functional.set_step_mode(net, "m")
        objective = Objective(
            SpikingClassifier(net, T), penalties=[ThresholdGuarding(1.0)], rho=0.0
        )
        x = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(1))
        losses = objective(x, torch.tensor([0, 1, 2, 3]))
        losses.total.backward()
        return losses.penalty, net[0].weight.grad

    for fused, plain in zip(penalty_and_gradient(True), penalty_and_gradient(False), strict=True):
        assert plain.abs().max() > 1e-3
        torch.testing.assert_close(fused, plain)


def test_guarding_refuses_what_it_cannot_see(problem):
    x, y = problem
    classifier = classifier_of(lif(), neuron.QIFNode())
    with (
        pytest.raises(ValueError, match="'3' cannot be guarded: the decay of QIFNode"),
        ThresholdGuarding(1.0).observe(classifier),
    ):
        pass
    with pytest.raises(
        ValueError, match="'9' cannot be guarded: no spiking layer has that name; known are 1"
    ):
        ThresholdGuarding(1.0, layers=["9"]).observe(classifier).__enter__()
    penalty = ThresholdGuarding(1.0, layers=["1"])
    with penalty.observe(classifier):
        pass
    with pytest.raises(RuntimeError, match="saw no spiking layer run"):
        penalty.value(ForwardPasses(classifier, y, x, None, classifier(x), None))


def test_sparsity_tends_to_the_l1_norm_of_the_gradient():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    x = torch.rand(3, 6, dtype=torch.float64).requires_grad_()
    y = torch.tensor([3, 0, 2])
    logits = net(x)
    wrong = logits.masked_fill(nn.functional.one_hot(y, 4).bool(), -torch.inf)
    pairs = torch.stack((logits[torch.arange(3), y], wrong.max(1).values), 1)
    (grad,) = torch.autograd.grad(pairs.softmax(1)[:, 0].sum(), x, retain_graph=True)
    passes = ForwardPasses(net, y, x, None, logits, None)
    for h, close in ((1e-2, 1e-2), (1e-5, 1e-4)):
        value = GradientSparsity(1.0, h=h).value(passes)
        torch.testing.assert_close(
            value.detach(), grad.abs().flatten(1).sum(1).mean(), rtol=close, atol=0
        )
    squared = GradientSparsity(1.0, h=1e-5, squared=True).value(passes)
    torch.testing.assert_close(
        squared.detach(), grad.abs().flatten(1).sum(1).square().mean(), rtol=1e-4, atol=0
    )


class Empty(Penalty):
    name = "empty"


def test_wrong_use(problem):
    x, y = problem
    objective = Objective(classifier_of(lif()), penalties=[GradientSparsity(1.0)])
    with torch.no_grad(), pytest.raises(RuntimeError, match="needs the gradient at the images"):
        objective(x, y)
    with pytest.raises(TypeError, match="abstract"):
        Empty(1.0)
    for make, message in (
        (lambda: GradientSparsity(-1.0), "weight must be >= 0 and finite, got -1"),
        (lambda: GradientSparsity(1.0, h=0.0), "h must be > 0"),
        (lambda: ThresholdGuarding(float("nan")), "weight"),
        (lambda: ThresholdGuarding(1.0, margin=0.0), "margin must be > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
