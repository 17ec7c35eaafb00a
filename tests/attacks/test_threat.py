"""The one representation of norm and radius: what it allows, how it measures, and how it is
written.
"""

from fractions import Fraction

import pytest
import torch
from attacks.table import seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from sj_robust.attacks import ThreatModel
from sj_robust.core.eps import eps_text, parse_eps
from sj_robust.core.threat import linf_bounds, project_l2

GREY = torch.full((1, 1, 3, 3), 0.5, dtype=torch.float64)
LABEL = torch.tensor([0])
THREATS = [ThreatModel("Linf", 0.1), ThreatModel("L2", 0.7), ThreatModel("L0", 5)]


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_what_is_projected_is_within_the_radius(threat):
    generator = seeded(0)
    x, x_adv = torch.rand(2, 20, 3, 4, generator=generator)
    x_adv[0] = x[0]
    projected = threat.project(x, 2 * x_adv - 0.5)
    distance = threat.distance(x, projected)
    assert (distance <= threat.eps * (1 + 1e-12)).all()
    assert (
        float(distance[1:].min()) > 0.9 * threat.eps or threat.norm == "L2"
    )  # which the box may shorten
    assert threat.contains(x, projected).all()
    assert not threat.contains(x, x_adv)[1:].any()
    assert torch.equal(threat.project(x, projected), projected)
    if threat.norm == "L2":
        assert torch.equal(projected, project_l2(2 * x_adv - 0.5, x, eps=threat.eps))


def test_few_changes_are_the_largest_and_the_first_of_equals():
    x = torch.tensor([[0.5, 0.5, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    x_adv = torch.tensor([[0.6, 0.1, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    few = ThreatModel("L0", 2).project(x, x_adv)
    expected = torch.tensor([[0.5, 0.1, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]])
    torch.testing.assert_close(few, expected)


def test_distances_by_hand():
    x = torch.zeros(1, 4)
    x_adv = torch.tensor([[0.0, 0.3, 0.4, 0.0]])
    found = [float(ThreatModel(norm, 1).distance(x, x_adv)) for norm in ("Linf", "L2", "L0")]
    assert found == pytest.approx([0.4, 0.5, 2])
    assert [bool(ThreatModel("L0", few).contains(x, x_adv)) for few in (1, 2)] == [False, True]


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize(
    ("dtype", "allowed"),
    [
        (torch.float64, 1e-6),
        (torch.float32, 1e-6 + 2**-22),
        (torch.bfloat16, 1e-6 + 2**-6),
    ],
)
def test_an_element_may_be_off_by_a_millionth_and_two_units_of_its_type(norm, dtype, allowed):
    """Distances are measured in float64, so that those of a wider type can be tested, too."""
    x = torch.full((1, 9), 0.5, dtype=dtype)
    eps = 0.125 if norm == "Linf" else 3 * 0.125
    for far, within in ((0.9, True), (1.1, False), (1.5, False)):
        moved = x.double() + 0.125 + far * allowed
        assert ThreatModel(norm, eps).contains(x, moved).item() is within


RADII = [
    8 / 255,
    1 / 255,
    0.1,
    0.3,
    0.5,
    16 / 255,
    2.55 / 255,
    1 / 3,
    0.123456789,
    0.0,
    1.0,
    20,
    12345,
    10**7,
]


def test_radii_survive_as_text_as_the_field_writes_them():
    assert [parse_eps(eps_text(eps)) for eps in RADII] == RADII
    texts = [
        eps_text(eps)
        for eps in (
            8 / 255,
            100 / 255,
            0.1,
            0.031,
            2.5 / 255,
            20,
        )
    ]
    assert texts == ["8/255", "100/255", "0.1", "0.031", "2.5/255", "20"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1.0, 5.0])
@pytest.mark.parametrize("counts", [False, True])
def test_values_that_are_no_events_are_outside_and_projected_inside(value, counts):
    threat = ThreatModel("L0", 1, counts=counts)
    x = torch.zeros(2, 3, 2, 2, 2)
    x_adv = x.clone()
    x_adv[0, 0, 0, 0, 0] = value
    assert threat.contains(x, x_adv).tolist() == [False, True]
    inside = threat.project(x, x_adv)
    assert threat.contains(x, inside).all()
    assert inside.isfinite().all()
    assert inside[0].sum() == (value > 0)


MOVES = ThreatModel("moves", 3, largest_shift=2, total_shift=4)


@pytest.mark.parametrize(
    ("threat", "other", "whole"),
    [
        (THREATS[0], THREATS[0], True),
        (THREATS[0], ThreatModel("Linf", 0.05), True),
        (THREATS[0], ThreatModel("Linf", 0.2), False),
        (THREATS[0], ThreatModel("L2", 0.05), False),
        (MOVES, ThreatModel("moves", 2, largest_shift=1, total_shift=4), True),
        (MOVES, ThreatModel("moves", 3, largest_shift=2), False),
        (MOVES, ThreatModel("moves", 3, total_shift=4), False),
        (MOVES, ThreatModel("moves", 3, 2, 4, counts=True), False),
        (ThreatModel("moves", 3), MOVES, True),
    ],
)
def test_a_threat_includes_another_if_none_of_its_limits_is_narrower(threat, other, whole):
    assert threat.includes(other) == whole


def test_a_projection_of_counts_is_the_nearest_sample_of_the_ball():
    for seed in range(20):
        x = torch.randint(0, 4, (5, 6), generator=seeded(seed)).float()
        wanted = x + torch.randint(-5, 6, x.shape, generator=seeded(seed + 100))
        threat = ThreatModel("L0", 1 + seed % 7, counts=True)
        found = threat.project(x, wanted)
        assert threat.contains(x, found).all()
        assert threat.holds_events(found).all()
        reachable = wanted.clamp(min=0)
        left = (found - reachable).abs().sum(1)
        distance = (reachable - x).abs().sum(1)
        assert torch.equal(left, (distance - threat.eps).clamp(min=0))


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
EDGES = [
    0.0,
    -0.0,
    1.0,
    1e-30,
    0.5,
    1 - 2**-20,
    2**-24,
]


def images(
    seed: int,
    dtype: torch.dtype,
    n: int = 3,
    features: int = 50,
) -> torch.Tensor:
    x = torch.rand(n, features, generator=seeded(seed)).to(dtype)
    x[:, : len(EDGES)] = torch.tensor(EDGES).to(dtype)
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=25, deadline=None)
@given(eps=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_linf_bounds_are_the_outermost_numbers_of_the_dtype_inside_the_ball(dtype, eps, seed):
    x = images(seed, dtype)
    lower, upper = linf_bounds(x, eps=eps)
    assert lower.dtype == upper.dtype == dtype
    # The ball is that of the largest radius the dtype can hold, so that a distance measured in it
    # obeys eps as well.
    radius = torch.tensor(eps, dtype=dtype)
    if Fraction(radius.item()) > Fraction(eps):
        radius = torch.nextafter(radius, torch.zeros_like(radius))
    limit = Fraction(radius.item())
    for bound, outwards, box in ((lower, -1.0, 0.0), (upper, 2.0, 1.0)):
        beyond = torch.nextafter(bound, torch.full_like(bound, outwards))
        for centre, value, next_value in zip(
            *(t.flatten().tolist() for t in (x, bound, beyond)), strict=True
        ):
            slack = Fraction(2, 10**16) if dtype == torch.float64 else 0
            assert abs(Fraction(value) - Fraction(centre)) <= limit + slack
            assert 0 <= value <= 1
            # Not more than one further number fits: the bound is tight up to the rounding itself.
            gap = abs(Fraction(next_value) - Fraction(value))
            assert value == box or abs(Fraction(value) - Fraction(centre)) + 2 * gap > limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=25, deadline=None)
@given(
    eps=st.sampled_from([0.0, 1e-6, 0.05, 0.5, 3.0, 100.0]),
    scale=st.sampled_from([0.0, 1e-4, 0.1, 10.0]),
    seed=st.integers(0, 10**6),
)
def test_l2_projection_against_float64(dtype, eps, scale, seed):
    x = images(seed, dtype)
    step = scale * torch.randn(x.shape, generator=seeded(seed))
    moved = (x.float() + step).to(dtype)
    x_adv = project_l2(moved, x, eps=eps)
    assert x_adv.dtype == dtype
    assert (x_adv >= 0).all()
    assert (x_adv <= 1).all()
    for row, centre, before in zip(x_adv.tolist(), x.tolist(), moved.tolist(), strict=True):
        assert sum((r - c) ** 2 for r, c in zip(row, centre, strict=True)) ** 0.5 <= eps * (
            1 + 1e-12
        )
        delta = [b - c for b, c in zip(before, centre, strict=True)]
        length = sum(d * d for d in delta) ** 0.5
        shrink = 1.0 if length <= eps else eps / length
        expected = torch.tensor(
            [min(max(c + shrink * d, 0.0), 1.0) for c, d in zip(centre, delta, strict=True)]
        )
        torch.testing.assert_close(
            torch.tensor(row), expected, rtol=0, atol=2 * torch.finfo(dtype).eps + 1e-7
        )
