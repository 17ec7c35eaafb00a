"""The attacks of the training modes; their formulas are checked in test_training_step."""

import pytest
import torch
from torch import nn
from unchanged import unchanged

from sj_robust.attacks import SampleSeeds
from sj_robust.training import MODES, training_attack, validation_attacks
from sj_robust.training.modes import trades

EPS = 8 / 255
WITH_IMAGES = [name for name in MODES if name != "none"]


@pytest.fixture
def problem():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(),
        nn.Linear(12, 8),
        nn.BatchNorm1d(8),
        nn.Tanh(),
        nn.Dropout(0.5),
        nn.Linear(8, 3),
    )
    return net.train(), torch.rand(5, 3, 2, 2), torch.tensor([0, 1, 2, 0, 1])


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_the_network_and_the_caller_are_left_as_they_were(problem, name):
    net, x, y = problem
    net[2].eval()
    images = x.clone()
    with unchanged(net):
        x_perturbed = training_attack(name, eps=EPS)(
            net, x, y, generator=torch.Generator().manual_seed(1)
        )
    assert torch.equal(x, images)
    assert (x_perturbed.shape, x_perturbed.dtype, x_perturbed.requires_grad) == (
        x.shape,
        x.dtype,
        False,
    )
    if name != "gaussian":
        assert x_perturbed.min() >= 0
        assert x_perturbed.max() <= 1
        assert (x_perturbed.double() - x.double()).abs().max() <= EPS


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_seeds_of_the_samples_make_every_image_independent_of_its_batch(problem, name):
    net, x, y = problem
    net.double()
    x, seeds = x.double(), SampleSeeds([5, 6, 7, 8, 9])
    attack = training_attack(name, eps=EPS, noise_std=0.02)
    whole = attack(net, x, y, generator=seeds)
    rows = torch.tensor([3, 1])
    part = attack(net, x[rows], y[rows], generator=seeds.rows(rows))
    torch.testing.assert_close(part, whole[rows], rtol=0, atol=1e-12)
    assert not torch.equal(attack(net, x, y, generator=SampleSeeds([0, 1, 2, 3, 4])), whole)


@pytest.mark.parametrize(("name", "start"), [("pgd_at", 0.2), ("trades", 0.005)])
def test_steps_and_their_size(problem, name, start):
    """Their defaults are in test_training_step."""
    net, x, y = problem
    calls = []
    net.register_forward_pre_hook(lambda module, args: calls.append(args[0].detach().clone()))
    training_attack(name, eps=0.2, steps=3, step_size=0.01)(net, x, y, generator=None)
    passes = calls if name == "pgd_at" else calls[1:]  # trades begins with the clean prediction
    assert len(passes) == 3
    assert (passes[0] - x).abs().max() <= start
    moved = (passes[2] - passes[1]).abs()
    inside = moved[(passes[2] > 0) & (passes[2] < 1) & ((passes[2] - x).abs() < 0.199)]
    torch.testing.assert_close(inside[inside > 0], torch.full_like(inside[inside > 0], 0.01))


def test_radii(problem):
    """Gaussian noise leaves the box, the projection can be left out, and validation keeps to the
    ball.
    """
    net, x, y = problem
    assert training_attack("gaussian", eps=0.5)(net, x, y, generator=None).max() > 1
    assert training_attack("none", eps=0.1) is None
    free = training_attack("at", eps=0.01, step_size=0.03, project=False)(net, x, y, generator=None)
    assert (free - x).abs().max() > 0.025
    for attack in validation_attacks(EPS).values():
        assert (
            attack(net, x, y, generator=torch.Generator().manual_seed(0)) - x
        ).abs().max() <= EPS
    assert trades(net, x[:0], y[:0], eps=0.1, step_size=0.1).shape == (0, 3, 2, 2)


def test_the_table():
    assert list(MODES) == ["none", "gaussian", "at", "rat", "pgd_at", "trades", "certified"]
    assert all(mode.name == name for name, mode in MODES.items())
    assert [name for name, mode in MODES.items() if mode.single_step] == ["at", "rat"]
    assert [name for name, mode in MODES.items() if mode.retraction] == ["rat"]
    assert [name for name, mode in MODES.items() if mode.weight_decay == 0] == ["rat", "certified"]
    assert [name for name, mode in MODES.items() if mode.select == "verified"] == ["certified"]


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("free", {}, "mode must be one of none, .* got 'free'"),
        ("pgd_at", {"project": False}, "project=False belongs to modes at and rat"),
        ("at", {"steps": 7}, "steps belongs to modes pgd_at and trades, got steps=7 for at"),
        ("gaussian", {"steps": 1}, "steps belongs"),
    ],
)
def test_wrong_use(mode, options, message):
    with pytest.raises(ValueError, match=message):
        training_attack(mode, eps=0.1, **options)


def test_wrong_numbers(problem):
    net, x, y = problem
    for options, message in (
        ({"noise_std": 0.0}, "noise_std must be finite and > 0"),
        ({"step_size": 0.0}, "step_size"),
        ({"steps": 0}, "steps must be >= 1"),
        ({"eps": 8}, "write 8 / 255"),
    ):
        with pytest.raises(ValueError, match=message):
            trades(net, x, y, **{"eps": 0.1, "step_size": 0.1} | options)
