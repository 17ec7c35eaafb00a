"""Gates that let spikes through at random, and the penalty on their rates."""

import pytest
import torch
from defences.neurons_by_hand import numbers
from spikingjelly.activation_based import functional
from torch import nn
from torch.testing import assert_close

from sj_robust import SpikingClassifier
from sj_robust.defences import StochasticGate
from sj_robust.defences.stog import GateRates
from sj_robust.training import ForwardPasses

T = 3
SHAPE = (4, 5)


def spikes_of():
    drawn = numbers(T, 6, *SHAPE)
    return (drawn > 0.5).double()


def gate_with(rates, **options):
    gate = StochasticGate(generator=torch.Generator().manual_seed(3), **options)
    gate(spikes_of()[0] if gate.step_mode == "s" else spikes_of())
    gate.rate.data = rates.clone()
    gate.generator.manual_seed(3)
    return gate


def rates():
    return numbers(*SHAPE, low=0.15, high=0.95, seed=1)


def run(gate, spikes):
    if gate.step_mode == "m":
        return gate(spikes)
    return torch.stack([gate(step) for step in spikes])


def by_hand(spikes, p, temperature):
    """What gets through, and the relaxation whose derivative stands for that of the gate."""
    generator = torch.Generator().manual_seed(3)
    out = []
    soft = []
    for step in spikes:
        u = torch.rand(step.shape, generator=generator, dtype=torch.float64)
        odds = p / (1 - p)
        drawn_odds = (1 - u) / u
        scaled = torch.log(odds * drawn_odds) / temperature
        relaxed = 1 / (1 + torch.exp(-scaled))
        opened = (relaxed > 0.5).double()
        out.append(opened * step)
        soft.append(relaxed)
    return torch.stack(out), torch.stack(soft)


@pytest.mark.parametrize("step_mode", ["m", "s"])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_a_gate_is_its_equation_in_both_step_modes(step_mode, temperature):
    gate = gate_with(rates(), step_mode=step_mode, temperature=temperature)
    spikes = spikes_of().requires_grad_()
    out = run(gate, spikes)
    p = rates().requires_grad_()
    wanted, relaxed = by_hand(spikes.detach(), p, temperature)
    assert 0.1 < wanted.mean() < 0.4
    assert torch.equal(out, wanted)
    weights = numbers(*out.shape, seed=4)
    loss = (out * weights).sum()
    loss.backward()
    opened = (relaxed > 0.5).double()
    assert_close(spikes.grad, opened * weights)
    sent = spikes.detach() * weights
    relaxed_loss = (relaxed * sent).sum()
    relaxed_loss.backward()
    assert p.grad.abs().min() > 1e-3
    assert_close(gate.rate.grad, p.grad, rtol=1e-6, atol=1e-9)


def test_the_rate_is_the_share_that_gets_through():
    gate = StochasticGate(generator=torch.Generator().manual_seed(0))
    ones = torch.ones(1, 20000, 4)
    assert gate(ones).mean() > 0.998  # as it starts
    gate.rate.data = torch.tensor([-1.0, 0.3, 0.7, 2.0])
    wanted = torch.tensor([0.1, 0.3, 0.7, 0.999])
    passed = gate(ones)
    share = passed.mean((0, 1)).detach()
    assert_close(share, wanted, rtol=0, atol=0.014)
    passed.sum().backward()
    beyond = gate.rate.grad[[0, 3]]
    assert not beyond.any()


def passes_of(model, x, logits):
    """What penalties are told of a step without perturbed images."""
    return ForwardPasses(
        classifier=model,
        y=torch.zeros(len(x), dtype=torch.int64),
        x=x,
        x_perturbed=None,
        logits=logits,
        logits_perturbed=None,
    )


def test_the_penalty_is_half_the_sum_of_the_squares():
    net = nn.Sequential(StochasticGate(), StochasticGate())
    functional.set_step_mode(net, "m")
    model = SpikingClassifier(net, T, takes="sequence")
    x = torch.rand(2, 6)
    logits = model(x)
    for number, gate in enumerate(net):
        gate.rate.data.fill_(0.5 + number)
    passes = passes_of(model, x, logits)
    value = GateRates(5e-6).value(passes)
    assert value == 6 * (0.25 + 2.25) / 2
    value.backward()
    assert torch.equal(net[1].rate.grad, net[1].rate.detach())
