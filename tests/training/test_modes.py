"""The attacks of the training modes; their formulas are checked in test_training_step."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from unchanged import unchanged

from sj_robust.attacks import SampleSeeds, ThreatModel
from sj_robust.training import MODES, training_attack, validation_attacks
from sj_robust.training.modes import event_training_attack, trades

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
    x = torch.rand(5, 3, 2, 2)
    y = torch.arange(5) % 3
    return net.train(), x, y


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_the_network_and_the_caller_are_left_as_they_were(problem, name):
    net, x, y = problem
    net[2].eval()
    images = x.clone()
    attack = training_attack(name, eps=EPS)
    with unchanged(net):
        x_perturbed = attack(net, x, y, generator=seeded(1))
    assert torch.equal(x, images)
    assert x_perturbed.shape == x.shape
    assert x_perturbed.dtype == x.dtype
    assert not x_perturbed.requires_grad
    if name != "gaussian":
        assert x_perturbed.min() >= 0
        assert x_perturbed.max() <= 1
        moved = x_perturbed.double() - x.double()
        assert moved.abs().max() <= EPS


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_seeds_of_the_samples_make_every_image_independent_of_its_batch(problem, name):
    net, x, y = problem
    net.double()
    x = x.double()
    seeds = SampleSeeds([5, 6, 7, 8, 9])
    attack = training_attack(name, eps=EPS, noise_std=0.02)
    whole = attack(net, x, y, generator=seeds)
    rows = torch.tensor([3, 1])
    their_seeds = seeds.rows(rows)
    part = attack(net, x[rows], y[rows], generator=their_seeds)
    assert_close(part, whole[rows], rtol=0, atol=1e-12)
    other_seeds = SampleSeeds([0, 1, 2, 3, 4])
    other = attack(net, x, y, generator=other_seeds)
    assert not torch.equal(other, whole)


def test_radii(problem):
    """Gaussian noise leaves the box, the projection can be left out, and validation keeps to the
    ball.
    """
    net, x, y = problem
    assert training_attack("none", eps=0.1) is None
    gaussian = training_attack("gaussian", eps=0.5)
    noisy = gaussian(net, x, y, generator=None)
    assert noisy.max() > 1
    free = training_attack("at", eps=0.01, step_size=0.03, project=False)
    x_perturbed = free(net, x, y, generator=None)
    assert (x_perturbed - x).abs().max() > 0.025
    for attack in validation_attacks(EPS).values():
        x_perturbed = attack(net, x, y, generator=seeded(0))
        assert (x_perturbed - x).abs().max() <= EPS
    nothing = trades(net, x[:0], y[:0], eps=0.1, step_size=0.1)
    assert nothing.shape == (0, 3, 2, 2)


@pytest.mark.parametrize("mode", ["at", "rat", "pgd_at"])
@pytest.mark.parametrize(
    "threat",
    [
        ThreatModel("L0", 3),
        ThreatModel("L0", 3, counts=True),
        ThreatModel("moves", 3, largest_shift=1),
    ],
    ids=str,
)
def test_event_frames_are_attacked_by_events_within_the_budget(mode, threat):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(72, 3))
    x = (torch.rand(12, 4, 2, 3, 3) < 0.4).float() * (3 if threat.counts else 1)
    y = net(x).argmax(1)
    with unchanged(net):
        found = event_training_attack(mode, threat)(net, x, y, generator=SampleSeeds(range(12)))
    assert threat.contains(x, found).all()
    assert threat.holds_events(found).all()
    losses = [nn.functional.cross_entropy(net(frames), y) for frames in (x, found)]
    assert losses[1] > losses[0] + 0.05


def test_one_gradient_spends_the_whole_budget_and_several_look_again():
    forwards = {}
    x = torch.zeros(1, 4, 2, 3, 3)
    for mode in ("at", "pgd_at"):
        seen = []

        def model(z, seen=seen):
            seen.append(z.detach())
            logit = z.flatten(1).sum(1)
            return torch.stack([torch.full_like(logit, 99.0), logit], 1)

        event_training_attack(mode, ThreatModel("L0", 7))(model, x, torch.tensor([0]))
        forwards[mode] = [int(z.sum()) for z in seen]
    assert max(forwards["at"]) == max(forwards["pgd_at"]) == 7
    assert set(forwards["at"]) == {0, 7}
    assert set(forwards["pgd_at"]) == set(range(8))
