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
    assert_allclose(spike_train_distance(spikes, other), (spikes != other).sum(0) / 6, atol=1e-6)
    more = (spikes.sum(0) - other.sum(0)).abs()
    assert_allclose(tasad(spikes, other), more / 6, atol=1e-6)


@pytest.mark.parametrize("gain", [1.0, 0.25, None])
@pytest.mark.parametrize("steps", [1, 3])
def test_recursion_is_the_weighted_sum_and_so_is_every_derivative(steps, gain):
    torch.manual_seed(0)
    x, x_perturbed = torch.randn(2, steps, 2, 2).double().requires_grad_()
    decay = torch.tensor(0.7).double().requires_grad_()
    rates = torch.rand(steps).double() if gain is None else torch.tensor([gain] * steps).double()
    gain = rates.clone() if gain is None else gain  # one per step
    rates.requires_grad_()
    expected = eps_by_hand(x, x_perturbed.detach(), decay.item(), rates.tolist())
    weights = decay.item() ** torch.arange(steps).flip(0) * rates.detach()

    def perturbation(a, b, decay=0.7, gain=gain):
        return simplified_perturbation(a, b, decay=decay, gain=gain)

    for eps in (perturbation(x, x_perturbed, decay, rates), perturbation(x, x_perturbed)):
        assert_allclose(eps.detach(), expected, atol=1e-12)
        grad, grad_perturbed = torch.autograd.grad(eps[-1].sum(), (x, x_perturbed))
        assert_close(grad, weights[:, None, None].expand_as(x))
        assert_close(grad_perturbed, -grad)
    assert gradcheck(perturbation, (x, x_perturbed, decay, rates))
    assert gradgradcheck(lambda a, b: perturbation(a, b) ** 2, (x, x_perturbed))


@pytest.mark.parametrize("v_reset", [0.0, None, -0.2])
@pytest.mark.parametrize("decay_input", [False, True])
def test_potential_is_that_of_spikingjelly(v_reset, decay_input):
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.rand(12, 2, 5, dtype=torch.float64, generator=generator)
    options = {"v_reset": v_reset, "step_mode": "m", "store_v_seq": True}
    node = neuron.LIFNode(tau=4.0, decay_input=decay_input, **options)
    spikes = node(x)
    assert 0 < spikes.mean() < 1
    options = {"decay": 0.75, "gain": 0.25 if decay_input else 1.0, "v_reset": v_reset}
    for given in (None, spikes):
        v_seq = membrane_potential(x, spike_seq=given, **options)
        assert_close(v_seq, node.v_seq.detach(), atol=1e-12, rtol=0)
    rest = membrane_potential(x[5:], v_init=node.v_seq[4].detach(), **options)
    assert_close(rest, node.v_seq[5:].detach(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_currents_accumulate_in_float32(dtype):
    x = torch.rand(20, 7).to(dtype)
    zeros = torch.zeros_like(x)
    eps = simplified_perturbation(x, zeros, decay=0.99)
    assert eps.dtype == torch.float32
    assert_allclose(eps, eps_by_hand(x, zeros, 0.99, [1.0] * 20), rtol=1e-5)
