"""The radius without flips: no spike moves below it, one moves just above it, on every kind of
neuron and reset.
"""

import copy

import pytest
import torch
from proofs import fuzz, networks
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from sj_robust.classifier import PoissonEncoder, SpikingClassifier, SpikingEventClassifier
from sj_robust.neuron.charging import read_charging
from sj_robust.proofs import UnsoundBoundsError, no_flip_radius, rounding

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
    """First layer's spikes in float64."""
    seen, _ = fuzz.run_of(model, x)
    found, _ = seen["3"]
    return found.detach()


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


class Past(nn.Module):
    """The input beside the spikes."""

    def __init__(self):
        super().__init__()
        self.node = neuron.IFNode(step_mode="m")
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.node(x) + x)


class Sharpened(nn.Module):
    """Every frame twice, less the one before it: equal frames stay as they are."""

    def forward(self, x):
        return 2 * x - torch.cat((x[:1], x[:-1]))


class Differences(nn.Module):
    """Every frame less the one before it: equal frames leave nothing."""

    def forward(self, x):
        return torch.cat((x[:1] * 0, x[1:] - x[:-1]))


@pytest.mark.parametrize("mixes", [Sharpened, Differences])
def test_frames_that_are_mixed_over_time_are_refused(mixes):
    net = nn.Sequential(mixes(), nn.Linear(4, 4), neuron.IFNode(step_mode="m"), nn.Flatten(2))
    frames = torch.rand(2, 3, 1, 1, 4)
    with pytest.raises(NotImplementedError, match="is not one affine map"):
        no_flip_radius(SpikingEventClassifier(net, T=3), frames)


def before_a_neuron(part, node):
    return lambda: nn.Sequential(part, node(step_mode="m"))


NOT_FOLLOWED = {
    "past all spiking layers": Past,
    "is not one affine map": before_a_neuron(nn.Softplus(), neuron.IFNode),
    "1, which the input drives": before_a_neuron(nn.Linear(4, 4), neuron.QIFNode),
}
"""Networks by what is said of them."""


@pytest.mark.parametrize("message", NOT_FOLLOWED)
def test_what_cannot_be_followed_is_named(message):
    net = NOT_FOLLOWED[message]()
    with pytest.raises(NotImplementedError, match=message):
        no_flip_radius(SpikingClassifier(net, T=2), torch.rand(2, 4))


def test_a_neuron_that_does_not_do_its_equation_is_refused():
    model = network(neuron.IFNode())
    model.net[3].neuronal_fire = lambda: model.net[3].v
    with pytest.raises(NotImplementedError, match="a neuronal_fire of its own"):
        no_flip_radius(model, torch.rand(1, 2, 6, 6))
    model = network(neuron.IFNode())
    step = model.net[3].multi_step_forward
    model.net[3].multi_step_forward = lambda x: step(2 * x)
    with pytest.raises(UnsoundBoundsError, match="the layer 3 .IFNode. does not spike"):
        no_flip_radius(model, torch.rand(1, 2, 6, 6))


def test_wrong_use_is_named():
    model = network(neuron.IFNode())
    with pytest.raises(TypeError, match="wrap the network"):
        no_flip_radius(model.net, torch.rand(2, 2, 6, 6))
    with pytest.raises(ValueError, match="NaN"):
        no_flip_radius(model, torch.full((2, 2, 6, 6), torch.nan))
    encoded = SpikingClassifier(model.net, T=4, encoder=PoissonEncoder())
    with pytest.raises(NotImplementedError, match="PoissonEncoder draws"):
        no_flip_radius(encoded, torch.rand(2, 2, 6, 6))
