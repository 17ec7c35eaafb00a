"""AutoAttack and Square through pyautoattack: ties, agreement with the library, what its checks
say.
"""

import importlib
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from attacks.table import Recorder, linear_model, predicted, seeded
from torch import nn

import sj_robust.attacks
from sj_robust.attacks import AutoAttackWarning, SampleSeeds, autoattack, square
from sj_robust.attacks import _autoattack as driver
from sj_robust.attacks._square import break_ties

pyautoattack = pytest.importorskip(
    "pyautoattack", reason="extra `attacks` holds the library behind the bridge"
)

GRADIENT_ATTACKS = ["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t"]
EPS = {"Linf": 0.06, "L2": 0.35}


@pytest.fixture
def linear() -> nn.Module:
    return linear_model(36, seed=3)


@pytest.fixture
def images(linear) -> tuple[torch.Tensor, torch.Tensor]:
    """Forty images and what the linear model says of them, the last two labels wrong."""
    x = torch.rand(40, 1, 6, 6, generator=torch.Generator().manual_seed(4))
    x[0, 0, 0], x[1, 0, 1] = 0.0, 1.0
    y = predicted(linear, x)
    y[-2:] = (y[-2:] + 1) % 5
    return x, y


def library_autoattack(model, norm: str, eps: float, names: list[str], seed: int):
    """The library's own AutoAttack with the settings of its standard version, for five classes."""
    attack = pyautoattack.AutoAttack(
        model, norm=norm, eps=eps, seed=seed, version="custom", attacks=names
    )
    attack.apgd.n_restarts = attack.fab.n_restarts = 1
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = 4
    return attack


def test_the_winner_of_a_tie_stands_alone_and_all_else_stays():
    logits = torch.randint(-2, 3, (200, 6), generator=seeded()).float() / 4
    logits[0] = 0.0
    broken = break_ties(logits, logits.argmax(1))
    assert torch.equal(broken.argmax(1), logits.argmax(1))
    assert ((broken == broken.amax(1, keepdim=True)).sum(1) == 1).all()
    changed = broken != logits
    assert 0 < int(changed.any(1).sum()) < 200
    assert changed.sum(1).max() == 1
    torch.testing.assert_close(broken, logits, rtol=2e-7, atol=1e-30)
    assert torch.equal(broken, break_ties(logits, logits.argmax(1)))


def test_a_winner_found_in_another_precision_stays_the_winner_and_gradients_pass():
    exact = torch.tensor([[1.0, 1.0 + 1e-12, 0.0], [2.0, 1.0, 0.0]], dtype=torch.float64)
    rounded = exact.float().requires_grad_()
    assert rounded.argmax(1).tolist() == [0, 0]
    broken = break_ties(rounded, exact.argmax(1))
    assert broken.argmax(1).tolist() == [1, 0]
    assert broken.data_ptr() != rounded.data_ptr()  # the library writes into the logits it gets
    (grad,) = torch.autograd.grad((broken * torch.tensor([1.0, 2.0, 3.0])).sum(), rounded)
    assert grad.tolist() == [[1.0, 2.0, 3.0]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_square_goes_on_at_a_tie_that_the_label_wins(images, linear, norm, per_sample):
    x, _ = images
    counts = Recorder(lambda x: torch.floor(linear(x)))  # whole numbers, as spike counts are
    y = predicted(counts, x)
    eps = 2 * EPS[norm]
    theirs = pyautoattack.square.SquareAttack(
        counts, norm=norm, eps=eps, n_queries=300, resc_schedule=False
    )
    theirs.init_hyperparam(x)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        claimed = theirs.attack_single_run(x, y)[1]
    right, top = predicted(counts, claimed) == y, counts(claimed).topk(2).values
    assert int((right & (top[:, 0] == top[:, 1])).sum()) >= 3  # where the library stops

    generator = SampleSeeds(range(40)) if per_sample else seeded()
    x_adv = square(counts, x, y, eps=eps, norm=norm, queries=300, generator=generator)
    last = counts.sizes[-1]
    standing = int((predicted(counts, x_adv) == y).sum())
    assert last == standing  # the last of all queries was about every image that is not fooled
    assert 0 < standing < int(right.sum())


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize(
    "names",
    [["apgd-ce"], ["apgd-dlr"], ["apgd-t"], ["square"], ["apgd-ce", "apgd-t"]],
    ids="+".join,
)
def test_results_are_the_librarys_on_its_seed(images, linear, monkeypatch, norm, names):
    (x, y), eps = images, 2 * EPS[norm]
    monkeypatch.setattr(driver, "draw_seed", lambda _: 123)
    monkeypatch.setitem(
        driver.VERSIONS, "standard", replace(driver.VERSIONS["standard"], queries=200)
    )
    reference = library_autoattack(linear, norm, eps, names, seed=123)
    reference.square.n_queries = 200
    with torch.random.fork_rng():
        expected, _ = reference.run_standard_evaluation(x, y)
    x_adv = autoattack(linear, x, y, eps=eps, norm=norm, attacks=names, generator=seeded())
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=3e-7)  # we project exactly
    moved = (x_adv != x).flatten(1).any(1)
    assert 2 < int(moved.sum()) < 38


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("names", [["fab"], ["fab-t"]], ids="+".join)
def test_fab_finds_what_the_librarys_finds(images, linear, norm, names):
    x, y = images
    with torch.random.fork_rng():
        expected, _ = library_autoattack(linear, norm, EPS[norm], names, 0).run_standard_evaluation(
            x, y
        )
    linear.zero_grad()
    x_adv = autoattack(linear, x, y, eps=EPS[norm], norm=norm, attacks=names)
    found = (expected != x).flatten(1).any(1)
    assert int(found.sum()) > 5
    torch.testing.assert_close(x_adv[found], expected[found], rtol=0, atol=1e-6)
    assert all(parameter.grad is None for parameter in linear.parameters())


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_exactly_what_lies_closer_than_the_radius_to_the_plane_falls(norm):
    w = torch.linspace(-1, 1, 16).add(0.05)
    x = 0.3 + 0.4 * torch.rand(30, 1, 4, 4, generator=seeded())
    margins = x.flatten(1) @ w
    model, y = (
        (lambda x: torch.stack([x.flatten(1) @ w, 0 * x.flatten(1)[:, 0]], 1)),
        (margins < 0).long(),
    )
    reach = margins.abs() / (w.abs().sum() if norm == "Linf" else w.norm())
    eps = float(reach.sort().values[14:16].mean())
    with pytest.warns(
        AutoAttackWarning, match="apgd-t is left out: it needs at least 4 classes, the model has 2"
    ):
        x_adv = autoattack(model, x, y, eps=eps, norm=norm, attacks=["apgd-ce", "apgd-t", "fab-t"])
    assert torch.equal(predicted(model, x_adv) != y, reach < eps)


@pytest.mark.parametrize("version", ["standard", "plus", "rand"])
def test_versions_are_the_librarys(linear, version):
    settings = driver.VERSIONS[version]
    theirs = pyautoattack.AutoAttack(linear, version=version)
    assert list(settings.attacks) == theirs.attacks_to_run
    assert (settings.apgd_restarts, settings.eot_samples) == (
        theirs.apgd.n_restarts,
        theirs.apgd.eot_iter,
    )
    if "fab" in settings.attacks:
        assert settings.fab_restarts == theirs.fab.n_restarts
    assert settings.queries == theirs.square.n_queries


def test_versions_run_their_attacks_on_what_still_stands(images, linear):
    x, y = images
    for version, eot in (("standard", 1), ("rand", 20)):
        counts = Recorder(linear)
        autoattack(counts, x, y, eps=0.03, version=version, attacks=["apgd-ce"], generator=seeded())
        attacked = [size for size in counts.sizes if size == 38]  # two labels were wrong before
        assert len(attacked) == 101 * eot + 1


@pytest.mark.parametrize(
    ("classes", "left_out"), [(2, {"apgd-dlr", "apgd-t"}), (3, {"apgd-t"}), (4, set())]
)
def test_fewer_than_ten_classes(classes, left_out):
    weight = torch.randn(classes, 36, generator=seeded())
    x = torch.rand(6, 1, 6, 6, generator=seeded(1))
    model = lambda x: x.flatten(1) @ weight.T  # noqa: E731
    y = predicted(model, x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x_adv = autoattack(model, x, y, eps=0.5, attacks=GRADIENT_ATTACKS)
    assert {record.category for record in caught} <= {AutoAttackWarning}
    assert {str(record.message).split()[1] for record in caught} == left_out
    assert (predicted(model, x_adv) != y).all()
    if classes == 2:
        with pytest.raises(
            ValueError,
            match=r"none of the attacks \('apgd-dlr',\) can attack 2 classes; add 'apgd-ce'",
        ):
            autoattack(model, x, y, eps=0.1, attacks=["apgd-dlr"])


def test_it_comes_with_the_extra_and_is_imported_when_used(images, linear, monkeypatch):
    monkeypatch.setattr(sj_robust, "attacks", sj_robust.attacks)  # put back after the import below
    for name in [
        name for name in sys.modules if name.startswith(("sj_robust.attacks", "pyautoattack"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    attacks = importlib.import_module("sj_robust.attacks")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sj_robust\[attacks\]'"):
        attacks.autoattack(linear, *images, eps=0.1)
    assert attacks.square(linear, *images, eps=0.1, queries=2).shape == images[0].shape
