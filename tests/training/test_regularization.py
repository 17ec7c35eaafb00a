import copy
import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sj_robust.training import retract_


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
    matrix = layer.weight.data.flatten(1)  # in the memory of the weight
    u, before, v = torch.linalg.svd(matrix, full_matrices=False)
    retract_(layer, 0.01)
    moved = 1.01 * before - 0.01 * before**3
    assert_close(matrix, u @ torch.diag(moved) @ v)
    after = torch.linalg.svdvals(matrix)
    nearer = (after - 1).abs() < (before - 1).abs()
    assert nearer.all()
    for _ in range(2000):
        retract_(layer, 0.01)
    in_the_end = torch.linalg.svdvals(matrix)
    assert_close(in_the_end, torch.ones_like(before))
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
    expected = 1.1 * part - 0.1 * part @ part.T @ part
    assert_close(linear.weight.detach()[changed], expected)


def retracted(generator, *, frozen=False):
    """Weights of two layers before and after a retraction."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 240), nn.Linear(240, 210))
    net[0].weight.requires_grad_(not frozen)
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    retract_(net, 0.1, generator)
    assert torch.equal(torch.get_rng_state(), state)
    moved = [(net[i].weight != before[f"{i}.weight"]).any(1) for i in (0, 1)]
    return moved, net


def test_rows_follow_the_generator_alone():
    (first, second), _ = retracted(generator(3))
    (again, second_again), _ = retracted(generator(3))
    assert torch.equal(again, first)
    assert torch.equal(second_again, second)
    assert not torch.equal(first[:210], second)  # every layer draws its own
    assert not torch.equal(retracted(generator(4))[0][0], first)
    assert not torch.equal(retracted(None)[0][0], retracted(None)[0][0])
    (frozen, beside), _ = retracted(generator(3), frozen=True)
    assert not frozen.any()
    assert torch.equal(beside, second)


def test_everything_else_is_left_alone():
    torch.manual_seed(0)
    kinds = (nn.Conv2d(1, 256, 2), nn.BatchNorm2d(3), nn.Embedding(4, 4), nn.Flatten())
    net = nn.ModuleList(kinds)
    net[0].weight.square().sum().backward()
    grad = net[0].weight.grad.clone()
    before = copy.deepcopy(net.state_dict())
    retract_(net, 0.1, generator())
    state = net.state_dict()
    assert [name for name in state if not torch.equal(state[name], before[name])] == ["0.weight"]
    assert (state["0.weight"] != before["0.weight"]).flatten(1).any(1).all()  # never sampled
    assert net[0].weight.grad_fn is None
    assert torch.equal(net[0].weight.grad, grad)


def test_mixing_coefficients_are_projected_to_the_nearest_point_of_the_simplex():
    """Against every point of a fine grid: a nearer one would make an angle of more than 90 degrees
    with the way to the projection.
    """
    net = nn.Module()
    for size in (1, 2, 3):
        grid = itertools.product(range(31), repeat=size)
        points = torch.tensor([point for point in grid if sum(point) == 30]).double() / 30
        for seed in range(20):
            c = 2 * torch.randn(size, generator=generator(seed)).double()
            net.mixing = nn.Parameter(c.clone())
            retract_(net, 0.0)
            nearest = net.mixing.detach()
            assert nearest.min() >= 0
            assert abs(nearest.sum() - 1) < 1e-12
            assert ((points - nearest) @ (c - nearest)).max() <= 1e-12
