"""What the penalties watch and refuse; their formulas are checked in test_training_step."""

import copy
import itertools
from dataclasses import dataclass

import pytest
import torch
from defences.neurons_by_hand import normals
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.testing import assert_close
from training.step_by_hand import T, potentials, retracted

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.defences import (
    HomeostaticNode,
    NoisyLIFNode,
    OrthogonalEncoder,
    StochasticGate,
    SurrogateOverlap,
)
from sj_robust.neuron import fuse
from sj_robust.training import (
    ForwardPasses,
    GradientSparsity,
    Objective,
    ThresholdGuarding,
    WeightMagnitude,
    retract_,
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


NOISE = torch.Generator()
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
    "noisy": Guarded(
        node=NoisyLIFNode(4.0, noise_std=0.4, generator=NOISE),
        decay=0.75,
        gain=[1.0] * T,
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


def guarding(h_seq):
    distance = (h_seq - 1).abs()
    return (0.7 - distance).clamp(min=0).mean()


def overlap(h, half_width):
    """Share of a normal distribution, channel by channel, that is near the threshold."""
    shares = []
    for channel in range(h.shape[1]):
        z = h[:, channel].flatten() - 1
        sigma = ((z - z.mean()).square().mean() + 1e-6).sqrt()
        upper, lower = (sign * half_width - z.mean() for sign in (1, -1))
        normal = [(1 + torch.erf(end / sigma / 2**0.5)) / 2 for end in (upper, lower)]
        shares.append(normal[0] - normal[1])
    return torch.stack(shares)


WATCHED = {
    "guarding": (ThresholdGuarding(1.0, margin=0.7), guarding),
    "overlap": (
        SurrogateOverlap(1.0, half_width=0.4),
        lambda h_seq: torch.stack([overlap(h, 0.4) for h in h_seq]).mean(),
    ),
}


@pytest.mark.parametrize("penalty", WATCHED)
@pytest.mark.parametrize("step_mode", ["m", "s"])
@pytest.mark.parametrize("kind", GUARDED)
def test_a_penalty_is_that_of_the_potentials_by_hand(problem, kind, step_mode, penalty):
    x, y = problem
    case = GUARDED[kind]
    classifier = classifier_of(case.node, step_mode=step_mode)
    penalty, by_hand = WATCHED[penalty]
    linear = classifier.net[0]
    currents = x @ linear.weight.T + linear.bias
    noise = [0.0] * T
    if kind == "noisy":
        NOISE.manual_seed(2)
        noise = [0.4 * normals((5, 6), NOISE) for _ in range(T)]
        NOISE.manual_seed(2)
    with penalty.observe(classifier):
        logits = classifier(x)
    value = penalty.value(clean_pass(classifier, x, y, logits))
    h, _ = potentials(
        currents.expand(T, -1, -1),
        decay=case.decay,
        gain=case.gain,
        v_reset=case.v_reset,
        detach=case.detach,
        noise=noise,
    )
    expected = by_hand(h)
    assert 0.01 < expected < 0.95
    assert_close(value, expected)
    (grad,) = torch.autograd.grad(value, linear.weight)
    (wanted,) = torch.autograd.grad(expected, linear.weight)
    assert wanted.abs().max() > 1e-3
    assert_close(grad, wanted)


def test_overlap_is_of_channels_and_finite_where_all_is_the_same():
    z = torch.rand(5, 3, 2, 2, dtype=torch.float64)
    assert_close(SurrogateOverlap(1.0).cost(z - 1, None), overlap(z, 1.0))
    alike = torch.zeros(4, 2, 3, requires_grad=True)
    cost = SurrogateOverlap(1.0).cost(alike, None)
    assert_close(cost.detach(), torch.ones(2))
    (grad,) = torch.autograd.grad(cost.sum(), alike)
    assert bool(grad.isfinite().all())


def test_a_rising_weight_follows_half_a_cosine_and_reaches_the_objective(problem):
    x, y = problem
    penalty = ThresholdGuarding(2.0, rising=True)
    objective = Objective(classifier_of(lif()), rho=0.0, penalties=[penalty])
    for progress, weight in ((0.0, 0.0), (1 / 3, 0.5), (0.5, 1.0), (1.0, 2.0)):
        penalty.progress = progress
        losses = objective(x, y)
        value = objective.penalty_values["threshold_guarding"]
        assert value > 0.01
        assert_close(losses.penalty, weight * value)
    assert ThresholdGuarding(2.0).present_weight == 2.0


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


def test_magnitude_is_that_of_convolutions_and_linear_layers_alone():
    node, gate = HomeostaticNode(T, step_mode="m"), StochasticGate()
    net = nn.Sequential(layer.Conv2d(1, 2, 3), node, layer.Flatten(), layer.Linear(8, 4), gate)
    net.append(net[3])  # a second time
    functional.set_step_mode(net, "m")
    encoder = OrthogonalEncoder((1, 4, 4), T)
    encoder.skew.data.fill_(0.1)
    x = torch.rand(2, 1, 4, 4)
    net[:3](x.expand(T, *x.shape))  # gives the node its shape
    passes = clean_pass(SpikingClassifier(net, T, encoder), x, torch.tensor([0, 1]), None)
    expected = net[0].weight.abs().sum() + net[3].weight.abs().sum()
    assert node.rate.ndim > 1
    assert_close(WeightMagnitude(1.0).value(passes), expected)


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


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "module",
    [nn.Conv1d(4, 5, 3), nn.Conv3d(1, 4, 2), nn.Conv2d(4, 4, 3, groups=4), nn.Linear(9, 6)],
)
def test_singular_values_move_towards_1_and_vectors_stay(module):
    """How far they move is in test_training_step."""
    torch.manual_seed(0)
    module = module.double()
    bias = module.bias.clone()
    matrix = module.weight.data.flatten(1)  # in the memory of the weight
    u, before, v = torch.linalg.svd(matrix, full_matrices=False)
    retract_(module, 0.01)
    assert_close(matrix, u @ torch.diag(1.01 * before - 0.01 * before**3) @ v)
    for _ in range(2000):
        retract_(module, 0.01)
    assert_close(torch.linalg.svdvals(matrix), torch.ones_like(before))
    assert torch.equal(module.bias, bias)


@pytest.mark.parametrize(("rows", "moved"), [(199, 199), (200, 60), (333, 99)])
def test_a_random_share_of_the_rows_of_wide_linear_layers(rows, moved):
    torch.manual_seed(0)
    linear = nn.Linear(7, rows).double()
    before = linear.weight.detach().clone()
    retract_(linear, 0.1, generator(1))
    changed = (linear.weight != before).any(1)
    assert changed.sum() == moved
    expected = retracted(before, 0.1, rows=changed.nonzero().flatten())
    assert_close(linear.weight.detach(), expected)


def with_generator(generator, *, frozen=False):
    """Weights of two layers before and after a retraction."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 240), nn.Linear(240, 210))
    net[0].weight.requires_grad_(not frozen)
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    retract_(net, 0.1, generator)
    assert torch.equal(torch.get_rng_state(), state)
    moved = [(net[i].weight != before[f"{i}.weight"]).any(1) for i in (0, 1)]
    return moved, net


def test_rows_follow_the_generator_alone():
    (first, second), _ = with_generator(generator(3))
    (again, second_again), _ = with_generator(generator(3))
    assert torch.equal(again, first)
    assert torch.equal(second_again, second)
    assert not torch.equal(first[:210], second)  # every layer draws its own
    assert not torch.equal(with_generator(generator(4))[0][0], first)
    assert not torch.equal(with_generator(None)[0][0], with_generator(None)[0][0])
    (frozen, beside), _ = with_generator(generator(3), frozen=True)
    assert not frozen.any()
    assert torch.equal(beside, second)


def test_everything_else_is_left_alone():
    torch.manual_seed(0)
    kinds = (nn.Conv2d(1, 256, 2), nn.BatchNorm2d(3), nn.Embedding(4, 4), nn.Flatten())
    net = nn.ModuleList(kinds)
    net[0].weight.square().sum().backward()
    grad = net[0].weight.grad.clone()
    before = copy.deepcopy(net.state_dict())
    retract_(net, 0.1, generator())
    state = net.state_dict()
    assert [name for name in state if not torch.equal(state[name], before[name])] == ["0.weight"]
    assert (state["0.weight"] != before["0.weight"]).flatten(1).any(1).all()  # never sampled
    assert net[0].weight.grad_fn is None
    assert torch.equal(net[0].weight.grad, grad)


def test_mixing_coefficients_are_projected_to_the_nearest_point_of_the_simplex():
    """Against every point of a fine grid: a nearer one would make an angle of more than 90 degrees
    with the way to the projection.
    """
    net = nn.Module()
    for size in (1, 2, 3):
        grid = itertools.product(range(31), repeat=size)
        points = torch.tensor([point for point in grid if sum(point) == 30]).double() / 30
        for seed in range(20):
            c = 2 * torch.randn(size, generator=generator(seed)).double()
            net.mixing = nn.Parameter(c.clone())
            retract_(net, 0.0)
            nearest = net.mixing.detach()
            assert nearest.min() >= 0
            assert abs(nearest.sum() - 1) < 1e-12
            assert ((points - nearest) @ (c - nearest)).max() <= 1e-12
