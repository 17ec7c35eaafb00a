"""Files in the layout of the published code, written by networks that have its names and its
arithmetic.
"""

from dataclasses import asdict, dataclass

import pytest
import torch
from compare.published import lively
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from sj_robust.defences import StochasticGate
from sj_robust.evaluation.subject import from_checkpoint
from sj_robust.models import load_published_checkpoint
from sj_robust.models.checkpoint import save_checkpoint

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)


class Spikes(nn.Module):
    """[T * N, *] currents to spikes, decay 0.99, threshold 1, gain ``p`` where the neuron has
    it.
    """

    decay = 0.99

    def __init__(self, T, gains):
        super().__init__()
        self.T = T
        if gains:
            self.p = nn.Parameter(torch.ones(T))

    def forward(self, x):
        gains = self.p if hasattr(self, "p") else [1.0] * self.T
        x_seq = x.unflatten(0, (self.T, -1))
        v = 0.0
        spikes = []
        for current, gain in zip(x_seq, gains, strict=True):
            h = self.decay * v + gain * current
            spike = (h >= 1).to(x)
            spikes.append(spike)
            v = (1 - spike) * h
        return torch.cat(spikes)


class Combination(nn.Module):
    def __init__(self):
        super().__init__()
        self.comb = nn.Parameter(torch.rand(2))


class Block(nn.Module):
    def __init__(self, a, b, stride, node):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(a)
        self.bn2 = nn.BatchNorm2d(b)
        self.act1 = node()
        self.act2 = node()
        self.conv1 = nn.Conv2d(a, b, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(b, b, 3, 1, 1, bias=False)
        self.convShortcut = None
        if a != b:
            self.convShortcut = nn.Conv2d(a, b, 1, stride, bias=False)
        self.convex = Combination()

    def forward(self, x):
        active = self.act1(self.bn1(x))
        inner = self.bn2(self.conv1(active))
        inner = self.conv2(self.act2(inner))
        through = x if self.convShortcut is None else self.convShortcut(active)
        first, second = self.convex.comb
        return first * through + second * inner


class Published(nn.Module):
    def __init__(self, T):
        super().__init__()
        self.T = T

    def forward(self, images):
        mean = torch.tensor(MEAN).view(3, 1, 1)
        std = torch.tensor(STD).view(3, 1, 1)
        x = (images - mean) / std
        logits = self.logits(x.repeat(self.T, 1, 1, 1))
        return logits.unflatten(0, (self.T, -1)).mean(0)


class Vgg5(Published):
    def __init__(self, T, gains):
        super().__init__(T)

        def conv(a, b):
            return [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), Spikes(T, gains)]

        self.layer1 = nn.Sequential(*conv(3, 64), nn.AvgPool2d(2))
        self.layer2 = nn.Sequential(
            *conv(64, 128),
            *conv(128, 128),
            nn.AvgPool2d(2),
        )
        self.layer3 = nn.Sequential()
        self.layer4 = nn.Sequential()
        self.layer5 = nn.Sequential()
        self.classifier = nn.Sequential(
            nn.Linear(512, 20),
            Spikes(T, gains),
            nn.Linear(20, 16),
            Spikes(T, gains),
            nn.Linear(16, 7),
        )

    def logits(self, x):
        x = self.layer2(self.layer1(x))
        return self.classifier(x.flatten(1))


class Wrn16(Published):
    def __init__(self, T, gains):
        super().__init__(T)

        def node():
            return Spikes(T, gains)

        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = nn.Sequential(
            Block(16, 64, 1, node),
            Block(64, 64, 1, node),
        )
        self.block2 = nn.Sequential(
            Block(64, 128, 2, node),
            Block(128, 128, 1, node),
        )
        self.block3 = nn.Sequential(
            Block(128, 256, 2, node),
            Block(256, 256, 1, node),
        )
        self.bn1 = nn.BatchNorm2d(256)
        self.act = node()
        self.fc = nn.Linear(256, 7)

    def logits(self, x):
        x = self.block1(self.conv1(x))
        x = self.block3(self.block2(x))
        x = self.act(self.bn1(x))
        x = F.avg_pool2d(x, min(x.shape[-1], 8))
        return self.fc(x.flatten(1))


@dataclass(frozen=True)
class Case:
    """A published network, and what it is called here."""

    kind: type[Published]
    name: str
    size: int

    @property
    def shape(self):
        return (3, self.size, self.size)

    def network(self, *, gains):
        torch.manual_seed(0)
        return lively(self.kind(3, gains), self.size)


VGG5 = Case(Vgg5, name="vgg5", size=8)
WRN16 = Case(Wrn16, name="wrn16_4", size=16)


def logits_of(model, images):
    """In float64, so that no spike next to the threshold goes either way."""
    with torch.no_grad():
        return model.double()(images.double())


def load(path, **options):
    return load_published_checkpoint(path, mean=MEAN, std=STD, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "gains"),
    [(VGG5, True), (VGG5, False), (WRN16, True)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_the_logits_are_those_of_the_published_network(tmp_path, case, gains):
    theirs = case.network(gains=gains)
    torch.save(theirs.state_dict(), tmp_path / "net.pth")
    T = None if gains else 3
    ours, spec = load(tmp_path / "net.pth", image_shape=case.shape, T=T)
    assert spec.name == case.name
    assert spec.classes == 7
    assert spec.T == 3
    assert spec.neuron == ("dlif" if gains else "lif")
    content = {
        "model": ours.state_dict(),
        "description": {"network": asdict(spec), "options": {}},
    }
    save_checkpoint(tmp_path / "best.pt", content)
    kept = from_checkpoint(tmp_path / "best.pt").model
    images = torch.rand(4, *case.shape)
    expected = logits_of(theirs, images)
    assert expected.std(0).max() > 0.01
    logits = logits_of(ours, images)
    assert_close(logits, expected)
    assert torch.equal(logits_of(kept, images), logits)


def test_a_vgg_of_snn_rat_has_neurons_without_leak(tmp_path):
    theirs = VGG5.network(gains=False)
    state = {}
    for key, value in theirs.state_dict().items():
        # Their classifier flattens in a module of its own.
        for number in (0, 2, 4):
            key = key.replace(f"classifier.{number}.", f"classifier.{number + 1}.")
        state[key] = value
    torch.save(state, tmp_path / "net.pth")
    ours, spec = load(tmp_path / "net.pth", image_shape=(3, 8, 8), T=3)
    assert spec.name == "vgg5"
    assert spec.neuron == "if"
    for module in theirs.modules():
        if isinstance(module, Spikes):
            module.decay = 1.0
    images = torch.rand(4, 3, 8, 8)
    assert_close(logits_of(ours, images), logits_of(theirs, images))


class Gate(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.poisson_rate = nn.Parameter(torch.rand(shape))

    def forward(self, x):
        return x


def gated(net, size):
    """The same network with an open gate behind every neuron, as StoG's program puts them."""
    shapes = {}
    for module in net.modules():
        if isinstance(module, Spikes):
            module.decay = 1.0
            module.register_forward_hook(lambda own, _, out: shapes.update({own: out.shape[1:]}))
    net.eval()(torch.rand(1, 3, size, size))
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Spikes):
                setattr(parent, name, nn.Sequential(child, Gate(shapes[child])))
    return net


@pytest.mark.slow
@pytest.mark.parametrize("case", [VGG5, WRN16], ids=lambda case: case.name)
def test_gates_of_stog_are_loaded_with_their_rates(tmp_path, case):
    theirs = gated(case.network(gains=False), case.size)
    state = {}
    for key, value in theirs.state_dict().items():
        _, dot, rest = key.partition("classifier.")
        number, _, tail = rest.partition(".")
        state[f"classifier.{int(number) + 1}.{tail}" if dot else key] = value
    torch.save(state, tmp_path / "net.pth")
    ours, spec = load(tmp_path / "net.pth", image_shape=case.shape, T=3)
    assert (spec.name, spec.neuron, spec.tau) == (case.name, "stog", torch.inf)
    gates = [module for module in ours.modules() if isinstance(module, StochasticGate)]
    rates = [module.poisson_rate for module in theirs.modules() if isinstance(module, Gate)]
    assert sorted(gate.rate.sum().item() for gate in gates) == sorted(
        rate.sum().item() for rate in rates
    )
    for gate in gates:
        gate.forward = lambda spikes: spikes
    images = torch.rand(4, *case.shape)
    assert_close(logits_of(ours, images), logits_of(theirs, images))


class Pdsg(Published):
    """VGG-11 in one row, convolutions without bias, decay 0.5."""

    def __init__(self, T):
        super().__init__(T)
        features = (64, "A", 128, 256, "A", 512, 512, 512, "A", 512, 512)
        layers, width = [], 3
        for feature in features:
            if feature == "A":
                layers.append(nn.AvgPool2d(2))
                continue
            layers.append(nn.Conv2d(width, feature, 3, padding=1, bias=False))
            layers += [nn.BatchNorm2d(feature), self.node(T)]
            width = feature
        layers.append(nn.Flatten())
        for a, b in ((512, 20), (20, 16)):
            layers += [nn.Linear(a, b), self.node(T)]
        self.net = nn.Sequential(*layers, nn.Linear(16, 7))
        self.logits = self.net

    @staticmethod
    def node(T):
        spikes = Spikes(T, gains=False)
        spikes.decay = 0.5
        return spikes

    def state_dict(self):
        found = super().state_dict()
        return {key: value for key, value in found.items() if not key.startswith("logits")}


@pytest.mark.slow
def test_a_vgg_of_pdsg_has_its_layers_in_one_row(tmp_path):
    torch.manual_seed(0)
    theirs = lively(Pdsg(4), 8)
    torch.save({"model": theirs.state_dict(), "epoch": 3}, tmp_path / "checkpoint.pth")
    ours, spec = load(tmp_path / "checkpoint.pth", image_shape=(3, 8, 8))
    assert (spec.name, spec.neuron, spec.T, spec.tau) == ("vgg11", "lif", 4, 2.0)
    images = torch.rand(4, 3, 8, 8)
    expected = logits_of(theirs, images)
    assert expected.std(0).max() > 0.01
    assert_close(logits_of(ours, images), expected)


def test_other_networks_in_one_row_are_refused(refused):
    state = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)).state_dict()
    refused({f"net.{key}": value for key, value in state.items()}, "any of the published networks")


@pytest.fixture
def refused(tmp_path):
    """A context in which a file with these weights must be refused."""

    def refuse(state, message, **options):
        torch.save(state, tmp_path / "net.pth")
        usual = {"image_shape": (3, 8, 8)}
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "net.pth", **usual | options)

    return refuse


def test_files_that_are_nearly_known_are_refused(refused):
    state = VGG5.network(gains=True).state_dict()
    del state["classifier.2.weight"]
    refused(state, "any of the published networks")
    unnumbered = {"classifier.5.weight": torch.ones(1), "classifier.foo.bias": torch.ones(1)}
    refused(state | unnumbered, "any of the published networks")
    row = {"net.0.weight": torch.ones(64, 3, 3, 3)}
    for number, width in enumerate((128, 256, 512, 512, 512, 512, 512)):
        row[f"net.{number + 50}.weight"] = torch.ones(width, 1, 3, 3)
    refused(row, "any of the published networks")


@pytest.mark.filterwarnings("ignore:Validating sparse")  # torch 2.15 says so
def test_weights_that_do_not_fit_are_named(refused):
    state = VGG5.network(gains=True).state_dict()
    more = state | {"layer9.0.weight": torch.ones(1)}
    refused(more, "network: unexpected layer9.0.weight; it was read as vgg5")
    other = state | {"layer1.2.p": torch.ones(4)}
    refused(other, r"of another shape layer1.2.p \(4,\) instead of \(3,\); it was read")
    del state["layer1.2.p"]
    refused(state, "missing layer1.2.p;")
    foreign = nn.Linear(2, 2).state_dict()
    weight = other["layer1.0.weight"]
    for values in (weight * torch.nan, weight.to(torch.int8), weight.to_sparse()):
        given = VGG5.network(gains=True).state_dict() | {"layer1.0.weight": values}
        refused(given, "no dense tensors of finite floating point numbers layer1.0.weight; it was")
    refused(foreign, r"any of the published networks vgg5, .* \(it begins with weight, bias\)")


def test_options_that_do_not_fit_are_named(refused):
    state = VGG5.network(gains=True).state_dict()
    message = r"0.weight \(20, 512\) instead of \(20, 8192\); it was read as vgg5"
    refused(state, message, image_shape=(3, 32, 32))
    message = "was trained with T=3, got T=8; omit T, and call set_time_steps afterwards"
    refused(state, message, T=8)
