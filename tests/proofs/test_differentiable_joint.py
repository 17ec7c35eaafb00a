"""Joint bounds for training: their values are those of ``verify``, their gradients those of the
formulas written out with torch's autograd, and no input leaves them.
"""

import gc
import weakref
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from proofs import fuzz
from proofs.test_verification import NETWORKS, NEURONS, T, classifier, convolutional
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from training.step_by_hand import Triangle

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.classifier import SpikingEventClassifier
from sj_robust.core.preserved import full_precision
from sj_robust.proofs import bounds, differentiable, differentiable_chains, joint, rounding
from sj_robust.proofs.differentiable import DifferentiableBounds
from sj_robust.proofs.differentiable_chains import Chains, ChainSums, Gates
from sj_robust.proofs.joint import JointRun, OverTime
from sj_robust.proofs.relaxation import Maps
from sj_robust.proofs.spiking import RealSpiking
from sj_robust.proofs.verification import bounded_logits, bounded_neurons


@pytest.fixture
def exact(monkeypatch):
    """Proofs without rounding."""
    monkeypatch.setattr(rounding, "_UNIT", 0.0)
    monkeypatch.setattr(bounds, "SLACK", 1.0)
    monkeypatch.setattr(joint, "SLACK", 1.0)


def proved_lead(model, x, y, eps):
    """What the bounds of verify say, without its checks, which would notice missing rounding."""
    neurons = bounded_neurons(model.eval())
    bounded = partial(bounded_logits, model)
    with full_precision(x.device):
        over_time = OverTime(Maps(bounded, neurons, x[0]), model.T)
        run = JointRun(neurons, len(x), over_time=over_time)
        return run.lead(bounded_logits(model, run, x, eps), y)


def assert_same_lead(model, x, y, eps):
    """The leads for training and for proofs, for a bound of each image's lead."""
    trained = DifferentiableBounds(model, method="joint").lead(x, y, eps)
    assert trained.dtype == torch.float64
    assert bool((trained.gather(1, y.unsqueeze(1)) == 0).all())
    expected = proved_lead(model, x, y, eps)
    torch.testing.assert_close(trained.detach(), expected, atol=1e-9, rtol=1e-9)
    return trained


@pytest.mark.parametrize("node", NEURONS)
@pytest.mark.parametrize("build", NETWORKS)
def test_they_are_those_of_verify_without_rounding(build, node, exact):
    model = classifier(build, NEURONS[node], mean=[0.5, 0.4], std=[0.3, 0.2]).double()
    x = torch.rand(4, 2, 8, 8, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 0])
    for eps in (0.0, 0.02, 0.3):
        lead = assert_same_lead(model, x, y, eps)
    lead.sum().backward()
    for name, value in model.named_parameters():
        assert value.grad is not None, name
        assert bool(value.grad.isfinite().all()), name


def of_linear_layers(node, T, sizes=(4, 6, 5, 3), *, seed=0):
    """Linear layers with spiking neurons between them, in float64."""
    torch.manual_seed(seed)
    parts = []
    for before, after in pairwise(sizes):
        linear = nn.Linear(before, after)
        linear.weight.data *= 2
        parts += [linear, node()]
    net = nn.Sequential(*parts[:-1])
    functional.set_step_mode(net, "m")
    return SpikingClassifier(net, T).double().eval()


CASES = {
    "many steps, few windows": lambda: of_linear_layers(NEURONS["LIF"], 11),
    "many steps, soft": lambda: of_linear_layers(NEURONS["LIF soft"], 10),
    "three layers": lambda: of_linear_layers(NEURONS["PLIF"], 5, (4, 6, 5, 5, 3)),
    "one step": lambda: of_linear_layers(neuron.IFNode, 1),
    "step mode s": lambda: classifier(convolutional, NEURONS["DLIF"], step_mode="s").double(),
    "soft, step mode s": lambda: classifier(
        convolutional, NEURONS["LIF soft"], step_mode="s"
    ).double(),
}


@pytest.mark.parametrize("case", CASES)
def test_they_are_those_of_verify_for_other_networks(case, exact):
    model = CASES[case]()
    shape = (3, 4) if isinstance(model.net[0], nn.Linear) else (3, 2, 8, 8)
    x = torch.rand(shape, dtype=torch.float64)
    y = torch.tensor([0, 1, 2])
    for eps in (0.01, 0.1):
        assert_same_lead(model, x, y, eps)


def test_frames_and_few_trains_have_windows(exact, monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(layer.Flatten(), layer.Linear(32, 6), NEURONS["LIF"](), layer.Linear(6, 3))
    functional.set_step_mode(net, "m")
    events = SpikingEventClassifier(net, T).double().eval()
    frames = torch.rand(3, T, 2, 4, 4, dtype=torch.float64)
    y = torch.tensor([0, 1, 2])
    assert_same_lead(events, frames, y, 0.02)
    model = of_linear_layers(NEURONS["LIF"], 4)
    monkeypatch.setattr(joint.OverTime, "trains", lambda *args, **kwargs: None)
    monkeypatch.setattr(differentiable_chains, "_MOST", 0)
    assert_same_lead(model, torch.rand(3, 4, dtype=torch.float64), y, 0.05)


@dataclass
class Piece:
    """Currents that give a train, and the slope of the potential at every step."""

    low: float
    high: float
    slope: torch.Tensor
    slopes: tuple = ()
    train: tuple = ()


class ByHand:
    """Bounds of linear - neuron - linear - neuron - linear with hard resets to 0 and threshold 1,
    neuron by neuron, with gates, sums and cases from torch's autograd.
    """

    def __init__(self, net, T, width):
        self.net = net
        self.T = T
        self.width = width
        self.decays, self.gains = [], []
        for node in (net[1], net[3]):
            decay = 1 - node.w.sigmoid() if hasattr(node, "w") else torch.tensor(1 - 1 / node.tau)
            ones = torch.ones(T, dtype=torch.float64)
            own = ones * (1 - decay) if getattr(node, "decay_input", False) else ones
            gains = getattr(node, "input_gain", own)
            self.decays.append(decay)
            self.gains.append(gains)

    def fire(self, z):
        return Triangle.apply(z, self.width)

    def pieces(self):
        found = [Piece(-1e9, 1e9, torch.zeros((), dtype=torch.float64))]
        for t in range(self.T):
            now = []
            for piece in found:
                slope = self.decays[0] * piece.slope + self.gains[0][t]
                cut = 1 / float(slope.detach())
                left, right = (piece.low, min(piece.high, cut)), (max(piece.low, cut), piece.high)
                silent, fires = (left, right) if slope > 0 else (right, left)
                for (low, high), spike in ((silent, 0.0), (fires, 1.0)):
                    if low <= high + 1e-9:
                        kept = slope * (1 - spike)
                        slopes = (*piece.slopes, slope)
                        now.append(Piece(low, high, kept, slopes, (*piece.train, spike)))
            found = now
        return sorted(found, key=lambda piece: (piece.low, piece.high))

    def chain(self, low, high, weights):
        """Bounds of one neuron's weighted sums, one after the other."""
        pieces = self.pieces()
        below, above = [], []
        for piece, after in pairwise(pieces):
            pairs = zip(piece.train, after.train, strict=True)
            step = next(t for t, (one, other) in enumerate(pairs) if one != other)
            slope = piece.slopes[step]
            below.append(self.fire(slope.sign() * (slope * low - 1)))
            above.append(self.fire(slope.sign() * (slope * high - 1)))
        a = self.opened(below)
        b = max(a, self.opened(above))
        trains = torch.tensor([piece.train for piece in pieces], dtype=torch.float64)
        least, most = [], []
        for row in weights:
            values = trains @ row
            moved = {"least": 0.0, "most": 0.0}
            for end in moved:
                value = partial(self.value, values, end)
                total = value(a, b)
                for j in range(len(pieces) - 1):
                    opens = below[j] - below[j].detach()
                    total = total + opens * (value(j + 1, b) - value(j, b)).detach()
                    opens = above[j] - above[j].detach()
                    total = total + opens * (value(a, j + 1) - value(a, j)).detach()
                moved[end] = total
            least.append(moved["least"])
            most.append(moved["most"])
        return torch.stack(least), torch.stack(most)

    @staticmethod
    def opened(gates):
        return int(sum(float(gate.detach()) for gate in gates))

    @staticmethod
    def value(values, end, a, b):
        if a > b:
            return values[a] if end == "least" else values[b]
        some = values[a : b + 1]
        return some[some.argmin()] if end == "least" else some[some.argmax()]

    def lead(self, x, y, eps):
        low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
        first, second, last = self.net[0], self.net[2], self.net[4]
        centre = first((low + high) / 2)
        radius = (high - low) / 2 @ first.weight.abs().T
        windows = [(a, t) for t in range(self.T) for a in range(t + 1)]
        decay, gains = self.decays[1], self.gains[1]
        weights = []
        for a, t in windows:
            row = [decay ** (t - k) * gains[k] if a <= k <= t else 0 * decay for k in range(self.T)]
            weights.append(torch.stack(row))
        rows = []
        for i in range(len(x)):
            sums = []
            for m in range(centre.shape[1]):
                ends = centre[i, m] - radius[i, m], centre[i, m] + radius[i, m]
                sums.append(self.chain(*ends, weights))
            least = torch.stack([one for one, _ in sums], 1)
            most = torch.stack([one for _, one in sums], 1)
            middle = (least + most) / 2 @ second.weight.T
            middle = middle + torch.stack(weights).sum(1, keepdim=True) * second.bias
            spread = (most - least) / 2 @ second.weight.abs().T
            rows.append(self.counts(windows, middle - spread, middle + spread))
        least, most = (torch.stack(part) for part in zip(*rows, strict=True))
        gap = last.weight.unsqueeze(0) - last.weight[y].unsqueeze(1)
        found = (
            gap @ ((least + most) / 2).unsqueeze(2) + gap.abs() @ ((most - least) / 2)[..., None]
        )
        found = found.squeeze(2) + last.bias - last.bias[y].unsqueeze(1)
        return found.scatter(1, y.unsqueeze(1), 0.0)

    def counts(self, windows, low, high):
        """Bounds of the mean spikes of the second layer of an image."""
        decay = self.decays[1]
        lowest = dict(zip(windows, low, strict=True))
        alone = dict(zip(windows, high, strict=True))
        highest = dict(alone)
        for a, t in windows:
            for k in range(a + 1, t + 1):
                most = decay ** (t - k + 1) * highest[a, k - 1].clamp(max=1) + alone[k, t]
                highest[a, t] = torch.minimum(highest[a, t], most)
        sure = {window: self.fire(end - 1) for window, end in lowest.items()}
        possible = {window: self.fire(end - 1) for window, end in highest.items()}

        def rest(better, t, a):
            if t == self.T:
                return torch.zeros_like(low[0])
            fires = 1 / self.T + rest(better, t + 1, t + 1)
            stays = rest(better, t + 1, a)
            both = possible[a, t] - sure[a, t]
            silent = 1 - possible[a, t]
            return silent * stays + sure[a, t] * fires + both * better(fires, stays)

        return rest(torch.minimum, 0, 0), rest(torch.maximum, 0, 0)


def dlif():
    node = DLIFNode(T=3, tau=4.0)
    node.input_gain.data = torch.tensor([1.5, -0.7, 2.0])
    return node


TRIANGLE = surrogate.PiecewiseQuadratic(alpha=1.0)
BY_HAND = {
    "LIF": lambda: neuron.LIFNode(tau=2.0, decay_input=False, surrogate_function=TRIANGLE),
    "PLIF": lambda: neuron.ParametricLIFNode(2.0, decay_input=False, surrogate_function=TRIANGLE),
    "DLIF": dlif,
}


def gradients(model, lead, y):
    """Gradients of every parameter of the cross entropy of leads."""
    for value in model.parameters():
        value.grad = None
    nn.functional.cross_entropy(lead, y).backward()
    return {name: value.grad.clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("width", [1.0, 0.5])
@pytest.mark.parametrize("node", BY_HAND)
def test_gradients_are_those_of_the_formulas(node, width):
    model = of_linear_layers(BY_HAND[node], 3)
    x = torch.rand(3, 4, dtype=torch.float64)
    y = torch.tensor([0, 1, 2])
    for eps in (0.02, 0.15):
        trained = DifferentiableBounds(model, surrogate_width=width, method="joint")
        lead = trained.lead(x, y, eps)
        expected = ByHand(model.net, 3, width).lead(x, y, eps)
        torch.testing.assert_close(lead, expected, rtol=1e-9, atol=1e-12)
        found = gradients(model, lead, y)
        wanted = gradients(model, expected, y)
        for name, value in found.items():
            assert float(value.abs().max()) > 1e-6, name
            torch.testing.assert_close(value, wanted[name], rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("seed", range(3))
def test_a_sum_over_a_chain_is_the_slope_of_its_smooth_form(seed):
    """Gates that open smoothly, with the surrogate as their slope, in finite differences."""
    torch.manual_seed(seed)
    values = torch.randn(5, 4, dtype=torch.float64)
    scale, shift = torch.rand(3).double() + 0.5, -torch.tensor([0.2, 0.5, 0.9]).double()
    low = torch.rand(7, dtype=torch.float64)
    high = low + 0.5 * torch.rand(7, dtype=torch.float64)
    cuts = -shift / scale
    order = cuts.argsort()
    scale, shift, cuts = scale[order], shift[order], cuts[order]
    ends = torch.tensor([-1e9, *cuts, 1e9], dtype=torch.float64)
    trains = joint.Trains(ends[:-1], ends[1:], torch.eye(4, dtype=torch.float64))
    chains = Chains.of(trains, joint.Interval(low, high))
    given = [part.requires_grad_() for part in (low, high, scale, shift, values)]
    number = torch.arange(3)
    gates = Gates(scale, shift, number, number + 1)
    chain = SimpleNamespace(gates=gates, chains=chains, derivative=lambda z: 1 / z.cosh() ** 2)
    found = ChainSums.apply(*given, chain)
    weights = [torch.randn_like(part) for part in found]
    total = sum((part * weight).sum() for part, weight in zip(found, weights, strict=True))
    grads = torch.autograd.grad(total, given)

    first, last = chains.chain // 4, chains.chain % 4
    tables = differentiable_chains.ranges(values.detach())

    def smooth(low, high, scale, shift):
        below = (scale[:, None] * low + shift[:, None]).tanh()
        above = (scale[:, None] * high + shift[:, None]).tanh()
        result = 0.0
        for table, weight in zip(tables, weights, strict=True):
            for m in range(len(low)):
                moves = table[:, :, last[m]].diff(dim=1) @ below[:, m]
                moves = moves + table[:, first[m]].diff(dim=1) @ above[:, m]
                result = result + (moves * weight[:, m]).sum()
        return float(result)

    step = 1e-6
    parts = [part.detach() for part in given[:4]]
    for number, grad in enumerate(grads[:4]):
        for i in range(len(grad)):
            moved = []
            for sign in (1, -1):
                changed = [part.clone() for part in parts]
                changed[number][i] += sign * step
                moved.append(smooth(*changed))
            slope = (moved[0] - moved[1]) / (2 * step)
            assert float(grad[i]) == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_batch_norm_has_the_statistics_of_the_clean_batch(step_mode):
    model = classifier(convolutional, NEURONS["DLIF"], step_mode=step_mode).double().train()
    x = torch.rand(5, 2, 8, 8, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 0, 1])
    trained = DifferentiableBounds(model, method="joint")
    with trained.watching():
        logits = model(x)
    lead = trained.lead(x, y, 0.0)
    torch.testing.assert_close(lead, logits - logits.gather(1, y.unsqueeze(1)))
    intervals = DifferentiableBounds(model)
    with intervals.watching():
        model(x)
    wider = intervals.lead(x, y, 0.02)
    assert bool((trained.lead(x, y, 0.02) <= wider + 1e-9).all())


def check_points(seed, points=256):
    """Random inputs of the ball are inside the bounds for training, in float64."""
    case = fuzz.random.Random(seed)
    torch.manual_seed(seed)
    model = fuzz.random_classifier(case, False, fuzz.STEPS[seed % len(fuzz.STEPS)])
    if isinstance(model, SpikingEventClassifier):
        return 0
    model = model.double()
    x = torch.rand(2, 2, 6, 6, dtype=torch.float64)
    y = model(x).argmax(1)
    eps = 10 ** case.uniform(-3.5, -1)
    lead = DifferentiableBounds(model, method="joint").lead(x, y, eps).detach()

    moved = eps * (2 * torch.rand(2, points, *x.shape[1:], dtype=torch.float64) - 1)
    moved[:, ::2] = eps * moved[:, ::2].sign()
    with torch.no_grad():
        logits = model((x.unsqueeze(1) + moved).clamp(0, 1).flatten(0, 1)).unflatten(0, (2, points))
    reached = logits - logits.gather(2, y.view(2, 1, 1).expand(2, points, 1))
    assert bool((reached <= lead.unsqueeze(1) + 1e-9).all())
    return 2 * points


@pytest.mark.parametrize("seed", range(20, 28))
def test_no_point_leaves_the_bounds_for_training(seed):
    check_points(seed)


@pytest.mark.slow
def test_no_point_leaves_the_bounds_of_many_networks_for_training():
    assert sum(map(check_points, range(1000, 1150))) > 40_000


def chains_without_their_last_trains(monkeypatch):
    of = Chains.of

    def shorter(trains, current):
        return of(trains, joint.Interval(current.low, current.low))

    monkeypatch.setattr(Chains, "of", shorter)


def spikes_that_are_sure_too_early(monkeypatch):
    spike = RealSpiking.spike
    monkeypatch.setattr(RealSpiking, "spike", lambda self, z: spike(self, z + 0.3))


@pytest.mark.parametrize(
    "plant", [chains_without_their_last_trains, spikes_that_are_sure_too_early]
)
def test_a_fault_is_noticed(plant, monkeypatch):
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        sum(map(check_points, range(20, 120)))


def test_a_step_leaves_nothing_behind(monkeypatch):
    runs = []

    class Watched(differentiable.DifferentiableJointRun):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            runs.append(weakref.ref(self))

    monkeypatch.setattr(differentiable, "DifferentiableJointRun", Watched)
    trained = DifferentiableBounds(of_linear_layers(NEURONS["LIF"], 3), method="joint")
    lead = trained.lead(torch.rand(2, 4, dtype=torch.float64), torch.tensor([0, 1]), 0.1)
    lead.sum().backward()
    del lead
    gc.collect()
    assert [run() for run in runs] == [None]
