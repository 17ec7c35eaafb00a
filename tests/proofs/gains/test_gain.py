"""Gains over time against the matrix that the perturbation's own recursion makes; their table in
docs/concepts/stability.md is a test as well.
"""

import itertools
import math
from functools import partial

import pytest
import torch
from spikingjelly.activation_based import neuron
from torch import nn
from torch.testing import assert_close

from sj_robust import DLIFNode
from sj_robust.neuron.charging import Charging, find_neurons
from sj_robust.perturbation import simplified_perturbation
from sj_robust.proofs.gains import l2_gain, l2_gain_limit, peak_gain, printed_gain
from sj_robust.proofs.gains.gain import neuron_gains, time_operator

assert_near = partial(assert_close, rtol=1e-10, atol=0)


def by_recursion(decay, T, p=None):
    """The recursion of the perturbation applied to every unit vector, as a matrix [T, T]."""
    gain = 1.0 if p is None else p
    units = torch.eye(T).double()
    return simplified_perturbation(units, torch.zeros_like(units), decay=float(decay), gain=gain)


def random_problem(n, T):
    torch.manual_seed(0)
    decay = torch.rand(n).double() * 0.999 + 0.001
    decay[0] = 1.0
    decay[1] = 0.9999
    scale = torch.logspace(-6, 6, n).double()
    p = torch.randn(n, T).double() * scale[:, None]
    p[2:4, ::2] = 0
    return decay, p


@pytest.mark.parametrize("T", [1, 2, 3, 7, 40])
def test_gains_are_those_of_the_recursion(T):
    decays, gains = random_problem(12, T)
    l2 = l2_gain(decays, T, gains)
    peak = peak_gain(decays, T, gains)
    for i, (decay, p) in enumerate(zip(decays, gains, strict=True)):
        matrix = by_recursion(decay, T, p)
        assert_near(time_operator(decay, T, p), matrix)
        assert_near(l2[i], torch.linalg.svdvals(matrix)[0])
        assert_near(peak[i], matrix.square().sum(1).sqrt().max())
        assert l2[i] >= torch.linalg.matrix_norm(matrix, 2)
    assert_near(l2_gain(0.5, T), torch.linalg.svdvals(by_recursion(0.5, T))[0])


@pytest.mark.parametrize("T", [1, 2, 50, 500])
@pytest.mark.parametrize("decay", [1e-3, 0.5, 0.99, 1 - 1e-7])
def test_peak_of_constant_gains_is_a_geometric_sum(decay, T):
    rate = 2 * math.log(decay)
    expected = math.sqrt(math.expm1(T * rate) / math.expm1(rate))
    assert float(peak_gain(decay, T)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("T", [1, 2, 9, 500])
def test_without_leak_the_gain_is_the_norm_of_a_cumulative_sum(T):
    expected = 0.5 / math.sin(math.pi / (4 * T + 2))
    assert l2_gain(1.0, T).item() == pytest.approx(expected, rel=1e-10)
    assert float(peak_gain(1.0, T)) == pytest.approx(math.sqrt(T), rel=1e-12)
    assert l2_gain_limit(1.0) == math.inf
    assert printed_gain(1.0) == math.inf


def test_gains_of_many_steps_come_near_their_limit():
    some = l2_gain(0.99, 100)
    many = l2_gain(0.99, 1000)
    assert some < many < l2_gain_limit(0.99) < 1.05 * many


def test_broadcasting():
    decay = torch.tensor([[0.5], [0.9]])
    p = torch.rand(2, 3, 5)
    for gain in (l2_gain, peak_gain):
        assert gain(decay, 5).shape == (2, 1)
        assert gain(decay, 5, p).shape == (2, 3)
    together = l2_gain(decay, 5, p)
    assert together.dtype == torch.float64
    for i, j in itertools.product(range(2), range(3)):
        alone = l2_gain(float(decay[i, 0]), 5, p[i, j])
        assert_near(together[i, j], alone)
    assert l2_gain(torch.zeros(0), 5).shape == (0,)
    gains = [1.0, 2.0, 0.5]
    of_tensor = peak_gain(0.5, 3, torch.tensor(gains))
    assert torch.equal(peak_gain(0.5, 3, gains), of_tensor)


@pytest.mark.parametrize(("decay", "first"), [(0.5, 3), (0.9, 6), (0.99, 17)])
def test_the_printed_constant_is_exceeded_as_an_l2_gain(decay, first):
    assert l2_gain(decay, first - 1) < printed_gain(decay) < l2_gain(decay, first)
    operator = time_operator(decay, first)
    _, _, right = torch.linalg.svd(operator)
    worst = right[0]  # of norm 1
    eps = simplified_perturbation(worst, torch.zeros_like(worst), decay=decay)
    assert eps.norm() > 1.01 * printed_gain(decay)


LIF = partial(neuron.LIFNode, tau=4.0)
PLIF = partial(neuron.ParametricLIFNode, init_tau=4.0)


@pytest.mark.parametrize(
    ("build", "decay", "gain"),
    [
        (neuron.IFNode, 1.0, 1.0),
        (partial(LIF, decay_input=False), 0.75, 1.0),
        (partial(LIF, decay_input=True), 0.75, 0.25),
        (partial(PLIF, decay_input=True), 0.75, 0.25),
        (partial(PLIF, decay_input=False), 0.75, 1.0),
    ],
)
def test_gains_of_neurons_with_a_fixed_gain(build, decay, gain):
    charging = charging_of(build())
    gains = neuron_gains(charging, T=6)
    expected = {
        "decay": decay,
        "l2": gain * l2_gain(decay, 6).item(),
        "peak": gain * peak_gain(decay, 6).item(),
        "printed": printed_gain(decay).item(),
    }
    for name, value in expected.items():
        assert getattr(gains, name) == pytest.approx(value, rel=1e-5), name


def charging_of(node):
    followed, _, _ = find_neurons(nn.Sequential(node))
    return followed["0"].charging()


def test_gains_of_a_dlif_neuron_follow_what_it_learned():
    node = DLIFNode(T=5, tau=10.0)
    learned = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0])
    node.input_gain.data.copy_(learned)
    charging = charging_of(node)
    for T in (5, 3):
        gains = neuron_gains(charging, T)
        assert_close(gains.input_gain, learned[:T].double())
        expected = torch.linalg.svdvals(by_recursion(0.9, T, learned[:T].double()))[0]
        assert gains.l2 == pytest.approx(float(expected), rel=1e-7)
    with pytest.raises(ValueError, match="at most the neuron's 5 input gains, got 6"):
        neuron_gains(charging, 6)
    silent = Charging(0.9, input_gain=torch.zeros(3))
    assert neuron_gains(silent, 3).l2 == 0
