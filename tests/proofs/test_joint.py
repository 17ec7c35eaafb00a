"""Joint bounds over time hold all that a network can do and are never looser than intervals; faults
in them are noticed.
"""

import random
from dataclasses import dataclass
from functools import partial
from itertools import product

import pytest
import torch
from covering import each_in_turn
from proofs import fuzz
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
from sj_robust.proofs import joint, rules, verify, windows
from sj_robust.proofs.bounds import bounded_logits, bounded_neurons
from sj_robust.proofs.joint import OverTime
from sj_robust.proofs.maps import Maps
from sj_robust.proofs.spiking import Float32Spiking, Interval, LayerBounds

LARGEST = 4.0
ERROR = 2.0**-19


def over_time(model, x):
    neurons = bounded_neurons(model)
    with full_precision(x.device):
        return OverTime(Maps(partial(bounded_logits, model), neurons, x[0]), model.T)


def joint_run(model, x, eps):
    model.find_convention(x)
    run = fuzz.RecordedJoint(bounded_neurons(model), len(x), over_time=over_time(model, x))
    with full_precision(x.device):
        return run, bounded_logits(model, run, x, eps)


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


@pytest.mark.parametrize("seed", [5, 6])
def test_every_train_of_a_constant_current_is_in_its_chain(seed):
    check_chain(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 106))
def test_every_train_of_many_neurons_is_in_its_chain(seed):
    check_chain(seed)


@pytest.mark.parametrize("seed", range(1, 5))
def test_a_chain_has_no_other_trains(seed):
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
    case = random.Random(seed)
    for name, seen in (("1", combinations), ("3", spikes)):
        fuzz.assert_sums(run, name, seen.unsqueeze(1).double(), case)
    bounds = fuzz.bounds_of(run)["3"]
    bounds.assert_hold(spikes.bool(), net[3].v_seq.double(), "3")
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


@pytest.mark.parametrize(
    ("build", "node"), each_in_turn(NETWORKS, ["LIF reset to -0.5", "PLIF", "DLIF soft"])
)
def test_no_layer_and_no_margin_is_looser_than_intervals(build, node):
    model = classifier(build, NEURONS[node])
    x, y = batch(model, 4)
    for eps in (0.0, 0.01):
        run, logits = joint_run(model, x, eps)
        intervals = fuzz.Recorded(bounded_neurons(model), len(x))
        with full_precision(x.device):
            wider = bounded_logits(model, intervals, x, eps)
        assert (run.lead(logits, y) <= intervals.lead(wider, y)).all()
        found = fuzz.bounds_of(run)
        for name, wide in fuzz.bounds_of(intervals).items():
            found[name].assert_within(wide, name)


def small_network(node, seed):
    torch.manual_seed(seed)
    parts = (nn.Linear(4, 6), node(), nn.Linear(6, 5), node(), nn.Linear(5, 3))
    for part in parts[::2]:
        part.weight.data *= 2
    return in_steps(*parts)


@pytest.mark.slow
@pytest.mark.parametrize("node", ["LIF", "LIF soft", "PLIF", "DLIF"])
def test_what_is_proved_lies_between_intervals_and_the_exact_answer(node):
    pytest.importorskip("scipy")
    model = small_network(NEURONS[node], seed=0)
    x = torch.rand(4, 4)
    y = model(x).argmax(1)
    eps = 0.02
    intervals = verify(model, x, y, eps, method="ibp")
    joint = verify(model, x, y, eps, method="joint")
    exact = verify(model, x, y, eps, method="mip", time_limit=2.0)
    assert intervals.margin <= joint.margin
    for number in range(len(x)):
        assert intervals.verified[number] <= joint.verified[number]
        assert joint.verified[number] <= exact.verified[number]
        assert not (joint.verified[number] and exact.broken[number])


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


class Weighted(nn.Module):
    """Its input times a weight per time step."""

    def forward(self, x):
        return x * torch.linspace(0.5, 1.5, len(x)).view(-1, *[1] * (x.ndim - 1))


class Reversed(nn.Module):
    def forward(self, x):
        return x.flip(0)


class FromImage(nn.Module):
    """The input of the network is added to the spikes of its first layer."""

    def __init__(self, node, share=0.3):
        super().__init__()
        self.node = node
        self.last = neuron.IFNode(step_mode="m")
        self.share = share

    def forward(self, x):
        return self.last(self.node(x) + self.share * x)


class Joined(nn.Module):
    """Spikes of two layers beside each other, and their sum, feed a third one."""

    def __init__(self, node):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.one = node()
        self.second = nn.Linear(4, 4)
        self.other = node()
        self.third = nn.Linear(8, 3)
        self.last = node()

    def forward(self, x):
        before = self.one(self.first(x))
        after = self.other(self.second(before))
        return self.last(self.third(torch.cat([before + after, after], dim=-1)))


def in_between(*parts):
    before = (nn.Linear(4, 6), neuron.LIFNode())
    after = (nn.Linear(6, 6), neuron.IFNode(), nn.Linear(6, 3))
    return in_steps(*before, *parts, *after)


def at_the_end(part):
    return in_steps(nn.Linear(4, 3), neuron.LIFNode(), part)


STEPWISE = {
    "weights": (lambda: in_between(Weighted()), ["4: its current is no map of spikes of one step"]),
    "order": (lambda: in_between(Reversed()), ["4: its current is no map of spikes of one step"]),
    "constant weights": (lambda: at_the_end(Weighted()), ["the output: it is no map of counts"]),
    "image": (
        lambda: SpikingClassifier(FromImage(NEURONS["LIF"]()), T).eval(),
        ["last: its current is no map of spikes of one step"],
    ),
    "image without weight": (
        lambda: SpikingClassifier(FromImage(NEURONS["LIF"](), share=0.0), T).eval(),
        [],
    ),
    "concatenation and sum": (
        lambda: SpikingClassifier(Joined(NEURONS["DLIF"]), T).eval(),
        [],
    ),
    "nothing": (lambda: in_between(nn.Identity()), []),
    "order of counts": (lambda: at_the_end(Reversed()), []),
}


@pytest.mark.parametrize("case", STEPWISE)
def test_the_result_says_where_bounds_are_of_single_steps(case):
    torch.manual_seed(0)
    build, reasons = STEPWISE[case]
    model = build()
    functional.set_step_mode(model.net, "m")
    x = torch.rand(3, 4)
    y = model(x).argmax(1)
    result = verify(model, x, y, 0.01)
    assert list(result.stepwise) == reasons
    for reason in reasons:
        assert reason in result.table()
    assert verify(model, x, y, 0.01, method="ibp").stepwise == ()
    check_points(model, x, 0.1)


def check_points(model, x, eps, count=500):
    """Random inputs of each image's ball are inside the bounds of sums and logits."""
    run, logits = joint_run(model, x, eps)
    moved = eps * (2 * torch.rand(len(x), count, *x.shape[1:]) - 1)
    points = (x.unsqueeze(1) + moved).clamp(0, 1)
    with torch.no_grad():
        seen, found = fuzz.run_of(model, points.flatten(0, 1))
    for name, (spikes, _) in seen.items():
        fired = spikes.double().unflatten(1, (len(x), count))
        fuzz.assert_sums(run, name, fired, random.Random(0))
    rows = found.double().unflatten(0, (len(x), count))
    assert (rows >= logits.lower.unsqueeze(1)).all()
    assert (rows <= logits.upper.unsqueeze(1)).all()
    for label in range(3):
        lead = run.lead(logits, torch.full((len(x),), label)).unsqueeze(1)
        assert (rows - rows[..., label : label + 1] <= lead).all()


def test_a_max_pooling_is_bounded_step_by_step():
    model = classifier(NETWORKS[1], NEURONS["LIF"])
    x = torch.rand(2, 2, 8, 8)
    result = verify(model, x, model(x).argmax(1), 0.01)
    assert result.stepwise == ("4.inside.2: after a maximum, a product or another function",)


class Twice(nn.Module):
    """A neuron that is called twice in a forward, and carries its state."""

    def __init__(self, node):
        super().__init__()
        self.first = layer.Linear(4, 4)
        self.second = layer.Linear(4, 4)
        self.node = node
        self.last = layer.Linear(4, 3)

    def forward(self, x):
        return self.last(self.node(self.second(self.node(self.first(x)))))


@pytest.mark.parametrize("kind", ["IF", "LIF", "LIF soft", "LIF reset to 0.2"])
def test_a_neuron_that_carries_its_state_from_call_to_call_stays_inside(kind):
    torch.manual_seed(1)
    net = Twice(NEURONS[kind]())
    functional.set_step_mode(net, "m")
    model = SpikingClassifier(net, 3).eval()
    x = torch.rand(2, 4)
    run, _ = joint_run(model, x, 0.1)
    assert run.memories["node"].trains.steps == 6
    check_points(model, x, 0.1)


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


@pytest.mark.slow
def test_sums_whose_rounding_is_forgotten_are_noticed(monkeypatch):
    monkeypatch.setattr(rules, "gamma", lambda terms: 0.0)
    with pytest.raises(AssertionError):
        test_sums_in_float32_are_around_those_in_float64(NETWORKS[1], "IF")


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
    check_points(model, x, 0.03, count=200)
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
        found[backend] = (fuzz.bounds_of(run), run.lead(logits, y))
    for name, one in found["auto"][0].items():
        other = found["reference"][0][name]
        for part, value in vars(one).items():
            assert_close(value.double(), vars(other)[part].double(), rtol=1e-9, atol=1e-12)
    assert_close(found["auto"][1], found["reference"][1], rtol=1e-9, atol=1e-9)
