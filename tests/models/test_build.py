import copy
import os
import sys
from dataclasses import asdict
from functools import partial

import pytest
import torch
from spikingjelly.activation_based import layer, neuron, surrogate
from torch import nn
from torch.testing import assert_close

from sj_robust import DLIFNode
from sj_robust.classifier import SpikingClassifier, SpikingEventClassifier
from sj_robust.core.environment import CODE_KEY
from sj_robust.evaluation.subject import from_checkpoint
from sj_robust.models import (
    NetworkSpec,
    build_classifier,
    build_network,
    zoo_networks,
)
from sj_robust.models.build import NETWORKS, check_has_neuron, code_of
from sj_robust.models.checkpoint import save_checkpoint
from sj_robust.models.foreign import find_function
from sj_robust.models.weights import as_named_in
from sj_robust.neuron import Stage, fuse

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


def test_a_file_edited_twice_within_a_second_runs_as_it_is_now(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    file = tmp_path / "edited.py"
    file.write_text("def number():\n    return 1\n")
    assert find_function(f"{file}:number")() == 1
    times = (file.stat().st_atime, file.stat().st_mtime)
    file.write_text("def number():\n    return 2\n")
    os.utime(file, times)
    assert find_function(f"{file}:number")() == 2


def test_relu_stands_where_neurons_stand_in_one_time_step():
    options = {"options": {"hidden": [5]}, "T": 1}
    spiking = build_network(NetworkSpec(neuron="lif", **options))
    ordinary = build_network(NetworkSpec(neuron="relu", **options))
    names = [name for name, part in spiking.named_modules() if isinstance(part, neuron.LIFNode)]
    found = [n for n, part in ordinary.named_modules() if isinstance(part, nn.ReLU)]
    assert found == names
    weights = ordinary.state_dict()
    assert weights.keys() == spiking.state_dict().keys()
    for name, value in spiking.state_dict().items():
        assert value.shape == weights[name].shape


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_models.py").write_text(OWN)
    (tmp_path / "own_models.txt").write_text(OWN)
    return tmp_path


def write(path, spec, classifier):
    description = {"network": asdict(spec), "options": {}}
    save_checkpoint(path, {"model": classifier.state_dict(), "description": description})


def image_batch(n=2):
    return torch.rand(n, 1, 8, 8)


def nodes(net):
    return [module for module in net.modules() if isinstance(module, neuron.BaseNode)]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_name_builds(name):
    with torch.device("meta"):
        net = build_network(NetworkSpec(name, image_shape=(3, 32, 32), T=3))
    for node in nodes(net):
        assert node.T == 3
        assert node.tau == 100.0


def test_dlif_that_learns_no_gain_is_lif():
    dlif = build_classifier(NetworkSpec(neuron="dlif", learn_gain=False)).double()
    lif = build_classifier(NetworkSpec(neuron="lif")).double()
    dlif.load_state_dict(lif.state_dict(), strict=False)
    x = image_batch(32).double()
    gradients = []
    for classifier in (lif, dlif):
        loss = nn.functional.cross_entropy(classifier(x), torch.arange(32) % 10)
        gradients.append(torch.autograd.grad(loss, classifier.net.first.weight)[0])
    assert gradients[0].any()
    assert_close(gradients[1], gradients[0])
    for node in nodes(dlif):
        assert torch.equal(node.input_gain, torch.ones(4))
        assert not node.input_gain.requires_grad


SMALLEST = {"depth": 10, "widen_factor": 1}  # of the wide residual networks


def test_options_reach_the_architecture():
    vgg = build_network(NetworkSpec("vgg5", hidden=(8, 8), options={"hidden": (6,)}))
    assert vgg.stages[-1].in_features == 6


@pytest.mark.parametrize("kind", ["dlif", "lif", "plif", "if"])
def test_neurons_have_a_hard_reset_the_triangle_and_no_input_decay(kind):
    first, second = nodes(build_network(NetworkSpec(neuron=kind, tau=4.0)))
    for node in (first, second):
        assert node.v_reset == 0.0
        assert node.step_mode == "m"
        assert type(node.surrogate_function).__name__ == "PiecewiseQuadratic"
        assert not getattr(node, "decay_input", False)
    assert first.surrogate_function is not second.surrogate_function
    if kind == "plif":
        found = float(first.w.detach().sigmoid())
        assert found == pytest.approx(1 / 4)


SPIKFORMER = pytest.mark.skipif(
    "spikformer_cifar10" not in zoo_networks(), reason="SpikingJelly 0.0.0.0.14 has no Spikformer"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("spiking_resnet18", 16),
        ("sew_resnet18", 16),
        pytest.param("spikformer_cifar10", 32, marks=[SPIKFORMER, pytest.mark.slow]),
    ],
)
def test_zoo(name, size):
    torch.manual_seed(0)
    spec = NetworkSpec(
        f"zoo:{name}",
        image_shape=(3, size, size),
        classes=4,
        T=2,
        tau=5.0,
    )
    classifier = build_classifier(spec)
    found = nodes(classifier)
    assert len(found) > 10
    for node in found:
        assert type(node) is DLIFNode
        assert node.T == 2
        assert node.tau == 5.0
        assert node.step_mode == "m"
    images = torch.rand(3, 3, size, size, requires_grad=True)
    logits = classifier(images)
    assert logits.shape == (3, 4)
    logits.square().sum().backward()
    assert images.grad.any()


IN_THE_ZOO = ("spiking_vgg11_bn", "sew_resnet34", "spiking_resnet50", "CIFAR10Net", "DVSGestureNet")
NO_NETWORKS = ("conv3x3", "BasicBlock", "SpikingVGG", "sew_function")


def test_zoo_of_this_release():
    found = zoo_networks()
    assert set(IN_THE_ZOO) <= set(found)
    assert set(NO_NETWORKS).isdisjoint(found)


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("small", 8, {}),
        ("vgg5", 8, {}),
        ("wrn16_4", 8, SMALLEST),
        ("zoo:NMNISTNet", 34, {"channels": 2}),
    ],
)
def test_event_frames(name, size, options):
    spec = NetworkSpec(
        name,
        image_shape=(2, size, size),
        T=3,
        hidden=(8, 8),
        frames=True,
        options=options,
    )
    classifier = build_classifier(spec).eval()
    assert isinstance(classifier, SpikingEventClassifier)
    frames = torch.randint(2, (4, 3, 2, size, size)).float() * 3
    frames_seq = frames.transpose(0, 1)
    net = build_network(spec).eval()
    net.load_state_dict(classifier.net.state_dict())
    with torch.no_grad():
        expected = net(frames_seq).mean(0)
        assert_close(classifier(frames), expected)


@pytest.mark.parametrize("module", ["own_models", "own_models.py"])
def test_a_function_of_ones_own(own, module):
    spec = NetworkSpec(
        f"{module}:build",
        classes=6,
        T=3,
        tau=7.0,
        options={"width": 5},
    )
    classifier = build_classifier(spec)
    assert classifier.net[1].out_features == 5
    (node,) = nodes(classifier)
    assert node.T == 3
    assert node.tau == 7.0
    assert node.step_mode == "m"
    assert classifier(image_batch()).shape == (2, 6)


SHORTCUT = """
from spikingjelly.activation_based import functional, layer
from torch import nn

class Block(nn.Module):
    def __init__(self, node):
        super().__init__()
        self.body = nn.Sequential(layer.Conv2d(3, 3, 3, padding=1), layer.BatchNorm2d(3), node)

    def forward(self, x):
        return self.body[-1](self.body[:-1](x) + x)

def build(spiking_neuron):
    first = (layer.Conv2d(1, 3, 3), layer.BatchNorm2d(3), spiking_neuron())
    last = (layer.Flatten(), layer.Linear(108, 10))
    net = nn.Sequential(*first, Block(spiking_neuron()), *last)
    functional.set_step_mode(net, "m")
    return net
"""


def test_only_sequences_that_run_as_a_whole_are_fused(own):
    (own / "shortcut.py").write_text(SHORTCUT)
    drawn = torch.get_rng_state()
    fused = build_classifier(NetworkSpec("shortcut.py:build"))
    after = torch.get_rng_state()
    torch.set_rng_state(drawn)
    spec = NetworkSpec()
    node = partial(
        DLIFNode, T=4, tau=spec.tau, surrogate_function=surrogate.PiecewiseQuadratic(1.0)
    )
    net = find_function("shortcut.py:build")(node)
    assert torch.equal(torch.get_rng_state(), after)
    assert isinstance(fused.net[1], Stage)
    assert isinstance(fused.net[3].body[1], layer.BatchNorm2d)
    images = image_batch()
    plain = SpikingClassifier(net, T=4)
    assert_close(fused.eval()(images), plain.eval()(images))
    all_fused = copy.deepcopy(plain)
    fuse(all_fused.net)  # as files of earlier versions have it
    for classifier in (plain, all_fused):
        weights = {key: value + 1 for key, value in classifier.state_dict().items()}
        fused.load_state_dict(as_named_in(fused, weights))
        assert torch.equal(fused.net[1].norm.weight, torch.full((3,), 2.0))


def test_lif_of_ones_own_network_becomes_dlif(own):
    (node,) = nodes(build_network(NetworkSpec("own_models:lif", T=3)))
    assert node.input_gain.tolist() == [0.5] * 3
    (node,) = nodes(build_network(NetworkSpec("own_models:lif", neuron="lif", T=3)))
    assert type(node) is neuron.LIFNode


@pytest.mark.parametrize("name", ["plif", "if", "tgo", "feel", "hosnn", "stog", "relu"])
def test_a_function_that_builds_another_neuron_than_the_one_asked_for_is_refused(own, name):
    T = 1 if name == "relu" else 3
    asked = NetworkSpec("own_models:lif", neuron=name, T=T)
    with pytest.raises(ValueError, match=f"LIFNode.*'{name}'"):
        check_has_neuron(build_network(asked), asked)
    for leaving in (neuron.IFNode, neuron.LIFNode, neuron.ParametricLIFNode):
        check_has_neuron(nn.Sequential(leaving()), NetworkSpec("own_models:any", neuron="lif"))
    takes_it = NetworkSpec("own_models:build", neuron=name, T=T)
    check_has_neuron(build_network(takes_it), takes_it)


def test_a_classifier_of_ones_own_keeps_its_normalisation_in_a_checkpoint(own):
    spec = NetworkSpec("own_models:wrapped", T=4)
    classifier = build_classifier(spec).eval()
    assert classifier.mean.tolist() == pytest.approx([0.3])
    assert classifier.std.tolist() == pytest.approx([0.2])
    (node,) = nodes(classifier)
    assert type(node) is DLIFNode
    (node,) = nodes(build_network(spec))
    assert type(node) is DLIFNode
    write(own / "best.pt", spec, classifier)
    read = from_checkpoint(own / "best.pt", trust_code=True).model
    x = image_batch()
    assert torch.equal(read(x), classifier(x))
    with pytest.raises(ValueError, match="T=3"):
        build_classifier(NetworkSpec("own_models:wrapped", T=3))


WRONG = [
    ("wrn40_4", {}, ValueError, "wrn40_4"),
    ("zoo:spiking_vgg12", {}, ValueError, "spiking_vgg1"),
    ("zoo:xyz", {}, ValueError, "spiking_vgg11"),
    ("own_models.txt:build", {}, ValueError, "own_models.txt"),
    ("own_models:absent", {}, ValueError, "absent"),
    ("own_models:plain", {}, ValueError, "own_models:plain"),
    ("own_models:nothing", {}, ValueError, "NoneType"),
    ("own_models:fails", {}, ValueError, r"KeyError.*own_models.py:\d+"),
    ("own_models:build", {"widht": 5}, ValueError, "widht"),
    ("absent.py:build", {}, FileNotFoundError, "absent.py"),
    ("absent_models:build", {}, ModuleNotFoundError, "absent_models"),
    *((name, {"depht": 5}, ValueError, "depht") for name in ("small", "vgg5", "wrn16_4")),
]


@pytest.mark.parametrize(("name", "options", "error", "named"), WRONG)
def test_a_network_that_is_not_there_is_named(own, name, options, error, named):
    with pytest.raises(error, match=named):
        build_network(NetworkSpec(name, options=options))


def test_checkpoints_return_the_same_network(tmp_path):
    spec = NetworkSpec(
        "wrn16_4",
        image_shape=(3, 8, 8),
        T=3,
        mean=(0.4, 0.4, 0.4),
        std=(0.2, 0.2, 0.2),
        options=SMALLEST,
    )
    classifier = build_classifier(spec).eval()
    write(tmp_path / "best.pt", spec, classifier)
    subject = from_checkpoint(tmp_path / "best.pt")
    images = torch.rand(2, 3, 8, 8)
    assert subject.spec == spec
    assert subject.architecture == "wrn16_4, dlif, T 3, tau 100, depth 10, widen_factor 1"
    assert torch.equal(subject.model(images), classifier(images))
    longer = from_checkpoint(tmp_path / "best.pt", T=5)
    assert longer.spec.T == longer.model.T == longer.model.net.T == 5
    assert longer.model(images).shape == (2, 10)


def test_checkpoints_run_functions_only_where_trusted(own):
    spec = NetworkSpec("own_models.py:build", T=3)
    write(own / "best.pt", spec, build_classifier(spec))
    assert from_checkpoint(own / "best.pt", trust_code=True).spec == spec
    with pytest.raises(ValueError, match="trust_code"):
        from_checkpoint(own / "best.pt")


def test_a_checkpoint_says_if_the_code_of_its_network_has_changed(own):
    spec = NetworkSpec("own_models.py:build", T=3)
    classifier = build_classifier(spec)
    description = {"network": asdict(spec), **code_of(spec)}
    content = {"model": classifier.state_dict(), "description": description}
    save_checkpoint(own / "best.pt", content)
    same = partial(from_checkpoint, own / "best.pt", trust_code=True)
    assert same().remarks == ()
    (own / "own_models.py").write_text("# a comment changes nothing\n" + OWN)
    assert same().remarks == ()
    (own / "own_models.py").write_text(
        OWN.replace("spiking_neuron()", "spiking_neuron(v_threshold=4.0)")
    )
    (remark,) = same().remarks
    assert "own_models.py:build" in remark
    content["description"] = {
        "network": asdict(spec),
        f"{CODE_KEY} another machine": "rounded otherwise",
    }
    save_checkpoint(own / "best.pt", content)
    assert same().remarks == ()
    write(own / "best.pt", spec, classifier)  # as before code had digests
    assert same().remarks == ()


def test_a_checkpoint_says_if_its_training_is_unfinished(tmp_path, monkeypatch):
    spec = NetworkSpec()
    description = {"network": asdict(spec), "options": {"epochs": 5}}
    content = {"model": build_classifier(spec).state_dict(), "description": description}
    folder = tmp_path / "run" / "dlif_at"
    folder.mkdir(parents=True)
    save_checkpoint(folder / "best.pt", content | {"epoch": 2})
    assert from_checkpoint(folder).remarks == ()  # nobody knows
    save_checkpoint(folder / "last.pt", content | {"epoch": 3})
    monkeypatch.chdir(folder)
    for path in (folder, folder / "last.pt", "best.pt"):
        (remark,) = from_checkpoint(path).remarks
        assert "training of dlif_at is unfinished (epoch 3 of 5)" in remark
    save_checkpoint(folder / "last.pt", content | {"epoch": 5})
    assert from_checkpoint(folder).remarks == ()
    (folder / "last.pt").write_text("damaged")
    assert from_checkpoint(folder).remarks == ()
