"""AutoAttack: it is the library's, fitted to the classes, within the conditions of every attack."""

import sys

import pytest
import torch
from attacks.table import all_generators, left_as_it_was, linear_model, predicted, seeded

from sj_robust.attacks import autoattack
from sj_robust.core.randomness import draw_seed, private_generator

X = torch.rand(7, 1, 6, 6, generator=seeded(2))
MODEL = linear_model(36)
Y = predicted(MODEL, X)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def library():
    reason = "extra `attacks` holds the authors' implementation"
    return pytest.importorskip("pyautoattack", reason=reason)


@pytest.mark.parametrize("version", ["standard", "plus", "rand"])
@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.05), ("L2", 0.5)])
def test_images_are_those_of_the_library_by_itself(library, version, norm, eps):
    names = ["apgd-ce", "apgd-t"] if version == "standard" else ["apgd-ce"]
    private = private_generator(seeded(5), CPU)
    draw_seed(private)  # for the network's own noise
    draw_seed(private)  # for the generators of Python and numpy
    theirs = library.AutoAttack(MODEL, norm=norm, eps=eps, version=version, seed=draw_seed(private))
    theirs.attacks_to_run = names
    theirs.apgd_targeted.n_target_classes = 4
    with torch.random.fork_rng():
        expected, _ = theirs.run_standard_evaluation(X, Y)
    options = {"eps": eps, "norm": norm, "version": version, "attacks": names}
    found = autoattack(MODEL, X, Y, **options, generator=seeded(5))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert not torch.equal(found, X)


@pytest.mark.parametrize(
    ("classes", "names"),
    [(2, ["apgd-ce", "fab"]), (3, ["apgd-ce", "apgd-dlr", "fab"]), (5, ["apgd-t"])],
)
def test_attacks_that_need_more_classes_are_left_out(recwarn, classes, names):
    def model(x):
        return MODEL(x)[:, :classes]

    y = predicted(model, X)
    wanted = [*names, "apgd-t"] if classes < 4 else names
    found = autoattack(model, X, y, eps=0.5, attacks=wanted)
    assert (predicted(model, found) != y).all()
    assert len(recwarn) == (classes < 4)


def test_features_are_attacked_without_square():
    x = X.flatten(1)
    found = autoattack(MODEL, x, Y, eps=0.4, attacks=["apgd-ce", "fab-t"])
    assert (predicted(MODEL, found) != Y).all()
    with pytest.raises(ValueError, match="Square"):
        autoattack(MODEL, x, Y, eps=0.1)


@pytest.mark.parametrize("fail_at", [None, 3])
def test_tracer_network_and_generators_are_left_as_they_were(fail_at):
    model = linear_model(36)
    before = sys.gettrace()
    with left_as_it_was(model, fail_at, draws=all_generators):
        autoattack(model, X, Y, eps=0.1, attacks=["fab"])
    assert sys.gettrace() is before


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("sj_robust.core.extras.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"sj_robust\[attacks\]"):
        autoattack(MODEL, X, Y, eps=0.1)
