"""Norms of the maps between spiking layers against dense singular values."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
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
from sj_robust.proofs import no_flip_radius, smooth
from sj_robust.proofs.gains import _affine, perturbation_gains
from sj_robust.proofs.gains._lanczos import largest_singular_value
from sj_robust.proofs.gains.operator import INPUT, input_maps

NODE = partial(neuron.LIFNode, step_mode="m")


def dense(function, shape, dtype=torch.float64):
    """Largest singular value of an affine function of a tensor, from its matrix."""
    zero = torch.zeros(shape, dtype=dtype)
    columns = []
    with torch.no_grad():
        constant = function(zero)
        for unit in torch.eye(zero.numel(), dtype=dtype):
            column = function(unit.view(shape)) - constant
            columns.append(column.flatten())
    matrix = torch.stack(columns)
    return float(torch.linalg.matrix_norm(matrix, 2))


def with_statistics(norm):
    norm.weight.data.uniform_(0.5, 2.0)
    norm.bias.data.uniform_(-1.0, 1.0)
    norm.running_mean.uniform_(-1.0, 1.0)
    norm.running_var.uniform_(0.5, 4.0)
    return norm


def seeded(build):
    torch.manual_seed(0)
    return build()


def all_in_a_row():
    return nn.Sequential(
        layer.Conv2d(2, 4, 3, padding=1),
        with_statistics(layer.BatchNorm2d(4)),
        layer.AvgPool2d(2),
        layer.Flatten(),
        layer.Linear(4 * 2 * 2, 5),
    )


@dataclass(frozen=True)
class Kind:
    """A layer between two spiking ones, and the shape of its input."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


KINDS = {
    "stride and padding": Kind(
        build=lambda: layer.Conv2d(2, 3, 3, stride=2, padding=1),
        shape=(2, 7, 6),
    ),
    "circular padding": Kind(
        build=lambda: layer.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
        shape=(2, 5, 5),
    ),
    "groups and dilation": Kind(
        build=lambda: layer.Conv2d(4, 4, 3, groups=2, dilation=2, padding=2),
        shape=(4, 6, 6),
    ),
    "transposed": Kind(
        build=lambda: layer.ConvTranspose2d(2, 3, 2, stride=2),
        shape=(2, 3, 3),
    ),
    "one dimension": Kind(
        build=lambda: layer.Conv1d(2, 3, 3, padding=1),
        shape=(2, 9),
    ),
    "linear": Kind(
        build=lambda: layer.Linear(7, 9),
        shape=(7,),
    ),
    "average pooling": Kind(
        build=lambda: layer.AvgPool2d(3, stride=2, padding=1),
        shape=(2, 6, 6),
    ),
    "adaptive average pooling": Kind(
        build=lambda: layer.AdaptiveAvgPool2d(3),
        shape=(2, 7, 7),
    ),
    "batch norm": Kind(
        build=lambda: with_statistics(layer.BatchNorm2d(3)),
        shape=(3, 3, 3),
    ),
    "dropout": Kind(
        build=lambda: layer.Dropout(0.5),
        shape=(5,),
    ),
    "all in a row": Kind(
        build=all_in_a_row,
        shape=(2, 4, 4),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_against_dense_singular_values(kind):
    shape = KINDS[kind].shape
    between = seeded(KINDS[kind].build).double()
    net = nn.Sequential(
        NODE(),
        between,
        NODE(),
        layer.Flatten(),
    )
    functional.set_step_mode(net, "m")
    frame = torch.rand(1, *shape, dtype=torch.float64)
    found = input_maps(net, frame)
    first = found["0"]
    assert first.feeds == (INPUT,)
    assert first.norm == pytest.approx(1.0)
    assert first.residual == pytest.approx(0)
    assert first.iterations == 1
    second = found["2"]
    wanted = dense(between.eval(), (1, 1, *shape))
    assert second.feeds == ("0",)
    assert not second.upper_bound
    assert second.norm == pytest.approx(wanted, rel=1e-4)
    assert second.norm <= wanted * (1 + 1e-9), "approached from below"
    assert second.residual <= 1e-4 * second.norm


class Residual(nn.Module):
    """Two spiking layers feed the third one, the second through two paths."""

    def __init__(self):
        super().__init__()
        self.first = NODE()
        self.second = NODE()
        self.third = NODE()
        self.a = layer.Conv2d(2, 2, 3, padding=1, step_mode="m")
        self.b = layer.Conv2d(2, 2, 1, step_mode="m")
        self.weights = nn.Parameter(torch.tensor([0.5, 3.0]))

    def join(self, first, second):
        total = self.weights[0] * first
        total += self.weights[1] * self.b(second)
        return self.a(total + second) - first

    def forward(self, x):
        first = self.first(x)
        second = self.second(self.b(first))
        return self.third(self.join(first, second))


def test_residual_sum_is_the_stacked_map():
    net = seeded(Residual).double()
    frame = torch.rand(1, 2, 4, 4, dtype=torch.float64)
    found = input_maps(net, frame)
    assert list(found) == ["first", "second", "third"]
    assert found["first"].feeds == (INPUT,)
    assert found["second"].feeds == ("first",)
    assert found["third"].feeds == ("first", "second")

    def join(pair):
        return net.join(pair[:1], pair[1:])

    wanted = dense(join, (2, 1, 2, 4, 4))
    assert found["third"].norm == pytest.approx(wanted, rel=1e-4)


def two_stages():
    return nn.Sequential(
        layer.Conv2d(1, 3, 3),
        with_statistics(layer.BatchNorm2d(3)),
        DLIFNode(T=1),
        layer.Conv2d(3, 2, 3),
        with_statistics(layer.BatchNorm2d(2)),
        DLIFNode(T=1),
    )


def test_single_step_mode_and_fused_batch_norm_give_the_same_norms():
    net = seeded(two_stages)
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
    assert fused["1.node"].norm == multi["2"].norm
    assert fused["4.node"].norm == multi["5"].norm


@pytest.mark.parametrize(
    ("pooling", "windows"),
    [
        (layer.MaxPool2d(2), 1),
        (layer.MaxPool2d(3, stride=2, padding=1), 4),
        (layer.MaxPool2d(3, stride=1), 9),
        (layer.MaxPool2d((1, 4), stride=(1, 3)), 2),
        (layer.MaxPool2d(2, stride=2, dilation=2), 4),
        (layer.MaxPool2d(2, stride=1, dilation=3), 4),
        (nn.AdaptiveMaxPool2d(3), 4),
        (nn.MaxPool1d(3, stride=2), 2),
    ],
    ids=str,
)
def test_max_pooling_is_lipschitz_by_its_windows(pooling, windows):
    shape = (2, 7) if isinstance(pooling, nn.MaxPool1d) else (2, 7, 7)
    x = torch.rand(shape).double()
    y = torch.rand(shape).double()
    output = pooling(x)
    assert _affine.windows_per_input(pooling, x, output) == windows
    moved = output - pooling(y)
    assert moved.norm() <= windows**0.5 * (x - y).norm()
    # Reached: one value above all others is the largest of every window it lies in.
    reached = 0.0
    zeros = torch.zeros_like(x[1:])
    for spot in torch.eye(x[0].numel(), dtype=torch.float64):
        peak = torch.cat((spot.view_as(x[:1]), zeros))
        reached = max(reached, float(pooling(peak).norm()))
    assert reached == pytest.approx(windows**0.5)


class Pooled(nn.Module):
    """One pooling module used twice, once beside a path around it."""

    def __init__(self):
        super().__init__()
        self.first = NODE()
        self.second = NODE()
        self.third = NODE()
        self.conv = layer.Conv2d(2, 2, 3, padding=1, step_mode="m")
        self.pool = layer.MaxPool2d(3, stride=1, padding=1, step_mode="m")

    def forward(self, x):
        second = self.second(self.before_second(self.first(x)))
        return self.third(self.pool(second) + second)

    def before_second(self, spikes):
        pooled = self.pool(self.conv(spikes))
        return self.conv(pooled)


def test_max_pooling_gives_a_labelled_upper_bound():
    net = seeded(Pooled).double()
    frame = torch.rand(1, 2, 5, 5, dtype=torch.float64)
    found = input_maps(net, frame)
    conv = dense(net.conv, (1, 1, 2, 5, 5))
    assert list(found) == ["first", "second", "third"]
    seen = [layer.upper_bound for layer in found.values()]
    assert seen == [False, True, True]
    assert found["second"].norm == pytest.approx(3 * conv**2, rel=1e-3)
    assert found["third"].norm == pytest.approx(3 + 1, rel=1e-3)  # ||[I, sqrt(3) I]|| sqrt(1 + 3)
    for _ in range(20):
        a, b = torch.rand(2, 1, 1, 2, 5, 5).double().round()
        moved = net.before_second(a) - net.before_second(b)
        expected = found["second"].norm * (a - b).norm()
        assert moved.norm() <= expected


@pytest.mark.slow
def test_zoo_resnet_joins_the_blocks_before():
    build = partial(sew_resnet.sew_resnet18, spiking_neuron=NODE, cnf="ADD", num_classes=3)
    net = seeded(build).eval()
    functional.set_step_mode(net, "m")
    frame = torch.rand(1, 3, 32, 32)
    found = input_maps(net, frame, tolerance=1e-2)
    assert len(found) == 20
    joined = found["layer1.1.sn1"]
    assert joined.feeds == ("sn1", "layer1.0.sn2")
    assert joined.upper_bound
    of_three = found["layer3.0.sn1"]
    assert of_three.feeds == ("layer2.0.sn2", "layer2.0.downsample_sn", "layer2.1.sn2")
    assert not of_three.upper_bound
    block = net.layer3[0]

    def before(x):
        return block.bn1(block.conv1(x))

    one = dense(before, (1, 1, 128, 4, 4), torch.float32)
    assert of_three.norm == pytest.approx(3**0.5 * one, rel=1e-2), "three inputs are added"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "layers"),
    [({"name": "vgg5", "hidden": (8,)}, 4), ({"name": "wrn16_4"}, 13)],
)
def test_our_models_are_covered(options, layers):
    spec = NetworkSpec(
        image_shape=(3, 8, 8),
        classes=3,
        T=4,
        **options,
    )
    net = build_classifier(spec).net
    found = input_maps(net, torch.rand(1, 3, 8, 8), tolerance=1e-2)
    assert len(found) == layers
    for one in found.values():
        assert one.norm is not None
        assert one.norm > 0
    if options["name"] == "wrn16_4":
        before = ("stages.0.activation.node", "stages.0.residual.1.node")
        assert found["stages.1.activation.node"].feeds == before


class Between(nn.Module):
    """A spiking layer, something, and another spiking layer."""

    def __init__(self, something, **modules):
        super().__init__()
        self.first = NODE()
        self.last = NODE()
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
        before = self.last
        self.last = x
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


def attention(net, spikes):
    mixed = [net.mix(x, x, x)[0] for x in spikes]
    return torch.stack(mixed)


def with_memory(net, spikes):
    return torch.stack([net.memory(x) for x in spikes])


@dataclass(frozen=True)
class NotLinear:
    """What stands between two spiking layers, and what is said of it."""

    something: Callable
    reason: str
    modules: dict[str, nn.Module] = field(default_factory=dict)
    shape: tuple[int, ...] = (1, 4)

    def network(self):
        return Between(self.something, **self.modules)


NOT_LINEAR = {
    "relu": NotLinear(
        something=lambda n, s: n.relu(n.linear(s)),
        reason="not affine in layer first.*relu .ReLU",
        modules={"relu": nn.ReLU()},
    ),
    "attention": NotLinear(
        something=attention,
        reason="not affine in layer first.*mix .MultiheadAttention.*operation softmax",
        modules={"mix": nn.MultiheadAttention(4, 2, batch_first=True)},
        shape=(1, 5, 4),
    ),
    "product": NotLinear(
        something=lambda n, s: n.linear(s) * s,
        reason="not affine.*operation mul",
    ),
    "inverted product": NotLinear(
        something=lambda n, s: s * (1.0 - n.linear(s)),
        reason="not affine.*operation mul",
    ),
    "dropout that stays on": NotLinear(
        something=lambda n, s: nn.functional.dropout(n.linear(s)),
        reason="not affine.*operation",
    ),
    "hidden threshold": NotLinear(
        something=lambda n, s: n.linear(s) + (s > 0.3).float(),
        reason="not affine",
    ),
    "cut off": NotLinear(
        something=lambda n, s: n.linear(s).detach(),
        reason="neither a spiking layer nor the input",
    ),
    "half cut off": NotLinear(
        something=lambda n, s: n.linear(s) + s.detach(),
        reason="not affine",
    ),
    "flat beyond a range": NotLinear(
        something=lambda n, s: s.clamp(-20, 20),
        reason="not affine.*clamp",
    ),
    "functional max pooling": NotLinear(
        something=lambda n, s: nn.functional.max_pool1d(s, 2),
        reason="maxpool",
    ),
    "not a number": NotLinear(
        something=lambda n, s: n.linear(s).log(),
        reason="not affine.*log",
    ),
    "called twice": NotLinear(
        something=lambda n, s: n.first(n.linear(s)),
        reason="first is called 2 times",
    ),
    "memory of its own": NotLinear(
        something=with_memory,
        reason="not the same map at every time step",
        modules={"memory": Recurrent()},
    ),
    "once differentiable": NotLinear(
        something=lambda n, s: n.linear(Once.apply(s)),
        reason="cannot be differentiated",
    ),
    "before a pooling": NotLinear(
        something=lambda n, s: n.pool(s.relu()),
        reason="the max pooling pool before it: not affine",
        modules={"pool": layer.MaxPool2d(2, step_mode="m")},
        shape=(1, 1, 4, 4),
    ),
    "mixes time steps": NotLinear(
        something=lambda n, s: s + s.flip(0),
        reason="not the same map at every time step",
    ),
}


@pytest.mark.parametrize("kind", NOT_LINEAR)
def test_what_is_not_linear_is_named_and_not_covered(kind):
    case = NOT_LINEAR[kind]
    found = input_maps(case.network(), torch.rand(case.shape))
    last = found["last"]
    assert last.norm is None
    assert re.search(case.reason, last.not_covered), last
    if kind != "called twice":
        assert found["first"].norm == pytest.approx(1.0)


def test_single_step_neurons_in_containers_are_handed_the_steps_in_turn():
    torch.manual_seed(0)
    inner = nn.Sequential(neuron.IFNode(), nn.Linear(5, 3))
    container = layer.MultiStepContainer(inner)
    net = nn.Sequential(
        nn.Linear(4, 5),
        container,
        neuron.IFNode(step_mode="m"),
    )
    found = input_maps(net, torch.rand(1, 4), takes="sequence")
    assert list(found) == ["1.0.0", "2"]
    assert found["1.0.0"].feeds == (INPUT,)
    assert found["2"].feeds == ("1.0.0",)
    wanted = torch.linalg.matrix_norm(net[0].weight.detach(), 2)
    assert found["1.0.0"].norm == pytest.approx(float(wanted), rel=1e-4)
    recurrent = layer.LinearRecurrentContainer(neuron.IFNode(), 4, 4, step_mode="m")
    found = input_maps(recurrent, torch.rand(1, 4), takes="sequence")
    assert "not the same map at every time step" in found["sub_module"].not_covered


class Skipping(nn.Module):
    """A residual sum with spikes of earlier steps."""

    def __init__(self, steps, step_mode):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 5), neuron.IFNode(step_mode=step_mode))
        self.delay = layer.Delay(steps, step_mode=step_mode)
        self.last = nn.Sequential(nn.Linear(5, 4), neuron.IFNode(step_mode=step_mode))

    def forward(self, x):
        spikes = self.first(x)
        return self.last(spikes + self.delay(spikes))


@pytest.mark.parametrize("step_mode", ["m", "s"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_spikes_of_any_earlier_step_are_seen(steps, step_mode):
    torch.manual_seed(0)
    net = Skipping(steps, step_mode)
    certificate = perturbation_gains(SpikingClassifier(net, T=6), torch.rand(8, 6))
    assert certificate["first.1"].not_covered is None
    assert "not the same map at every time step" in certificate["last.1"].not_covered
    takes = "sequence" if step_mode == "m" else "steps"
    assert input_maps(net, torch.rand(1, 6), takes=takes)["last.1"].not_covered is not None


class ByStep(nn.Module):
    """Has a weight for each of four steps."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x_seq):
        return self.weight * x_seq.reshape(4, -1, 5)


def test_a_network_that_does_not_run_for_one_step_is_refused():
    net = nn.Sequential(nn.Linear(6, 5), ByStep(), neuron.IFNode(step_mode="m"))
    with pytest.raises(ValueError, match="for one time step and for 4, got an error for 1"):
        perturbation_gains(SpikingClassifier(net, T=4, takes="sequence"), torch.rand(8, 6))


class Halves(nn.Module):
    """Hands on two tensors in a list."""

    def forward(self, x_seq):
        return list(x_seq.chunk(2, -1))


def difference_of_halves(net, spikes):
    first, second = net.halves(spikes)
    return 3.0 * first - 4.0 * second


def test_a_module_may_hand_on_a_list_a_map_may_be_zero_and_a_layer_used_twice_is_listed_once():
    net = Between(difference_of_halves, halves=Halves())
    found = input_maps(net, torch.rand(1, 6))["last"]
    assert found.norm == pytest.approx(5.0, rel=1e-4)
    net = Between(lambda n, s: n.linear(s))
    nn.init.zeros_(net.linear.weight)
    found = input_maps(net, torch.rand(1, 4))["last"]
    assert found.norm == 0.0
    net = NOT_LINEAR["called twice"].network()
    found = input_maps(net, torch.rand(1, 4))
    assert list(found) == ["first", "last"]


def test_wherever_it_is_called_the_forward_of_the_user_and_full_precision_stay():
    net = nn.Sequential(layer.Linear(4, 3, step_mode="m"), NODE())
    frame = torch.rand(1, 4)
    wanted = input_maps(net, frame)
    own = net[1].forward
    net[1].forward = own
    with torch.inference_mode():
        assert input_maps(net, frame) == wanted
    with torch.autocast("cpu", torch.bfloat16):
        assert input_maps(net, frame) == wanted
    assert vars(net[1])["forward"] is own
    with pytest.raises(ValueError, match="must hold a sample"):
        input_maps(net, torch.rand(0, 4))


def gains_of(net, x):
    return perturbation_gains(net, x, 2, x_perturbed=1 - x)


def radii_of(net, x):
    return no_flip_radius(SpikingClassifier(net, 2), x).tolist()


def smoothed(net, x):
    model = SpikingClassifier(net, 2)
    return smooth(model, x, 0.1, n0=2, n=2, generator=SampleSeeds([0, 1, 2]))


@pytest.mark.parametrize("run", [input_maps, gains_of, radii_of, smoothed])
def test_the_network_is_left_as_it_was(run):
    torch.manual_seed(0)
    net = build_classifier(NetworkSpec(classes=3, T=2)).net.train()
    functional.reset_net(net)
    net(torch.rand(2, 1, 8, 8))
    net.stages[0].eval()
    x = torch.rand(3, 1, 8, 8)
    with unchanged(net):
        once = run(net, x)
        with torch.no_grad():
            assert run(net, x) == once, "of the same seed"
    assert not has_own_forward(net)


def has_own_forward(net):
    return any("forward" in vars(module) for module in net.modules())


def test_the_network_is_left_as_it_was_by_an_error():
    net = Between(lambda n, s: n.linear(s[..., :3]))
    with pytest.raises(ValueError, match="the network's own shape"):
        input_maps(net, torch.rand(1, 4))
    assert net.training
    assert not has_own_forward(net)


@pytest.mark.parametrize("basis", [3, 48])
def test_lanczos_with_and_without_restarts(basis):
    torch.manual_seed(0)
    matrix = torch.randn(30, 20, dtype=torch.float64)

    def largest(max_iterations):
        return largest_singular_value(
            lambda v: matrix @ v,
            lambda u: matrix.T @ u,
            start=torch.randn(20).double(),
            tolerance=1e-6,
            max_iterations=max_iterations,
            basis=basis,
        )

    found = largest(500)
    values = torch.linalg.svdvals(matrix)
    assert found.value == pytest.approx(float(values[0]), rel=1e-9)
    stopped = largest(3)
    assert stopped.iterations == 3
    assert stopped.residual > 1e-6 * stopped.value
    nearest = (values - stopped.value).abs().min()
    assert nearest <= stopped.residual
