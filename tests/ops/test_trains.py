"""Sums over trains for training: the compiled kernel gives what the reference gives."""

from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from ops.calls import assert_equal, needs_kernel
from spikingjelly.activation_based import neuron, surrogate
from torch import nn
from torch.testing import assert_close

from sj_robust import SpikingClassifier
from sj_robust.ops.dlif.config import HOST_NAMES, Surrogate
from sj_robust.ops.trains import cpp, reference
from sj_robust.ops.trains.config import Trained, Windows
from sj_robust.proofs.bounds import bounded_neurons
from sj_robust.proofs.differentiable_chains import DifferentiableChain
from sj_robust.proofs.spiking import Interval, LayerBounds, RealSpiking

pytestmark = needs_kernel
rand = partial(torch.rand, dtype=torch.float64)
randn = partial(torch.randn, dtype=torch.float64)


def random_joint(T, kept, dtype, F=3, M=130, *, grid=False):
    """Sums, weights and powers that want gradients; on a grid many values are equal."""
    torch.manual_seed(T)
    W = len(Windows(kept).listed(T))
    centre = 1.5 * torch.randn(W, M, dtype=dtype)
    width = torch.rand(W, M, dtype=dtype)
    weights = torch.randn(F, T, dtype=dtype)
    if grid:
        centre, width, weights = (part.mul(2).round() / 2 for part in (centre, width, weights))
    powers = torch.tensor(0.5 if grid else 0.8, dtype=dtype) ** torch.arange(T + 1)
    return [part.requires_grad_() for part in (centre - width, centre + width, weights, powers)]


def gradients(ends, given):
    generator = torch.Generator().manual_seed(0)
    total = 0
    for end in ends:
        drawn = torch.randn(end.shape, generator=generator, dtype=torch.float64)
        total = total + (drawn.to(end.dtype) * end).sum()
    return torch.autograd.grad(total, given, allow_unused=True, materialize_grads=True)


JOINT = [
    *product([1, 4, 12], [8], [torch.float32, torch.float64], [False, True], ["triangle"]),
    *product([6], [1], [torch.float32, torch.float64], [False, True], ["triangle"]),
    *product([4], [8], [torch.float32, torch.float64], [False], HOST_NAMES),
]


@pytest.mark.parametrize(("T", "kept", "dtype", "grid", "kind"), JOINT)
def test_sums_for_training_and_their_gradients_are_those_of_the_reference(
    T, kept, dtype, grid, kind, instruction_set
):
    low, high, weights, powers = given = random_joint(T, kept, dtype, grid=grid)
    windows = Windows(kept)
    surrogate = Surrogate(kind, alpha=1.5)
    found = cpp.joint_sums((low, high), weights, powers, Trained(1.0, kind, 1.5, 0.5), windows)
    neuron = reference.Spiking(1.0, False, lambda z: surrogate.spike(z / 0.5))
    expected = reference.differentiable_sums((low, high), weights, powers, neuron, windows)
    assert_equal(found, expected)
    close = 1e-4 if dtype == torch.float32 else 1e-9
    grads, wanted = gradients(found, given), gradients(expected, given)
    for one, other in zip(grads, wanted, strict=True):
        size = float(other.detach().abs().max())
        assert size > 0 or T == 1
        assert_close(one, other, rtol=close, atol=close * size)


OF_CHAINS = ("low", "high", "to_last", "from_first", "scale", "shift", "grads")


@pytest.mark.parametrize("place", range(4 + len(OF_CHAINS)))
def test_kernels_refuse_mixed_dtypes_whose_memory_they_would_misread(place):
    neuron = Trained(1.0, "triangle", 1.0, 1.0)
    tensors = [*random_joint(4, 8, torch.float64), *rand(len(OF_CHAINS), 3, 3, 2)]
    tensors[place] = tensors[place].float()
    low, high, weights, powers, *parts = tensors
    chains = dict(zip(OF_CHAINS, parts, strict=True))
    grads = (chains.pop("grads"), rand(3, 3, 2))
    joint = partial(cpp.joint_sums, (low, high), weights, powers, neuron, Windows(8))
    chained = partial(cpp.chain_sums_backward, grads, SimpleNamespace(**chains), None)
    with pytest.raises(ValueError, match="must have one dtype"):
        (joint if place < 4 else chained)()


def test_results_do_not_depend_on_the_number_of_threads(threads):
    low, high, weights, powers = tensors = random_joint(4, 8, torch.float32, M=5000)
    found = []
    for count in (1, 3):
        threads(count)
        trained = Trained(1.0, "triangle", 1.0, 1.0)
        ends = cpp.joint_sums((low, high), weights, powers, trained, Windows(8))
        found.append([*ends, *gradients(ends, tensors)])
    assert_equal(*found)


def chain_gradients(backend, slope, *, centred):
    """Sums over the chains of a layer, and gradients of currents and weights."""
    torch.manual_seed(0)
    node = neuron.LIFNode(tau=2.0, step_mode="m", surrogate_function=slope)
    parts = nn.Linear(2, 3), node
    model = SpikingClassifier(nn.Sequential(*parts), T=4).double().eval()
    (found_node,) = bounded_neurons(model).values()
    spiking = RealSpiking(found_node, LayerBounds(), surrogate_width=0.5)
    low = (2 * rand(300)).requires_grad_()
    high = (low.detach() + rand(300)).requires_grad_()
    weights = randn(5, 4).requires_grad_()
    chain = DifferentiableChain.of(spiking, 4, Interval(low, high))
    if centred:
        sums = chain.centred(weights, backend)
        found = sums.centre, sums.radius
    else:
        ends = chain.bounds(weights, backend)
        found = ends.low, ends.high
    total = sum((randn(5, 300) * part).sum() for part in found)
    return *found, *torch.autograd.grad(total, [low, high, weights])


# a triangle has no derivative far from its gate, which the kernel omits; a sigmoid has one
@pytest.mark.parametrize("slope", [surrogate.Sigmoid(), surrogate.PiecewiseQuadratic()])
@pytest.mark.parametrize("centred", [False, True])
def test_sums_over_chains_and_their_gradients_are_those_of_the_reference(
    slope, centred, instruction_set
):
    found, expected = (
        chain_gradients(name, slope, centred=centred) for name in ("auto", "reference")
    )
    assert all(other.any() for other in expected)
    assert_close(found, expected, rtol=1e-9, atol=1e-9)
