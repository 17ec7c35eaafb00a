"""Bounds for training: their values are those of ``verify``, the gradients of joint ones those of
the formulas written out in joint_by_hand, and no input leaves them.
"""

import random
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from covering import each_in_turn, mostly_slow
from proofs import fuzz, joint_by_hand
from proofs.collected import no_collection, tensors_of_cycles
from proofs.formulas import formula
from proofs.networks import NEURONS, QUICK, SAMPLED, T, classifier, convolutional, in_steps
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.testing import assert_close
from training import small_run
from unchanged import unchanged

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.classifier import SpikingEventClassifier
from sj_robust.core.preserved import full_precision
from sj_robust.models.chain import SmallConvNet
from sj_robust.proofs import bounds, differentiable_chains, joint, rounding, verify, windows
from sj_robust.proofs.bounds import BoundedRun, bounded_logits, bounded_neurons
from sj_robust.proofs.changes import Flips
from sj_robust.proofs.differentiable import DifferentiableBounds, batch_statistics
from sj_robust.proofs.gains.operator import input_maps
from sj_robust.proofs.joint import JointRun, OverTime
from sj_robust.proofs.maps import Maps
from sj_robust.proofs.spiking import Interval, LayerBounds, RealSpiking

rand = partial(torch.rand, dtype=torch.float64)


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
            maps = Maps(model, neurons, x[0])
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


def of_frames():
    torch.manual_seed(0)
    parts = (layer.Flatten(), layer.Linear(32, 6), neuron.LIFNode(), layer.Linear(6, 3))
    return in_steps(*parts, kind=SpikingEventClassifier).double()


CASES = {
    "many steps, few windows": (partial(of_linear_layers, NEURONS["LIF"], 11), (3, 4)),
    "many steps, soft": (partial(of_linear_layers, NEURONS["LIF soft"], 10), (3, 4)),
    "three layers": (partial(of_linear_layers, NEURONS["PLIF"], 5, (4, 6, 5, 5, 3)), (3, 4)),
    "one step": (partial(of_linear_layers, neuron.IFNode, 1), (3, 4)),
    "one neuron, one image": (partial(of_linear_layers, NEURONS["LIF"], 3, (4, 6, 1, 3)), (1, 4)),
    "frames": (of_frames, (3, T, 2, 4, 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_they_are_those_of_verify_for_other_networks(case, exact):
    build, shape = CASES[case]
    model = build()
    for eps in (0.01, 0.1):
        assert_same_lead(model, rand(*shape), torch.arange(shape[0]), eps)


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


@pytest.mark.parametrize(("node", "width"), each_in_turn(BY_HAND, [1.0, 0.5]))
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


@pytest.mark.parametrize("seed", mostly_slow(range(20, 60), quick=range(20, 24)))
def test_no_point_leaves_the_bounds_for_training(seed):
    check_points(seed)


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


def test_a_network_that_mixes_samples_or_has_no_graph_is_refused():
    x, y = torch.rand(3, 4), torch.tensor([0, 1, 0])
    node = neuron.IFNode(step_mode="m")
    mixed = formula(lambda net, x: net.node(x - x.mean(1, keepdim=True)), node=node)
    with pytest.raises(NotImplementedError, match="mixes the samples of a batch"):
        DifferentiableBounds(mixed).lead(x, y, 0.1)

    def without_graph(net, x):
        with torch.no_grad():
            return net.node(net.fc(x))

    cut = formula(without_graph, fc=nn.Linear(4, 3), node=node)
    with pytest.raises(NotImplementedError, match="without a graph"):
        DifferentiableBounds(cut.train()).lead(x, y, 0.1)
    assert input_maps(cut.net, x)["node"].not_covered is not None


def test_gradient_of_a_soft_reset_at_a_potential_of_exactly_zero():
    """Without a charge, the low end lies exactly at the limit, and its gradient passes."""
    node = neuron.IFNode(step_mode="m", v_reset=None)
    model = SpikingClassifier(nn.Sequential(nn.Linear(2, 3), node), T=2)
    (found,) = bounded_neurons(model).values()
    spiking = RealSpiking(found, LayerBounds())
    low = torch.tensor([-0.5, 0.0, 0.5], requires_grad=True)
    undecided = Interval(torch.zeros(3), torch.ones(3))
    v = spiking.reset(Interval(low, torch.full((3,), 1.5)), undecided)
    assert v.low.tolist() == [-0.5, 0.0, 0.0]
    (gradient,) = torch.autograd.grad(v.low.sum(), low)
    assert gradient.tolist() == [1.0, 1.0, 0.0]


def test_dropout_is_left_out_and_what_feeds_a_neuron_twice_is_bounded_once():
    """The gradient of the last map stops at the spikes: it does not go on through the neuron's
    surrogate.
    """

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            inner = (layer.Dropout(0.5), layer.Linear(6, 6), neuron.LIFNode())
            self.node = neuron.LIFNode()
            self.inner = nn.Sequential(*inner)
            self.head = layer.Linear(6, 2)

        def forward(self, x):
            spikes = self.node(x)
            return self.head(self.inner(spikes) + spikes)

    torch.manual_seed(0)
    net = Twice()
    functional.set_step_mode(net, "m")
    model = SpikingClassifier(net, 3).double().train()
    x = torch.rand(1, 6, dtype=torch.float64)  # fewer images than classes
    y = torch.tensor([1])
    lead = DifferentiableBounds(model).lead(x, y, 0.3)
    margin = verify(model.eval(), x, y, 0.3).margin[0]
    assert float(lead.detach()[0, 0]) == pytest.approx(-margin, abs=1e-6, rel=1e-6)


def bias_free():
    """As residual networks are: convolutions without bias, a sum of two branches, and logits that
    are converted.
    """

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = layer.Conv2d(1, 6, 3, padding=1, bias=False)
            self.branch = nn.Sequential(
                layer.BatchNorm2d(6), DLIFNode(T=3), layer.Conv2d(6, 6, 3, padding=1, bias=False)
            )
            self.head = nn.Sequential(DLIFNode(T=3), layer.Flatten(), layer.Linear(96, 3))

        def forward(self, x):
            x = self.stem(x)
            return self.head(x + self.branch(x)).float()

    return Residual()


def spiking_output():
    linear = layer.Linear(16, 3, bias=False)
    linear.weight.data *= 8  # so that it fires
    return nn.Sequential(layer.Flatten(), linear, neuron.LIFNode())


@pytest.mark.parametrize("build", [small_run.batch_norm_net, bias_free, spiking_output])
@pytest.mark.parametrize(
    ("method", "ball", "follows"),
    [("ibp", 0.02, True), ("joint", 0.02, False), ("ibp", Flips(1), False)],
    ids=["ibp", "joint", "flips"],
)
def test_bounds_by_intervals_follow_autocast(build, method, ball, follows):
    """Of the same clean pass, so that nothing else is rounded."""
    torch.manual_seed(0)
    model = in_steps(build(), T=3).train()
    bounds = DifferentiableBounds(model, method=method)
    x = torch.rand(32, 1, 4, 4).round() if isinstance(ball, Flips) else torch.rand(32, 1, 4, 4)
    y = torch.arange(32) % 3
    with bounds.watching():
        model(x)

    def found(*, rounded):
        with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
            lead = bounds.lead(x, y, ball)
            value = F.cross_entropy(lead, y)
        assert lead.dtype == torch.float32
        gradients = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
        return lead.detach(), torch.cat([part.flatten() for part in gradients])

    lead, gradient = found(rounded=False)
    rounded, rounded_gradient = found(rounded=True)
    assert torch.equal(rounded, lead) != follows
    assert_close(rounded, lead, atol=0.1, rtol=0.1)
    assert torch.cosine_similarity(rounded_gradient, gradient, dim=0) > 0.9


def test_batch_statistics_are_not_rounded_to_bfloat16():
    x = (30 + torch.randn(16, 3, 5, 5)).bfloat16()
    mean, variance = batch_statistics(None, x)
    assert mean.dtype == variance.dtype == torch.float32
    assert_close(mean, x.double().mean((0, 2, 3)).float())
    assert_close(variance, x.double().var((0, 2, 3), correction=0).float())
