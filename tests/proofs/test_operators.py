"""Bounds of operators: none of their values is outside, those of one point are as wide as rounding,
and their gradients are those of what they say.
"""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from proofs.formulas import on_bounds
from proofs.functions import OPERATIONS, SAMPLES, SHAPE, box, folded
from torch import nn
from torch.testing import assert_close

from sj_robust.proofs import nonlinear, rules
from sj_robust.proofs.bounds import BoundedRun
from sj_robust.proofs.program import Record
from sj_robust.proofs.rounding import NoBoundsError
from sj_robust.proofs.spiking import Interval
from sj_robust.proofs.structure import Forms, Structure


def bounds_of(function, low, high, *, differentiable=False):
    """Bounds of a function's results while its argument is in the box."""
    run = BoundedRun({}, SAMPLES, differentiable=differentiable)
    run.dtype = low.dtype
    x = torch.rand(SHAPE).transpose(0, 1)
    run.program = Record(x, {}).program(
        lambda x: function(x.transpose(0, 1)).transpose(0, 1), nn.Identity()
    )
    run.structure = Structure.of(run.program, x, {}, SHAPE[0], forms=Forms())
    with torch.enable_grad():
        box = Interval(low.double(), high.double()).each(lambda end: end.transpose(0, 1))
        found = run.program.run(run.leaf(box, 0), run.apply)
    return found.lower.transpose(0, 1), found.upper.transpose(0, 1)


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_value_of_a_box_is_outside_and_one_point_is_as_wide_as_rounding(name):
    function = OPERATIONS[name]
    drawn = torch.Generator().manual_seed(0)
    for radius, scale in ((0.0, 1.0), (1e-3, 1.0), (0.5, 1.0), (0.5, 30.0)):
        low, high = box(radius, scale=scale)
        least, most = bounds_of(function, low, high)
        for number in range(40 if radius else 1):
            share = torch.rand(low.shape, generator=drawn)
            if number % 2:
                share = share.round()
            value = function((low + (high - low) * share).clamp(low, high)).double()
            assert ((least <= value) & (value <= most)).all()
        if not radius:
            assert (most - least <= 1e-3 * (1 + value.abs())).all()


JUMPS = {"iand", "comparison"}


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in JUMPS])
def test_gradients_of_bounds_are_their_slopes(name):
    """Along a random direction, in float64, for ends that both move."""
    function = OPERATIONS[name]
    low, high = box(0.1)
    low, high = low.double() - 0.01, high.double() + 0.01
    generator = torch.Generator().manual_seed(1)
    along = torch.randn(low.shape, generator=generator).double()

    def total(low, high):
        ends = torch.stack(bounds_of(function, low, high, differentiable=True))
        weights = torch.randn(ends.shape, generator=torch.Generator().manual_seed(2)).double()
        return (ends * weights).sum()

    given = low.requires_grad_(), high.requires_grad_()
    of_low, of_high = torch.autograd.grad(total(*given), given)
    slope = (total(low + 1e-6 * along, high) - total(low - 1e-6 * along, high)) / 2e-6
    assert_close((of_low * along).sum(), slope, rtol=1e-4, atol=1e-4)
    slope = (total(low, high + 1e-6 * along) - total(low, high - 1e-6 * along)) / 2e-6
    assert_close((of_high * along).sum(), slope, rtol=1e-4, atol=1e-4)


EYE = torch.eye(2)
A, B = torch.tensor([[1.5, -0.5, 0.3, -2.0], [-0.7, 0.2, 3.0, 1.1]]).double()
AFFINE = {
    "batch norm": lambda x: F.batch_norm(x, A, B.abs() + 0.1, 3 * B, A),
    "batch norm alone": lambda x: F.batch_norm(x, A, B.abs() + 0.1),
    "convolution": lambda x: F.conv2d(x, A.view(2, 2, 1, 1), B[:2], groups=2),
    "linear": lambda x: F.linear(x, B.view(1, 4), A[:1]),
    "average": lambda x: F.avg_pool2d(F.adaptive_avg_pool2d(x, (2, 4)), (2, 1)),
    "means": lambda x: x.mean(1, True).sum(-1) / -3.0,
    "sums": lambda x: 1.0 - (2.0 - x[:, :2]) * A + (-x[:, 2:]) / B,
}


@pytest.mark.parametrize("name", AFFINE)
def test_an_affine_map_spreads_a_box_by_its_absolute_values(name):
    centre = torch.randn(1, 4, 4, 4).double()
    radius = torch.rand(1, 4, 4, 4).double()
    found = on_bounds(AFFINE[name], rules.Bounds(centre, radius))
    jacobian = torch.autograd.functional.jacobian(AFFINE[name], centre)
    assert_close(found.centre, AFFINE[name](centre))
    expected = (jacobian.abs() * radius).sum((-4, -3, -2, -1))
    assert_close(found.radius, expected)


IMAGES = torch.rand(3, 1, 8, 8).double()
ALIKE = {
    "pooling without channels": (lambda x: F.avg_pool2d(x.squeeze(1), 4).unsqueeze(1), 4),
    "pooling with one side given": (lambda x: F.avg_pool2d(x, (4,)), 4),
    "adaptive pooling without channels": (
        lambda x: F.adaptive_avg_pool2d(x.squeeze(1), 1).unsqueeze(1),
        8,
    ),
    "a vector as weight": (
        lambda x: F.linear(x.flatten(2), torch.full((64,), 1 / 64)).view(3, 1, 1, 1),
        8,
    ),
}
"""Averages in other words, and the sides of what they average."""


@pytest.mark.parametrize("name", ALIKE)
def test_rounding_counts_all_terms_of_an_average(name):
    function, side = ALIKE[name]
    given = rules.Bounds(IMAGES, torch.zeros_like(IMAGES))
    found = on_bounds(function, given, torch.float32)
    expected = on_bounds(lambda x: F.avg_pool2d(x, side), given, torch.float32)
    assert_close(found.error, expected.error, rtol=1e-2, atol=0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_number_in_float64_is_one_of_float32_beside_values_of_the_network(sign):
    x = torch.full((1,), -sign * 0.1)
    number = torch.tensor(sign * 0.1, dtype=torch.float64)
    found = on_bounds(
        lambda x: x + number, rules.Bounds(x.double(), torch.zeros(1).double()), x.dtype
    )
    assert found.lower <= x + number <= found.upper


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
    "product": (nonlinear.product, torch.mul, [((3,), None)] * 2, 1.0),
    "matrix product of values >= 0": (nonlinear.matmul, torch.matmul, [((2, 2), 0.0)] * 2, 1.0),
    "matrix product": (nonlinear.matmul, torch.matmul, [((2, 2), None)] * 2, 1.5),
    "softmax": (
        lambda a, **given: nonlinear.softmax(a, 0, **given),
        lambda a: torch.softmax(a, 0),
        [((5,), None)],
        1.0,
    ),
}
"""Operations that are largest and smallest at corners: bounds, values, arguments and how much wider
bounds may be.
"""


@pytest.mark.parametrize("name", CORNERED)
def test_bounds_are_the_extremes_of_all_corners(name):
    torch.manual_seed(0)
    bounded, function, shapes, wider = CORNERED[name]
    for _ in range(3):
        boxes = [interval(*shape, above=above) for shape, above in shapes]
        found = bounded(*boxes, rounded=False)
        values = torch.stack([function(*at) for at in product(*map(corners, boxes))])
        least, most = values.amin(0), values.amax(0)
        assert (found.low <= least + 1e-12).all()
        assert (found.high >= most - 1e-12).all()
        assert (found.high - found.low <= wider * (most - least) + 1e-12).all()


def test_softmax_stays_exact_where_exponentials_vanish():
    low = torch.tensor([0.0, -50.0, -900.0]).double()
    found = nonlinear.softmax(Interval(low, torch.tensor([0.0, -46.0, 0.0])), 0, rounded=False)
    assert float(found.low[1]) == pytest.approx(float(low[1].exp()) / 2)
    assert float(found.low[2]) == 0.0
    assert float(found.high[2]) == pytest.approx(0.5)


REFUSED = {
    "product with other samples": (lambda x: x * x.flip(1), "samples"),
    "attention over samples": (lambda x: x.transpose(1, 2) @ x.permute(0, 2, 3, 1), "samples"),
    "maximum of samples": (lambda x: x.max(1, keepdim=True).values + x, "samples"),
    "softmax over samples": (lambda x: torch.softmax(x, 1), "samples"),
    "leaky relu": (lambda x: F.leaky_relu(x, -0.1), "negative slope"),
    "maximum": (lambda x: x.amax((2, 3)), "over several dimensions"),
    "gelu": (lambda x: F.gelu(x, approximate="tanh"), "gelu with"),
    "pad": (lambda x: F.pad(x, (1, 1), value=1.0), "another constant"),
    "quotient": (lambda x: x / x, "a divisor that depends"),
    "addmm": (
        lambda x: torch.addmm(torch.ones(2, 1), torch.ones(2, 2), x.flatten(1), alpha=2).view(
            x.shape
        ),
        "alpha or beta",
    ),
    "baddbmm": (
        folded(lambda x: torch.baddbmm(torch.zeros(4, 4), x, x.transpose(1, 2))),
        "two values that depend on the input",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_bounds_is_named(name):
    function, message = REFUSED[name]
    assert function(torch.rand(SHAPE)) is not None
    with pytest.raises(NoBoundsError, match=message):
        bounds_of(function, *box(0.1))
