"""SpikingClassifier: one pure function of images, whatever network, release or mode is inside."""

from functools import partial

import pytest
import torch
from spikingjelly.activation_based import base, encoding, functional, layer, neuron, surrogate
from torch import nn
from torch.testing import assert_close

from sj_robust.classifier import (
    PoissonEncoder,
    SpikingClassifier,
    SpikingEventClassifier,
)
from sj_robust.estimators import estimator
from sj_robust.neuron import DLIFNode


def make_net(step_mode="m", spiking_neuron=neuron.LIFNode):
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(1, 4, 3, padding=1),
        spiking_neuron(v_threshold=0.2, surrogate_function=surrogate.ATan()),
        layer.Flatten(),
        layer.Linear(4 * 36, 3),
    )
    functional.set_step_mode(net, step_mode)
    return net


def make_images(n=5):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 1, 6, 6, generator=generator)


def make_frames(n=5):
    generator = torch.Generator().manual_seed(2)
    values = torch.rand(n, 4, 1, 6, 6, generator=generator)
    return (values < 0.3).float()


@pytest.fixture(params=[SpikingClassifier, SpikingEventClassifier])
def kind(request):
    """A class, its inputs and the sequence that the network gets, time first."""
    if request.param is SpikingClassifier:
        x = make_images()
        return SpikingClassifier, x, x.expand(4, -1, -1, -1, -1)
    x = make_frames()
    return SpikingEventClassifier, x, x.transpose(0, 1)


def test_equals_the_definition(kind):
    cls, x, x_seq = kind
    net = make_net()
    functional.reset_net(net)
    wanted = net(x_seq).mean(0)
    classifier = cls(net, T=4)
    assert torch.equal(classifier(x), wanted)
    assert torch.equal(classifier(x), wanted)  # nothing of the first call is left
    assert_close(classifier(x[1:3]), wanted[1:3])  # nor does another batch size matter
    assert torch.equal(classifier(x), wanted)


def test_single_step_networks_run_step_by_step(kind):
    cls, x, _ = kind
    wanted = cls(make_net("m"), T=4)(x)
    single = cls(make_net("s"), T=4)
    assert_close(single(x), wanted)
    told = cls(make_net("s"), T=4, takes="steps")
    assert_close(told(x), wanted)


def gradient_of(classifier, x):
    total = classifier(x).square().sum()
    (gradient,) = torch.autograd.grad(total, x)
    return gradient


@pytest.mark.parametrize("spiking_neuron", [neuron.LIFNode, neuron.IFNode])
def test_evaluation_mode_has_the_gradient_of_training_mode(kind, spiking_neuron):
    cls, x, _ = kind
    classifier = cls(make_net(spiking_neuron=spiking_neuron), T=4)
    x.requires_grad_()
    wanted = gradient_of(classifier, x)
    classifier.eval()
    gradient = gradient_of(classifier, x)
    assert wanted.abs().sum() > 0
    assert_close(gradient, wanted)
    for module in classifier.modules():
        assert not module.training


def test_every_frame_counts_at_its_own_step():
    classifier = SpikingEventClassifier(make_net(), T=4)
    frames = make_frames()
    turned = classifier(frames.flip(1))
    assert not torch.allclose(turned, classifier(frames))


def test_normalisation_is_inside_and_moves_with_the_module():
    net = make_net()
    images = make_images()
    classifier = SpikingClassifier(net, T=4, mean=[0.5], std=[0.25])
    plain = SpikingClassifier(net, T=4)
    normalised = (images - 0.5) / 0.25
    assert_close(classifier(images), plain(normalised))
    assert set(classifier.state_dict()) >= {"mean", "std"}
    logits = classifier.double()(images.double())
    assert logits.dtype == torch.float64


class Expanding(nn.Module):
    def forward(self, images):
        assert images.shape[1:] == (1, 6, 6)
        logits = images.flatten(1)[:, :3]
        return logits.expand(4, len(images), 3)


class Averaging(nn.Module):
    def forward(self, frames):
        logits = frames.flatten(2)[..., :3]
        return logits.mean(0)


@pytest.mark.parametrize("network", [Expanding, Averaging])
def test_a_network_that_brings_its_own_steps_or_averages_itself(network):
    images = make_images()
    classifier = SpikingClassifier(network(), T=4)
    assert_close(classifier(images), images.flatten(1)[:, :3])


def test_modes_are_restored_after_an_error():
    net = make_net().eval()
    classifier = SpikingClassifier(net, T=4).eval()
    with pytest.raises(RuntimeError):
        classifier(torch.rand(2, 7, 6, 6))
    for module in classifier.modules():
        assert not module.training


def test_batch_norm_and_dropout_stay_in_evaluation_mode():
    norm = layer.BatchNorm2d(1, step_mode="m")
    net = nn.Sequential(
        norm,
        layer.Dropout(0.5, step_mode="m"),
        make_net(),
    )
    classifier = SpikingClassifier(net, T=2).eval()
    before = norm.running_mean.clone()
    first = classifier(make_images())
    assert torch.equal(classifier(make_images()), first)
    assert torch.equal(norm.running_mean, before)


def test_logits_are_float32_under_autocast():
    classifier = SpikingClassifier(make_net(), T=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert classifier(make_images()).dtype == torch.float32


def test_poisson_has_the_images_as_its_mean_and_a_straight_through_gradient():
    encoder = PoissonEncoder(torch.Generator().manual_seed(0))
    images = torch.tensor([0.0, 0.2, 0.7, 1.0]).requires_grad_()
    spikes = torch.stack([encoder(images) for _ in range(4000)])
    assert spikes.unique().tolist() == [0.0, 1.0]
    assert_close(spikes.mean(0), images, atol=0.03, rtol=0)
    (gradient,) = torch.autograd.grad(spikes[0].sum(), images)
    assert torch.equal(gradient, torch.ones(4))


def test_poisson_repeats_under_its_generator():
    outputs = []
    for _ in range(2):
        encoder = PoissonEncoder(torch.Generator().manual_seed(3))
        classifier = SpikingClassifier(make_net(), T=4, encoder=encoder)
        outputs.append(classifier(make_images()))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_latency_encoder_of_the_host_starts_anew_every_time(step_mode):
    encoder = encoding.LatencyEncoder(4)
    classifier = SpikingClassifier(make_net(step_mode), T=4, encoder=encoder)
    images = make_images()
    wanted = classifier(images)
    assert torch.equal(classifier(images), wanted)
    other = classifier(1 - images)
    assert not torch.equal(other, wanted)


def test_encoding_comes_before_normalisation():
    seen = []

    class Spy(nn.Module):
        def forward(self, frames):
            seen.append(frames)
            return frames.flatten(2)[..., :3]

    encoder = PoissonEncoder(torch.Generator().manual_seed(0))
    classifier = SpikingClassifier(
        Spy(),
        T=4,
        encoder=encoder,
        mean=[0.5],
        std=[0.5],
    )
    classifier(make_images())
    assert seen[0].unique().tolist() == [-1.0, 1.0]


def test_a_step_module_without_a_mode_of_its_own_is_passed_over():
    class Container(nn.Sequential, base.StepModule):
        """As SpikingJelly 2.x's SeqToANNContainer."""

    net = Container(nn.Linear(3, 2), DLIFNode(T=4, step_mode="s"))
    if hasattr(net, "step_mode"):
        del net.step_mode
    x = torch.rand(5, 3)
    assert SpikingClassifier(net, T=4)(x).shape == (5, 2)
    plain = Container(nn.Linear(3, 2))
    assert SpikingClassifier(plain, T=4)(x).shape == (5, 2)


@pytest.mark.skipif(not hasattr(neuron, "PSN"), reason="this release of SpikingJelly has no PSN")
def test_a_neuron_without_a_reset_or_a_step_mode_is_one_of_sequences():
    net = nn.Sequential(nn.Flatten(2), nn.Linear(4, 3), neuron.PSN(2))
    model = SpikingClassifier(net, T=2).eval()
    x = torch.rand(2, 1, 2, 2)
    assert model.find_convention(x).takes == "sequence"
    expected = net(x.expand(2, *x.shape)).mean(0)
    assert_close(model(x), expected)
    model.quicker()
    with estimator("atan:4")(model) as crafted_on:
        assert_close(crafted_on(x), expected)


def test_a_network_that_copies_share_has_no_quicker_copy():
    class Shared(nn.Sequential):
        def __deepcopy__(self, memo):
            return self

    net = Shared(nn.Flatten(2), nn.Linear(4, 3), neuron.LIFNode(step_mode="m"))
    assert SpikingClassifier(net, T=2).quicker() is None
    assert type(net[2]) is neuron.LIFNode


def test_the_first_forward_may_be_under_vmap():
    x, y = make_images(3), torch.tensor([0, 1, 0])
    model = SpikingClassifier(make_net(spiking_neuron=partial(DLIFNode, 2)), T=2).eval()
    weights = {name: value.detach() for name, value in model.named_parameters()}

    def loss(weights, image, label):
        logits = torch.func.functional_call(model, weights, (image.unsqueeze(0),))
        return nn.functional.cross_entropy(logits, label.unsqueeze(0))

    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, x, y)
    for number in range(3):
        total = nn.functional.cross_entropy(model(x[number : number + 1]), y[number : number + 1])
        expected = torch.autograd.grad(total, list(model.parameters()))
        for name, one in zip(weights, expected, strict=True):
            assert_close(found[name][number], one)
