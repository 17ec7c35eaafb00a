"""Mistakes of a newcomer with networks, each made for real: the class of the error, and what its
message or its notes have to name. Those with a recipe are in tests/recipes/test_misuse.py.
"""

import copy
import warnings

import pytest
import torch
from torch import nn

from sj_robust import DLIFNode, MPPDMonitor, SpikingClassifier, replace_neurons
from sj_robust.attacks import pgd
from sj_robust.core.host import functional, layer, neuron, surrogate
from sj_robust.proofs.gains import perturbation_gains

T = 4
N = 8


def lif():
    return neuron.LIFNode(tau=2.0)


def network(node=None, step_mode="m"):
    """One hidden layer of spiking neurons for images of 8 x 8."""
    torch.manual_seed(0)
    spiking = DLIFNode(T=T) if node is None else node
    net = nn.Sequential(layer.Flatten(), layer.Linear(64, 16), spiking, layer.Linear(16, 10))
    functional.set_step_mode(net, step_mode)
    return net


def images(n=N):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def sequence(n=N, steps=T):
    return images(n).expand(steps, -1, -1, -1, -1)


def classifier(node=None, T=T, **options):
    return SpikingClassifier(network(node), T=T, **options)


def attacked(model):
    y = torch.arange(N) % 10
    return pgd(model, images(), y, eps=8 / 255, step_size=2 / 255, steps=2)


def one_after_the_other(*inputs):
    net = network()
    for x in inputs:
        net(x).sum().backward()


def never_in_step_mode_m():
    net = nn.Sequential(layer.Conv2d(1, 4, 3), layer.Flatten(), layer.Linear(144, 9), DLIFNode(T=T))
    SpikingClassifier(net, T=T)(images())


def copied_after_a_step():
    net = network()
    net(sequence())
    copy.deepcopy(net)


def plain_layers():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), DLIFNode(T=T), nn.Flatten(), nn.Linear(144, 10))
    SpikingClassifier(net, T=T)(images())


def loaded(target, source):
    target.load_state_dict(source.state_dict())


MISTAKES = {
    "The network is not reset between two batches": (
        RuntimeError,
        "reset_net",
        lambda: one_after_the_other(sequence(), sequence()),
    ),
    "The network is not reset before a batch of another size": (
        RuntimeError,
        "reset_net",
        lambda: one_after_the_other(sequence(steps=2), sequence(n=3, steps=2)),
    ),
    "A second backward pass reaches the previous sequence, since the network was not reset": (
        RuntimeError,
        "reset_net",
        lambda: one_after_the_other(sequence(steps=2), sequence(steps=2)),
    ),
    'A batch of images [N, C, H, W] goes into a network in step mode "m"': (
        RuntimeError,
        "step mode 'm'",
        lambda: network()(images()),
    ),
    "A sequence has its samples first, [N, T, C, H, W]": (
        RuntimeError,
        "x.transpose(0, 1)",
        lambda: network()(sequence().transpose(0, 1)),
    ),
    "A sequence is longer than the neurons' T": (
        RuntimeError,
        "T=6",
        lambda: network()(sequence(steps=6)),
    ),
    'The layers were never put into step mode "m"': (ValueError, "T must", never_in_step_mode_m),
    "A network that gets a sequence contains layers of plain torch": (
        RuntimeError,
        "spikingjelly.activation_based.layer",
        plain_layers,
    ),
    "SpikingClassifier gets more time steps than its DLIF neurons have": (
        RuntimeError,
        "set_time_steps",
        lambda: classifier(T=8)(images()),
    ),
    "SpikingClassifier gets fewer time steps than its DLIF neurons have": (
        UserWarning,
        "set_time_steps",
        lambda: classifier(T=2),
    ),
    "The network merges time and samples": (
        ValueError,
        "the network must",
        lambda: SpikingClassifier(nn.Sequential(network(), nn.Flatten(0, 1)), T=T)(images()),
    ),
    "One image without a batch dimension": (
        ValueError,
        "images must",
        lambda: classifier()(images()[0]),
    ),
    "Images are bytes": (TypeError, "images must", lambda: classifier()((images() * 255).byte())),
    "Images are float64, as numpy makes them, and the weights float32": (
        ValueError,
        "images and network must",
        lambda: classifier()(images().double()),
    ),
    "Only the network was converted to float16": (
        ValueError,
        "images and network must",
        lambda: SpikingClassifier(network().half(), T=T)(images()),
    ),
    "Only the network was moved to another device": (
        ValueError,
        "images and network must",
        lambda: classifier().to("meta")(images()),
    ),
    "Only the images were moved to another device": (
        ValueError,
        "images and network must",
        lambda: classifier()(images().to("meta")),
    ),
    "mean and std have three channels, the images one": (
        ValueError,
        "mean and std must",
        lambda: classifier(mean=[0.5] * 3, std=[0.2] * 3)(images()),
    ),
    "A network that is already in a SpikingClassifier is wrapped again": (
        ValueError,
        "net must",
        lambda: SpikingClassifier(classifier(), T=T),
    ),
    "The network is wrapped in nn.DataParallel": (
        ValueError,
        "net must",
        lambda: SpikingClassifier(nn.DataParallel(network()), T=T),
    ),
    "The model's forward runs under torch.no_grad": (
        RuntimeError,
        "no_grad",
        lambda: attacked(torch.no_grad()(classifier().forward)),
    ),
    "A surrogate class is given instead of an instance": (
        TypeError,
        "surrogate_function must",
        lambda: DLIFNode(T=T, surrogate_function=surrogate.ATan),
    ),
    "replace_neurons on a network without spiking neurons": (
        ValueError,
        "holds no SpikingJelly neuron",
        lambda: replace_neurons(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), T=T),
    ),
    "replace_neurons on a class": (
        TypeError,
        "net must",
        lambda: replace_neurons(neuron.LIFNode, T=T),
    ),
    'compare on a network in step mode "s", which is called once': (
        ValueError,
        "forward=",
        lambda: MPPDMonitor(network(lif(), "s")).compare(images(), images()),
    ),
    "compare gets NaN": (
        ValueError,
        "x and x_perturbed must",
        lambda: MPPDMonitor(network()).compare(sequence(), sequence() / 0 * 0),
    ),
    "A certificate of a network without spiking neurons": (
        ValueError,
        "holds no SpikingJelly neuron",
        lambda: perturbation_gains(nn.Sequential(nn.Flatten(2), nn.Linear(64, 10)), images(), T=T),
    ),
    "Weights for another number of time steps are loaded": (
        RuntimeError,
        "set_time_steps",
        lambda: loaded(network(), network(DLIFNode(T=8))),
    ),
    "Weights of a LIF network are loaded into its DLIF successor": (
        RuntimeError,
        "replace_neurons",
        lambda: loaded(network(), network(lif())),
    ),
    "A network is copied in the middle of training, before a reset": (
        RuntimeError,
        "reset_net",
        copied_after_a_step,
    ),
}


@pytest.mark.parametrize(("error", "named", "make"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_answered_by_what_it_is_about(error, named, make):
    with pytest.raises(error) as caught:
        make()
    said = [str(caught.value), *getattr(caught.value, "__notes__", [])]
    assert named in " ".join(said)


def test_right_use_of_the_same_things_has_no_answer():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attacked(classifier())
        attacked(classifier(lif()))
        attacked(SpikingClassifier(network(lif(), "s"), T=T))
        net = network(lif(), "s")
        MPPDMonitor(net).compare(
            sequence(), sequence(), forward=lambda x: [net(step) for step in x]
        )
        copy.deepcopy(classifier()).eval()
        model = classifier()
        model(images()).sum()
        found = copy.deepcopy(model)(images())
        assert torch.equal(found, model(images()))
        loaded(network(), network())
        single = SpikingClassifier(network(lif(), "s"), T=1)
        assert MPPDMonitor(single).compare(images(), images())["net.2"].samples == N


def test_weights_without_gains_go_into_a_dlif_network_if_that_is_asked_for():
    net = network()
    missing, unexpected = net.load_state_dict({"1.weight": torch.full((16, 64), 0.5)}, strict=False)
    assert "2.input_gain" in missing
    assert not unexpected
    expected = torch.full((16, 64), 0.5)
    assert torch.equal(net[1].weight, expected)
    assert torch.equal(net[2].input_gain, torch.ones(T))


@pytest.mark.parametrize("takes", ["images", "sequence"])
def test_layers_that_never_meet_the_time_dimension_are_not_blamed(takes):
    own = takes == "images"
    wrapped = nn.Conv2d(1, 2, 3) if own else layer.SeqToANNContainer(nn.Conv2d(1, 2, 3))
    net = nn.Sequential(wrapped, layer.Flatten(), layer.Linear(5, 10), DLIFNode(T=T))
    functional.set_step_mode(net, "s" if own else "m")
    with pytest.raises(RuntimeError, match="multiplied") as caught:
        SpikingClassifier(net, T=T, takes=takes)(images())
    assert not getattr(caught.value, "__notes__", [])
