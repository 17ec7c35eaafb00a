import itertools

import pytest
import torch
from torch import nn

from sj_robust.training import project_to_simplex_, retract_


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 6, 2),
        nn.Conv1d(4, 5, 3),
        nn.Conv3d(1, 4, 2),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Linear(9, 6),
    ],
)
def test_singular_values_move_towards_1_and_vectors_stay(layer):
    torch.manual_seed(0)
    layer = layer.double()
    layer.weight.data.mul_(3)
    bias = layer.bias.clone()
    u, before, v = torch.linalg.svd(layer.weight.data.flatten(1), full_matrices=False)
    retract_(layer, 0.01)
    expected = u @ torch.diag(1.01 * before - 0.01 * before**3) @ v
    torch.testing.assert_close(layer.weight.data.flatten(1), expected)
    after = torch.linalg.svdvals(layer.weight.data.flatten(1))
    assert ((after - 1).abs() < (before - 1).abs()).all()
    for _ in range(2000):
        retract_(layer, 0.01)
    torch.testing.assert_close(
        torch.linalg.svdvals(layer.weight.data.flatten(1)), torch.ones_like(before)
    )
    assert torch.equal(layer.bias, bias)


@pytest.mark.parametrize(("rows", "moved"), [(199, 199), (200, 60), (333, 99)])
def test_a_random_share_of_the_rows_of_wide_linear_layers(rows, moved):
    torch.manual_seed(0)
    linear = nn.Linear(7, rows).double()
    before = linear.weight.detach().clone()
    retract_(linear, 0.1, generator(1))
    changed = (linear.weight != before).any(1)
    assert changed.sum() == moved
    part = before[changed]
    torch.testing.assert_close(
        linear.weight.detach()[changed], 1.1 * part - 0.1 * part @ part.T @ part
    )


def test_generators_in_one_state_choose_the_same_rows_and_others_do_not():
    def rows(seed):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 240), nn.Linear(240, 210))
        before = [layer.weight.detach().clone() for layer in net]
        state = torch.get_rng_state()
        retract_(net, 0.1, None if seed is None else generator(seed))
        assert torch.equal(torch.get_rng_state(), state)
        return [(layer.weight != old).any(1) for layer, old in zip(net, before, strict=True)]

    first = rows(3)
    assert all(torch.equal(a, b) for a, b in zip(first, rows(3), strict=True))
    assert not torch.equal(first[0], rows(4)[0])
    assert not torch.equal(rows(None)[0], rows(None)[0])
    assert not torch.equal(
        first[0].nonzero()[:60], first[1].nonzero()[:60]
    )  # every layer draws its own


def test_convolutions_are_never_sampled_and_everything_else_is_left_alone():
    torch.manual_seed(0)
    net = nn.ModuleDict(
        {
            "conv": nn.Conv2d(1, 256, 2),
            "norm": nn.BatchNorm2d(3),
            "embedding": nn.Embedding(4, 4),
            "flat": nn.Flatten(),
        }
    )
    before = {name: value.clone() for name, value in net.state_dict().items()}
    retract_(net, 0.1, generator())
    changed = {
        name for name, value in net.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {"conv.weight"}
    assert (net["conv"].weight != before["conv.weight"]).flatten(1).any(1).all()


def test_the_optimizer_and_autograd_do_not_notice():
    linear = nn.Linear(3, 2)
    linear(torch.ones(1, 3)).sum().backward()
    weight, grad = linear.weight, linear.weight.grad.clone()
    retract_(linear, 0.1)
    assert linear.weight is weight
    assert weight.requires_grad
    assert weight.grad_fn is None
    assert torch.equal(weight.grad, grad)


class Mixed(nn.Module):
    def __init__(self, coefficients):
        super().__init__()
        self.mixing = nn.Parameter(torch.tensor(coefficients))


def test_mixing_coefficients_are_projected_after_the_retraction():
    net = nn.Sequential(Mixed([0.9, 0.5]), nn.Linear(2, 2), Mixed([3.0, -1.0]))
    retract_(net, 0.0)
    torch.testing.assert_close(net[0].mixing.data, torch.tensor([0.7, 0.3]))
    torch.testing.assert_close(net[2].mixing.data, torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_projection_is_the_nearest_point_of_the_simplex(size):
    """Against every point of a fine grid on the simplex; a point of it stays."""
    steps = 60
    grid = [c for c in itertools.product(range(steps + 1), repeat=size) if sum(c) == steps]
    points = torch.tensor(grid, dtype=torch.float64) / steps
    for seed in range(40):
        c = 2 * torch.randn(size, generator=generator(seed), dtype=torch.float64)
        projected = c.clone()
        project_to_simplex_(projected)
        assert projected.min() >= 0
        assert abs(projected.sum() - 1) < 1e-12
        # a nearer grid point would make an angle of more than 90 degrees with the way to the
        # projection
        assert ((points - projected) @ (c - projected)).max() <= 1e-12
    for point in points[::50]:
        again = point.clone()
        project_to_simplex_(again)
        torch.testing.assert_close(again, point, rtol=0, atol=1e-15)
    ties = torch.full((size,), 5.0)
    project_to_simplex_(ties)
    torch.testing.assert_close(ties, torch.full((size,), 1 / size))


def test_wrong_use():
    for beta in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="beta must be >= 0 and finite"):
            retract_(nn.Linear(2, 2), beta)
    for shape in ((0,), (2, 2)):
        with pytest.raises(ValueError, match="must be a vector"):
            project_to_simplex_(torch.ones(shape))
