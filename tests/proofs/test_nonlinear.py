"""Bounds of operations that are no affine maps: none of their values is outside."""

from itertools import product

import pytest
import torch
from proofs.functions import OPERATIONS, SAMPLES, SHAPE, Function, bounds_of, box, outside
from proofs.networks import in_steps
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

from sj_robust import SpikingClassifier
from sj_robust.proofs import UnsoundBoundsError, nonlinear, program, verify
from sj_robust.proofs.differentiable import DifferentiableBounds
from sj_robust.proofs.rounding import NoBoundsError
from sj_robust.proofs.spiking import Interval

T = 4


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_value_of_a_box_is_outside_the_bounds(name):
    for radius, scale in ((0.0, 1.0), (1e-3, 1.0), (0.5, 1.0), (0.5, 30.0)):
        low, high = box(radius, scale=scale)
        assert outside(OPERATIONS[name], low, high, 40) == 0


@pytest.mark.parametrize("name", OPERATIONS)
def test_bounds_of_one_point_are_as_wide_as_rounding(name):
    low, high = box(0.0)
    least, most = bounds_of(OPERATIONS[name], low, high)
    value = OPERATIONS[name](low).double()
    assert ((least <= value) & (value <= most)).all()
    assert (most - least <= 1e-3 * (1 + value.abs())).all()


def ends(values):
    """The least and the largest of stacked values."""
    stacked = torch.stack(values)
    return stacked.amin(0), stacked.amax(0)


def interval(*shape, above=None):
    """A random one in float64, of values that are at least a number if one is given."""
    middle = torch.randn(shape).double()
    radius = torch.rand(shape).double()
    low, high = middle - radius, middle + radius
    return Interval(low, high) if above is None else Interval(low.abs() + above, low.abs() + 1)


def corners(x):
    """All corners of a small box, each a tensor."""
    flat = torch.stack([x.low.flatten(), x.high.flatten()])
    count = flat.shape[1]
    for choice in product((0, 1), repeat=count):
        yield flat[list(choice), range(count)].view(x.low.shape)


CORNERED = {
    "product": (
        lambda a, b: nonlinear.product(a, b, rounded=False),
        torch.mul,
        [((3,), None), ((3,), None)],
    ),
    "matrix product of values >= 0": (
        lambda a, b: nonlinear.matmul(a, b, rounded=False),
        torch.matmul,
        [((2, 2), 0.0), ((2, 2), 0.0)],
    ),
    "softmax": (
        lambda a: nonlinear.softmax(a, 0, rounded=False),
        lambda a: torch.softmax(a, 0),
        [((5,), None)],
    ),
}
"""Operations that are largest and smallest at corners: bounds, values and arguments."""


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CORNERED)
def test_bounds_are_the_extremes_of_all_corners(name, seed):
    torch.manual_seed(seed)
    bounded, function, shapes = CORNERED[name]
    boxes = [interval(*shape, above=above) for shape, above in shapes]
    found = bounded(*boxes)
    least, most = ends([function(*at) for at in product(*map(corners, boxes))])
    assert torch.allclose(found.low, least, atol=1e-12)
    assert torch.allclose(found.high, most, atol=1e-12)


def test_bounds_of_signed_matrix_products_hold_all_corners():
    torch.manual_seed(0)
    a, b = interval(2, 2), interval(2, 2)
    found = nonlinear.matmul(a, b, rounded=False)
    least, most = ends([left @ right for left, right in product(corners(a), corners(b))])
    assert (found.low <= least + 1e-12).all()
    assert (found.high >= most - 1e-12).all()
    assert (found.high - found.low <= 1.5 * (most - least) + 1e-12).all()


def test_softmax_stays_exact_where_exponentials_vanish():
    x = Interval(torch.tensor([0.0, -50.0, -900.0]).double(), torch.tensor([0.0, -46.0, 0.0]))
    found = nonlinear.softmax(Interval(x.low, x.high.double()), 0, rounded=False)
    assert float(found.low[1]) == pytest.approx(float(torch.tensor(-50.0).double().exp()) / 2)
    assert float(found.low[2]) == 0.0
    assert float(found.high[2]) == pytest.approx(0.5)


class Narrow:
    """Bounds of a function as if its results moved by less than they do."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *args, **kwargs):
        found = self.function(*args, **kwargs)
        if not isinstance(found, Interval):
            return found
        middle = (found.low + found.high) / 2
        return Interval(middle, middle)


FAULTS = {
    "product": ("product", "a result of mul"),
    "matmul": ("matrix product", "a result of matmul"),
    "monotone": ("sigmoid", "a result of sigmoid"),
    "valley": ("square", "a result of square"),
    "softmax": ("softmax over channels", "a result of softmax"),
    "normalised": ("layer norm", "a result of layer_norm"),
    "chosen": ("choice", "a result of where"),
}


class Behind(nn.Module):
    """An operation on images as [T, N, 4, 6], then neurons and logits."""

    def __init__(self, name, width):
        super().__init__()
        self.part = Function(name)
        self.first = layer.Linear(width, 16)
        self.node = neuron.LIFNode(step_mode="m")
        self.last = layer.Linear(16, 3)

    def forward(self, x):
        x = self.part(x.squeeze(2)).flatten(2)
        return self.last(self.node(self.first(x)))


def spiking(name, T=2):
    """A classifier with an operation, and images."""
    torch.manual_seed(0)
    x = torch.rand(SAMPLES, 1, 4, 6)
    width = OPERATIONS[name](torch.rand(SHAPE)).flatten(2).shape[2]
    net = Behind(name, width)
    net.first.weight.data *= 3
    return SpikingClassifier(net, T, takes="sequence").eval(), x


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bound_that_is_too_narrow_is_noticed(fault, monkeypatch):
    name, message = FAULTS[fault]
    model, x = spiking(name)
    y = model(x).argmax(1)
    verify(model, x, y, 0.05, method="ibp")
    monkeypatch.setattr(nonlinear, fault, Narrow(getattr(nonlinear, fault)))
    with pytest.raises(UnsoundBoundsError, match=message):
        verify(model, x, y, 0.05, method="ibp")


@pytest.mark.parametrize("name", ["attention", "gate", "group norm"])
def test_every_method_has_bounds_of_a_network_with_functions(name):
    model, x = spiking(name)
    y = model(x).argmax(1)
    intervals = verify(model, x, y, 0.01, method="ibp").margin
    margins = verify(model, x, y, 0.01, method="joint").margin
    assert all(a >= b - 1e-9 for a, b in zip(margins, intervals, strict=True))


MIXING = {
    "product with other samples": lambda x: x * x.flip(1),
    "attention over samples": lambda x: x.transpose(1, 2) @ x.permute(0, 2, 3, 1),
    "maximum of samples": lambda x: x.max(1, keepdim=True).values + x,
    "softmax over samples": lambda x: torch.softmax(x, 1),
}


@pytest.mark.parametrize("name", MIXING)
def test_functions_of_values_of_several_samples_are_refused(name):
    low, high = box(0.1)
    with pytest.raises(NoBoundsError, match="samples"):
        bounds_of(MIXING[name], low, high)


UNKNOWN = {
    "negative slope": lambda x: torch.nn.functional.leaky_relu(x, -0.1),
    "over several dimensions": lambda x: x.amax((2, 3)),
    "gelu with": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "another constant": lambda x: torch.nn.functional.pad(x, (1, 1), value=1.0),
    "a divisor that depends": lambda x: x / x,
    "alpha or beta": lambda x: torch.addmm(x[0, 0], x[0, 1], torch.ones(6, 6), alpha=2),
}


@pytest.mark.parametrize("message", UNKNOWN)
def test_what_has_no_bounds_is_named(message):
    low, high = box(0.1)
    with pytest.raises(NoBoundsError, match=message):
        bounds_of(UNKNOWN[message], low, high)


BUILT = {
    "PSN": {"T": T},
    "MaskedPSN": {"k": 2, "T": T, "lambda_init": 1.0},
    "SlidingPSN": {"k": 2},
    "KLIFNode": {},
    "GatedLIFNode": {"T": T},
    "CUBALIFNode": {},
    "ILIFNode": {},
    "SLTTLIFNode": {},
}
THERE = [name for name in BUILT if hasattr(neuron, "PSN")]
"""Of the newer release; the older one's KLIF runs TorchScript, which supports no bounds."""
STEP_BY_STEP = ["MaskedPSN", "SlidingPSN", "CUBALIFNode", "ILIFNode"]


def with_neuron(name, step_mode):
    """A network of a neuron between two layers."""
    torch.manual_seed(0)
    node = getattr(neuron, name)(**BUILT[name])
    parts = [layer.Conv2d(1, 6, 3, padding=1), node, layer.Flatten(), layer.Linear(96, 3)]
    parts[0].weight.data *= 6
    model = in_steps(*parts, T=T)
    functional.set_step_mode(model.net, step_mode)
    return model


MODES = [(name, "m") for name in THERE]
SINGLE = [(name, "s") for name in STEP_BY_STEP if name in THERE]
MODES += [pytest.param(*case, marks=pytest.mark.slow) for case in SINGLE]


@pytest.mark.parametrize(("name", "step_mode"), MODES)
def test_neurons_beside_lif_stay_inside_their_bounds(name, step_mode):
    model = with_neuron(name, step_mode)
    x = torch.rand(8, 1, 4, 4)
    with torch.no_grad():
        y = model(x).argmax(1)
    for method in ("ibp", "joint"):
        result = verify(model, x, y, 0.003, method=method)
        drawn = 0.003 * (2 * torch.rand(40, *x.shape) - 1).sign()
        with torch.no_grad():
            for z in (x + drawn).clamp(0, 1):
                lead = leads(model(z), y)
                assert (lead >= torch.tensor(result.margin)).all()


def leads(logits, y):
    right = logits.double().gather(1, y.unsqueeze(1)).squeeze(1)
    return right - logits.double().scatter(1, y.unsqueeze(1), -torch.inf).amax(1)


REFUSED = {} if THERE else {"KLIFNode": "TorchScript function"}
REFUSED |= {
    "QIFNode": "the square of its potential",
    "EIFNode": "an exponential of its potential",
    "TernaryLIFNode": "its spikes have signs",
    "RAFNode": "its potential oscillates",
    "ComplementaryLIFNode": "its second state",
}


@pytest.mark.parametrize("name", [name for name in REFUSED if hasattr(neuron, name)])
def test_other_neurons_are_refused_by_name_with_the_reason(name):
    node = getattr(neuron, name)()
    model = in_steps(nn.Flatten(2), node, layer.Linear(4, 2), T=T)
    message = rf"1 \({name}\): .*{REFUSED[name]}"
    with pytest.raises(NotImplementedError, match=message):
        verify(model, torch.rand(2, 1, 2, 2), torch.tensor([0, 1]), 0.1)


def test_every_reason_is_one_of_a_neuron_of_the_newest_release():
    if not hasattr(neuron, "PSN"):
        pytest.skip("this release of SpikingJelly has none of them")
    names = [*program.NO_BOUNDS, *program.OPEN]
    assert [name for name in names if not hasattr(neuron, name)] == []


class TwoLevels(surrogate.ATan):
    """No step: 2 from 0.5 on."""

    def forward(self, x):
        return (x >= 0).to(x) + (x >= 0.5).to(x)


class Other(nn.Module):
    """Another function in a plain call."""

    def forward(self, x):
        return torch.tanh(x) if type(x) is torch.Tensor else torch.sigmoid(x)


def test_a_network_that_calls_another_function_in_a_plain_call_is_refused():
    parts = (layer.Linear(4, 4), Other(), layer.Linear(4, 2), neuron.IFNode())
    model = in_steps(*parts, T=T)
    with pytest.raises(UnsoundBoundsError, match="calls tanh at .* where it called sigmoid"):
        verify(model, torch.rand(2, 4), torch.tensor([0, 1]), 0.01)


def test_bounds_of_a_step_that_are_too_narrow_are_noticed(monkeypatch):
    torch.manual_seed(0)
    parts = (layer.Linear(4, 64), ByHand(surrogate.ATan()), layer.Linear(64, 2))
    model = in_steps(*parts, T=T)
    x = torch.rand(2, 4)
    y = model(x).argmax(1)
    verify(model, x, y, 0.3, method="ibp")
    monkeypatch.setattr(nonlinear, "steps", Narrow(nonlinear.steps))
    with pytest.raises(UnsoundBoundsError, match="a result of a surrogate"):
        verify(model, x, y, 0.3, method="ibp")


class ByHand(nn.Module):
    """A neuron without a memory, written with a surrogate of the host."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x - 0.5)


def test_a_surrogate_by_itself_is_a_step_and_one_that_is_not_is_refused():
    torch.manual_seed(0)
    x = torch.rand(3, 4)
    for function, found in ((surrogate.ATan(), None), (TwoLevels(), "is not a step at 0")):
        parts = (layer.Linear(4, 16), ByHand(function), layer.Linear(16, 3))
        model = in_steps(*parts, T=T)
        y = model(x).argmax(1)
        if found is None:
            assert any(verify(model, x, y, 1e-4).verified)
            continue
        with pytest.raises(UnsoundBoundsError, match=found):
            verify(model, x, y, 1e-4)


def test_bounds_of_attention_have_a_gradient_for_training():
    model, x = spiking("attention")
    bounds = DifferentiableBounds(model)
    lead = bounds.lead(x, model(x).argmax(1), 0.05)
    lead.sum().backward()
    assert float(model.net.first.weight.grad.abs().sum()) > 0
