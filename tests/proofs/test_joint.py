"""Joint bounds over time hold all that a network can do and are never looser than intervals; faults
in them are noticed.
"""

import random
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from covering import each_in_turn, mostly_slow
from proofs import fuzz
from proofs.formulas import formula
from proofs.networks import (
    NETWORKS,
    NEURONS,
    T,
    assert_keep_their_class,
    batch,
    classifier,
    convolutional,
    in_steps,
    spikes_at_the_end,
)
from proofs.watched import WatchedJointRun, check_point
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.testing import assert_close

from sj_robust import SpikingClassifier
from sj_robust.attacks import pgd
from sj_robust.classifier import SpikingEventClassifier
from sj_robust.core.preserved import full_precision
from sj_robust.data import load_images
from sj_robust.models import pretrained
from sj_robust.neuron.charging import find_neurons
from sj_robust.proofs import joint, verify, windows
from sj_robust.proofs.bounds import bounded_logits, bounded_neurons
from sj_robust.proofs.joint import OverTime
from sj_robust.proofs.maps import Maps
from sj_robust.proofs.spiking import Float32Spiking, Interval, LayerBounds

LARGEST = 4.0
ERROR = 2.0**-19


def over_time(model, x):
    neurons = bounded_neurons(model)
    with full_precision(x.device):
        return OverTime(Maps(model, neurons, x[0]), model.T)


def joint_run(model, x, eps):
    model.find_convention(x)
    run = WatchedJointRun(bounded_neurons(model), len(x), over_time=over_time(model, x))
    with full_precision(x.device):
        return run, bounded_logits(model, run, x, eps)


def assert_sums(run, name, spikes):
    """The count and random sums over time are within their bounds, for spikes [T, points, *]."""
    weights = torch.randn(6, len(spikes), dtype=torch.float64)
    weights[0] = 1.0
    weights[1:3] = weights[1:3].round()
    bounds = run.memories[name].trains.bounds(weights)
    sums = torch.einsum("ft,t...->f...", weights, spikes.double())
    assert (sums >= bounds.low - 1e-9).all()
    assert (sums <= bounds.high + 1e-9).all()


def check_points(model, x, eps):
    """At random points of each image's ball all that runs is inside its bounds, and so are the
    leads over every class.
    """
    x = x.repeat(50, *[1] * (x.ndim - 1))
    run, logits = joint_run(model, x, eps)
    for _ in range(4):
        z = (x + eps * (2 * torch.rand(x.shape) - 1)).clamp(0, 1)
        found = check_point(model, run, logits, z).double()
        for label in range(3):
            lead = run.lead(logits, torch.full((len(x),), label))
            assert (found - found[:, label : label + 1] <= lead).all()


def random_neuron(case, T):
    """A neuron in step mode m, and how its steps are bounded."""
    node = fuzz.random_node(case, grid=case.random() < 0.5, T=T)
    functional.set_step_mode(node, "m")
    found = find_neurons(nn.Sequential(node))[0]["0"]
    return node, Float32Spiking(found, LayerBounds())


def check_chain(seed):
    """A fine grid of currents through a neuron, rounded differently in every step: every train is
    in its chain, and the sums of a range of currents are in the bounds of its chain.
    """
    case = random.Random(seed)
    torch.manual_seed(seed)
    T = case.choice([1, 2, 3, 4, 6, 8])
    node, spiking = random_neuron(case, T)
    table = windows.possible_trains(
        spiking, T, largest=LARGEST, error=ERROR, device=torch.device("cpu")
    )
    size = case.choice([0.5, 1.0, 3.9])
    grid = torch.linspace(-size, size, 4001, dtype=torch.float64)
    inner = table.low[table.low.abs() < size]
    near = (inner + ERROR * (2 * torch.rand(8, len(inner)) - 1)).flatten()
    currents = torch.cat([grid, near]).sort().values
    moved = currents + 0.9 * ERROR * (2.0 * torch.randint(2, (T, 1, len(currents))) - 1)
    functional.reset_net(node)
    with torch.no_grad():
        seen = node(moved.float())[:, 0].double()
    single = table.chain(Interval(currents, currents))
    inside = torch.zeros(len(currents), dtype=torch.bool)
    for j, spikes in enumerate(table.spikes):
        possible = (single.first <= j) & (j <= single.last)
        inside |= possible & (seen == spikes.unsqueeze(1)).all(0)
    assert inside.all(), "a train outside its chain"
    starts = torch.randint(len(currents), (64,))
    ends = (starts + torch.randint(1, 400, (64,))).clamp(max=len(currents) - 1)
    chain = table.chain(Interval(currents[starts], currents[ends]))
    weights = torch.randn(5, T, dtype=torch.float64)
    bounds = chain.bounds(weights)
    sums = weights @ seen
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        some = sums[:, start : end + 1]
        least = bounds.low[:, number]
        most = bounds.high[:, number]
        assert (least <= some.amin(1) + 1e-9).all(), "a sum below its bound"
        assert (most >= some.amax(1) - 1e-9).all(), "a sum above its bound"
    return table, grid, seen


@pytest.mark.parametrize("seed", mostly_slow(range(1, 13), quick=range(1, 7)))
def test_a_chain_has_the_trains_of_a_constant_current_and_no_others(seed):
    """Every train whose currents are wider than the grid is seen on it."""
    table, grid, seen = check_chain(seed)
    spacing = float(grid[1] - grid[0])
    low = table.low.clamp(min=float(grid[0]))
    high = table.high.clamp(max=float(grid[-1]))
    wide = high - low > 3 * spacing
    found = {tuple(train) for train in seen.T.tolist()}
    for train in table.spikes[wide].tolist():
        assert tuple(train) in found


@dataclass
class Small:
    """Two spiking layers whose first neurons have a pixel each, so that all combinations of their
    trains are possible.
    """

    model: SpikingClassifier
    x: torch.Tensor
    eps: float

    @classmethod
    def random(cls, seed, *, soft=False, T=None):
        case = random.Random(seed)
        torch.manual_seed(seed)
        pixels = 4 if T is None else 2
        T = T or case.choice([2, 3, 4, 5])
        hidden = 6
        first = nn.Linear(pixels, pixels)
        with torch.no_grad():
            first.weight.copy_(torch.diag(torch.empty(pixels).uniform_(0.5, 3.0)))
            first.bias.uniform_(-0.3, 0.3)
        second = nn.Linear(pixels, hidden)
        with torch.no_grad():
            second.weight.normal_(0.0, 1.0)
            second.bias.uniform_(-0.5, 0.5)
        nodes = [fuzz.random_node(case, False, T) for _ in range(2)]
        while soft and nodes[1].v_reset is not None:
            nodes[1] = fuzz.random_node(case, False, T)
        net = nn.Sequential(first, nodes[0], second, nodes[1], nn.Linear(hidden, 3))
        functional.set_step_mode(net, "m")
        eps = case.choice([0.0, 0.02, 0.05, 0.1, 0.2])
        return cls(SpikingClassifier(net, T).eval(), torch.rand(1, pixels), eps)

    @torch.no_grad()
    def combinations(self):
        """All combinations of the first neurons' trains that a grid of currents gives, [T, C,
        pixels].
        """
        net = self.model.net
        T = self.model.T
        pixels = self.x.shape[1]
        steps = torch.linspace(-1, 1, 801).view(-1, 1)
        images = (self.x + self.eps * steps).clamp(0, 1)
        functional.reset_net(net)
        spikes = net[:2](images.expand(T, *images.shape))
        own = [spikes[:, :, p].unique(dim=1).T.tolist() for p in range(pixels)]
        return torch.tensor(list(product(*own))).movedim(2, 0)


def check_small(seed, *, soft=False, T=None):
    """All combinations of trains are inside the bounds of windows, of the dynamic program and of
    the lead.
    """
    small = Small.random(seed, soft=soft, T=T)
    net = small.model.net
    run, logits = joint_run(small.model, small.x, small.eps)
    combinations = small.combinations()
    functional.reset_net(net)
    net[3].store_v_seq = True
    with torch.no_grad():
        spikes = net[3](net[2](combinations))
        outputs = net[4](spikes).mean(0).double()
    assert_sums(run, "1", combinations)
    assert_sums(run, "3", spikes)
    for step, fired, v in zip(run.memories["3"].steps, spikes, net[3].v_seq, strict=True):
        for bounds, found in ((step.spikes, fired), (step.v, v.double())):
            assert ((found >= bounds.low) & (found <= bounds.high)).all()
    for label in range(3):
        lead = run.lead(logits, torch.tensor([label]))
        reached = outputs - outputs[:, label : label + 1]
        assert (reached <= lead).all(), "a lead"
    return combinations.shape[1]


@pytest.mark.parametrize("seed", range(4))
def test_all_combinations_of_trains_are_inside_the_bounds(seed):
    check_small(seed, soft=seed % 4 == 0)


@pytest.mark.slow
def test_all_combinations_of_trains_of_many_networks_are_inside_the_bounds():
    assert sum(map(check_small, range(1000, 1060))) > 150


@pytest.mark.parametrize("seed", [1, 2])
def test_windows_may_be_few(seed, monkeypatch):
    monkeypatch.setattr(joint, "KEPT", 1)
    check_small(seed)


@pytest.mark.parametrize("seed", range(6))
def test_windows_of_many_steps_are_few_and_hold_all_combinations_of_trains(seed):
    steps = 2 * windows.KEPT + 1
    sums = [len(windows.Windows(windows.KEPT).listed(T)) for T in (steps, 2 * steps)]
    assert sums[1] < 2.5 * sums[0]
    check_small(seed, T=steps, soft=seed % 3 == 0)


# of a max pooling in step mode s, which the residual one has, no call knows the others
@pytest.mark.parametrize("build", [convolutional, spikes_at_the_end])
@pytest.mark.parametrize("node", ["LIF", "DLIF soft"])
def test_step_mode_changes_nothing(build, node):
    x = torch.rand(3, 2, 8, 8)
    margins = []
    for step_mode in ("m", "s"):
        model = classifier(build, NEURONS[node], step_mode=step_mode)
        y = model(x).argmax(1)
        result = verify(model, x, y, 0.01)
        margins.append(torch.tensor(result.margin))
    assert_close(*margins)


def test_chains_are_narrow_where_the_current_is_the_image_itself():
    torch.manual_seed(0)
    node = neuron.LIFNode(v_threshold=0.3)
    model = in_steps(layer.Flatten(), node, layer.Linear(16, 3), T=8)
    x = torch.rand(40, 1, 4, 4)
    y = model(x).argmax(1)
    found = verify(model, x, y, 0.06)
    intervals = verify(model, x, y, 0.06, method="ibp")
    assert found.accuracy > intervals.accuracy + 0.2
    assert_keep_their_class(model, x, y, 0.06, found.verified)


def weighted(x):
    """Its input times a weight per time step."""
    return x * torch.linspace(0.5, 1.5, len(x)).view(-1, 1, 1)


def backwards(x):
    return x.flip(0)


def between(statement):
    """A statement on spikes."""
    return lambda net, x: net.out(net.last(net.fc(statement(net.node(net.first(x))))))


def joined(net, x):
    """Spikes of two layers beside each other, and their sum, feed a third one."""
    before = net.node(net.first(x))
    after = net.other(net.second(before))
    return net.last(net.third(torch.cat([before + after, after], dim=-1)))


def twice(net, x):
    return net.out(net.node(net.second(net.node(net.first(x)))))


NO_MAP = ["last: its current is no map of spikes of one step"]
NO_COUNTS = ["the output: it is no map of counts"]
STEPWISE = {
    "weights": (between(weighted), NO_MAP),
    "order": (between(backwards), NO_MAP),
    "constant weights": (lambda net, x: weighted(net.node(net.first(x))), NO_COUNTS),
    "image": (lambda net, x: net.last(net.node(x) + 0.3 * x), NO_MAP),
    "image without weight": (lambda net, x: net.last(net.node(x) + 0.0 * x), []),
    "concatenation and sum": (joined, []),
    "nothing": (between(lambda x: x), []),
    "order of counts": (lambda net, x: backwards(net.node(net.first(x))), []),
    "twice": (twice, ["node: its current is no map of spikes of one step", *NO_COUNTS]),
}


@pytest.mark.parametrize("node", ["LIF", "LIF soft", "DLIF"])
@pytest.mark.parametrize("case", STEPWISE)
def test_the_result_says_where_bounds_are_of_single_steps(case, node):
    if case == "twice" and node == "DLIF":
        pytest.skip("it has as many gains as steps")
    torch.manual_seed(0)
    forward, reasons = STEPWISE[case]
    layers = {name: nn.Linear(4, 4) for name in ("first", "second", "fc", "out")}
    nodes = {name: NEURONS[node]() for name in ("node", "other", "last")}
    model = formula(forward, T=T, third=nn.Linear(8, 4), **layers, **nodes)
    functional.set_step_mode(model.net, "m")
    x = torch.rand(3, 4)
    y = model(x).argmax(1)
    result = verify(model, x, y, 0.01)
    assert list(result.stepwise) == reasons
    for reason in reasons:
        assert reason in result.table()
    assert verify(model, x, y, 0.01, method="ibp").stepwise == ()
    check_points(model, x, 0.1)


def test_a_max_pooling_is_bounded_step_by_step():
    model = classifier(NETWORKS[1], NEURONS["LIF"])
    x, y = batch(model, 2)
    result = verify(model, x, y, 0.01)
    assert result.stepwise == ("4.inside.2: after a maximum, a product or another function",)


def test_frames_have_windows_in_the_first_layer():
    """Sums of a box of frames are sums of its steps, so that windows gain what steps lose at a
    reset.
    """
    torch.manual_seed(0)
    parts = (layer.Flatten(), layer.Linear(32, 12), neuron.LIFNode(), layer.Linear(12, 3))
    model = in_steps(*parts, kind=SpikingEventClassifier)
    model.net[1].weight.data *= 4
    x = torch.rand(8, T, 2, 4, 4)
    y = model(x).argmax(1)
    alone = verify(model, x, y, 0.02, method="ibp")
    together = verify(model, x, y, 0.02, method="joint")
    assert together.stepwise == ()
    gains = torch.tensor(together.margin) - torch.tensor(alone.margin)
    assert (gains >= 0).all()
    assert float(gains.max()) > 0.01


def test_images_that_do_not_fit_into_memory_go_one_after_the_other(monkeypatch):
    model = classifier(convolutional, NEURONS["LIF"])
    x, y = batch(model, 5)
    whole = verify(model, x, y, 0.01)
    done = []
    monkeypatch.setattr(joint, "_ELEMENTS", 1)
    parts = verify(model, x, y, 0.01, on_batch=done.append)
    assert done == [1, 2, 3, 4, 5]
    assert_close(torch.tensor(parts.margin), torch.tensor(whole.margin))
    assert parts.correct == whole.correct


def test_a_layer_with_too_many_trains_has_windows(monkeypatch):
    monkeypatch.setattr(windows, "_MOST", 2)
    check_small(3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "goals"),
    [
        ("digits/dlif-at-mppd", {0.004: 84.0, 0.008: 65.0, 0.016: 13.0}),
        ("digits/dlif-certified", {0.1: 89.0, 0.12: 84.0}),
    ],
)
def test_shipped_networks_are_proved_as_documented(name, goals):
    model = pretrained(name).eval()
    test = load_images("digits").test
    x, y = (torch.stack(part) for part in zip(*test, strict=True))
    for eps, least in goals.items():
        result = verify(model, x, y, eps)
        assert 100 * result.accuracy >= least
        proved = torch.tensor(result.verified)
        z = pgd(model, x, y, eps=eps, step_size=eps / 4, steps=20)
        right = model(z).argmax(1) == y
        assert right[proved].all()


class InFloat64(joint.JointRun):
    """A run whose sums over time are computed in float64, as if the network were."""

    def _through(self, weights, some):
        self.dtype = torch.float64
        found = super()._through(weights, some)
        self.dtype = torch.float32
        return found


def sums_of(kind, model, x):
    """Bounds of the sums over time of the currents of later layers, as a run computes them."""
    found = []

    class Noting(kind):
        def _through(self, weights, some):
            sums = super()._through(weights, some)
            found.append(sums.ends(rounded=self.rounded))
            return sums

    run = Noting(bounded_neurons(model), len(x), over_time=over_time(model, x))
    with full_precision(x.device):
        bounded_logits(model, run, x, 0.01)
    return found


def gaps_of(model, x):
    """How far the first sums in float32 are around those in float64, at both ends."""
    narrow = sums_of(joint.JointRun, model, x)
    wide = sums_of(InFloat64, model, x)
    gaps = []
    for one, other in zip(narrow[:1], wide[:1], strict=True):
        gaps += [other.low - one.low, one.high - other.high]
    return gaps


@pytest.mark.parametrize(("build", "node"), each_in_turn(NETWORKS[:2], ["IF", "DLIF"]))
def test_sums_in_float32_are_around_those_in_float64(build, node):
    gaps = []
    for seed in range(4):
        model = classifier(build, NEURONS[node], seed=seed)
        gaps += gaps_of(model, torch.rand(8, 2, 8, 8))
    assert len(gaps) > 2
    for gap in gaps:
        assert float(gap.min()) >= 0
        assert float(gap.max()) < 1e-3


def test_sums_in_float32_are_around_those_in_float64_without_a_map():
    torch.manual_seed(0)
    first = layer.Linear(8, 256)
    first.weight.data *= 4
    spiking = neuron.LIFNode(tau=3.0)
    again = neuron.LIFNode(tau=3.0, decay_input=False, v_threshold=1.2)
    model = in_steps(first, spiking, again, layer.Linear(256, 3))
    gaps = gaps_of(model, torch.rand(4, 8))
    assert len(gaps) == 2
    for gap in gaps:
        assert float(gap.min()) >= 0
        assert float(gap.max()) < 1e-5


@pytest.mark.parametrize("kept", [1, 2, 8])
def test_every_last_reset_has_one_slot_and_keeps_it_while_nothing_fires(kept):
    plan = windows.Windows(kept)
    for t in range(30):
        slots = [plan.slot(t, a) for a in range(t + 1)]
        assert sorted(set(slots)) == list(range(plan.slots(t)))
        for a, slot in enumerate(slots):
            assert plan.start(t, slot) in (a, None)
            assert plan.after(t, slot) == plan.slot(t + 1, a)
        if t > kept + 1:
            inside = {plan.slot(t - 1, a) for a in range(1, t - kept + 1)}
            assert inside == set(plan.members(t))
    counts = [len(plan.listed(T)) for T in (20, 40, 60)]
    assert counts[2] - counts[1] == counts[1] - counts[0]


@pytest.mark.parametrize("kind", ["LIF", "LIF soft"])
def test_many_steps_stay_inside_and_are_never_looser_than_intervals(kind):
    torch.manual_seed(0)
    node = NEURONS[kind]
    parts = (nn.Linear(4, 6), node(), nn.Linear(6, 5), node(), nn.Linear(5, 3))
    model = in_steps(*parts, T=24)
    x = torch.rand(3, 4)
    y = model(x).argmax(1)
    check_points(model, x, 0.03)
    intervals = verify(model, x, y, 0.03, method="ibp")
    together = verify(model, x, y, 0.03)
    assert torch.tensor(together.margin).ge(torch.tensor(intervals.margin)).all()


@pytest.mark.parametrize("node", ["IF", "LIF reset to -0.5", "DLIF"])
@pytest.mark.parametrize("build", NETWORKS[:2])
def test_the_compiled_kernel_gives_the_potentials_and_spikes_of_the_reference(
    build, node, monkeypatch
):
    model = classifier(build, NEURONS[node])
    x, y = batch(model, 5)
    found = {}
    for backend in ("auto", "reference"):
        monkeypatch.setattr(windows.SpikeTrains, "backend", backend)
        run, logits = joint_run(model, x, 0.02)
        found[backend] = [run.lead(logits, y)]
        for memory in run.memories.values():
            for step in memory.steps:
                for bounds in (step.h, step.spikes, step.v):
                    found[backend] += [bounds.low, bounds.high]
    for one, other in zip(*found.values(), strict=True):
        assert_close(one.double(), other.double(), rtol=1e-9, atol=1e-9)
