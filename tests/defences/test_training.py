"""Trainings of networks with defences: stopped and resumed, and with a weight that rises."""

from functools import partial

import pytest
import torch
from training import small_run

from sj_robust import DLIFNode
from sj_robust.defences import (
    EvolvingLeakNode,
    HomeostaticNode,
    StochasticGate,
    SurrogateOverlap,
)
from sj_robust.defences.stog import GateRates
from sj_robust.training import ThresholdGuarding

HOMEOSTASIS = partial(HomeostaticNode, 3, 4.0)


def test_gates_stay_where_they_can_learn(tmp_path):
    """In this step, momentum carries rates out of their range."""
    nodes = (partial(DLIFNode, T=3, tau=4.0), StochasticGate)
    options = small_run.of_nodes(*nodes, penalties=[GateRates(1e-3)]) | {"lr": 5.0, "epochs": 2}
    _, classifier = small_run.run(tmp_path, **options)
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


def test_measured_statistics_leave_homeostasis_alone(tmp_path):
    options = small_run.of_nodes(HOMEOSTASIS) | {"epochs": 1}
    _, plain = small_run.run(tmp_path / "plain", **options)
    _, measured = small_run.run(tmp_path / "measured", **options, precise_statistics=2)
    for name, value in plain.state_dict().items():
        assert torch.equal(measured.state_dict()[name], value), name


@pytest.mark.filterwarnings("ignore:MPPDMonitor does not follow")
@pytest.mark.parametrize("kind", [HOMEOSTASIS, partial(EvolvingLeakNode, 3)])
def test_a_loss_that_does_not_fit_the_network_is_refused_before_anything_is_written(tmp_path, kind):
    with pytest.raises(ValueError, match="rho"):
        small_run.run(tmp_path, **small_run.of_nodes(kind, rho=1.0))
    assert not list(tmp_path.iterdir())


def test_a_weight_rises_with_the_batches(tmp_path):
    penalties = [ThresholdGuarding(2.0, rising=True), SurrogateOverlap(0.5)]
    options = {"objective": {"rho": 0.0, "penalties": penalties}, "epochs": 2}
    history, _ = small_run.run(tmp_path, **options)
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
