"""Attacks of other packages, AutoAttack among them, and attacks crafted on another network."""

import pickle
import sys
from functools import partial

import pytest
import torch
from attacks.table import all_generators, left_as_it_was, linear_model, predicted, seeded
from torch import nn

from sj_robust.attacks import (
    SampleSeeds,
    ThreatModel,
    autoattack,
    external,
    pgd,
    square,
    transfer,
)
from sj_robust.core.randomness import draw_seed, private_generator

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


def test_bound_attacks_can_be_pickled_and_printed(model):
    attack = transfer(model, external(Peer(model, 0.1), eps=0.1))
    copy = pickle.loads(pickle.dumps(attack))
    found = copy(model, X, Y, generator=seeded())
    expected = attack(model, X, Y, generator=seeded())
    assert torch.equal(found, expected)
    assert "eps=0.1" in repr(attack)


@pytest.fixture(scope="session")  # before what is trained for it
def torchattacks():
    reason = "extra `compare` holds the peers of parity tests"
    return pytest.importorskip("torchattacks", reason=reason)


@pytest.mark.parametrize("name", ["PGD", "PGDL2", "FGSM", "APGD", "Square"])
def test_attacks_of_torchattacks(torchattacks, model, name):
    x = X
    y = predicted(model, x)
    norm, eps = ("L2", 1.0) if name == "PGDL2" else ("Linf", 0.1)
    options = {"n_queries": 500} if name == "Square" else {}
    peer = getattr(torchattacks, name)(model, eps=eps, **options)
    before = torch.get_rng_state()
    first, again = (
        external(peer, eps=ThreatModel(norm, eps))(model, x, y, generator=seeded(3))
        for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert (predicted(model, first) != y).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("peer", "norm", "eps", "step_size", "steps"),
    [
        ("PGD", "Linf", 0.1, 0.0125, 20),
        ("PGD", "Linf", 8 / 255, 2 / 255, 10),
        ("PGDL2", "L2", 1.0, 0.2, 10),
    ],
)
def test_predictions_agree_with_torchattacks(
    torchattacks, trained, peer, norm, eps, step_size, steps
):
    model, x, y = trained
    options = {"steps": steps, "random_start": False}
    threat = ThreatModel(norm, eps)
    ours = pgd(model, x, y, eps=threat, step_size=step_size, keep_best=False, **options)
    theirs = getattr(torchattacks, peer)(model, eps=eps, alpha=step_size, **options)(x, y)
    ours, theirs = (predicted(model, crafted) for crafted in (ours, theirs))
    assert (ours == theirs).float().mean() >= 0.995
    assert (ours == y).sum() < (predicted(model, x) == y).sum()


IMAGES = torch.rand(7, 1, 6, 6, generator=seeded(2))
MODEL = linear_model(36)
LABELS = predicted(MODEL, IMAGES)


@pytest.fixture
def library():
    reason = "extra `attacks` holds the authors' implementation"
    return pytest.importorskip("pyautoattack", reason=reason)


@pytest.mark.parametrize(
    ("version", "norm", "eps"),
    [("standard", "Linf", 0.05), ("plus", "L2", 0.5), ("rand", "Linf", 0.05)],
)
def test_images_are_those_of_the_library_by_itself(library, version, norm, eps):
    names = ["apgd-ce", "apgd-t"] if version == "standard" else ["apgd-ce"]
    private = private_generator(seeded(5), torch.device("cpu"))
    draw_seed(private)  # for the network's own noise
    draw_seed(private)  # for the generators of Python and numpy
    theirs = library.AutoAttack(MODEL, norm=norm, eps=eps, version=version, seed=draw_seed(private))
    theirs.attacks_to_run = names
    theirs.apgd_targeted.n_target_classes = 4
    with torch.random.fork_rng():
        expected, _ = theirs.run_standard_evaluation(IMAGES, LABELS)
    options = {"eps": ThreatModel(norm, eps), "version": version, "attacks": names}
    found = autoattack(MODEL, IMAGES, LABELS, **options, generator=seeded(5))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert not torch.equal(found, IMAGES)


@pytest.mark.parametrize(
    ("classes", "names"),
    [(2, ["apgd-ce", "fab"]), (3, ["apgd-ce", "apgd-dlr", "fab"]), (5, ["apgd-t"])],
)
def test_attacks_that_need_more_classes_are_left_out(library, recwarn, classes, names):
    def model(x):
        return MODEL(x)[:, :classes]

    y = predicted(model, IMAGES)
    wanted = [*names, "apgd-t"] if classes < 4 else names
    found = autoattack(model, IMAGES, y, eps=0.5, attacks=wanted)
    assert (predicted(model, found) != y).all()
    assert len(recwarn) == (classes < 4)


@pytest.mark.parametrize("fail_at", [None, 3])
def test_tracer_network_and_generators_are_left_as_they_were(library, fail_at):
    model = linear_model(36)
    before = sys.gettrace()
    with left_as_it_was(model, fail_at, draws=all_generators):
        autoattack(model, IMAGES, LABELS, eps=0.1, attacks=["fab"])
    assert sys.gettrace() is before


def test_what_is_missing_is_named(library, monkeypatch):
    monkeypatch.setattr("sj_robust.core.extras.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"sj_robust\[attacks\]"):
        autoattack(MODEL, IMAGES, LABELS, eps=0.1)
