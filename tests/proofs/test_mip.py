"""The mixed-integer program agrees with every point of a lattice, and nothing but a closed tree is
its proof.
"""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from covering import mostly_slow
from proofs.networks import (
    NETWORKS,
    NEURONS,
    T,
    assert_keep_their_class,
    batch,
    classifier,
    in_steps,
    small,
)
from scipy import sparse
from spikingjelly.activation_based import layer, neuron, surrogate
from torch import nn

from sj_robust import SpikingClassifier
from sj_robust.proofs import UnsoundBoundsError, mip, verify
from sj_robust.proofs.joint import JointRun
from sj_robust.proofs.points import Points

METHODS = ("ibp", "joint", "mip")


def pixels(count, *, seed, dtype=torch.float32):
    """Images for :func:`small`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, generator=generator, dtype=dtype)


def grid(x, eps, points):
    """All points of a lattice in the box of one image [1, features]."""
    lower = (x - eps).clamp(min=0)[0]
    upper = (x + eps).clamp(max=1)[0]
    share = torch.linspace(0, 1, points)
    axes = [low + share * (high - low) for low, high in zip(lower, upper, strict=True)]
    return torch.cartesian_prod(*axes).clamp(lower, upper)


def assert_broken(model, x, y, eps, z):
    """An image within the ball and [0, 1] that gets another class."""
    assert int(model(z.unsqueeze(0)).argmax(1)) != int(y)
    assert float((z.double() - x.double()).abs().max()) <= eps
    assert float(z.min()) >= 0
    assert float(z.max()) <= 1


LATTICE = [(1, 0.02, "LIF"), (2, 0.1, "DLIF"), (4, 0.2, "DLIF from 0.5"), (3, 0.3, "LIF soft")]
LATTICE += [(3, 0.1, "LIF reset to 0.2")]


@pytest.mark.parametrize(("seed", "eps", "node"), mostly_slow(LATTICE, quick=LATTICE[:3]))
def test_every_method_agrees_with_a_lattice_and_the_program_decides(seed, eps, node):
    model = small(NEURONS[node], seed=seed)
    x = pixels(2, seed=seed)
    y = model(x).argmax(1)
    before = (False, False)
    for method in METHODS:
        result = verify(model, x, y, eps, method=method, time_limit=20.0)
        for i in range(2):
            fooled = bool((model(grid(x[i : i + 1], eps, 12)).argmax(1) != y[i]).any())
            assert not (result.verified[i] and fooled)
            assert not (result.verified[i] and result.broken[i])
            assert result.verified[i] >= before[i]
            if result.broken[i]:
                assert_broken(model, x[i], y[i], eps, result.x_adv[i])
        before = result.verified
    assert not any(result.unknown), result.table()


def pooled(node):
    return nn.Sequential(
        layer.Conv2d(1, 2, 3, padding=1),
        layer.MaxPool2d(2),
        node(),
        layer.MaxPool2d(2, stride=1),
        layer.Flatten(),
        layer.Linear(2, 2),
    )


@pytest.mark.slow
@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_it_goes_through_pooling_and_single_steps(step_mode):
    broken = verified = 0
    for seed in range(2):
        model = classifier(pooled, neuron.LIFNode, seed=seed, step_mode=step_mode)
        x = torch.rand(2, 1, 4, 4)
        y = model(x).argmax(1)
        for eps in (0.02, 0.4):
            result = verify(model, x, y, eps, method="mip", time_limit=20.0)
            assert not any(result.unknown)
            assert_keep_their_class(model, x, y, eps, result.verified)
            broken += sum(result.broken)
            verified += sum(result.verified)
    assert broken > 0
    assert verified > 0


def test_the_limit_of_time_ends_the_search():
    model = classifier(NETWORKS[1], NEURONS["LIF"])
    x, y = batch(model, 1)
    result = verify(model, x, y, 0.02, method="mip", time_limit=1e-3)
    for verdicts in zip(result.verified, result.broken, result.unknown, strict=True):
        assert sum(verdicts) == 1


def test_a_network_in_float64_is_broken_by_images_in_float64():
    model = small(neuron.IFNode, seed=3).double()
    x = pixels(2, seed=0, dtype=torch.float64)[1:]
    y = model(x).argmax(1)
    result = verify(model, x, y, 0.5, method="mip")
    assert result.broken == (True,)
    assert_broken(model, x[0], y[0], 0.5, result.x_adv[0])


def one_neuron():
    """Two neurons on one input in [0, 1], at threshold 0.5 and, in the second step, after the
    reset.
    """
    linear = nn.Linear(1, 2)
    linear.weight.data = torch.tensor([[0.5], [-0.5]])
    linear.bias.data = torch.tensor([0.2, 0.7])
    return in_steps(linear, neuron.IFNode(v_threshold=0.5), T=2)


def pixel(value):
    """An image for :func:`one_neuron`."""
    return torch.full((1, 1), value)


def verdict(model, x, eps):
    """What the program says of the class that a network gives one image."""
    return verify(model, x, model(x).argmax(1), eps, method="mip")


@pytest.fixture
def only_programs(monkeypatch):
    """Neither a first bound proves an image, nor does a point of its ball break it."""
    lead = JointRun.lead

    def no_bound(run, logits, y):
        return (lead(run, logits, y).abs() + 1.0).scatter(1, y.unsqueeze(1), 0.0)

    monkeypatch.setattr(Points, "broken", lambda *given: None)
    monkeypatch.setattr(JointRun, "lead", no_bound)


def test_without_scipy_it_says_what_to_install(monkeypatch, only_programs):
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(ModuleNotFoundError, match="scipy, which is not installed: pip install"):
        verdict(one_neuron(), pixel(0.5), 0.5)


@pytest.mark.parametrize("answers", ["2", "1", "x2"])
def test_no_word_of_the_solver_alone_is_a_proof(monkeypatch, only_programs, answers):
    """The image can be turned: "infeasible" is wrong, and nothing may come of it."""
    said = iter(answers)  # statuses of HiGHS, or a point that does not fool the network

    def milp(costs, **arguments):
        answer = next(said)
        if answer == "x":
            return SimpleNamespace(x=costs + 0.5, status=0)
        return SimpleNamespace(x=None, status=int(answer))

    monkeypatch.setattr("scipy.optimize.milp", milp)
    assert verdict(one_neuron(), pixel(0.2), 0.8).verified == (False,)


@pytest.mark.parametrize("seed", mostly_slow(range(4), quick=[0, 1]))
def test_a_tree_of_linear_programs_closes_what_is_robust(seed, only_programs):
    """Without first bounds, what it proves is what no point of a lattice turns."""
    model = small(NEURONS["LIF"], seed=seed)
    x = pixels(1, seed=seed)
    y = model(x).argmax(1)
    result = verify(model, x, y, 0.05, method="mip", time_limit=30.0)
    turned = bool((model(grid(x, 0.05, 20)).argmax(1) != y).any())
    assert result.verified == (not turned,)


def test_multipliers_of_any_kind_give_a_lower_bound():
    generator = np.random.default_rng(0)
    for _ in range(50):
        matrix = sparse.csr_matrix(generator.normal(size=(5, 4)))
        costs = generator.normal(size=4)
        limits = generator.uniform(0.5, 1.0, size=5)
        points = generator.uniform(-1.0, 1.0, size=(2000, 4))
        allowed = points[(points @ matrix.T <= limits).all(1)]
        program = mip._LinearProgram(costs, matrix, limits, -np.ones(4), np.ones(4))
        for size in (0.0, 1.0, 100.0):
            multipliers = size * generator.uniform(size=5)
            least = program.safe_minimum(multipliers)
            assert (allowed @ costs >= least).all()


@pytest.mark.parametrize("factor", [1e6, 1e9])
def test_a_program_with_large_coefficients_is_not_solved(monkeypatch, only_programs, factor):
    monkeypatch.setattr("scipy.optimize.milp", lambda *args, **kwargs: pytest.fail("solved"))
    model = one_neuron()
    model.net[0].weight.data *= 4 * factor
    assert verdict(model, pixel(0.5), 0.5).unknown == (True,)


def test_a_program_finds_the_spike_that_loses_the_lead(only_programs):
    assert verdict(one_neuron(), pixel(0.2), 0.8).broken == (True,)


def test_a_network_with_relu_has_no_program(only_programs):
    model = in_steps(layer.Linear(1, 2), nn.ReLU(), layer.Linear(2, 2), T=1)
    with pytest.raises(NotImplementedError, match="no program is known"):
        verdict(model, pixel(0.5), 0.5)


class Step(surrogate.ATan):
    """Without a gradient."""

    def forward(self, x):
        return (x >= 0).to(x)


class Aside(nn.Module):
    """Logits of the image, beside a neuron that nothing hangs on."""

    def __init__(self):
        super().__init__()
        self.node = neuron.IFNode(step_mode="m")
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        self.node(x)
        return self.head(x)


@pytest.mark.parametrize("method", METHODS)
def test_a_network_without_a_gradient_to_its_input_is_searched_as_any_other(method):
    torch.manual_seed(0)
    steps = neuron.IFNode(surrogate_function=Step())
    without_slope = in_steps(nn.Linear(3, 5), steps, nn.Linear(5, 2))
    beside = SpikingClassifier(Aside(), T).eval()
    for model in (without_slope, beside):
        x = torch.rand(4, 3)
        y = model(x).argmax(1)
        result = verify(model, x, y, 0.3, method=method, time_limit=2.0)
        for number, verified in enumerate(result.verified):
            points = grid(x[number : number + 1], 0.3, 8)
            same = model(points).argmax(1) == y[number]
            assert same.all() or not verified


@pytest.mark.parametrize("method", METHODS[1:])
def test_a_bound_that_is_not_a_number_proves_nothing(method, monkeypatch):
    monkeypatch.setattr(Points, "broken", lambda *given: None)
    monkeypatch.setattr(JointRun, "lead", lambda run, logits, y: torch.nan * logits.radius)
    model = small(neuron.IFNode)
    x = torch.full((1, 3), 0.5)
    with pytest.raises(UnsoundBoundsError, match="by nan"):
        verify(model, x, model(x).argmax(1), 0.5, method=method)
