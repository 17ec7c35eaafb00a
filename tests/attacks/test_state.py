"""What an attack leaves as it found it, samples, gradients, modes and random state, and what it
depends on.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import combinations
from time import sleep

import pytest
import torch
from attacks.conftest import untrained
from attacks.table import (
    ATTACKS,
    EVERY,
    MODELS,
    ON_IMAGES,
    Recorder,
    all_generators,
    left_as_it_was,
    linear_model,
    seeded,
)
from covering import each_in_turn
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from sj_robust import SpikingClassifier
from sj_robust.attacks import SampleSeeds, ThreatModel, autoattack, fgsm, pgd, spike_search
from sj_robust.core.preserved import evaluation_mode, locked
from sj_robust.neuron import DLIFNode

SEEDS = SampleSeeds(range(11, 18))


@pytest.mark.parametrize("fail_at", [None, 1])
def test_network_and_generators_are_left_as_they_were(any_search, fail_at):
    of_package = any_search in ATTACKS.values()
    model = untrained("dlif") if of_package else nn.Sequential(linear_model(36), nn.Dropout())
    draws = all_generators if any_search in ON_IMAGES.values() else torch.rand
    if any_search.function is spike_search:  # which refuses a network that draws
        draws = torch.ones
    x, y = any_search.samples()
    with left_as_it_was(model, fail_at, draws=draws):
        any_search.run(model, x, y, any_search.small, seeded() if fail_at else None)


def test_a_refusal_of_random_numbers_leaves_network_and_generators_as_they_were(batch):
    model = untrained("dlif")
    refused = pytest.raises(ValueError, match="got one that draws random numbers")
    with left_as_it_was(model), refused:
        spike_search(model, *batch, eps=0.1)


@pytest.mark.parametrize("name", ["pgd_last_restarts", "apgd_targeted"])
def test_any_network_is_left_as_it_was(model, batch, name):
    with left_as_it_was(model):
        ATTACKS[name].run(model, *batch, 0.1)


def test_other_seeds_and_no_generator_give_other_numbers(any_attack):
    x, y = any_attack.samples()

    def everything_seen(generator) -> list[list[float]]:
        model = Recorder(linear_model(36))
        torch.manual_seed(0)  # does not govern the attack, whose numbers are fresh each time
        result = any_attack.run(model, x, y, any_attack.small, generator)
        return [images.tolist() for images in (*model.seen, result)]

    others = (seeded(5), seeded(6), SEEDS, SEEDS.derived("other"), None, None)
    with torch.random.fork_rng():
        runs = [everything_seen(given) for given in others]
        assert everything_seen(SEEDS) == runs[2]
        assert everything_seen(seeded(5)) == runs[0]
    for first, second in combinations(runs, 2):
        assert (first != second) == any_attack.draws


def test_a_call_draws_one_number_whatever_its_options():
    """So that one generator serves consecutive calls with new numbers."""
    states = []
    for name in ("gaussian", "fgsm", "pgd", "pgd_l2_restarts", "pgd_eot", "flips", "square"):
        generator = seeded()
        attack = EVERY[name]
        attack.run(linear_model(36), *attack.samples(), attack.usual, generator)
        states.append(generator.get_state())
    for state in states:
        assert torch.equal(state, states[0])
    assert not torch.equal(states[0], seeded().get_state())


def test_a_result_depends_on_neither_batch_nor_neighbours(attack):
    if attack.function is autoattack:
        pytest.skip("the numbers of the library are those of the batch")
    x, y = attack.samples(torch.float64)
    model = linear_model(36, torch.float64, seed=3)
    eps = attack.usual
    together = attack.run(model, x, y, eps, SEEDS)
    for rows in ([0], [5, 2], [6, 0, 1, 3]):
        rows = torch.tensor(rows)
        some = attack.run(model, x[rows], y[rows], eps, SEEDS.rows(rows))
        torch.testing.assert_close(some, together[rows], rtol=0, atol=1e-12)
    others = torch.cat([x[:1], x[1:].flip(0)]), torch.cat([y[:1], (y[1:] + 1) % 5])
    first = attack.run(model, x, y, eps, seeded(1))[0]
    second = attack.run(model, *others, eps, seeded(1))[0]
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)


KINDS = each_in_turn(["pgd", "apgd", "spike_search", "square"], MODELS)
KINDS += [("pgd", "lif"), *each_in_turn(["autoattack", "flips", "moves"], ["linear"])]


@pytest.mark.parametrize("attack_and_model", KINDS, indirect=True, ids="-".join)
def test_same_seed_same_result_in_any_grad_mode_of_the_caller(attack_and_model):
    attack, model = attack_and_model
    x, y = attack.samples()
    eps = attack.small
    expected = attack.run(model, x, y, eps, seeded(5))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            x_adv = attack.run(model, x.clone(), y.clone(), eps, seeded(5))
            assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == modes
        assert torch.equal(x_adv, expected), context.__name__


def test_samples_that_require_a_gradient_get_none_and_stay(any_attack):
    x, y = any_attack.samples()
    x.requires_grad_()
    x_adv = any_attack.run(linear_model(36), x, y, any_attack.usual)
    assert x.grad is None
    assert x.requires_grad
    assert not x_adv.requires_grad


def test_a_plain_function_is_a_model(any_search):
    module = linear_model(36)
    arguments = (*any_search.samples(), any_search.usual)
    of_module = any_search.run(module, *arguments, seeded())
    of_function = any_search.run(lambda x: module(x), *arguments, seeded())
    assert torch.equal(of_module, of_function)


def test_autocast_of_the_caller(any_search):
    model = linear_model(36)
    x, y = any_search.samples()
    with torch.autocast("cpu", torch.bfloat16):
        x_adv = any_search.run(model, x, y, any_search.usual)
        logits = model(x)
    assert x_adv.dtype == torch.float32
    # the attack left no stale weight in autocast's cache
    (grad,) = torch.autograd.grad(logits.sum(), model[1].weight)
    assert grad.abs().sum() > 0


def test_the_attack_does_not_see_the_numbers_of_the_callers_next_forward(batch):
    drawn = []

    def model(x):
        drawn.append(torch.rand(3))
        return linear_model(36)(x) * drawn[-1].mean()

    fgsm(model, *batch, eps=0.1)
    assert not torch.equal(drawn[0], torch.rand(3))


@pytest.mark.parametrize("seeds", [SampleSeeds, lambda pair: seeded(pair[1])])
def test_the_draws_of_the_network_follow_the_seeds(seeds):
    drawn = []

    def noisy(x):
        drawn.append(torch.rand(3))
        return x[:, :2] * drawn[-1].sum()

    x = torch.rand(2, 4)
    options = {"step_size": 0.05, "steps": 2, "eot_samples": 3}
    run = partial(pgd, noisy, x, torch.tensor([0, 1]), eps=ThreatModel("L2", 0.1), **options)
    results = [run(generator=seeds(pair)) for pair in ([1, 2], [1, 2], [1, 3])]
    first, again, other = torch.stack(drawn).chunk(3)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(results[0], results[1])


THREADS = 4


def in_threads(count, work):
    """What so many calls give, each in a thread of its own; errors are results."""

    def call(number):
        try:
            return work(number)
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, range(count)))


@pytest.mark.parametrize("form", ["wrapped", "bare", "a function"])
def test_many_threads_attack_one_network_as_one_thread_does(form):
    torch.manual_seed(0)
    parts = (layer.Linear(16, 24), neuron.LIFNode(v_threshold=0.2), DLIFNode(T=3))
    net = nn.Sequential(*parts, layer.Linear(24, 3))
    functional.set_step_mode(net, "m")
    classifier = SpikingClassifier(net, T=3).train()
    forms = {
        "wrapped": nn.Sequential(nn.Identity(), nn.Dropout(), classifier),
        "bare": ResetsItself(net),
        "a function": lambda x: classifier(x),
    }
    x = torch.rand(16, 16)
    y = torch.arange(16) % 3

    def work(number):
        generator = seeded(number)
        return pgd(
            forms[form],
            x,
            y,
            eps=0.1,
            step_size=0.03,
            steps=4,
            generator=generator,
        )

    wanted = [work(number) for number in range(THREADS)]
    for one, other in zip(wanted, in_threads(THREADS, work), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(wanted[0], wanted[1])
    for module in classifier.modules():
        assert module.training


class ResetsItself(nn.Module):
    """A network that needs no classifier, attacked as it is."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.resets_itself = True

    def forward(self, x):
        functional.reset_net(self.net)
        for node in self.net[1:3]:
            node.training = True  # on SpikingJelly 0.0.0.0.14 there is no gradient without
        return self.net(x.expand(3, *x.shape)).mean(0)


class Ensemble(nn.Module):
    """Runs its members in threads of its own, or one after the other."""

    def __init__(self, members):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.pool = None

    def forward(self, x):
        if self.pool is None:
            return sum(member(x) for member in self.members)
        waiting = [self.pool.submit(member, x) for member in self.members]
        return sum(one.result(timeout=20) for one in waiting)


def member():
    net = nn.Sequential(nn.Flatten(2), nn.Linear(16, 3), neuron.LIFNode(v_threshold=0.2))
    functional.set_step_mode(net, "m")
    return SpikingClassifier(net, T=2)


ENSEMBLES = {
    "parts of a network": lambda ensemble: nn.Sequential(nn.Dropout(), ensemble),
    "in a classifier": lambda ensemble: SpikingClassifier(ensemble, T=2, takes="images"),
}


@pytest.mark.parametrize("form", ENSEMBLES)
def test_a_network_that_runs_its_parts_in_threads_does_not_wait_for_itself(form):
    x = torch.rand(4, 1, 4, 4)
    y = torch.arange(4) % 3
    ensemble = Ensemble([member(), member()])
    model = ENSEMBLES[form](ensemble)

    def work(_=None):
        return pgd(model, x, y, eps=0.1, step_size=0.05, steps=3, generator=seeded())

    with ThreadPoolExecutor(2) as ensemble.pool:
        found = [work(), *in_threads(4, work)]
    ensemble.pool = None
    wanted = work()
    for one in found:
        assert torch.equal(one, wanted)
    for module in model.modules():
        assert module.training


@pytest.mark.parametrize("asked", ["the network", "its part"])
def test_another_thread_waits_for_the_same_module_alone(asked):
    net = nn.Sequential(nn.Linear(2, 2))
    order = []

    def work():
        with locked(net if asked == "the network" else net[0]):
            order.append("other")

    with ThreadPoolExecutor(1) as pool:
        with evaluation_mode(net), locked(net):
            running = pool.submit(work)
            if asked == "its part":
                running.result(timeout=20)
            sleep(0.1)
            order.append("this")
        running.result(timeout=20)
    assert order == (["this", "other"] if asked == "the network" else ["other", "this"])


@pytest.mark.slow
@pytest.mark.parametrize("takes", ["images", "sequence", "steps"])
def test_a_new_classifier_is_compiled_and_exported_once_it_is_said_what_its_network_takes(takes):
    torch.compiler.reset()  # what others have compiled is part of what a compiler does
    x = torch.rand(2, 4)
    model = SpikingClassifier(nn.Sequential(nn.Linear(4, 3)), T=2, takes=takes).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")(x)
    exported = torch.export.export(model, (x,)).module()(x)
    assert model.convention is None
    wanted = model(x)
    assert torch.equal(compiled, wanted)
    assert torch.equal(exported, wanted)


def test_a_new_classifier_is_not_compiled_where_a_trial_is_needed():
    model = SpikingClassifier(nn.Sequential(nn.Linear(4, 3)), T=2).eval()
    with pytest.raises(Exception, match=r"call classifier.find_convention\(images\) once, or pass"):
        torch.export.export(model, (torch.rand(2, 4),))


class Bare(nn.Module):
    """One time step per call; the states stay."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(36, 5)
        self.neuron = DLIFNode(T=50, step_mode="s")

    def forward(self, x):
        return self.neuron(self.linear(x.flatten(1)))


@pytest.mark.parametrize("place", ["itself", "inside"])
def test_a_state_carried_from_forward_to_forward_ends_the_attack(batch, place):
    net = Bare().eval()
    model = net if place == "itself" else nn.Sequential(net)
    with pytest.raises(RuntimeError, match="DLIFNode still holds the state"):
        pgd(model, *batch, eps=0.1, step_size=0.05, steps=3)
    for module in net.modules():
        assert not module._forward_pre_hooks
