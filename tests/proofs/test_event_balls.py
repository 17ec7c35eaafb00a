"""Proofs for changed and for moved events, in binary frames and in frames of numbers of events:
against all frames of the ball, against attacks, and on random networks.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle, product

import pytest
import torch
import torch.nn.functional as F
from covering import mostly_slow
from proofs import fuzz_flips, fuzz_moves
from proofs.event_balls import (
    KINDS,
    NODES,
    SHAPE,
    Kind,
    T,
    by_step,
    entering,
    extremes,
    is_one_of,
    network,
    tiny,
    weights,
)
from proofs.networks import lead
from spikingjelly.activation_based import layer, neuron
from torch import nn
from torch.testing import assert_close

from sj_robust import SpikingClassifier
from sj_robust.attacks import flip_events, move_events, random_flips, random_moves
from sj_robust.core.randomness import SampleSeeds
from sj_robust.proofs import UnsoundBoundsError, changes, verify
from sj_robust.proofs.bounds import BoundedRun, bounded_logits, bounded_neurons
from sj_robust.proofs.changes import Changes, changed_sums, share_frames
from sj_robust.proofs.joint import JointRun
from sj_robust.proofs.moves import MovedEvents, Shifts
from sj_robust.proofs.rules import Bounds
from sj_robust.training import CertifiedOptions
from sj_robust.training.certified import CertifiedLoss

METHODS = ["ibp", "joint", "mip"]
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def convolution(*kernel, biased=False, **options):
    """A convolution of frames with weights of a shape from a source, and perhaps a bias."""

    def convolve(z, source):
        weight = source(*kernel)
        bias = source(len(weight)) if biased else None
        return F.conv2d(z, weight, bias, **options)

    return convolve


plain = convolution(3, 2, 2, 2)


def linear(z, source):
    weight = source(3, 18)
    bias = source(3)
    return F.linear(z.flatten(1), weight, bias)


def scaled(z, source):
    current = plain(z, source)
    return 2.0 - current * source(3, 1, 1)


def negated(z, source):
    return -plain(z, source) / 4.0


def normalised(z, source):
    current = plain((z - 0.4) / 0.2, source)
    statistics = {"running_mean": source(3), "running_var": source(3).abs()}
    return F.batch_norm(current, **statistics, weight=source(3), bias=source(3))


MAPS = {
    "convolution": convolution(3, 2, 2, 2, biased=True),
    "stride": convolution(3, 2, 2, 2, biased=True, stride=2),
    "padding": convolution(3, 2, 3, 3, padding=1),
    "dilation": convolution(2, 2, 2, 2, dilation=2),
    "groups": convolution(4, 1, 2, 2, groups=2),
    "linear": linear,
    "scaled": scaled,
    "negated": negated,
    "normalised": normalised,
}


@every_kind
@pytest.mark.parametrize("name", MAPS)
def test_the_first_map_is_bounded_exactly(kind, name):
    x = kind.apart(1, *SHAPE, seed=5)

    def function(z):
        currents = MAPS[name](by_step(z), weights())
        return currents.unflatten(0, (-1, T))

    for budget in (1, 2):
        ball = kind.ball(x, budget)
        found = MAPS[name](by_step(entering(x, ball)), weights())
        low, high = extremes(function, x[0], ball)
        assert_close(found.least, low)
        assert_close(found.most, high)


SUMS = torch.tensor(
    [
        [1.0, 1.0, 1.0],
        [0.5, -1.0, 0.0],
        [-0.2, 0.3, 2.0],
    ],
    dtype=torch.float64,
)
"""Weights of the steps."""


def moved_sums(x, ball, kernel):
    """How far sums over time of currents can rise and fall."""
    if isinstance(ball, MovedEvents):
        still = Bounds(torch.zeros_like(x), torch.zeros_like(x))
        still.changes = ball.changes(x, summed=False).over_time(SUMS)
        found = F.conv2d(still.flatten(0, 1), kernel).changes
        return found.raised(), found.lowered()
    found = F.conv2d(entering(x, ball).flatten(0, 1), kernel).changes
    steps = [found.moved(operator.itemgetter(t), apart=False) for t in range(T)]
    assert not share_frames(steps)
    return changed_sums(SUMS, steps)


@every_kind
@pytest.mark.parametrize("budget", [1, 2])
def test_sums_over_time_have_one_budget(kind, budget):
    x = kind.apart(1, T, 1, 2, 2, seed=1)
    kernel = weights()(2, 1, 2, 2)

    def function(z):
        currents = F.conv2d(by_step(z), kernel)
        return torch.einsum("ft,nt...->nf...", SUMS, currents.unflatten(0, (-1, T)))

    ball = kind.ball(x, budget)
    rises, falls = moved_sums(x, ball, kernel)
    (middle,) = function(x)
    low, high = extremes(function, x[0], ball)
    assert_close(middle - falls, low)
    assert_close(middle + rises, high)


def test_all_changes_are_those_that_the_threat_contains():
    kind = KINDS["changed counts"]
    x = kind.frames(2, 3, seed=3)
    every = kind.every(x, 2)
    values = torch.arange(-1.0, 6.0).double()
    grid = torch.cartesian_prod(*[values] * 6).view(-1, 2, 3)
    threat = kind.threat(2)
    assert threat.contains(x.expand_as(every), every).all()
    assert int(threat.contains(x.expand_as(grid), grid).sum()) == len(every)


def assert_leads(kind, model, x, y, margins, budget):
    """No sample of the ball has less of a lead than the margins say."""
    for sample, label, margin in zip(x, y, margins, strict=True):
        logits = model(kind.every(sample, budget)).detach()
        labels = label.expand(len(logits))
        assert float(lead(logits, labels).amin()) >= margin


PROVED = [(*case, node) for case, node in zip(product(KINDS, METHODS), cycle(NODES), strict=False)]
QUICK = [case for case in PROVED if case[1] != "mip"]


@pytest.mark.parametrize(("kind", "method", "node"), mostly_slow(PROVED, quick=QUICK))
def test_no_sample_of_the_ball_breaks_what_is_proved(kind, method, node):
    kind = KINDS[kind]
    model = tiny(node=node)
    x, y = kind.classified(model, 3, seed=2)
    result = verify(model, x, y, 2, method=method, time_limit=1.0, **kind.options)
    assert result.counts is kind.counts
    assert ("in frames of event counts" in result.verdict) == kind.counts
    assert ("by 1 frames at most" in result.verdict) == kind.moves
    assert result.apart == ()
    assert kind.threat(2).contains(x, result.x_adv).all()
    assert_leads(kind, model, x, y, result.margin, 2)


@pytest.mark.slow
@every_kind
def test_the_program_agrees_with_all_samples_of_the_ball(kind):
    outcomes = []
    for seed in (3, 13):
        model = tiny(seed)
        x, y = kind.classified(model, 2, seed=seed)
        if kind.counts and kind.moves:
            x[:, :, 1] = 0  # fewer sets of moves
        exact = verify(model, x, y, 2, method="mip", time_limit=60, **kind.options)
        joint = verify(model, x, y, 2, **kind.options)
        assert not any(exact.unknown)
        for number, sample in enumerate(x):
            every = kind.every(sample, 2)
            stands = bool((model(every).argmax(1) == y[number]).all())
            assert exact.verified[number] == stands
            assert stands or not joint.verified[number]
            assert is_one_of(exact.x_adv[number], every)
            outcomes.append(stands)
    assert any(outcomes)
    assert not all(outcomes)


@every_kind
def test_methods_are_in_order_and_no_change_is_the_sample_itself(kind):
    model = tiny(3)
    x, y = kind.classified(model, 6, seed=3)
    before = torch.full((6,), -torch.inf)
    for method in ("ibp", "joint"):
        result = verify(model, x, y, 1, method=method, **kind.options)
        margin = torch.tensor(result.margin)
        assert (margin >= before).all()
        before = margin
    no_change = verify(model, x, y, 0, method="ibp", **kind.options)
    itself = lead(model(x).detach(), y).tolist()
    assert no_change.margin == pytest.approx(itself, abs=1e-4)


@pytest.mark.parametrize("kind", [KINDS["flips"], KINDS["moves"]], ids=["flips", "moves"])
def test_one_budget_for_all_steps_proves_more_than_one_for_each(kind):
    node = neuron.LIFNode(tau=2.0, v_threshold=0.3, decay_input=False)
    parts = [layer.Conv2d(2, 4, 2), node, layer.Flatten(), layer.Linear(16, 3)]
    model = tiny(1) if kind.moves else network(*parts, scale=0.7, seed=5)
    x, y = kind.classified(model, 40, seed=3)
    shared = verify(model, x, y, 1, **kind.options)
    apart = verify(model, x, y, 1, method="ibp", **kind.options)
    assert shared.accuracy > apart.accuracy + 0.1
    if kind.moves:
        by_any_shift = verify(model, x, y, 1, norm="moves")
        for near, far in zip(shared.margin, by_any_shift.margin, strict=True):
            assert near >= far - 1e-12


class Repeated(nn.Module):
    """The sum of all frames in every time step."""

    def forward(self, x):
        return x.mean(0, keepdim=True).expand(x.shape)


class Backwards(nn.Module):
    """The last frame first."""

    def forward(self, x):
        return x.flip(0)


class InTime(nn.Module):
    """Another factor in every step."""

    def forward(self, x):
        return x * torch.arange(1.0, 1.0 + len(x)).view(-1, 1, 1, 1, 1)


def maps(*parts):
    """A network of these layers, a neuron and a linear layer."""
    features = 2 if isinstance(parts[0], layer.AvgPool2d | layer.MaxPool2d) else 8
    node = neuron.IFNode(v_threshold=0.5)
    return network(*parts, node, layer.Flatten(), layer.Linear(features, 3))


APART = [
    ("flips", maps(layer.AvgPool2d(2), layer.Conv2d(2, 2, 1)), "more than one convolution or lin"),
    ("flips", maps(layer.Conv2d(2, 2, 2), layer.Conv2d(2, 2, 1)), "more than one convolution"),
    ("flips", maps(layer.MaxPool2d(2), layer.Conv2d(2, 2, 1)), "every value has its own budget"),
    ("flips", maps(Repeated(), layer.Conv2d(2, 2, 2)), "more than one"),
    ("flips", maps(layer.Conv2d(2, 2, 2), Repeated()), "more than one"),
    ("moves", tiny(before=[Backwards()]), "not the same map of one frame"),
    ("moves", tiny(before=[InTime()]), "not the same map of one frame"),
]


@pytest.mark.parametrize(("kind", "model", "text"), APART)
def test_the_result_says_where_the_budget_is_not_shared(kind, model, text):
    kind = KINDS[kind]
    x, y = kind.classified(model, 2)
    result = verify(model, x, y, 1, **kind.options)
    (entry,) = result.apart
    assert text in entry
    assert "Not bounded by one budget" in result.table()
    assert_leads(kind, model, x, y, result.margin, 1)


def test_counts_of_ones_have_more_changes_than_binary_frames():
    """What a flip means is said, not seen: an event may join a frame that is full."""
    model = tiny(1)
    x, y = KINDS["flips"].classified(model, 12, seed=5)
    binary = torch.tensor(verify(model, x, y, 2, norm="L0").margin)
    counts = torch.tensor(verify(model, x, y, 2, norm="L0", counts=True).margin)
    assert (counts <= binary + 1e-9).all()
    assert (counts < binary - 1e-6).any()


@pytest.mark.parametrize("method", ["ibp", "joint"])
@pytest.mark.parametrize("norm", ["L0", "moves"])
def test_a_sample_alone_has_the_proof_that_it_has_beside_any_other(norm, method):
    """Neighbours with more events, with fewer and with none."""
    model = tiny(2)
    parts = [Kind(norm, most).frames(2, *SHAPE, seed=most) for most in (1, 3, 11)]
    x = torch.cat([*parts, torch.zeros(1, *SHAPE)]).float()
    y = model(x).argmax(1)
    options = {"norm": norm, "counts": True, "method": method}
    together = verify(model, x, y, 2, **options).margin
    for number in range(len(x)):
        rows = slice(number, number + 1)
        (alone,) = verify(model, x[rows], y[rows], 2, **options).margin
        assert alone == pytest.approx(together[number], abs=1e-9)


@every_kind
def test_the_lowest_and_the_drawn_frames_are_of_the_ball(kind):
    x = kind.frames(1, T, 1, 2, 3, seed=2)
    ball = kind.ball(x, 2)
    scores = torch.randn(5, *x.shape[1:], generator=torch.Generator().manual_seed(1)).double()
    every = kind.every(x[0], 2)
    for z, score in zip(ball.lowest(x, scores), scores, strict=True):
        assert is_one_of(z, every)
        found = (z * score).sum()
        if kind.moves:  # one move of a pixel and polarity at most
            assert found <= (x[0] * score).sum()
        else:
            assert_close(found, (every * score).flatten(1).sum(1).amin())
    drawn = ball.drawn(x.expand(50, *x.shape[1:]), torch.Generator().manual_seed(0))
    assert all(is_one_of(one, every) for one in drawn)
    assert not torch.equal(drawn, x.expand_as(drawn))
    assert kind.ball(x, 0).lowest(x, scores[:1]).equal(x)


ATTACKS = {
    "flips": [flip_events, random_flips],
    "changed counts": [flip_events, random_flips],
    "moves": [move_events, random_moves],
    "moved counts": [move_events, random_moves],
}


@pytest.mark.parametrize("name", KINDS)
def test_no_attack_breaks_what_is_proved(name):
    kind = KINDS[name]
    model = tiny(3)
    x, y = kind.classified(model, 20, seed=3)
    result = verify(model, x, y, 1, **kind.options)
    proved = torch.tensor(result.verified)
    assert proved.any()
    options = dict(kind.options)
    options["moves" if options.pop("norm") == "moves" else "flips"] = 1
    for attack in ATTACKS[name]:
        x_adv = attack(model, x, y, generator=SampleSeeds(range(len(x))), **options)
        right = model(x_adv).argmax(1) == y
        assert right[proved].all()
        assert kind.threat(1).contains(x, x_adv).all()


@every_kind
def test_bounds_in_training_are_those_of_proofs(kind):
    model = tiny(1)
    x, y = kind.classified(model, 3)
    leads = {}
    for differentiable in (True, False):
        run = BoundedRun(bounded_neurons(model), 3, differentiable=differentiable)
        logits = bounded_logits(model, run, x, kind.ball(x, 2))
        leads[differentiable] = run.lead(logits, y)
    assert_close(leads[True].double(), leads[False], atol=1e-4, rtol=0)
    leads[True].sum().backward()
    gradient = model.net[0].weight.grad
    assert float(gradient.abs().sum()) > 0


@pytest.mark.parametrize("norm", ["L0", "moves"])
def test_certified_training_takes_counts(norm):
    """Its bounds are those of the proof, and wider than those of binary frames."""
    model = tiny(1)
    x, y = Kind(norm).classified(model, 8, seed=5)
    losses = {}
    for counts in (False, True):
        options = CertifiedOptions(norm=norm, counts=counts)
        losses[counts] = CertifiedLoss(model, 2, options).value(x, y)[0].item()
    assert losses[True] > losses[False]
    x = 2 * x
    value, share = CertifiedLoss(model, 1, options).value(x, y)
    assert torch.isfinite(value)
    verified = verify(model, x, y, 1, norm=norm, counts=True, method="ibp").verified
    assert float(share) == pytest.approx(sum(verified) / len(verified))


def few_seeds(module, seeds, points):
    for seed in seeds:
        total = module.check(seed, points)
        assert total["inputs"] > 0


@pytest.mark.parametrize(
    ("module", "seeds", "points"),
    [
        (fuzz_flips, range(2), 200),
        (fuzz_moves, range(2), 200),
        pytest.param(fuzz_flips, range(2, 14), 600, marks=pytest.mark.slow),
        pytest.param(fuzz_moves, range(2, 14), 600, marks=pytest.mark.slow),
    ],
)
def test_random_networks_stay_within_their_bounds(module, seeds, points):
    few_seeds(module, seeds, points)


def test_the_fuzzer_uses_the_whole_ball():
    kind = KINDS["changed counts"]
    x = kind.frames(6, *SHAPE, seed=4).float()
    threat = kind.threat(5)
    for scores in (torch.rand_like(x), torch.randn_like(x), fuzz_flips.near_a_place(x)):
        z = fuzz_flips.changed(x, scores, kind.ball(x, 5))
        assert threat.contains(x, z).all()
        assert (threat.distance(x, z) == 5).all()


KEPT = {
    "moved sums": JointRun._moved_sums,
    "reach": MovedEvents.reach,
    "gains": MovedEvents.gains,
}
"""What the faults call, as it was."""


def budget_of_each_step(self, weights, chosen):
    """Sums over time of which each step has a budget for one move less than it should."""
    whole = self.changed.changes
    fewer = replace(whole.ball, budget=max(0, whole.ball.budget - 1))
    self.changed.changes = fewer.changes(whole.frames, summed=False)
    return KEPT["moved sums"](self, weights, chosen)


def one_frame_less(ball):
    return replace(ball, largest_shift=max(0, ball.largest_shift - 1))


def short_reach(self, frames):
    return KEPT["reach"](one_frame_less(self), frames)


def short_gains(self, lines, weights):
    return KEPT["gains"](one_frame_less(self), lines, weights)


def half_a_budget(changes, budget, dim):
    """A budget that is shared by the two frames of a move."""
    half = max(1, math.ceil(budget) // 2)
    count = min(half, changes.shape[dim])
    return changes.topk(count, dim).values


def one_too_few(changes, budget, dim):
    count = min(max(1, int(budget) - 1), changes.shape[dim])
    return changes.topk(count, dim).values


def nothing(self):
    return torch.zeros_like(self.up[0])


def exchanged(self, factor):
    return self.opposite()


@dataclass(frozen=True)
class Fault:
    """What stands in place of a function of a module, or of a class, and which fuzzer sees it."""

    fuzzer: object
    owner: object
    name: str
    wrong: Callable[..., object]


FAULTS = {
    "a change too few": Fault(fuzz_flips, changes, "first_changes", one_too_few),
    "no falls": Fault(fuzz_flips, Changes, "lowered", nothing),
    "no rises": Fault(fuzz_flips, Changes, "raised", nothing),
    "sides exchanged": Fault(fuzz_flips, Changes, "scaled", exchanged),
    "half a budget": Fault(fuzz_moves, changes, "first_changes", half_a_budget),
    "no falls by moves": Fault(fuzz_moves, Shifts, "lowered", nothing),
    "a budget of each step": Fault(fuzz_moves, JointRun, "_moved_sums", budget_of_each_step),
    "a window of events too short": Fault(fuzz_moves, MovedEvents, "reach", short_reach),
    "a window of sums too short": Fault(fuzz_moves, MovedEvents, "gains", short_gains),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_noticed(fault, monkeypatch):
    planted = FAULTS[fault]
    monkeypatch.setattr(planted.owner, planted.name, planted.wrong)
    with pytest.raises((AssertionError, UnsoundBoundsError)):
        few_seeds(planted.fuzzer, range(60), 400)


FULL = torch.full((2, *SHAPE), 0.5)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("flips", {"eps": 1.5}, "eps must be an integer >= 0 for L0, the number of values that"),
        ("flips", {"eps": -1}, "eps must be .*>= 0"),
        ("flips", {"eps": 55}, "eps must be <= 54, the values of a sample, got 55"),
        ("flips", {"norm": "L2"}, "norm must be one of"),
        ("flips", {"x": FULL}, "x must be binary event frames .*, got values from 0.5"),
        ("flips", {"x": 4 * FULL}, "for numbers of events pass counts=True"),
        ("flips", {"x": FULL * torch.nan}, "x must be finite, got .* NaN"),
        ("flips", {"largest_shift": 1}, "largest_shift limits moves of events, got 1 for L0; omit"),
        ("flips", {"norm": "Linf", "counts": True}, "counts says what event frames hold, got it"),
        ("changed counts", {"x": FULL}, "numbers of events, got values from 0.5"),
        ("changed counts", {"x": -2 * FULL}, "or numbers of events, got values from -1 to -1"),
        ("moves", {"eps": 1.5}, "eps must be an integer >= 0 for moves, the number of events that"),
        ("moves", {"largest_shift": 0}, "largest_shift must be >= 1"),
        ("moves", {"largest_shift": T}, rf"must be < T = {T}, .* got {T}; for any shift pass"),
        ("moves", {"x": 4 * FULL}, "for numbers of events pass counts=True"),
        ("moved counts", {"x": FULL}, "numbers of events, got values from 0.5"),
    ],
)
def test_wrong_use(kind, options, message):
    given = {"eps": 1, "x": torch.zeros(2, *SHAPE), **KINDS[kind].options, **options}
    with pytest.raises(ValueError, match=message):
        verify(tiny(), y=torch.tensor([0, 1]), **given)


def test_counts_are_said_by_a_truth_value():
    with pytest.raises(TypeError, match="counts must be True or False, got 1"):
        verify(tiny(), torch.zeros(1, *SHAPE), torch.tensor([0]), 1, norm="L0", counts=1)


def test_images_have_no_events_to_move():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), neuron.LIFNode())
    model = SpikingClassifier(net, T=2).eval()
    with pytest.raises(ValueError, match="moves are those of event frames"):
        verify(model, torch.zeros(1, 1, 2, 2), torch.tensor([0]), 1, norm="moves")
