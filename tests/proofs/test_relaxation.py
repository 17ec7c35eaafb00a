"""Tighter methods of verify prove no image that can be fooled, and what they break is broken."""

import gc
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from covering import mostly_slow
from proofs import fuzz
from proofs.collected import no_collection, tensors_of_cycles
from proofs.networks import (
    NETWORKS,
    NEURONS,
    SAMPLED,
    T,
    assert_keep_their_class,
    batch,
    classifier,
    convolutional,
    in_steps,
    perturbed,
)
from scipy import sparse
from spikingjelly.activation_based import layer, neuron, surrogate
from torch import nn

from sj_robust import SpikingClassifier
from sj_robust.core.preserved import full_precision, preserved
from sj_robust.proofs import batches, branching, exact, relaxation, verify
from sj_robust.proofs.branching import Prover
from sj_robust.proofs.logits import bounded_logits
from sj_robust.proofs.relaxation import Maps, RelaxedRun, minimum
from sj_robust.proofs.spiking import Interval
from sj_robust.proofs.verification import _checked
from sj_robust.proofs.windows import weighted_sums

METHODS = ("ibp", "joint", "crown", "bab", "mip")


def relaxed(model, x, eps, *, tight=False):
    """Maps and a run of a network on the boxes of images."""
    neurons = _checked(model, x, torch.zeros(len(x), dtype=torch.long), of_events=False)
    maps = Maps(partial(bounded_logits, model), neurons, x[0])
    with full_precision(x.device), preserved(model):
        run = RelaxedRun(neurons, len(x), maps=maps if tight else None)
        run.error = maps.bounded(run, x, eps).error
    return maps, run


def bounds_of(maps, run, model, weights, *given, samples=None, **slopes):
    """Of one weighted sum for each sample, unless its sample is given for each sum."""
    if samples is None:
        samples = torch.arange(len(weights))
    with full_precision(weights.device), preserved(model):
        return minimum(maps, run, samples, weights, *given, **slopes)


def normal(*size, generator=None):
    return torch.randn(*size, generator=generator, dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize(("build", "node", "step_mode"), SAMPLED)
def test_no_weighted_sum_of_logits_and_no_spike_leaves_its_bounds(build, node, step_mode):
    options = {"mean": [0.5, 0.4], "std": [0.3, 0.2]}
    model = classifier(build, NEURONS[node], step_mode=step_mode, **options)
    x, y = batch(model, 3)
    for eps, tight in ((0.003, True), (0.03, False)):
        maps, run = relaxed(model, x, eps, tight=tight)
        weights = normal(3, 3)
        lower = bounds_of(maps, run, model, weights).value
        for z in perturbed(model, x, y, eps):
            seen, logits = fuzz.run_of(model, z)
            sums = (logits.double() * weights).sum(1)
            assert (sums >= lower).all(), eps
            steps_of = {name: iter(spikes.bool()) for name, (spikes, _) in seen.items()}
            for stage in run.stages:
                if stage.neuron is None:
                    continue
                for step in stage.steps:
                    spikes = next(steps_of[stage.neuron.name])
                    assert (spikes <= step.fires).all(), eps
                    assert (~spikes <= step.quiet).all(), eps


def test_without_open_spikes_the_bound_is_that_of_the_affine_map():
    """At eps 0 no spike is open, and the lower bound is the value but for rounding."""
    for node in NEURONS:
        model = classifier(NETWORKS[1], NEURONS[node])
        x = torch.rand(2, 2, 8, 8)
        maps, run = relaxed(model, x, 0.0)
        weights = normal(2, 3)
        found = (model(x).detach().double() * weights).sum(1)
        lower = bounds_of(maps, run, model, weights).value
        assert (lower <= found).all()
        torch.testing.assert_close(lower, found, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("on_spike", "on_potential", "upper", "middle"),
    [
        (1.0, 0.0, 2.0, 0.0),
        (-1.0, 0.0, 2.0, -1.0),
        (0.0, 1.0, 2.0, 0.0),
        (0.0, -1.0, 2.0, -1.0),
        (-1.0, 0.0, 1.5, -0.75),
    ],
)
def test_a_jump_is_bounded_by_an_edge_of_its_hull(on_spike, on_potential, upper, middle):
    """h in [0, upper], threshold 1, hard reset to 0: the edge's height at the middle."""
    silent = relaxation._Piece(Interval(*row(0.0, 1.0).T), *row(0.0, on_potential).T)
    fired = relaxation._Piece(Interval(*row(1.0, upper).T), *row(on_spike, on_spike).T)
    slope = relaxation._slope(silent, fired, 1.0)
    offset = min(*silent.heights(slope), *fired.heights(slope))
    assert float(slope * upper / 2 + offset) == pytest.approx(middle)


def small(node, *, seed=0):
    torch.manual_seed(seed)
    parts = (layer.Linear(3, 5), node(), layer.Linear(5, 4), node(), layer.Linear(4, 3))
    for part in parts[::2]:
        nn.init.normal_(part.weight, 0.5, 2.0)  # so that neurons fire, each at some inputs
    return in_steps(*parts)


def pixels(count, *, seed, dtype=torch.float32):
    """Images for :func:`small`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, generator=generator, dtype=dtype)


def grid(x, eps, points):
    """All points of a lattice in the box of one image [1, features]."""
    lower = (x - eps).clamp(min=0)[0]
    upper = (x + eps).clamp(max=1)[0]
    share = torch.linspace(0, 1, points)
    axes = [low + share * (high - low) for low, high in zip(lower, upper, strict=True)]
    return torch.cartesian_prod(*axes).clamp(lower, upper)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "eps", "node"),
    [(1, 0.02, "LIF"), (2, 0.1, "DLIF"), (3, 0.3, "LIF soft")],
)
def test_exact_agrees_with_a_lattice_and_stands_between_the_bounds_and_attacks(seed, eps, node):
    model = small(NEURONS[node], seed=seed)
    x = pixels(2, seed=seed)
    y = model(x).argmax(1)
    limits = dict.fromkeys(METHODS, 3.0) | {"mip": 5.0}
    results = {}
    for method, limit in limits.items():
        results[method] = verify(model, x, y, eps, method=method, time_limit=limit)
    for i in range(2):
        lattice = grid(x[i : i + 1], eps, 12)
        fooled = bool((model(lattice).argmax(1) != y[i]).any())
        for result in results.values():
            assert not (result.verified[i] and fooled)
            assert not (result.verified[i] and result.broken[i])
            if result.broken[i]:
                assert_broken(model, x[i], y[i], eps, result.x_adv[i])
    for looser, tighter in STRONGER:
        for before, after in zip(results[looser].verified, results[tighter].verified, strict=True):
            assert after or not before
    branched = results["bab"]
    exact = results["mip"]
    assert sum(exact.unknown) <= 1, exact.table()
    for i in range(2):
        assert not (branched.broken[i] and exact.verified[i])
        assert not (branched.verified[i] and exact.broken[i])


STRONGER = [("ibp", "joint"), ("joint", "crown"), ("crown", "bab"), ("joint", "mip")]


def assert_broken(model, x, y, eps, z):
    """An image within the ball and [0, 1] that gets another class."""
    assert int(model(z.unsqueeze(0)).argmax(1)) != int(y)
    assert float((z.double() - x.double()).abs().max()) <= eps
    assert float(z.min()) >= 0
    assert float(z.max()) <= 1


def test_margins_are_never_below_those_of_intervals_and_the_networks_own_at_zero():
    model = classifier(NETWORKS[0], NEURONS["DLIF"])
    x = torch.rand(6, 2, 8, 8)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    correct = model(x).argmax(1) == y
    for eps in (0.0, 0.002, 0.02):
        plain, joint, crown, bab = (
            verify(model, x, y, eps, method=m, time_limit=2.0) for m in METHODS[:4]
        )
        assert joint.layers == crown.layers == bab.layers
        for before, after in ((plain, joint), (joint, crown), (crown, bab)):
            for a, b in zip(after.margin, before.margin, strict=True):
                if a > -torch.inf:
                    assert a >= b
        if eps == 0.0:
            assert bab.verified == tuple(correct.tolist()) == crown.verified
            assert bab.broken == tuple((~correct).tolist())


def pooled(node):
    return nn.Sequential(
        layer.Conv2d(1, 2, 3, padding=1),
        layer.MaxPool2d(2),
        node(),
        layer.MaxPool2d(2, stride=1),
        layer.Flatten(),
        layer.Linear(2, 2),
    )


@pytest.mark.slow
@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_exact_goes_through_pooling_residuals_and_single_steps(step_mode):
    broken = verified = 0
    for seed in range(2):
        model = classifier(pooled, neuron.LIFNode, seed=seed, step_mode=step_mode)
        x = torch.rand(2, 1, 4, 4)
        y = model(x).argmax(1)
        for eps in (0.02, 0.4):
            result = verify(model, x, y, eps, method="mip", time_limit=20.0)
            assert not any(result.unknown)
            assert_keep_their_class(model, x, y, eps, result.verified)
            broken += sum(result.broken)
            verified += sum(result.verified)
    assert broken > 0
    assert verified > 0


@pytest.mark.slow
def test_the_limit_of_time_ends_the_search():
    model = classifier(NETWORKS[1], NEURONS["LIF"])
    x, y = batch(model, 1)
    for method in ("bab", "mip"):
        result = verify(model, x, y, 0.05, method=method, time_limit=1e-3)
        for verdicts in zip(result.verified, result.broken, result.unknown, strict=True):
            assert sum(verdicts) == 1
        assert any(result.unknown)


@pytest.mark.slow
def test_a_network_in_float64_is_broken_by_images_in_float64():
    model = small(neuron.IFNode, seed=3).double()
    x = pixels(2, seed=0, dtype=torch.float64)[1:]
    y = model(x).argmax(1)
    for method in ("bab", "mip"):
        result = verify(model, x, y, 0.5, method=method)
        assert result.broken == (True,)
        assert_broken(model, x[0], y[0], 0.5, result.x_adv[0])


def one_neuron(v_reset):
    """Two neurons on one input in [0, 1], at threshold 0.5 and, in the second step, after the
    reset.
    """
    linear = nn.Linear(1, 2)
    linear.weight.data = torch.tensor([[0.5], [-0.5]])
    linear.bias.data = torch.tensor([0.2, 0.7])
    return in_steps(linear, neuron.IFNode(v_threshold=0.5, v_reset=v_reset), T=2)


def pixel(value):
    """An image for :func:`one_neuron`."""
    return torch.full((1, 1), value)


def verdict(model, x, eps, *, method="mip", **options):
    """What is said of the class that a network gives one image."""
    y = model(x).argmax(1)
    return verify(model, x, y, eps, method=method, **options)


def row(*values):
    return torch.tensor([values], dtype=torch.float64)


def lowest_with(model, slopes, weights, change=lambda run: None):
    """Bounds [R] of weighted logits over x in [0, 1], from slopes of every step."""
    maps, run = relaxed(model, pixel(0.5), 0.5)
    change(run)
    samples = torch.zeros(len(weights), dtype=torch.long)
    return bounds_of(maps, run, model, weights, samples=samples, slopes=slopes).value


@pytest.mark.parametrize("v_reset", [0.0, -0.2, None])
def test_every_end_of_both_pieces_holds_the_line_down(v_reset):
    model = one_neuron(v_reset)
    generator = torch.Generator().manual_seed(0)
    weights = normal(512, 2, generator=generator)
    x = torch.linspace(0, 1, 4001).unsqueeze(1)
    seen = (model(x).detach().double() @ weights.T).amin(0)
    for scale in (0.2, 1.0, 4.0):
        slopes = {}
        for t in (0, 1):
            slopes[0, t] = scale * normal(512, 2, generator=generator)
        assert (lowest_with(model, slopes, weights) <= seen).all()


def test_errors_of_charge_and_reset_widen_the_bound_by_the_weight_on_them(monkeypatch):
    model = one_neuron(0.0)
    weights = row(1.0, 0.0)

    def wrong_charge(run):
        step = run.stages[0].steps[0]
        step.error = step.error + 0.5

    for slope in (3.0, -3.0):
        slopes = {(0, 1): row(2.0, 0.0), (0, 0): row(slope, 0.0)}
        before = lowest_with(model, slopes, weights)
        after = lowest_with(model, slopes, weights, wrong_charge)
        assert float(before - after) == pytest.approx(3.0 * 0.5)
    monkeypatch.setattr(relaxation, "reset_rounding", lambda size, rest, threshold: 0.25 * size)
    after = lowest_with(model, slopes | {(0, 0): row(3.0, 0.0)}, weights)
    assert float(before - after) > 2.0 * 0.25 * 0.5


def test_the_largest_potential_is_that_of_the_input_just_below_the_threshold():
    """h[1] = v[0] + x with x in [0.2, 0.7]: 0.5 + 0.5 where there is nearly a spike; slope 1 finds
    just that.
    """
    model = one_neuron(0.0)
    maps, run = relaxed(model, pixel(0.5), 0.5)
    for slope in (-2.0, 0.0, 1.0, 3.0):
        slopes = {(0, 0): row(slope, 0.0)}
        least = bounds_of(maps, run, model, row(-1.0, 0.0), (0, 1), slopes=slopes).value
        assert float(least) <= -1.0
        if slope == 1.0:
            assert float(least) == pytest.approx(-1.0, abs=1e-4)


def test_without_scipy_mip_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    without_shortcuts(monkeypatch)
    with pytest.raises(ModuleNotFoundError, match="scipy, which is not installed: pip install"):
        verdict(one_neuron(0.0), pixel(0.5), 0.5)


def without_shortcuts(monkeypatch):
    """Neither a first bound proves an image nor the corner of one breaks it."""

    def no_bound(prover, images, labels):
        return torch.full((len(images),), -1.0).double()

    monkeypatch.setattr(Prover, "broken", lambda *args, **kwargs: {})
    monkeypatch.setattr(Prover, "crown", no_bound)


@pytest.mark.parametrize("answers", ["2", "1", "x2"])
def test_no_word_of_the_solver_alone_is_a_proof(monkeypatch, answers):
    """The image can be turned: "infeasible" is wrong, and nothing may come of it."""
    without_shortcuts(monkeypatch)
    said = iter(answers)  # statuses of HiGHS, or a point that does not fool the network

    def milp(costs, **arguments):
        answer = next(said)
        if answer == "x":
            return SimpleNamespace(x=costs + 0.5, status=0)
        return SimpleNamespace(x=None, status=int(answer))

    monkeypatch.setattr("scipy.optimize.milp", milp)
    assert verdict(one_neuron(0.0), pixel(0.2), 0.8).verified == (False,)


@pytest.mark.parametrize("seed", mostly_slow(range(4), quick=[0, 1]))
def test_a_tree_of_linear_programs_closes_what_is_robust(seed, monkeypatch):
    """Without the relaxation's bounds, what mip proves is what no point of a lattice turns."""
    without_shortcuts(monkeypatch)
    rivals = Prover.rivals

    def all_open(self, *arguments):
        found = rivals(self, *arguments)
        return replace(found, bounds=-found.bounds.abs() - 1.0, broken={})

    monkeypatch.setattr(Prover, "rivals", all_open)
    model = small(NEURONS["LIF"], seed=seed)
    x = pixels(1, seed=seed)
    y = model(x).argmax(1)
    monkeypatch.setattr(batches._Batch, "open_ones", lambda batch: [0])
    result = verify(model, x, y, 0.05, method="mip", time_limit=30.0)
    turned = bool((model(grid(x, 0.05, 20)).argmax(1) != y).any())
    assert result.verified == (not turned,)


def test_multipliers_of_any_kind_give_a_lower_bound():
    generator = np.random.default_rng(0)
    for _ in range(50):
        matrix = sparse.csr_matrix(generator.normal(size=(5, 4)))
        costs = generator.normal(size=4)
        limits = generator.uniform(0.5, 1.0, size=5)
        lower = -np.ones(4)
        upper = np.ones(4)
        points = generator.uniform(-1.0, 1.0, size=(2000, 4))
        allowed = points[(points @ matrix.T <= limits).all(1)]
        program = exact._LinearProgram(costs, matrix, limits, lower, upper)
        for size in (0.0, 1.0, 100.0):
            multipliers = size * generator.uniform(size=5)
            least = program.safe_minimum(multipliers)
            assert (allowed @ costs >= least).all()


@pytest.mark.parametrize("factor", [1e6, 1e9])
def test_a_program_with_large_coefficients_is_not_solved(monkeypatch, factor):
    without_shortcuts(monkeypatch)
    monkeypatch.setattr("scipy.optimize.milp", lambda *args, **kwargs: pytest.fail("solved"))
    model = one_neuron(0.0)
    model.net[0].weight.data *= 4 * factor
    assert verdict(model, pixel(0.5), 0.5).unknown == (True,)


def test_a_program_finds_the_spike_that_loses_the_lead(monkeypatch):
    without_shortcuts(monkeypatch)
    assert verdict(one_neuron(0.0), pixel(0.2), 0.8).broken == (True,)


class Step(surrogate.ATan):
    """Without a gradient."""

    def forward(self, x):
        return (x >= 0).to(x)


class Aside(nn.Module):
    """Logits of the image, beside a neuron that nothing hangs on."""

    def __init__(self):
        super().__init__()
        self.node = neuron.IFNode(step_mode="m")
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        self.node(x)
        return self.head(x)


@pytest.mark.parametrize("method", METHODS)
def test_a_network_without_a_gradient_to_its_input_is_searched_as_any_other(method):
    torch.manual_seed(0)
    steps = neuron.IFNode(surrogate_function=Step())
    without_slope = in_steps(nn.Linear(3, 5), steps, nn.Linear(5, 2))
    beside = SpikingClassifier(Aside(), T).eval()
    for model in (without_slope, beside):
        x = torch.rand(4, 3)
        y = model(x).argmax(1)
        result = verify(model, x, y, 0.3, method=method, time_limit=2.0)
        for number, verified in enumerate(result.verified):
            points = grid(x[number : number + 1], 0.3, 8)
            same = model(points).argmax(1) == y[number]
            assert same.all() or not verified


def test_a_bound_that_is_not_a_number_proves_nothing(monkeypatch):
    model = small(neuron.IFNode)
    x = torch.full((1, 3), 0.5)

    def no_number(maps, run, samples, *rest):
        nothing = torch.full((len(samples),), torch.nan, dtype=torch.float64)
        return SimpleNamespace(value=nothing)

    def nothing(maps, run, samples, weights, *, rounds):
        value = torch.full((len(samples),), torch.nan, dtype=torch.float64)
        return replace(relaxation.minimum(maps, run, samples, weights), value=value)

    with monkeypatch.context() as patch:
        without_shortcuts(patch)
        patch.setattr(branching, "raised", nothing)
        assert verdict(model, x, 0.5, method="bab", time_limit=0.01).verified == (False,)
    with monkeypatch.context() as patch:
        patch.setattr(relaxation, "minimum", no_number)
        _, run = relaxed(model, x, 0.3, tight=True)
    _, plain = relaxed(model, x, 0.3)
    assert not run.empty.any()
    for stage, same in zip(run.stages, plain.stages, strict=True):
        for step, other in zip(stage.steps, same.steps, strict=True):
            assert torch.equal(step.lower, other.lower)


def test_branch_and_bound_proves_every_rival():
    """The first rival is proved at once, and the second one never is."""
    bounds = torch.tensor([-1.0, -2.0])
    search = branching._Search(0, torch.eye(2), bounds, parts=10)
    (first,) = search.next_ones()
    search.learn(first, 1.0, None)
    assert not search.done
    assert search.rival == 1
    (second,) = search.next_ones()
    search.learn(second, -1.0, (0, 0, 0))
    left, right = search.next_ones()
    assert left.decisions == ((0, 0, 0, False),)
    assert right.decisions == ((0, 0, 0, True),)
    search.learn(left, 0.5, None)
    search.learn(right, -1.0, None)  # every spike is decided
    assert search.failed
    assert search.next_ones() == []


def test_a_search_proves_nothing_when_its_work_is_done():
    search = branching._Search(0, torch.eye(2), torch.tensor([-1.0, 1.0]), parts=2)
    (part,) = search.next_ones()
    search.learn(part, -1.0, (0, 0, 0))
    (only,) = search.next_ones()  # of two
    search.learn(only, 1.0, None)
    assert search.next_ones() == []
    assert search.failed


@pytest.mark.slow
def test_branch_and_bound_of_an_image_does_not_depend_on_the_others(monkeypatch):
    """Of two images that stay unknown, one that is broken and one that is verified."""
    model = small(NEURONS["DLIF"], seed=2)
    x = pixels(6, seed=2)[[0, 1, 2, 5]]
    y = model(x).argmax(1)
    searched = []
    bound = Prover._bound

    def watched(prover, root, images, labels, parts):
        searched.append({part.search.number for part in parts})
        bound(prover, root, images, labels, parts)

    def searched_for(images, labels, **options):
        return verify(model, images, labels, 0.2, method="bab", time_limit=0.01, **options)

    monkeypatch.setattr(Prover, "_bound", watched)
    whole = searched_for(x, y)
    assert max(map(len, searched)) > 1
    assert whole.unknown == (True, False, False, True)
    assert whole.broken == (False, True, False, False)
    assert whole.verified == (False, False, True, False)
    for i in range(4):
        alone = searched_for(x[i : i + 1], y[i : i + 1])
        assert alone.verified[0] == whole.verified[i]
        assert alone.broken[0] == whole.broken[i]
        assert alone.margin[0] == pytest.approx(whole.margin[i], rel=1e-6, abs=1e-9)
    again = searched_for(x, y, batch_size=2)
    assert again.verified == whole.verified
    assert again.broken == whole.broken


@pytest.mark.parametrize("method", mostly_slow(METHODS[:4], quick=["joint"]))
def test_memory_does_not_grow_with_the_images(method):
    model = small(NEURONS["DLIF"], seed=2)
    x = pixels(20, seed=2)
    y = model(x).argmax(1)
    held = {}

    def held_tensors(done):
        if done not in (10, 20):  # once all trains have been listed, and at the end
            return
        gc.collect()
        tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, nn.Parameter)]
        held[done] = sum(one.untyped_storage().nbytes() for one in tensors)

    options = {"method": method, "time_limit": 0.001, "batch_size": 2}
    verify(model, x, y, 0.1, on_batch=held_tensors, **options)
    assert held[20] <= 1.02 * held[10]


@pytest.mark.parametrize("method", mostly_slow(METHODS[:4], quick=["crown"]))
def test_a_proof_leaves_no_tensors_to_the_collector(method):
    """Python looks for cycles rarely, and the batches of a proof would add up until then."""
    model = small(NEURONS["DLIF"], seed=2)
    x = pixels(4, seed=2)
    y = model(x).argmax(1)
    options = {"method": method, "time_limit": 0.001, "batch_size": 2}
    verify(model, x, y, 0.1, **options)
    with no_collection():
        verify(model, x, y, 0.1, **options)
        assert not tensors_of_cycles()


_PEAK = """
import sys, torch
from pathlib import Path
from sj_robust.models import pretrained
from sj_robust.proofs import verify

def megabytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

torch.set_num_threads(1)
model = pretrained("digits/dlif-at-mppd").eval()
x = torch.rand(int(sys.argv[1]), 1, 8, 8)
y = model(x).argmax(1)
verify(model, x[:2], y[:2], 0.004)
before = megabytes("VmRSS:")
verify(model, x, y, 0.004, batch_size=32)
print(before, megabytes("VmHWM:"))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells the peak of a process")
def test_the_peak_of_memory_does_not_grow_with_the_images():
    """Megabytes of a process that proves one batch of 32 images, and one that proves sixteen.

    Not ``ru_maxrss``: the kernel begins it with that of the process that started this one.
    """
    grown = []
    for images in (32, 512):
        command = [sys.executable, "-c", _PEAK, str(images)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        before, after = map(float, done.stdout.split())
        grown.append(after - before)
    assert grown[0] > 5
    assert grown[1] < 2.5 * grown[0], grown


class BesideItsMaximum(nn.Module):
    """Two logits: the larger of twice a pixel and the next, and the next less 0.1. The neuron is
    silent.
    """

    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d((1, 2))
        self.node = neuron.IFNode(step_mode="m", v_threshold=9.0)

    def forward(self, x_seq):
        x = x_seq.flatten(0, 1) * torch.tensor([2.0, 1.0])
        greatest = self.pool(x)
        silent = self.node(greatest[None])[0]
        other = x[..., 1:] - 0.1 + silent
        logits = torch.cat((greatest, other), 1).flatten(1)
        return logits.unsqueeze(0)


def test_the_rounding_of_every_term_lowers_the_bound(monkeypatch):
    weights = torch.eye(2, dtype=torch.float64)
    bounds = []
    for rounding in (0.0, 1.0):  # in place of 1e-10, which would be lost in the sum
        monkeypatch.setattr(relaxation, "_ROUNDING", rounding)
        bounds.append(lowest_with(one_neuron(0.0), None, weights))
    # the terms' sizes are more than their sum's
    assert (bounds[0] - bounds[1] > bounds[0].abs()).all()


def test_back_substitution_moves_both_ends_of_potentials_inwards():
    model = small(neuron.IFNode)
    x = torch.rand(6, 3)
    lower, upper = potentials(model, x, tight=False)
    tight_lower, tight_upper = potentials(model, x, tight=True)
    for inwards in (tight_lower - lower, upper - tight_upper):
        assert inwards.min() >= 0
        assert inwards.max() > 0.5


def potentials(model, x, *, tight):
    """Both ends of the potentials of all steps of all layers."""
    _, run = relaxed(model, x, 0.15, tight=tight)
    lower = []
    upper = []
    for stage in run.stages:
        for step in stage.steps:
            lower.append(step.lower.flatten())
            upper.append(step.upper.flatten())
    return torch.cat(lower), torch.cat(upper)


def test_a_maximum_hangs_on_the_value_whose_lower_bound_is_the_largest():
    model = SpikingClassifier(BesideItsMaximum(), T=1).eval()
    x = torch.tensor([[[[0.3, 0.5]]]])
    y = torch.tensor([0])
    assert verify(model, x, y, 0.2, method="ibp").verified == (False,)
    assert verify(model, x, y, 0.2, method="crown").verified == (True,)


@pytest.mark.parametrize("weight", [-0.5, 0.0, 0.5])
def test_the_slope_of_a_sum_along_a_weight_is_one_of_the_ends_also_at_zero(weight):
    weights = torch.tensor([[weight]], requires_grad=True)
    ends = Interval(torch.tensor([[2.0]]), torch.tensor([[3.0]]))
    for end in ("low", "high"):
        sums = getattr(weighted_sums(weights, ends), end)
        (slope,) = torch.autograd.grad(sums.sum(), weights)
        assert slope.item() in (2.0, 3.0)


def test_a_row_that_is_proved_stays_as_it_is_however_long_others_take():
    nothing = torch.zeros(3, 2)
    first = relaxation.Lower(torch.tensor([0.5, -1.0, -1.0]), {}, {}, nothing)
    second = relaxation.Lower(torch.tensor([0.9, 0.3, -2.0]), {}, {}, nothing + 1)
    found = relaxation._better(first, second)
    assert found.value.tolist() == pytest.approx([0.5, 0.3, -1.0])
    assert found.weights[:, 0].tolist() == [0.0, 1.0, 0.0]


def test_parameters_are_converted_once_for_all_runs(monkeypatch):
    model = classifier(convolutional, NEURONS["LIF"])
    x = torch.rand(2, 2, 8, 8)
    y = model(x).argmax(1)
    converted = []
    double = torch.Tensor.double

    def counting(value):
        converted.append(value.data_ptr())
        return double(value)

    monkeypatch.setattr(torch.Tensor, "double", counting)
    verify(model, x, y, 0.01, method="ibp")
    for name, value in model.named_parameters():
        assert converted.count(value.data_ptr()) == 1, name
