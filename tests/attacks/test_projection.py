"""Projections against naive arithmetic in exact fractions and float64."""

from fractions import Fraction

import pytest
import torch
from attacks.table import seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from sj_robust.attacks import ThreatModel
from sj_robust.attacks.projection import linf_bounds, project_l2

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


@settings(max_examples=50, deadline=None)
@given(
    eps=st.sampled_from(
        [
            0.0,
            1e-9,
            2 / 255,
            8 / 255,
            0.1,
            0.3,
            1.0,
        ]
    ),
    seed=st.integers(0, 10**6),
)
def test_linf_distance_obeys_the_python_number_in_every_way_of_measuring(eps, seed):
    x = images(seed, torch.float32)
    wild = x + 3 * torch.randn(x.shape, generator=seeded(seed))
    x_adv = ThreatModel("Linf", eps).project(x, wild)
    assert (x_adv - x).abs().max().item() <= eps
    assert (x_adv.double() - x.double()).abs().max().item() <= eps
    for found, point, centre in zip(x_adv.flatten(), wild.flatten(), x.flatten(), strict=True):
        least = max(centre.item() - eps, 0.0)
        most = min(centre.item() + eps, 1.0)
        nearest = min(max(point.item(), least), most)
        assert found.item() == pytest.approx(nearest, rel=0, abs=2e-7)


def test_a_point_inside_stays():
    x = images(0, torch.float32)
    inside = (x + 0.01).clamp(max=1)
    assert torch.equal(ThreatModel("Linf", 0.02).project(x, inside), inside)
    torch.testing.assert_close(
        project_l2(inside, x, eps=1.0),
        inside,
        rtol=0,
        atol=1e-7,
    )


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


def test_l2_is_per_sample_over_all_dimensions():
    x = torch.full((2, 2, 2, 2), 0.5)
    moved = x.clone()
    moved[0] += 0.25  # length 0.25 * sqrt(8)
    moved[1, 0, 0, 0] += 0.01
    x_adv = project_l2(moved, x, eps=0.1)
    assert (x_adv[0] - 0.5).norm().item() == pytest.approx(0.1, rel=1e-5)
    assert torch.equal(x_adv[1], moved[1])
