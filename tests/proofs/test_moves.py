"""Proofs for events moved in time: against all sets of moves, and against attacks."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from proofs import fuzz_moves, test_flips
from proofs.moved import all_moved, entering, lines_reached
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
BY_ONE_FRAME = {"norm": "moves", "largest_shift": 1}
"""Options of verify."""


def frames(*shape, seed=0, most=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(most + 1, shape, generator=generator).double()


def samples(count, *, seed=0, most=1):
    """Frames for :func:`tiny`, in float32."""
    return frames(count, T, 2, 3, 3, seed=seed, most=most).float()


def binary_lines(steps):
    """All of so many frames, [2**steps, steps]."""
    values = torch.tensor([0.0, 1.0]).double()
    return torch.cartesian_prod(*[values] * steps)


def extremes(function, x, ball):
    """Least and largest value of every element over all sets of moves of a sample [T, *]."""
    every = all_moved(x, int(ball.budget), ball.largest_shift, binary=not ball.counts)
    values = torch.stack([function(one) for one in every])
    return values.amin(0), values.amax(0)


def apart(*shape, seed, most):
    """Frames in which no event has to wait for another to make way: where they are binary, an event
    in the middle has no neighbours.
    """
    x = frames(*shape, seed=seed, most=most)
    if most == 1:
        x[:, 1] *= (1 - x[:, 0]) * (1 - x[:, 2])
    return x


def convolved(z):
    weights = test_flips.weights()
    kernel = weights(3, 1, 2, 2)
    bias = weights(3)
    images = z.flatten(0, 1) if z.ndim == 5 else z
    return F.conv2d(images, kernel, bias)


@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize(("budget", "shift"), [(1, 1), (2, 1), (2, 2), (3, 1)])
def test_a_step_is_bounded_exactly(budget, shift, most):
    x = apart(1, T, 1, 2, 3, seed=5, most=most)
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
    line = torch.tensor([1.0, 1.0, 0.0]).double()
    x = line.view(1, T, 1, 1, 1)
    _, with_one_move = Moves(1, 1).reach(x)
    _, with_two_moves = Moves(2, 1).reach(x)
    assert with_one_move.flatten().tolist() == [0.0, 1.0, 0.0]
    assert with_two_moves.flatten().tolist() == [1.0, 1.0, 0.0]
    assert (0, 1, 1) in lines_reached(line, 2, 1, binary=True)


@pytest.mark.parametrize("steps", [2, 4, 5])
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_gains_of_binary_lines_are_those_of_all_their_moves(steps, shift):
    ball = Moves(2, min(shift, steps - 1))
    lines = binary_lines(steps)
    weights = frames(len(lines), steps, seed=steps, most=9) - 4
    for line, own, gains in zip(lines, weights, ball.gains(lines, weights), strict=True):
        one, two = best_gains(line, own, ball)
        # exact if what the second move adds is not more than the first
        expected = [max(one, two / 2), two]
        none_behind = F.pad(gains, (0, 2))
        assert none_behind.cumsum(0)[:2].tolist() == pytest.approx(expected)


def best_gains(line, weights, ball):
    """What one move adds to the weighted sum of a line at most, and what up to two add."""
    one = two = 0.0
    for after, price in lines_reached(line, 2, ball.largest_shift, binary=True).items():
        gain = float((weights * (torch.tensor(after) - line)).sum())
        two = max(two, gain)
        if price <= 1:
            one = max(one, gain)
    return one, two


def test_gains_without_a_list_are_not_smaller(monkeypatch):
    ball = Moves(2, 1)
    lines = binary_lines(4)
    weights = frames(len(lines), 4, seed=1, most=9)
    listed = ball.gains(lines, weights).sum(1)
    monkeypatch.setattr(moves, "_LISTED", 0)
    moves._listed_moves.cache_clear()
    alone = ball.gains(lines, weights).sum(1)
    moves._listed_moves.cache_clear()
    assert (alone >= listed - 1e-12).all()
    assert (alone > listed + 1e-9).any()


@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize(("budget", "shift"), [(1, 1), (2, 1), (2, 2)])
def test_sums_over_time_have_one_budget(budget, shift, most):
    x = apart(1, T, 1, 2, 2, seed=1, most=most)
    ball = Moves.of(x, budget, shift, counts=most > 1)
    kernel = test_flips.weights()(2, 1, 2, 2)
    sums = torch.tensor(
        [
            [1.0, 1.0, 1.0],
            [0.5, -1.0, 0.0],
            [-0.2, 0.3, 2.0],
        ]
    ).double()

    def function(z):
        return torch.tensordot(sums, F.conv2d(z, kernel), 1)

    zeros = torch.zeros_like(x)
    still = Bounds(zeros, zeros)
    still.changes = ball.changes(x, summed=False).over_time(sums)
    found = F.conv2d(still.flatten(0, 1), kernel)
    middle = function(x[0])
    low, high = extremes(function, x[0], ball)
    torch.testing.assert_close(middle - found.changes.lowered(), low)
    torch.testing.assert_close(middle + found.changes.raised(), high)


def test_rows_with_several_frames_have_no_bounds_of_moves():
    x = frames(1, T, 1, 2, 2)
    ball = Moves.of(x, 1, 1)
    weight = test_flips.weights()(3, 12)

    def function(z):
        return F.linear(z.flatten(), weight)

    summed = F.linear(entering(x, ball).flatten(1), weight)
    assert summed.changes is None
    low, high = extremes(function, x[0], ball)
    assert (summed.least <= low).all()
    assert (summed.most >= high).all()


@pytest.mark.parametrize("most", [1, 2])
def test_the_lowest_frames_are_in_the_ball_and_low(most):
    x = frames(1, T, 1, 2, 3, seed=2, most=most)
    ball = Moves.of(x, 2, 1, counts=most > 1)
    weights = frames(5, T, 1, 2, 3, seed=3, most=9)
    every = all_moved(x[0], 2, 1, binary=not ball.counts)
    for z, own in zip(ball.lowest(x, weights), weights, strict=True):
        assert is_one_of(z, every)
        assert (z * own).sum() <= (x[0] * own).sum()
    drawn = ball.drawn(x, torch.Generator().manual_seed(0))
    assert is_one_of(drawn[0], every)


def is_one_of(sample, every):
    return any(torch.equal(sample, one) for one in every)


class Backwards(nn.Module):
    """The last frame first."""

    def forward(self, x):
        return x.flip(0)


class InTime(nn.Module):
    """Another factor in every step."""

    def forward(self, x):
        return x * torch.arange(1.0, 1.0 + len(x)).view(-1, 1, 1, 1, 1)


NODES = {
    "LIF": lambda: neuron.LIFNode(tau=2.0, v_threshold=0.5),
    "soft": lambda: neuron.LIFNode(tau=2.0, v_threshold=0.5, v_reset=None),
    "rest": lambda: neuron.IFNode(v_threshold=0.4, v_reset=-0.3),
}


def tiny(seed=0, node="LIF", before=()):
    """A classifier of frames [N, T, 2, 3, 3] with 3 classes."""
    node = NODES[node]()
    torch.manual_seed(seed)
    convolution = layer.Conv2d(2, 2, 2)
    head = layer.Linear(8, 3)
    for part in (convolution, head):
        part.reset_parameters()
        part.weight.data *= 1.5
    parts = [*before, convolution, node, layer.Flatten(), head]
    return in_steps(*parts, T=T, kind=SpikingEventClassifier)


def assert_leads(model, x, y, margins, budget, *, binary=True):
    """No set of moves by one frame takes more of the lead than the margins say."""
    for sample, label, margin in zip(x, y, margins, strict=True):
        logits = model(all_moved(sample, budget, 1, binary=binary)).detach()
        labels = label.expand(len(logits))
        assert float(lead(logits, labels).amin()) >= margin


@pytest.mark.parametrize(
    ("node", "method", "most"),
    [("LIF", "joint", 1), ("soft", "joint", 2), ("rest", "crown", 1), ("LIF", "ibp", 2)],
)
def test_no_set_of_moves_breaks_what_is_proved(node, method, most):
    model = tiny(node=node)
    x = samples(3, seed=2, most=most)
    y = model(x).argmax(1)
    result = verify(model, x, y, 2, method=method, counts=most > 1, **BY_ONE_FRAME)
    assert result.largest_shift == 1
    assert result.apart == ()
    assert "by 1 frames at most" in result.verdict
    assert_leads(model, x, y, result.margin, 2, binary=most == 1)


@pytest.mark.parametrize("most", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_program_agrees_with_all_sets_of_moves(most):
    model = tiny(3 if most == 1 else 0)
    x = samples(3, seed=3, most=most)
    if most == 2:
        x[:, :, 1] = 0  # fewer sets of moves
    y = model(x).argmax(1)
    if most == 2:
        y[0] = (y[0] + 1) % 3
    given = {"counts": most > 1, **BY_ONE_FRAME}
    exact = verify(model, x, y, 2, method="mip", time_limit=60, **given)
    joint = verify(model, x, y, 2, **given)
    assert not any(exact.unknown)
    for number, sample in enumerate(x):
        every = all_moved(sample, 2, 1, binary=most == 1)
        stands = bool((model(every).argmax(1) == y[number]).all())
        assert exact.verified[number] == stands
        assert stands or not joint.verified[number]
        assert is_one_of(exact.x_adv[number], every)


def test_one_budget_for_all_steps_proves_more_than_one_for_each():
    model = tiny(1)
    x = samples(40, seed=3)
    y = model(x).argmax(1)
    shared = verify(model, x, y, 1, **BY_ONE_FRAME)
    apart = verify(model, x, y, 1, method="ibp", **BY_ONE_FRAME)
    assert shared.accuracy > apart.accuracy + 0.1
    by_any_shift = verify(model, x, y, 1, norm="moves")
    for near, far in zip(shared.margin, by_any_shift.margin, strict=True):
        assert near >= far - 1e-12


@pytest.mark.parametrize("part", [Backwards(), InTime()])
def test_the_result_says_where_a_sum_over_time_has_no_budget(part):
    model = tiny(before=[part])
    x = samples(2)
    y = model(x).argmax(1)
    result = verify(model, x, y, 1, **BY_ONE_FRAME)
    (entry,) = result.apart
    assert "not the same map of one frame" in entry
    assert_leads(model, x, y, result.margin, 1)


def test_no_move_is_the_sample_itself():
    model = tiny(3)
    x = samples(4, seed=3)
    y = model(x).argmax(1)
    with_none = verify(model, x, y, 0, norm="moves", method="ibp")
    itself = verify(model, x, y, 0.0, method="ibp")
    assert with_none.margin == pytest.approx(itself.margin)


KEPT = {
    "moved sums": JointRun._moved_sums,
    "reach": Moves.reach,
    "gains": Moves.gains,
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


def one_end(changes, budget, dim):
    """A budget that is shared by the two frames of a move."""
    half = max(1, math.ceil(budget) // 2)
    count = min(half, changes.shape[dim])
    return changes.topk(count, dim).values


def no_falls(self):
    return torch.zeros_like(self.up[0])


@dataclass(frozen=True)
class Fault:
    """What stands in the place of a function."""

    owner: object
    name: str
    wrong: Callable


FAULTS = {
    "a budget too small over time": Fault(JointRun, "_moved_sums", budget_of_each_step),
    "a window of events too short": Fault(Moves, "reach", short_reach),
    "a window of sums too short": Fault(Moves, "gains", short_gains),
    "half a budget": Fault(changes, "first_changes", one_end),
    "no falls": Fault(Shifts, "lowered", no_falls),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_noticed(fault, monkeypatch):
    planted = FAULTS[fault]
    monkeypatch.setattr(planted.owner, planted.name, planted.wrong)
    with pytest.raises((AssertionError, UnsoundBoundsError)):
        fuzz_moves.check_all(range(60), 400)


@pytest.mark.parametrize(
    ("seeds", "points"), [(range(2), 200), pytest.param(range(2, 14), 600, marks=pytest.mark.slow)]
)
def test_random_networks_stay_within_their_bounds(seeds, points):
    fuzz_moves.check_all(seeds, points)


def test_bounds_in_training_are_those_of_proofs():
    model = tiny(1)
    x = samples(3)
    y = model(x).argmax(1)
    ball = Moves.of(x, 2, 1)

    def leads(*, differentiable):
        run = BoundedRun(bounded_neurons(model), 3, differentiable=differentiable)
        return run.lead(bounded_logits(model, run, x, ball), y)

    trained = leads(differentiable=True)
    proved = leads(differentiable=False)
    torch.testing.assert_close(trained.double(), proved, atol=1e-4, rtol=0)
    trained.sum().backward()
    assert float(model.net[0].weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("most", [1, 3])
def test_the_attack_breaks_nothing_that_is_proved(most):
    model = tiny(most)
    x = samples(6, seed=4, most=most)
    y = model(x).argmax(1)
    given = {"largest_shift": 1, "counts": most > 1}
    proved = torch.tensor(verify(model, x, y, 2, norm="moves", **given).verified)
    generator = torch.Generator().manual_seed(0)
    x_adv = move_events(model, x, y, moves=2, generator=generator, **given)
    right = model(x_adv).argmax(1) == y
    assert right[proved].all()
    assert int(count_moves(x_adv, x).events.max()) <= 2
    assert ThreatModel("moves", 2, **given).contains(x, x_adv).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 1.5}, "eps must be an integer >= 0 for moves, the number of events that may"),
        ({"eps": -1}, "eps must be .*>= 0"),
        ({"largest_shift": 0}, "largest_shift must be >= 1"),
        ({"largest_shift": T}, rf"largest_shift must be < T = {T}, .* got {T}; for any shift pass"),
        ({"x": torch.full((2, T, 2, 3, 3), torch.nan)}, "x must be finite, got .* NaN"),
        (
            {"x": -torch.ones(2, T, 2, 3, 3), "counts": True},
            "or numbers of events, got values from -1",
        ),
        ({"norm": "L0"}, "largest_shift limits moves of events, got 1 for L0; omit it"),
        ({"x": torch.full((2, T, 2, 3, 3), 0.5)}, "binary event frames .*, got values from 0.5"),
    ],
)
def test_wrong_use(options, message):
    given = {"eps": 1, "x": torch.zeros(2, T, 2, 3, 3), **BY_ONE_FRAME, **options}
    y = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=message):
        verify(tiny(), y=y, **given)


def test_images_have_no_events_to_move():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), neuron.LIFNode())
    model = SpikingClassifier(net, T=2).eval()
    with pytest.raises(ValueError, match="moves are those of event frames"):
        verify(model, torch.zeros(1, 1, 2, 2), torch.tensor([0]), 1, norm="moves")
