"""The radius without flips: no spike moves below it, one moves just above it, on every kind of
neuron and reset.
"""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from proofs import networks
from proofs.formulas import Formula, linear
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from sj_robust import DLIFNode
from sj_robust.classifier import PoissonEncoder, SpikingClassifier, SpikingEventClassifier
from sj_robust.neuron.charging import read_charging
from sj_robust.proofs import no_flip_radius, rounding

NEURONS = networks.NEURONS | {
    "IF soft": lambda: neuron.IFNode(v_reset=None),
    "PLIF without input decay": lambda: neuron.ParametricLIFNode(decay_input=False),
    "LIF of tau 3": lambda: neuron.LIFNode(tau=3.0),
}


def network(node, frames=False):
    torch.manual_seed(3)
    net = nn.Sequential(
        layer.Conv2d(2, 3, 3, padding=1),
        layer.BatchNorm2d(3),
        layer.AvgPool2d(2),
        node,
        layer.Flatten(),
        layer.Linear(27, 3),
    )
    functional.set_step_mode(net, "m")
    net[0].weight.data *= 3
    if frames:
        return SpikingEventClassifier(net, T=4).eval()
    return SpikingClassifier(net, T=4, mean=[0.4, 0.5], std=[0.2, 0.3]).eval()


def spikes(model, x):
    """First layer's spikes."""
    seen = []
    hook = model.net[3].register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    model(x)
    hook.remove()
    return seen[0]


FORMS = [(name, False) for name in NEURONS]
FORMS += [("LIF", True), ("DLIF soft", True)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "frames"), FORMS)
def test_no_spike_flips_below_the_radius_and_one_flips_just_above_it(name, frames, monkeypatch):
    model = network(NEURONS[name](), frames)
    shape = (3, 4, 2, 6, 6) if frames else (3, 2, 6, 6)
    x = 0.3 + 0.4 * torch.rand(shape)
    exact = copy.deepcopy(model).double()
    wide = x.double()
    in_float32 = no_flip_radius(model, x, batch_size=2)
    monkeypatch.setattr(rounding, "_UNIT", 0.0)
    radius = no_flip_radius(exact, wide, batch_size=2)  # without float32's rounding
    assert (radius > in_float32).all()
    assert (in_float32 > 0).all()
    clean = spikes(exact, wide)
    for number in range(3):
        image = wide[number : number + 1]
        usual = clean[:, number : number + 1]
        # Along the gradient of each potential; the closest neuron flips there, and nowhere below.
        worst = torch.cat(worst_direction(exact, image))
        both_ways = torch.cat([worst, -worst])
        steps = torch.cat([unit_steps(200, shape[1:]), both_ways])
        below = image + 0.999 * radius[number] * steps
        above = image + 1.001 * radius[number] * both_ways
        assert (spikes(exact, below) == usual).all()
        assert (spikes(exact, above) != usual).any()


def unit_steps(count, shape, dtype=torch.float64):
    """Steps of length one in random directions."""
    steps = torch.randn(count, *shape, dtype=dtype).flatten(1)
    steps /= steps.norm(dim=1, keepdim=True)
    return steps.view(count, *shape)


def worst_direction(model, x):
    """Unit gradients of all potentials before firing, with spikes held, for one image."""
    node = model.net[3]
    x = x.clone().requires_grad_()
    held = spikes(model, x)
    currents = []
    handle = node.register_forward_pre_hook(lambda module, args: currents.append(args[0]))
    model(x)
    handle.remove()
    charging = read_charging(node)
    soft = node.v_reset is None
    rest = 0.0 if soft else node.v_reset
    v = torch.full_like(currents[0][0], rest)
    found = []
    for t, current in enumerate(currents[0]):
        gain = charging.gain_at(t, input_gain=True)
        h = charging.decay * v + gain * current + (1 - charging.decay) * rest
        for one in h.flatten():
            (grad,) = torch.autograd.grad(one, x, retain_graph=True)
            if bool(grad.any()):
                found.append(grad / grad.norm())
        fall = node.v_threshold if soft else h - rest
        v = h - held[t] * fall
    return found


def test_what_float32_rounds_is_taken_from_the_distance_to_the_threshold():
    """The exact potential is just below the threshold, and float32 rounds it up to a spike."""
    x = torch.rand(1, 300, generator=torch.Generator().manual_seed(1))
    net = nn.Sequential(nn.Linear(300, 1, bias=False), neuron.IFNode(step_mode="m"))
    torch.manual_seed(0)
    nn.init.uniform_(net[0].weight, 0.0, 0.01)
    model = SpikingClassifier(net, 1).eval()
    weight = net[0].weight.detach().double()
    exact = float(weight @ x[0].double())
    norm = float(weight.norm())
    net[1].v_threshold = exact + 1e-8
    assert float(no_flip_radius(model, x)) == 0.0
    net[1].v_threshold = exact + 1e-3
    without_rounding = 1e-3 / norm
    radius = float(no_flip_radius(model, x))
    assert 0.9 * without_rounding < radius < without_rounding


@pytest.mark.parametrize("name", ["LIF", "LIF soft", "LIF of tau 3", "DLIF"])
def test_no_float32_spike_flips_within_the_radius(name):
    model = network(NEURONS[name]())
    x = 0.3 + 0.4 * torch.rand(8, 2, 6, 6)
    # On a grid, so that potentials come close to the threshold but for rounding.
    weight = model.net[0].weight
    weight.data = weight.data.mul(10).round() / 10
    x = x.mul(10).round() / 10
    radius = no_flip_radius(model, x)
    clean = spikes(model, x)
    for number in range(len(x)):
        directions = unit_steps(200, (2, 6, 6), torch.float32)
        step = 0.99 * float(radius[number]) * directions
        image = x[number : number + 1]
        usual = clean[:, number : number + 1]
        assert (spikes(model, image + step) == usual).all()


def fires(step_mode="m", **given):
    return neuron.IFNode(step_mode=step_mode, **given)


def gated(gate, *, to_logits, net, x):
    """Spikes that let the image through: with a gate of them before the last layer."""
    found = net.fc(gate(net, x) * x)
    return found if to_logits else net.last(found)


def spikes_of(net, x):
    return net.node(net.gate(x))


def one_pattern(net, x):
    """A gate that opens for one of all patterns of 24 spikes."""
    driven = spikes_of(net, x)  # a layer whose currents are known
    pattern = net.many(PATTERN.expand(*x.shape[:-1], -1) + 0.0 * driven[..., :1])
    signs = (PATTERN > 0.5).float() * 2 - 1
    return torch.relu((pattern * signs).sum(-1, keepdim=True) - (signs > 0).sum() + 1.0)


def half_gate(net, x):
    """A gate for a few spikes, before something without bounds."""
    spikes = spikes_of(net, x) * torch.tensor([1.0, -1.0])
    gate = torch.relu(spikes.sum(-1, keepdim=True) - 0.5)
    return torch.cumsum(net.fc(gate * torch.sin(x)), 0)


def waiting(net, x):
    """ReLU of the image and spikes is dark where there is no spike."""
    return net.last(torch.relu(10.0 * x - 20.0 + 16.0 * spikes_of(net, x)))


def kinked(net, x):
    """A kink that no probe meets."""
    current = 10.0 * net.fc(x)
    return net.last(current + 10 * torch.relu(current - 6.0))


PATTERN = torch.where(torch.rand(24, generator=torch.Generator().manual_seed(0)) < 0.5, 0.1, 1.1)
FORMULAS = {
    "past the neurons": (lambda net, x: net.node(x) + x, "past all spiking layers"),
    "past them, beside a mask": (
        lambda net, x: net.node(x) + 0.2 * x + torch.tensor([0.0, -1e9]),
        "past all spiking layers",
    ),
    "a function": (lambda net, x: net.node(F.softplus(x)), "is not one affine map"),
    "another neuron": (lambda net, x: net.quadratic(net.fc(x)), "which the input drives"),
    "a pattern": (partial(gated, one_pattern, to_logits=False), "last is not one affine map"),
    "a pattern, logits": (partial(gated, one_pattern, to_logits=True), "past all spiking layers"),
    "a gate": (partial(gated, spikes_of, to_logits=False), "last is not one affine map"),
    "a gate, logits": (partial(gated, spikes_of, to_logits=True), "past all spiking layers"),
    "half a gate": (half_gate, "no bounds are known for the operation"),
    "waiting": (waiting, "last is not one affine map"),
    "a kink": (kinked, "not one affine map"),
    "twice a frame less another": (
        lambda net, x: net.node(2 * x - torch.cat((x[:1], x[:-1]))),
        "is not one affine map",
    ),
    "differences of frames": (
        lambda net, x: net.node(torch.cat((x[:1] * 0, x[1:] - x[:-1]))),
        "is not one affine map",
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_what_cannot_be_followed_is_named(name):
    forward, message = FORMULAS[name]
    net = Formula(
        lambda net, x: forward(net=net, x=x.flatten(2)),
        gate=linear([[0.1, 0.0], [0.0, 0.1]], [3.0, 3.0]),
        fc=linear([[10.0, -10.0], [-10.0, 10.0]], [1.0, 1.0]),
        node=fires(),
        last=fires(),
        many=fires(),
        quadratic=neuron.QIFNode(step_mode="m"),
    )
    x = torch.tensor([[0.51, 0.49]])
    if "frame" in name:
        model = SpikingEventClassifier(net, T=4)
        x = torch.rand(2, 4, 2, 1, 1)
    else:
        model = SpikingClassifier(net, T=4)
    with pytest.raises(NotImplementedError, match=message):
        no_flip_radius(model.eval(), x)


BETWEEN = {
    "threshold": lambda node, t: setattr(node, "v_threshold", (1.0, 5.0)[t]),
    "threshold that is a tensor": lambda node, t: node.v_threshold.fill_((1.0, 5.0)[t]),
    "gain": lambda node, t: node.input_gain.data.copy_(torch.ones(2) / (t + 1)),
    "reset": lambda node, t: functional.reset_net(node),
    "potential": lambda node, t: setattr(node, "v", 0.0),
    "potential before the first call": lambda node, t: setattr(node, "v", node.v if t else -0.15),
}


@pytest.mark.parametrize("what", BETWEEN)
def test_a_neuron_that_is_changed_within_a_forward_has_no_radius(what):
    def forward(net, x):
        spikes = []
        for t in range(2):
            BETWEEN[what](net.node, t)
            spikes.append(net.node(net.fc(x[t])))
        return torch.cat([torch.stack(spikes), 0.3 + 0.0 * torch.stack(spikes)], -1)

    node = DLIFNode(T=2, tau=2.0, step_mode="s")
    if what == "threshold that is a tensor":
        node = fires("s")
        node.v_threshold = torch.tensor(1.0)
    net = Formula(forward, fc=linear([[1.0]], [0.45]), node=node)
    model = SpikingClassifier(net, T=2, takes="sequence").eval()
    with pytest.raises(NotImplementedError, match="the layer node, wh(ich|ose) "):
        no_flip_radius(model, torch.tensor([[0.3]]))


def test_a_neuron_that_does_not_do_its_equation_is_refused():
    x = torch.rand(1, 2, 6, 6)
    for method, message in (
        ("neuronal_fire", "a neuronal_fire of its own"),
        ("multi_step_forward", "a forward of the neuron was replaced"),
    ):
        model = network(neuron.IFNode())
        own = getattr(model.net[3], method, None)
        setattr(model.net[3], method, lambda x, own=own: own(2 * x))
        with pytest.raises(NotImplementedError, match=message):
            no_flip_radius(model, x)


def test_wrong_use_is_named():
    model = network(neuron.IFNode())
    with pytest.raises(TypeError, match="wrap the network"):
        no_flip_radius(model.net, torch.rand(2, 2, 6, 6))
    with pytest.raises(ValueError, match="NaN"):
        no_flip_radius(model, torch.full((2, 2, 6, 6), torch.nan))
    encoded = SpikingClassifier(model.net, T=4, encoder=PoissonEncoder())
    with pytest.raises(NotImplementedError, match="PoissonEncoder draws"):
        no_flip_radius(encoded, torch.rand(2, 2, 6, 6))
