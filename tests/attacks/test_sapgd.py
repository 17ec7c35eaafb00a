"""SA-PGD against its recursion written out a second time, and known optima."""

import numpy as np
import pytest
import torch
from attacks.table import Recorder, predicted, seeded
from torch import Tensor

from sj_robust.attacks import pgd, sapgd

X = np.array([[0.5, 0.5, 0.5, 0.5], [0.05, 0.9, 0.4, 0.2], [0.97, 0.02, 0.3, 1.0]])
PEAK = np.array([[0.52, 0.47, 0.9, 0.5], [0.1, 0.88, 0.2, 0.2], [0.95, 0.08, 0.33, 0.7]])
CURVATURE = np.array([[1.0, 3.0, 0.1, 2.0], [5.0, 0.2, 0.0, 1.0], [1.0, 1.0, 1.0, 0.5]])


@pytest.mark.parametrize(
    ("steps", "checkpoints"),
    [(100, [22, 41, 57, 70, 80, 87, 93, 99]), (12, [3, 5, 7, 9, 10, 11, 12])],  # the same shares, rounded up
)
def test_images_follow_the_recursion(steps, checkpoints):
    def loss(logits: Tensor, y: Tensor) -> Tensor:  # its peaks lie inside the ball, so that the moves never end
        return -(torch.tensor(CURVATURE)[y] * (logits - torch.tensor(PEAK)[y]) ** 2).sum(1)

    eps, y = 0.1, torch.arange(3)
    model = Recorder(lambda x: x)
    x_adv = sapgd(model, torch.tensor(X), y, eps=eps, steps=steps, loss=loss, keep_best=False)
    seen = [x.numpy() for x in model.seen]
    x, eta, m, v = seen[0], eps, np.zeros_like(X), np.zeros_like(X)
    lower, upper = np.maximum(X - eps, 0), np.minimum(X + eps, 1)
    assert len(seen) == steps + 1
    np.testing.assert_allclose(np.abs(seen[0] - X)[0].max(), eps, rtol=0, atol=1e-12)  # a border point
    for k in range(1, steps + 1):
        g = -2 * CURVATURE * (x - PEAK)
        m = 0.5 * m + g / np.abs(g).mean(1, keepdims=True)
        v = 0.8 * v + g**2 / (g**2).mean(1, keepdims=True)
        x = np.clip(x + np.clip(eta * m / (np.sqrt(v) + 1e-12), -eta, eta), lower, upper)
        np.testing.assert_allclose(seen[k], x, rtol=0, atol=1e-9)
        x = seen[k]
        eta = eta / 2 if k in checkpoints else eta
    assert np.abs(seen[-2] - seen[-1]).max() > 0.1 * eta
    values = [loss(torch.tensor(images), y) for images in seen]
    torch.testing.assert_close(loss(x_adv, y), torch.stack(values).amax(0))


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1.0, 1e30])
def test_the_scale_of_the_gradient_does_not_matter(scale):
    weight = torch.tensor([3.0, -1.0, 0.0, 0.5])
    x, y = torch.full((2, 4), 0.5), torch.zeros(2, dtype=torch.int64)

    def attacked(factor: float) -> Tensor:
        def loss(logits: Tensor, y: Tensor) -> Tensor:
            return (logits * weight).sum(1) * factor

        generator = seeded()
        return sapgd(lambda x: x, x, y, eps=0.1, steps=6, loss=loss, keep_best=False, generator=generator)

    x_adv = attacked(scale)
    assert bool(torch.isfinite(x_adv).all())
    torch.testing.assert_close(x_adv, attacked(0.125), rtol=0, atol=1e-5)
    torch.testing.assert_close(x_adv[:, 0], torch.full((2,), 0.6))


def test_a_zero_gradient_moves_nothing_and_stops_nobody_else():
    model = Recorder(lambda x: x * torch.tensor([[0.0], [1.0]], dtype=x.dtype))
    x, y = torch.full((2, 3), 0.5, dtype=torch.float64), torch.tensor([0, 0])
    x_adv = sapgd(model, x, y, eps=0.1, steps=5, keep_best=False)
    assert bool(torch.isfinite(x_adv).all())
    assert all(torch.equal(images[0], model.seen[0][0]) for images in model.seen)
    torch.testing.assert_close(x_adv[1], torch.tensor([0.4, 0.6, 0.6], dtype=torch.float64))


@pytest.mark.slow
def test_not_weaker_than_pgd_on_a_spiking_network(trained):
    model, x, y = trained.model, trained.x[:200], trained.y[:200]
    ours = sapgd(model, x, y, eps=0.1, steps=30, generator=seeded())
    peer = pgd(model, x, y, eps=0.1, step_size=0.025, steps=30, generator=seeded())
    ours, peer = ((predicted(model, x_adv) == y).double().mean().item() for x_adv in (ours, peer))
    assert ours <= peer + 0.01
    assert ours < 0.8
