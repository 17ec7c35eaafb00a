"""DSD: gradients without their largest singular component, and a training with them."""

import pytest
import torch
from spikingjelly.activation_based import functional, layer
from torch import nn
from torch.testing import assert_close
from training.small_run import run, splits

from sj_robust.defences import HomeostaticNode, deflate_


def largest_by_power_iteration(matrix):
    """The best approximation of rank one, without a decomposition."""
    v = torch.ones(matrix.shape[1], dtype=matrix.dtype)
    for _ in range(3000):
        v = matrix.T @ (matrix @ v)
        v = v / v.norm()
    return torch.outer(matrix @ v, v)


@pytest.mark.parametrize("shape", [(5, 3), (3, 7), (4, 2, 3, 3), (1, 6)])
def test_what_is_left_is_the_gradient_without_its_largest_component(shape):
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    weight.grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    before = weight.grad.clone()
    deflate_([weight])
    taken = largest_by_power_iteration(before.flatten(1)).view(shape)
    assert_close(weight.grad, before - taken, atol=1e-9, rtol=0)


def test_vectors_and_gradients_that_are_not_there_or_not_finite_stay_as_they_are():
    bias, none, broken = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    bias = nn.Parameter(torch.ones(3))
    bias.grad = torch.tensor([1.0, 2.0, 3.0])
    broken.grad = torch.tensor([[1.0, float("inf")], [0.0, 1.0]])
    kept = broken.grad.clone()
    deflate_([bias, none, broken])
    assert bias.grad.tolist() == [1.0, 2.0, 3.0]
    assert none.grad is None
    assert torch.equal(broken.grad, kept)


def net():
    found = nn.Sequential(layer.Conv2d(1, 3, 3), HomeostaticNode(3, 4.0), layer.Flatten())
    found.append(layer.Linear(12, 3))
    functional.set_step_mode(found, "m")
    found[0].weight.data.mul_(3)
    return found


def test_a_step_of_the_training_is_one_with_deflated_gradients(tmp_path):
    """One step of SGD without momentum: the weights move by the gradient, which lacks a rank; maps
    of a neuron are no weights.
    """
    moved = {}
    for deflation in (False, True):
        step = {"epochs": 1, "batch_size": 64, "momentum": 0.0, "weight_decay": 0.0}
        step |= {"dtype": torch.float64, "build": net, "perturb": None, "deflation": deflation}
        torch.manual_seed(7)
        before = net().double().state_dict()
        _, classifier = run(
            tmp_path / str(deflation),
            data=splits(dtype=torch.float64),
            objective={"rho": 0.0},
            **step,
        )
        after = classifier.net.state_dict()
        moved[deflation] = {name: after[name] - before[name] for name in before if name in after}
        moved[deflation]["1.rate"] = after["1.rate"]
    for name in ("0.weight", "3.weight"):
        plain = moved[False][name]
        assert plain.abs().max() > 1e-4
        left = plain - largest_by_power_iteration(plain.flatten(1)).view_as(plain)
        assert_close(moved[True][name], left, atol=1e-10, rtol=0)
    assert moved[False]["1.rate"].ndim == 3
    for name in ("1.rate", "3.bias"):
        assert moved[False][name].any()
        assert_close(moved[True][name], moved[False][name])
