from dataclasses import asdict

import pytest
import torch
from spikingjelly.activation_based import neuron
from torch import nn

from sj_robust import DLIFNode
from sj_robust.classifier import SpikingEventClassifier
from sj_robust.evaluation.subject import from_checkpoint
from sj_robust.models import (
    NETWORKS,
    ConvChain,
    NetworkSpec,
    WideResNet,
    build_classifier,
    build_network,
    zoo_networks,
)
from sj_robust.models.checkpoint import save_checkpoint

OWN = """
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from sj_robust import SpikingClassifier

def build(image_shape, classes, T, spiking_neuron, width=3):
    first = layer.Linear(image_shape[1] * image_shape[2], width)
    net = nn.Sequential(layer.Flatten(), first, spiking_neuron(), layer.Linear(width, classes))
    functional.set_step_mode(net, "m")
    return net

def lif(classes):
    net = nn.Sequential(layer.Flatten(), layer.Linear(64, classes), neuron.LIFNode(tau=2.0))
    functional.set_step_mode(net, "m")
    return net

def wrapped(classes):
    return SpikingClassifier(lif(classes), 4, mean=[0.3], std=[0.2])

def plain():
    return nn.Flatten()

def nothing():
    return None

def fails(classes):
    raise KeyError("lost")
"""


def test_relu_stands_where_neurons_stand_in_one_time_step():
    options = {"options": {"hidden": [5]}, "T": 1}
    spiking = build_network(NetworkSpec(neuron="lif", **options))
    ordinary = build_network(NetworkSpec(neuron="relu", **options))
    names = [name for name, part in spiking.named_modules() if isinstance(part, neuron.LIFNode)]
    assert [n for n, part in ordinary.named_modules() if isinstance(part, nn.ReLU)] == names
    shapes = [
        {name: value.shape for name, value in net.state_dict().items()}
        for net in (spiking, ordinary)
    ]
    assert shapes[0] == shapes[1]
    with pytest.raises(ValueError, match="T must be 1 for relu, which has no state over time"):
        build_network(NetworkSpec(neuron="relu"))


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_models.py").write_text(OWN)
    (tmp_path / "own_models.txt").write_text(OWN)
    return tmp_path


def write(path, spec, classifier, *, without=()):
    network = {key: value for key, value in asdict(spec).items() if key not in without}
    save_checkpoint(
        path, {"model": classifier.state_dict(), "description": {"network": network, "options": {}}}
    )


def nodes(net):
    return [module for module in net.modules() if isinstance(module, neuron.BaseNode)]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_name_builds(name):
    with torch.device("meta"):
        net = build_network(NetworkSpec(name, image_shape=(3, 32, 32), T=3))
    assert {node.T for node in nodes(net)} == {3}
    assert {node.tau for node in nodes(net)} == {100.0}


def test_dlif_that_learns_no_gain_trains_as_lif():
    fast, lif = (
        build_classifier(NetworkSpec(neuron=kind, learn_gain=False)) for kind in ("dlif", "lif")
    )
    fast.load_state_dict(lif.state_dict(), strict=False)
    lif.double()
    fast.double()
    optimizers = [
        torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        for net in (fast, lif)
    ]
    x, y = torch.rand(32, 1, 8, 8, dtype=torch.float64), torch.arange(32) % 10
    for _ in range(3):
        losses = [nn.functional.cross_entropy(net(x), y) for net in (fast, lif)]
        torch.testing.assert_close(*losses, rtol=0, atol=1e-9)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    gains = [node.input_gain for node in nodes(fast)]
    assert len(gains) == 2
    assert all(torch.equal(gain, torch.ones(4)) and not gain.requires_grad for gain in gains)


def test_options_reach_the_architecture():
    spec = NetworkSpec("wrn16_4", image_shape=(3, 8, 8), options={"depth": 10, "widen_factor": 1})
    assert isinstance(net := build_network(spec), WideResNet)
    assert net.stages[-1].in_features == 64
    assert (
        build_network(NetworkSpec("vgg5", hidden=(8, 8), options={"hidden": (6,)}))
        .stages[-1]
        .in_features
        == 6
    )


@pytest.mark.parametrize("kind", ["dlif", "lif", "plif", "if"])
def test_neurons_have_a_hard_reset_the_triangle_and_no_input_decay(kind):
    found = nodes(build_network(NetworkSpec(neuron=kind, tau=4.0)))
    assert len(found) == 2
    assert all(node.v_reset == 0.0 and node.step_mode == "m" for node in found)
    assert all(type(node.surrogate_function).__name__ == "PiecewiseQuadratic" for node in found)
    assert found[0].surrogate_function is not found[1].surrogate_function
    assert not any(getattr(node, "decay_input", False) for node in found)
    if kind == "plif":
        assert float(found[0].w.detach().sigmoid()) == pytest.approx(1 / 4)


SPIKFORMER = pytest.mark.skipif(
    "spikformer_cifar10" not in zoo_networks(), reason="SpikingJelly 0.0.0.0.14 has no Spikformer"
)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("spiking_resnet18", 16),
        ("sew_resnet18", 16),
        pytest.param("spikformer_cifar10", 32, marks=SPIKFORMER),
    ],
)
def test_zoo(name, size):
    torch.manual_seed(0)
    spec = NetworkSpec(f"zoo:{name}", image_shape=(3, size, size), classes=4, T=2, tau=5.0)
    classifier = build_classifier(spec)
    found = nodes(classifier)
    assert len(found) > 10
    assert {(type(node), node.T, node.tau, node.step_mode) for node in found} == {
        (DLIFNode, 2, 5.0, "m")
    }
    images = torch.rand(3, 3, size, size, requires_grad=True)
    logits = classifier(images)
    assert logits.shape == (3, 4)
    assert bool(torch.autograd.grad(logits.square().sum(), images)[0].any())


def test_zoo_of_this_release():
    found = zoo_networks()
    assert {
        "spiking_vgg11_bn",
        "sew_resnet34",
        "spiking_resnet50",
        "CIFAR10Net",
        "DVSGestureNet",
    } <= set(found)
    assert not {"conv3x3", "BasicBlock", "SpikingVGG", "sew_function"} & set(found)


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("small", 8, {}),
        ("vgg5", 8, {}),
        ("wrn16_4", 8, {"depth": 10, "widen_factor": 1}),
        ("zoo:NMNISTNet", 34, {"channels": 2}),
    ],
)
def test_event_frames(name, size, options):
    spec = NetworkSpec(
        name, image_shape=(2, size, size), T=3, hidden=(8, 8), frames=True, options=options
    )
    classifier = build_classifier(spec).eval()
    assert isinstance(classifier, SpikingEventClassifier)
    frames = torch.randint(2, (4, 3, 2, size, size)).float() * 3
    expected = build_network(spec).eval()
    expected.load_state_dict(classifier.net.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(classifier(frames), expected(frames.transpose(0, 1)).mean(0))


@pytest.mark.parametrize("module", ["own_models", "own_models.py"])
def test_a_function_of_ones_own(own, module):
    spec = NetworkSpec(f"{module}:build", classes=6, T=3, tau=7.0, options={"width": 5})
    classifier = build_classifier(spec)
    assert classifier.net[1].out_features == 5
    assert [(node.T, node.tau, node.step_mode) for node in nodes(classifier)] == [(3, 7.0, "m")]
    assert classifier(torch.rand(2, 1, 8, 8)).shape == (2, 6)


def test_lif_of_ones_own_network_becomes_dlif(own):
    dlif, lif = (
        build_network(NetworkSpec("own_models:lif", neuron=kind, T=3)) for kind in ("dlif", "lif")
    )
    assert nodes(dlif)[0].input_gain.tolist() == [0.5] * 3
    assert type(nodes(lif)[0]) is neuron.LIFNode


def test_a_classifier_of_ones_own_keeps_its_normalisation_in_a_checkpoint(own):
    spec = NetworkSpec("own_models:wrapped", T=4)
    classifier, x = build_classifier(spec).eval(), torch.rand(3, 1, 8, 8)
    assert (classifier.mean.tolist(), classifier.std.tolist()) == (
        pytest.approx([0.3]),
        pytest.approx([0.2]),
    )
    assert type(nodes(classifier)[0]) is DLIFNode
    assert type(nodes(build_network(spec))[0]) is DLIFNode
    write(own / "best.pt", spec, classifier)
    read = from_checkpoint(own / "best.pt", trust_code=True).model
    assert torch.equal(read(x), classifier(x))
    with pytest.raises(ValueError, match=r"returns a classifier of T=4, asked for is T=3"):
        build_classifier(NetworkSpec("own_models:wrapped", T=3))


def test_wrong_names(own):
    for name, words in {
        "wrn40_4": r"network must be one of small, .*, wrn28_10, zoo:NAME, module:function or "
        "file.py:function, got",
        "zoo:spiking_vgg12": "the model zoo has no 'spiking_vgg12'; nearest: spiking_vgg1",
        "zoo:xyz": "there are .*spiking_vgg11",
        "own_models.txt:build": r"a file with a network must end in .py, got 'own_models.txt'",
        "own_models:absent": "own_models has no function 'absent'",
        "own_models:plain": "no neuron that could be DLIF",
        "own_models:nothing": "must return a network .*, got NoneType",
        "own_models:fails": r"own_models:fails failed \(KeyError: 'lost', own_models.py:\d+\)",
    }.items():
        with pytest.raises(ValueError, match=words):
            build_network(NetworkSpec(name))
    with pytest.raises(FileNotFoundError, match="absent.py does not exist"):
        build_network(NetworkSpec("absent.py:build"))
    with pytest.raises(ModuleNotFoundError, match="no module 'absent_models'"):
        build_network(NetworkSpec("absent_models:build"))


def test_wrong_options(own):
    for spec, words in (
        (
            NetworkSpec("own_models:build", options={"widht": 5}),
            r"takes no option 'widht'; it takes image_shape, classes, T, .*width",
        ),
        *(
            (
                NetworkSpec(name, options={"depht": 5}),
                rf"{name} cannot be built .* options .*'depht'.*neurons \(dlif\)",
            )
            for name in ("small", "vgg5", "wrn16_4")
        ),
        (NetworkSpec("zoo:spiking_resnet18"), "takes images of 3 channels, these have 1"),
        (NetworkSpec(neuron="izhikevich"), "neuron must be"),
        (NetworkSpec(tau=0.99), r"tau must be > 1, got 0.99"),
        (
            NetworkSpec(channels=(4, 0)),
            r"every convolution must have a width >= 1, got \[4, 0\]; leave",
        ),
        (
            NetworkSpec("vgg5", hidden=(-8,)),
            r"every hidden layer must have a width >= 1, got \[-8\]; leave",
        ),
        (
            NetworkSpec(mean=(0.1, 0.2)),
            r"mean must have one value per channel \(1\), got \(0.1, 0.2\)",
        ),
        (NetworkSpec(std=(0.1,), frames=True), "std is for images, event frames stay as they are"),
    ):
        with pytest.raises(ValueError, match=words):
            build_classifier(spec)


def test_checkpoints_return_the_same_network(tmp_path):
    options = {"depth": 10, "widen_factor": 1}
    spec = NetworkSpec(
        "wrn16_4", image_shape=(3, 8, 8), T=3, mean=(0.4,) * 3, std=(0.2,) * 3, options=options
    )
    classifier = build_classifier(spec).eval()
    write(tmp_path / "best.pt", spec, classifier)
    subject = from_checkpoint(tmp_path / "best.pt")
    images = torch.rand(2, 3, 8, 8)
    assert subject.spec == spec
    assert subject.architecture == "wrn16_4, dlif, T 3, tau 100, depth 10, widen_factor 1"
    assert torch.equal(subject.model(images), classifier(images))


def test_checkpoints_from_before_these_fields_existed_load_and_at_another_number_of_time_steps(
    tmp_path,
):
    spec, new = NetworkSpec(T=3), ("mean", "std", "frames", "options")
    write(tmp_path / "best.pt", spec, classifier := build_classifier(spec), without=new)
    subject = from_checkpoint(tmp_path / "best.pt", T=5)
    assert isinstance(subject.model.net, ConvChain)
    assert torch.equal(subject.model.net.first.weight, classifier.net.first.weight)
    assert (subject.spec.T, subject.model.T, subject.model.net.T) == (5, 5, 5)
    assert subject.model(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_checkpoints_run_functions_only_where_trusted(own):
    spec = NetworkSpec("own_models.py:build", T=3)
    write(own / "best.pt", spec, build_classifier(spec))
    assert from_checkpoint(own / "best.pt", trust_code=True).spec == spec
    with pytest.raises(
        ValueError, match=r"names the function own_models.py:build .* pass trust_code=True"
    ):
        from_checkpoint(own / "best.pt")
