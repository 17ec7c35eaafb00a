"""Files in the layout of the published code, written by networks that have its names and its
arithmetic.
"""

from dataclasses import asdict

import pytest
import torch
from compare.published import lively
from torch import nn
from torch.nn import functional as F

from sj_robust.evaluation.subject import from_checkpoint
from sj_robust.models import load_published_checkpoint
from sj_robust.models.checkpoint import save_checkpoint

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


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
        v, spikes = 0.0, []
        for t, current in enumerate(x.unflatten(0, (self.T, -1))):
            h = self.decay * v + (self.p[t] * current if hasattr(self, "p") else current)
            spikes.append((h >= 1).to(x))
            v = (1 - spikes[-1]) * h
        return torch.cat(spikes)


class Combination(nn.Module):
    def __init__(self):
        super().__init__()
        self.comb = nn.Parameter(torch.rand(2))


class Block(nn.Module):
    def __init__(self, a, b, stride, node):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(a), nn.BatchNorm2d(b)
        self.act1, self.act2 = node(), node()
        self.conv1 = nn.Conv2d(a, b, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(b, b, 3, 1, 1, bias=False)
        self.convShortcut = nn.Conv2d(a, b, 1, stride, bias=False) if a != b else None
        self.convex = Combination()

    def forward(self, x):
        active = self.act1(self.bn1(x))
        inner = self.conv2(self.act2(self.bn2(self.conv1(active))))
        through = x if self.convShortcut is None else self.convShortcut(active)
        return self.convex.comb[0] * through + self.convex.comb[1] * inner


class Published(nn.Module):
    def __init__(self, T):
        super().__init__()
        self.T = T

    def forward(self, images):
        x = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        return self.logits(x.repeat(self.T, 1, 1, 1)).unflatten(0, (self.T, -1)).mean(0)


class Vgg5(Published):
    def __init__(self, T, gains):
        super().__init__(T)

        def conv(a, b):
            return [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), Spikes(T, gains)]

        self.layer1 = nn.Sequential(*conv(3, 64), nn.AvgPool2d(2))
        self.layer2 = nn.Sequential(*conv(64, 128), *conv(128, 128), nn.AvgPool2d(2))
        self.layer3, self.layer4, self.layer5 = nn.Sequential(), nn.Sequential(), nn.Sequential()
        linear = [
            nn.Linear(512, 20),
            Spikes(T, gains),
            nn.Linear(20, 16),
            Spikes(T, gains),
            nn.Linear(16, 7),
        ]
        self.classifier = nn.Sequential(*linear)

    def logits(self, x):
        return self.classifier(
            self.layer5(self.layer4(self.layer3(self.layer2(self.layer1(x))))).flatten(1)
        )


class Wrn16(Published):
    def __init__(self, T, gains):
        super().__init__(T)

        def node():
            return Spikes(T, gains)

        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = nn.Sequential(Block(16, 64, 1, node), Block(64, 64, 1, node))
        self.block2 = nn.Sequential(Block(64, 128, 2, node), Block(128, 128, 1, node))
        self.block3 = nn.Sequential(Block(128, 256, 2, node), Block(256, 256, 1, node))
        self.bn1, self.act = nn.BatchNorm2d(256), node()
        self.fc = nn.Linear(256, 7)

    def logits(self, x):
        x = self.act(self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))))
        return self.fc(F.avg_pool2d(x, x.shape[-1] if x.shape[-1] < 8 else 8).flatten(1))


def published(kind, gains, size):
    torch.manual_seed(0)
    return lively(kind(3, gains), size)


CASES = [(Vgg5, "vgg5", 8), pytest.param(Wrn16, "wrn16_4", 16, marks=pytest.mark.slow)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name", "size"), CASES)
@pytest.mark.parametrize("gains", [True, False])
def test_the_logits_are_those_of_the_published_network(tmp_path, kind, name, size, gains):
    theirs = published(kind, gains, size)
    torch.save(theirs.state_dict(), tmp_path / "net.pth")
    shape = (3, size, size)
    T = None if gains else 3
    ours, spec = load_published_checkpoint(
        tmp_path / "net.pth", mean=MEAN, std=STD, image_shape=shape, T=T
    )
    assert (spec.name, spec.classes, spec.T, spec.neuron) == (
        name,
        7,
        3,
        "dlif" if gains else "lif",
    )
    description = {"network": asdict(spec), "options": {}}
    save_checkpoint(tmp_path / "best.pt", {"model": ours.state_dict(), "description": description})
    kept = from_checkpoint(tmp_path / "best.pt").model
    images = torch.rand(4, *shape, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs.double()(images)
        assert expected.std(0).max() > 0.01
        torch.testing.assert_close(ours.double()(images), expected)
        assert torch.equal(kept.double()(images), ours(images))


def test_a_vgg_of_snn_rat_has_neurons_without_leak(tmp_path):
    theirs = published(Vgg5, False, 8)
    numbers = {
        "classifier.0": "classifier.1",
        "classifier.2": "classifier.3",
        "classifier.4": "classifier.5",
    }
    state = {
        numbers.get(key[:12], key[:12]) + key[12:]: value
        for key, value in theirs.state_dict().items()
    }
    torch.save(state, tmp_path / "net.pth")  # their classifier flattens in a module of its own
    ours, spec = load_published_checkpoint(
        tmp_path / "net.pth", mean=MEAN, std=STD, image_shape=(3, 8, 8), T=3
    )
    assert (spec.name, spec.neuron) == ("vgg5", "if")
    for module in theirs.modules():
        if isinstance(module, Spikes):
            module.decay = 1.0
    images = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours.double()(images), theirs.double()(images))


def test_what_does_not_fit_is_said(tmp_path):
    state = published(Vgg5, True, 8).state_dict()
    for message, changed, arguments in (
        (
            r"0.weight \(20, 512\) instead of \(20, 8192\); it was read as vgg5",
            state,
            {"image_shape": (3, 32, 32)},
        ),
        (
            "network: unexpected layer9.0.weight; it was read as vgg5",
            state | {"layer9.0.weight": torch.ones(1)},
            {},
        ),
        (
            "missing layer1.2.p;",
            {key: value for key, value in state.items() if key != "layer1.2.p"},
            {},
        ),
        (
            r"of another shape layer1.2.p \(4,\) instead of \(3,\); it was read",
            state | {"layer1.2.p": torch.ones(4)},
            {},
        ),
        (
            "was trained with T=3, got T=8; leave T out, and set_time_steps afterwards",
            state,
            {"T": 8},
        ),
        (
            r"none of the published networks vgg5, .* \(it begins with weight, bias\)",
            nn.Linear(2, 2).state_dict(),
            {},
        ),
    ):
        torch.save(changed, tmp_path / "net.pth")
        options = {"mean": MEAN, "std": STD, "image_shape": (3, 8, 8)} | arguments
        with pytest.raises(ValueError, match=message):
            load_published_checkpoint(tmp_path / "net.pth", **options)
