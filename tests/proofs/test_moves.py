"""Proofs for events moved in time: against all sets of moves, and against attacks."""

import math

import pytest
import torch
import torch.nn.functional as F
from proofs import fuzz_moves, test_flips
from proofs.moved import all_moved, lines_reached
from proofs.networks import in_steps, lead
from spikingjelly.activation_based import layer, neuron
from torch import nn

from sj_robust import SpikingClassifier
from sj_robust.attacks import ThreatModel, count_moves, move_events
from sj_robust.classifier import SpikingEventClassifier
from sj_robust.proofs import UnsoundBoundsError, changes, moves, verify
from sj_robust.proofs.bounds import BoundedRun
from sj_robust.proofs.joint import JointRun
from sj_robust.proofs.moves import Moves, Shifts
from sj_robust.proofs.rules import Bounds
from sj_robust.proofs.verification import bounded_logits, bounded_neurons

T = 3


def frames(*shape, seed=0, most=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(most + 1, shape, generator=generator).double()


def entering(x, ball):
    """Bounds of frames [N, T, *] of which events move."""
    box = ball.box(x)
    found = Bounds(x, (box.high - box.low) / 2)
    found.changes = ball.changes(x, summed=False)
    return found


def extremes(function, x, ball):
    """Least and largest value of every element over all sets of moves of a sample [T, *]."""
    every = all_moved(x, int(ball.budget), ball.largest_shift, binary=not ball.counts)
    values = torch.stack([function(one) for one in every])
    return values.amin(0), values.amax(0)


def without_neighbours(x):
    """Binary frames in which no event has to wait for another to make way."""
    x[:, 1] *= (1 - x[:, 0]) * (1 - x[:, 2])
    return x


def convolved(z):
    weights = test_flips.weights()
    return F.conv2d(z.flatten(0, 1) if z.ndim == 5 else z, weights(3, 1, 2, 2), weights(3))


@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize(("budget", "shift"), [(1, 1), (2, 1), (2, 2), (3, 1)])
def test_a_step_is_bounded_exactly(budget, shift, most):
    x = frames(1, T, 1, 2, 3, seed=5, most=most)
    if most == 1:
        x = without_neighbours(x)
    ball = Moves.of(x, budget, shift, counts=most > 1)
    found = convolved(entering(x, ball))
    low, high = extremes(convolved, x[0], ball)
    torch.testing.assert_close(found.least, low)
    torch.testing.assert_close(found.most, high)


def test_a_step_whose_events_are_in_each_others_way_is_bounded():
    x = frames(1, T, 1, 2, 3, seed=5)
    ball = Moves.of(x, 2, 1)
    found = convolved(entering(x, ball))
    low, high = extremes(convolved, x[0], ball)
    assert (found.least <= low + 1e-12).all()
    assert (found.most >= high - 1e-12).all()
    assert (found.most > high + 1e-9).any()


def test_an_event_between_events_leaves_only_if_they_make_way():
    """One move by one frame cannot empty the first of 1, 1, 0; two can."""
    x = torch.tensor([1.0, 1.0, 0.0]).double().view(1, 3, 1, 1, 1)
    _, leaving = Moves(1, 1).reach(x)
    assert leaving.flatten().tolist() == [0.0, 1.0, 0.0]
    _, leaving = Moves(2, 1).reach(x)
    assert leaving.flatten().tolist() == [1.0, 1.0, 0.0]
    assert (0, 1, 1) in lines_reached(x.flatten(), 2, 1, binary=True)


@pytest.mark.parametrize("steps", [2, 4, 5])
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_gains_of_binary_lines_are_those_of_all_their_moves(steps, shift):
    ball = Moves(2, min(shift, steps - 1))
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * steps)
    weights = frames(len(every), steps, seed=steps, most=9) - 4
    found = ball.gains(every, weights)
    for line, own, gains in zip(every, weights, found, strict=True):
        best = [0.0] * 3
        for after, price in lines_reached(line, 2, ball.largest_shift, binary=True).items():
            gain = float((own * (torch.tensor(after) - line)).sum())
            for number in range(price, 3):
                best[number] = max(best[number], gain)
        sums = [0.0, *gains.cumsum(0).tolist(), *[float(gains.sum())] * 2]
        # exact if what the second move adds is not more than the first
        expected = [0.0, max(best[1], best[2] / 2), best[2]]
        assert sums[:3] == pytest.approx(expected)


def test_gains_without_a_list_are_not_smaller(monkeypatch):
    ball = Moves(2, 1)
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * 4)
    weights = frames(len(every), 4, seed=1, most=9)
    listed = ball.gains(every, weights)
    monkeypatch.setattr(moves, "_LISTED", 0)
    moves._moved_lines.cache_clear()
    alone = ball.gains(every, weights)
    moves._moved_lines.cache_clear()
    assert (alone.cumsum(1)[:, -1] >= listed.sum(1) - 1e-12).all()
    assert (alone.sum(1) > listed.sum(1) + 1e-9).any()


@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize(("budget", "shift"), [(1, 1), (2, 1), (2, 2)])
def test_sums_over_time_have_one_budget(budget, shift, most):
    x = frames(1, T, 1, 2, 2, seed=1, most=most)
    if most == 1:
        x = without_neighbours(x)
    ball = Moves.of(x, budget, shift, counts=most > 1)
    sums = torch.tensor([[1.0, 1.0, 1.0], [0.5, -1.0, 0.0], [-0.2, 0.3, 2.0]]).double()
    kernel = test_flips.weights()(2, 1, 2, 2)

    def function(z):
        return torch.tensordot(sums, F.conv2d(z, kernel), 1)

    entered = ball.changes(x, summed=False).over_time(sums)
    zeros = torch.zeros_like(x)
    found = F.conv2d(Bounds(zeros, zeros, changes=entered).flatten(0, 1), kernel)
    middle = function(x[0])
    low, high = extremes(function, x[0], ball)
    torch.testing.assert_close(middle - found.changes.lowered(), low)
    torch.testing.assert_close(middle + found.changes.raised(), high)


def test_rows_with_several_frames_have_no_bounds_of_moves():
    x = frames(1, T, 1, 2, 2)
    ball = Moves.of(x, 1, 1)
    summed = F.linear(entering(x, ball).flatten(1), test_flips.weights()(3, 12))
    assert summed.changes is None
    low, high = extremes(lambda z: F.linear(z.flatten(), test_flips.weights()(3, 12)), x[0], ball)
    assert (summed.least <= low).all()
    assert (summed.most >= high).all()


def test_the_lowest_frames_are_in_the_ball_and_low():
    for most in (1, 2):
        x = frames(1, T, 1, 2, 3, seed=2, most=most)
        ball = Moves.of(x, 2, 1, counts=most > 1)
        weights = frames(5, T, 1, 2, 3, seed=3, most=9)
        found = ball.lowest(x, weights)
        every = all_moved(x[0], 2, 1, binary=not ball.counts)
        for z, w in zip(found, weights, strict=True):
            assert any(torch.equal(z, other) for other in every)
            assert (z * w).sum() <= (x[0] * w).sum()
        drawn = ball.drawn(x, torch.Generator().manual_seed(0))
        assert any(torch.equal(drawn[0], other) for other in every)


class Backwards(nn.Module):
    """The last frame first."""

    def forward(self, x):
        return x.flip(0)


class InTime(nn.Module):
    """Another factor in every step."""

    def forward(self, x):
        return x * torch.arange(1.0, 1.0 + len(x)).view(-1, 1, 1, 1, 1)


def tiny(seed=0, node=None, before=()):
    node = node or neuron.LIFNode(tau=2.0, v_threshold=0.5)
    torch.manual_seed(seed)
    parts = [layer.Conv2d(2, 2, 2), node, layer.Flatten(), layer.Linear(8, 3)]
    for part in (parts[0], parts[3]):
        part.reset_parameters()
        part.weight.data *= 1.5
    return in_steps(*before, *parts, T=T, kind=SpikingEventClassifier)


NODES = {
    "LIF": lambda: neuron.LIFNode(tau=2.0, v_threshold=0.5),
    "soft": lambda: neuron.LIFNode(tau=2.0, v_threshold=0.5, v_reset=None),
    "rest": lambda: neuron.IFNode(v_threshold=0.4, v_reset=-0.3),
}


@pytest.mark.parametrize(
    ("node", "method", "most"),
    [("LIF", "joint", 1), ("soft", "joint", 2), ("rest", "crown", 1), ("LIF", "ibp", 2)],
)
def test_no_set_of_moves_breaks_what_is_proved(node, method, most):
    model = tiny(node=NODES[node]())
    x = frames(3, T, 2, 3, 3, seed=2, most=most).float()
    y = model(x).argmax(1)
    given = {"norm": "moves", "largest_shift": 1, "counts": most > 1}
    result = verify(model, x, y, 2, **given, method=method)
    assert result.largest_shift == 1
    assert result.apart == ()
    assert "by 1 frames at most" in result.verdict
    for sample, label, margin in zip(x, y, result.margin, strict=True):
        logits = model(all_moved(sample, 2, 1, binary=most == 1)).detach()
        assert float(lead(logits, label.expand(len(logits))).amin()) >= margin


@pytest.mark.parametrize("most", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_program_agrees_with_all_sets_of_moves(most):
    model = tiny(3 if most == 1 else 0)
    x = frames(3, T, 2, 3, 3, seed=3, most=most).float()
    if most == 2:
        x[:, :, 1] = 0
    y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 3 if most == 2 else y[0]
    given = {"norm": "moves", "largest_shift": 1, "counts": most > 1}
    result = verify(model, x, y, 2, **given, method="mip", time_limit=60)
    joint = verify(model, x, y, 2, **given)
    assert not any(result.unknown)
    for number, sample in enumerate(x):
        every = all_moved(sample, 2, 1, binary=most == 1)
        stands = bool((model(every).argmax(1) == y[number]).all())
        assert result.verified[number] == stands
        assert stands or not joint.verified[number]
        assert any(torch.equal(result.x_adv[number], one) for one in every)


def test_one_budget_for_all_steps_proves_more_than_one_for_each():
    model = tiny(1)
    x = frames(40, T, 2, 3, 3, seed=3).float()
    y = model(x).argmax(1)
    shared = verify(model, x, y, 1, norm="moves", largest_shift=1)
    apart = verify(model, x, y, 1, norm="moves", largest_shift=1, method="ibp")
    assert shared.accuracy > apart.accuracy + 0.1
    wider = verify(model, x, y, 1, norm="moves")
    margins = zip(shared.margin, wider.margin, strict=True)
    assert all(a >= b - 1e-12 for a, b in margins)


@pytest.mark.parametrize("part", [Backwards(), InTime()])
def test_the_result_says_where_a_sum_over_time_has_no_budget(part):
    model = tiny(before=[part])
    x = frames(2, T, 2, 3, 3).float()
    y = model(x).argmax(1)
    result = verify(model, x, y, 1, norm="moves", largest_shift=1)
    (entry,) = result.apart
    assert "not the same map of one frame" in entry
    for sample, label, margin in zip(x, y, result.margin, strict=True):
        logits = model(all_moved(sample, 1, 1)).detach()
        assert float(lead(logits, label.expand(len(logits))).amin()) >= margin


def test_no_move_is_the_sample_itself():
    model = tiny(3)
    x = frames(4, T, 2, 3, 3, seed=3).float()
    y = model(x).argmax(1)
    with_none = verify(model, x, y, 0, norm="moves", method="ibp")
    assert with_none.margin == pytest.approx(verify(model, x, y, 0.0, method="ibp").margin)


def budget_of_each_step(self, weights, chosen):
    """Sums over time of which each step has a budget for one move less than it should."""
    shift = self.changed.changes.ball
    fewer = Moves(max(0, shift.budget - 1), shift.largest_shift, shift.counts)
    self.changed.changes = fewer.changes(self.changed.changes.frames, summed=False)
    return KEPT["moved sums"](self, weights, chosen)


def short_reach(self, frames):
    near = Moves(self.budget, max(0, self.largest_shift - 1), self.counts)
    return KEPT["reach"](near, frames)


def short_gains(self, lines, weights):
    near = Moves(self.budget, max(0, self.largest_shift - 1), self.counts)
    return KEPT["gains"](near, lines, weights)


def one_end(changes, budget, dim):
    """A budget that is shared by the two frames of a move."""
    count = min(max(1, math.ceil(budget) // 2), changes.shape[dim])
    return changes.topk(count, dim).values


KEPT = {
    "moved sums": JointRun._moved_sums,
    "reach": Moves.reach,
    "gains": Moves.gains,
}

FAULTS = {
    "a budget too small over time": (JointRun, "_moved_sums", budget_of_each_step),
    "a window of events too short": (Moves, "reach", short_reach),
    "a window of sums too short": (Moves, "gains", short_gains),
    "half a budget": (changes, "first_changes", one_end),
    "no falls": (Shifts, "lowered", lambda self: torch.zeros_like(self.up[0])),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_noticed(fault, monkeypatch):
    owner, name, wrong = FAULTS[fault]
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises((AssertionError, UnsoundBoundsError)):
        fuzz_moves.check_all(range(60), 400)


@pytest.mark.parametrize(
    ("seeds", "points"), [(range(2), 200), pytest.param(range(2, 14), 600, marks=pytest.mark.slow)]
)
def test_random_networks_stay_within_their_bounds(seeds, points):
    fuzz_moves.check_all(seeds, points)


def test_bounds_in_training_are_those_of_proofs():
    model = tiny(1)
    x = frames(3, T, 2, 3, 3).float()
    y = model(x).argmax(1)
    ball = Moves.of(x, 2, 1)
    runs = [BoundedRun(bounded_neurons(model), 3, differentiable=way) for way in (True, False)]
    leads = [run.lead(bounded_logits(model, run, x, ball), y) for run in runs]
    torch.testing.assert_close(leads[0].double(), leads[1], atol=1e-4, rtol=0)
    leads[0].sum().backward()
    assert float(model.net[0].weight.grad.abs().sum()) > 0


def test_the_attack_breaks_nothing_that_is_proved():
    for most in (1, 3):
        model = tiny(most)
        x = frames(6, T, 2, 3, 3, seed=4, most=most).float()
        y = model(x).argmax(1)
        given = {"largest_shift": 1, "counts": most > 1}
        proved = torch.tensor(verify(model, x, y, 2, norm="moves", **given).verified)
        generator = torch.Generator().manual_seed(0)
        x_adv = move_events(model, x, y, moves=2, **given, generator=generator)
        assert int(count_moves(x_adv, x).events.max()) <= 2
        assert ThreatModel("moves", 2, **given).contains(x, x_adv).all()
        assert (model(x_adv).argmax(1) == y)[proved].all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 1.5}, "eps must be an integer >= 0 for moves, the number of events that may"),
        ({"eps": -1}, "eps must be .*>= 0"),
        ({"largest_shift": 0}, "largest_shift must be >= 1"),
        ({"norm": "L0"}, "largest_shift limits moves of events, got 1 for L0; omit it"),
        ({"x": torch.full((2, T, 2, 3, 3), 0.5)}, "binary event frames .*, got values from 0.5"),
    ],
)
def test_wrong_use(options, message):
    given = {"eps": 1, "norm": "moves", "largest_shift": 1, "x": torch.zeros(2, T, 2, 3, 3)}
    given |= options
    x = given.pop("x")
    with pytest.raises(ValueError, match=message):
        verify(tiny(), x, torch.tensor([0, 1]), given.pop("eps"), **given)


def test_images_have_no_events_to_move():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), neuron.LIFNode())
    model = SpikingClassifier(net, T=2).eval()
    with pytest.raises(ValueError, match="moves are those of event frames"):
        verify(model, torch.zeros(1, 1, 2, 2), torch.tensor([0]), 1, norm="moves")
