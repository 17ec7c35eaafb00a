"""Noises and gradient attacks against distributions and optima worked out by hand."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from attacks.table import Recorder, fooled, seeded, two_classes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sj_robust.attacks import (
    ThreatModel,
    apgd,
    fgsm,
    gaussian,
    pgd,
    rfgsm,
    salt_and_pepper,
    spike_search,
    uniform,
)
from sj_robust.core.checks import taken_for_checked
from sj_robust.core.randomness import draw_seed, private_generator, randn

WEIGHT = np.array([[0.3, -0.7, 0.2, 0.0], [-0.5, 0.1, 0.9, 0.0], [0.4, 0.6, -0.8, 0.0]])
X = np.array([[0.5, 0.5, 0.5, 0.5], [0.05, 0.9, 0.4, 0.2], [1.0, 0.0, 0.3, 1.0]])
Y = np.array([0, 2, 1])


def three_classes(x: torch.Tensor) -> torch.Tensor:
    return x @ torch.tensor(WEIGHT, dtype=x.dtype).T


def cross_entropy_gradient(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """dCE/dx = W^T (softmax(W x) - onehot(y))."""
    exponentials = np.exp(x @ WEIGHT.T)
    return (exponentials / exponentials.sum(1, keepdims=True) - np.eye(3)[y]) @ WEIGHT


def negative(logits, y):
    return -nn.functional.cross_entropy(logits, y, reduction="none")


ONE_STEP = {
    "fgsm": fgsm,
    "rfgsm": partial(rfgsm, noise_std=0.0),
    "pgd": partial(pgd, step_size=np.float64(0.25), steps=1, random_start=False, keep_best=False),
}


@pytest.mark.parametrize("name", ONE_STEP)
@pytest.mark.parametrize("options", [{}, {"targeted": True}, {"loss": negative}])
def test_one_step_equals_the_formula(name, options):
    sign = np.sign(cross_entropy_gradient(X, Y)) * (-1 if options else 1)
    expected = np.clip(X + 0.125 * sign, 0, 1)
    eps = np.float32(0.125)  # a number as well
    x_adv = ONE_STEP[name](three_classes, torch.tensor(X), torch.tensor(Y), eps=eps, **options)
    np.testing.assert_allclose(x_adv.numpy(), expected, rtol=0, atol=1e-12)
    assert (x_adv.numpy()[:, 3] == X[:, 3]).all()  # no gradient there, no step


@pytest.mark.parametrize("project", [False, True])
def test_rfgsm_equals_the_formula_at_its_own_start(project):
    recorder = Recorder(three_classes)
    options = {"eps": 0.1, "step_size": 0.15, "noise_std": 0.05, "project": project}
    x_adv = rfgsm(
        recorder,
        torch.tensor(X),
        torch.tensor(Y),
        **options,
        generator=seeded(),
    )
    (start,) = (seen.numpy() for seen in recorder.seen)
    private = private_generator(seeded(), torch.device("cpu"))
    draw_seed(private)  # of the numbers that the model draws
    noise = randn(X.shape, private, dtype=torch.float64, device=private.device)
    assert (start == X + 0.05 * noise.numpy()).all()
    expected = start + 0.15 * np.sign(cross_entropy_gradient(start, Y))
    if project:
        expected = np.clip(expected, X - 0.1, X + 0.1)
    wanted = np.clip(expected, 0, 1)
    np.testing.assert_allclose(x_adv.numpy(), wanted, rtol=0, atol=1e-12)


GREY = torch.full((50, 400), 0.5)


def start_of_rfgsm():
    """And that it steps by eps from there."""
    recorder = Recorder(two_classes(lambda x: x.mean(1)))
    y = torch.ones(50, dtype=torch.int64)
    x_adv = rfgsm(recorder, GREY, y, eps=0.1, project=False, generator=seeded())
    start = recorder.seen[0]
    torch.testing.assert_close(x_adv, start - 0.1)
    return start


NORMAL = {0.1: -1.2816, 0.5: 0.0, 0.9: 1.2816}
EVEN = {0.0: -1.0, 0.1: -0.8, 0.5: 0.0, 0.9: 0.8, 1.0: 1.0}
NOISES = {
    "gaussian": (lambda: gaussian(None, GREY, std=0.1, clamp=False, generator=seeded()), NORMAL),
    "uniform": (lambda: uniform(None, GREY, eps=0.1, generator=seeded()), EVEN),
    "start of rfgsm": (start_of_rfgsm, {share: value / 100 for share, value in NORMAL.items()}),
}


@pytest.mark.parametrize("name", NOISES)
def test_noise_has_the_quantiles_of_its_distribution(name):
    noisy, quantiles = NOISES[name]
    noise = (noisy() - GREY).flatten() / 0.1
    scale = max(quantiles.values())
    for share, wanted in quantiles.items():
        found = torch.quantile(noise, share).item()
        assert found == pytest.approx(wanted, abs=0.03 * scale)


def test_gaussian_noise_is_clamped_on_request():
    x = torch.full((20, 1000), 0.95)
    free, clamped = (
        gaussian(None, x, std=0.1, clamp=clamp, generator=seeded(3)) for clamp in (False, True)
    )
    assert free.max() > 1
    assert torch.equal(clamped, free.clamp(0, 1))
    assert torch.equal(clamped, gaussian(None, x, std=0.1, generator=seeded(3)))


@pytest.mark.parametrize(("norm", "step_size"), [("Linf", 0.05), ("L2", 0.1), ("L2", None)])
def test_pgd_iterates_follow_the_formula(norm, step_size):
    recorder = Recorder(three_classes)
    x = torch.tensor(X)
    y = torch.tensor(Y)
    pgd(
        recorder,
        x,
        y,
        eps=ThreatModel(norm, 0.12),
        step_size=step_size,
        steps=5,
        random_start=False,
        keep_best=False,
    )
    assert len(recorder.seen) == 5
    length = step_size or 2.5 * 0.12 / 5
    assert torch.equal(recorder.seen[0], x)
    for now, after in zip(recorder.seen, recorder.seen[1:], strict=False):
        grad = cross_entropy_gradient(now.numpy(), Y)
        if norm == "Linf":
            expected = np.clip(now.numpy() + length * np.sign(grad), X - 0.12, X + 0.12)
        else:
            delta = now.numpy() + length * grad / np.linalg.norm(grad, axis=1, keepdims=True) - X
            expected = X + delta * np.minimum(
                1, 0.12 / np.linalg.norm(delta, axis=1, keepdims=True)
            )
        wanted = np.clip(expected, 0, 1)
        np.testing.assert_allclose(after.numpy(), wanted, rtol=0, atol=1e-9)


def valley(offset: float):
    """Margin of class 1 is 10 |x - 0.5| + offset: a step of 0.11 from 0.4 crosses the floor, the
    next one goes back.
    """
    return two_classes(lambda x: 10 * (x - 0.5).abs().flatten() + offset)


@pytest.mark.parametrize("offset", [-0.2, 1.0, -2.0], ids=["fooling", "highest loss", "both"])
def test_keep_best_takes_the_best_iterate_and_not_the_last(offset):
    x = torch.tensor([[0.4]])
    y = torch.tensor([1])
    options = {"eps": 0.3, "step_size": 0.11, "steps": 2, "random_start": False}
    found = pgd(
        valley(offset),
        x,
        y,
        **options,
        keep_best=False,
    ).item()
    assert found == pytest.approx(0.40)
    found = pgd(valley(offset), x, y, **options).item()
    assert found == pytest.approx(0.51)
    assert pgd(valley(offset), x, y, **options | {"steps": 1}).item() == pytest.approx(
        0.51
    )  # the last one counts too


def test_keep_best_prefers_fooling_to_a_higher_loss():
    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, 0.8 - x], 1)

    def loss(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return logits[
            :, 1
        ]  # rises as x falls, although a low x is classified as class 1, the label

    x, y = torch.tensor([[0.45]]), torch.tensor([1])  # at 0.45 class 0 wins
    x_adv = pgd(
        model,
        x,
        y,
        eps=0.3,
        step_size=0.1,
        steps=3,
        random_start=False,
        loss=loss,
    )
    assert x_adv.item() == pytest.approx(0.45)
    last = pgd(
        model, x, y, eps=0.3, step_size=0.1, steps=3, random_start=False, loss=loss, keep_best=False
    )
    assert last.item() == pytest.approx(0.15)


def test_a_wrongly_classified_image_stays_so_despite_the_random_start():
    x, y = (
        torch.full((64, 1), 0.5),
        torch.ones(64, dtype=torch.int64),
    )  # fooled only within 0.02 of 0.5
    x_adv = pgd(
        valley(-0.2),
        x,
        y,
        eps=0.3,
        step_size=0.25,
        steps=1,
        generator=seeded(),
    )
    assert (valley(-0.2)(x_adv).argmax(1) == 0).all()


# A plateau without gradient below 0.5, a slope to the wrong class above.
one_sided = two_classes(lambda x: 0.2 - (x.flatten() - 0.5).clamp(min=0))


@pytest.mark.parametrize(
    "attack",
    [
        partial(pgd, eps=0.3, step_size=0.1, steps=4),
        partial(pgd, eps=0.3, step_size=0.1, steps=4, keep_best=False),
        partial(apgd, eps=0.2001, steps=4),
    ],
    ids=["pgd", "pgd last", "apgd"],
)
def test_restarts_find_what_one_start_misses_and_lose_nothing(attack):
    x = torch.full((200, 1), 0.5)
    y = torch.ones(200, dtype=torch.int64)
    once = fooled(one_sided, attack(one_sided, x, y, restarts=1, generator=seeded()), y)
    often = fooled(one_sided, attack(one_sided, x, y, restarts=6, generator=seeded()), y)
    assert 70 <= int(once.sum()) <= 130  # half of the starts lie on the slope
    assert (often | ~once).all()
    assert int(often.sum()) >= 190  # 1 - 2**-6 of 200 is 197


def test_a_sample_that_is_fooled_leaves_if_asked_to():
    x = torch.full((200, 1), 0.5)
    y = torch.ones(200, dtype=torch.int64)
    options = {"eps": 0.3, "step_size": 0.1, "steps": 8, "restarts": 2}
    found, sizes = [], []
    for stop_early in (False, True):
        recorder = Recorder(one_sided)
        x_adv = pgd(recorder, x, y, **options, stop_early=stop_early, generator=seeded())
        found.append(fooled(one_sided, x_adv, y))
        sizes.append(recorder.sizes)
    assert torch.equal(*found)
    # the images themselves, eight steps, the last iterate; then what is left
    assert sizes[0][:10] == [200] * 10
    assert len(set(sizes[0][10:])) == 1
    assert 70 <= sizes[0][-1] <= 130
    assert sizes[1] == sorted(sizes[1], reverse=True)
    assert sum(sizes[1]) < 0.8 * sum(sizes[0])
    recorder = Recorder(one_sided)  # all are wrong already: nothing is left to attack
    options |= {"restarts": 1, "random_start": False}
    pgd(recorder, x, 1 - y, **options, stop_early=True)
    assert recorder.sizes == [200]


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_the_random_start_is_uniform_in_the_ball(norm):
    recorder = Recorder(lambda x: x[:, :2])
    x = torch.full((4000, 3), 0.5, dtype=torch.float64)
    y = torch.zeros(4000, dtype=torch.int64)
    options = {"step_size": 0.1, "steps": 1, "keep_best": False}
    pgd(recorder, x, y, eps=ThreatModel(norm, 0.2), **options, generator=seeded())
    delta = recorder.seen[0] - x
    found = delta.mean(0).abs().max().item()
    assert found < 0.01
    distance = delta.abs().amax(1) if norm == "Linf" else delta.norm(dim=1)
    share = (distance / 0.2) ** 3  # in three dimensions P(distance <= r) = (r / eps)^3
    assert share.max().item() <= 1 + 1e-9
    for quantile in (0.1, 0.5, 0.9):
        found = torch.quantile(share, quantile).item()
        assert found == pytest.approx(quantile, abs=0.03)


@pytest.mark.parametrize("attack", [partial(pgd, step_size=0.2), apgd], ids=["pgd", "apgd"])
def test_eot_averages_the_gradients_of_its_forwards(attack):
    factors = []

    def margin(x):
        factors.append(torch.rand(2))
        return x @ (torch.tensor([1.0, -1.0]) * factors[-1])

    model = Recorder(two_classes(margin))
    x = torch.full((1, 2), 0.5)
    y = torch.tensor([1])
    options = {"keep_best": False, "loss": lambda logits, y: -logits[:, 1]}
    x_adv = attack(
        model,
        x,
        y,
        eps=ThreatModel("L2", 0.1),
        steps=1,
        eot_samples=8,
        **options,
    )
    assert len(factors) == (16 if attack is apgd else 8)
    mean = torch.stack(factors[:8]).mean(0) * torch.tensor([-1.0, 1.0])
    moved = model.seen[0] + 0.2 * mean / mean.norm() - x
    reached = model.seen[-1] if attack is apgd else x_adv
    expected = x + moved * min(1.0, 0.1 / moved.norm().item())
    torch.testing.assert_close(reached, expected)


def test_images_are_judged_by_the_mean_of_their_forwards():
    leads = itertools.cycle([-0.1, 1.0])
    model = two_classes(lambda x: next(leads) + 0 * x.sum(1))
    x = torch.full((3, 2), 0.5)
    x_adv = apgd(model, x, torch.ones(3, dtype=torch.int64), eps=0.1, steps=2, eot_samples=2)
    assert (x_adv != x).any(1).all()  # none was wrong already


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e30])
def test_vanishing_and_huge_gradients_give_no_nan(norm, scale):
    x = torch.rand(3, 4, generator=seeded())
    y = torch.tensor([0, 1, 1])

    def loss(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return logits[:, 0] * scale

    x_adv = pgd(
        lambda x: x[:, :2],
        x,
        y,
        eps=ThreatModel(norm, 0.1),
        step_size=0.1,
        steps=1,
        random_start=False,
        loss=loss,
    )
    expected = x.clone()
    if scale > 0:
        expected[:, 0] = (x[:, 0] + 0.1).clamp(max=1)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_enter_the_loss_as_float32(dtype):
    seen = []

    def loss(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append(logits.dtype)
        return nn.functional.cross_entropy(logits, y, reduction="none")

    x = torch.tensor(X, dtype=torch.float32)
    y = torch.tensor(Y)
    x_adv = fgsm(
        lambda x: three_classes(x).to(dtype),
        x,
        y,
        eps=0.1,
        loss=loss,
    )
    assert seen == [torch.float32]
    expected = fgsm(three_classes, x, y, eps=0.1)
    torch.testing.assert_close(x_adv, expected)


@pytest.mark.parametrize("amount", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_salt_and_pepper_replaces_the_share_asked_for(amount, dtype):
    x = torch.full((40, 500), 0.5, dtype=dtype)
    noisy = salt_and_pepper(None, x, amount=amount, generator=seeded())
    for value, share in ((0, amount / 2), (1, amount / 2), (0.5, 1 - amount)):
        found = (noisy == value).double().mean().item()
        assert found == pytest.approx(share, abs=0.01)


class Waits(TorchDispatchMode):
    """How often a GPU would be waited for: a value or a length that depends on values is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        asked = func.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.equal,
        )
        places = args[1] if func.overloadpacket.__name__.startswith("index") else ()
        masks = isinstance(places, (list, tuple)) and any(
            isinstance(place, torch.Tensor) and place.dtype == torch.bool for place in places
        )
        self.count += asked or masks
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("attack", "most"),
    [
        (partial(apgd, eps=0.02, steps=100), 2.2),
        (partial(pgd, eps=0.02, step_size=0.005, steps=100), 2.2),
        (partial(spike_search, eps=0.02, forwards=20_000, moves=["elements"]), 3.0),
    ],
    ids=["apgd", "pgd", "spike_search"],
)
def test_an_evaluation_waits_for_a_gpu_a_few_times_per_forward(attack, most):
    x = torch.rand(64, 4, generator=seeded())
    y = three_classes(x).argmax(1)
    with Waits() as waits, taken_for_checked():
        recorder = Recorder(three_classes)
        x_adv = attack(recorder, x, y, generator=seeded())
    fallen = fooled(three_classes, x_adv, y)
    assert 0 < fallen.sum() < len(x)
    assert waits.count <= most * len(recorder.seen)
