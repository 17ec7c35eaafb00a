"""Attacks of other packages, and attacks crafted on another network."""

import pickle
from functools import partial

import numpy as np
import pytest
import torch
from attacks.table import all_generators, left_as_it_was, linear_model, predicted, seeded
from torch import nn

from sj_robust.attacks import SampleSeeds, call, external, fgsm, pgd, square, transfer

X = torch.rand(7, 1, 6, 6, generator=seeded(2)) * 0.8 + 0.1
Y = torch.tensor([0, 1, 2, 3, 4, 0, 1])


class Peer:
    """Built for a model and called as ``attack(x, y)``, as the attacks of torchattacks are;
    careless with state.
    """

    def __init__(self, model: nn.Module, eps: float) -> None:
        self.model = model
        self.eps = eps

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        self.model.train()
        for parameter in self.model.parameters():
            parameter.requires_grad_(True)
        start = (x + (2 * torch.rand_like(x) - 1) * self.eps).clamp(0, 1).requires_grad_()
        nn.functional.cross_entropy(self.model(start), y).backward()
        x += self.eps * start.grad.sign()
        y += 1
        return x.clamp_(0, 1)


@pytest.fixture
def model() -> nn.Module:
    return linear_model(36)


@pytest.mark.parametrize(
    "generator", [None, seeded(), SampleSeeds(range(7))], ids=["none", "generator", "seeds"]
)
@pytest.mark.parametrize("fail_at", [None, 1])
def test_a_careless_attack_leaves_everything_as_it_was(model, generator, fail_at):
    x = X.clone()
    y = Y.clone()
    with left_as_it_was(model, fail_at, draws=all_generators, evaluates=False):
        x_adv = external(Peer(model, 0.1), eps=0.1)(model, x, y, generator=generator)
        assert not x_adv.requires_grad
        moved = (x_adv.double() - X.double()).abs()
        assert 0.09 < moved.min() <= moved.max() <= 0.1
    assert torch.equal(x, X)
    assert torch.equal(y, Y)


def test_the_network_is_in_evaluation_mode_and_gradients_are_on(model):
    def attack(x, y):
        assert not model.training
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        return x

    with torch.inference_mode():
        found = external(attack, eps=0.0)(model.train(), X, Y)
        assert torch.equal(found, X)
    assert model.training


def test_all_global_generators_are_seeded_by_the_callers(model):
    def noise(x, y):
        return x + 0.01 * all_generators(())

    attack = external(noise, eps=0.1)
    first = attack(model, X, Y, generator=seeded(1))
    expected = attack(model, X, Y, generator=seeded(1))
    assert torch.equal(first, expected)
    assert not torch.equal(first, attack(model, X, Y, generator=seeded(2)))
    seeds = SampleSeeds(range(7))
    first = attack(model, X, Y, generator=seeds)
    assert torch.equal(first, attack(model, X, Y, generator=seeds))
    assert not torch.equal(attack(model, X, Y), attack(model, X, Y))


def test_numpy_takes_the_low_bits_of_a_large_seed(model, monkeypatch):
    monkeypatch.setattr(call, "draw_seed", lambda private: 5 * 2**32 + 2**31 + 7)
    seen = []
    draws = lambda: np.random.rand()  # noqa: E731, NPY002  the global one
    external(lambda x, y: seen.append(draws()) or x, eps=0.1)(model, X, Y)
    expected = [np.random.RandomState(2**31 + 7).rand()]
    assert seen == expected


@pytest.mark.parametrize(
    ("found", "error", "match"),
    [
        (
            lambda x: x - 0.15 * (x - 0.5).sign(),
            ValueError,
            r"Linf .* eps=0.1 of x, got 0.15, 0.05 too far \(7 of 7 images",
        ),
        (
            lambda x: x + 0.1001 * (torch.arange(7) == 2).view(7, 1, 1, 1),
            ValueError,
            r"0.0001 too far \(1 of 7",
        ),
        (
            lambda x: torch.where(x > 0.8, torch.nan, x),
            ValueError,
            r"must return finite images, got \d+ NaN or infinite",
        ),
        (
            lambda x: 1.3 * x,
            ValueError,
            r"images in \[0, 1\], got values from 0.\d+ to 1.\d+; .*normalise inside",
        ),
        (lambda x: x - 0.5, ValueError, r"images in \[0, 1\], got values from -0.\d+ to"),
        (lambda x: x[:3], ValueError, r"shape \(7, 1, 6, 6\) as x has, got \(3, 1, 6, 6\)"),
        (lambda x: x.double(), ValueError, r"dtype torch.float32 as x has, got torch.float64"),
        (lambda x: x.to("meta"), ValueError, r"device cpu as x has, got meta"),
        (lambda x: (x, x), TypeError, r"must return a tensor, got tuple; wrap it in a function"),
        (lambda x: x.numpy(), TypeError, r"must return a tensor, got ndarray"),
    ],
    ids=["far", "one far", "nan", "above", "below", "shape", "dtype", "device", "tuple", "array"],
)
def test_what_it_returns_is_checked(model, found, error, match):
    with pytest.raises(error, match=match):
        external(lambda x, y: found(x), eps=0.1)(model, X, Y)


def test_an_l2_attack_is_measured_in_l2(model):
    attack = external(lambda x, y: x + 0.05, eps=0.29, norm="L2")
    with pytest.raises(
        ValueError, match=r"within L2 distance eps=0.29 of x, got 0.3, 0.01 too far"
    ):
        attack(model, X, Y)
    near = external(lambda x, y: x + 0.05, eps=0.3, norm="L2")(model, X, Y)
    distance = (near.double() - X.double()).flatten(1).norm(dim=1)
    assert 0.2999 < distance.min() <= distance.max() <= 0.3 * (1 + 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_rounding_adds_is_taken_off(dtype):
    x = X.to(dtype)
    eps = 8 / 255
    x_adv = external(lambda x, y: (x.float() + eps).to(dtype), eps=eps)(
        linear_model(36, dtype), x, Y
    )
    distance = (x_adv.double() - x.double()).abs()
    assert distance.max() <= eps
    assert distance.min() > eps - 2 * max(
        torch.finfo(dtype).eps, 1e-7
    )  # the peer computes in float32


def test_results_with_a_graph_or_of_inference_mode_come_back_plain(model):
    scale = torch.ones((), requires_grad=True)
    assert not external(lambda x, y: x * scale, eps=0.1)(model, X, Y).requires_grad

    def inferring(x, y):
        with torch.inference_mode():
            return x + 0.05

    x_adv = external(inferring, eps=0.1)(model, X, Y)
    model(x_adv).sum().backward()  # an inference tensor could not be saved for it
    assert model[1].weight.grad is not None
    nothing = external(lambda x, y: 1 / 0, eps=0.1)(model, X[:0], Y[:0])
    assert nothing.shape == (0, 1, 6, 6)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda m: external(None, eps=0.1),
            TypeError,
            r"attack must be called as attack\(x, y\), got NoneType",
        ),
        (lambda m: external(m, eps=8), ValueError, r"eps must be <= 1"),
        (lambda m: external(m, eps=0.1, norm="l2"), ValueError, r"norm must be one of"),
        (lambda m: external(m, eps=0.1)(m, X * 255, Y), ValueError, r"x must lie in \[0, 1\]"),
        (
            lambda m: external(m, eps=0.1)(m, X, Y, generator=SampleSeeds([1])),
            ValueError,
            r"one seed per image, 7",
        ),
        (lambda m: transfer(None, partial(fgsm, eps=0.1)), TypeError, r"source must be a callable"),
        (
            lambda m: transfer(m, None),
            TypeError,
            r"attack must be a callable, got NoneType; use functools.partial",
        ),
        (
            lambda m: transfer(m, partial(fgsm, eps=0.1))(None, X, Y),
            TypeError,
            r"model must be a callable",
        ),
    ],
)
def test_wrong_use(model, call, error, match):
    with pytest.raises(error, match=match):
        call(model)


def test_transfer_crafts_on_the_source_and_never_asks_the_target(model):
    def target(x):
        raise AssertionError("the target was asked")

    source = linear_model(36, seed=5).train()
    for attack in (
        partial(pgd, eps=0.1, step_size=0.05, steps=3),
        partial(square, eps=0.1, queries=20),
    ):
        moved = transfer(source, attack)(target, X, Y, generator=seeded())
        expected = attack(source, X, Y, generator=seeded())
        assert torch.equal(moved, expected)
        assert not torch.equal(moved, attack(model, X, Y, generator=seeded()))
    assert source.training


def test_transfer_is_weaker_than_the_attack_on_the_target_itself(model):
    y = predicted(model, X)
    attack = partial(fgsm, eps=0.1)
    white = attack(model, X, y)
    black = transfer(linear_model(36, seed=5), attack)(model, X, y)
    found = (predicted(model, black) != y).sum()
    expected = (predicted(model, white) != y).sum()
    assert found < expected


def test_bound_attacks_can_be_pickled_and_printed(model):
    attack = transfer(model, external(Peer(model, 0.1), eps=0.1))
    copy = pickle.loads(pickle.dumps(attack))
    found = copy(model, X, Y, generator=seeded())
    expected = attack(model, X, Y, generator=seeded())
    assert torch.equal(found, expected)
    assert "eps=0.1" in repr(attack)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PGD", "PGDL2", "FGSM", "APGD", "Square"])
def test_attacks_of_torchattacks(trained, name):
    torchattacks = pytest.importorskip(
        "torchattacks", reason="extra `compare` holds the peers of parity tests"
    )
    model = trained[0]
    x = trained.x[:40]
    y = trained.y[:40]
    norm, eps = ("L2", 1.0) if name == "PGDL2" else ("Linf", 0.1)
    options = {"n_queries": 50} if name == "Square" else {}
    peer = getattr(torchattacks, name)(model, eps=eps, **options)
    before = torch.get_rng_state()
    first, again = (
        external(peer, eps=eps, norm=norm)(model, x, y, generator=seeded(3)) for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    clean = int((predicted(model, x) == y).sum())
    assert int((predicted(model, first) == y).sum()) < clean
