"""Trainings of networks with defences, with a weight that rises, and with deflated gradients."""

from functools import partial

import pytest
import torch
from spikingjelly.activation_based import functional, layer
from torch import nn
from torch.testing import assert_close
from training.small_run import of_nodes, run, splits

from sj_robust import DLIFNode
from sj_robust.defences import (
    EvolvingLeakNode,
    HomeostaticNode,
    StochasticGate,
    SurrogateOverlap,
    deflate_,
)
from sj_robust.defences.stog import GateRates
from sj_robust.training import ThresholdGuarding

HOMEOSTASIS = partial(HomeostaticNode, 3, 4.0)


def test_gates_stay_where_they_can_learn(tmp_path):
    """In this step, momentum carries rates out of their range."""
    nodes = (partial(DLIFNode, T=3, tau=4.0), StochasticGate)
    options = of_nodes(*nodes, penalties=[GateRates(1e-3)]) | {"lr": 5.0, "epochs": 2}
    _, classifier = run(tmp_path, **options)
    rate = classifier.net[3].rate.detach()
    most = torch.tensor(0.999)
    assert rate.max() == most
    assert 0.1 <= rate.min() < most
    gate = StochasticGate()
    gate(torch.ones(3, 2, 24))
    gate.rate.data.fill_(1.5)
    gate(torch.ones(3, 2, 24)).sum().backward()
    assert not gate.rate.grad.any()  # from there it would not come back
    gate.project_()
    gate(torch.ones(3, 2, 24)).sum().backward()
    assert gate.rate.grad.all()


@pytest.mark.filterwarnings("ignore:MPPDMonitor does not follow")
@pytest.mark.parametrize("kind", [HOMEOSTASIS, partial(EvolvingLeakNode, 3)])
def test_a_loss_that_does_not_fit_the_network_is_refused_before_anything_is_written(tmp_path, kind):
    with pytest.raises(ValueError, match="rho"):
        run(tmp_path, **of_nodes(kind, rho=1.0))
    assert not list(tmp_path.iterdir())


def test_a_weight_rises_with_the_batches(tmp_path):
    penalties = [ThresholdGuarding(2.0, rising=True), SurrogateOverlap(0.5)]
    options = {"objective": {"rho": 0.0, "penalties": penalties}, "epochs": 2}
    history, _ = run(tmp_path, **options)
    assert penalties[0].progress == 7 / 8  # before the last of two times four batches
    assert penalties[1].progress == 7 / 8
    for number, record in enumerate(history):
        losses = record.losses
        overlap = 0.5 * losses["penalty/mpd_sgr"]
        guarding = losses["penalty"] - overlap
        largest = 2.0 * losses["penalty/threshold_guarding"]
        assert largest > 0.01
        share = guarding / largest
        assert (0.1 < share < 0.35) if number == 0 else (0.6 < share < 0.9)


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
