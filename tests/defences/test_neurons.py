"""The neurons of the defences against plain loops, and as citizens of SpikingJelly."""

import copy
import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from defences.neurons_by_hand import Rules, T, evolving, homeostatic, noisy, normals, numbers
from spikingjelly.activation_based import base, functional
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from sj_robust import SpikingClassifier
from sj_robust.defences import EvolvingLeakNode, HomeostaticNode, NoisyLIFNode, StochasticGate
from sj_robust.models import set_time_steps

SHAPE = (3, 5)
TAU = 2.5
NOISE_STD = 0.3
HOST_HAS_EXPLICIT_STATES = hasattr(base.MemoryModule, "functional_forward")


@dataclass
class Case:
    """A neuron with values that are not those it starts with, and its equation."""

    node: nn.Module
    parameters: list
    by_hand: object


def run(node, x_seq):
    """Spikes of a fresh sequence in the node's own step mode."""
    functional.reset_net(node)
    if node.step_mode == "m":
        return node(x_seq)
    return torch.stack([node(x) for x in x_seq])


def currents():
    x_seq = numbers(T, 2, *SHAPE, low=-0.5, high=1.6)
    return x_seq.requires_grad_()


def silence():
    return torch.zeros(T, 1, *SHAPE, dtype=torch.float64)


def leaks():
    return numbers(T, *SHAPE, low=0.3, high=1.2, seed=1)


def rates():
    return numbers(*SHAPE, low=0.1, high=0.6, seed=1)


def usual():
    return numbers(T, *SHAPE, low=0.2, high=0.8, seed=2)


def drawn():
    """The noise that a generator with seed 3 gives, one step after the other."""
    generator = torch.Generator().manual_seed(3)
    steps = [normals((2, *SHAPE), generator) for _ in range(T)]
    return NOISE_STD * torch.stack(steps)


def noisy_case(**options):
    generator = torch.Generator().manual_seed(3)
    node = NoisyLIFNode(TAU, noise_std=NOISE_STD, generator=generator, **options)

    def by_hand(x, rules):
        return noisy(x, rules, tau=TAU, noise_seq=drawn())

    return Case(node, [], by_hand)


def evolving_case(**options):
    node = EvolvingLeakNode(T, **options).double()
    run(node, silence())
    node.leak.data = leaks()
    leak = leaks().requires_grad_()

    def by_hand(x, rules):
        return evolving(x, rules, leak=leak)

    return Case(node, [(node.leak, leak)], by_hand)


def homeostatic_case(**options):
    node = HomeostaticNode(T, TAU, **options).double()
    run(node, silence())
    node.eval()
    node.rate.data = rates()
    node.signature.copy_(usual())
    rate = rates().requires_grad_()

    def by_hand(x, rules):
        return homeostatic(x, rules, tau=TAU, rate=rate, signature=usual())

    return Case(node, [(node.rate, rate)], by_hand)


def weighted(values, weights):
    return (values * weights).sum()


CASES = {"noisy": noisy_case, "evolving": evolving_case, "homeostatic": homeostatic_case}


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("step_mode", ["m", "s"])
@pytest.mark.parametrize("v_reset", [0.0, None, -0.25])
@pytest.mark.parametrize("detach_reset", [False, True])
def test_a_neuron_is_its_equation_in_both_step_modes(kind, step_mode, v_reset, detach_reset):
    rules = Rules(v_reset, detach_reset)
    options = {"step_mode": step_mode, "v_reset": v_reset, "detach_reset": detach_reset}
    case = CASES[kind](store_v_seq=True, **options)
    x_seq = currents()
    weights = numbers(T, 2, *SHAPE, low=-1.0, seed=5)
    spikes = run(case.node, x_seq)
    potentials = case.node.v_seq
    loss = weighted(spikes, weights) + weighted(potentials, weights)
    by_hand_x = currents()
    wanted, wanted_potentials = case.by_hand(by_hand_x, rules)
    wanted_loss = weighted(wanted, weights) + weighted(wanted_potentials, weights)
    assert 0.1 < wanted.mean() < 0.9
    assert torch.equal(spikes, wanted)
    assert_close(potentials, wanted_potentials, rtol=0, atol=1e-12)
    loss.backward()
    wanted_loss.backward()
    assert_close(x_seq.grad, by_hand_x.grad, rtol=1e-9, atol=1e-11)
    for parameter, plain in case.parameters:
        assert plain.grad.abs().max() > 1e-2
        assert_close(parameter.grad, plain.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", CASES)
def test_the_state_goes_on_over_calls_until_the_reset(kind):
    case = CASES[kind]()
    x_seq = currents().detach()
    wanted, _ = case.by_hand(x_seq, Rules())
    functional.reset_net(case.node)
    first = case.node(x_seq[:1])
    others = case.node(x_seq[1:])
    found = torch.cat((first, others))
    assert torch.equal(found, wanted)
    assert case.node.time_step == T
    functional.reset_net(nn.Sequential(case.node))
    assert case.node.time_step == 0
    assert case.node.v == 0.0
    if kind == "noisy":  # which has as many steps as asked for
        return
    assert torch.equal(case.node(x_seq), wanted)
    with pytest.raises(RuntimeError, match="reset_net"):
        case.node(x_seq[:1])


@pytest.mark.skipif(not HOST_HAS_EXPLICIT_STATES, reason="0.0.0.0.14 has no explicit states")
@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_explicit_states_give_the_same_and_leave_the_module_alone(kind, step_mode):
    case = CASES[kind](step_mode=step_mode)
    x_seq = currents().detach()
    wanted, _ = case.by_hand(x_seq, Rules())
    functional.reset_net(case.node)
    states = tuple(case.node._memories.values())
    if step_mode == "m":
        (spikes,), states = case.node.functional_forward((x_seq,), states)
    else:
        steps = []
        for x in x_seq:
            (spike,), states = case.node.functional_forward((x,), states)
            steps.append(spike)
        spikes = torch.stack(steps)
    assert torch.equal(spikes, wanted)
    assert states[1] == T
    assert case.node.v == 0.0


@pytest.mark.parametrize("kind", CASES)
def test_states_are_float32_for_half_inputs_and_never_stored(kind):
    case = CASES[kind]()
    node = case.node.float()
    spikes = run(node, currents().detach().bfloat16())
    assert spikes.dtype == torch.bfloat16
    assert node.v.dtype == torch.float32
    stored = node.state_dict().keys()
    assert not stored & {"v", "time_step", "th", "v_seq"}
    with pytest.raises(RuntimeError, match="batch"):
        node(torch.zeros(T, 7, *SHAPE))


PER_NEURON = {"leak": lambda: EvolvingLeakNode(T), "rate": lambda: HomeostaticNode(T)}


@pytest.mark.parametrize("name", PER_NEURON)
def test_values_per_neuron_get_their_shape_from_the_first_input_or_from_weights(name):
    node = PER_NEURON[name]()
    optimizer = torch.optim.SGD(node.parameters(), lr=1.0)  # before there is a shape
    assert node.state_dict().keys() <= {"usual.batches"}
    for shift in (0.0, 0.1):  # the first batch shows what is usual
        spikes = run(node, currents().detach().float() + shift)
    spikes.sum().backward()
    before = getattr(node, name).detach().clone()
    assert before.shape[-2:] == SHAPE
    optimizer.step()
    assert not torch.equal(getattr(node, name), before)
    other = PER_NEURON[name]()
    other.load_state_dict(node.state_dict())
    for key, value in other.state_dict().items():
        assert torch.equal(value, node.state_dict()[key]), key
    node.eval()
    other.eval()
    x_seq = currents().detach().float()
    assert torch.equal(run(other, x_seq), run(node, x_seq))
    functional.reset_net(node)
    with pytest.raises(RuntimeError, match="one value for each neuron"):
        node(torch.zeros(T, 2, 9))


@pytest.mark.parametrize("name", [*PER_NEURON, "gate"])
def test_values_that_got_their_shape_in_inference_mode_are_trained_as_others(name):
    node = (PER_NEURON | {"gate": StochasticGate})[name]()
    x_seq = currents().detach().float()
    with torch.inference_mode():
        run(node, x_seq)
    run(node, x_seq)
    run(node, x_seq + 0.1).sum().backward()
    assert next(node.parameters()).grad.any()


@pytest.mark.parametrize(("steps", "used"), [(T - 1, False), (T + 4, True)])
@pytest.mark.parametrize("name", PER_NEURON)
def test_values_of_other_time_steps_are_not_loaded(name, steps, used):
    build = {"leak": EvolvingLeakNode, "rate": HomeostaticNode}[name]
    source = build(steps)
    run(source, torch.rand(steps, 2, *SHAPE))
    node = PER_NEURON[name]()
    if used:
        run(node, currents().detach().float())
    with pytest.raises(RuntimeError, match=f"T={steps}"):
        node.load_state_dict(source.state_dict())
    assert set_time_steps(source, T)
    node.load_state_dict(source.state_dict())
    functional.reset_net(node)
    node(currents().detach().float())


def test_noise_is_private_with_a_generator_and_follows_torchs_without():
    x_seq = torch.full((T, 1, 50), 0.9)
    before = torch.get_rng_state()
    run(NoisyLIFNode(generator=torch.Generator().manual_seed(0)), x_seq)
    assert torch.equal(torch.get_rng_state(), before)
    node = NoisyLIFNode()
    found = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        found.append(run(node, x_seq))
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_noise_at_test_is_in_force_where_it_was_asked_for_also_while_attacked():
    """A classifier puts the neurons of 0.0.0.0.14 in training mode where it needs a gradient."""
    for at_test in (True, False):
        node = NoisyLIFNode(noise_at_test=at_test)
        net = nn.Sequential(nn.Flatten(2), node)
        model = SpikingClassifier(net, T)
        x = torch.rand(3, 1, 4, 4, requires_grad=True)
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x)) == (not at_test)


def test_the_signature_is_a_running_mean_of_what_was_there_in_training():
    node = HomeostaticNode(T, TAU, tau_v=math.inf, momentum=0.25).double()
    first = currents().detach()
    second = first + 0.1
    wanted = []
    for x_seq in (first, second):
        v = torch.zeros_like(x_seq[0])
        h_seq = []
        for x in x_seq:
            h = (1 - 1 / TAU) * v + x
            v = torch.where(h >= 1, torch.zeros_like(h), h)
            h_seq.append(h)
        wanted.append(torch.stack(h_seq).mean(1))
    run(node, first)
    assert_close(node.signature, wanted[0])
    run(node, second)
    expected = 0.75 * wanted[0] + 0.25 * wanted[1]
    assert_close(node.signature, expected)
    node.eval()
    run(node, first)
    assert_close(node.signature, expected)
    kept = HomeostaticNode(T, TAU, momentum=0.0)
    kept.load_state_dict(node.state_dict())
    run(kept.double(), second)
    assert_close(kept.signature, expected)


def test_an_empty_batch_is_nothing_to_note():
    node = HomeostaticNode(T, TAU)
    run(node, currents().detach())
    before = copy.deepcopy(node.state_dict())
    assert run(node, torch.zeros(T, 0, *SHAPE)).shape == (T, 0, *SHAPE)
    assert_close(dict(node.state_dict()), dict(before), rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_signature_that_moved_is_not_used_again_by_checkpointing(use_reentrant):
    node = HomeostaticNode(T, TAU)
    x_seq = currents()
    run(node, x_seq)
    spikes = checkpoint(run, node, x_seq + 0.1, use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match="signature"):
        spikes.sum().backward()

    def gradient(call):
        functional.reset_net(node)
        spikes = call(run, node, x_seq + 0.1)
        return torch.autograd.grad(spikes.sum(), x_seq)[0]

    node.usual.momentum = 0.0
    again = gradient(partial(checkpoint, use_reentrant=False))
    assert_close(again, gradient(lambda function, *args: function(*args)), rtol=0, atol=0)


def test_a_signature_is_moved_once_where_spikingjelly_saves_memory():
    memopt = pytest.importorskip("spikingjelly.activation_based.memopt")
    node = HomeostaticNode(T, TAU)
    run(node, currents().detach())
    functional.reset_net(node)
    twin = copy.deepcopy(node)
    gradients = []
    for module in (node, memopt.checkpoint_module(twin)):
        x_seq = currents()
        functional.reset_net(module)
        module(x_seq + 0.1).sum().backward()
        gradients.append(x_seq.grad)
    assert gradients[0].any()
    assert_close(gradients[1], gradients[0])
    assert twin.usual.batches.tolist() == [2] * T
    assert_close(twin.signature, node.signature)


def test_an_attack_does_not_move_the_signature():
    node = HomeostaticNode(T)
    model = SpikingClassifier(nn.Sequential(nn.Flatten(2), node), T)
    model(torch.rand(3, 1, 4, 4))
    before = copy.deepcopy(node.state_dict())
    model.eval()
    x = torch.rand(3, 1, 4, 4, requires_grad=True)
    model(x).sum().backward()
    for key, value in node.state_dict().items():
        assert torch.equal(value, before[key]), key
