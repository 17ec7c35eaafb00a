"""Files in the layout of the published code, written by networks that have its names and its
arithmetic.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import pytest
import torch
from covering import mostly_slow
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

    def __init__(self, T, gains, decay=0.99):
        super().__init__()
        self.T = T
        self.decay = decay
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


class Gate(nn.Module):
    """Open here, as its rate plays no part in what is compared."""

    def __init__(self, shape):
        super().__init__()
        self.poisson_rate = nn.Parameter(torch.rand(shape))

    def forward(self, x):
        return x


class Pdsg(Published):
    """VGG-11 in one row, convolutions without bias."""

    def __init__(self, T, gains):
        super().__init__(T)
        features = (64, "A", 128, 256, "A", 512, 512, 512, "A", 512, 512)
        layers, width = [], 3
        for feature in features:
            if feature == "A":
                layers.append(nn.AvgPool2d(2))
                continue
            layers.append(nn.Conv2d(width, feature, 3, padding=1, bias=False))
            layers += [nn.BatchNorm2d(feature), Spikes(T, gains)]
            width = feature
        layers.append(nn.Flatten())
        for a, b in ((512, 20), (20, 16)):
            layers += [nn.Linear(a, b), Spikes(T, gains)]
        self.net = nn.Sequential(*layers, nn.Linear(16, 7))

    def logits(self, x):
        return self.net(x)


@torch.no_grad()
def lively(net, size):
    """The network with other gains, batch norms and mixing than at first, and spikes up to its last
    layer.
    """
    for name, parameter in net.named_parameters():
        if name.endswith((".p", ".comb")):
            parameter.copy_(0.5 + torch.rand_like(parameter))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.fill_(2.0)
            module.bias.uniform_(0, 1)
        if isinstance(module, nn.Linear):
            module.weight.mul_(3.0)
    net.train()(torch.rand(2, 3, size, size))
    return net.eval()


def gated(net, size):
    """The network with a gate behind every neuron, as StoG's program puts them."""
    shapes = {}
    for module in net.modules():
        if isinstance(module, Spikes):
            module.register_forward_hook(lambda own, _, out: shapes.update({own: out.shape[1:]}))
    net.eval()(torch.rand(1, 3, size, size))
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Spikes):
                setattr(parent, name, nn.Sequential(child, Gate(shapes[child])))
    return net


def flattened(state):
    """Their classifier flattens in a module of its own."""
    names = {}
    for key in state:
        head, dot, rest = key.partition("classifier.")
        number, _, tail = rest.partition(".")
        names[key] = f"classifier.{int(number) + 1}.{tail}" if dot and not head else key
    return {names[key]: value for key, value in state.items()}


@dataclass(frozen=True)
class Row:
    """A published network, how its program saves it, and what it is here."""

    kind: Callable
    size: int
    spec: dict
    decay: float = 0.99
    gains: bool = False
    gates: bool = False
    save: Callable = dict
    options: dict = field(default_factory=lambda: {"T": 3})

    @property
    def shape(self):
        return (3, self.size, self.size)

    def network(self):
        torch.manual_seed(0)
        net = lively(self.kind(self.spec["T"], self.gains), self.size)
        for module in net.modules():
            if isinstance(module, Spikes):
                module.decay = self.decay
        return gated(net, self.size) if self.gates else net


def found(name, neuron, *, tau=100.0, T=3):
    return {"name": name, "neuron": neuron, "tau": tau, "T": T}


INF = float("inf")
ROWS = {
    "VGG": Row(Vgg5, 8, found("vgg5", "dlif"), gains=True, options={}),
    "VGG of LIF": Row(Vgg5, 8, found("vgg5", "lif")),
    "VGG of SNN-RAT": Row(Vgg5, 8, found("vgg5", "if", tau=INF), 1.0, save=flattened),
    "VGG of StoG": Row(Vgg5, 8, found("vgg5", "stog", tau=INF), 1.0, gates=True, save=flattened),
    "VGG of PDSG": Row(
        Pdsg,
        8,
        found("vgg11", "lif", tau=2.0, T=4),
        0.5,
        save=lambda state: {"model": state, "epoch": 3},
        options={},
    ),
    "WRN": Row(Wrn16, 8, found("wrn16_4", "dlif"), gains=True, options={}),
    "WRN of SNN-RAT": Row(
        Wrn16, 8, found("wrn16_4", "if", tau=INF), 1.0, options={"T": 3, "tau": INF}
    ),
    "WRN of StoG": Row(Wrn16, 8, found("wrn16_4", "stog", tau=INF), 1.0, gates=True),
}


def logits_of(model, images):
    """In float64, so that no spike next to the threshold goes either way."""
    with torch.no_grad():
        return model.double()(images.double())


def load(path, **options):
    return load_published_checkpoint(path, mean=MEAN, std=STD, **options)


@pytest.mark.parametrize("name", mostly_slow(ROWS, quick=["VGG", "VGG of SNN-RAT", "VGG of PDSG"]))
def test_the_logits_are_those_of_the_published_network(tmp_path, name):
    row = ROWS[name]
    theirs = row.network()
    torch.save(row.save(theirs.state_dict()), tmp_path / "net.pth")
    ours, spec = load(tmp_path / "net.pth", image_shape=row.shape, **row.options)
    assert {key: getattr(spec, key) for key in row.spec} == row.spec
    assert spec.classes == 7
    description = {"network": asdict(spec), "options": {}}
    content = {"model": ours.state_dict(), "description": description}
    save_checkpoint(tmp_path / "best.pt", content)
    kept = from_checkpoint(tmp_path / "best.pt").model
    images = torch.rand(4, *row.shape)
    expected = logits_of(theirs, images)
    assert expected.std(0).max() > 0.01
    for model in (ours, kept):
        gates = [module for module in model.modules() if isinstance(module, StochasticGate)]
        rates = [module.poisson_rate for module in theirs.modules() if isinstance(module, Gate)]
        for gate, rate in zip(gates, rates, strict=True):
            assert_close(gate.rate.sum(), rate.sum().to(gate.rate))
            gate.forward = lambda spikes: spikes
        assert_close(logits_of(model, images), expected)


def without(*names):
    return lambda state: {key: value for key, value in state.items() if key not in names}


def changed(name, change):
    return lambda state: state | {name: change(state.get(name))}


MISFITS = {
    "a layer less": (without("classifier.2.weight"), {}),
    "a gain less": (without("layer1.2.p"), {}),
    "more": (changed("layer9.0.weight", lambda _: torch.ones(1)), {}),
    "other steps in one layer": (changed("layer1.2.p", lambda _: torch.ones(4)), {}),
    "another network": (lambda _: nn.Linear(2, 2).state_dict(), {}),
    "a network in one row": (lambda _: {"net.0.weight": torch.ones(8, 3, 3, 3)}, {}),
    "names of a VGG of other layers": (
        lambda state: {f"features.{number}": value for number, value in enumerate(state.values())},
        {},
    ),
    "NaN": (changed("layer1.0.weight", lambda old: old * torch.nan), {}),
    "integers": (changed("layer1.0.weight", lambda old: old.to(torch.int8)), {}),
    "sparse": (changed("layer1.0.weight", torch.Tensor.to_sparse), {}),
    "another size": (dict, {"image_shape": (3, 32, 32)}),
    "another T": (dict, {"T": 8}),
}


@pytest.mark.filterwarnings("ignore:Validating sparse")  # torch 2.15 says so
@pytest.mark.parametrize("name", MISFITS)
def test_a_file_that_does_not_fit_is_refused(tmp_path, name):
    change, options = MISFITS[name]
    torch.save(change(ROWS["VGG"].network().state_dict()), tmp_path / "net.pth")
    with pytest.raises(ValueError, match=r"net\.pth"):
        load(tmp_path / "net.pth", **{"image_shape": (3, 8, 8)} | options)
