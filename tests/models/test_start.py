import copy
from dataclasses import asdict

import pytest
import torch
from spikingjelly.activation_based import functional, neuron
from spikingjelly.activation_based.model import spiking_resnet

from sj_robust import DLIFNode, SpikingClassifier, replace_neurons
from sj_robust.evaluation.subject import from_checkpoint
from sj_robust.models import NetworkSpec, build_classifier, start_from
from sj_robust.models.checkpoint import save_checkpoint
from sj_robust.neuron import unfuse
from sj_robust.neuron.fusion import plain_names


def pretrained(path, spec):
    """A checkpoint as recipes/adv_train.py writes it, of a network with batch norm statistics of
    its own.
    """
    torch.manual_seed(0)
    classifier = build_classifier(spec)
    with torch.no_grad():
        classifier(torch.rand(20, *spec.image_shape) * 3)
    save_checkpoint(
        path,
        {"model": classifier.state_dict(), "description": {"network": asdict(spec), "options": {}}},
    )
    return classifier.eval()


def same_logits(a, b, shape=(1, 8, 8)):
    images = 3 * torch.rand(8, *shape, dtype=torch.float64)
    with torch.no_grad():
        logits = a.eval().double()(images)
        torch.testing.assert_close(b.eval().double()(images), logits)
    a.float(), b.float()
    return logits.std() > 0


@pytest.mark.parametrize(("kind", "tau"), [("lif", 5.0), ("if", float("inf"))])
def test_a_dlif_network_begins_as_the_pretrained_one(tmp_path, kind, tau):
    lif = pretrained(
        tmp_path / "best.pt", NetworkSpec(neuron=kind, T=3, tau=tau, mean=(0.2,), std=(0.5,))
    )
    torch.manual_seed(1)
    dlif = build_classifier(NetworkSpec(T=3, tau=tau, mean=(0.2,), std=(0.5,)))
    with torch.no_grad():
        dlif.net.stages[0].node.input_gain.fill_(3)
    start_from(dlif, tmp_path / "best.pt")
    assert same_logits(lif, dlif)


@pytest.mark.slow
def test_a_network_of_the_zoo_with_input_decay(tmp_path):
    """SpikingJelly's LIF as it comes (tau 2, decay_input), a plain state_dict of the bare
    network.
    """
    torch.manual_seed(0)
    lif = spiking_resnet.spiking_resnet18(
        spiking_neuron=neuron.LIFNode, num_classes=4, v_threshold=0.2
    )
    functional.set_step_mode(lif, "m")
    torch.save(lif.state_dict(), tmp_path / "zoo.pth")
    spec = NetworkSpec("zoo:spiking_resnet18", image_shape=(3, 16, 16), classes=4, T=2, tau=2.0)
    dlif = build_classifier(NetworkSpec(**{**asdict(spec), "options": {"v_threshold": 0.2}}))
    start_from(dlif, tmp_path / "zoo.pth", decay_input=True)
    assert all(
        m.input_gain.tolist() == [0.5, 0.5] for m in dlif.modules() if isinstance(m, DLIFNode)
    )
    assert same_logits(SpikingClassifier(lif, 2), dlif, (3, 16, 16))


def test_a_converted_network_of_ones_own_keeps_the_gains_of_its_input_decay(tmp_path):
    """Without a word about decay_input: replace_neurons has set the gains, and the file has
    none.
    """
    torch.manual_seed(0)
    lif = torch.nn.Sequential(
        torch.nn.Flatten(2),
        torch.nn.Linear(64, 16),
        neuron.LIFNode(tau=4.0),
        torch.nn.Linear(16, 10),
    )
    functional.set_step_mode(lif, "m")
    torch.save(lif.state_dict(), tmp_path / "own.pth")
    dlif = copy.deepcopy(lif)
    replace_neurons(dlif, T=2)
    dlif[1].reset_parameters()
    classifier = SpikingClassifier(dlif, 2)
    start_from(classifier, tmp_path / "own.pth")
    assert dlif[2].input_gain.tolist() == [0.25, 0.25]
    assert same_logits(SpikingClassifier(lif, 2), classifier)
    start_from(classifier, tmp_path / "own.pth", decay_input=False)
    assert dlif[2].input_gain.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "wrap", [dict, lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}}]
)
@pytest.mark.parametrize("kind", ["lif", "dlif"])
def test_plain_files(tmp_path, kind, wrap):
    torch.manual_seed(0)
    source, dlif = (
        build_classifier(NetworkSpec(neuron=kind, mean=(0.3,))) for kind in (kind, "dlif")
    )
    for name, gain in source.named_parameters():
        if name.endswith("input_gain"):  # those of the file are copied
            torch.nn.init.uniform_(gain, 0.5, 2)
    for name, state in {
        "bare.pt": source.net.state_dict(),
        "whole.pt": source.state_dict(),
    }.items():
        torch.save(wrap(state), tmp_path / name)
        start_from(dlif, str(tmp_path / name))
        assert same_logits(source, dlif)
        torch.nn.init.zeros_(dlif.net.first.weight)


BEFORE_STAGES = {
    "small": NetworkSpec("small", T=3),
    "small, neurons apart": NetworkSpec("small", T=3, fused=False),
    "small of LIF": NetworkSpec("small", T=3, neuron="lif"),
    "small without batch norm": NetworkSpec("small", T=3, options={"batch_norm": False}),
    "vgg5": NetworkSpec("vgg5", image_shape=(1, 8, 8), T=3, hidden=(8, 8)),
    "wide": NetworkSpec("wrn16_4", image_shape=(1, 8, 8), T=3, options={"widen_factor": 1}),
    "of a function": NetworkSpec("own_stages.py:build", T=3),
}
OWN = """
from torch import nn
from spikingjelly.activation_based import functional, layer, neuron
def build():
    parts = [layer.Conv2d(1, 4, 3), layer.BatchNorm2d(4), neuron.LIFNode(tau=2.0)]
    net = nn.Sequential(*parts, layer.AvgPool2d(2), layer.Flatten(), layer.Linear(36, 10))
    functional.set_step_mode(net, "m")
    return net
"""


@pytest.mark.parametrize("name", BEFORE_STAGES)
def test_weights_saved_before_there_were_stages_are_loaded(tmp_path, monkeypatch, name):
    (tmp_path / "own_stages.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    spec = BEFORE_STAGES[name]
    source = pretrained(tmp_path / "now.pt", spec)
    plain = plain_names(source)
    state = {plain[key]: value for key, value in source.state_dict().items()}
    assert state.keys() != source.state_dict().keys()
    if "function" not in name:
        assert {key: tuple(value.shape) for key, value in state.items()} == shapes_before(source)
    description = {"network": asdict(spec), "options": {}}
    save_checkpoint(tmp_path / "before.pt", {"model": state, "description": description})
    evaluated = from_checkpoint(tmp_path / "before.pt", trust_code=True).model
    started = build_classifier(spec)
    start_from(started, tmp_path / "before.pt")
    for loaded in (evaluated, started):
        same_logits(source, loaded)
        for key, value in source.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), key


def shapes_before(classifier):
    """Names and shapes of the network once its stages are taken out."""
    twin = copy.deepcopy(classifier)
    unfuse(twin)
    return {key: tuple(value.shape) for key, value in twin.state_dict().items()}


def test_what_does_not_fit_is_listed(tmp_path):
    missing = r"missing net.stages.1.weight, .* and 3 more; unexpected .*; build"
    for message, of_file, of_network, options in (
        (missing, {"channels": (16,)}, {}, {}),
        (r"net.stages.4.weight \(7, 128\) instead of \(10, 128\)", {"classes": 7}, {}, {}),
        ("was trained with tau 2, the network has 100; build it with tau=2", {"tau": 2.0}, {}, {}),
        ("whose LIF has decay_input=False", {"tau": 2.0}, {}, {"decay_input": True}),
        (
            r"PLIF neurons, each with a tau of its own \(net.stages.0.node.w\)",
            {"neuron": "plif"},
            {},
            {},
        ),
        (
            "unexpected mean; build the network that the file was trained as",
            {"mean": (0.5,)},
            {},
            {},
        ),
        (
            r"was trained with mean \[0.5\], the network has \[0.25\]",
            {"mean": (0.5,)},
            {"mean": (0.25,)},
            {},
        ),
    ):
        pretrained(tmp_path / "best.pt", NetworkSpec(**{"neuron": "lif"} | of_file))
        classifier = build_classifier(NetworkSpec(**of_network))
        before = copy.deepcopy(classifier.state_dict())
        with pytest.raises(ValueError, match=message):
            start_from(classifier, tmp_path / "best.pt", **options)
        assert all(
            torch.equal(value, before[name]) for name, value in classifier.state_dict().items()
        )


def test_files_that_cannot_be_read(tmp_path):
    classifier = build_classifier(NetworkSpec())
    (tmp_path / "damaged.pt").write_bytes(b"PK\x03\x04 cut off")
    torch.save(classifier, tmp_path / "pickled.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    for name, error, message in (
        ("absent.pt", FileNotFoundError, "absent.pt does not exist"),
        (
            "weights.h5",
            ValueError,
            r"must end in .pt or .pth, got .*weights.h5; save net.state_dict",
        ),
        (
            "damaged.pt",
            ValueError,
            "damaged, or holds more .* a whole pickled network, which would run code",
        ),
        (
            "pickled.pt",
            ValueError,
            "damaged, or holds more .* a whole pickled network, which would run code",
        ),
        ("list.pt", ValueError, "holds no tensors by name"),
    ):
        with pytest.raises(error, match=message):
            start_from(classifier, tmp_path / name)
