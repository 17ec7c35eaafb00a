"""The pure functions of the perturbation against sums and loops written out here."""

import pytest
import torch
from numpy.testing import assert_allclose
from perturbation.by_hand import eps_by_hand
from spikingjelly.activation_based import neuron
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from sj_robust.perturbation import membrane_potential, simplified_perturbation, tasad
from sj_robust.perturbation.dynamics import spike_train_distance


def test_distances_are_per_neuron_and_sample():
    spikes, other = torch.randint(0, 2, (2, 6, 3, 4))
    distance = spike_train_distance(spikes, other)
    assert distance.shape == (3, 4)
    differing = (spikes != other).sum(0)
    assert_allclose(distance, differing / 6, atol=1e-6)
    more = (spikes.sum(0) - other.sum(0)).abs()
    assert_allclose(tasad(spikes, other), more / 6, atol=1e-6)


@pytest.mark.parametrize("gain", [1.0, 0.25, "per step"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_recursion_is_the_weighted_sum_and_so_is_every_derivative(steps, gain):
    torch.manual_seed(0)
    x = torch.randn(steps, 2, 3).double().requires_grad_()
    x_perturbed = torch.randn(steps, 2, 3).double().requires_grad_()
    decay = torch.tensor(0.7).double().requires_grad_()
    if gain == "per step":
        rates = torch.rand(steps).double()
        gain = rates.clone()
    else:
        rates = torch.full((steps,), gain).double()
    rates.requires_grad_()
    expected = eps_by_hand(x, x_perturbed.detach(), decay.item(), rates.tolist())
    age = torch.arange(steps).flip(0)
    weights = decay.item() ** age * rates.detach()
    learned = simplified_perturbation(x, x_perturbed, decay=decay, gain=rates)
    constant = simplified_perturbation(x, x_perturbed, decay=decay.item(), gain=gain)
    for eps in (learned, constant):
        assert_allclose(eps.detach(), expected, atol=1e-12)
        last = eps[-1].sum()
        grad, grad_perturbed = torch.autograd.grad(last, (x, x_perturbed))
        assert_close(grad, weights[:, None, None].expand_as(x))
        assert_close(grad_perturbed, -grad)

    def of_everything(a, b, decay, gain):
        return simplified_perturbation(a, b, decay=decay, gain=gain)

    def of_both(a, b):
        return simplified_perturbation(a, b, decay=0.7, gain=0.25) ** 2

    assert gradcheck(of_everything, (x, x_perturbed, decay, rates))
    assert gradcheck(of_both, (x, x_perturbed))
    assert gradgradcheck(of_both, (x, x_perturbed))


@pytest.mark.parametrize("v_reset", [0.0, None, -0.2])
@pytest.mark.parametrize("decay_input", [False, True])
def test_potential_is_that_of_spikingjelly(v_reset, decay_input):
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.rand(12, 2, 5, dtype=torch.float64, generator=generator)
    node = neuron.LIFNode(tau=4.0, decay_input=decay_input, v_reset=v_reset)
    node.step_mode = "m"
    node.store_v_seq = True
    spikes = node(x)
    assert 0 < spikes.mean() < 1
    gain = 0.25 if decay_input else 1.0
    for given in (None, spikes):
        v_seq = membrane_potential(
            x,
            decay=0.75,
            gain=gain,
            v_reset=v_reset,
            spike_seq=given,
        )
        assert_close(v_seq, node.v_seq.detach(), atol=1e-12, rtol=0)


def test_potential_continues_from_an_initial_value_for_one_step_or_more():
    x = torch.full((2, 1), 0.25)
    v_seq = membrane_potential(x[:1], decay=0.5, v_init=0.5)
    assert v_seq.tolist() == [[0.5]]
    v_seq = membrane_potential(x, decay=0.5, v_init=0.5)
    assert v_seq.tolist() == [[0.5], [0.5]]
    v_seq = membrane_potential(x, decay=0.5, v_init=torch.tensor([1.0]))
    assert v_seq.tolist() == [[0.75], [0.625]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_currents_accumulate_in_float32(dtype):
    x = torch.rand(20, 7).to(dtype)
    zeros = torch.zeros_like(x)
    eps = simplified_perturbation(x, zeros, decay=0.99)
    assert eps.dtype == torch.float32
    expected = eps_by_hand(x, zeros, 0.99, [1.0] * 20)
    assert_allclose(eps, expected, rtol=1e-5)
