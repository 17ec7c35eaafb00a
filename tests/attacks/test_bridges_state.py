"""What AutoAttack and Square leave as they found it, keep to, and depend on."""

import logging
import sys
import warnings
from functools import partial

import pytest
import torch
from attacks.table import (
    Recorder,
    all_generators,
    assert_within,
    left_as_it_was,
    linear_model,
    predicted,
    seeded,
)
from torch import nn

from sj_robust import SpikingClassifier
from sj_robust.attacks import AutoAttackWarning, SampleSeeds, autoattack, square
from sj_robust.attacks import _autoattack as driver
from sj_robust.classifier import PoissonEncoder

checks = pytest.importorskip(
    "pyautoattack.checks", reason="extra `attacks` holds the library behind the bridge"
)

X = torch.rand(9, 1, 6, 6, generator=torch.Generator().manual_seed(2))
X[0, 0, 0], X[1, 0, 1] = 0.0, 1.0
EPS = {"Linf": 0.2, "L2": 0.6}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """A fifth of AutoAttack's iterations; that the full number is run is tested against the
    library.
    """
    monkeypatch.setattr(driver, "_ITERATIONS", 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_inside_ball_and_box_in_every_dtype_of_network(bridge, dtype):
    model, x, eps = linear_model(36, dtype), X.to(dtype), EPS[bridge.norm]
    y, before = predicted(model, x), x.clone()
    x_adv = bridge.run(
        lambda images: model(images) if images.dtype == dtype else 1 / 0, x, y, eps, seeded()
    )
    assert_within(x_adv, x, bridge.norm, eps)
    assert torch.equal(x, before)
    assert int((predicted(model, x_adv) != y).sum()) > 0


@pytest.mark.parametrize("model", ["dlif"], indirect=True)
def test_inside_ball_and_box_on_a_spiking_network(bridge, model):
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", AutoAttackWarning
        )  # an untrained network has zero gradients
        assert_within(
            bridge.run(model, X, predicted(model, X), EPS[bridge.norm]),
            X,
            bridge.norm,
            EPS[bridge.norm],
        )


def test_the_edge_cases_of_a_batch(bridge):
    model, eps = linear_model(36), EPS[bridge.norm]
    y = predicted(model, X)
    assert bridge.run(model, X[:0], y[:0], eps).shape == (0, 1, 6, 6)
    assert torch.equal(bridge.run(model, X, (y + 1) % 5, eps), X)  # all wrong before
    assert_within(bridge.run(model, X[:1], y[:1], eps, seeded()), X[:1], bridge.norm, eps)
    x = X.repeat(1, 2, 1, 1).contiguous(memory_format=torch.channels_last)
    wide = linear_model(72)
    together, apart = (
        bridge.run(wide, images, predicted(wide, x), eps, seeded())
        for images in (x, x.contiguous())
    )
    assert torch.equal(together, apart)


@pytest.mark.parametrize("size", [(3, 3), (4, 7), (12, 12), (14, 5), (18, 18)])
@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("generator", [SampleSeeds([1, 2, 3]), None], ids=["seeds", "none"])
def test_square_takes_images_of_any_size(size, norm, generator):
    x = torch.rand(3, 2, *size, generator=seeded())
    model = linear_model(2 * size[0] * size[1])
    y = predicted(model, x)
    x_adv = square(model, x, y, eps=EPS[norm], norm=norm, queries=30, generator=generator)
    assert_within(x_adv, x, norm, EPS[norm])
    assert ((x_adv != x).flatten(1).any(1)).all()


def test_features_are_attacked_without_square():
    model, x = linear_model(36), X.flatten(1)
    y = predicted(model, x)
    x_adv = autoattack(model, x, y, eps=0.2, attacks=["apgd-ce", "fab-t"])
    assert (predicted(model, x_adv) != y).all()
    for call in (square, autoattack, partial(autoattack, attacks=["square"])):
        with pytest.raises(
            ValueError, match=r"Square needs images \[N, C, H, W\], got shape \(9, 36\)"
        ):
            call(model, x, y, eps=0.1)


@pytest.mark.parametrize("fail_at", [None, 12])  # after the library's checks
def test_network_generators_and_a_debuggers_tracer_are_left_as_they_were(bridge, fail_at):
    model, traced = linear_model(36), []
    y = predicted(model, X)

    def tracer(frame, event, argument):
        traced.append(frame.f_code.co_name)

    outer = sys.gettrace()
    sys.settrace(tracer)
    try:
        with left_as_it_was(model, fail_at, draws=all_generators):
            bridge.run(model, X, y, 0.02, seeded() if fail_at else None)
        restored = sys.gettrace()
    finally:
        sys.settrace(outer)
    assert restored is tracer
    assert "before_forward" in traced


@pytest.mark.parametrize("generator", [seeded, lambda seed: SampleSeeds(range(seed, seed + 9))])
@pytest.mark.parametrize("norm", EPS)
def test_same_seed_same_result_and_another_seed_another(norm, generator):
    model = linear_model(36)
    run = partial(
        square, model, X, predicted(model, X), norm=norm, eps=EPS[norm] / 10, queries=20
    )  # all stand
    first, again, other = (run(generator=generator(seed)) for seed in (1, 1, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(run(), run())


@pytest.mark.parametrize("version", ["standard", "plus"])
def test_with_sample_seeds_a_result_depends_on_no_other_sample(bridge, version):
    if bridge.function is autoattack:
        bridge = bridge._replace(options=bridge.options | {"version": version})
    elif version == "plus":
        pytest.skip("square has no versions")
    model = linear_model(36, torch.float64, seed=3)
    x = torch.rand(12, 1, 6, 6, generator=seeded(8), dtype=torch.float64)
    y, seeds, eps = predicted(model, x), SampleSeeds(range(100, 112)), EPS[bridge.norm]
    together = bridge.run(model, x, y, eps, seeds)
    some = torch.tensor([7, 2, 11])
    apart = bridge.run(model, x[some], y[some], eps, seeds.rows(some))
    torch.testing.assert_close(together[some], apart, rtol=0, atol=1e-7)
    assert int((predicted(model, together) != y).sum()) > 0


@pytest.mark.parametrize("norm", EPS)
def test_apgd_starts_in_all_directions(norm):
    model = Recorder(linear_model(36, seed=3))
    y = predicted(model, X)
    autoattack(
        model, X, y, eps=0.001, norm=norm, attacks=["apgd-ce"], generator=SampleSeeds(range(9))
    )
    start = next(
        images for images in model.seen if 0 < (images - X).abs().max() < 0.002
    )  # no image of the checks
    assert 0.4 < (start > X).double().mean() < 0.6


def test_fab_restarts_from_noise_of_the_samples(monkeypatch):
    model = linear_model(36, seed=3)
    y, given = predicted(model, X), []
    original = driver._GivenNoise
    monkeypatch.setattr(
        driver,
        "_GivenNoise",
        lambda noise, network: given.append(noise) or original(noise, network),
    )
    autoattack(
        model, X, y, eps=0.001, version="plus", attacks=["fab"], generator=SampleSeeds(range(9))
    )
    assert [tuple(noise.shape) for noise in given] == [(9, 1, 6, 6)] * 4
    assert not torch.equal(given[0], given[1])


@pytest.mark.slow
def test_a_stochastic_network_is_attacked_with_its_own_version():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(2), nn.Linear(36, 5))
    model = SpikingClassifier(net, T=16, encoder=PoissonEncoder())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        y = torch.stack([predicted(model, X) for _ in range(25)]).mode(0).values
    with pytest.warns(AutoAttackWarning, match='randomized defense.*version="rand"'):
        autoattack(model, X, y, eps=0.05, attacks=["apgd-ce"], generator=seeded())
    first, again = (
        autoattack(model, X, y, eps=0.2, version="rand", generator=seeded()) for _ in range(2)
    )
    assert torch.equal(first, again)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        wrong = torch.stack([predicted(model, first) != y for _ in range(20)]).double().mean()
    assert wrong > 0.7
    assert_within(first, X, "Linf", 0.2)


def test_a_half_precision_network_gets_float32_logits_seen_by_the_library(monkeypatch):
    kinds = set()
    original = driver._Network.__call__

    def call(network, images):
        logits = original(network, images)
        kinds.add((images.dtype, logits.dtype))
        return logits

    monkeypatch.setattr(driver._Network, "__call__", call)
    for dtype in (torch.float16, torch.float64):
        model = linear_model(36, dtype)
        autoattack(
            model, X.to(dtype), predicted(model, X.to(dtype)), eps=0.05, attacks=["apgd-ce", "fab"]
        )
    assert kinds == {(torch.float32, torch.float32)}


@pytest.mark.slow
def test_square_on_a_trained_spiking_network(trained):
    model, x, y = trained[0], trained.x[:60], trained.y[:60]
    for norm, eps in (("Linf", 0.15), ("L2", 1.0)):
        for generator in (seeded(), SampleSeeds(range(60))):
            sizes = []
            handle = model.register_forward_hook(
                lambda module, inputs, output, sizes=sizes: sizes.append(len(output))
            )
            x_adv = square(model, x, y, eps=eps, norm=norm, queries=100, generator=generator)
            handle.remove()
            clean, standing = (
                int((predicted(model, x) == y).sum()),
                int((predicted(model, x_adv) == y).sum()),
            )
            assert sizes[0] == 60
            assert sizes[1] == clean
            assert (
                standing <= sizes[-1] <= standing + 2
            )  # who is fooled leaves the search, and the last query may fool
            assert standing < 0.8 * clean
            assert_within(x_adv, x, norm, eps)


class TestChecks:
    """What the library's checks say arrives as warnings, and is not printed."""

    @pytest.mark.parametrize(
        ("model", "match"),
        [
            (
                lambda x: linear_model(36)(x).softmax(1),
                "AutoAttack: it seems that the output is a probability",
            ),
            (
                lambda x: linear_model(36)(x) + torch.rand(5),
                "AutoAttack: it seems to be a randomized defense",
            ),
            (
                lambda x: linear_model(36)(x - 0.01 * own_gradient(x)),
                "AutoAttack: it seems to be a dynamic defense",
            ),
        ],
        ids=["softmax", "random", "dynamic"],
    )
    def test_properties_of_the_network(self, model, match, capfd, monkeypatch):
        y, logged = predicted(linear_model(36), X), []
        monkeypatch.setattr(logging.Logger, "handle", lambda logger, record: logged.append(record))
        with pytest.warns(AutoAttackWarning, match=match) as records:
            autoattack(model, X, y, eps=0.02, attacks=["apgd-ce"], generator=seeded())
        assert [record.filename for record in records] == [__file__] * len(records)
        assert capfd.readouterr() == ("", "")
        assert logged == []

    def test_a_dynamic_network_does_not_mark_the_next_one(self, monkeypatch):
        y = predicted(linear_model(36), X)
        monkeypatch.setitem(checks.funcs, "grad", 3)  # one that the library itself has seen
        counts = dict(checks.funcs)
        with pytest.warns(AutoAttackWarning, match="dynamic"):
            autoattack(
                lambda x: linear_model(36)(x - 0.01 * own_gradient(x)),
                X,
                y,
                eps=0.02,
                attacks=["apgd-ce"],
            )
        autoattack(
            linear_model(36), X, y, eps=0.02, attacks=["apgd-ce"]
        )  # a warning would be an error
        assert checks.funcs == counts

    def test_zero_gradients_are_reported_once(self):
        def saturated(x):
            return linear_model(36)((x - 0.5).mul(1e4).clamp(-1, 1))

        with pytest.warns(AutoAttackWarning, match="points with zero gradient") as records:
            autoattack(
                saturated, X, predicted(saturated, X), eps=0.01, attacks=["apgd-dlr", "apgd-t"]
            )
        assert len(records) == 1

    @pytest.mark.slow
    def test_square_stronger_than_gradients(self):
        def masked(x):
            return torch.floor(3 * linear_model(36)(x)) + 1e-3 * linear_model(36, seed=1)(x)

        y = predicted(masked, X)
        with pytest.warns(
            AutoAttackWarning, match="Square Attack has decreased the robust accuracy"
        ):
            autoattack(masked, X, y, eps=0.2, attacks=["apgd-ce", "square"], generator=seeded())


def own_gradient(x: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        inner = x.detach().requires_grad_()
        return torch.autograd.grad(linear_model(36)(inner).square().sum(), inner)[0].sign()
