"""Networks that change their neurons, their weights or their step mode within one forward."""

import contextlib
import random

import pytest
import torch
from proofs.test_never_false import METHODS, Formula, classifier, linear
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.testing import assert_close

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.proofs import UnsoundBoundsError, no_flip_radius, verify
from sj_robust.proofs.bounds import BoundedRun, bounded_logits, bounded_neurons
from sj_robust.proofs.points import Points
from sj_robust.proofs.rules import Bounds

SIGNS = torch.where(torch.arange(64) % 2 == 0, 1.0, -1.0)
"""A direction in which random corners hardly move."""


def pixels():
    torch.manual_seed(0)
    return 0.2 + 0.6 * torch.rand(1, 64)


def across(x, current, slope):
    """A layer whose current is this for an image, and moves with the signs of its pixels."""
    return linear([(slope * SIGNS).tolist()], [current - slope * float(x[0] @ SIGNS)])


def worst(x, eps):
    """The corner in which :func:`across` gives least."""
    return x - 0.999 * eps * SIGNS


def in_steps(net, x):
    """A threshold for each of two steps; the second one decides."""
    net.node.v_threshold = 2.0
    net.node(net.fc(x[0]))
    net.node.v_threshold = 1.0
    return net.out(net.node(0.0 * net.fc(x[1]) - 0.1))


def with_reset(net, x):
    first = net.node(0.0 * net.fc(x) + 0.3)
    functional.reset_net(net.node)
    return net.out(net.node(net.fc(x))) + 0.0 * first


def with_potential(net, x):
    first = net.node(0.0 * net.fc(x) + 0.3)
    net.node.v = 0.0
    return net.out(net.node(net.fc(x))) + 0.0 * first


def with_the_state_of_another(net, x):
    net.node(0.0 * net.fc(x) + 0.3)
    net.other(0.0 * net.fc(x))
    net.node.v = net.other.v
    return net.out(net.node(net.fc(x)))


def rolled_back(net, x):
    net.node(0.0 * net.fc(x))
    before = net.node.v
    net.node(0.0 * net.fc(x) + 0.3)
    net.node.v = before
    return net.out(net.node(net.fc(x)))


def at_step_0_again(net, x):
    net.dlif(0.0 * net.fc(x[0]))
    net.dlif.time_step = 0
    return net.out(net.dlif(net.fc(x[1])))


def with_a_threshold_put_back(net, x):
    net.node(net.fc(x[0]))
    net.node.v_threshold = 2.0
    found = net.out(net.node(net.fc(x[1])))
    net.node.v_threshold = 1.0
    return found


def with_a_threshold_for_one_call(net, x):
    net.node.v_threshold = 2.0
    found = net.out(net.node(net.fc(x)))
    net.node.v_threshold = 1.0
    return found


def twice(net, x):
    first = net.node(0.0 * net.fc(x) + 0.3)
    return net.out(net.node(net.fc(x))) + 0.0 * first


def reading_the_potential(net, x):
    return net.out(net.node(net.fc(x)) + net.node.v)


CHANGES = {
    "threshold": (in_steps, 2, "s", "threshold, reset, decay or gain changes within"),
    "reset": (with_reset, 1, "m", "is reset, or whose state is set, between two calls"),
    "potential": (with_potential, 1, "m", "is reset, or whose state is set, between two calls"),
    "state of another": (
        with_the_state_of_another,
        1,
        "m",
        "whose state is set, between two calls",
    ),
    "rolled back": (rolled_back, 1, "m", "whose state is set, between two calls"),
    "time step": (at_step_0_again, 2, "s", "whose state is set, between two calls"),
    "threshold put back": (with_a_threshold_put_back, 2, "s", "threshold, reset, decay or gain"),
    "one threshold": (with_a_threshold_for_one_call, 1, "m", "threshold, reset, decay or gain"),
    "read": (reading_the_potential, 1, "m", "a forward that reads a neuron's potential v"),
}


def changing(forward, x, *, T, step_mode):
    node = neuron.IFNode(step_mode=step_mode)
    out = linear([[1.0], [0.0]], [0.0, 0.5])
    net = Formula(forward, fc=across(x, 1.2, 0.1), node=node, out=out)
    net.other = neuron.IFNode(step_mode=step_mode)
    net.dlif = DLIFNode(T=T, tau=2.0, step_mode=step_mode)
    return SpikingClassifier(net, T=T, takes="sequence").eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("what", CHANGES)
def test_a_neuron_that_is_changed_within_a_forward_has_no_bounds(what, method):
    forward, T, step_mode, message = CHANGES[what]
    x = pixels()
    model = changing(forward, x, T=T, step_mode=step_mode)
    with pytest.raises(NotImplementedError, match=message):
        verify(model, x, model(x).argmax(1), 0.05, method=method)


def test_a_neuron_that_runs_twice_has_bounds():
    x = pixels()
    model = changing(twice, x, T=1, step_mode="m")
    assert verify(model, x, model(x).argmax(1), 0.05).verified == (True,)


def with_a_cut_graph(net, x):
    first = net.node(x=0.0 * net.fc(x[0]) + 0.3)
    functional.detach_net(net.node)
    return net.out(net.node(x=net.fc(x[1]))) + 0.0 * first


def test_a_neuron_whose_graph_is_cut_or_that_is_called_by_keyword_has_bounds():
    x = pixels()
    model = changing(with_a_cut_graph, x, T=2, step_mode="s")
    for method in METHODS:
        assert verify(model, x, model(x).argmax(1), 0.05, method=method).verified == (True,)


@pytest.mark.parametrize("forward", [twice, with_reset, reading_the_potential])
def test_neurons_hold_after_a_run_on_bounds_what_a_reset_leaves(forward):
    x = pixels()
    model = changing(forward, x, T=1, step_mode="m")
    neurons = bounded_neurons(model)
    inside = []
    model.net.fc.register_forward_pre_hook(lambda module, args: inside.append(model.net.node.v))
    with contextlib.suppress(NotImplementedError):
        bounded_logits(model, BoundedRun(neurons, 1), x, 0.05)
    assert model.net.node.v == 0.0
    assert len(inside) >= 1


def test_a_run_inside_another_one_leaves_its_states():
    x = pixels()
    model = changing(twice, x, T=1, step_mode="m")
    neurons = bounded_neurons(model)
    expected = bounded_logits(model, BoundedRun(neurons, 1), x, 0.05)

    class Nested(BoundedRun):
        def _reached(self, *given):
            bounded_logits(model, BoundedRun(neurons, 1), x, 0.01)

    found = bounded_logits(model, Nested(neurons, 1), x, 0.05)
    assert_close(found.radius, expected.radius)
    assert model.net.node.v == 0.0


class Binary(nn.Linear):
    """Binary weights in the forward alone, as BinaryConnect has them."""

    def forward(self, x):
        real = self.weight.data
        self.weight.data = real.sign()
        found = super().forward(x)
        self.weight.data = real
        return found


class Scaled(nn.Linear):
    """A buffer that is written in place for the forward alone."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self, x):
        self.scale.data.fill_(1 / 0.6)
        found = super().forward(x * self.scale)
        self.scale.data.fill_(1.0)
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [Binary, Scaled])
@pytest.mark.parametrize("method", METHODS)
def test_joint_bounds_take_the_weights_of_the_forward(method, kind, dtype):
    first = linear(torch.eye(64).tolist())
    last = kind(64, 2)
    last.weight.data = torch.stack([0.6 * SIGNS, -0.6 * SIGNS])
    last.bias.data = torch.tensor([14.0, 0.0])
    net = nn.Sequential(first, neuron.IFNode(step_mode="m"), last)
    model = SpikingClassifier(net, T=4).eval().to(dtype)
    torch.manual_seed(0)
    x = 0.5 + 0.02 * torch.rand(1, 64, dtype=dtype)
    found = verify(model, x, model(x).argmax(1), 0.03, method=method)
    with torch.no_grad():
        logits = model(worst(x, 0.03))[0]
    assert float(logits[0] - logits[1]) >= found.margin[0]
    assert found.verified == (False,)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_joined_constants_have_no_radius(dtype, method):
    places = torch.tensor([-1, 0, 1, -3]).to(dtype)
    x = pixels()
    sums = torch.stack([SIGNS, -SIGNS])
    weight = torch.cat([sums, torch.full((2, 4), 0.2)], 1)
    shift = 0.2 * float(places.sum())
    bias = [1.2 - float(x[0] @ SIGNS) - shift, -1.2 + float(x[0] @ SIGNS) - shift]
    model = classifier(
        lambda net, x: net.node(net.fc(torch.cat([x, places.expand(*x.shape[:-1], 4)], -1))),
        fc=linear(weight.tolist(), bias),
        node=neuron.IFNode(step_mode="m", v_threshold=0.2),
    )
    y = model(x).argmax(1)
    proved = []
    for eps in (0.01, 0.02):  # 64 pixels move a current by 0.64 and by 1.28
        still = model(worst(x, eps)).argmax(1) == y
        verified = verify(model, x, y, eps, method=method).verified
        assert still or not verified[0]
        proved.append(verified[0])
    assert proved == [True, False]


def mixed(seed, kind):
    """A network whose layers run on whole sequences and step by step."""
    chosen = random.Random(seed)
    torch.manual_seed(seed)

    def drawn():
        v_reset = chosen.choice([0.0, 0.0, None])
        return {"v_reset": v_reset, "v_threshold": chosen.choice([0.5, 1.0])}

    inner = neuron.LIFNode(tau=2.0, step_mode="s", **drawn())
    if kind == "container":
        parts = [layer.MultiStepContainer(nn.Linear(1, 3), inner)]
    elif kind == "recurrent":
        again = layer.LinearRecurrentContainer(inner, 3, 3)
        again.step_mode = "m"
        parts = [nn.Linear(1, 3), again]
    else:
        before = neuron.IFNode(step_mode="m", **drawn())
        parts = [nn.Linear(1, 3), before, layer.MultiStepContainer(nn.Linear(3, 3), inner)]
    last = neuron.IFNode(step_mode="m", **drawn())
    net = nn.Sequential(*parts, nn.Linear(3, 3), last, nn.Linear(3, 2))
    for module in net.modules():
        if isinstance(module, nn.Linear):
            module.weight.data *= 3
            module.bias.data *= 2
    T = chosen.choice([2, 3, 4])
    return SpikingClassifier(net, T=T, takes="sequence").eval()


@pytest.mark.parametrize("kind", ["container", "recurrent", "sequence first"])
def test_layers_of_both_step_modes(kind):
    grid = torch.linspace(0, 1, 501)[:, None]
    looked_at = 0
    for seed in range(60):
        model = mixed(seed, kind)
        with torch.no_grad():
            classes = model(grid).argmax(1)
        if classes.min() == classes.max():
            continue
        x = torch.rand(1, 1)
        y = model(x).argmax(1)
        distance = (grid[classes != y] - x).abs()
        eps = float(distance.min()) + 1e-6
        looked_at += 1
        for method in ("ibp", "joint"):
            assert verify(model, x, y, eps, method=method).verified == (False,), (seed, method)
    assert looked_at > 2


def test_a_layer_of_another_step_mode_is_bounded_step_by_step():
    model = mixed(0, "container")
    x = torch.rand(1, 1)
    found = verify(model, x, model(x).argmax(1), 0.01)
    last = str(len(model.net) - 2)
    assert f"{last}: it takes other numbers of time steps per call" in " ".join(found.stepwise)


class Gated(nn.Module):
    """Spikes let the image through."""

    def __init__(self, *, to_logits):
        super().__init__()
        self.gate = linear([[0.1, 0.0], [0.0, 0.1]], [3.0, 3.0])
        self.node = neuron.IFNode(step_mode="m")
        self.fc = linear([[10.0, -10.0], [-10.0, 10.0]], [1.0, 1.0])
        self.last = neuron.IFNode(step_mode="m")
        self.to_logits = to_logits

    def forward(self, x):
        gated = self.fc(self.node(self.gate(x)) * x)
        return gated if self.to_logits else self.last(gated)


class Waiting(Gated):
    """ReLU of the image and spikes is dark where there is no spike."""

    def forward(self, x):
        spikes = self.node(self.gate(x))
        return self.last(torch.relu(10.0 * x - 20.0 + 16.0 * spikes))


class OneGate(Gated):
    """A gate that opens for one of all patterns of 24 spikes."""

    def __init__(self, *, to_logits):
        super().__init__(to_logits=to_logits)
        torch.manual_seed(0)
        self.currents = torch.where(torch.rand(24) < 0.5, 0.1, 1.1)
        self.many = neuron.IFNode(step_mode="m")

    def forward(self, x):
        driven = self.node(self.gate(x))  # a layer whose currents are known
        pattern = self.many(self.currents.expand(*x.shape[:-1], -1) + 0.0 * driven[..., :1])
        signs = (self.currents > 0.5).float() * 2 - 1
        open_ = torch.relu((pattern * signs).sum(-1, keepdim=True) - (signs > 0).sum() + 1.0)
        gated = self.fc(open_ * x)
        return gated if self.to_logits else self.last(gated)


class HalfGate(Gated):
    """A gate for a few spikes, before something without bounds."""

    def forward(self, x):
        spikes = self.node(self.gate(x))
        gate = torch.relu((spikes * torch.tensor([1.0, -1.0])).sum(-1, keepdim=True) - 0.5)
        return torch.cumsum(self.fc(gate * torch.sin(x)), 0)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (OneGate(to_logits=False), "last is not one affine map .* for all spikes"),
        (OneGate(to_logits=True), "reaches the logits past all spiking layers"),
        (HalfGate(to_logits=True), "reaches the logits past all spiking layers"),
        (Gated(to_logits=False), "last is not one affine map .* for all spikes"),
        (Gated(to_logits=True), "reaches the logits past all spiking layers"),
        (Waiting(to_logits=False), "last is not one affine map"),
    ],
)
def test_what_spikes_let_through_has_no_radius(net, message):
    model = SpikingClassifier(net, T=4).eval()
    with pytest.raises(NotImplementedError, match=message):
        no_flip_radius(model, torch.tensor([[0.51, 0.49]]))


BETWEEN = {
    "threshold": lambda node, t: setattr(node, "v_threshold", (1.0, 5.0)[t]),
    "threshold that is a tensor": lambda node, t: node.v_threshold.fill_((1.0, 5.0)[t]),
    "gain": lambda node, t: node.input_gain.data.copy_(torch.ones(2) / (t + 1)),
    "reset": lambda node, t: functional.reset_net(node),
    "potential": lambda node, t: setattr(node, "v", 0.0),
    "potential before the first call": lambda node, t: setattr(
        node, "v", -0.15 if not t else node.v
    ),
}


@pytest.mark.parametrize("what", BETWEEN)
def test_a_neuron_that_is_changed_within_a_forward_has_no_radius(what):
    def forward(net, x):
        spikes = []
        for t in range(2):
            BETWEEN[what](net.node, t)
            spikes.append(net.node(net.fc(x[t])))
        return torch.cat([torch.stack(spikes), 0.3 + 0.0 * torch.stack(spikes)], -1)

    net = Formula(forward, fc=linear([[1.0]], [0.45]), node=DLIFNode(T=2, tau=2.0, step_mode="s"))
    if what == "threshold that is a tensor":
        net.node = neuron.IFNode(step_mode="s")
        net.node.v_threshold = torch.tensor(1.0)
    model = SpikingClassifier(net, T=2, takes="sequence").eval()
    with pytest.raises(
        NotImplementedError, match="node is reset, or its state, threshold, reset, decay"
    ):
        no_flip_radius(model, torch.tensor([[0.3]]))


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_points_of_the_check_reach_what_pixels_add_up_to(step_mode):
    x = pixels().repeat(3, 1)
    fc = across(x, 1.2, 0.1)
    node = neuron.LIFNode(step_mode=step_mode)

    def forward(net, x):
        steps = [x] if step_mode == "m" else x
        spikes = [net.node(net.fc(step)) for step in steps]
        return net.out(spikes[-1])

    net = Formula(forward, fc=fc, node=node, out=linear([[1.0], [0.0]], [0.0, 0.5]))
    model = SpikingClassifier(net, T=2, takes="sequence").eval()
    points = Points(model, bounded_neurons(model), 0.05)
    calls = 1 if step_mode == "m" else 2
    moved = [fc(point) - fc(x) for point in points.along_currents(x)]
    assert_close(
        torch.stack(moved), 0.32 * torch.tensor([-1.0, 1.0] * calls).view(-1, 1, 1).expand(-1, 3, 1)
    )
    (fallen,) = points.against_lead(x)
    assert_close(fc(fallen) - fc(x), torch.full((3, 1), 0.32))  # a spike would close the lead
    for point in (*points.along_currents(x), fallen):
        assert ((point.double() - x.double()).abs() <= 0.05).all()
    random_corner = next(points.drawn(x))
    assert (fc(random_corner) - fc(x)).abs().max() < 0.16


def half(net, x):
    """Half of what pixels add up to, where the network runs on bounds."""
    share = 0.5 if isinstance(x, Bounds) else 1.0
    current = 1.2 + share * (net.fc(x) - 1.2)
    return net.out(net.node(current))


SLOPES = ("against_lead", "along_currents")


@pytest.mark.parametrize("removed", [(), SLOPES[:1], SLOPES[1:], SLOPES])
def test_bounds_that_only_the_corners_along_slopes_leave_are_refused(removed, monkeypatch):
    x = pixels()
    model = changing(half, x, T=1, step_mode="m")
    y = model(x).argmax(1)
    for name in removed:
        monkeypatch.setattr(Points, name, lambda self, images: ())
    if removed == SLOPES:  # random corners do not show it
        assert verify(model, x, y, 0.03, method="ibp").verified == (True,)
        return
    with pytest.raises(UnsoundBoundsError, match="outside its bounds at a point of the ball"):
        verify(model, x, y, 0.03, method="ibp")


class Clamped(nn.Linear):
    """Weights that every forward writes to, so that autograd has no gradient."""

    def forward(self, x):
        found = super().forward(x)
        with torch.no_grad():
            self.weight.clamp_(-1.0, 1.0)
        return found


def test_a_network_without_a_backward_pass_is_proved():
    torch.manual_seed(0)
    net = nn.Sequential(Clamped(4, 3), neuron.IFNode(step_mode="m"), Clamped(3, 3))
    model = SpikingClassifier(net, T=2).eval()
    x = torch.rand(3, 4)
    assert any(verify(model, x, model(x).argmax(1), 1e-3).verified)


def test_the_check_goes_on_without_slopes():
    model = SpikingClassifier(nn.Sequential(nn.Linear(2, 2), neuron.IFNode(step_mode="m")), T=1)
    model.eval()
    x = torch.rand(2, 2)

    def cut(images):
        return model(images).detach()

    def broken_graph(images):
        raise RuntimeError("a view was modified in place")

    for logits in (cut, broken_graph):
        assert list(Points(logits, {}, 0.1).against_lead(x)) == []
