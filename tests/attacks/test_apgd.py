"""Auto-PGD and SA-PGD against their algorithms written out a second time."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from attacks.oracle import linear_oracle
from attacks.table import Recorder, predicted, seeded
from covering import every_pair
from torch import Tensor

from sj_robust.attacks import ThreatModel, apgd, sapgd
from sj_robust.attacks._ascent import checkpoints
from sj_robust.attacks.apgd import dlr_loss, targeted_dlr_loss

LOSSES = ["ce", "dlr", "dlr_targeted"]


def paper_checkpoints(steps: int) -> list[int]:
    """w_j = ceil(p_j N), p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)."""
    p = [Fraction(0), Fraction(22, 100)]
    while p[-1] <= 1:
        interval = p[-1] - p[-2] - Fraction(3, 100)
        p.append(p[-1] + max(interval, Fraction(6, 100)))
    return [math.ceil(share * steps) for share in p if share <= 1]


def test_checkpoints():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    for steps in (1, 2, 5, 10, 40, 50, 100, 333, 1000):
        assert checkpoints(steps) == sorted(set(paper_checkpoints(steps)) - {0})


X = np.array([[0.5, 0.5, 0.5, 0.5], [0.45, 0.02, 0.4, 0.97], [0.5, 0.6, 0.5, 0.25]])
CURVATURE = np.array([[1.0, 30.0, 0.1, 2.0], [5.0, 5.0, 0.0, 0.01], [-1.0, 3.0, 1.0, 0.5]])
PEAK = np.array([[0.55, 0.48, 0.9, 0.5], [0.51, 0.1, 0.3, 0.9], [0.5, 0.62, 0.58, 0.2]])
COUPLING = 0.7


def quadratic(x: np.ndarray, k: int) -> tuple[float, np.ndarray]:
    """A quadratic in four variables, of another shape for each of three samples, and its
    gradient.
    """
    d = x - PEAK[k]
    value = -(CURVATURE[k] * d**2).sum() - COUPLING * d[0] * d[1]
    coupled = np.array([d[1], d[0], 0.0, 0.0])
    return value, -2 * CURVATURE[k] * d - COUPLING * coupled


def quadratic_loss(logits: Tensor, y: Tensor) -> Tensor:
    d = logits - torch.tensor(PEAK)[y]
    bent = (torch.tensor(CURVATURE)[y] * d**2).sum(1)
    return -bent - COUPLING * d[:, 0] * d[:, 1]


def by_hand(
    x: np.ndarray,
    start: np.ndarray,
    k: int,
    eps: float,
    norm: str,
    steps: int,
):
    """Algorithm 1 of the paper for one sample, with its whole history; images, step sizes, best
    image.
    """

    def project(z):
        if norm == "Linf":
            return np.clip(np.clip(z, x - eps, x + eps), 0, 1)
        d = z - x
        length = max(np.linalg.norm(d), 1e-300)
        return np.clip(x + d * min(1, eps / length), 0, 1)

    def uphill(g):
        if norm == "Linf":
            return np.sign(g)
        return g / np.linalg.norm(g)

    eta = 2 * eps
    etas = []
    w = [0, *paper_checkpoints(steps)]
    points = [start]
    f = [quadratic(start, k)[0]]
    f_max = f[0]
    x_max = start
    rises = []
    eta_at = {0: eta}
    f_max_at = {0: f_max}
    seen = [start]
    for n in range(steps):
        here = points[n]
        z = project(here + eta * uphill(quadratic(here, k)[1]))
        alpha, before = (1.0, here) if n == 0 else (0.75, points[n - 1])
        new = project(here + alpha * (z - here) + (1 - alpha) * (here - before))
        seen.append(new)
        value = quadratic(new, k)[0]
        rises.append(value > quadratic(here, k)[0])
        if value > f_max:
            f_max = value
            x_max = new
        if n + 1 in w:
            last = w[w.index(n + 1) - 1]
            few = sum(rises[last : n + 1]) < 0.75 * (n + 1 - last)
            stalled = eta_at[last] == eta and f_max_at[last] == f_max
            eta_at[n + 1] = eta
            f_max_at[n + 1] = f_max
            if few or stalled:
                eta = eta / 2
                new = x_max
        points.append(new)
        etas.append(eta)
    return np.array(seen), etas, x_max


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("steps", [10, 37, 100])
def test_images_and_step_sizes_follow_the_algorithm(norm, steps):
    model = Recorder(lambda x: x)
    y = torch.arange(3)
    options = {
        "eps": ThreatModel(norm, 0.1),
        "loss": quadratic_loss,
        "steps": steps,
        "keep_best": False,
    }
    x_adv = apgd(
        model,
        torch.tensor(X),
        y,
        **options,
        generator=seeded(1),
    )
    images = torch.stack(model.seen, 1).numpy()
    schedules = []
    for k in range(3):
        expected, etas, best = by_hand(
            X[k],
            images[k, 0],
            k,
            0.1,
            norm,
            steps,
        )
        np.testing.assert_allclose(images[k], expected, rtol=0, atol=1e-9)
        np.testing.assert_allclose(x_adv[k], best, rtol=0, atol=1e-9)
        schedules.append(etas)
    assert all(etas[-1] < 0.2 for etas in schedules)
    assert (
        norm == "Linf" or len({tuple(etas) for etas in schedules}) > 1
    )  # samples chose different step sizes


@pytest.mark.parametrize("steps", [12, 100])
def test_images_of_sapgd_follow_its_recursion(steps):
    eps = 0.1
    model = Recorder(lambda x: x)
    y = torch.arange(3)
    x_adv = sapgd(
        model, torch.tensor(X), y, eps=eps, steps=steps, loss=quadratic_loss, keep_best=False
    )
    seen = [images.numpy() for images in model.seen]
    x = seen[0]
    eta = eps
    m = np.zeros_like(X)
    v = np.zeros_like(X)
    lower = np.maximum(X - eps, 0)
    upper = np.minimum(X + eps, 1)
    assert len(seen) == steps + 1
    np.testing.assert_allclose(
        np.abs(x - X)[0].max(),
        eps,
        rtol=0,
        atol=1e-12,
    )  # a border point
    for k in range(1, steps + 1):
        g = np.stack([quadratic(x[n], n)[1] for n in range(3)])
        m = 0.5 * m + g / np.abs(g).mean(1, keepdims=True)
        v = 0.8 * v + g**2 / (g**2).mean(1, keepdims=True)
        step = np.clip(eta * m / (np.sqrt(v) + 1e-12), -eta, eta)
        x = np.clip(x + step, lower, upper)
        np.testing.assert_allclose(seen[k], x, rtol=0, atol=1e-9)
        x = seen[k]
        eta = eta / 2 if k in paper_checkpoints(steps) else eta
    found = np.abs(seen[-2] - seen[-1]).max()
    assert found > 0.1 * eta
    values = [quadratic_loss(torch.tensor(images), y) for images in seen]
    expected = torch.stack(values).amax(0)
    torch.testing.assert_close(quadratic_loss(x_adv, y), expected)


def test_a_run_that_rises_without_passing_its_start_goes_back_and_halves_its_step():
    losses = iter([9.0, 1.0, 2.0, 3.0, 4.0, 5.0] + [0.0] * 15)  # four of five steps raise it

    def loss(logits, y):
        height = logits.sum(1)
        return next(losses) + height - height.detach()

    model = Recorder(lambda x: x)
    x = torch.full((1, 40), 0.5)
    label = torch.zeros(1, dtype=torch.int64)
    apgd(model, x, label, eps=0.1, steps=20, loss=loss, keep_best=False, generator=seeded())
    start = model.seen[0]
    torch.testing.assert_close(model.seen[5], x + 0.1)
    there = (start + 0.1).clamp(max=0.6)
    moved = start + 0.75 * (there - start) + 0.25 * (start - model.seen[4])
    torch.testing.assert_close(model.seen[6], moved.clamp(0.4, 0.6))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_the_start_lies_on_the_border_of_the_ball(norm):
    model = Recorder(lambda x: x)
    x = torch.full((200, 5), 0.5, dtype=torch.float64)
    apgd(
        model,
        x,
        torch.zeros(200, dtype=torch.int64),
        eps=ThreatModel(norm, 0.2),
        steps=1,
        keep_best=False,
    )
    delta = model.seen[0] - x
    length = delta.abs().amax(1) if norm == "Linf" else delta.norm(dim=1)
    torch.testing.assert_close(length, torch.full_like(length, 0.2))
    found = delta.mean(0).abs().max().item()
    assert found < 0.04


def test_losses_by_hand():
    logits = torch.tensor([[4.0, 1.0, 3.0, -1.0, 2.0], [4.0, 1.0, 3.0, -1.0, 2.0]])
    y = torch.tensor([0, 2])
    expected = torch.tensor([-1 / 2, 1 / 2])  # over 4 - 2
    torch.testing.assert_close(dlr_loss(logits, y), expected)
    expected = torch.tensor([-5 / 2.5, -2 / 2.5])  # over 4 - (2 + 1) / 2
    found = targeted_dlr_loss(logits, y, target=torch.tensor([3, 1]))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_ratio_does_not_see_the_scale_of_the_logits(scale):
    logits = torch.randn(50, 6, generator=seeded(), dtype=torch.float64)
    y = logits.argsort(1)[:, -1]
    target = logits.argsort(1)[:, -3]
    torch.testing.assert_close(dlr_loss(logits * scale, y), dlr_loss(logits, y))
    targeted = targeted_dlr_loss(logits, y, target=target)
    found = targeted_dlr_loss(logits * scale, y, target=target)
    torch.testing.assert_close(found, targeted)


TIED = {
    "all": lambda x: x * 0,
    "steps": lambda x: (x > 0.5).double() + 0 * x,
    "counts": lambda x: (4 * x).round().detach() * torch.tensor([1.0, 0, 0, 0, 0]) + 0 * x,
    "nearly all": lambda x: x.mean(1, keepdim=True) * torch.tensor([1e-30, 1, 1, 1, 1]),
}
TIES = {"norm": ["Linf", "L2"], "loss": LOSSES, "tied": TIED}


@pytest.mark.parametrize(tuple(TIES), every_pair(TIES))
def test_ties_and_zero_gradients_give_no_nan(norm, loss, tied):
    model = TIED[tied]
    x = torch.rand(6, 5, generator=seeded(), dtype=torch.float64)
    for keep_best in (True, False):
        y = model(x).argmax(1)
        x_adv = apgd(
            model,
            x,
            y,
            eps=ThreatModel(norm, 0.1),
            loss=loss,
            steps=10,
            keep_best=keep_best,
        )
        assert torch.isfinite(x_adv).all()
        assert not torch.equal(x_adv, x)


def test_any_fooling_image_is_kept_and_the_highest_loss_on_request():
    def model(x):
        return torch.cat([x[:, :1], 0.8 - x[:, :1]], 1)

    def loss(logits, y):
        return -(
            (logits[:, 0] - 0.3) ** 2
        )  # highest where the label, class 1, is right; x falls to 0.3 from above

    x = torch.full((40, 1), 0.35)
    y = torch.ones(40, dtype=torch.int64)
    options = {"eps": 0.1, "loss": loss, "steps": 20, "generator": seeded()}
    kept = apgd(model, x, y, **options)
    highest = apgd(
        model,
        x,
        y,
        **options,
        keep_best=False,
    )
    assert bool(
        (model(kept).argmax(1) == 0).all()
    )  # above 0.4: a start at 0.45, or the first step from 0.25
    assert (model(highest).argmax(1) == 1).all()
    expected = torch.full((40, 1), 0.3)
    torch.testing.assert_close(highest, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("attack", [apgd, sapgd])
def test_what_is_misclassified_comes_back_and_what_is_fooled_is_left(attack):
    oracle = linear_oracle(5, "Linf")
    y = oracle.y.clone()
    y[:20] = (y[:20] + 1) % 5
    model = Recorder(oracle.model)
    x_adv = attack(
        model,
        oracle.x,
        y,
        eps=oracle.eps,
        steps=25,
    )
    assert torch.equal(x_adv[:20], oracle.x[:20])
    assert not (x_adv[20:] == oracle.x[20:]).all(1).any()
    assert model.sizes[:2] == [60, 40]
    expected = sorted(model.sizes[1:], reverse=True)
    assert model.sizes[1:] == expected
    standing = int((predicted(oracle.model, x_adv) == y).sum())
    assert standing <= model.sizes[-1] < 40
    assert attack is sapgd or model.sizes[-1] == standing
    model.seen.clear()
    attack(
        model,
        oracle.x,
        y,
        eps=oracle.eps,
        steps=25,
        keep_best=False,
    )
    assert model.sizes == [60] * 26


@pytest.mark.parametrize(
    ("target_classes", "falls"), [(1, False), (2, False), (3, True), (9, True)]
)
def test_targets_are_the_most_likely_wrong_classes_in_turn(target_classes, falls):
    def model(x):  # class 3, the least likely, is the only one that x can raise
        rest = torch.tensor([[3.0, 2.0, 1.0]], dtype=x.dtype).expand(len(x), -1)
        return torch.cat([rest + 0 * x[:, :1], -8 + 20 * x[:, :1]], 1)

    x, y = torch.full((3, 2), 0.4), torch.zeros(3, dtype=torch.int64)  # logit 3 is 0; 3.2 at 0.56
    options = {"loss": "dlr_targeted", "target_classes": target_classes, "steps": 10}

    def blind(
        x,
    ):  # the gradient towards class 3 vanishes unless it is the target: without one no step is made
        logits = model(x)
        return torch.cat(
            [logits[:, :3] - 1e-3 * x[:, :1] * torch.tensor([0.0, 1.0, 1.0]), logits[:, 3:]], 1
        )

    x_adv = apgd(
        blind,
        x,
        y,
        eps=0.2,
        **options,
        generator=seeded(),
    )
    found = bool((model(x_adv).argmax(1) == 3).all())
    assert found == falls


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1.0, 1e30])
def test_sapgd_does_not_see_the_scale_of_the_gradient(scale):
    weight = torch.tensor([3.0, -1.0, 0.0, 0.5])
    x = torch.full((2, 4), 0.5)
    y = torch.zeros(2, dtype=torch.int64)

    def attacked(factor: float) -> Tensor:
        def loss(logits: Tensor, y: Tensor) -> Tensor:
            return (logits * weight).sum(1) * factor

        generator = seeded()
        return sapgd(
            lambda x: x, x, y, eps=0.1, steps=6, loss=loss, keep_best=False, generator=generator
        )

    x_adv = attacked(scale)
    assert torch.isfinite(x_adv).all()
    torch.testing.assert_close(x_adv, attacked(0.125), rtol=0, atol=1e-5)
    expected = torch.full((2,), 0.6)
    torch.testing.assert_close(x_adv[:, 0], expected)


def test_a_zero_gradient_moves_nothing_in_sapgd_and_stops_nobody_else():
    model = Recorder(lambda x: x * torch.tensor([[0.0], [1.0]], dtype=x.dtype))
    x = torch.full((2, 3), 0.5, dtype=torch.float64)
    y = torch.tensor([0, 0])
    x_adv = sapgd(
        model,
        x,
        y,
        eps=0.1,
        steps=5,
        keep_best=False,
    )
    assert torch.isfinite(x_adv).all()
    for images in model.seen:
        assert torch.equal(images[0], model.seen[0][0])
    expected = torch.tensor([0.4, 0.6, 0.6], dtype=torch.float64)
    torch.testing.assert_close(x_adv[1], expected)
