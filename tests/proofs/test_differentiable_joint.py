"""Bounds for training: their values are those of ``verify``, the gradients of joint ones those of
the formulas written out in joint_by_hand, and no input leaves them.
"""

import gc
import random
import weakref
from functools import partial
from itertools import pairwise, product
from types import SimpleNamespace

import pytest
import torch
from covering import mostly_slow
from proofs import fuzz, joint_by_hand
from proofs.collected import no_collection, tensors_of_cycles
from proofs.networks import NEURONS, QUICK, SAMPLED, T, classifier, convolutional, in_steps
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.testing import assert_close
from unchanged import unchanged

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.classifier import SpikingEventClassifier
from sj_robust.core.preserved import full_precision
from sj_robust.models.chain import SmallConvNet
from sj_robust.proofs import (
    bounds,
    differentiable,
    differentiable_chains,
    joint,
    rounding,
    windows,
)
from sj_robust.proofs.bounds import BoundedRun, bounded_logits, bounded_neurons
from sj_robust.proofs.differentiable import DifferentiableBounds
from sj_robust.proofs.differentiable_chains import Chains, ChainSums, Gates
from sj_robust.proofs.joint import JointRun, OverTime
from sj_robust.proofs.maps import Maps
from sj_robust.proofs.spiking import Interval, RealSpiking
from sj_robust.proofs.windows import ListedTrains, SpikeTrains

rand = partial(torch.rand, dtype=torch.float64)
randn = partial(torch.randn, dtype=torch.float64)


@pytest.fixture
def exact(monkeypatch):
    """Proofs without rounding."""
    monkeypatch.setattr(rounding, "_UNIT", 0.0)
    monkeypatch.setattr(bounds, "SLACK", 1.0)
    monkeypatch.setattr(joint, "SLACK", 1.0)


def trained_lead(model, x, y, eps, *, method="joint", **options):
    trained = DifferentiableBounds(model, method=method, **options)
    return trained.lead(x, y, eps)


def proved_lead(model, x, y, eps, *, method="joint"):
    """What the bounds of verify say, without its checks, which would notice missing rounding."""
    neurons = bounded_neurons(model.eval())
    bounded = partial(bounded_logits, model)
    with full_precision(x.device):
        if method == "ibp":
            run = BoundedRun(neurons, len(x))
        else:
            maps = Maps(bounded, neurons, x[0])
            run = JointRun(neurons, len(x), over_time=OverTime(maps, model.T))
        logits = bounded(run, x, eps)
        return run.lead(logits, y)


def assert_same_lead(model, x, y, eps, **options):
    """The leads for training, if they are those for proofs."""
    lead = trained_lead(model, x, y, eps, **options)
    label = y.unsqueeze(1)
    assert lead.dtype == torch.float64
    assert not lead.gather(1, label).any()
    expected = proved_lead(model, x, y, eps, **options).scatter(1, label, 0.0)
    assert_close(lead.detach(), expected, atol=1e-9, rtol=1e-9)
    return lead


@pytest.mark.parametrize("method", ["ibp", "joint"])
@pytest.mark.parametrize(("build", "node", "step_mode"), mostly_slow(SAMPLED, quick=QUICK))
def test_they_are_those_of_verify_without_rounding(build, node, step_mode, method, exact):
    statistics = {"mean": [0.5, 0.4], "std": [0.3, 0.2]}
    model = classifier(build, NEURONS[node], step_mode=step_mode, **statistics)
    model.double()
    x = rand(4, 2, 8, 8)
    y = torch.tensor([0, 1, 2, 0])
    for eps in (0.0, 0.02, 0.3):
        # in training a batch norm that has seen no batch counts with its running statistics
        lead = assert_same_lead(model.train(method == "ibp"), x, y, eps, method=method)
    lead.sum().backward()
    for name, value in model.named_parameters():
        assert value.grad is not None, name
        finite = value.grad.isfinite()
        assert finite.all(), name


def of_linear_layers(node, T, sizes=(4, 6, 5, 3)):
    """Linear layers with spiking neurons between them, in float64."""
    torch.manual_seed(0)
    parts = []
    for before, after in pairwise(sizes):
        linear = nn.Linear(before, after)
        linear.weight.data *= 2
        parts += [linear, node()]
    return in_steps(*parts[:-1], T=T).double()


def in_single_steps(node):
    return classifier(convolutional, node, step_mode="s").double()


CASES = {
    "many steps, few windows": partial(of_linear_layers, NEURONS["LIF"], 11),
    "many steps, soft": partial(of_linear_layers, NEURONS["LIF soft"], 10),
    "three layers": partial(of_linear_layers, NEURONS["PLIF"], 5, (4, 6, 5, 5, 3)),
    "one step": partial(of_linear_layers, neuron.IFNode, 1),
    "step mode s": partial(in_single_steps, NEURONS["DLIF"]),
    "soft, step mode s": partial(in_single_steps, NEURONS["LIF soft"]),
}


@pytest.mark.parametrize("case", CASES)
def test_they_are_those_of_verify_for_other_networks(case, exact):
    model = CASES[case]()
    x = rand(3, 2, 8, 8)
    if isinstance(model.net[0], nn.Linear):
        x = rand(3, 4)
    y = torch.tensor([0, 1, 2])
    for eps in (0.01, 0.1):
        assert_same_lead(model, x, y, eps)


def test_frames_have_windows(exact):
    torch.manual_seed(0)
    parts = (layer.Flatten(), layer.Linear(32, 6), neuron.LIFNode(), layer.Linear(6, 3))
    model = in_steps(*parts, kind=SpikingEventClassifier).double()
    frames = rand(3, T, 2, 4, 4)
    assert_same_lead(model, frames, torch.tensor([0, 1, 2]), 0.02)


def test_a_layer_of_one_neuron_is_bounded_for_a_single_image(exact):
    model = of_linear_layers(NEURONS["LIF"], 3, (4, 6, 1, 3))
    assert_same_lead(model, rand(1, 4), torch.tensor([2]), 0.05)


def test_a_layer_with_too_many_trains_has_windows(exact, monkeypatch):
    model = of_linear_layers(NEURONS["LIF"], 4)
    monkeypatch.setattr(OverTime, "trains", lambda *args, **kwargs: None)
    monkeypatch.setattr(differentiable_chains, "_MOST", 0)
    assert_same_lead(model, rand(3, 4), torch.tensor([0, 1, 2]), 0.05)


@pytest.mark.parametrize("node", ["LIF", "LIF soft"])
def test_a_chain_that_becomes_too_long_from_call_to_call_is_left_for_windows(node, monkeypatch):
    model = of_linear_layers(NEURONS[node], 4)
    functional.set_step_mode(model.net, "s")
    monkeypatch.setattr(differentiable_chains, "_MOST", 3)
    x = rand(3, 4)
    y = torch.tensor([0, 1, 2])
    lead = trained_lead(model, x, y, 0.1)
    wider = DifferentiableBounds(model).lead(x, y, 0.1)
    assert (lead <= wider + 1e-9).all()


def dlif():
    node = DLIFNode(T=3, tau=4.0)
    gains = [1.5, -0.7, 2.0]
    node.input_gain.data = torch.tensor(gains)
    return node


OPTIONS = {
    "decay_input": False,
    "surrogate_function": surrogate.PiecewiseQuadratic(alpha=1.0),
}
BY_HAND = {
    "LIF": partial(neuron.LIFNode, tau=2.0, **OPTIONS),
    "PLIF": partial(neuron.ParametricLIFNode, init_tau=2.0, **OPTIONS),
    "DLIF": dlif,
}


def gradients(model, lead, y):
    """Gradients of every parameter of the cross entropy of leads."""
    named = dict(model.named_parameters())
    loss = nn.functional.cross_entropy(lead, y)
    found = torch.autograd.grad(loss, list(named.values()))
    return dict(zip(named, found, strict=True))


WIDTHS = list(product(BY_HAND, [1.0, 0.5]))


@pytest.mark.parametrize(("node", "width"), mostly_slow(WIDTHS, quick=WIDTHS[::3]))
def test_gradients_are_those_of_the_formulas(node, width):
    model = of_linear_layers(BY_HAND[node], 3)
    assert_formulas(model, width)


def test_gradients_through_soft_resets_are_those_of_the_formulas():
    """In the first layer, whose current is constant."""
    resets = iter([None, 0.0, 0.0])

    def node():
        return neuron.LIFNode(tau=2.0, v_reset=next(resets), **OPTIONS)

    assert_formulas(of_linear_layers(node, 3), 1.0)


def assert_formulas(model, width):
    """Leads of a network in training and their gradients are those by hand."""
    x = rand(3, 4)
    y = torch.tensor([0, 1, 2])
    for eps in (0.02, 0.15):
        lead = trained_lead(model, x, y, eps, surrogate_width=width)
        by_hand = joint_by_hand.Network(model.net, 3, width)
        expected = by_hand.lead(x, y, eps)
        assert_close(lead, expected, rtol=1e-9, atol=1e-12)
        found = gradients(model, lead, y)
        wanted = gradients(model, expected, y)
        for name, value in found.items():
            assert value.abs().max() > 1e-6, name
            assert_close(value, wanted[name], rtol=1e-8, atol=1e-11)


class SmoothSums:
    """Sums over chains of four trains, whose gates open as tanh does."""

    def __init__(self):
        self.values = randn(5, 4)
        scale = 0.5 + rand(3)
        cuts = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
        low = rand(7)
        high = low + 0.5 * rand(7)
        self.given = [low, high, scale, -scale * cuts]
        far = torch.tensor([1e9], dtype=torch.float64)
        trains = ListedTrains(
            low=torch.cat([-far, cuts]),
            high=torch.cat([cuts, far]),
            spikes=torch.eye(4, dtype=torch.float64),
        )
        self.chains = Chains.of(trains, Interval(low, high))
        self.weights = randn(2, 5, 7)

    def total(self, least, most):
        sums = torch.stack([least, most])
        return (self.weights * sums).sum()

    def gradients(self):
        """By the operator."""
        given = [part.clone().requires_grad_() for part in self.given]
        number = torch.arange(3)
        gates = Gates(given[2], given[3], number, number + 1)
        chain = SimpleNamespace(
            gates=gates,
            chains=self.chains,
            derivative=lambda z: 1 / z.cosh() ** 2,
        )
        ends = ChainSums.apply(*given, self.values, chain, False)
        return torch.autograd.grad(self.total(*ends), given)

    def smooth(self, low, high, scale, shift):
        """What moves with the gates, while the other end of a chain stays."""
        below = torch.tanh(scale * low.unsqueeze(1) + shift)
        above = torch.tanh(scale * high.unsqueeze(1) + shift)
        first = self.chains.chain // 4
        last = self.chains.chain % 4
        ends = []
        for table in differentiable_chains.ranges(self.values):
            to_last = table.diff(dim=1)[:, :, last]
            from_first = table.diff(dim=2)[:, first]
            moved = torch.einsum("fgm,mg->fm", to_last, below)
            moved += torch.einsum("fmg,mg->fm", from_first, above)
            ends.append(moved)
        return self.total(*ends)

    def difference(self, part, number, step=1e-6):
        """Slope of the smooth form."""
        ends = []
        for sign in (1, -1):
            moved = [one.clone() for one in self.given]
            moved[part][number] += sign * step
            ends.append(self.smooth(*moved))
        return (ends[0] - ends[1]) / (2 * step)


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_of_a_sum_is_the_slope_of_its_smooth_form(seed):
    torch.manual_seed(seed)
    sums = SmoothSums()
    for part, grad in enumerate(sums.gradients()):
        slopes = [sums.difference(part, number) for number in range(len(grad))]
        assert_close(grad, torch.stack(slopes), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_batch_norm_has_the_statistics_of_the_clean_batch(step_mode):
    model = classifier(convolutional, NEURONS["DLIF"], step_mode=step_mode)
    model.double().train()
    x = rand(5, 2, 8, 8)
    y = torch.tensor([0, 1, 2, 0, 1])
    found = {}
    for method in ("ibp", "joint"):
        trained = DifferentiableBounds(model, method=method)
        for images in (0.5 * x, x):  # of the batches that it saw, the last one counts
            with trained.watching():
                logits = model(images)
        own = logits.gather(1, y.unsqueeze(1))
        with unchanged(model, states=False):
            lead = trained.lead(x, y, 0.0)
        assert_close(lead, logits - own)
        found[method] = trained.lead(x, y, 0.02)
    assert "forward" not in vars(model.net[1])
    wider = found["ibp"] + 1e-9
    assert (found["joint"] <= wider).all()


def check_points(seed, points=256):
    """Random inputs of the ball are inside the bounds for training, in float64."""
    case = random.Random(seed)
    torch.manual_seed(seed)
    steps = fuzz.STEPS[seed % len(fuzz.STEPS)]
    model = fuzz.random_classifier(case, False, steps)
    x = fuzz.random_images(case, model, grid=False).double()
    model = model.double()
    y = model(x).argmax(1)
    eps = 10 ** case.uniform(-3.5, -1)
    lead = trained_lead(model, x, y, eps).detach()
    for image, label, most in zip(x, y, lead, strict=True):
        share = 2 * rand(points, *image.shape) - 1
        share[::2] = share[::2].sign()
        moved = image + eps * share
        with torch.no_grad():
            logits = model(moved.clamp(0, 1))
        reached = logits - logits[:, label, None]
        assert (reached <= most + 1e-9).all()
    return 2 * points


@pytest.mark.parametrize("seed", mostly_slow(range(20, 24), quick=[20, 21]))
def test_no_point_leaves_the_bounds_for_training(seed):
    check_points(seed)


@pytest.mark.slow
def test_no_point_leaves_the_bounds_of_many_networks_for_training():
    tried = map(check_points, range(1000, 1075))
    assert sum(tried) == 75 * 2 * 256


def chains_without_their_last_trains(monkeypatch):
    ends_of = differentiable_chains.ends_of

    def shorter(trains, current):
        first, _ = ends_of(trains, current)
        return first, first

    monkeypatch.setattr(differentiable_chains, "ends_of", shorter)


def spikes_that_are_sure_too_early(monkeypatch):
    spike = RealSpiking.spike

    def early(self, z):
        return spike(self, z + 0.3)

    monkeypatch.setattr(RealSpiking, "spike", early)


@pytest.mark.slow
@pytest.mark.parametrize(
    "plant", [chains_without_their_last_trains, spikes_that_are_sure_too_early]
)
def test_a_fault_is_noticed(plant, monkeypatch):
    monkeypatch.setattr(SpikeTrains, "backend", "reference")
    plant(monkeypatch)
    tried = map(check_points, range(20, 120))
    with pytest.raises(AssertionError):
        sum(tried)


def test_a_step_leaves_nothing_behind(monkeypatch):
    runs = []

    class Watched(differentiable.DifferentiableJointRun):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            runs.append(weakref.ref(self))

    monkeypatch.setattr(differentiable, "DifferentiableJointRun", Watched)
    model = of_linear_layers(NEURONS["LIF"], 3)
    lead = trained_lead(model, rand(2, 4), torch.tensor([0, 1]), 0.1)
    lead.sum().backward()
    del lead
    gc.collect()
    (run,) = runs
    assert run() is None


def strided(node):
    """The network of the preset digits_joint, for eight steps."""
    torch.manual_seed(0)
    net = SmallConvNet(
        (1, 8, 8),
        10,
        T=8,
        spiking_neuron=node,
        channels=(16, 64),
        strides=(1, 2),
        batch_norm=False,
    )
    return SpikingClassifier(net, 8)


def a_step(bounds, x, y):
    lead = bounds.lead(x, y, 0.1)
    nn.functional.cross_entropy(lead, y).backward()


@pytest.mark.parametrize("node", [DLIFNode, partial(neuron.LIFNode, tau=100.0)])
def test_what_a_step_keeps_for_its_gradients_is_small(node):
    """Of the preset's batch, eight steps: far below what the same layers would keep by slots."""
    bounds = DifferentiableBounds(strided(node).eval(), method="joint")
    x, y = torch.rand(64, 1, 8, 8), torch.arange(64) % 10
    sizes = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        a_step(bounds, x, y)
    neurons = 64 * (16 * 64 + 64 * 16)
    windows_of_a_layer = len(windows.Windows(windows.KEPT).listed(8))
    assert 4 * neurons < sum(sizes.values()) < 4 * neurons * (2 * windows_of_a_layer + 80)


@pytest.mark.parametrize("method", ["ibp", "joint"])
def test_a_step_leaves_no_tensors_to_the_collector(method):
    """Python looks for cycles rarely, and what hangs on one stays until then."""
    bounds = DifferentiableBounds(in_steps(*four_layers(), T=3), method=method)
    x, y = torch.rand(2, 4), torch.tensor([0, 1])
    a_step(bounds, x, y)
    with no_collection():
        a_step(bounds, x, y)
        assert not tensors_of_cycles()


def four_layers():
    return nn.Linear(4, 6), DLIFNode(T=3), nn.Linear(6, 5), DLIFNode(T=3), nn.Linear(5, 3)
