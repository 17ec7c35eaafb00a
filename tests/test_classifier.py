"""SpikingClassifier: one pure function of images, whatever network, release or mode is inside."""

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import base, encoding, functional, layer, neuron, surrogate
from torch import nn

from sj_robust.classifier import (
    PoissonEncoder,
    SpikingClassifier,
    SpikingEventClassifier,
    as_classifier,
)
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
    return torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def make_frames(n=5):
    return (torch.rand(n, 4, 1, 6, 6, generator=torch.Generator().manual_seed(2)) < 0.3).float()


@pytest.fixture(params=[SpikingClassifier, SpikingEventClassifier])
def kind(request):
    """A class, its inputs and the sequence that the network gets, time first."""
    if request.param is SpikingClassifier:
        return request.param, make_images(), make_images().expand(4, -1, -1, -1, -1)
    return request.param, make_frames(), make_frames().transpose(0, 1)


def test_equals_the_definition(kind):
    cls, x, x_seq = kind
    net = make_net()
    functional.reset_net(net)
    wanted = net(x_seq).mean(0)
    classifier = cls(net, T=4)
    assert torch.equal(classifier(x), wanted)
    assert torch.equal(classifier(x), wanted)  # nothing of the first call is left
    torch.testing.assert_close(
        classifier(x[1:3]), wanted[1:3]
    )  # nor does another batch size matter
    assert torch.equal(classifier(x), wanted)


def test_single_step_networks_run_step_by_step(kind):
    cls, x, _ = kind
    wanted = cls(make_net("m"), T=4)(x)
    torch.testing.assert_close(cls(make_net("s"), T=4)(x), wanted)
    torch.testing.assert_close(cls(make_net("s"), T=4, takes="steps")(x), wanted)


@pytest.mark.parametrize("spiking_neuron", [neuron.LIFNode, neuron.IFNode])
def test_evaluation_mode_has_the_gradient_of_training_mode(kind, spiking_neuron):
    cls, x, _ = kind
    classifier = cls(make_net(spiking_neuron=spiking_neuron), T=4)
    x.requires_grad_()
    (wanted,) = torch.autograd.grad(classifier(x).square().sum(), x)
    classifier.eval()
    (gradient,) = torch.autograd.grad(classifier(x).square().sum(), x)
    assert wanted.abs().sum() > 0
    torch.testing.assert_close(gradient, wanted)
    assert not any(module.training for module in classifier.modules())


def test_every_frame_counts_at_its_own_step():
    classifier, frames = SpikingEventClassifier(make_net(), T=4), make_frames()
    assert not torch.allclose(classifier(frames.flip(1)), classifier(frames))


def test_normalisation_is_inside_and_moves_with_the_module():
    net, images = make_net(), make_images()
    classifier = SpikingClassifier(net, T=4, mean=[0.5], std=[0.25])
    torch.testing.assert_close(
        classifier(images), SpikingClassifier(net, T=4)((images - 0.5) / 0.25)
    )
    assert set(classifier.state_dict()) >= {"mean", "std"}
    assert classifier.double()(images.double()).dtype == torch.float64


NUMBERS = {
    "T of numpy": {"T": np.int64(4)},
    "lists": {"mean": [0.5], "std": [0.25]},
    "tensors": {"mean": torch.tensor([0.5]), "std": torch.tensor([0.25], dtype=torch.float64)},
    "arrays": {"mean": np.array([0.5]), "std": np.array([0.25], dtype=np.float32)},
    "one number": {"mean": 0.5, "std": 0.25},
}


@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS.keys())
@pytest.mark.parametrize("wrap", [SpikingClassifier, as_classifier])
def test_numbers_are_taken_as_evaluate_takes_them(numbers, wrap):
    net, images = make_net(), make_images()
    model = wrap(net, **{"T": 4, **numbers})
    normalised = (images - 0.5) / 0.25 if "mean" in numbers else images
    assert torch.equal(model(images), SpikingClassifier(net, 4)(normalised))
    assert type(model.T) is int
    if "mean" in numbers:
        assert model.mean.dtype == model.std.dtype == torch.float32


@pytest.mark.parametrize("wrap", [SpikingClassifier, as_classifier])
@pytest.mark.parametrize(
    ("numbers", "match"),
    [
        ({"T": 2.0}, "T must be an integer, got float; give one >= 1"),
        ({"T": True}, "T must be an integer, got bool"),
        ({"T": torch.tensor(4)}, "T must be a number of time steps, got a tensor; name the arg"),
        ({"T": 4, "mean": "0.5"}, "mean must hold one number per channel, got '0.5'; write"),
    ],
)
def test_what_is_no_number_is_refused_in_one_wording(wrap, numbers, match):
    with pytest.raises(TypeError, match=match):
        wrap(make_net(), **numbers)


class Expanding(nn.Module):
    def forward(self, images):
        assert images.shape[1:] == (1, 6, 6)
        return images.flatten(1)[:, :3].expand(4, len(images), 3)


class Averaging(nn.Module):
    def forward(self, frames):
        return frames.flatten(2).mean(0)[:, :3]


@pytest.mark.parametrize("network", [Expanding, Averaging])
def test_a_network_that_brings_its_own_steps_or_averages_itself(network):
    images = make_images()
    torch.testing.assert_close(SpikingClassifier(network(), T=4)(images), images.flatten(1)[:, :3])


def test_modes_are_restored_after_an_error():
    net = make_net().eval()
    classifier = SpikingClassifier(net, T=4).eval()
    with pytest.raises(RuntimeError):
        classifier(torch.rand(2, 7, 6, 6))
    assert not any(module.training for module in classifier.modules())


def test_batch_norm_and_dropout_stay_in_evaluation_mode():
    net = nn.Sequential(
        layer.BatchNorm2d(1, step_mode="m"), layer.Dropout(0.5, step_mode="m"), make_net()
    )
    classifier = SpikingClassifier(net, T=2).eval()
    before = net[0].running_mean.clone()
    first, second = classifier(make_images()), classifier(make_images())
    assert torch.equal(first, second)
    assert torch.equal(net[0].running_mean, before)


def test_logits_are_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert SpikingClassifier(make_net(), T=2)(make_images()).dtype == torch.float32


class TestEncoders:
    def test_poisson_has_the_images_as_its_mean_and_a_straight_through_gradient(self):
        encoder = PoissonEncoder(torch.Generator().manual_seed(0))
        images = torch.tensor([0.0, 0.2, 0.7, 1.0]).requires_grad_()
        spikes = torch.stack([encoder(images) for _ in range(4000)])
        assert set(spikes.unique().tolist()) == {0.0, 1.0}
        torch.testing.assert_close(spikes.mean(0), images, atol=0.03, rtol=0)
        (gradient,) = torch.autograd.grad(spikes[0].sum(), images)
        assert torch.equal(gradient, torch.ones(4))

    def test_poisson_repeats_under_its_generator(self):
        outputs = []
        for _ in range(2):
            encoder = PoissonEncoder(torch.Generator().manual_seed(3))
            outputs.append(SpikingClassifier(make_net(), T=4, encoder=encoder)(make_images()))
        assert torch.equal(*outputs)

    @pytest.mark.parametrize("step_mode", ["m", "s"])
    def test_latency_encoder_of_the_host_starts_anew_every_time(self, step_mode):
        classifier = SpikingClassifier(make_net(step_mode), T=4, encoder=encoding.LatencyEncoder(4))
        images = make_images()
        wanted = classifier(images)
        assert torch.equal(classifier(images), wanted)
        other = classifier(1 - images)
        assert not torch.equal(other, wanted)

    def test_encoding_comes_before_normalisation(self):
        seen = []

        class Spy(nn.Module):
            def forward(self, frames):
                seen.append(frames)
                return frames.flatten(2)[..., :3]

        encoder = PoissonEncoder(torch.Generator().manual_seed(0))
        SpikingClassifier(Spy(), T=4, encoder=encoder, mean=[0.5], std=[0.5])(make_images())
        assert set(seen[0].unique().tolist()) == {-1.0, 1.0}


def classifier_of_output(output):
    class Returning(nn.Module):
        def forward(self, frames):
            return output

    return SpikingClassifier(Returning(), T=4)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: SpikingClassifier(make_net(), T=4)(torch.rand(6)),
            r"images must be \[N, C, H, W\].*unsqueeze\(0\)",
        ),
        (
            lambda: SpikingClassifier(make_net(), T=4)(make_frames()),
            "or pass event frames to SpikingEventClassifier",
        ),
        (lambda: SpikingClassifier(make_net(), T=0), "T must be >= 1, got 0"),
        (lambda: SpikingClassifier(make_net(), T=2, std=[0.0]), "std must be finite and > 0"),
        (lambda: SpikingClassifier(make_net(), T=2, takes="x"), "takes must be one of 'images', "),
        (
            lambda: SpikingEventClassifier(make_net(), T=2, takes="images"),
            "takes must be one of 'sequence', 'steps' here",
        ),
        (
            lambda: classifier_of_output(torch.zeros(3, 5, 2))(make_images()),
            r"N = 2 and T = 4 \(on trial images\), got a tensor \[3, 5, 2\]; end it with a layer",
        ),
        (
            lambda: classifier_of_output(torch.zeros(4, 5, 2, 2))(make_images()),
            r"with N = 2 and T = 4 \(on trial images\), got a tensor \[4, 5, 2, 2\]",
        ),
        (
            lambda: classifier_of_output((torch.zeros(2, 3),))(make_images()),
            r"got a tuple \(tensor \[2, 3\]\); .* only the logits, net\(x\)\[0\]",
        ),
        (
            lambda: SpikingEventClassifier(make_net(), T=4)(make_images()),
            r"frames must be \[N, T, C, H, W\], got .*unsqueeze\(0\), "
            "or pass images to SpikingClassifier",
        ),
        (
            lambda: SpikingEventClassifier(make_net(), T=4)(make_frames()[:, :3]),
            r"with T = 4, got shape \(5, 3, 1, 6, 6\): 3 frames per sample$",
        ),
        (
            lambda: SpikingEventClassifier(Expanding(), T=4)(make_frames()),
            "takes images .* does not repeat its input over time",
        ),
    ],
)
def test_wrong_use(call, match):
    """More of it stands in docs/mistakes.md, whose messages are compared by
    test_newcomer_mistakes.py.
    """
    with pytest.raises(ValueError, match=match):
        call()


def test_a_step_module_without_a_mode_of_its_own_is_passed_over():
    class Container(nn.Sequential, base.StepModule):
        """As SpikingJelly 2.x's SeqToANNContainer."""

    net = Container(nn.Linear(3, 2), DLIFNode(T=4, step_mode="s"))
    if hasattr(net, "step_mode"):
        del net.step_mode
    assert SpikingClassifier(net, T=4)(torch.rand(5, 3)).shape == (5, 2)
    assert SpikingClassifier(Container(nn.Linear(3, 2)), T=4)(torch.rand(5, 3)).shape == (5, 2)
