"""Every estimator's gradient against the hand computation."""

from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from covering import each_in_turn
from estimators.by_hand import (
    CLASSES,
    FEATURES,
    KINDS,
    Layer,
    T,
    gradient,
    gradient_by_hand,
    gradient_of,
    inputs,
    make_neuron,
    network,
    pdsg_slopes,
)
from numpy.testing import assert_allclose
from torch.testing import assert_close

from sj_robust import SpikingClassifier
from sj_robust.core.host import functional, surrogate
from sj_robust.estimators import estimator, memory
from sj_robust.estimators.shapes import SHAPES, KeepingValues

LIF = Layer("LIF")
NAMES = (
    "training",
    "triangle:0.5",
    "triangle:2",
    "atan:4",
    "sigmoid:4",
    "rectangle:1",
    "rectangle:0.3",
    "exponential:2",
    "straight_through",
    "bptr",
    "rga",
    "pdsg",
    "assg",
    "assg:triangle",
    "assg:sigmoid",
    "assg:gaussian",
    "assg:rectangle",
    "hart:1.2",
    "hart_mixed:1.2",
)
DETACHED = (
    "training",
    "atan:4",
    "triangle:0.5",
    "rectangle:1",
    "straight_through",
    "pdsg",
    "assg",
    "hart_mixed:1.2",
)


@dataclass(frozen=True)
class Case:
    name: str
    layer: Layer

    def __str__(self):
        levels = f"{self.layer.v_reset}-{self.layer.v_threshold}"
        return f"{self.name}-{self.layer.kind}-{levels}"


OTHER_LAYERS = (
    Layer("LIF", v_reset=None, v_threshold=0.8),
    Layer("LIF", v_reset=-0.2, v_threshold=0.9),
    Layer("LIF", v_reset=0.3, v_threshold=1.2),
)
OTHER_DLIF_LAYERS = (
    Layer("DLIF", v_reset=0.3, v_threshold=1.2),
    Layer("DLIF", v_reset=None, v_threshold=0.8),
    Layer("DLIF", v_reset=-0.2, v_threshold=0.9),
)
LAYERS = [Layer(kind) for kind in KINDS]
# RGA is stated for a reset to 0; test_rga_counts_from_the_reset_potential has the others.
OF_OTHER_LAYERS = [name for name in NAMES if name != "rga"]
OF_OTHER_LAYERS += [f"{name}+detach" for name in DETACHED]
CASES = [Case(name, layer) for name, layer in product(NAMES, LAYERS)]
for layers in (OTHER_LAYERS, OTHER_DLIF_LAYERS):
    CASES += [Case(name, layer) for name, layer in each_in_turn(OF_OTHER_LAYERS, layers)]
    CASES += [Case("rga", layer) for layer in layers if layer.v_reset is None]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_equals_hand_computation(case):
    layer = case.layer
    net = network(layer.kind, v_reset=layer.v_reset, v_threshold=layer.v_threshold)
    x, weights = inputs()
    with estimator(case.name)(net) as crafting:
        grad = gradient(crafting, x, weights)
    expected = gradient_by_hand(case.name, net, x, weights, layer)
    assert_allclose(grad, expected, rtol=1e-6, atol=1e-9)
    if layer.v_reset == 0.0:
        assert np.abs(expected).max() > 1e-3
        if case.name != "training":
            own = gradient(net, x, weights)
            assert np.abs(grad - own).max() > 1e-3


def test_rga_counts_from_the_reset_potential():
    """Shifting potential, threshold and reset by the same amount changes no spike and no
    gradient.
    """
    x, weights = inputs()
    net = network("LIF", v_reset=0.0, v_threshold=0.8)
    shifted = network("LIF", v_reset=0.25, v_threshold=1.05)
    with estimator("rga")(net), estimator("rga")(shifted):
        grad = gradient(net, x, weights)
        assert_allclose(grad, gradient(shifted, x, weights), atol=1e-12)


STEPWISE = ("triangle:0.5", "rectangle:1", "straight_through+detach", "pdsg", "assg")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STEPWISE)
def test_step_by_step_equals_the_sequence_at_once(name, kind):
    x, weights = inputs()
    net = network(kind)
    stepped = network(kind, step_mode="s")
    with estimator(name)(net), estimator(name)(stepped):
        for _ in range(3):  # of an attack, for the memory of ASSG
            at_once = gradient(net, x, weights)
            by_steps = gradient(stepped, x, weights, step_mode="s")
        assert_allclose(by_steps, at_once, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["rectangle:1", "pdsg", "assg:sigmoid"])
def test_chunks_equal_the_whole_sequence(name):
    x, weights = inputs()
    net = network("DLIF")
    with estimator(name)(net):
        whole = gradient(net, x, weights)
    with estimator(name)(net):
        leaf = x.clone().requires_grad_()
        first = net(leaf[:1])
        out = torch.cat([first, net(leaf[1:])])
        grad = gradient_of(out, leaf, weights)
    functional.reset_net(net)
    assert_allclose(grad.numpy(), whole, rtol=1e-9, atol=1e-12)


def test_assg_remembers_over_the_iterations_of_an_attack():
    """M and D of the method per neuron, step and sample; a new context starts anew."""
    net = network("LIF")
    x, weights = inputs()
    memories = ([], [])
    with estimator("assg")(net):
        for iteration in range(3):
            here = x + 0.1 * iteration
            grad = gradient(net, here, weights)
            expected = gradient_by_hand("assg", net, here, weights, LIF, memories)
            assert_allclose(grad, expected, rtol=1e-6, atol=1e-9)
    with estimator("assg")(net):
        anew = gradient(net, here, weights)
    expected = gradient_by_hand("assg", net, here, weights, LIF)
    assert_allclose(anew, expected, rtol=1e-6, atol=1e-9)
    assert np.abs(anew - grad).max() > 1e-3


def test_forwards_of_one_eot_average_and_scoring_leave_assg_alone():
    net = network("LIF")
    x, weights = inputs()
    with estimator("assg")(net):
        leaf = x.clone().requires_grad_()
        grads = []
        for _ in range(3):
            functional.reset_net(net)
            grads.append(gradient_of(net(leaf), leaf, weights))
        functional.reset_net(net)
        with torch.no_grad():
            net(x + 1)
        functional.reset_net(net)
        net(x + 1)  # a graph to the weights, but images that want no gradient
        second = gradient(net, x + 0.1, weights)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])
    memories = ([], [])
    gradient_by_hand("assg", net, x, weights, LIF, memories)
    expected = gradient_by_hand("assg", net, x + 0.1, weights, LIF, memories)
    assert_allclose(second, expected, rtol=1e-6, atol=1e-9)


def last_gradient(rows_by_iteration):
    """Gradient of an attack's last iteration, each of which has some of eight images."""
    model = SpikingClassifier(network("LIF"), T=T)
    torch.manual_seed(0)
    weights = torch.randn(8, CLASSES, dtype=torch.float64)
    x = torch.rand(8, FEATURES, dtype=torch.float64)
    with estimator("assg")(model):
        for iteration, rows in enumerate(rows_by_iteration):
            leaf = (x[rows] + 0.01 * iteration).requires_grad_()
            grad = gradient_of(model(leaf), leaf, weights[rows])
    return grad


def test_memory_of_assg_follows_the_samples_of_a_shrinking_batch():
    everything = list(range(8))
    few = [1, 4, 6]
    alone = last_gradient([few, few, few, few])
    shrunk = last_gradient([everything, everything, few, few])
    assert_close(shrunk, alone, rtol=1e-12, atol=1e-14)
    fresh = last_gradient([[0, 2], [0, 2], few, few])
    assert (fresh - alone).abs().max() > 1e-4


def test_pdsg_has_one_deviation_per_channel_and_one_where_there_is_none():
    node = make_neuron("LIF")
    torch.manual_seed(0)
    x = torch.randn(T, 2, 3, 4, 4, dtype=torch.float64)
    # One channel is alike everywhere until its neurons have leaked by different steps.
    x[:, :, 1] = 0.4
    weights = torch.randn(x.shape, dtype=torch.float64)
    with estimator("pdsg+detach")(node):
        grad = gradient(node, x, weights)
    for channel in range(3):
        of_channel = (slice(None), slice(None), channel)
        h, s = LIF.fire(x[of_channel].numpy())
        grad_s = weights[of_channel].numpy()
        slopes = pdsg_slopes(h, 1.0)
        expected = LIF.bptt(h, s, grad_s, slopes, detach=True)
        assert_allclose(grad[of_channel], expected, rtol=1e-7, atol=1e-10)


def test_cba_has_the_gradient_of_a_rectifier_network():
    net = network("LIF")
    x, weights = inputs()
    leaf = x.clone().requires_grad_()
    with estimator("cba")(net) as crafting:
        assert crafting is not net
        grad = gradient_of(crafting(leaf), leaf, weights)
    hidden = torch.relu(net[0](leaf))
    expected = torch.relu(net[2](hidden))
    assert_close(grad, gradient_of(expected, leaf, weights))


@pytest.mark.parametrize("kind", ["PLIF", "DLIF"])
def test_parameters_of_the_neuron_get_their_gradient(kind):
    """With the shape of the training surrogate, our backward pass is the neuron's own, gain and
    decay included.
    """
    x, weights = inputs()
    net = network(kind, surrogate_function=surrogate.SoftSign(alpha=2.0))
    x.requires_grad_()
    learned = [x, *net.parameters()]
    weighted = net(x) * weights
    own = torch.autograd.grad(weighted.sum(), learned)
    functional.reset_net(net)

    def soft_sign(self, z, first):
        return 1 / (4 * (0.5 + z.abs()) ** 2)

    with estimator("assg")(net), pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory.Sharpness, "__call__", soft_sign)
        weighted = net(x) * weights
        ours = torch.autograd.grad(weighted.sum(), learned)
    assert_close(ours, own, rtol=1e-6, atol=1e-9)


def gradient_of_potentials(net, x):
    functional.reset_net(net)
    leaf = x.clone().requires_grad_()
    net(leaf)
    potentials = net[3].v_seq.square().sum() + net[3].v.sum()
    (grad,) = torch.autograd.grad(potentials, leaf)
    return grad


def test_potentials_carry_the_gradient_too():
    net = network("LIF", surrogate_function=surrogate.PiecewiseQuadratic())
    x, _ = inputs()
    for node in (net[1], net[3]):
        node.store_v_seq = True
    with estimator("rectangle:1")(net):
        ours = gradient_of_potentials(net, x)
    rectangle = partial(SHAPES["rectangle"], alpha=1.0)
    for node in (net[1], net[3]):
        node.surrogate_function = KeepingValues(surrogate.ATan(), rectangle)
    expected = gradient_of_potentials(net, x)
    assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_mixed_takes_another_shape_in_every_forward_that_has_a_gradient():
    """By the estimators of its shapes, which the tests above compare with gradients by hand."""
    shapes = ["triangle:0.5", "atan:4", "sigmoid:4", "rectangle:1", "exponential:2"]
    for kind in ("LIF", "DLIF"):
        net = network(kind)
        x, weights = inputs()
        wanted = []
        for name in shapes:
            with estimator(name)(net) as crafting:
                wanted.append(gradient(crafting, x, weights))
        with estimator("mixed")(net) as crafting:
            for expected in [*wanted, *wanted[:2]]:
                with torch.no_grad():
                    crafting(x)
                assert_allclose(gradient(crafting, x, weights), expected, atol=1e-12)
        assert not np.allclose(wanted[0], wanted[1])
