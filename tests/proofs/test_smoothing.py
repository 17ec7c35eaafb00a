"""Randomised smoothing against a classifier whose probabilities are known, and its parts against
their definitions.
"""

import math
import random

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm
from torch import nn

from sj_robust.attacks import pgd
from sj_robust.classifier import PoissonEncoder, SpikingClassifier
from sj_robust.core.randomness import SampleSeeds
from sj_robust.models import NetworkSpec, build_network
from sj_robust.proofs import SmoothedClassifier, smooth

HALF_SPACE = nn.Linear(2, 2, bias=False)
HALF_SPACE.weight = nn.Parameter(torch.eye(2))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def points(*distances):
    """Images of two pixels, whose difference is given; the half space ends where there is none."""
    half = torch.tensor(distances) / 2
    return torch.stack((0.5 + half, 0.5 - half), 1)


def vote(x, *, sigma=0.25, n=300, generator=None, **options):
    """The smoothed half space at some images."""
    generator = generator or seeded()
    return smooth(HALF_SPACE, x, sigma, n=n, generator=generator, **options)


def few_votes(model, x, *, sigma=0.25, n0=10, n=50, seed=0, **options):
    """Any network smoothed, in a moment."""
    return smooth(model, x, sigma, n0=n0, n=n, generator=seeded(seed), **options)


def test_radius_of_a_half_space_stays_below_the_true_distance_and_comes_near_it():
    """The smoothed classifier is the linear one, and its true radius the distance to the border."""
    distances = (0.05, 0.1, 0.2, 0.3)
    result = vote(points(*distances), n=20_000, batch_size=10_000)
    assert result.prediction == (0, 0, 0, 0)
    for radius, distance in zip(result.radius, distances, strict=True):
        truth = distance / math.sqrt(2)
        assert truth - 0.02 <= radius <= truth


def test_count_gives_the_exact_binomial_bound():
    """Clopper and Pearson: at p, that many successes or more have the probability alpha."""
    result = vote(points(0.2), n=500, alpha=0.01)
    p = norm.cdf(result.radius[0] / 0.25)
    tail = binom.sf(result.count[0] - 1, 500, p)
    assert tail == pytest.approx(0.01, rel=1e-4)


def test_error_happens_no_more_often_than_alpha():
    """400 votes of one image at a level of 0.2: about a fifth of the radii exceed the truth."""
    x = points(0.12).expand(400, 2)
    result = vote(x, n0=20, n=50, alpha=0.2)
    truth = 0.12 / math.sqrt(2)
    wrong = sum(radius > truth for radius in result.radius)
    assert 0 < wrong <= binom.ppf(0.999, 400, 0.2)


def test_undecided_votes_abstain_and_certify_nothing():
    result = vote(points(0.0, 0.0), sigma=0.5, n=5000)
    assert result.prediction == (-1, -1)
    assert result.radius == (0.0, 0.0)
    assert result.abstained == 1.0
    assert result.certified(torch.tensor([0, 1])) == (False, False)


def test_seeds_of_samples_make_results_independent_of_neighbours_and_of_the_batch_size():
    x = torch.rand(4, 2, generator=seeded(1))
    together = vote(x, generator=SampleSeeds([5, 6, 7, 8]))
    alone = vote(x[2:3], batch_size=128, generator=SampleSeeds([7]))
    assert together.count[2:3] == alone.count
    same_image = vote(x[:1].expand(8, 2))
    assert len(set(same_image.count)) > 1


def spiking(*, encoder=None, shape=(1, 8, 8), channels=(4, 4)):
    torch.manual_seed(0)
    net = build_network(NetworkSpec(channels=channels, image_shape=shape))
    return SpikingClassifier(net, T=4, encoder=encoder).eval()


def test_the_certified_share_of_a_spiking_network_falls_with_the_radius():
    done = []
    x = torch.rand(3, 1, 8, 8)
    result = few_votes(spiking(), x, sigma=0.1, n=100, on_image=done.append)
    assert done == [1, 2, 3]
    y = torch.tensor(result.prediction)
    shares = [sum(result.certified(y, radius)) for radius in (0.0, 0.05, 0.1, 1.0)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == 0


def test_draws_of_an_encoder_are_part_of_the_probability_and_can_be_repeated():
    model = spiking(encoder=PoissonEncoder(), shape=(1, 4, 4), channels=(2,))
    x = torch.rand(2, 1, 4, 4)
    one = few_votes(model, x, seed=3)
    other = few_votes(model, x, seed=3)
    assert one == other
    # Noise so small that it cannot turn a vote: what is left is the encoder's own.
    still = few_votes(model, x, sigma=1e-6, seed=3)
    assert 0 < min(still.count) < 50


class Doubtful(nn.Module):
    """The class of a coin of its own, whatever the image: 1 in a quarter of the draws."""

    def forward(self, x):
        drawn = torch.rand(len(x))
        tails = (drawn < 0.25).float() + 0.0 * x.sum(1)
        return torch.stack((1 - tails, tails), 1)


class Matching(nn.Module):
    """Class 0 where its own draw is above the noise: in half of the draws."""

    def forward(self, x):
        noise = (x - 0.5) / 0.25
        drawn = torch.randn(x.shape)
        above = (drawn > noise).float()[:, :1]
        return torch.cat((above, 1 - above), 1)


def test_draws_of_the_network_have_nothing_to_do_with_the_noise():
    x = points(0.0, 0.0)
    doubtful = few_votes(Doubtful(), x, n0=100, n=500)
    assert doubtful.prediction == (0, 0)
    matching = few_votes(Matching(), x, n0=100, n=500)
    for count in matching.count:
        assert 190 < count < 310


def coin(draw):
    """A network that gives all images of a forward class 0 in seven of ten, by one coin."""

    def model(x):
        heads = float(draw() < 0.7)
        return torch.tensor([[heads, 1.0 - heads]]).expand(len(x), 2)

    return model


COINS = {
    "torch": lambda: float(torch.rand(())),
    "numpy": lambda: float(np.random.rand()),  # noqa: NPY002  # a network that does so
    "python": random.random,
}


def global_states():
    """Of the generators of Python and numpy, which a network may draw from."""
    numbers = np.random.get_state()[1]  # noqa: NPY002  as above
    return random.getstate(), numbers.tolist()


@pytest.mark.parametrize("draw", COINS)
def test_draws_do_not_share_a_coin_of_the_network(draw):
    """p = 0.7 whatever the image, so that no radius may exceed that of 0.7 more often than alpha.

    With one coin per forward a batch would vote as one, and p be 1 in seven of ten images.
    """
    x = points(0.0).expand(20, 2)
    model = coin(COINS[draw])
    before = global_states()
    result = few_votes(model, x, n0=20, n=100, alpha=0.05)
    assert global_states() == before
    truth = 0.25 * norm.ppf(0.7)
    wrong = sum(radius > truth for radius in result.radius)
    assert wrong <= binom.ppf(0.999, 20, 0.05)
    for count, prediction in zip(result.count, result.prediction, strict=True):
        assert prediction != 0 or 50 <= count <= 88
    again = few_votes(model, x, n0=20, n=100, alpha=0.05)
    assert result == again


def turned(mean):
    """Logits of class 0 where a mean [N] is high."""
    return torch.stack((mean - 0.5, 0.5 - mean), 1)


def mixed_if(condition):
    """A network that mixes the rows of a batch of some sizes only."""

    def model(x):
        mean = x.mean(1)
        return turned(mean - mean.mean() + 0.6 if condition(len(x)) else mean)

    return model


def row_before(x):
    """Every row sees the one before it."""
    mean = x.mean(1)
    return turned(mean + torch.cat((torch.zeros(1), mean[:-1])) - 0.2)


def one_in_many(x):
    """A row far from the others, which is rare, turns all of them."""
    return turned((x[:, 0].max() <= 1.2).float().expand(len(x)))


MODELS = {
    "mean": lambda x: HALF_SPACE(x - x.mean(0)),
    "first decides": lambda x: turned((x[0].mean() > 0.5).float().expand(len(x))),
    "row before": row_before,
    "in batches above 20": mixed_if(lambda size: size > 20),
    "in the smaller batches": mixed_if(lambda size: size == 5),
    "in a later batch": one_in_many,
    "plain": HALF_SPACE,
    "coin": coin(COINS["torch"]),
    "encoder": spiking(encoder=PoissonEncoder(), shape=(1, 4, 4), channels=(2,)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_batch_size_changes_nothing(kind):
    shape = (1, 4, 4) if kind == "encoder" else (2,)
    x = torch.rand(2, *shape, generator=seeded(2))
    draws = 400 if kind == "in a later batch" else 60
    found = {few_votes(MODELS[kind], x, n=draws, batch_size=size, seed=4) for size in (1, 7, 64)}
    assert len(found) == 1


class Counts(nn.Module):
    """The half space, which counts its forwards."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, x):
        self.count += 1
        return HALF_SPACE(x)


@pytest.mark.parametrize("batch_size", [1, 256])
def test_a_network_whose_forward_changes_what_it_holds_is_refused(batch_size):
    with pytest.raises(ValueError, match=r"forward pass in evaluation mode, but one changes count"):
        smooth(Counts(), torch.rand(1, 2), 0.25, n0=10, n=10, batch_size=batch_size)


@pytest.mark.parametrize("draws", [False, True])
def test_a_network_that_keeps_a_state_is_refused(draws):
    seen = []

    def remembers(x):
        seen.append(1.0)
        noise = torch.rand(len(x), 1) if draws else 0.0
        return HALF_SPACE(x) + len(seen) + noise

    with pytest.raises(ValueError, match="one that keeps a state .* wrap a spiking network"):
        smooth(remembers, torch.rand(1, 2), 0.25, n0=10, n=10)


def test_attacks_go_through_the_noise_of_one_draw():
    model = SmoothedClassifier(HALF_SPACE, 0.25)
    x = points(0.1)
    y = torch.tensor([0])
    steps = {"step_size": 0.05, "steps": 10, "eot_samples": 16}
    x_adv = pgd(model, x, y, eps=0.2, generator=seeded(), **steps)
    before = smooth(HALF_SPACE, x, 0.25, generator=seeded())
    after = smooth(HALF_SPACE, x_adv, 0.25, generator=seeded())
    assert before.prediction == (0,)
    assert after.prediction == (1,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generator": SampleSeeds([1])}, "one seed per image"),
        ({"x": torch.rand(0, 2)}, "at least one image"),
        ({"model": lambda x: x[:, :, None]}, "logits must be"),
    ],
)
def test_wrong_use_is_named(changes, message):  # other arguments are in test_arguments
    right = {"model": HALF_SPACE, "x": torch.rand(2, 2), "sigma": 0.25}
    with pytest.raises(ValueError, match=message):
        smooth(**right | changes)


def test_labels_of_another_length_are_refused():
    result = smooth(HALF_SPACE, torch.rand(2, 2), 0.25, n0=5, n=5)
    with pytest.raises(ValueError, match=r"y must have shape \[N\] = \[2\]"):
        result.certified(torch.tensor([0]))
