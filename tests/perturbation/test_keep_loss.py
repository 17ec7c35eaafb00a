"""A monitor that keeps what its loss needs and nothing else, and the recursion that the loss runs through."""

import pytest
import torch
from perturbation.networks import NEURONS, conv_net, images, in_steps, storage_bytes
from spikingjelly.activation_based import functional

from sj_robust.perturbation import MPPDMonitor, simplified_perturbation
from sj_robust.perturbation.dynamics import perturbation_step


def run_pair(monitor, net, x, x_perturbed, way):
    run = in_steps(net) if way == "single steps" else net
    functional.reset_net(net)
    if way == "paired":
        with monitor.paired():
            run(torch.cat((x, x_perturbed), 1))
        return
    with monitor.clean():
        run(x)
    functional.reset_net(net)
    with monitor.perturbed():
        run(x_perturbed)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("indicator", ["mppd", "tasad", "std"])
@pytest.mark.parametrize("way", ["two runs", "paired", "single steps"])
def test_loss_is_that_of_a_monitor_with_statistics(way, indicator, gradients):
    net = conv_net(NEURONS["DLIF"][0])
    functional.set_step_mode(net, "s" if way == "single steps" else "m")
    x, x_perturbed = images()
    found = {}
    for keep in ("statistics", "loss"):
        with MPPDMonitor(net, keep=keep, spikes=indicator != "mppd") as monitor, torch.set_grad_enabled(gradients):
            run_pair(monitor, net, x, x_perturbed, way)
            value = monitor.loss("all", indicator=indicator)
            weights = list(net.parameters()) if gradients else []
            grads = torch.autograd.grad(value, weights, allow_unused=True, materialize_grads=True) if weights else ()
            found[keep] = (value.detach(), *grads)
    assert found["loss"][0] > 0
    for mine, expected in zip(found["loss"], found["statistics"], strict=True):
        torch.testing.assert_close(mine, expected)


def test_it_measures_nothing_and_says_so():
    net = conv_net(NEURONS["LIF"][0])
    x, _ = images()
    with MPPDMonitor(net, keep="loss") as monitor:
        run_pair(monitor, net, x, x + 0.1, "two runs")
        with pytest.raises(RuntimeError, match=r"call compare\(x, x_perturbed\), or build it with keep='statistics'"):
            monitor.statistics()
        with pytest.raises(RuntimeError, match="measures nothing beside its loss"):
            monitor["2"]


def test_comparing_measures_as_ever_and_leaves_the_next_pair_alone():
    net = conv_net(NEURONS["LIF"][0])
    x, _ = images()
    with MPPDMonitor(net) as usual, MPPDMonitor(net, keep="loss") as monitor:
        expected = usual.compare(x, x + 0.1)
        found = monitor.compare(x, x + 0.1)
        assert found.keys() == expected.keys()
        for name in expected:
            assert found[name].to_dict() == expected[name].to_dict()
        before = monitor.statistics()["8"].samples
        run_pair(monitor, net, x, x + 0.1, "two runs")
        assert monitor.statistics()["8"].samples == before


def test_a_perturbed_run_of_other_length_or_shape_is_refused_as_ever():
    net = conv_net(NEURONS["LIF"][0])
    x, _ = images()
    with MPPDMonitor(net, keep="loss") as monitor:
        for other, message in (
            (torch.cat((x, x)), "takes more steps in the perturbed run than in the clean run"),
            (x[:2], "steps in the perturbed run and 4 in the clean run"),
            (x[:, :1], "give both runs batches of the same shape"),
        ):
            with pytest.raises(ValueError, match=message):
                run_pair(monitor, net, x, other, "two runs")


def test_an_open_pair_keeps_the_currents_alone():
    """Less than with statistics, which keep the spikes of the clean run until the perturbed one."""
    net = conv_net(NEURONS["LIF"][0])
    x, _ = images()
    held = {}
    for keep in ("statistics", "loss"):
        with MPPDMonitor(net, keep=keep, layers=["8"]) as monitor, torch.no_grad():
            functional.reset_net(net)
            with monitor.clean():
                net(x)
            held[keep] = sum(storage_bytes(monitor))
            functional.reset_net(net)
            with monitor.perturbed():
                net(x)
    assert 0 < held["loss"] < held["statistics"]


@pytest.mark.parametrize("gain", [1.0, 0.7])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_constant_decay_gives_the_recursion_and_every_derivative(steps, gain):
    x, x_perturbed = torch.randn(2, steps, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = simplified_perturbation(x, x_perturbed, decay=0.8, gain=gain)
    eps = torch.zeros(3, 2, dtype=torch.float64)
    for t in range(steps):
        eps = perturbation_step(eps, x[t] - x_perturbed[t], 0.8, gain)
        torch.testing.assert_close(found[t], eps)

    def of_both(a, b):
        return simplified_perturbation(a, b, decay=0.8, gain=gain) ** 2

    inputs = (x.requires_grad_(), x_perturbed.requires_grad_())
    assert torch.autograd.gradcheck(of_both, inputs)
    assert torch.autograd.gradgradcheck(of_both, inputs)


def test_a_decay_that_is_a_tensor_gives_the_same_and_has_a_gradient():
    x, x_perturbed = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    decay = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    of_tensor = simplified_perturbation(x, x_perturbed, decay=decay)
    torch.testing.assert_close(of_tensor, simplified_perturbation(x, x_perturbed, decay=0.8))
    assert torch.autograd.gradcheck(lambda a: simplified_perturbation(x, x_perturbed, decay=a), (decay,))
