"""Charge, fire and reset one by one; all three together: the reference in test_kernels.py."""

import numpy as np
import pytest
import torch

from sj_robust.ops.recurrence import fire, reset


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
