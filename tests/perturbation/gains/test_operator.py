"""Norms of the maps between spiking layers against dense singular values."""

import re
from functools import partial

import pytest
import torch
from spikingjelly.activation_based import base, functional, layer, neuron
from spikingjelly.activation_based.model import sew_resnet
from torch import nn
from unchanged import unchanged

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.core.randomness import SampleSeeds
from sj_robust.models import NetworkSpec, build_classifier
from sj_robust.neuron import fuse
from sj_robust.perturbation.gains import INPUT, InputMap, _affine, input_maps, perturbation_gains
from sj_robust.perturbation.gains._lanczos import largest_singular_value
from sj_robust.proofs import no_flip_radius, smooth

NODE = partial(neuron.LIFNode, step_mode="m")


def dense(function, shape, dtype=torch.float64):
    """Largest singular value of an affine function of a tensor, from its matrix."""
    zero = torch.zeros(shape, dtype=dtype)
    with torch.no_grad():
        columns = [
            (function(e.view(shape)) - function(zero)).flatten()
            for e in torch.eye(zero.numel(), dtype=dtype)
        ]
    return float(torch.linalg.matrix_norm(torch.stack(columns), 2))


def with_statistics(norm):
    for name, low, high in (("weight", 0.5, 2.0), ("bias", -1.0, 1.0), ("running_mean", -1.0, 1.0)):
        getattr(norm, name).data.uniform_(low, high)
    norm.running_var.uniform_(0.5, 4.0)
    return norm


def seeded(build):
    torch.manual_seed(0)
    return build()


KINDS = {
    "stride and padding": (lambda: layer.Conv2d(2, 3, 3, stride=2, padding=1), (2, 7, 6)),
    "circular padding": (
        lambda: layer.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
        (2, 5, 5),
    ),
    "groups and dilation": (
        lambda: layer.Conv2d(4, 4, 3, groups=2, dilation=2, padding=2),
        (4, 6, 6),
    ),
    "transposed": (lambda: layer.ConvTranspose2d(2, 3, 2, stride=2), (2, 3, 3)),
    "one dimension": (lambda: layer.Conv1d(2, 3, 3, padding=1), (2, 9)),
    "linear": (lambda: layer.Linear(7, 9), (7,)),
    "average pooling": (lambda: layer.AvgPool2d(3, stride=2, padding=1), (2, 6, 6)),
    "adaptive average pooling": (lambda: layer.AdaptiveAvgPool2d(3), (2, 7, 7)),
    "batch norm": (lambda: with_statistics(layer.BatchNorm2d(3)), (3, 3, 3)),
    "dropout": (lambda: layer.Dropout(0.5), (5,)),
    "all in a row": (
        lambda: nn.Sequential(
            layer.Conv2d(2, 4, 3, padding=1),
            with_statistics(layer.BatchNorm2d(4)),
            layer.AvgPool2d(2),
            layer.Flatten(),
            layer.Linear(4 * 2 * 2, 5),
        ),
        (2, 4, 4),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_against_dense_singular_values(kind):
    build, shape = KINDS[kind]
    between = seeded(build).double()
    net = nn.Sequential(NODE(), between, NODE(), layer.Flatten())
    functional.set_step_mode(net, "m")
    found = input_maps(net, torch.rand(1, *shape, dtype=torch.float64))
    wanted = dense(between.eval(), (1, 1, *shape))
    assert found["0"] == InputMap(
        "0", (INPUT,), pytest.approx(1.0), residual=pytest.approx(0), iterations=1
    )
    assert found["2"].feeds == ("0",)
    assert not found["2"].upper_bound
    assert found["2"].norm == pytest.approx(wanted, rel=1e-4)
    assert found["2"].norm <= wanted * (1 + 1e-9), "approached from below"
    assert found["2"].residual <= 1e-4 * found["2"].norm


class Residual(nn.Module):
    """Two spiking layers feed the third one, the second through two paths."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = NODE(), NODE(), NODE()
        self.a, self.b = (
            layer.Conv2d(2, 2, 3, padding=1, step_mode="m"),
            layer.Conv2d(2, 2, 1, step_mode="m"),
        )
        self.weights = nn.Parameter(torch.tensor([0.5, 3.0]))

    def join(self, first, second):
        total = self.weights[0] * first
        total += self.weights[1] * self.b(second)
        return self.a(total + second) - first

    def forward(self, x):
        first = self.first(x)
        return self.third(self.join(first, self.second(self.b(first))))


def test_residual_sum_is_the_stacked_map():
    net = seeded(Residual).double()
    found = input_maps(net, torch.rand(1, 2, 4, 4, dtype=torch.float64))
    assert {name: layer.feeds for name, layer in found.items()} == {
        "first": (INPUT,),
        "second": ("first",),
        "third": ("first", "second"),
    }
    wanted = dense(lambda pair: net.join(pair[:1], pair[1:]), (2, 1, 2, 4, 4))
    assert found["third"].norm == pytest.approx(wanted, rel=1e-4)


def test_single_step_mode_and_fused_batch_norm_give_the_same_norms():
    net = seeded(
        lambda: nn.Sequential(
            layer.Conv2d(1, 3, 3),
            with_statistics(layer.BatchNorm2d(3)),
            DLIFNode(T=1),
            layer.Conv2d(3, 2, 3),
            with_statistics(layer.BatchNorm2d(2)),
            DLIFNode(T=1),
        )
    )
    frame = torch.rand(1, 1, 6, 6)
    functional.set_step_mode(net, "s")
    single = input_maps(net, frame)
    functional.set_step_mode(net, "m")
    multi = input_maps(net, frame)
    assert fuse(net).stages == {"1": ("1", "2"), "4": ("4", "5")}
    fused = input_maps(net, frame)
    assert list(single) == ["2", "5"]
    for name in single:
        assert single[name].norm == pytest.approx(multi[name].norm, rel=1e-5)
        assert fused[f"{int(name) - 1}.node"].norm == multi[name].norm


@pytest.mark.parametrize(
    ("build", "windows"),
    [
        (lambda: layer.MaxPool2d(2), 1),
        (lambda: layer.MaxPool2d(3, stride=2, padding=1), 4),
        (lambda: layer.MaxPool2d(3, stride=1), 9),
        (lambda: layer.MaxPool2d((1, 4), stride=(1, 3)), 2),
        (lambda: layer.MaxPool2d(2, stride=2, dilation=2), 4),
        (lambda: layer.MaxPool2d(2, stride=1, dilation=3), 4),
        (lambda: nn.AdaptiveMaxPool2d(3), 4),
        (lambda: nn.MaxPool1d(3, stride=2), 2),
    ],
)
def test_max_pooling_is_lipschitz_by_its_windows(build, windows):
    pooling = build()
    x, y = (
        torch.rand(2, 2, 7, 7).double()
        if not isinstance(pooling, nn.MaxPool1d)
        else torch.rand(2, 2, 7).double()
    )
    output = pooling(x)
    assert _affine.windows_per_input(pooling, x, output) == windows
    assert (output - pooling(y)).norm() <= windows**0.5 * (x - y).norm()
    # Reached: one value above all others is the largest of every window it lies in.
    reached = 0.0
    for spot in torch.eye(x[0].numel(), dtype=torch.float64):
        peak = torch.cat((spot.view_as(x[:1]), torch.zeros_like(x[1:])))
        reached = max(reached, float(pooling(peak).norm()))
    assert reached == pytest.approx(windows**0.5)


class Pooled(nn.Module):
    """One pooling module used twice, once beside a path around it."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = NODE(), NODE(), NODE()
        self.conv = layer.Conv2d(2, 2, 3, padding=1, step_mode="m")
        self.pool = layer.MaxPool2d(3, stride=1, padding=1, step_mode="m")

    def forward(self, x):
        spikes = self.first(x)
        second = self.second(self.conv(self.pool(self.conv(spikes))))
        return self.third(self.pool(second) + second)


def test_max_pooling_gives_a_labelled_upper_bound():
    net = seeded(Pooled).double()
    found = input_maps(net, torch.rand(1, 2, 5, 5, dtype=torch.float64))
    conv = dense(net.conv, (1, 1, 2, 5, 5))
    assert list(found) == ["first", "second", "third"]
    assert [layer.upper_bound for layer in found.values()] == [False, True, True]
    assert found["second"].norm == pytest.approx(3 * conv**2, rel=1e-3)
    assert found["third"].norm == pytest.approx(3 + 1, rel=1e-3)  # ||[I, sqrt(3) I]|| sqrt(1 + 3)
    for _ in range(20):
        a, b = torch.rand(2, 1, 1, 2, 5, 5).double().round()
        moved = net.conv(net.pool(net.conv(a))) - net.conv(net.pool(net.conv(b)))
        assert moved.norm() <= found["second"].norm * (a - b).norm()


@pytest.mark.slow
def test_zoo_resnet_joins_the_blocks_before():
    net = seeded(
        lambda: sew_resnet.sew_resnet18(spiking_neuron=NODE, cnf="ADD", num_classes=3)
    ).eval()
    functional.set_step_mode(net, "m")
    found = input_maps(net, torch.rand(1, 3, 32, 32), tolerance=1e-2)
    assert len(found) == 20
    assert found["layer1.1.sn1"].feeds == ("sn1", "layer1.0.sn2")
    assert found["layer1.1.sn1"].upper_bound
    assert found["layer3.0.sn1"].feeds == ("layer2.0.sn2", "layer2.0.downsample_sn", "layer2.1.sn2")
    block = net.layer3[0]
    one = dense(lambda x: block.bn1(block.conv1(x)), (1, 1, 128, 4, 4), torch.float32)
    assert found["layer3.0.sn1"].norm == pytest.approx(3**0.5 * one, rel=1e-2), (
        "of three inputs that are added"
    )
    assert not found["layer3.0.sn1"].upper_bound


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg5", "wrn16_4"])
def test_our_models_are_covered(name):
    options = {"hidden": (8,)} if name == "vgg5" else {}
    spec = NetworkSpec(name=name, image_shape=(3, 8, 8), classes=3, T=4, **options)
    found = input_maps(build_classifier(spec).net, torch.rand(1, 3, 8, 8), tolerance=1e-2)
    assert len(found) == {"vgg5": 4, "wrn16_4": 13}[name]
    assert all(layer.norm is not None and layer.norm > 0 for layer in found.values())
    if name == "wrn16_4":
        assert found["stages.1.activation.node"].feeds == (
            "stages.0.activation.node",
            "stages.0.residual.1.node",
        )


class Between(nn.Module):
    """A spiking layer, something, and another spiking layer."""

    def __init__(self, something, **modules):
        super().__init__()
        self.first, self.last = NODE(), NODE()
        self.linear = layer.Linear(4, 4, step_mode="m")
        self.something = something
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.last(self.something(self, self.first(x)))


class Recurrent(base.MemoryModule):
    """Adds its last input to the present one."""

    def __init__(self):
        super().__init__()
        self.register_memory("last", 0.0)

    def forward(self, x):
        self.last, before = x, self.last
        return x + before


class Once(torch.autograd.Function):
    """Has no second derivative."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * gradient


NOT_LINEAR = {
    "relu": (
        Between(lambda n, s: n.relu(n.linear(s)), relu=nn.ReLU()),
        "not affine in first.*relu .ReLU",
    ),
    "attention": (
        Between(
            lambda n, s: torch.stack([n.mix(x, x, x)[0] for x in s]),
            mix=nn.MultiheadAttention(4, 2, batch_first=True),
        ),
        "not affine in first.*mix .MultiheadAttention.*operation softmax",
    ),
    "product": (Between(lambda n, s: n.linear(s) * s), "not affine.*operation mul"),
    "inverted product": (
        Between(lambda n, s: s * (1.0 - n.linear(s))),
        "not affine.*operation mul",
    ),
    "dropout that stays on": (
        Between(lambda n, s: nn.functional.dropout(n.linear(s))),
        "not affine.*operation",
    ),
    "hidden threshold": (Between(lambda n, s: n.linear(s) + (s > 0.3).float()), "not affine"),
    "cut off": (
        Between(lambda n, s: n.linear(s).detach()),
        "neither a spiking layer nor the input",
    ),
    "half cut off": (Between(lambda n, s: n.linear(s) + s.detach()), "not affine"),
    "flat beyond a range": (Between(lambda n, s: s.clamp(-20, 20)), "not affine.*clamp"),
    "functional max pooling": (Between(lambda n, s: nn.functional.max_pool1d(s, 2)), "maxpool"),
    "not a number": (Between(lambda n, s: n.linear(s).log()), "not affine.*log"),
    "called twice": (Between(lambda n, s: n.first(n.linear(s))), "first is called 2 times"),
    "memory of its own": (
        Between(lambda n, s: torch.stack([n.memory(x) for x in s]), memory=Recurrent()),
        "not the same map at every time step",
    ),
    "once differentiable": (
        Between(lambda n, s: n.linear(Once.apply(s))),
        "cannot be differentiated",
    ),
    "before a pooling": (
        Between(lambda n, s: n.pool(s.relu()), pool=layer.MaxPool2d(2, step_mode="m")),
        "the max pooling pool before it: not affine",
    ),
    "mixes time steps": (
        Between(lambda n, s: s + s.flip(0)),
        "not the same map at every time step",
    ),
}


@pytest.mark.parametrize("kind", NOT_LINEAR)
def test_what_is_not_linear_is_named_and_not_covered(kind):
    net, reason = NOT_LINEAR[kind]
    found = input_maps(
        net,
        torch.rand({"attention": (1, 5, 4), "before a pooling": (1, 1, 4, 4)}.get(kind, (1, 4))),
    )
    assert found["last"].norm is None
    assert re.search(reason, found["last"].not_covered), found["last"]
    if kind != "called twice":
        assert found["first"].norm == pytest.approx(1.0)


def test_single_step_neurons_in_containers_are_handed_the_steps_in_turn():
    net = seeded(
        lambda: nn.Sequential(
            nn.Linear(4, 5),
            layer.MultiStepContainer(nn.Sequential(neuron.IFNode(), nn.Linear(5, 3))),
            neuron.IFNode(),
        )
    )
    net[2].step_mode = "m"
    found = input_maps(net, torch.rand(1, 4), takes="sequence")
    inner = "1.0.0"
    assert {name: layer.feeds for name, layer in found.items()} == {inner: (INPUT,), "2": (inner,)}
    assert found[inner].norm == pytest.approx(
        float(torch.linalg.matrix_norm(net[0].weight.detach(), 2)), rel=1e-4
    )
    recurrent = layer.LinearRecurrentContainer(neuron.IFNode(), 4, 4, step_mode="m")
    found = input_maps(recurrent, torch.rand(1, 4), takes="sequence")
    assert "not the same map at every time step" in found["sub_module"].not_covered


class Halves(nn.Module):
    """Hands on two tensors in a list."""

    def forward(self, x_seq):
        return list(x_seq.chunk(2, -1))


def difference_of_halves(net, spikes):
    first, second = net.halves(spikes)
    return 3.0 * first - 4.0 * second


def test_a_module_may_hand_on_a_list_a_map_may_be_zero_and_a_layer_used_twice_is_listed_once():
    found = input_maps(Between(difference_of_halves, halves=Halves()), torch.rand(1, 6))["last"]
    assert found.norm == pytest.approx(5.0, rel=1e-4)
    net = Between(lambda n, s: n.linear(s))
    nn.init.zeros_(net.linear.weight)
    assert input_maps(net, torch.rand(1, 4))["last"].norm == 0.0
    net, _ = NOT_LINEAR["called twice"]
    assert list(input_maps(net, torch.rand(1, 4))) == ["first", "last"]


def test_wherever_it_is_called_the_forward_of_the_user_and_full_precision_stay():
    net = nn.Sequential(layer.Linear(4, 3, step_mode="m"), NODE())
    wanted = input_maps(net, torch.rand(1, 4))["1"]
    own = net[1].forward
    net[1].forward = own
    with torch.inference_mode():
        assert input_maps(net, torch.rand(1, 4))["1"] == wanted
    with torch.autocast("cpu", torch.bfloat16):
        assert input_maps(net, torch.rand(1, 4))["1"] == wanted
    assert vars(net[1])["forward"] is own
    with pytest.raises(ValueError, match="must hold a sample"):
        input_maps(net, torch.rand(0, 4))


MEASURED = {
    "input_maps": input_maps,
    "perturbation_gains": lambda net, x: perturbation_gains(net, x, 2, x_perturbed=1 - x),
    "no_flip_radius": lambda net, x: no_flip_radius(SpikingClassifier(net, 2), x).tolist(),
    "smooth": lambda net, x: smooth(
        SpikingClassifier(net, 2), x, 0.1, n0=2, n=2, generator=SampleSeeds([0, 1, 2])
    ),
}


@pytest.mark.parametrize("run", MEASURED.values(), ids=MEASURED)
def test_the_network_is_left_as_it_was(run):
    net = seeded(lambda: build_classifier(NetworkSpec(classes=3, T=2))).net.train()
    functional.reset_net(net)
    net(torch.rand(2, 1, 8, 8))
    net.stages[0].eval()
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with unchanged(net):
        once = run(net, x)
        with torch.no_grad():
            assert run(net, x) == once, "of the same seed"
    assert not any("forward" in vars(module) for module in net.modules())


def test_the_network_is_left_as_it_was_by_an_error():
    net = Between(lambda n, s: n.linear(s[..., :3]))
    with pytest.raises(RuntimeError, match="shape"):
        input_maps(net, torch.rand(1, 4))
    assert net.training
    assert not any("forward" in vars(module) for module in net.modules())
    with pytest.raises(ValueError, match="no SpikingJelly neuron"):
        input_maps(nn.Linear(2, 2), torch.rand(1, 2))


@pytest.mark.parametrize("basis", [3, 48])
def test_lanczos_with_and_without_restarts(basis):
    torch.manual_seed(0)
    matrix = torch.randn(30, 20, dtype=torch.float64)
    products = (lambda v: matrix @ v, lambda u: matrix.T @ u)
    found, stopped = (
        largest_singular_value(
            *products, torch.randn(20).double(), tolerance=1e-6, max_iterations=steps, basis=basis
        )
        for steps in (500, 3)
    )
    assert found.value == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-9)
    assert stopped.iterations == 3
    assert stopped.residual > 1e-6 * stopped.value
    nearest = (torch.linalg.svdvals(matrix) - stopped.value).abs().min()
    assert nearest <= stopped.residual
