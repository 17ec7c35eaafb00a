"""Gains over time against dense linear algebra; their table in docs/concepts/stability.md is a test
as well.
"""

import itertools
import math

import pytest
import torch
from spikingjelly.activation_based import neuron
from torch import nn

from sj_robust import DLIFNode
from sj_robust.neuron.charging import Charging, find_neurons
from sj_robust.perturbation import simplified_perturbation
from sj_robust.perturbation.gains import (
    l2_gain,
    l2_gain_limit,
    neuron_gains,
    peak_gain,
    printed_gain,
    time_operator,
)

F64 = torch.float64


def dense_l2(decay, T, p=None):
    return torch.linalg.matrix_norm(time_operator(decay, T, p), 2)


def random_problem(n, T):
    generator = torch.Generator().manual_seed(0)
    decay = torch.rand(n, dtype=F64, generator=generator) * 0.999 + 0.001
    decay[0], decay[1] = 1.0, 0.9999
    p = (
        torch.randn(n, T, dtype=F64, generator=generator)
        * torch.logspace(-6, 6, n, dtype=F64)[:, None]
    )
    p[2:4, ::2] = 0
    return decay, p


def test_the_operator_is_the_perturbation_without_reset():
    decay, p = 0.8, torch.randn(6, dtype=F64)
    dx = torch.randn(6, 5, dtype=F64)
    eps = simplified_perturbation(dx, torch.zeros_like(dx), decay=decay, gain=p)
    torch.testing.assert_close(time_operator(decay, 6, p) @ dx, eps)


@pytest.mark.parametrize("T", [1, 2, 3, 7, 40, 200])
def test_gains_equal_dense_linear_algebra(T):
    decay, p = random_problem(24, T)
    torch.testing.assert_close(l2_gain(decay, T, p), dense_l2(decay, T, p), rtol=1e-10, atol=0)
    rows = torch.linalg.vector_norm(time_operator(decay, T, p), dim=-1).amax(-1)
    torch.testing.assert_close(peak_gain(decay, T, p), rows, rtol=1e-12, atol=0)
    torch.testing.assert_close(l2_gain(decay, T), dense_l2(decay, T), rtol=1e-10, atol=0)


def test_closed_forms():
    for decay, T in itertools.product([1e-3, 0.5, 0.99, 1 - 1e-7], (1, 2, 50, 2000)):
        expected = math.sqrt(math.expm1(2 * T * math.log(decay)) / math.expm1(2 * math.log(decay)))
        assert float(peak_gain(decay, T)) == pytest.approx(expected, rel=1e-9)
    for T in (1, 2, 9, 4000):  # without leak, the norm of a cumulative sum
        assert float(l2_gain(1.0, T)) == pytest.approx(
            0.5 / math.sin(math.pi / (4 * T + 2)), rel=1e-10
        )
        assert float(peak_gain(1.0, T)) == pytest.approx(math.sqrt(T), rel=1e-12)
    assert l2_gain_limit(1.0) == printed_gain(1.0) == math.inf


def test_gains_of_thousands_of_steps_come_near_their_limit():
    gains = torch.stack([l2_gain(0.99, T) for T in (100, 4000)])
    assert (gains.diff() > 0).all()
    assert gains[-1] < l2_gain_limit(0.99) < gains[-1] * 1.003


def test_broadcasting():
    decay = torch.tensor([[0.5], [0.9]])
    p = torch.rand(2, 3, 5)
    assert l2_gain(decay, 5).shape == peak_gain(decay, 5).shape == (2, 1)
    assert l2_gain(decay, 5, p).shape == peak_gain(decay, 5, p).shape == (2, 3)
    assert l2_gain(0.5, 5, p).dtype == F64
    for i in range(2):
        for j in range(3):
            one = l2_gain(float(decay[i, 0]), 5, p[i, j])
            torch.testing.assert_close(l2_gain(decay, 5, p)[i, j], one, rtol=1e-11, atol=0)
    assert l2_gain(torch.zeros(0), 5).shape == (0,)
    assert torch.equal(
        peak_gain(0.5, 3, [1.0, 2.0, 0.5]), peak_gain(0.5, 3, torch.tensor([1.0, 2.0, 0.5]))
    )


@pytest.mark.parametrize(("decay", "first"), [(0.5, 3), (0.9, 6), (0.99, 17)])
def test_the_printed_constant_is_exceeded_as_an_l2_gain(decay, first):
    assert l2_gain(decay, first - 1) < printed_gain(decay) < l2_gain(decay, first)
    ds = torch.linalg.svd(time_operator(decay, first))[2][0]
    eps = simplified_perturbation(ds, torch.zeros_like(ds), decay=decay)
    assert eps.norm() / ds.norm() > printed_gain(decay) * 1.01


@pytest.mark.parametrize(
    ("build", "decay", "gain"),
    [
        (lambda: neuron.IFNode(), 1.0, 1.0),
        (lambda: neuron.LIFNode(tau=4.0, decay_input=False), 0.75, 1.0),
        (lambda: neuron.LIFNode(tau=4.0, decay_input=True), 0.75, 0.25),
        (lambda: neuron.ParametricLIFNode(init_tau=4.0, decay_input=True), 0.75, 0.25),
        (lambda: neuron.ParametricLIFNode(init_tau=4.0, decay_input=False), 0.75, 1.0),
    ],
)
def test_gains_of_neurons_with_a_fixed_gain(build, decay, gain):
    followed, _, _ = find_neurons(nn.Sequential(build()), {}, {})
    gains = neuron_gains(followed["0"].charging(), T=6)
    assert gains.decay == pytest.approx(decay, rel=1e-6)
    assert gains.l2 == pytest.approx(gain * float(l2_gain(decay, 6)), rel=1e-6)
    assert gains.peak == pytest.approx(gain * float(peak_gain(decay, 6)), rel=1e-6)
    assert gains.printed == pytest.approx(float(printed_gain(decay)), rel=1e-5)
    assert gains.l2_limit == pytest.approx(gain * float(l2_gain_limit(decay)), rel=1e-5)


def test_gains_of_a_dlif_neuron_follow_what_it_learned():
    node = DLIFNode(T=5, tau=10.0)
    with torch.no_grad():
        node.input_gain.copy_(torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0]))
    followed, _, _ = find_neurons(nn.Sequential(node), {}, {})
    for T in (5, 3):
        gains = neuron_gains(followed["0"].charging(), T)
        torch.testing.assert_close(gains.input_gain, node.input_gain.detach().double()[:T])
        assert gains.l2 == pytest.approx(
            float(dense_l2(0.9, T, node.input_gain.detach()[:T])), rel=1e-10
        )
        assert gains.l2_limit is None
    with pytest.raises(ValueError, match="at most the neuron's 5 input gains, got 6"):
        neuron_gains(followed["0"].charging(), 6)
    assert neuron_gains(Charging(0.9, input_gain=torch.zeros(3)), 3).l2 == 0


def test_wrong_use():
    for decay in (0.0, -0.5, 1.1, math.nan, torch.tensor([0.5, 2.0])):
        for gain in (
            lambda d: l2_gain(d, 3),
            lambda d: peak_gain(d, 3),
            l2_gain_limit,
            printed_gain,
        ):
            with pytest.raises(ValueError, match=r"decay must be in \(0, 1\]"):
                gain(decay)
    for gain, arguments, message in (
        (l2_gain, (0.5, 0), "T must be >= 1, got 0"),
        (l2_gain, (0.5, 3, torch.ones(4)), r"shape \[..., T\] with T = 3, got \(4,\)"),
        (l2_gain, (0.5, 4, [1.0, 2.0]), "must have shape"),
        (peak_gain, (0.5, 1, torch.tensor(1.0)), "input_gain must have shape"),
        (l2_gain, (0.5, 2, torch.tensor([1.0, math.nan])), "must be finite"),
        (l2_gain, (torch.ones(3), 2, torch.ones(2, 2)), "must broadcast"),
    ):
        with pytest.raises(ValueError, match=message):
            gain(*arguments)
