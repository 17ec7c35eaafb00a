"""AutoAttack: its composition, strength, checks, and what a result depends on."""

import importlib
import sys
import warnings

import pytest
import torch
from attacks.conftest import shorten
from attacks.table import Recorder, assert_within, linear_model, predicted, seeded
from covering import every_pair
from torch import nn

from sj_robust import SpikingClassifier
from sj_robust.attacks import AutoAttackWarning, SampleSeeds, ThreatModel, autoattack
from sj_robust.classifier import PoissonEncoder

MODULE = importlib.import_module("sj_robust.attacks.autoattack")
ALL = ["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"]
GRADIENT_ATTACKS = ALL[:-1]
NORMS = ["Linf", "L2"]


@pytest.fixture
def images() -> tuple[torch.Tensor, torch.Tensor]:
    """Forty images and what the linear model says of them, the last two labels wrong."""
    x = torch.rand(40, 1, 6, 6, generator=seeded(4))
    y = predicted(linear_model(36, seed=3), x)
    y[-2:] = (y[-2:] + 1) % 5
    return x, y


class TestComposition:
    @pytest.mark.parametrize("version", ["standard", "plus", "rand"])
    def test_versions_are_the_librarys(self, version):
        library = pytest.importorskip(
            "pyautoattack", reason="extra `attacks` holds the authors' implementation"
        )
        theirs = library.AutoAttack(linear_model(36), version=version)
        ours = MODULE._VERSIONS[version]
        assert list(ours.attacks) == theirs.attacks_to_run
        assert ours.restarts == theirs.apgd.n_restarts
        assert ours.eot_samples == theirs.apgd.eot_iter
        assert theirs.fab.n_restarts in (ours.restarts, 5)  # "rand" has no FAB
        assert theirs.apgd_targeted.n_target_classes == MODULE._TARGETS
        assert theirs.fab.n_target_classes == MODULE._TARGETS
        assert theirs.apgd.n_iter == theirs.fab.n_iter == MODULE._ITERATIONS
        assert theirs.square.n_queries == MODULE._QUERIES

    @pytest.mark.parametrize(
        ("version", "name", "runs"),
        [
            ("standard", "apgd-ce", 1),
            ("plus", "apgd-ce", 5),
            ("plus", "apgd-dlr", 5),
            ("rand", "apgd-dlr", 20),
            ("standard", "apgd-t", 4),
            ("plus", "apgd-t", 4),
        ],
    )
    def test_forwards_of_the_images_that_stand(self, images, monkeypatch, version, name, runs):
        """Five classes have four targets; a run of ten steps sees eleven images."""
        shorten(monkeypatch, iterations=10)
        model = Recorder(linear_model(36, seed=3))
        autoattack(model, *images, eps=1e-6, version=version, attacks=[name])
        attacked = model.sizes[model.sizes.index(38) :]
        checks = 6  # of what it answers and of its gradient
        # The attack looks at the images before it begins and at the end; that of "rand", which
        # does not stop at a success, neither, but then 20 forwards judge its result.
        judged = 20 if version == "rand" else 2
        assert attacked == [38] * (checks + 11 * runs + judged)

    def test_square_averages_in_the_version_for_stochastic_networks(self):
        ball = ThreatModel("Linf", 0.1)
        for version, samples in (("standard", 1), ("rand", 20)):
            made = MODULE._members(("square",), ball, MODULE._VERSIONS[version])
            assert made["square"].keywords["eot_samples"] == samples

    def test_what_has_fallen_is_left_alone_and_what_was_wrong_comes_back(self, images):
        x, y = images
        model = Recorder(linear_model(36, seed=3))
        x_adv = autoattack(
            model,
            x,
            y,
            eps=0.06,
            attacks=["apgd-ce", "fab-t"],
        )
        fell = predicted(model.model, x_adv) != y
        assert torch.equal(x_adv[-2:], x[-2:])
        found = (x_adv != x).flatten(1).any(1)
        expected = fell & (torch.arange(40) < 38)
        assert torch.equal(found, expected)
        standing = int((~fell).sum())
        assert 5 < standing < 33
        assert standing <= model.sizes[-1] < 38

    @pytest.mark.parametrize(
        ("classes", "left_out"), [(2, {"apgd-dlr", "apgd-t"}), (3, {"apgd-t"}), (4, set())]
    )
    def test_fewer_than_ten_classes(self, classes, left_out, monkeypatch):
        shorten(monkeypatch)
        weight = torch.randn(classes, 36, generator=seeded())
        model = lambda x: x.flatten(1) @ weight.T  # noqa: E731
        x = torch.rand(6, 1, 6, 6, generator=seeded(1))
        y = predicted(model, x)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            x_adv = autoattack(model, x, y, eps=0.5, attacks=GRADIENT_ATTACKS)
        assert {record.category for record in caught} <= {AutoAttackWarning}
        found = {str(record.message).split()[1] for record in caught}
        assert found == left_out
        assert (predicted(model, x_adv) != y).all()

    def test_nothing_can_attack(self, images):
        x, y = images
        with pytest.raises(
            ValueError,
            match=r"none of the attacks \('apgd-dlr',\) can attack 2 classes; add 'apgd-ce'",
        ):
            autoattack(
                lambda x: x.flatten(1)[:, :2],
                x,
                y * 0,
                eps=0.1,
                attacks=["apgd-dlr"],
            )

    def test_features_are_attacked_without_square(self, images):
        x = images[0].flatten(1)
        y = images[1]
        model = linear_model(36, seed=3)
        x_adv = autoattack(
            model,
            x,
            y,
            eps=0.4,
            attacks=["apgd-ce", "fab-t"],
        )
        assert (predicted(model, x_adv) != y).all()
        for names in (None, ["square"]):
            with pytest.raises(ValueError, match=r"Square needs images .* got shape \(40, 36\)"):
                autoattack(model, x, y, eps=0.1, attacks=names)

    def test_it_needs_no_other_package(self, images, monkeypatch):
        monkeypatch.setitem(sys.modules, "pyautoattack", None)
        shorten(monkeypatch)
        x_adv = autoattack(linear_model(36, seed=3), *images, eps=0.1)
        assert not torch.equal(x_adv, images[0])


class TestStrength:
    @pytest.mark.slow
    @pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.1), ("L2", 0.6)])
    def test_as_strong_as_the_library_by_itself(self, trained, norm, eps, monkeypatch):
        library = pytest.importorskip(
            "pyautoattack", reason="extra `attacks` holds the authors' implementation"
        )
        shorten(monkeypatch, iterations=12)
        model = trained.model
        x = trained.x[:12]
        y = trained.y[:12]
        names = ["apgd-ce", "apgd-t", "fab-t"]
        theirs = library.AutoAttack(
            model,
            norm=norm,
            eps=eps,
            seed=0,
            version="custom",
            attacks=names,
        )
        theirs.apgd.n_restarts = 1
        for attack in (theirs.apgd, theirs.apgd_targeted, theirs.fab):
            attack.n_iter = 12
        with torch.random.fork_rng():
            peer_adv, _ = theirs.run_standard_evaluation(x, y)
        seeds = SampleSeeds(range(12))
        x_adv = autoattack(
            model,
            x,
            y,
            eps=eps,
            norm=norm,
            attacks=names,
            generator=seeds,
        )
        ours = int((predicted(model, x_adv) == y).sum())
        library_left = int((predicted(model, peer_adv) == y).sum())
        assert ours <= library_left + 1  # luck of the random starts
        assert ours < int((predicted(model, x) == y).sum())

    @pytest.mark.slow
    def test_a_stochastic_network_is_attacked_with_its_own_version(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = nn.Sequential(nn.Flatten(2), nn.Linear(36, 5))
        model = SpikingClassifier(net, T=16, encoder=PoissonEncoder())
        x = torch.rand(9, 1, 6, 6, generator=seeded(2))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            y = torch.stack([predicted(model, x) for _ in range(25)]).mode(0).values
        with pytest.warns(AutoAttackWarning, match="it is stochastic; use version='rand'"):
            autoattack(
                model,
                x,
                y,
                eps=0.05,
                attacks=["apgd-ce"],
                generator=seeded(),
            )
        run = {"eps": 0.2, "version": "rand"}
        first = autoattack(model, x, y, **run, generator=seeded())
        again = autoattack(model, x, y, **run, generator=seeded())
        assert torch.equal(first, again)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            wrong = torch.stack([predicted(model, first) != y for _ in range(20)])
        assert wrong.double().mean() > 0.7
        assert_within(first, x, "Linf", 0.2)


RUNS = {"name": ALL, "version": ["standard", "plus"], "norm": NORMS}


@pytest.mark.parametrize(tuple(RUNS), every_pair(RUNS))
def test_with_sample_seeds_a_result_depends_on_no_other_sample(name, version, norm, monkeypatch):
    shorten(monkeypatch, queries=60)
    model = linear_model(36, torch.float64, seed=3)
    x = torch.rand(
        12,
        1,
        6,
        6,
        generator=seeded(8),
        dtype=torch.float64,
    )
    y = predicted(model, x)
    eps = 0.1 if norm == "Linf" else 0.6
    run = {"eps": eps, "norm": norm, "version": version, "attacks": [name]}
    seeds = SampleSeeds(range(100, 112))
    some = torch.tensor([7, 2, 11])
    together = autoattack(model, x, y, **run, generator=seeds)
    apart = autoattack(
        model,
        x[some],
        y[some],
        **run,
        generator=seeds.rows(some),
    )
    torch.testing.assert_close(together[some], apart, rtol=0, atol=1e-12)
    assert not torch.equal(together, x)


class TestChecks:
    """What makes a result unreliable arrives as warnings, and is not printed."""

    @pytest.mark.parametrize(
        ("model", "match"),
        [
            (lambda x: linear_model(36)(x).softmax(1), "the network returns probabilities"),
            (lambda x: linear_model(36)(x) + torch.rand(5), "so it is stochastic; use version="),
            (lambda x: linear_model(36)((x - 0.5).mul(1e4).clamp(-1, 1)), "9 of 9 images have a"),
        ],
        ids=["softmax", "random", "zero gradients"],
    )
    def test_properties_of_the_network(self, model, match, capfd):
        x = torch.rand(9, 1, 6, 6, generator=seeded(2))
        y = predicted(linear_model(36), x)
        if "images" in match:
            y = predicted(model, x)
        with pytest.warns(AutoAttackWarning, match=f"AutoAttack: .*{match}") as records:
            autoattack(
                model,
                x,
                y,
                eps=0.02,
                attacks=["apgd-ce"],
                generator=seeded(),
            )
        assert [record.filename for record in records] == [__file__] * len(records)
        assert capfd.readouterr() == ("", "")

    def test_none_where_there_is_nothing_to_say(self, images, monkeypatch):
        """A warning would be an error; the version for stochastic networks does not look for it."""
        shorten(monkeypatch)
        model = linear_model(36, seed=3)
        autoattack(model, *images, eps=0.02)
        noisy = lambda x: model(x) + 0.1 * torch.rand(5)  # noqa: E731
        autoattack(noisy, *images, eps=0.02, version="rand")

    def test_square_alone_asks_for_no_gradient(self, images, monkeypatch):
        shorten(monkeypatch)
        model = linear_model(36, seed=3)
        blind = lambda x: model(x.detach())  # noqa: E731
        x_adv = autoattack(blind, *images, eps=0.4, attacks=["square"])
        assert not torch.equal(x_adv, images[0])

    @pytest.mark.slow
    def test_square_stronger_than_gradients(self):
        def masked(x):
            return torch.floor(3 * linear_model(36)(x)) + 1e-3 * linear_model(36, seed=1)(x)

        x = torch.rand(9, 1, 6, 6, generator=seeded(2))
        y = predicted(masked, x)
        with pytest.warns(AutoAttackWarning, match=r"Square fooled \d+.\d+% of the images"):
            autoattack(
                masked,
                x,
                y,
                eps=0.2,
                attacks=["apgd-ce", "square"],
                generator=seeded(),
            )
