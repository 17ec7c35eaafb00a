"""Proofs for at most k events added and removed in frames of numbers of events: against all sets of
changes.
"""

import pytest
import torch
import torch.nn.functional as F
from proofs import fuzz_flips, test_flips
from proofs.moved import entering
from proofs.networks import lead
from proofs.test_flips import MAPS, SHAPE, by_step, tiny, weights
from torch.testing import assert_close

from sj_robust.attacks import ThreatModel, flip_events, random_flips
from sj_robust.core.randomness import SampleSeeds
from sj_robust.proofs import verify
from sj_robust.proofs.bounds import BoundedRun
from sj_robust.proofs.changes import changed_sums
from sj_robust.proofs.flips import Flips
from sj_robust.proofs.moves import Moves
from sj_robust.proofs.open_events import open_events
from sj_robust.proofs.verification import bounded_logits, bounded_neurons
from sj_robust.training import CertifiedOptions
from sj_robust.training.certified import CertifiedLoss


def each_slow(seeds):
    """Seeds for the slow tests."""
    return [pytest.param(seed, marks=pytest.mark.slow) for seed in seeds]


def counted(*shape, most=3, seed=0):
    """Numbers of events, half of them 0."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-most, most + 1, shape, generator=generator)
    return drawn.clamp(min=0).double()


def every_change(sample, most):
    """A sample with every set of at most so many events added and removed, [sets, *]."""
    found = {tuple(sample.flatten().tolist())}
    for _ in range(most):
        longer = set(found)
        for values in found:
            for place in range(len(values)):
                for step in (-1.0, 1.0):
                    if values[place] + step >= 0:
                        longer.add((*values[:place], values[place] + step, *values[place + 1 :]))
        found = longer
    return torch.tensor(sorted(found), dtype=sample.dtype).view(-1, *sample.shape)


def extremes(function, x, budget):
    """Least and largest value of every element over all sets of changes of a sample [T, *]."""
    values = torch.stack([function(one) for one in every_change(x, budget)])
    return values.amin(0), values.amax(0)


def classified(model, count, *, seed=0):
    x = counted(count, *SHAPE, seed=seed).float()
    return x, model(x).argmax(1)


def test_all_changes_are_those_that_the_threat_contains():
    x = counted(2, 3, seed=3)
    threat = ThreatModel("L0", 2, counts=True)
    every = every_change(x, 2)
    grid = torch.cartesian_prod(*[torch.arange(-1.0, 6.0).double()] * 6).view(-1, 2, 3)
    inside = threat.contains(x.expand_as(grid), grid)
    assert int(inside.sum()) == len(every)
    assert threat.contains(x.expand_as(every), every).all()


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("budget", [1, 2])
def test_the_first_map_is_bounded_exactly(name, budget):
    x = counted(1, *SHAPE, seed=budget)

    def function(z):
        return MAPS[name](by_step(z), weights())

    found = function(entering(x, Flips(budget, counts=True)))
    low, high = extremes(function, x[0], budget)
    assert_close(found.least, low)
    assert_close(found.most, high)


def test_of_many_inputs_a_single_one_may_gain_all_events():
    x = torch.zeros(1, 1, 400).double()
    kernel = weights()(5, 400)
    found = F.linear(entering(x, Flips(4, counts=True)), kernel)
    assert_close(found.most.flatten(), 4 * kernel.amax(1))
    assert_close(found.least.flatten(), 4 * kernel.amin(1))


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_sums_over_time_have_one_budget(budget):
    x = counted(1, 3, 1, 2, 2, seed=1)
    kernel = weights()(2, 1, 2, 2)
    sums = torch.tensor([[1.0, 1.0, 1.0], [0.5, -1.0, 0.0], [-0.2, 0.3, 2.0]]).double()

    def function(z):
        return torch.tensordot(sums, F.conv2d(z, kernel), 1)

    bounds = F.conv2d(entering(x, Flips(budget, counts=True)).flatten(0, 1), kernel)
    steps = [bounds.changes.moved(lambda part, t=t: part[t], apart=False) for t in range(3)]
    rises, falls = changed_sums(sums, steps)
    middle = function(x[0])
    low, high = extremes(function, x[0], budget)
    assert_close(middle - falls, low)
    assert_close(middle + rises, high)


@pytest.mark.parametrize("method", ["ibp", "joint", "crown", "bab", "mip"])
def test_no_set_of_changes_breaks_what_is_proved(method):
    proved = 0
    for seed in range(2):
        model = tiny(seed)
        x, y = classified(model, 6, seed=seed + 2)
        result = verify(model, x, y, 2, norm="L0", counts=True, method=method)
        proved += sum(result.verified)
        assert result.counts is True
        assert "in frames of event counts" in result.verdict
        for sample, label, margin in zip(x, y, result.margin, strict=True):
            logits = model(every_change(sample, 2)).detach()
            leads = lead(logits, label.expand(len(logits)))
            assert float(leads.amin()) >= margin
        threat = ThreatModel("L0", 2, counts=True)
        assert threat.contains(x, result.x_adv).all()
    assert proved > 0


@pytest.mark.slow
def test_the_program_agrees_with_all_sets_of_changes():
    outcomes = []
    for seed in range(3):
        model = tiny(seed)
        x, y = classified(model, 3, seed=seed)
        result = verify(model, x, y, 2, norm="L0", counts=True, method="mip")
        assert not any(result.unknown)
        for number, sample in enumerate(x):
            classes = model(every_change(sample, 2)).argmax(1)
            stands = bool((classes == y[number]).all())
            assert result.verified[number] == stands
            outcomes.append(stands)
    assert any(outcomes)
    assert not all(outcomes)


def test_no_attack_breaks_what_is_proved():
    model = tiny(3)
    x, y = classified(model, 40, seed=3)
    verified = torch.tensor(verify(model, x, y, 2, norm="L0", counts=True).verified)
    assert verified.any()
    for attack in (flip_events, random_flips):
        x_adv = attack(model, x, y, flips=2, counts=True, generator=SampleSeeds(range(len(x))))
        assert (model(x_adv).argmax(1) == y)[verified].all()


def test_counts_of_ones_have_more_changes_than_binary_frames():
    """What a flip means is said, not seen: an event may join a frame that is full."""
    model = tiny(1)
    x = (counted(12, *SHAPE, seed=5) > 0).float()
    y = model(x).argmax(1)
    binary = torch.tensor(verify(model, x, y, 2, norm="L0").margin)
    counts = torch.tensor(verify(model, x, y, 2, norm="L0", counts=True).margin)
    assert (counts <= binary + 1e-9).all()
    assert (counts < binary - 1e-6).any()


@pytest.mark.parametrize("norm", ["L0", "moves"])
@pytest.mark.parametrize("method", ["ibp", "joint", "crown"])
def test_a_sample_alone_has_the_proof_that_it_has_beside_any_other(norm, method):
    model = tiny(2)
    parts = [counted(3, *SHAPE, most=most, seed=most) for most in (1, 3, 11)]
    x = torch.cat([*parts, torch.zeros(1, *SHAPE)]).float()
    y = model(x).argmax(1)
    given = {"norm": norm, "counts": True, "method": method}
    together = verify(model, x, y, 2, **given).margin
    for number in range(len(x)):
        rows = slice(number, number + 1)
        (alone,) = verify(model, x[rows], y[rows], 2, **given).margin
        assert alone == pytest.approx(together[number], abs=1e-9)


def test_the_lowest_frames_are_the_lowest_of_the_ball():
    x = counted(1, *SHAPE, seed=2)
    ball = Flips(2, counts=True)
    scores = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(1)).double()
    every = every_change(x[0], 2)
    for z, score in zip(ball.lowest(x, scores), scores, strict=True):
        assert any(torch.equal(z, other) for other in every)
        assert_close((z * score).sum(), (every * score).flatten(1).sum(1).amin())
    drawn = ball.drawn(x.expand(50, *SHAPE), torch.Generator().manual_seed(0))
    threat = ThreatModel("L0", 2, counts=True)
    assert threat.contains(x.expand_as(drawn), drawn).all()
    assert (threat.distance(x.expand_as(drawn), drawn) > 0).any()
    assert Flips(0, counts=True).lowest(x, scores[:1]).equal(x)


def test_no_value_that_is_ruled_out_breaks_a_sample():
    ruled_out = broken = 0
    for seed in range(3):
        model = tiny(seed)
        x, y = classified(model, 3, seed=seed)
        found = open_events(model, x, y, Flips(1, counts=True))
        for number, sample in enumerate(x):
            every = every_change(sample, 1)
            breaks = model(every).argmax(1) != y[number]
            touched = every[breaks] != sample
            broken += int(breaks.sum())
            assert (found.is_open[number] & touched).flatten(1).any(1).all()
            ruled_out += int((~found.is_open[number] & (found.falls[number] > 0)).sum())
    assert broken > 0
    assert ruled_out > 0


@pytest.mark.parametrize("norm", ["L0", "moves"])
def test_certified_training_takes_counts(norm):
    """Its bounds are those of the proof, and wider than those of binary frames."""
    model = tiny(1)
    x = (counted(8, *SHAPE, seed=5) > 0).float()
    y = model(x).argmax(1)
    losses = {}
    for counts in (False, True):
        options = CertifiedOptions(norm=norm, counts=counts)
        losses[counts] = CertifiedLoss(model, 2, options).value(x, y)[0].item()
    assert losses[True] > losses[False]
    x = 2 * x
    value, share = CertifiedLoss(model, 1, CertifiedOptions(norm=norm, counts=True)).value(x, y)
    assert torch.isfinite(value)
    verified = verify(model, x, y, 1, norm=norm, counts=True, method="ibp").verified
    assert float(share) == pytest.approx(sum(verified) / len(verified))


def test_wrong_use():
    model = tiny()
    x = 2 * torch.ones(1, *SHAPE)
    y = torch.tensor([0])
    for norm in ("L0", "moves"):
        with pytest.raises(ValueError, match="for numbers of events pass counts=True"):
            verify(model, x, y, 1, norm=norm)
        with pytest.raises(ValueError, match="numbers of events, got values from 0 to 0.5"):
            verify(model, test_flips.frames(1, *SHAPE).float() / 2, y, 1, norm=norm, counts=True)
    with pytest.raises(ValueError, match="counts says what event frames hold, got it for Linf"):
        verify(model, torch.ones(1, *SHAPE), y, 0.1, counts=True)
    with pytest.raises(TypeError, match="counts must be True or False, got 1"):
        verify(model, x, y, 1, norm="L0", counts=1)


def test_a_wrong_ball_is_noticed(monkeypatch):
    """Bounds of fewer changes than there are: the fuzzer's comparison sees it."""
    model = tiny(0)
    x, _ = classified(model, 4, seed=1)
    run = BoundedRun(bounded_neurons(model), len(x))
    few = bounded_logits(model, run, x, Flips(1, counts=True))
    ball = Flips(6, counts=True)
    drawn = ball.drawn(x.repeat(50, 1, 1, 1, 1), torch.Generator().manual_seed(0))
    logits = model(drawn).detach().view(50, *few.shape)
    assert ((logits < few.lower) | (logits > few.upper)).any()


@pytest.mark.parametrize("seed", [0, *each_slow(range(1, 8))])
def test_the_fuzzer_finds_nothing(seed):
    total = fuzz_flips.check(seed, 150)
    assert total["inputs"] > 0


def test_the_fuzzer_stays_in_the_ball():
    x = counted(6, *SHAPE, seed=4).float()
    threat = ThreatModel("L0", 5, counts=True)
    for scores in (torch.rand_like(x), torch.randn_like(x), fuzz_flips.near_a_place(x)):
        z = fuzz_flips.changed(x, scores, Flips(5, counts=True))
        assert threat.contains(x, z).all()
        assert (threat.distance(x, z) == 5).all()


def test_moves_of_counts_may_share_a_place():
    x = torch.ones(1, 2, 1, 1, 1)
    onto = torch.tensor([[[[[-1.0]]], [[[0.0]]]]])
    assert Moves(1, 1).lowest(x, onto).flatten().tolist() == [1.0, 1.0]
    assert Moves(1, 1, counts=True).lowest(x, onto).flatten().tolist() == [2.0, 0.0]
