"""What an attack leaves as it found it: images, gradients, modes, random state; and what it depends on."""

import random

import numpy as np
import pytest
import torch
from attacks.table import ATTACKS, linear_model, seeded
from spikingjelly.activation_based import functional
from torch import nn

from sj_robust.attacks import fgsm, pgd, rfgsm
from sj_robust.attacks._resets import refuse_carried_states
from sj_robust.neuron import DLIFNode


def run_or_fail(attack, model, x, y, fail: bool) -> None:
    if not fail:
        attack.run(model, x, y, 0.1)
        return
    handle = model.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError("from the model")))
    with pytest.raises(KeyError, match="from the model"):
        attack.run(model, x, y, 0.1)
    handle.remove()


@pytest.mark.parametrize("fail", [False, True], ids=["ends", "raises"])
def test_modes_statistics_gradients_and_flags_stay(gradient_attack, model, batch, fail):
    x, y = batch
    modules, parameters = list(model.modules()), list(model.parameters())
    for number, module in enumerate(modules):
        module.training = number % 3 != 0
    parameters[0].grad = torch.full_like(parameters[0], 3.0)
    parameters[-1].requires_grad_(False)
    modes = [module.training for module in modules]
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    weights = [parameter.detach().clone() for parameter in parameters]
    hooks = [len(module._forward_hooks) for module in modules]

    run_or_fail(gradient_attack, model, x, y, fail)

    assert [module.training for module in modules] == modes
    assert {name: value.tolist() for name, value in buffers.items()} == {
        name: value.tolist() for name, value in model.named_buffers()
    }
    assert all(torch.equal(now, before) for now, before in zip(parameters, weights, strict=True))
    assert (parameters[0].grad == 3.0).all()
    assert all(parameter.grad is None for parameter in parameters[1:])
    assert [parameter.requires_grad for parameter in parameters] == [True] * (len(parameters) - 1) + [False]
    assert [len(module._forward_hooks) for module in modules] == hooks


def test_the_network_is_attacked_in_evaluation_mode(search, batch):
    modes = []

    class Watched(nn.Sequential):
        def forward(self, x):
            modes.append([module.training for module in self.modules()])
            return super().forward(x)

    search.run(Watched(nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, 5)), *batch, 0.1)
    assert modes
    assert not any(any(mode) for mode in modes)


@pytest.mark.parametrize("fail", [False, True], ids=["ends", "raises"])
@pytest.mark.parametrize("seed", [None, 0])
def test_global_random_state_stays_even_if_the_network_draws_from_it(gradient_attack, batch, fail, seed):
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = linear_model(36)

        def forward(self, x):
            return self.inner(x + 0.1 * torch.randn_like(x))

    generator = None if seed is None else seeded(seed)
    model = Noisy()
    before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002  the global one
    handle = model.register_forward_hook(lambda *_: 1 / 0) if fail else None
    try:
        gradient_attack.run(model, *batch, 0.1, generator)
    except ZeroDivisionError:
        assert handle
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), repr(np.random.get_state())) == before[1:]  # noqa: NPY002  as above


def test_the_attack_does_not_see_the_numbers_of_the_callers_next_forward(batch):
    drawn = []

    def model(x):
        drawn.append(torch.rand(3))
        return linear_model(36)(x) * drawn[-1].mean()

    fgsm(model, *batch, eps=0.1)
    assert not torch.equal(drawn[0], torch.rand(3))


def test_same_generator_seed_same_result(attack_and_model, batch):
    attack, model = attack_and_model
    first, second = (attack.run(model, *batch, 0.1, seeded(5)) for _ in range(2))
    assert torch.equal(first, second)


def test_another_seed_and_no_generator_give_other_numbers(attack, batch):
    linear = linear_model(36)

    def everything_seen(generator: torch.Generator | None) -> list[list[float]]:
        seen: list[list[float]] = []

        def model(x):
            seen.append(x.flatten().tolist())
            return linear(x)

        torch.manual_seed(0)  # does not govern the attack: without a generator the numbers are fresh each time
        seen.append(attack.run(model, *batch, 0.1, generator).flatten().tolist())
        return seen

    with torch.random.fork_rng():
        runs = [everything_seen(seeded(seed)) for seed in (5, 6)]
        runs += [everything_seen(None) for _ in range(2)]
    equal = [first == second for i, first in enumerate(runs) for second in runs[:i]]
    assert not any(equal) if attack.draws else all(equal)


def test_one_generator_serves_consecutive_calls_with_new_numbers(batch):
    model, generator = linear_model(36), seeded()
    first, second = (rfgsm(model, *batch, eps=0.1, project=False, generator=generator) for _ in range(2))
    assert not torch.equal(first, second)


def test_a_call_draws_one_number_whatever_its_options(batch):
    states = []
    for name in ("gaussian", "fgsm", "pgd", "pgd_restarts", "pgd_eot"):
        generator = seeded()
        ATTACKS[name].run(linear_model(36), *batch, 0.1, generator)
        states.append(generator.get_state())
    assert all(torch.equal(state, states[0]) for state in states)


def test_a_result_does_not_depend_on_the_other_samples(attack, batch):
    (x, y), model = batch, linear_model(36, seed=3)
    other_x, other_y = x.clone(), y.clone()
    other_x[1:] = x[1:].flip(0) * 1e-3  # other images, other gradients, other samples left for a restart
    other_y[1:] = (y[1:] + 1) % 5
    results = [
        attack.run(model.double(), images.double(), labels, 0.1, seeded(1))
        for images, labels in ((x, y), (other_x, other_y))
    ]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_works_in_any_grad_mode_of_the_caller(attack_and_model, batch, context):
    (attack, model), (x, y) = attack_and_model, batch
    expected = attack.run(model, x, y, 0.1, seeded())
    with context():
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        x_adv = attack.run(model, x.clone(), y.clone(), 0.1, seeded())
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == modes
    assert torch.equal(x_adv, expected)


def test_images_that_require_a_gradient_get_none_and_stay(attack, batch):
    x, y = batch[0].requires_grad_(), batch[1]
    x_adv = attack.run(linear_model(36), x, y, 0.1)
    assert x.grad is None
    assert x.requires_grad
    assert not x_adv.requires_grad


def test_a_plain_function_is_a_model(search, batch):
    module = linear_model(36)
    module_result, function_result = (
        search.run(model, *batch, 0.1, seeded()) for model in (module, lambda x: module(x))
    )
    assert torch.equal(module_result, function_result)


def test_autocast_of_the_caller(search, batch):
    model = linear_model(36)
    with torch.autocast("cpu", torch.bfloat16):
        x_adv = search.run(model, *batch, 0.1)
        logits = model(batch[0])
    assert x_adv.dtype == torch.float32
    assert logits.requires_grad
    (grad,) = torch.autograd.grad(logits.sum(), model[1].weight)  # the attack left no stale weight in autocast's cache
    assert grad.abs().sum() > 0


def test_the_result_can_be_trained_on(model, batch):
    x, y = batch
    x_adv = pgd(model.train(), x, y, eps=0.1, step_size=0.05, steps=2)
    assert not x_adv.requires_grad
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of dropout
        nn.functional.cross_entropy(model(x_adv), y).backward()
        torch.manual_seed(0)
        wanted = torch.autograd.grad(nn.functional.cross_entropy(model(x_adv.clone()), y), list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert any(float(gradient.abs().sum()) > 0 for gradient in wanted)


class Bare(nn.Module):
    """One time step per call; the states stay unless ``resets``."""

    def __init__(self, *, resets):
        super().__init__()
        self.linear, self.neuron, self.resets = nn.Linear(36, 5), DLIFNode(T=50, step_mode="s"), resets

    def forward(self, x):
        if self.resets:
            functional.reset_net(self)
        return self.neuron(self.linear(x.flatten(1)))


@pytest.mark.parametrize("place", ["itself", "inside"])
def test_a_state_carried_from_forward_to_forward_ends_the_attack(batch, place):
    net = Bare(resets=False).eval()
    with pytest.raises(RuntimeError, match="DLIFNode still holds the state of the forward before, so every step"):
        pgd(net if place == "itself" else nn.Sequential(net), *batch, eps=0.1, step_size=0.05, steps=3)
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_a_network_that_resets_itself_is_attacked(batch):
    torch.manual_seed(0)
    net, x = Bare(resets=True).eval(), batch[0]
    x_adv = pgd(net, x, net(x).argmax(1), eps=0.1, step_size=0.05, steps=3, keep_best=False)
    assert 0 < (x_adv - x).abs().max() <= 0.1 + 1e-6


@pytest.mark.slow
def test_a_compiled_network_is_not_looked_at():
    """Its compiled call runs no hooks of the neurons inside."""
    plain, compiled, inside = Bare(resets=True), Bare(resets=True), nn.Sequential(Bare(resets=True))
    compiled.compile()
    inside[0].compile()
    wrapped = torch.compile(Bare(resets=True))
    for net, hooks in ((plain, 1), (compiled, 0), (inside, 0), (wrapped, 0)):
        with refuse_carried_states(net):
            assert len(net._forward_pre_hooks) == hooks
