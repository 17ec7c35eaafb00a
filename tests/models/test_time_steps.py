import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.testing import assert_close

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.models import NetworkSpec, build_classifier, set_time_steps
from sj_robust.models.time_steps import keep_time_steps


def trained(**changes):
    """A network whose gains all differ."""
    torch.manual_seed(0)
    classifier = build_classifier(NetworkSpec(T=4, **changes))
    for gain in gains(classifier):
        gain.copy_(2 * torch.rand(4))
    return classifier.eval()


def images():
    return 3 * torch.rand(3, 1, 8, 8)


def gains(classifier):
    nodes = [module for module in classifier.modules() if isinstance(module, DLIFNode)]
    return [node.input_gain.detach() for node in nodes]


@pytest.mark.parametrize("T", [1, 2, 4, 7])
def test_gains_and_outputs_of_the_common_steps_stay_and_the_last_gain_is_repeated(T):
    classifier = trained()
    x = images()
    gains_before = gains(classifier)
    with torch.no_grad():
        before = classifier.net(x)
        changed = set_time_steps(classifier, T)
        after = classifier.net(x)
    gains_after = gains(classifier)
    for old, new in zip(gains_before, gains_after, strict=True):
        assert torch.equal(new[:4], old[:T])
        assert (new[4:] == old[3]).all()
    assert after.shape[0] == T
    assert before.std() > 0
    assert_close(after[:4], before[:T])
    if T == 4:
        assert changed == {}
    else:
        assert changed == {
            "": (4, T),
            "net": (4, T),
            "net.stages.0.node": (4, T),
            "net.stages.2.node": (4, T),
        }


def test_dtype_and_training_of_the_gains_stay():
    classifier = trained().double()
    classifier.net.stages[0].node.input_gain.requires_grad_(False)
    set_time_steps(classifier, 6)
    first = classifier.net.stages[0].node.input_gain
    second = classifier.net.stages[2].node.input_gain
    assert first.dtype == torch.float64
    assert second.dtype == torch.float64
    assert not first.requires_grad
    assert second.requires_grad


def test_states_are_reset_and_event_classifiers_take_the_new_number_of_frames():
    classifier = trained(frames=True, image_shape=(2, 8, 8))
    classifier.net(torch.rand(4, 1, 2, 8, 8))
    set_time_steps(classifier, 2)
    assert classifier.net.stages[0].node.time_step == 0
    assert classifier(torch.rand(3, 2, 2, 8, 8)).shape == (3, 10)
    with pytest.raises(ValueError, match="with T = 2"):
        classifier(torch.rand(3, 4, 2, 8, 8))


class Softened(nn.Module):
    def __init__(self, T):
        super().__init__()
        self.T = T

    def forward(self, logits):
        return logits / self.T


def test_a_number_of_that_name_that_is_no_number_of_steps_stays():
    net = nn.Sequential(trained().net, Softened(10))
    classifier = SpikingClassifier(net, T=4)
    assert set_time_steps(classifier, 8)["net.0"] == (4, 8)
    assert net[1].T == 10
    assert "net.1" not in set_time_steps(classifier, 10)
    unknown = nn.Sequential(Softened(3))
    assert set_time_steps(unknown, 6) == {"0": (3, 6)}


class Repeating(nn.Module):
    """Repeats its images over steps whose number has another name than T."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps
        self.layers = nn.Sequential(layer.Flatten(), layer.Linear(64, 5), neuron.IFNode())
        functional.set_step_mode(self, "m")

    def forward(self, images):
        return self.layers(images.expand(self.steps, *images.shape))


@pytest.mark.parametrize("asked_before", [False, True])
def test_a_network_that_keeps_its_steps_elsewhere_is_refused(asked_before):
    classifier = SpikingClassifier(Repeating(8))
    if asked_before:
        classifier(images())
    with pytest.raises(ValueError, match="Repeating"):
        set_time_steps(classifier, 1)
    classifier(images())
    assert set_time_steps(classifier, 8) == {}
    assert classifier.T == 8


class FromNeuron(nn.Module):
    """Repeats its images over the steps of its neuron."""

    def __init__(self):
        super().__init__()
        self.node = DLIFNode(T=4)

    def forward(self, images):
        return self.node(images.flatten(1).expand(self.node.T, len(images), -1))


def test_a_network_that_follows_its_neuron():
    classifier = SpikingClassifier(FromNeuron())
    classifier(images())
    set_time_steps(classifier, 8)
    classifier(images())
    assert classifier.T == 8


@pytest.mark.parametrize("kept", [[], [-1], [1, 0], [0, 4]])
def test_steps_that_cannot_be_kept_are_refused(kept):
    classifier = trained()
    with pytest.raises(ValueError, match="step"):
        keep_time_steps(classifier, kept)
    assert classifier.T == classifier.net.T == 4


@pytest.mark.parametrize("kind", ["feel", "hosnn"])
def test_what_neurons_keep_for_every_step_follows(kind):
    torch.manual_seed(0)
    classifier = build_classifier(NetworkSpec("mlp", neuron=kind, T=4, channels=(16,)))
    for _ in range(3):
        classifier.train()(images())
    classifier.eval()
    for parameter in classifier.parameters():
        parameter.data += 0.1 * torch.rand_like(parameter)
    x = images()
    functional.reset_net(classifier.net)
    before = classifier.net(x.expand(4, *x.shape))
    kept = [name for name, held in classifier.state_dict().items() if len(held) == 4]
    rows = {name: classifier.state_dict()[name].clone() for name in kept}
    keep_time_steps(classifier, [0, 1])
    assert_close(classifier.net(x.expand(2, *x.shape)), before[:2])
    set_time_steps(classifier, 3)
    assert kept
    for name in kept:
        now = classifier.state_dict()[name]
        assert torch.equal(now, rows[name][[0, 1, 1]])


@pytest.mark.skipif(
    not hasattr(layer, "TemporalEffectiveBatchNorm1d"), reason="this release has no such layer"
)
def test_scales_of_batch_norm_follow():
    norm = layer.TemporalEffectiveBatchNorm1d(3, 5)
    norm.scale.data.copy_(torch.tensor([1.0, 2.0, 4.0]))
    net = nn.Sequential(nn.Flatten(2), nn.Linear(64, 5), norm, neuron.IFNode(step_mode="m"))
    classifier = SpikingClassifier(net, T=3).eval()
    classifier(images())
    set_time_steps(classifier, 4)
    assert norm.scale.tolist() == [1.0, 2.0, 4.0, 4.0]
    keep_time_steps(classifier, [1])
    assert norm.scale.tolist() == [2.0]
    assert classifier(images()).shape == (3, 5)
    assert classifier.T == 1


@pytest.mark.skipif(not hasattr(neuron, "PSN"), reason="this release of SpikingJelly has no PSN")
def test_neurons_with_weights_for_their_steps_are_refused():
    net = nn.Sequential(nn.Flatten(2), nn.Linear(64, 5), neuron.PSN(T=4))
    with pytest.raises(ValueError, match="PSN"):
        set_time_steps(SpikingClassifier(net, T=4), 2)
    assert net[2].T == 4
