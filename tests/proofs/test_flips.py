"""Proofs for at most k changed events: against all sets of changes, and against attacks."""

from itertools import combinations, product

import pytest
import torch
import torch.nn.functional as F
from covering import each_in_turn
from proofs import fuzz_flips
from proofs.networks import in_steps, lead
from spikingjelly.activation_based import layer, neuron
from torch import nn

from sj_robust import DLIFNode
from sj_robust.attacks import flip_events
from sj_robust.classifier import SpikingEventClassifier
from sj_robust.proofs import UnsoundBoundsError, changes, verify
from sj_robust.proofs.bounds import BoundedRun
from sj_robust.proofs.changes import Changes, changed_sums, share_frames
from sj_robust.proofs.flips import Flips
from sj_robust.proofs.rules import Bounds
from sj_robust.proofs.verification import bounded_logits, bounded_neurons

T = 2


def all_changed(x, most):
    """A sample's values [D] with every set of at most so many changes."""
    found = [x]
    for number in range(1, most + 1):
        for places in combinations(range(len(x)), number):
            changed = x.clone()
            changed[list(places)] = 1 - changed[list(places)]
            found.append(changed)
    return torch.stack(found)


def frames(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, shape, generator=generator).double()


def entering(x, budget):
    """Bounds of frames [N, T, *] of which so many values change."""
    ball = Flips(budget)
    box = ball.box(x)
    found = Bounds(x, (box.high - box.low) / 2)
    found.changes = ball.changes(x, summed=False)
    return found


def extremes(function, x, budget):
    """Least and largest value of every element over all sets of changes of a sample [T, *]."""
    every = all_changed(x.flatten(), budget).view(-1, *x.shape)
    values = torch.stack([function(one) for one in every])
    return values.amin(0), values.amax(0)


MAPS = {
    "convolution": lambda z, w: F.conv2d(z, w(3, 2, 2, 2), w(3)),
    "stride": lambda z, w: F.conv2d(z, w(3, 2, 2, 2), w(3), 2),
    "padding": lambda z, w: F.conv2d(z, w(3, 2, 3, 3), None, 1, 1),
    "dilation": lambda z, w: F.conv2d(z, w(2, 2, 2, 2), None, 1, 0, 2),
    "groups": lambda z, w: F.conv2d(z, w(4, 1, 2, 2), None, 1, 0, 1, 2),
    "linear": lambda z, w: F.linear(z.flatten(1), w(3, 18), w(3)),
    "scaled": lambda z, w: 2.0 - F.conv2d(z, w(3, 2, 2, 2)) * w(3, 1, 1),
    "negated": lambda z, w: -F.conv2d(z, w(3, 2, 2, 2)) / 4.0,
    "normalised": lambda z, w: F.batch_norm(
        F.conv2d((z - 0.4) / 0.2, w(3, 2, 2, 2)), w(3), w(3).abs(), w(3), w(3)
    ),
}


def weights(seed=0):
    """A source of weights, the same ones each time that it is made."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("budget", [1, 2])
def test_the_first_map_is_bounded_exactly(name, budget):
    x = frames(1, T, 2, 3, 3)

    def function(z):
        return MAPS[name](z.flatten(0, 1) if z.ndim == 5 else z, weights())

    found = function(entering(x, budget))
    low, high = extremes(function, x[0], budget)
    torch.testing.assert_close(found.least, low)
    torch.testing.assert_close(found.most, high)


@pytest.mark.parametrize("name", MAPS)
def test_float32_sums_have_their_rounding_beside_changes(name):
    run = BoundedRun({}, 1)
    run.rounded = False
    run.narrow = True
    x = frames(1, T, 2, 3, 3)

    def function(z):
        source = weights()
        z = z.flatten(0, 1) if z.ndim == 5 else z
        return MAPS[name](z, lambda *shape: source(*shape).float().double())

    wide = entering(x, 2)
    narrow = Bounds(x.float(), wide.radius.float(), run=run, changes=wide.changes)
    found = function(narrow)
    low, high = extremes(function, x[0], 2)
    assert found.radius.dtype == torch.float32
    assert found.changes is None
    assert (narrow + 0.1).changes is None
    assert (found.least.double() <= low).all()
    assert (found.most.double() >= high).all()
    rounded = function(Bounds(x.float(), torch.zeros_like(narrow.radius), run=run))
    assert (rounded.radius > 0).all()


def test_of_many_inputs_the_largest_weights_are_enough_or_all_are_looked_at(monkeypatch):
    x = frames(3, 1, 400, seed=4)
    kernel = weights()(5, 400)
    kernel[0] = kernel[0].abs() + 0.1
    x[0, :, kernel[0].topk(150).indices] = 1  # which none of its largest weights can raise
    found = F.linear(entering(x, 2), kernel)
    monkeypatch.setattr(changes, "_CANDIDATES", 1000)
    whole = F.linear(entering(x, 2), kernel)
    torch.testing.assert_close(found.most, whole.most, atol=0, rtol=0)
    torch.testing.assert_close(found.least, whole.least, atol=0, rtol=0)


def test_a_budget_between_two_integers_counts_the_next_change_in_part():
    x = frames(1, T, 2, 3, 3)
    ends = {}
    for budget in (0.0, 1.0, 1.25, 2.0):
        found = MAPS["convolution"](entering(x, budget).flatten(0, 1), weights())
        ends[budget] = found.most
    torch.testing.assert_close(ends[1.25], 0.75 * ends[1.0] + 0.25 * ends[2.0])
    torch.testing.assert_close(ends[0.0], found.centre)


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_sums_over_time_have_one_budget(budget):
    x = frames(1, 3, 1, 2, 2, seed=1)
    kernel = weights()(2, 1, 2, 2)
    sums = torch.tensor([[1.0, 1.0, 1.0], [0.5, -1.0, 0.0], [-0.2, 0.3, 2.0]]).double()

    def function(z):
        currents = F.conv2d(z, kernel)
        return torch.tensordot(sums, currents, 1)

    bounds = F.conv2d(entering(x, budget).flatten(0, 1), kernel)
    steps = [bounds.changes.moved(lambda part, t=t: part[t], apart=False) for t in range(3)]
    assert not share_frames(steps)
    rises, falls = changed_sums(sums, steps)
    middle = function(x[0])
    low, high = extremes(function, x[0], budget)
    torch.testing.assert_close(middle - falls, low)
    torch.testing.assert_close(middle + rises, high)


def test_steps_that_see_the_same_frames_are_noticed():
    x = frames(1, 2, 1, 2, 2)
    summed = F.linear(entering(x, 1).flatten(1), weights()(3, 8))
    step = summed.changes
    assert share_frames([step, step])  # it is moved by several frames
    one = F.conv2d(entering(x, 1).flatten(0, 1), weights()(2, 1, 2, 2)).changes
    assert not share_frames([one])
    assert share_frames([one, one])


class Repeated(nn.Module):
    """The sum of all frames in every time step."""

    def forward(self, x):
        return x.mean(0, keepdim=True).expand(x.shape)


def network(*parts, seed=0, scale=1.5):
    torch.manual_seed(seed)
    for part in parts:
        if isinstance(part, nn.Conv2d | nn.Linear):
            part.reset_parameters()
            part.weight.data *= scale
    return in_steps(*parts, T=T, kind=SpikingEventClassifier)


def tiny(seed=0, node=None):
    """Three of the classes, a convolution of 2 x 3 x 3 frames and a linear layer."""
    node = node or neuron.LIFNode(tau=2.0, v_threshold=0.5)
    parts = [layer.Conv2d(2, 2, 2), node, layer.Flatten(), layer.Linear(8, 3)]
    return network(*parts, seed=seed)


NODES = {
    "LIF": lambda: neuron.LIFNode(tau=2.0, v_threshold=0.5),
    "soft": lambda: neuron.LIFNode(tau=2.0, v_threshold=0.5, v_reset=None),
    "rest": lambda: neuron.IFNode(v_threshold=0.4, v_reset=-0.3),
    "DLIF": lambda: DLIFNode(T=T, v_threshold=0.5),
}


@pytest.mark.parametrize(
    ("node", "method"),
    [*product(NODES, ["joint"]), *each_in_turn(NODES, ["ibp", "crown", "mip", "ibp"])],
)
def test_no_set_of_changes_breaks_what_is_proved(method, node):
    model = tiny(node=NODES[node]())
    x = frames(6, T, 2, 3, 3, seed=2).float()
    y = model(x).argmax(1)
    result = verify(model, x, y, 1, norm="L0", method=method)
    for sample, label, margin in zip(x, y, result.margin, strict=True):
        logits = model(all_changed(sample.flatten(), 1).view(-1, *sample.shape)).detach()
        assert float(lead(logits, label.expand(len(logits))).amin()) >= margin


def test_the_program_agrees_with_all_sets_of_changes():
    proved = 0
    broken = 0
    for seed in range(3):
        model = tiny(seed)
        x = frames(3, T, 2, 3, 3, seed=seed).float()
        y = model(x).argmax(1)
        result = verify(model, x, y, 2, norm="L0", method="mip")
        joint = verify(model, x, y, 2, norm="L0")
        assert not any(result.unknown)
        for number, sample in enumerate(x):
            every = all_changed(sample.flatten(), 2).view(-1, *sample.shape)
            stands = bool((model(every).argmax(1) == y[number]).all())
            assert result.verified[number] == stands
            assert stands or not joint.verified[number]
            assert int((result.x_adv[number] != sample).sum()) <= 2
        proved += sum(result.verified)
        broken += sum(result.broken)
    assert proved > 0
    assert broken > 0


def test_methods_are_in_order_and_no_change_is_the_sample_itself():
    model = tiny(3)
    x = frames(12, T, 2, 3, 3, seed=3).float()
    y = model(x).argmax(1)
    before = None
    for method in ("ibp", "joint", "crown"):
        margin = torch.tensor(verify(model, x, y, 1, norm="L0", method=method).margin)
        assert before is None or bool((margin >= before).all())
        before = margin
    with_none = verify(model, x, y, 0, norm="L0", method="ibp")
    assert with_none.margin == pytest.approx(verify(model, x, y, 0.0, method="ibp").margin)


def test_one_budget_for_all_steps_proves_more_than_one_for_each():
    node = neuron.LIFNode(tau=2.0, v_threshold=0.3, decay_input=False)
    parts = [layer.Conv2d(2, 4, 2), node, layer.Flatten(), layer.Linear(16, 3)]
    model = network(*parts, scale=0.7, seed=3)
    x = frames(40, T, 2, 3, 3, seed=3).float()
    y = model(x).argmax(1)
    shared = verify(model, x, y, 1, norm="L0").accuracy
    apart = verify(model, x, y, 1, norm="L0", method="ibp").accuracy
    assert shared > apart + 0.1


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([layer.AvgPool2d(2), layer.Conv2d(2, 2, 1)], "more than one convolution or linear map"),
        ([layer.Conv2d(2, 2, 2), layer.Conv2d(2, 2, 1)], "more than one convolution"),
        ([layer.MaxPool2d(2), layer.Conv2d(2, 2, 1)], "every value has a budget of its own"),
        ([Repeated(), layer.Conv2d(2, 2, 2)], "more than one"),
        ([layer.Conv2d(2, 2, 2), Repeated()], "more than one"),
    ],
)
def test_the_result_says_where_the_budget_is_not_shared(parts, text):
    node = neuron.IFNode(v_threshold=0.5)
    features = 2 if isinstance(parts[0], layer.AvgPool2d | layer.MaxPool2d) else 8
    model = network(*parts, node, layer.Flatten(), layer.Linear(features, 3))
    x = frames(2, T, 2, 3, 3).float()
    result = verify(model, x, model(x).argmax(1), 1, norm="L0")
    (entry,) = result.apart
    assert text in entry
    assert "Not bounded by one budget" in result.table()
    assert verify(tiny(), x, tiny()(x).argmax(1), 1, norm="L0").apart == ()


def too_few(changes, budget, dim):
    count = min(max(1, int(budget) - 1), changes.shape[dim])
    return changes.topk(count, dim).values


def nothing(self):
    return torch.zeros_like(self.up[0])


FAULTS = {
    "a change too few": (changes, "first_changes", too_few),
    "no falls": (Changes, "lowered", nothing),
    "no rises": (Changes, "raised", nothing),
    "sides exchanged": (Changes, "scaled", lambda self, factor: self.opposite()),
}


def fuzzed(seeds, points):
    for seed in seeds:
        fuzz_flips.check(seed, points)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_noticed(fault, monkeypatch):
    owner, name, wrong = FAULTS[fault]
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises((AssertionError, UnsoundBoundsError)):
        fuzzed(range(40), 400)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 1.5}, "eps must be an integer >= 0 for L0, the number of values that may change"),
        ({"eps": -1}, "eps must be .*>= 0"),
        ({"eps": 37}, "eps must be <= 36, the values of a sample, got 37"),
        ({"norm": "L2"}, "norm must be one of"),
        ({"x": torch.full((2, T, 2, 3, 3), 0.5)}, "x must be binary event frames"),
    ],
)
def test_wrong_use(options, message):
    given = {"eps": 1, "norm": "L0", "x": torch.zeros(2, T, 2, 3, 3)} | options
    with pytest.raises(ValueError, match=message):
        verify(tiny(), given["x"], torch.tensor([0, 1]), given["eps"], norm=given["norm"])


def test_bounds_in_training_are_those_of_proofs():
    model = tiny(1)
    x = frames(3, T, 2, 3, 3).float()
    y = model(x).argmax(1)
    ball = Flips(2)
    runs = [BoundedRun(bounded_neurons(model), 3, differentiable=way) for way in (True, False)]
    leads = [run.lead(bounded_logits(model, run, x, ball), y) for run in runs]
    torch.testing.assert_close(leads[0].double(), leads[1], atol=1e-4, rtol=0)
    leads[0].sum().backward()
    assert float(model.net[0].weight.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    ("seeds", "points"), [(range(1), 300), pytest.param(range(1, 9), 800, marks=pytest.mark.slow)]
)
def test_random_networks_stay_within_their_bounds(seeds, points):
    fuzzed(seeds, points)


def test_the_attack_breaks_nothing_that_is_proved():
    for seed in range(2):
        model = tiny(seed)
        x = frames(6, T, 2, 3, 3, seed=seed).float()
        y = model(x).argmax(1)
        proved = torch.tensor(verify(model, x, y, 2, norm="L0").verified)
        generator = torch.Generator().manual_seed(0)
        x_adv = flip_events(model, x, y, flips=2, generator=generator)
        assert proved.any()
        assert (model(x_adv).argmax(1) == y)[proved].all()
