"""Networks of ReLUs as spiking networks: the same function, counts, and what is refused."""

import math

import pytest
import torch
from covering import each_in_turn
from spikingjelly.activation_based import functional
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from sj_robust import SpikingClassifier, compare_potentials, verify
from sj_robust.defences import ClippedReLU
from sj_robust.models import NetworkSpec, build_classifier
from sj_robust.neuron import DLIFNode
from sj_robust.training import convert

IMAGE = (3, 8, 8)
SPEC = {"image_shape": IMAGE, "classes": 4}


def packaged(neuron="relu", **options):
    return build_classifier(NetworkSpec(neuron=neuron, T=1, **SPEC, **options))


class Block(nn.Module):
    """A residual block after the pattern of ResNet: one ReLU called twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.relu = nn.ReLU()

    def forward(self, x):
        inner = self.relu(self.norm(self.first(x)))
        return self.relu(self.second(inner) + x)


class Functional(nn.Module):
    """Functions in place of modules, and a product with a parameter."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.mixing = nn.Parameter(torch.tensor([0.5, 2.0]))
        self.last = nn.Linear(6 * 16, 4)

    def forward(self, x):
        x = F.relu(self.first(x)) * self.mixing[1]
        x = F.avg_pool2d(x, 2).relu()
        return self.last(torch.flatten(x, 1))


def residual():
    head = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), Block(), Block()]
    return nn.Sequential(*head, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 4))


TWINS = {
    "small": packaged,
    "small with hidden": lambda: packaged(options={"hidden": [9], "batch_norm": False}),
    "vgg5": lambda: packaged(name="vgg5", hidden=(16,)),
    "wrn16_4": lambda: packaged(name="wrn16_4"),
    "clipped": lambda: packaged("clipped_relu", options={"threshold": 0.5}),
    "residual": residual,
    "functional": Functional,
}


def twin_and_images(name):
    """A network whose batch norm has seen images, and the images."""
    torch.manual_seed(0)
    twin = TWINS[name]()
    x = torch.rand(6, *IMAGE)
    for _ in range(3):
        twin.train()(x)
    return twin.eval(), x


@pytest.mark.parametrize(
    ("name", "per_channel", "gain_fall"),
    [*each_in_turn(TWINS, [False, True], [0.3, 0.0, 0.0]), ("small", True, 0.3)],
)
def test_many_steps_give_the_logits_of_the_twin(name, per_channel, gain_fall):
    twin, x = twin_and_images(name)
    state = {key: value.clone() for key, value in twin.state_dict().items()}
    with torch.no_grad():
        wanted = twin(x)
        errors = []
        for T in (16, 256):
            scales = {"quantile": 1.0, "per_channel": per_channel}
            spiking = convert(twin, x, T=T, gain_fall=gain_fall, **scales)
            errors.append(float((spiking(x) - wanted).abs().max() / wanted.std()))
        assert_close(twin(x), wanted, rtol=0, atol=0)
    clipped = (
        0.1 * gain_fall
    )  # of activations near the scale, which begin with more than a threshold
    assert errors[1] < 0.2 * errors[0] + 0.02 + clipped
    assert errors[1] < 0.05
    assert_close(twin.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize(("quantile", "T"), [(0.9, 4), (1.0, 7)])
def test_the_first_layer_counts_its_activations_rounded(quantile, T):
    twin = nn.Sequential(nn.Flatten(), nn.Linear(192, 50), nn.ReLU(), nn.Linear(50, 4))
    x = torch.rand(20, *IMAGE)
    with torch.no_grad():
        activations = twin[:3](x).double()
        scale = torch.quantile(activations[activations > 0], quantile)
        wanted = (T * activations / scale + 0.5).floor().clamp(max=T)
        spiking = convert(twin, x, T=T, quantile=quantile)
        functional.reset_net(spiking.net)
        counts = sum(spiking.net[:3](x) for _ in range(T))
    clear = ((T * activations / scale + 0.5) % 1 - 0.5).abs() < 0.499
    assert clear.float().mean() > 0.95
    assert torch.equal(counts[clear].double(), wanted[clear])


def test_a_network_of_the_package_fits_its_specification_and_is_used_as_any_other():
    twin, x = twin_and_images("small")
    spiking = convert(twin, x, T=5)
    spec = NetworkSpec(T=5, tau=math.inf, options={"v_reset": None, "v_init": 0.5}, **SPEC)
    built = build_classifier(spec).eval()
    built.load_state_dict(spiking.state_dict())
    assert torch.equal(built(x), spiking(x))
    assert not spiking.training
    proofs = verify(spiking, x, spiking(x).argmax(1), 1e-4)
    assert sum(proofs.verified) > 3
    assert compare_potentials(spiking, x, (x + 0.1).clamp(max=1))["stages.0.node"].T == 5
    kinds = {type(module) for module in convert(residual().eval(), x).net.modules()}
    assert DLIFNode in kinds


def test_gains_fall_behind_the_first_layer():
    twin, x = twin_and_images("vgg5")
    gains = [
        node.input_gain
        for node in convert(twin, x, T=4, gain_fall=0.3).modules()
        if isinstance(node, DLIFNode)
    ]
    assert_close(gains[0], torch.ones(4))
    for fall in gains[1:]:
        assert_close(fall, torch.tensor([1.3, 1.1, 0.9, 0.7]))
    assert len(gains) > 2


def test_a_clipped_relu_is_as_uncertain_as_counts_in_training_alone():
    clipped = ClippedReLU(levels=4, threshold=2.0)
    x = torch.linspace(-1, 3, 2001).unsqueeze(1).requires_grad_()
    noise = (clipped(x) - clipped.eval()(x)).detach()
    assert noise[x < -0.26].count_nonzero() == noise[x > 2.26].count_nonzero() == 0
    inside = noise[(x > 0.26) & (x < 1.74)]
    assert 0.2 < inside.abs().max() <= 0.25
    assert float(inside.std()) == pytest.approx(0.5 / math.sqrt(12), rel=0.1)
    clipped(x).sum().backward()
    clear = ((x - 1).abs() - 1).abs() > 1e-3
    assert torch.equal(x.grad[clear], ((x > 0) & (x < 2)).float()[clear])
    assert clipped.threshold.grad == pytest.approx(int((x > 2).sum()), abs=1.1)
    assert torch.equal(ClippedReLU(None, 2.0).train()(x), clipped(x))


def with_max_pooling():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())


class Product(Functional):
    def forward(self, x):
        x = self.first(x).relu()
        return (x * x).mean((2, 3))


class Deciding(Functional):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


SPIKING = SpikingClassifier(nn.Sequential(nn.Flatten(2), nn.Linear(192, 4), DLIFNode(1)), 1)
REFUSED = [
    (with_max_pooling, {}, ValueError, "MaxPool2d"),
    (lambda: nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Sigmoid()), {}, ValueError, "Sigmoid"),
    (Product, {}, ValueError, "mul"),
    (Deciding, {}, ValueError, "torch.fx"),
    (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), {}, ValueError, "ReLU"),
    (lambda: SPIKING, {}, ValueError, "ReLU"),
    (lambda: nn.ReLU, {}, TypeError, "twin"),
    (packaged, {"T": 0}, ValueError, "T"),
    (packaged, {"quantile": 0.0}, ValueError, "quantile"),
    (packaged, {"gain_fall": 1.5}, ValueError, "gain_fall"),
    (packaged, {"mean": 0.5}, ValueError, "mean"),
    (packaged, {"x": torch.rand(3, *IMAGE).byte()}, TypeError, "x"),
]


@pytest.mark.parametrize(("build", "changes", "error", "named"), REFUSED)
def test_what_counts_of_spikes_do_not_keep_is_refused(build, changes, error, named):
    given = {"x": torch.rand(3, *IMAGE)} | changes
    with pytest.raises(error, match=named):
        convert(build(), given.pop("x"), **given)
