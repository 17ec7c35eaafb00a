"""Charge, fire and reset against a loop in numpy that the package has no part in."""

import numpy as np
import pytest
import torch
from oracle import dlif_forward

from sj_robust.ops.recurrence import charge, fire, reset

T = 6


def run(x, gain, v, *, decay, v_threshold, v_reset):
    """Charged potentials, spikes and potentials after the reset, [T, *]."""
    steps = []
    for current, factor in zip(x, gain, strict=True):
        h = charge(v, current, decay=decay, gain=factor, v_reset=v_reset)
        spike = fire(h, v_threshold)
        v = reset(h, spike, v_threshold=v_threshold, v_reset=v_reset)
        steps.append((h, spike, v))
    return [torch.stack(parts) for parts in zip(*steps, strict=True)]


@pytest.mark.parametrize("decay", [1.0, 0.5, 0.99])
@pytest.mark.parametrize("v_reset", [0.0, None, -0.5, 0.25])
@pytest.mark.parametrize("v_threshold", [1.0, 0.3])
def test_three_parts_are_the_loop_in_numpy(decay, v_reset, v_threshold):
    rng = np.random.default_rng(0)
    x = rng.normal(0.5, 1, (T, 200))
    gain = rng.normal(1, 1, T)
    v = rng.normal(0, 0.3, 200)
    constants = {"decay": decay, "v_threshold": v_threshold, "v_reset": v_reset}
    found = run(torch.tensor(x), torch.tensor(gain), torch.tensor(v), **constants)
    h, spikes, potentials = dlif_forward(x, gain, v, **constants)
    assert 0.1 < spikes.mean() < 0.9
    np.testing.assert_array_equal(found[1].numpy(), spikes)
    np.testing.assert_allclose(found[0].numpy(), h, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(found[2].numpy(), potentials, rtol=1e-13, atol=1e-15)


def test_a_potential_on_the_threshold_fires_and_one_below_does_not():
    h = torch.tensor([0.3, np.nextafter(np.float32(0.3), np.float32(0)), -torch.inf, torch.inf])
    assert fire(h, 0.3).tolist() == [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(("v_reset", "slope"), [(None, -0.3), (0.2, 0.2 - 0.7)])
def test_the_gradient_of_the_reset_goes_through_potential_and_spike(v_reset, slope):
    h = torch.tensor([0.7], requires_grad=True)
    spike = torch.tensor([1.0], requires_grad=True)
    reset(h, spike, v_threshold=0.3, v_reset=v_reset).backward()
    assert h.grad.item() == (1.0 if v_reset is None else 0.0)
    assert spike.grad.item() == pytest.approx(slope)


def test_a_surrogate_sees_the_distance_to_the_threshold():
    seen = fire(torch.tensor([0.5, 0.9]), 0.75, lambda z: z)
    assert seen.tolist() == pytest.approx([-0.25, 0.15])
