"""Proofs for at most k changed events: against all sets of changes, and against attacks."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, product

import pytest
import torch
import torch.nn.functional as F
from covering import each_in_turn
from proofs import fuzz_flips
from proofs.moved import entering
from proofs.networks import in_steps, lead
from spikingjelly.activation_based import layer, neuron
from torch import nn
from torch.testing import assert_close

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
SHAPE = (T, 2, 3, 3)
"""Of the frames of one sample."""


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


def extremes(function, x, budget):
    """Least and largest value of every element over all sets of changes of a sample [T, *]."""
    every = all_changed(x.flatten(), budget).view(-1, *x.shape)
    values = torch.stack([function(one) for one in every])
    return values.amin(0), values.amax(0)


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


def weights(seed=0):
    """A source of weights, the same ones each time that it is made."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def by_step(z):
    """Frames of samples [N, T, *] or of one [T, *] as [N * T, *] or [T, *]."""
    return z.flatten(0, 1) if z.ndim == 5 else z


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("budget", [1, 2])
def test_the_first_map_is_bounded_exactly(name, budget):
    x = frames(1, *SHAPE)

    def function(z):
        return MAPS[name](by_step(z), weights())

    found = function(entering(x, Flips(budget)))
    low, high = extremes(function, x[0], budget)
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

        def in_float32(*shape):
            return source(*shape).float().double()

        return MAPS[name](by_step(z), in_float32)

    wide = entering(x, Flips(2))
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
    largest = kernel[0].topk(150).indices
    x[0, :, largest] = 1  # which none of its largest weights can raise
    found = F.linear(entering(x, Flips(2)), kernel)
    monkeypatch.setattr(changes, "_CANDIDATES", 1000)
    whole = F.linear(entering(x, Flips(2)), kernel)
    assert torch.equal(found.most, whole.most)
    assert torch.equal(found.least, whole.least)


def test_a_budget_between_two_integers_counts_the_next_change_in_part():
    x = frames(1, *SHAPE)
    ends = {}
    for budget in (0.0, 1.0, 1.25, 2.0):
        z = entering(x, Flips(budget)).flatten(0, 1)
        found = MAPS["convolution"](z, weights())
        ends[budget] = found.most
    between = 0.75 * ends[1.0] + 0.25 * ends[2.0]
    assert_close(ends[1.25], between)
    assert_close(ends[0.0], found.centre)


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_sums_over_time_have_one_budget(budget):
    x = frames(1, 3, 1, 2, 2, seed=1)
    kernel = weights()(2, 1, 2, 2)
    sums = torch.tensor(
        [
            [1.0, 1.0, 1.0],
            [0.5, -1.0, 0.0],
            [-0.2, 0.3, 2.0],
        ],
        dtype=torch.float64,
    )

    def function(z):
        currents = F.conv2d(z, kernel)
        return torch.tensordot(sums, currents, 1)

    z = entering(x, Flips(budget)).flatten(0, 1)
    bounds = F.conv2d(z, kernel)
    steps = []
    for t in range(3):
        of_one_step = operator.itemgetter(t)
        steps.append(bounds.changes.moved(of_one_step, apart=False))
    assert not share_frames(steps)
    rises, falls = changed_sums(sums, steps)
    middle = function(x[0])
    low, high = extremes(function, x[0], budget)
    assert_close(middle - falls, low)
    assert_close(middle + rises, high)


def test_steps_that_see_the_same_frames_are_noticed():
    x = frames(1, 2, 1, 2, 2)
    of_all_frames = weights()(3, 8)
    summed = F.linear(entering(x, Flips(1)).flatten(1), of_all_frames).changes
    assert share_frames([summed, summed])  # it is moved by several frames
    kernel = weights()(2, 1, 2, 2)
    one = F.conv2d(entering(x, Flips(1)).flatten(0, 1), kernel).changes
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


def classified(model, count, *, seed=0):
    """So many samples of frames, and the classes that a model gives them."""
    x = frames(count, *SHAPE, seed=seed).float()
    return x, model(x).argmax(1)


def every_change(sample, most):
    """A sample with every set of at most so many changes."""
    return all_changed(sample.flatten(), most).view(-1, *sample.shape)


NODES = {
    "LIF": lambda: neuron.LIFNode(tau=2.0, v_threshold=0.5),
    "soft": lambda: neuron.LIFNode(tau=2.0, v_threshold=0.5, v_reset=None),
    "rest": lambda: neuron.IFNode(v_threshold=0.4, v_reset=-0.3),
    "DLIF": lambda: DLIFNode(T=T, v_threshold=0.5),
}


PROVED = [
    *product(NODES, ["joint"]),
    *each_in_turn(NODES, ["ibp", "crown", "mip", "ibp"]),
]


@pytest.mark.parametrize(("node", "method"), PROVED)
def test_no_set_of_changes_breaks_what_is_proved(method, node):
    model = tiny(node=NODES[node]())
    x, y = classified(model, 6, seed=2)
    result = verify(model, x, y, 1, norm="L0", method=method)
    for sample, label, margin in zip(x, y, result.margin, strict=True):
        logits = model(every_change(sample, 1)).detach()
        leads = lead(logits, label.expand(len(logits)))
        assert float(leads.amin()) >= margin


@pytest.mark.slow
def test_the_program_agrees_with_all_sets_of_changes():
    proved = 0
    broken = 0
    for seed in range(3):
        model = tiny(seed)
        x, y = classified(model, 3, seed=seed)
        result = verify(model, x, y, 2, norm="L0", method="mip")
        joint = verify(model, x, y, 2, norm="L0")
        assert not any(result.unknown)
        for number, sample in enumerate(x):
            classes = model(every_change(sample, 2)).argmax(1)
            stands = bool((classes == y[number]).all())
            assert result.verified[number] == stands
            assert stands or not joint.verified[number]
            changed = result.x_adv[number] != sample
            assert int(changed.sum()) <= 2
        proved += sum(result.verified)
        broken += sum(result.broken)
    assert proved > 0
    assert broken > 0


def test_methods_are_in_order_and_no_change_is_the_sample_itself():
    model = tiny(3)
    x, y = classified(model, 12, seed=3)
    before = torch.full((12,), -torch.inf)
    for method in ("ibp", "joint", "crown"):
        result = verify(model, x, y, 1, norm="L0", method=method)
        margin = torch.tensor(result.margin)
        assert (margin >= before).all()
        before = margin
    no_change = verify(model, x, y, 0, norm="L0", method="ibp")
    no_radius = verify(model, x, y, 0.0, method="ibp")
    assert no_change.margin == pytest.approx(no_radius.margin)


def test_one_budget_for_all_steps_proves_more_than_one_for_each():
    node = neuron.LIFNode(tau=2.0, v_threshold=0.3, decay_input=False)
    parts = [layer.Conv2d(2, 4, 2), node, layer.Flatten(), layer.Linear(16, 3)]
    model = network(*parts, scale=0.7, seed=3)
    x, y = classified(model, 40, seed=3)
    shared = verify(model, x, y, 1, norm="L0")
    apart = verify(model, x, y, 1, norm="L0", method="ibp")
    assert shared.accuracy > apart.accuracy + 0.1


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([layer.AvgPool2d(2), layer.Conv2d(2, 2, 1)], "more than one convolution or linear map"),
        ([layer.Conv2d(2, 2, 2), layer.Conv2d(2, 2, 1)], "more than one convolution"),
        ([layer.MaxPool2d(2), layer.Conv2d(2, 2, 1)], "every value has its own budget"),
        ([Repeated(), layer.Conv2d(2, 2, 2)], "more than one"),
        ([layer.Conv2d(2, 2, 2), Repeated()], "more than one"),
    ],
)
def test_the_result_says_where_the_budget_is_not_shared(parts, text):
    node = neuron.IFNode(v_threshold=0.5)
    features = 2 if isinstance(parts[0], layer.AvgPool2d | layer.MaxPool2d) else 8
    model = network(*parts, node, layer.Flatten(), layer.Linear(features, 3))
    x, y = classified(model, 2)
    result = verify(model, x, y, 1, norm="L0")
    (entry,) = result.apart
    assert text in entry
    assert "Not bounded by one budget" in result.table()


def test_where_one_budget_is_shared_the_result_names_nothing():
    model = tiny()
    x, y = classified(model, 2)
    assert verify(model, x, y, 1, norm="L0").apart == ()


def too_few(changes, budget, dim):
    count = min(max(1, int(budget) - 1), changes.shape[dim])
    return changes.topk(count, dim).values


def nothing(self):
    return torch.zeros_like(self.up[0])


def exchanged(self, factor):
    return self.opposite()


@dataclass(frozen=True)
class Fault:
    """What stands in place of a function of a module, or of a class."""

    owner: object
    name: str
    wrong: Callable[..., object]


FAULTS = {
    "a change too few": Fault(changes, "first_changes", too_few),
    "no falls": Fault(Changes, "lowered", nothing),
    "no rises": Fault(Changes, "raised", nothing),
    "sides exchanged": Fault(Changes, "scaled", exchanged),
}


def fuzzed(seeds, points):
    for seed in seeds:
        fuzz_flips.check(seed, points)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_noticed(name, monkeypatch):
    fault = FAULTS[name]
    monkeypatch.setattr(fault.owner, fault.name, fault.wrong)
    with pytest.raises((AssertionError, UnsoundBoundsError)):
        fuzzed(range(40), 400)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 1.5}, "eps must be an integer >= 0 for L0, the number of values that may change"),
        ({"eps": -1}, "eps must be .*>= 0"),
        ({"eps": 37}, "eps must be <= 36, the values of a sample, got 37"),
        ({"norm": "L2"}, "norm must be one of"),
        ({"x": torch.full((2, *SHAPE), 0.5)}, "x must be binary event frames"),
        ({"x": torch.full((2, *SHAPE), -1.0)}, "or numbers of events, got values from -1 to -1"),
        ({"x": torch.full((2, *SHAPE), torch.nan)}, "x must be finite, got .* NaN"),
    ],
)
def test_wrong_use(options, message):
    right = {
        "x": torch.zeros(2, *SHAPE),
        "y": torch.tensor([0, 1]),
        "eps": 1,
        "norm": "L0",
    }
    with pytest.raises(ValueError, match=message):
        verify(tiny(), **right | options)


def test_bounds_in_training_are_those_of_proofs():
    model = tiny(1)
    x, y = classified(model, 3)
    leads = {}
    for differentiable in (True, False):
        run = BoundedRun(bounded_neurons(model), 3, differentiable=differentiable)
        logits = bounded_logits(model, run, x, Flips(2))
        leads[differentiable] = run.lead(logits, y)
    assert_close(leads[True].double(), leads[False], atol=1e-4, rtol=0)
    leads[True].sum().backward()
    gradient = model.net[0].weight.grad
    assert float(gradient.abs().sum()) > 0


def test_a_random_network_stays_within_its_bounds():
    fuzzed(range(1), 300)


@pytest.mark.slow
def test_many_random_networks_stay_within_their_bounds():
    fuzzed(range(1, 9), 800)


def test_the_attack_breaks_nothing_that_is_proved():
    for seed in range(2):
        model = tiny(seed)
        x, y = classified(model, 6, seed=seed)
        result = verify(model, x, y, 2, norm="L0")
        proved = torch.tensor(result.verified)
        generator = torch.Generator().manual_seed(0)
        x_adv = flip_events(model, x, y, flips=2, generator=generator)
        right = model(x_adv).argmax(1) == y
        assert proved.any()
        assert right[proved].all()
