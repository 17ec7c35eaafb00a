"""Every estimator's gradient against the hand computation."""

from itertools import product

import numpy as np
import pytest
import torch
from estimators.by_hand import (
    CLASSES,
    FEATURES,
    KINDS,
    T,
    bptt,
    fire,
    gradient,
    gradient_by_hand,
    inputs,
    make_neuron,
    network,
    pdsg_slopes,
)

from sj_robust import SpikingClassifier
from sj_robust.core.host import functional, surrogate
from sj_robust.estimators import estimator, memory
from sj_robust.estimators.shapes import SHAPES, KeepingValues

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


OTHER_NEURONS = [(None, 0.8), (-0.2, 0.9), (0.3, 1.2)]  # v_reset and v_threshold
CASES = [
    *product(NAMES, KINDS, [(0.0, 1.0)]),
    *product([*NAMES, *(f"{name}+detach" for name in DETACHED)], ["LIF", "DLIF"], OTHER_NEURONS),
]


@pytest.mark.parametrize(("name", "kind", "levels"), CASES)
def test_gradient_equals_hand_computation(name, kind, levels):
    v_reset, v_threshold = levels
    if name == "rga" and v_reset:
        pytest.skip(
            "stated for a reset to 0; test_rga_counts_from_the_reset_potential has the others"
        )
    net, (x, weights) = network(kind, v_reset=v_reset, v_threshold=v_threshold), inputs()
    with estimator(name)(net) as crafting:
        grad = gradient(crafting, x, weights)
    expected = gradient_by_hand(name, net, x, weights, kind, v_reset, v_threshold)
    np.testing.assert_allclose(grad, expected, rtol=1e-6, atol=1e-9)
    if v_reset == 0.0:
        assert np.abs(expected).max() > 1e-3
        assert name == "training" or np.abs(grad - gradient(net, x, weights)).max() > 1e-3


def test_rga_counts_from_the_reset_potential():
    """Shifting potential, threshold and reset by the same amount changes no spike and no
    gradient.
    """
    x, weights = inputs()
    net, shifted = (
        network("LIF", v_reset=0.0, v_threshold=0.8),
        network("LIF", v_reset=0.25, v_threshold=1.05),
    )
    with estimator("rga")(net), estimator("rga")(shifted):
        np.testing.assert_allclose(
            gradient(net, x, weights), gradient(shifted, x, weights), atol=1e-12
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["triangle:0.5", "rectangle:1", "straight_through+detach", "pdsg", "assg"]
)
def test_step_by_step_equals_the_sequence_at_once(name, kind):
    x, weights = inputs()
    net, stepped = network(kind), network(kind, step_mode="s")
    with estimator(name)(net), estimator(name)(stepped):
        for _ in range(3):  # of an attack, for the memory of ASSG
            at_once = gradient(net, x, weights)
            by_steps = gradient(stepped, x, weights, step_mode="s")
        np.testing.assert_allclose(by_steps, at_once, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["rectangle:1", "pdsg", "assg:sigmoid"])
def test_chunks_equal_the_whole_sequence(name):
    x, weights = inputs()
    net = network("DLIF")
    with estimator(name)(net):
        whole = gradient(net, x, weights)
    with estimator(name)(net):
        leaf = x.clone().requires_grad_()
        out = torch.cat([net(leaf[:1]), net(leaf[1:])])
        (grad,) = torch.autograd.grad((out * weights).sum(), leaf)
    functional.reset_net(net)
    np.testing.assert_allclose(grad.numpy(), whole, rtol=1e-9, atol=1e-12)


def test_assg_remembers_over_the_iterations_of_an_attack():
    """M and D of the method per neuron, step and sample; a new context starts anew."""
    net, (x, weights) = network("LIF"), inputs()
    memories = ([], [])
    with estimator("assg")(net):
        for iteration in range(3):
            here = x + 0.1 * iteration
            grad = gradient(net, here, weights)
            expected = gradient_by_hand("assg", net, here, weights, "LIF", 0.0, 1.0, memories)
            np.testing.assert_allclose(grad, expected, rtol=1e-6, atol=1e-9)
    with estimator("assg")(net):
        anew = gradient(net, here, weights)
    np.testing.assert_allclose(
        anew, gradient_by_hand("assg", net, here, weights, "LIF", 0.0, 1.0), atol=1e-9
    )
    assert np.abs(anew - grad).max() > 1e-3


def test_forwards_of_one_eot_average_and_scoring_leave_assg_alone():
    net, (x, weights) = network("LIF"), inputs()
    with estimator("assg")(net):
        leaf = x.clone().requires_grad_()
        grads = []
        for _ in range(3):
            functional.reset_net(net)
            (grad,) = torch.autograd.grad((net(leaf) * weights).sum(), leaf)
            grads.append(grad.numpy())
        functional.reset_net(net)
        with torch.no_grad():
            net(x + 1)
        functional.reset_net(net)
        net(x + 1)  # a graph to the weights, but images that want no gradient
        second = gradient(net, x + 0.1, weights)
    np.testing.assert_array_equal(grads[0], grads[1])
    np.testing.assert_array_equal(grads[0], grads[2])
    memories = ([], [])
    gradient_by_hand("assg", net, x, weights, "LIF", 0.0, 1.0, memories)
    expected = gradient_by_hand("assg", net, x + 0.1, weights, "LIF", 0.0, 1.0, memories)
    np.testing.assert_allclose(second, expected, rtol=1e-6, atol=1e-9)


def test_memory_of_assg_follows_the_samples_of_a_shrinking_batch():
    def run(rows_by_iteration):
        model = SpikingClassifier(network("LIF"), T=T)
        weights = torch.randn(
            8, CLASSES, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        x = torch.rand(8, FEATURES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        with estimator("assg")(model):
            for iteration, rows in enumerate(rows_by_iteration):
                leaf = (x[rows] + 0.01 * iteration).requires_grad_()
                (grad,) = torch.autograd.grad((model(leaf) * weights[rows]).sum(), leaf)
        return grad

    everything, few = list(range(8)), [1, 4, 6]
    shrunk, alone = run([everything, everything, few, few]), run([few, few, few, few])
    torch.testing.assert_close(shrunk, alone, rtol=1e-12, atol=1e-14)
    fresh = run([[0, 2], [0, 2], few, few])
    assert (fresh - alone).abs().max() > 1e-4


def test_pdsg_has_one_deviation_per_channel_and_one_where_there_is_none():
    node = make_neuron("LIF")
    x = torch.randn(T, 2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, :, 1] = (
        0.4  # one channel alike everywhere until its neurons have leaked by different steps
    )
    weights = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with estimator("pdsg+detach")(node):
        grad = gradient(node, x, weights)
    for channel in range(3):
        h, s = fire(x[:, :, channel].numpy(), "LIF", 0.0, 1.0)
        expected = bptt(
            h, s, weights[:, :, channel].numpy(), pdsg_slopes(h, 1.0), "LIF", 0.0, 1.0, True
        )
        np.testing.assert_allclose(grad[:, :, channel], expected, rtol=1e-7, atol=1e-10)


def test_cba_is_a_rectifier_network():
    net, (x, weights) = network("LIF"), inputs()
    with estimator("cba")(net) as crafting:
        assert crafting is not net
        leaf = x.clone().requires_grad_()
        out = crafting(leaf)
        (grad,) = torch.autograd.grad((out * weights).sum(), leaf)
        assert not any(p.requires_grad for p in crafting.parameters())
    hidden = torch.relu(x @ net[0].weight.T + net[0].bias)
    expected = torch.relu(hidden @ net[2].weight.T + net[2].bias)
    torch.testing.assert_close(out.detach(), expected.detach())
    first, second = (hidden > 0).double(), (expected > 0).double()
    torch.testing.assert_close(grad, ((weights * second) @ net[2].weight * first) @ net[0].weight)


@pytest.mark.parametrize("kind", ["PLIF", "DLIF"])
def test_parameters_of_the_neuron_get_their_gradient(kind):
    """With the shape of the training surrogate, our backward pass is the neuron's own, gain and
    decay included.
    """
    x, weights = inputs()
    net = network(kind, surrogate_function=surrogate.SoftSign(alpha=2.0))
    parameters = [x.clone().requires_grad_(), *net.parameters()]
    own = torch.autograd.grad((net(parameters[0]) * weights).sum(), parameters)
    functional.reset_net(net)
    with estimator("assg")(net), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            memory.Sharpness, "__call__", lambda self, z, first: 1 / (4 * (0.5 + z.abs()) ** 2)
        )
        ours = torch.autograd.grad((net(parameters[0]) * weights).sum(), parameters)
    for a, b in zip(ours, own, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_potentials_carry_the_gradient_too():
    net, (x, _) = network("LIF", surrogate_function=surrogate.PiecewiseQuadratic()), inputs()
    for node in (net[1], net[3]):
        node.store_v_seq = True

    def of_potentials():
        leaf = x.clone().requires_grad_()
        net(leaf)
        (grad,) = torch.autograd.grad(net[3].v_seq.square().sum() + net[3].v.sum(), leaf)
        functional.reset_net(net)
        return grad

    with estimator("rectangle:1")(net):
        ours = of_potentials()
    for node in (net[1], net[3]):
        node.surrogate_function = KeepingValues(
            surrogate.ATan(), lambda z: SHAPES["rectangle"](z, 1.0)
        )
    torch.testing.assert_close(ours, of_potentials(), rtol=1e-9, atol=1e-12)
