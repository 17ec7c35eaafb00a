"""Noises have the distribution they say; Gaussian noise is tested beside the gradient attacks."""

import pytest
import torch
from attacks.table import seeded

from sj_robust.attacks import salt_and_pepper, uniform


def test_uniform_noise_fills_the_ball_evenly():
    x = torch.full((20, 1000), 0.5)
    noise = (
        uniform(
            None,
            x,
            eps=0.1,
            generator=seeded(),
        )
        - x
    ).flatten()
    assert noise.min().item() == pytest.approx(-0.1, abs=1e-3)
    assert noise.max().item() == pytest.approx(0.1, abs=1e-3)
    for quantile in (0.1, 0.5, 0.9):
        found = torch.quantile(noise, quantile).item()
        assert found == pytest.approx(0.1 * (2 * quantile - 1), abs=3e-3)


def test_uniform_noise_stays_in_the_box():
    x = torch.tensor([[0.0, 1.0]]).repeat(500, 1)
    noisy = uniform(None, x, eps=0.2, generator=seeded())
    assert (
        200 < int((noisy == x).all(0).sum() + (noisy == x)[:, 0].sum()) < 300
    )  # half of the moves lead outside


@pytest.mark.parametrize("amount", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_salt_and_pepper_replaces_the_share_asked_for(amount, dtype):
    x = torch.full((40, 500), 0.5, dtype=dtype)
    noisy = salt_and_pepper(None, x, amount=amount, generator=seeded())
    found = (noisy == 0).double().mean().item()
    assert found == pytest.approx(amount / 2, abs=0.01)
    found = (noisy == 1).double().mean().item()
    assert found == pytest.approx(amount / 2, abs=0.01)
    found = (noisy == 0.5).double().mean().item()
    assert found == pytest.approx(1 - amount, abs=0.01)
