"""What a network takes and gives is found out: the logits are those of the plain call, and the
network is left alone.
"""

import copy
import itertools
import pickle

import pytest
import torch
from networks_as_written import CLASSES, ROWS
from spikingjelly.activation_based import functional, layer, neuron
from test_networks import classifier_of, plain_call
from torch import nn
from torch.nn.parameter import is_lazy
from torch.testing import assert_close
from unchanged import unchanged

from sj_robust import SpikingClassifier, perturbation_gains
from sj_robust.core.convention import kept_state
from sj_robust.defences import EvolvingLeakNode, HomeostaticNode, StochasticGate
from sj_robust.models import NetworkSpec, build_network, set_time_steps
from sj_robust.models.direct import DirectlyEncoded


def three_images():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, 1, 8, 8, generator=generator)


def model_of(name):
    return classifier_of(ROWS[name])


OTHER_IN_TRAINING = [
    "sequence",
    "sequence, mean over time in evaluation (TET)",
    "image repeated, mean over time in evaluation (TET)",
    "sequence, mean over time by a hook",
    "single steps",
]


@pytest.mark.parametrize("name", OTHER_IN_TRAINING)
@pytest.mark.parametrize("first", ["training", "evaluation"])
def test_a_network_may_return_a_sequence_in_one_mode_and_its_mean_in_the_other(name, first):
    row = ROWS[name]
    model = classifier_of(row)
    net = model.net
    modes = [True, False] if first == "training" else [False, True]
    sizes = [3, row.T, CLASSES]  # so that N = T, or N and the number of classes are equal
    for n, training in itertools.product(sizes, modes):
        model.train(training)
        x = row.images(n)
        norms = copy.deepcopy(net.state_dict())
        wanted = plain_call(row, net, x)
        net.load_state_dict(norms)
        assert torch.equal(model(x), wanted)
        assert wanted.shape == (n, CLASSES)


class Sliced(nn.Module):
    """Single steps; features are compared and cut out along their dimension."""

    def __init__(self, node):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(-3), nn.Linear(64, 12), node)

    def forward(self, x):
        y = self.body(x)
        return (y - y[:, :1])[:, :9]


class Leaky(nn.Module):
    """A neuron that nobody knows."""

    v = 0.0

    def reset(self):
        self.v = 0.0

    def forward(self, x):
        self.v = 0.5 * self.v + x
        return (self.v > 0.1).to(x)


@pytest.mark.parametrize("node", [neuron.IFNode, Leaky])
@pytest.mark.parametrize("T", [1, 4])
def test_features_may_be_sliced_in_single_steps(node, T):
    torch.manual_seed(0)
    net = Sliced(node())
    x = three_images()
    found = SpikingClassifier(net, T)(x)
    functional.reset_net(net)
    assert torch.equal(found, torch.stack([net(x) for _ in range(T)]).mean(0))


class Turned(nn.Module):
    """Logits of four classes; in training every step of them, time first or second."""

    def __init__(self, time):
        super().__init__()
        self.linear = nn.Linear(64, 4)
        self.time = time

    def forward(self, x_seq):
        y_seq = self.linear(x_seq.flatten(2))
        if self.training:
            return y_seq.movedim(0, self.time)
        return y_seq.mean(0)


def test_what_is_neither_logits_nor_a_sequence_is_refused_in_training_too():
    x = three_images()
    for T in (4, 3):  # the number of classes, or of images
        model = SpikingClassifier(Turned(time=0), T, takes="sequence")
        assert model.train()(x).shape == (3, 4)
        assert_close(model(x), model.eval()(x))
    model = SpikingClassifier(Turned(time=1), 4, takes="sequence")
    message = r"N = 3 and T = 4, got a tensor \[3, 4, 4\]; .*time first"
    with pytest.raises(ValueError, match=message):
        model.train()(x)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("image repeated, mean over time", 1),
        ("loop over steps, mean", 4),
        ("sequence", 1),
    ],
)
def test_trying_leaves_the_network_as_it_was(name, steps):
    row = ROWS[name]
    net = row.network().train()
    x = row.images(3)
    plain_call(row, net, x).sum().backward()  # states with a graph, statistics, gradients
    calls = []
    norm = next(module for module in net.modules() if isinstance(module, nn.BatchNorm2d))
    norm.register_forward_hook(lambda module, args, output: calls.append("after"))
    norm.register_forward_pre_hook(lambda module, args: calls.append("before"))
    model = SpikingClassifier(net, row.T if row.given else None)
    with unchanged(net, hooked=(norm,)):
        model.find_convention(x)
    assert calls == []
    model(x)
    assert calls == ["before", "after"] * steps  # the first forward itself is seen once


def features_of_lazy_layers():
    return nn.Sequential(nn.LazyLinear(5), neuron.IFNode(step_mode="m"), nn.LazyLinear(3))


def features_of(*nodes):
    return nn.Sequential(nn.Linear(6, 5), *nodes, nn.Linear(5, 3))


def images_of_lazy_norm():
    return nn.Sequential(
        layer.Conv2d(1, 2, 1, step_mode="m"),
        layer.SeqToANNContainer(nn.LazyBatchNorm2d()),
        neuron.IFNode(step_mode="m"),
        nn.Flatten(2),
        nn.LazyLinear(3),
    )


WITHOUT_SHAPES = {
    "lazy norm": images_of_lazy_norm,
    "leaks": lambda: features_of(EvolvingLeakNode(4)),
    "thresholds": lambda: features_of(HomeostaticNode(4)),
    "gates": lambda: features_of(neuron.IFNode(step_mode="m"), StochasticGate()),
    "lazy layers": features_of_lazy_layers,
    "neurons first": lambda: nn.Sequential(HomeostaticNode(4), nn.Flatten(2), nn.Linear(6, 3)),
}


@pytest.mark.parametrize("name", WITHOUT_SHAPES)
def test_trying_gives_no_parameter_a_shape(name):
    torch.manual_seed(0)
    net = WITHOUT_SHAPES[name]()
    kinds = [type(module) for module in net.modules()]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x = torch.rand(2, 6)
    if name in ("neurons first", "lazy norm"):
        x = x.view(2, 1, 2, 3)
    model = SpikingClassifier(net, T=4)
    model.find_convention(x)
    assert any(is_lazy(parameter) for parameter in net.parameters())
    assert [type(module) for module in net.modules()] == kinds
    model(x).sum().backward()
    before = copy.deepcopy(net.state_dict())
    optimizer.step()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter, before[key]) == (not parameter.grad.any())
    functional.reset_net(net)
    sequence = x.unsqueeze(0).expand(4, *x.shape)
    assert net(sequence).shape == (4, 2, 3)
    other = WITHOUT_SHAPES[name]()
    SpikingClassifier(other, T=4).find_convention(x)
    other.load_state_dict(net.state_dict())
    assert_close(dict(other.state_dict()), dict(net.state_dict()), rtol=0, atol=0)


def test_a_classifier_is_copied_pickled_and_loaded_as_before():
    row = ROWS["sequence"]
    model = model_of("sequence")
    x = row.images()
    names = list(model.state_dict())
    wanted = model(x)
    assert list(model.state_dict()) == names
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x), wanted)
    fresh = SpikingClassifier(row.network(), row.T)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(x), wanted)
    assert "_found" not in vars(model.net)


def test_a_change_of_step_mode_or_of_steps_is_noticed():
    model = model_of("sequence")
    x = ROWS["sequence"].images()
    wanted = model(x)
    functional.set_step_mode(model.net, "s")
    assert_close(model(x), wanted)
    assert model.convention.takes == "steps"
    own = model_of("image repeated, mean over time")
    own(x)
    set_time_steps(own, 6)
    own(x)
    assert own.convention.T == 6
    assert own.T == 6


class Repeating(nn.Module):
    """Repeats its images over its steps, in either step mode."""

    steps: int
    layers: nn.Sequential

    def forward(self, images):
        if self.layers[0].step_mode == "m":
            return self.layers(images.expand(self.steps, *images.shape))
        return sum(self.layers(images) for _ in range(self.steps)) / self.steps


class OtherName(Repeating):
    """The number of its steps has another name than T."""

    def __init__(self, steps, mode, shared=False):
        super().__init__()
        self.steps = steps
        hidden = layer.Linear(64, 64)
        self.layers = nn.Sequential(layer.Flatten(), hidden, neuron.IFNode(v_threshold=0.1))
        if shared:
            self.layers.append(hidden)
        self.layers.append(layer.Linear(64, 5))
        functional.set_step_mode(self, mode)


@pytest.mark.parametrize("mode", ["m", "s"])
@pytest.mark.parametrize("T", [1, 2, 4, 16])
def test_another_number_of_steps_than_the_networks_own_is_refused(mode, T):
    x = torch.rand(3, 1, 8, 8)
    for shared in (False, True):  # a layer in two places
        net = OtherName(8, mode, shared=shared)
        with pytest.raises(ValueError, match="(8 steps|8 times|16 steps)"):
            SpikingClassifier(net, T=T)(x)
        assert net(x).shape[-1] == 5


class Tied(Repeating):
    """Runs a block of layers and neuron twice in every step."""

    def __init__(self, mode):
        super().__init__()
        self.T = self.steps = 4
        block = [layer.Linear(64, 64), nn.LayerNorm(64), neuron.IFNode(v_threshold=0.1)]
        self.layers = nn.Sequential(layer.Flatten(), *block, *block, layer.Linear(64, 5))
        functional.set_step_mode(self, mode)


@pytest.mark.parametrize("mode", ["m", "s"])
@pytest.mark.parametrize("T", [None, 4])
def test_a_block_in_several_places(mode, T):
    classifier = SpikingClassifier(Tied(mode).eval(), T=T)
    classifier(torch.rand(3, 1, 8, 8))
    assert (classifier.convention.takes, classifier.T) == ("images", 4)


def test_a_network_that_got_other_steps_is_asked_again():
    net = OtherName(2, "m")
    classifier = SpikingClassifier(net)
    x = torch.rand(3, 1, 8, 8)
    classifier(x)
    net.steps = 16
    assert classifier.find_convention(x).T == 16
    assert classifier.T == 16
    with pytest.raises(ValueError, match="it runs 16 steps itself, got T=2"):
        SpikingClassifier(net, T=2).find_convention(x)


class Switch(nn.Module):
    """Does one thing with images and another with sequences."""

    def __init__(self):
        super().__init__()
        self.T = 4
        self.layers = nn.Sequential(
            layer.Flatten(),
            layer.Linear(64, 5),
            neuron.IFNode(v_threshold=0.1),
        )
        functional.set_step_mode(self, "m")

    def forward(self, x):
        if x.ndim == 4:
            x_seq = x.expand(4, *x.shape)
            return self.layers(x_seq).sum(0)
        return self.layers(x).mean(0)


def test_a_network_with_its_own_steps_gets_images_unless_it_is_said_otherwise():
    torch.manual_seed(0)
    net = Switch().eval()
    x = three_images()
    of_images = SpikingClassifier(net, 4)(x)
    of_sequence = SpikingClassifier(net, 4, takes="sequence")(x)
    assert torch.equal(of_images, 4 * of_sequence)
    assert torch.equal(of_images, SpikingClassifier(net)(x))
    assert not SpikingClassifier(net, 4).find_convention(x).takes_sequences
    assert of_images.abs().sum() > 0


class TwoPlaces(nn.Module):
    """Two calls of one neuron: two steps, or one step of two places."""

    def __init__(self):
        super().__init__()
        self.first = layer.Linear(64, 16)
        self.second = layer.Linear(16, 5)
        self.neuron = neuron.IFNode(v_threshold=0.1)

    def forward(self, x):
        x = self.first(x.flatten(1))
        x = self.neuron(self.neuron(x))
        return self.second(x)


@pytest.mark.parametrize("T", [None, 2, 4])
def test_a_neuron_in_two_places_is_no_loop_once_that_is_said(T):
    net = TwoPlaces().eval()
    x = three_images()
    with pytest.raises(ValueError, match="T must"):
        SpikingClassifier(net, T)(x)
    model = SpikingClassifier(net, 4, takes="steps")
    expected = plain_call(ROWS["single steps"], net, x)
    assert torch.equal(model(x), expected)
    assert model.convention.takes == "steps"


def test_a_batch_is_not_taken_for_time_steps():
    net = nn.Sequential(nn.Linear(6, 3), neuron.IFNode(step_mode="m"))
    with pytest.raises(ValueError, match="T must be given"):
        SpikingClassifier(net)(torch.rand(5, 6))


class Stateful(nn.Module):
    """A plain module that remembers."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)
        self.v = 0.0

    def forward(self, x):
        current = self.linear(x.flatten(1))
        self.v = self.v * 0.5 + current
        return self.v


class Drawing(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        noisy = x + torch.rand_like(x)
        return self.linear(noisy.flatten(1))


def test_a_state_that_nothing_resets_is_named_and_is_no_draw():
    x = torch.rand(2, 1, 8, 8)
    net = nn.Sequential(Stateful())
    assert kept_state(net, x) == ("0.v",)
    assert net[0].v == 0.0
    assert kept_state(Drawing(), x) == ()
    assert kept_state(model_of("loop over steps, mean"), x) == ()
    with pytest.raises(ValueError, match=r"keeps a state that .* \(0\.v\), .* method reset\(\)"):
        SpikingClassifier(net, 1, takes="images")(x)
    SpikingClassifier(Drawing(), 4)(x)


def test_networks_of_the_package_take_images_and_frames():
    net = build_network(NetworkSpec(T=4))
    assert isinstance(net, DirectlyEncoded)
    x = three_images()
    model = SpikingClassifier(net.eval(), 4)
    model(x)
    assert model.convention.takes == "images"
    assert model.convention.takes_sequences


class Expanded(nn.Sequential):
    """Expands an image over six steps; a sequence of another length cannot be expanded."""

    def forward(self, x):
        return super().forward(x.expand(6, -1, -1, -1, -1)).mean(0)


def test_a_network_that_expands_one_step_takes_no_sequences():
    torch.manual_seed(0)
    net = Expanded(layer.Flatten(step_mode="m"), nn.Linear(64, 3), neuron.IFNode(step_mode="m"))
    x = torch.rand(2, 1, 8, 8)
    model = SpikingClassifier(net.eval())
    model(x)
    assert (model.convention.takes, model.convention.T) == ("images", 6)
    assert not model.convention.takes_sequences
    assert perturbation_gains(model, x).layers


def brighter(x):
    return (x + 0.05).clamp(max=1)


def test_certified_gains_of_images_are_those_of_sequences():
    x = three_images()
    repeated = model_of("image repeated, mean over time")
    images = perturbation_gains(repeated, x, x_perturbed=brighter(x))
    whole = model_of("sequence")
    sequence = perturbation_gains(whole, x, x_perturbed=brighter(x))
    for of_images, of_sequence in zip(images.layers, sequence.layers, strict=True):
        if of_images.norm is not None:
            # One image feeds all four steps.
            factor = 2 if of_images.feeds == ("input",) else 1
            expected = factor * of_sequence.norm
            assert of_images.norm == pytest.approx(expected, rel=1e-3)


def test_trying_is_cheap_and_happens_once():
    row = ROWS["sequence"]
    x = row.images(64)
    model = model_of("sequence")
    sizes = []

    def note(module, args, output):
        sizes.append(args[0].shape[1])

    model.net.register_forward_hook(note)
    model(x)
    model(x)
    assert sizes == [64, 64]
    net = row.network()
    forward = net.forward
    tried = []

    def noting(frames):
        tried.append(frames.shape[-4])
        return forward(frames)

    net.forward = noting
    SpikingClassifier(net, row.T).find_convention(x)
    assert max(tried) <= 4
    assert len(tried) <= 10
