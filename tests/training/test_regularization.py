import copy
import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sj_robust.training import retract_
from sj_robust.training.regularization import project_to_simplex_


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


def test_frozen_parameters_stay_and_the_rows_of_the_others_are_the_same():
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(5, 250), nn.Linear(250, 220)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    before = nets[1][0].weight.clone()
    nets[1][0].weight.requires_grad_(False)
    for net in nets:
        retract_(net, 0.1, generator(1))
    assert torch.equal(nets[1][0].weight, before)
    assert not torch.equal(nets[0][0].weight, before)
    assert torch.equal(nets[0][1].weight, nets[1][1].weight)


def rows_chosen(generator):
    """Numbers of the rows that a retraction has moved, in each of two layers."""
    torch.manual_seed(0)
    first = nn.Linear(4, 240)
    second = nn.Linear(240, 210)
    net = nn.Sequential(first, second)
    before = copy.deepcopy(net)
    state = torch.get_rng_state()
    retract_(net, 0.1, generator)
    assert torch.equal(torch.get_rng_state(), state)
    return rows_moved(first, before[0]), rows_moved(second, before[1])


def rows_moved(linear, before):
    moved = linear.weight != before.weight
    return moved.any(1).nonzero()


def test_generators_in_one_state_choose_the_same_rows_and_others_do_not():
    first, second = rows_chosen(generator(3))
    again, second_again = rows_chosen(generator(3))
    assert torch.equal(again, first)
    assert torch.equal(second_again, second)
    assert not torch.equal(first[:60], second[:60]), "every layer draws its own"
    other, _ = rows_chosen(generator(4))
    assert not torch.equal(other, first)
    unseeded, _ = rows_chosen(None)
    unseeded_again, _ = rows_chosen(None)
    assert not torch.equal(unseeded, unseeded_again)


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
    before = copy.deepcopy(net.state_dict())
    retract_(net, 0.1, generator())
    state = net.state_dict()
    changed = [name for name in state if not torch.equal(state[name], before[name])]
    assert changed == ["conv.weight"]
    moved = state["conv.weight"] != before["conv.weight"]
    assert moved.flatten(1).any(1).all()


def test_the_optimizer_and_autograd_do_not_notice():
    linear = nn.Linear(3, 2)
    outputs = linear(torch.ones(1, 3))
    outputs.sum().backward()
    weight = linear.weight
    grad = weight.grad.clone()
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
    net = nn.Sequential(
        Mixed([0.9, 0.5]),
        nn.Linear(2, 2),
        Mixed([3.0, -1.0]),
    )
    retract_(net, 0.0)
    first = net[0].mixing.tolist()
    last = net[2].mixing.tolist()
    assert first == pytest.approx([0.7, 0.3])
    assert last == pytest.approx([1.0, 0.0])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_projection_is_the_nearest_point_of_the_simplex(size):
    """Against every point of a fine grid on the simplex; a point of it stays."""
    points = points_of_simplex(size)
    for seed in range(40):
        c = 2 * torch.randn(size, generator=generator(seed)).double()
        nearest = projected(c)
        assert nearest.min() >= 0
        assert abs(nearest.sum() - 1) < 1e-12
        # a nearer grid point would make an angle of more than 90 degrees with the way to the
        # projection
        along = (points - nearest) @ (c - nearest)
        assert along.max() <= 1e-12
    for point in points[::50]:
        assert_close(projected(point), point, rtol=0, atol=1e-15)
    ties = torch.full((size,), 5.0)
    expected = torch.full((size,), 1 / size)
    assert_close(projected(ties), expected)


def points_of_simplex(size, steps=60):
    """A fine grid."""
    grid = itertools.product(range(steps + 1), repeat=size)
    numerators = [point for point in grid if sum(point) == steps]
    return torch.tensor(numerators).double() / steps


def projected(c):
    c = c.clone()
    project_to_simplex_(c)
    return c


@pytest.mark.parametrize("shape", [(0,), (2, 2)])
def test_only_vectors_are_projected(shape):
    with pytest.raises(ValueError, match="must be a vector"):
        project_to_simplex_(torch.ones(shape))
