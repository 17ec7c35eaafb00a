"""Proofs for changed and for moved events, in binary frames and in frames of numbers of events,
against all frames of the ball.
"""

import operator
from itertools import cycle

import pytest
import torch
import torch.nn.functional as F
from proofs import fuzz
from proofs.event_balls import (
    KINDS,
    NODES,
    SHAPE,
    Kind,
    T,
    by_step,
    entering,
    extremes,
    frames,
    is_one_of,
    lines_reached,
    network,
    tiny,
    weights,
)
from proofs.formulas import on_bounds
from spikingjelly.activation_based import layer, neuron
from torch import nn
from torch.testing import assert_close

from sj_robust import SpikingClassifier
from sj_robust.attacks import ThreatModel, flip_events, move_events, random_flips, random_moves
from sj_robust.core.randomness import SampleSeeds
from sj_robust.proofs import changes, moves, verify
from sj_robust.proofs.bounds import BoundedRun, bounded_logits, bounded_neurons
from sj_robust.proofs.changes import Flips, changed_sums, share_frames
from sj_robust.proofs.moves import MovedEvents
from sj_robust.proofs.rules import Bounds
from sj_robust.training.certified import CertifiedLoss

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
both = pytest.mark.parametrize("kind", [KINDS["flips"], KINDS["moves"]], ids=["flips", "moves"])


def convolution(*kernel, **options):
    """A convolution of frames with weights of a shape, and a bias, from a source."""
    return lambda z, source: F.conv2d(z, source(*kernel), source(kernel[0]), **options)


plain = convolution(3, 2, 2, 2)


def normalised(z, source):
    current = plain((z - 0.4) / 0.2, source)
    statistics = {"running_mean": source(3), "running_var": source(3).abs()}
    return F.batch_norm(current, **statistics, weight=source(3), bias=source(3))


MAPS = {
    "convolution": plain,
    "stride": convolution(3, 2, 2, 2, stride=2),
    "padding": convolution(3, 2, 3, 3, padding=1),
    "dilation": convolution(2, 2, 2, 2, dilation=2),
    "groups": convolution(4, 1, 2, 2, groups=2),
    "linear": lambda z, source: F.linear(z.flatten(1), source(3, 18), source(3)),
    "scaled": lambda z, source: 2.0 - plain(z, source) * source(3, 1, 1),
    "negated": lambda z, source: -plain(z, source) / 4.0,
    "normalised": normalised,
}
BUDGETS = [(1, 1), (2, 1), (2, 2), (3, 1)]
"""Changes, and the largest shift of moves."""


def currents(name, z):
    """Step by step."""
    return MAPS[name](by_step(z), weights()).unflatten(0, (-1, T))


@every_kind
@pytest.mark.parametrize("name", MAPS)
def test_the_first_map_is_bounded_exactly(kind, name):
    x = kind.apart(1, *SHAPE, seed=5)
    for budget, shift in BUDGETS[: 4 if kind.moves and name == "convolution" else 2]:
        ball = kind.ball(x, budget, shift)
        found = on_bounds(lambda z: MAPS[name](by_step(z), weights()), entering(x, ball))
        low, high = extremes(lambda z: currents(name, z), x[0], ball)
        assert_close(found.least, low)
        assert_close(found.most, high)


@pytest.mark.parametrize("name", MAPS)
def test_float32_sums_have_their_rounding_beside_changes(name):
    run = BoundedRun({}, 1)
    run.rounded = False
    run.narrow = True
    x = frames(1, *SHAPE)

    def function(z):
        source = weights()
        return MAPS[name](by_step(z), lambda *shape: source(*shape).float().double())

    wide = entering(x, Flips(2))
    narrow = Bounds(x.float(), wide.radius.float(), run=run, changes=wide.changes)
    found = on_bounds(function, narrow)
    low, high = extremes(lambda z: function(z).unflatten(0, (-1, T)), x[0], Flips(2))
    assert found.radius.dtype == torch.float32
    assert found.changes is None
    assert on_bounds(lambda z: z + 0.1, narrow).changes is None
    assert (found.least.double() <= low).all()
    assert (found.most.double() >= high).all()
    rounded = on_bounds(function, Bounds(x.float(), torch.zeros_like(narrow.radius), run=run))
    assert (rounded.radius > 0).all()


SUMS = torch.tensor([[1.0, 1.0, 1.0], [0.5, -1.0, 0.0], [-0.2, 0.3, 2.0]]).double()
"""Weights of the steps."""


def moved_sums(x, ball, kernel):
    """How far sums over time of currents can rise and fall."""
    if isinstance(ball, MovedEvents):
        still = Bounds(torch.zeros_like(x), torch.zeros_like(x))
        still.changes = ball.changes(x, summed=False).over_time(SUMS)
        found = on_bounds(lambda z: F.conv2d(z.flatten(0, 1), kernel), still).changes
        return found.raised(), found.lowered()
    found = on_bounds(lambda z: F.conv2d(z.flatten(0, 1), kernel), entering(x, ball)).changes
    steps = [found.moved(operator.itemgetter(t), apart=False) for t in range(T)]
    assert not share_frames(steps)
    return changed_sums(SUMS, steps)


@every_kind
@pytest.mark.parametrize("budget", [1, 2])
def test_sums_over_time_have_one_budget(kind, budget):
    x = kind.apart(1, T, 1, 2, 2, seed=1)
    kernel = weights()(2, 1, 2, 2)

    def function(z):
        found = F.conv2d(by_step(z), kernel)
        return torch.einsum("ft,nt...->nf...", SUMS, found.unflatten(0, (-1, T)))

    ball = kind.ball(x, budget)
    rises, falls = moved_sums(x, ball, kernel)
    (middle,) = function(x)
    low, high = extremes(function, x[0], ball)
    assert_close(middle - falls, low)
    assert_close(middle + rises, high)


def test_steps_that_see_the_same_frames_are_noticed():
    x = frames(1, 2, 1, 2, 2)
    summed = on_bounds(
        lambda z: F.linear(z.flatten(1), weights()(3, 8)), entering(x, Flips(1))
    ).changes
    assert share_frames([summed, summed])  # it is moved by several frames
    one = on_bounds(
        lambda z: F.conv2d(z.flatten(0, 1), weights()(2, 1, 2, 2)), entering(x, Flips(1))
    ).changes
    assert not share_frames([one])
    assert share_frames([one, one])


def test_of_many_inputs_the_largest_weights_are_enough_or_all_are_looked_at(monkeypatch):
    x = frames(3, 1, 400, seed=4)
    kernel = weights()(5, 400)
    kernel[0] = kernel[0].abs() + 0.1
    largest = kernel[0].topk(150).indices
    x[0, :, largest] = 1  # which none of its largest weights can raise
    found = on_bounds(lambda z: F.linear(z, kernel), entering(x, Flips(2)))
    monkeypatch.setattr(changes, "_CANDIDATES", 1000)
    whole = on_bounds(lambda z: F.linear(z, kernel), entering(x, Flips(2)))
    assert torch.equal(found.most, whole.most)
    assert torch.equal(found.least, whole.least)
    kernel = weights()(5, 400)  # of which one value may gain all events
    alone = on_bounds(lambda z: F.linear(z, kernel), entering(0 * x[:1], Flips(4, counts=True)))
    assert_close(alone.most.flatten(), 4 * kernel.amax(1))
    assert_close(alone.least.flatten(), 4 * kernel.amin(1))


def test_a_budget_between_two_integers_counts_the_next_change_in_part():
    z = {budget: entering(frames(1, *SHAPE), Flips(budget)) for budget in (0.0, 1.0, 1.25, 2.0)}
    ends = {
        budget: on_bounds(lambda z: plain(by_step(z), weights()), one) for budget, one in z.items()
    }
    assert_close(ends[1.25].most, 0.75 * ends[1.0].most + 0.25 * ends[2.0].most)
    assert_close(ends[0.0].most, ends[0.0].centre)


def test_a_step_whose_events_are_in_each_others_way_is_bounded():
    x = frames(1, *SHAPE, seed=5)
    ball = MovedEvents.of(x, 2, 1)
    found = on_bounds(lambda z: plain(by_step(z), weights()), entering(x, ball))
    low, high = extremes(lambda z: currents("convolution", z), x[0], ball)
    assert (found.least <= low + 1e-12).all()
    assert (found.most >= high - 1e-12).all()
    assert (found.most > high + 1e-9).any()


def test_an_event_between_events_leaves_only_if_they_make_way():
    """One move by one frame cannot empty the first of 1, 1, 0; two can."""
    x = torch.tensor([1.0, 1.0, 0.0]).double().view(1, T, 1, 1, 1)
    for budget, leaving in ((1, [0.0, 1.0, 0.0]), (2, [1.0, 1.0, 0.0])):
        assert MovedEvents(budget, 1).reach(x)[1].flatten().tolist() == leaving
    assert (0, 1, 1) in lines_reached(x.flatten(), 2, 1, binary=True)


def binary_lines(steps):
    """All of so many frames, [2**steps, steps]."""
    return torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * steps)


def best_gains(line, own, shift):
    """What one move adds to the weighted sum of a line at most, and what up to two add."""
    one = two = 0.0
    for after, price in lines_reached(line, 2, shift, binary=True).items():
        gain = float((own * (torch.tensor(after) - line)).sum())
        two = max(two, gain)
        if price <= 1:
            one = max(one, gain)
    return one, two


@pytest.mark.parametrize("steps", [2, 4, 5])
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_gains_of_binary_lines_are_those_of_all_their_moves(steps, shift, monkeypatch):
    ball = MovedEvents(2, min(shift, steps - 1))
    lines = binary_lines(steps)
    own = frames(len(lines), steps, seed=steps, most=9) - 4
    found = F.pad(ball.gains(lines, own), (0, 2)).cumsum(1)[:, :2]
    for line, weight, gains in zip(lines, own, found.tolist(), strict=True):
        one, two = best_gains(line, weight, ball.largest_shift)
        # exact if what the second move adds is not more than the first
        assert gains == pytest.approx([max(one, two / 2), two])
    monkeypatch.setattr(moves, "_LISTED", 0)
    moves._listed_moves.cache_clear()
    unlisted = F.pad(ball.gains(lines, own), (0, 2)).cumsum(1)[:, :2]
    moves._listed_moves.cache_clear()
    assert (unlisted >= found - 1e-12).all()
    assert (unlisted > found + 1e-9).any()


def test_rows_with_several_frames_have_no_bounds_of_moves():
    x = frames(1, T, 1, 2, 2)
    ball = MovedEvents.of(x, 1, 1)
    weight = weights()(3, 12)
    summed = on_bounds(lambda z: F.linear(z.flatten(1), weight), entering(x, ball))
    assert summed.changes is None
    low, high = extremes(lambda z: F.linear(z.flatten(1), weight), x[0], ball)
    assert (summed.least <= low).all()
    assert (summed.most >= high).all()


def test_moves_of_counts_may_share_a_place():
    x = torch.ones(1, 2, 1, 1, 1)
    onto = torch.tensor([-1.0, 0.0]).view(x.shape)
    assert MovedEvents(1, 1).lowest(x, onto).flatten().tolist() == [1.0, 1.0]
    assert MovedEvents(1, 1, counts=True).lowest(x, onto).flatten().tolist() == [2.0, 0.0]


@every_kind
def test_the_lowest_frames_are_of_the_ball(kind):
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
    assert kind.ball(x, 0).lowest(x, scores[:1]).equal(x)


def least_leads(kind, model, x, y, budget):
    """Of all samples of each ball, [N]."""
    found = []
    for sample, label in zip(x, y, strict=True):
        logits = model(kind.every(sample, budget)).detach()
        found.append(fuzz.leads(logits, label.expand(len(logits))).amin())
    return torch.stack(found)


def attacked(kind, model, x, y, budget):
    """Samples that attacks find in each ball."""
    options = {"eps": kind.threat(budget), "generator": SampleSeeds(range(len(x)))}
    for attack in (move_events, random_moves) if kind.moves else (flip_events, random_flips):
        yield attack(model, x, y, **options)


PROVED = [*zip(KINDS, cycle(NODES), strict=False), ("moves", "LIF"), ("moved counts", "soft")]


@pytest.mark.parametrize(("kind", "node"), PROVED)
def test_no_sample_of_the_ball_breaks_what_is_proved(kind, node):
    kind = KINDS[kind]
    model = tiny(3, node=node)
    x, y = kind.classified(model, 6, seed=3)
    wider = -torch.inf
    for method in ("ibp", "joint"):
        result = verify(model, x, y, kind.threat(1), method=method)
        margin = torch.tensor(result.margin)
        assert (margin >= wider).all()
        wider = margin
        two = verify(model, x[:3], y[:3], kind.threat(2), method=method)
        least = least_leads(kind, model, x[:3], y[:3], 2)
        assert (least >= torch.tensor(two.margin)).all()
    assert ("in frames of event counts" in result.verdict) == kind.counts
    assert ("by 1 frames at most" in result.verdict) == kind.moves
    assert result.threat == kind.threat(1)
    assert result.apart == ()
    still = verify(model, x, y, kind.threat(0), method="ibp")
    assert still.margin == pytest.approx(fuzz.leads(model(x).detach(), y).tolist(), abs=1e-4)
    for z in attacked(kind, model, x, y, 1):
        assert (fuzz.leads(model(z).detach(), y) >= margin).all()
        assert kind.threat(1).contains(x, z).all()


@pytest.mark.slow
@every_kind
def test_the_program_agrees_with_all_samples_of_the_ball(kind):
    outcomes = []
    for seed in (3, 13):
        model = tiny(seed)
        x, y = kind.classified(model, 2, seed=seed)
        if kind.counts and kind.moves:
            x[:, :, 1] = 0  # fewer sets of moves
        exact = verify(model, x, y, kind.threat(2), method="mip", time_limit=60)
        assert not any(exact.unknown)
        stands = (least_leads(kind, model, x, y, 2) > 0).tolist()
        assert list(exact.verified) == stands
        for sample, z in zip(x, exact.x_adv, strict=True):
            assert is_one_of(z, kind.every(sample, 2))
        outcomes += stands
    assert any(outcomes)
    assert not all(outcomes)


@both
def test_one_budget_for_all_steps_proves_more_than_one_for_each(kind):
    node = neuron.LIFNode(tau=2.0, v_threshold=0.3, decay_input=False)
    parts = [layer.Conv2d(2, 4, 2), node, layer.Flatten(), layer.Linear(16, 3)]
    model = tiny(1) if kind.moves else network(*parts, scale=0.7, seed=5)
    x, y = kind.classified(model, 40, seed=3)
    shared = verify(model, x, y, kind.threat(1))
    apart = verify(model, x, y, kind.threat(1), method="ibp")
    assert shared.accuracy > apart.accuracy + 0.1
    if kind.moves:
        by_any_shift = verify(model, x, y, ThreatModel("moves", 1))
        for near, far in zip(shared.margin, by_any_shift.margin, strict=True):
            assert near >= far - 1e-12


class Frames(nn.Module):
    """A map of the frames [T, N, *]."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def repeated():
    """The sum of all frames in every time step."""
    return Frames(lambda x: x.mean(0, keepdim=True).expand(x.shape))


def maps(*parts):
    """A network of these layers, a neuron and a linear layer."""
    features = 2 if isinstance(parts[0], layer.AvgPool2d | layer.MaxPool2d) else 8
    node = neuron.IFNode(v_threshold=0.5)
    return network(*parts, node, layer.Flatten(), layer.Linear(features, 3))


def in_time(x):
    """Another factor in every step."""
    return x * torch.arange(1.0, 1.0 + len(x)).view(-1, 1, 1, 1, 1)


APART = [
    ("flips", maps(layer.AvgPool2d(2), layer.Conv2d(2, 2, 1)), "more than one convolution or lin"),
    ("flips", maps(layer.Conv2d(2, 2, 2), layer.Conv2d(2, 2, 1)), "more than one convolution"),
    ("flips", maps(layer.MaxPool2d(2), layer.Conv2d(2, 2, 1)), "every value has its own budget"),
    ("flips", maps(repeated(), layer.Conv2d(2, 2, 2)), "more than one"),
    ("flips", maps(layer.Conv2d(2, 2, 2), repeated()), "more than one"),
    ("moves", tiny(before=[Frames(lambda x: x.flip(0))]), "not the same map of one frame"),
    ("moves", tiny(before=[Frames(in_time)]), "not the same map of one frame"),
]


@pytest.mark.parametrize(("kind", "model", "text"), APART)
def test_the_result_says_where_the_budget_is_not_shared(kind, model, text):
    kind = KINDS[kind]
    x, y = kind.classified(model, 2)
    result = verify(model, x, y, kind.threat(1))
    (entry,) = result.apart
    assert text in entry
    assert "Not bounded by one budget" in result.table()
    assert (least_leads(kind, model, x, y, 1) >= torch.tensor(result.margin)).all()


def test_counts_of_ones_have_more_changes_than_binary_frames():
    """What a flip means is said, not seen: an event may join a frame that is full."""
    model = tiny(1)
    x, y = KINDS["flips"].classified(model, 12, seed=5)
    binary = torch.tensor(verify(model, x, y, ThreatModel("L0", 2)).margin)
    counts = torch.tensor(verify(model, x, y, ThreatModel("L0", 2, counts=True)).margin)
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
    threat = ThreatModel(norm, 2, counts=True)
    together = verify(model, x, y, threat, method=method).margin
    for number in range(len(x)):
        rows = slice(number, number + 1)
        (alone,) = verify(model, x[rows], y[rows], threat, method=method).margin
        assert alone == pytest.approx(together[number], abs=1e-9)


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
    assert float(model.net[0].weight.grad.abs().sum()) > 0


@both
def test_certified_training_takes_counts(kind):
    """Its bounds are those of the proof, and wider than those of binary frames."""
    model = tiny(1)
    x, y = kind.classified(model, 8, seed=5)
    losses = {}
    for counts in (False, True):
        threat = ThreatModel(kind.norm, 2, counts=counts)
        losses[counts] = CertifiedLoss(model, threat).value(x, y)[0].item()
    assert losses[True] > losses[False]
    x = 2 * x
    threat = ThreatModel(kind.norm, 1, counts=True)
    value, share = CertifiedLoss(model, threat).value(x, y)
    assert torch.isfinite(value)
    verified = verify(model, x, y, threat, method="ibp").verified
    assert float(share) == pytest.approx(sum(verified) / len(verified))


FULL = torch.full((2, *SHAPE), 0.5)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("flips", {"eps": ThreatModel("L2", 0.5)}, "eps"),
        ("flips", {"x": FULL}, "x must be binary event frames"),
        ("flips", {"x": 4 * FULL}, "counts=True"),
        ("flips", {"x": FULL * torch.nan}, "x must be finite"),
        ("changed counts", {"x": FULL}, "numbers of events"),
        ("changed counts", {"x": -2 * FULL}, "numbers of events"),
        ("moves", {"x": 4 * FULL}, "counts=True"),
        ("moved counts", {"x": FULL}, "numbers of events"),
    ],
)
def test_wrong_use(kind, options, message):
    given = {"eps": KINDS[kind].threat(1), "x": torch.zeros(2, *SHAPE), **options}
    with pytest.raises(ValueError, match=message):
        verify(tiny(), y=torch.tensor([0, 1]), **given)


def test_images_have_no_events_to_move():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), neuron.LIFNode())
    model = SpikingClassifier(net, T=2).eval()
    with pytest.raises(ValueError, match="moves are those of event frames"):
        verify(model, torch.zeros(1, 1, 2, 2), torch.tensor([0]), ThreatModel("moves", 1))
