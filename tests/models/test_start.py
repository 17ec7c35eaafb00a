import copy
from dataclasses import asdict

import pytest
import torch
from covering import mostly_slow
from spikingjelly.activation_based import functional, neuron
from spikingjelly.activation_based.model import spiking_resnet
from torch.testing import assert_close

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
    write(path, spec, classifier.state_dict())
    return classifier.eval()


def write(path, spec, state):
    description = {"network": asdict(spec), "options": {}}
    save_checkpoint(path, {"model": state, "description": description})


def same_logits(one, other, shape):
    """Logits of two networks, which must be equal."""
    images = 3 * torch.rand(8, *shape, dtype=torch.float64)
    with torch.no_grad():
        logits = one.eval().double()(images)
        assert_close(other.eval().double()(images), logits)
    one.float()
    other.float()
    return logits


def assert_same_logits(one, other, shape=(1, 8, 8)):
    """Which are not all alike."""
    assert same_logits(one, other, shape).std() > 0


@pytest.mark.parametrize(("kind", "tau"), [("lif", 5.0), ("if", float("inf"))])
def test_a_dlif_network_begins_as_the_pretrained_one(tmp_path, kind, tau):
    options = {
        "T": 3,
        "tau": tau,
        "mean": (0.2,),
        "std": (0.5,),
    }
    lif = pretrained(tmp_path / "best.pt", NetworkSpec(neuron=kind, **options))
    torch.manual_seed(1)
    dlif = build_classifier(NetworkSpec(**options))
    with torch.no_grad():
        dlif.net.stages[0].node.input_gain.fill_(3)
    start_from(dlif, tmp_path / "best.pt")
    assert_same_logits(lif, dlif)


@pytest.mark.slow
def test_a_network_of_the_zoo_with_input_decay(tmp_path):
    """SpikingJelly's LIF as it comes (tau 2, decay_input), a plain state_dict of the bare
    network.
    """
    torch.manual_seed(0)
    lif = spiking_resnet.spiking_resnet18(
        spiking_neuron=neuron.LIFNode,
        num_classes=4,
        v_threshold=0.2,
    )
    functional.set_step_mode(lif, "m")
    torch.save(lif.state_dict(), tmp_path / "zoo.pth")
    spec = NetworkSpec(
        "zoo:spiking_resnet18",
        image_shape=(3, 16, 16),
        classes=4,
        T=2,
        tau=2.0,
        options={"v_threshold": 0.2},
    )
    dlif = build_classifier(spec)
    start_from(dlif, tmp_path / "zoo.pth", decay_input=True)
    for module in dlif.modules():
        if isinstance(module, DLIFNode):
            assert module.input_gain.tolist() == [0.5, 0.5]
    assert_same_logits(SpikingClassifier(lif, 2), dlif, (3, 16, 16))


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
    assert_same_logits(SpikingClassifier(lif, 2), classifier)
    start_from(classifier, tmp_path / "own.pth", decay_input=False)
    assert dlif[2].input_gain.tolist() == [1.0, 1.0]


def as_it_is(state):
    return state


def of_data_parallel(state):
    return {"state_dict": {f"module.{key}": value for key, value in state.items()}}


def of_a_compiled_network(state):
    return {f"_orig_mod.{key}": value for key, value in state.items()}


@pytest.mark.parametrize("wrap", [as_it_is, of_data_parallel, of_a_compiled_network])
@pytest.mark.parametrize("kind", ["lif", "dlif"])
def test_plain_files(tmp_path, kind, wrap):
    torch.manual_seed(0)
    source = build_classifier(NetworkSpec(neuron=kind, mean=(0.3,)))
    dlif = build_classifier(NetworkSpec(mean=(0.3,)))
    for name, gain in source.named_parameters():
        if name.endswith("input_gain"):  # those of the file are copied
            torch.nn.init.uniform_(gain, 0.5, 2)
    for state in (source.net.state_dict(), source.state_dict()):
        torch.save(wrap(state), tmp_path / "plain.pt")
        start_from(dlif, str(tmp_path / "plain.pt"))
        assert_same_logits(source, dlif)
        torch.nn.init.zeros_(dlif.net.first.weight)


BEFORE_STAGES = {
    "small": NetworkSpec("small", T=3),
    "small without batch norm": NetworkSpec("small", T=3, options={"batch_norm": False}),
    "vgg5": NetworkSpec(
        "vgg5",
        image_shape=(1, 8, 8),
        T=3,
        hidden=(8, 8),
    ),
    "wide": NetworkSpec(
        "wrn16_4",
        image_shape=(1, 8, 8),
        T=3,
        options={"widen_factor": 1},
    ),
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


@pytest.mark.parametrize("name", mostly_slow(BEFORE_STAGES, quick=BEFORE_STAGES.keys() - {"wide"}))
def test_weights_saved_before_there_were_stages_are_loaded(tmp_path, monkeypatch, name):
    (tmp_path / "own_stages.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    spec = BEFORE_STAGES[name]
    source = pretrained(tmp_path / "now.pt", spec)
    plain = plain_names(source)
    now = source.state_dict()
    before = {plain[key]: value for key, value in now.items()}
    assert before.keys() != now.keys()
    if "function" not in name:
        assert shapes(before) == shapes_before(source)
    write(tmp_path / "before.pt", spec, before)
    evaluated = from_checkpoint(tmp_path / "before.pt", trust_code=True).model
    started = build_classifier(spec)
    start_from(started, tmp_path / "before.pt")
    for loaded in (evaluated, started):
        same_logits(source, loaded, spec.image_shape)
        assert_close(loaded.state_dict(), now, rtol=0, atol=0)


def shapes(state):
    return {key: tuple(value.shape) for key, value in state.items()}


def shapes_before(classifier):
    """Names and shapes of the network once its stages are taken out."""
    twin = copy.deepcopy(classifier)
    unfuse(twin)
    return shapes(twin.state_dict())


MISFITS = [
    ("net.stages.1.weight", {"channels": (16,)}, {}, {}),
    ("net.stages.4.weight", {"classes": 7}, {}, {}),
    ("tau=2", {"tau": 2.0}, {}, {}),
    ("tau=100", {}, {"neuron": "lif", "tau": 2.0}, {}),
    ("tau=100", {}, {"neuron": "if"}, {}),
    ('neuron "if"', {"neuron": "if"}, {"neuron": "lif"}, {}),
    ("decay_input", {"tau": 2.0}, {}, {"decay_input": True}),
    ("PLIF", {"neuron": "plif"}, {}, {}),
    ("mean", {"mean": (0.5,)}, {}, {}),
    ("mean", {"mean": (0.5,)}, {"mean": (0.25,)}, {}),
]
"""What is named; fields of the network of a file, of the one that starts, and options."""


@pytest.mark.parametrize(("named", "of_file", "of_network", "options"), MISFITS)
def test_what_does_not_fit_is_refused(tmp_path, named, of_file, of_network, options):
    pretrained(tmp_path / "best.pt", NetworkSpec(**{"neuron": "lif"} | of_file))
    classifier = build_classifier(NetworkSpec(**of_network))
    before = copy.deepcopy(classifier.state_dict())
    with pytest.raises(ValueError, match=named):
        start_from(classifier, tmp_path / "best.pt", **options)
    assert_close(classifier.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({"T": 2}, "T=2"),
        ({"encoder": "poisson"}, "PoissonEncoder"),
    ],
)
def test_other_time_steps_and_encoders_are_warned_of(tmp_path, others, said):
    source = pretrained(tmp_path / "best.pt", NetworkSpec(neuron="lif"))
    for kind in ("lif", "dlif", "tgo"):
        classifier = build_classifier(NetworkSpec(neuron=kind, **others))
        with pytest.warns(UserWarning, match=said):
            start_from(classifier, tmp_path / "best.pt")
        assert torch.equal(classifier.net.first.weight, source.net.first.weight)
    start_from(build_classifier(NetworkSpec(neuron="tgo")), tmp_path / "best.pt")


def of_another_release(path, classifier):
    description = {"network": asdict(NetworkSpec()) | {"later": 1}}
    save_checkpoint(path, {"model": classifier.state_dict(), "description": description})


FILES = {
    "weights.h5": lambda path, classifier: torch.save(classifier.state_dict(), path),
    "damaged.pt": lambda path, classifier: path.write_bytes(b"PK\x03\x04 cut off"),
    "pickled.pt": lambda path, classifier: torch.save(classifier, path),
    "list.pt": lambda path, classifier: torch.save([torch.ones(2)], path),
    "later.pt": of_another_release,
    "absent.pt": lambda path, classifier: None,
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_cannot_be_read_are_named(tmp_path, name):
    classifier = build_classifier(NetworkSpec())
    FILES[name](tmp_path / name, classifier)
    error = FileNotFoundError if name == "absent.pt" else ValueError
    with pytest.raises(error, match=name):
        start_from(classifier, tmp_path / name)
