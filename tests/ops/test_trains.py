"""Bounds of spiking layers: the compiled kernel gives what the reference gives."""

from dataclasses import replace
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from ops.calls import assert_equal, needs_kernel
from spikingjelly.activation_based import neuron, surrogate
from torch import nn
from torch.testing import assert_close

from sj_robust import SpikingClassifier
from sj_robust.ops.dlif.config import HOST_NAMES, Surrogate
from sj_robust.ops.trains import cpp, operator, reference
from sj_robust.ops.trains.config import (
    Constants,
    Currents,
    Trained,
    Trains,
    Windows,
)
from sj_robust.proofs.bounds import bounded_neurons
from sj_robust.proofs.differentiable_chains import DifferentiableChain
from sj_robust.proofs.spiking import Interval, LayerBounds, RealSpiking

pytestmark = needs_kernel
rand = partial(torch.rand, dtype=torch.float64)
randn = partial(torch.randn, dtype=torch.float64)

CASES = {
    "one step": (1, 8, {}),
    "four steps": (4, 8, {}),
    "few windows": (6, 1, {}),
    "many steps": (13, 8, {}),
    "rest below zero": (5, 8, {"rest": -0.5}),
    "rest above zero": (5, 2, {"rest": 0.2}),
    "no decay": (5, 8, {"decay": 1.0}),
    "full decay": (5, 8, {"decay": 0.0}),
    "negative gains": (7, 3, {"gains": (0.5, -1.0, 1.0, -0.25, 0.0, 2.0, -2.0)}),
}


def constants(T, **given):
    numbers = {
        "decay": 0.75,
        "gains": (1.0,) * T,
        "rest": 0.0,
        "threshold": 1.0,
        "above": 1.0 + 2.0**-24,
        "below": 1.0 - 2.0**-24,
        "soft": False,
        "charge_unit": 1e-6,
        "charge_least": 1e-37,
        "reset_unit": 2e-7,
        "reset_least": 1e-38,
    }
    return Constants(**(numbers | given))


def random_steps(case, M=150, *, windowed=True, known=False):
    """Currents, constants and windows of a case, with one run inside; some currents are on a grid
    of quarters.
    """
    T, kept, given = CASES[case]
    windows = Windows(kept)
    numbers = constants(T, **given)
    seen = 2 * randn(T, M)
    seen[:, ::2] = seen[:, ::2].mul(4).round() / 4
    spread = torch.arange(M) % 3
    currents = Currents(seen - spread * rand(T, M), seen + spread * rand(T, M))
    charges = torch.tensor(numbers.gains).double().unsqueeze(1) * seen
    if known:
        low, high = some_spikes(charges, numbers)
        currents = replace(currents, known_low=low, known_high=high)
    if windowed:
        sums = []
        for a, t in windows.listed(T):
            total = torch.zeros(M, dtype=torch.float64)
            for k in range(a, t + 1):
                total = total + numbers.decay ** (t - k) * charges[k]
            sums.append(total)
        middle = torch.stack(sums)
        around = 0.5 * spread * rand(2, *middle.shape)
        error = 1e-6 * rand(T, M)
        currents = replace(
            currents, error=error, sums_low=middle - around[0], sums_high=middle + around[1]
        )
    return currents, numbers, windows


def some_spikes(charges, numbers):
    """Bounds of the spikes of a run, of which some are known."""
    v = torch.full_like(charges[0], numbers.rest)
    spikes = []
    for charge in charges:
        h = numbers.decay * v + charge + (1 - numbers.decay) * numbers.rest
        fired = h >= numbers.threshold
        v = torch.where(fired, numbers.rest, h)
        spikes.append(fired.double())
    seen = torch.stack(spikes)
    low = seen * (rand(seen.shape) < 0.2)
    return low, seen.maximum((rand(seen.shape) < 0.7).double())


def assert_same(found, expected):
    for name, one in vars(found).items():
        assert torch.equal(one, getattr(expected, name)), name


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_the_reference_bit_for_bit(case, known, windowed, instruction_set):
    torch.manual_seed(0)
    given = random_steps(case, windowed=windowed, known=known)
    expected = operator.bounded_steps(*given, backend="reference")
    assert_same(operator.bounded_steps(*given, backend="cpp"), expected)


def random_trains(T, windows, M=150):
    """Trains with cases of some neurons, and with chains of all."""
    open_ones = 90
    sure = (rand(T, M) < 0.3).double()
    possible = sure.maximum((rand(T, M) < 0.4).double())
    place = torch.full((M,), -1, dtype=torch.int32)
    place[torch.randperm(M)[:open_ones]] = torch.arange(open_ones, dtype=torch.int32)
    possible[:, place < 0] = sure[:, place < 0]
    some = torch.stack([torch.randint(2 ** windows.slots(t), (open_ones,)) for t in range(T)])
    more = torch.stack([torch.randint(2 ** windows.slots(t), (open_ones,)) for t in range(T)])
    return Trains(
        sure=sure,
        possible=possible,
        place=place,
        sure_cases=(some & more).to(torch.int16),
        possible_cases=(some | more).to(torch.int16),
    )


def chained(trains, J=9):
    """The same neurons with trains first..last of J, and spikes that agree with these."""
    T, M = trains.sure.shape
    first = torch.randint(J, (M,))
    last = (first + torch.randint(J, (M,))).clamp(max=J - 1)
    last = torch.where(trains.place < 0, first, last)
    spikes = (rand(J, T) < 0.5).double()
    ranges = [spikes[a : b + 1] for a, b in zip(first, last, strict=True)]
    return replace(
        trains,
        sure=torch.stack([some.amin(0) for some in ranges], 1),
        possible=torch.stack([some.amax(0) for some in ranges], 1),
        spikes=spikes,
        first=first,
        last=last,
    )


@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.parametrize(("T", "kept"), [(1, 8), (4, 8), (6, 1), (13, 8)])
def test_sums_over_trains_are_those_of_the_reference(T, kept, chain, instruction_set):
    torch.manual_seed(T)
    windows = Windows(kept)
    trains = random_trains(T, windows)
    if chain:
        trains = chained(trains)
    for F in (1, 3, 16):
        weights = randn(F, T)
        expected = operator.train_sums(weights, trains, windows, backend="reference")
        found = operator.train_sums(weights, trains, windows, backend="cpp")
        assert_close(found, expected, rtol=1e-13, atol=1e-13)
        slack = 1.000001
        centre, radius = operator.train_sums(weights, trains, windows, narrow=slack, backend="cpp")
        low, high = found
        assert centre.dtype == torch.float32
        assert (centre.double() - radius.double() <= low).all()
        assert (centre.double() + radius.double() >= high).all()
        assert_equal((centre, radius), operator.in_float32(low, high, slack))


def random_joint(T, kept, dtype, F=3, M=130, *, grid=False):
    """Sums, weights and powers that want gradients; on a grid many values are equal."""
    torch.manual_seed(T)
    W = len(Windows(kept).listed(T))
    centre = 1.5 * torch.randn(W, M, dtype=dtype)
    width = torch.rand(W, M, dtype=dtype)
    weights = torch.randn(F, T, dtype=dtype)
    if grid:
        centre, width, weights = (part.mul(2).round() / 2 for part in (centre, width, weights))
    powers = torch.tensor(0.5 if grid else 0.8, dtype=dtype) ** torch.arange(T + 1)
    return [part.requires_grad_() for part in (centre - width, centre + width, weights, powers)]


def gradients(ends, given):
    generator = torch.Generator().manual_seed(0)
    total = 0
    for end in ends:
        drawn = torch.randn(end.shape, generator=generator, dtype=torch.float64)
        total = total + (drawn.to(end.dtype) * end).sum()
    return torch.autograd.grad(total, given, allow_unused=True, materialize_grads=True)


JOINT = [
    *product([1, 4, 12], [8], [torch.float32, torch.float64], [False, True], ["triangle"]),
    *product([6], [1], [torch.float32, torch.float64], [False, True], ["triangle"]),
    *product([4], [8], [torch.float32, torch.float64], [False], HOST_NAMES),
]


@pytest.mark.parametrize(("T", "kept", "dtype", "grid", "kind"), JOINT)
def test_sums_for_training_and_their_gradients_are_those_of_the_reference(
    T, kept, dtype, grid, kind, instruction_set
):
    low, high, weights, powers = given = random_joint(T, kept, dtype, grid=grid)
    windows = Windows(kept)
    surrogate = Surrogate(kind, alpha=1.5)
    found = operator.joint_sums((low, high), weights, powers, Trained(1.0, kind, 1.5, 0.5), windows)
    neuron = reference.Spiking(1.0, False, lambda z: surrogate.spike(z / 0.5))
    expected = reference.differentiable_sums((low, high), weights, powers, neuron, windows)
    assert_equal(found, expected)
    close = 1e-4 if dtype == torch.float32 else 1e-9
    grads, wanted = gradients(found, given), gradients(expected, given)
    for one, other in zip(grads, wanted, strict=True):
        size = float(other.detach().abs().max())
        assert size > 0 or T == 1
        assert_close(one, other, rtol=close, atol=close * size)


OF_CHAINS = ("low", "high", "to_last", "from_first", "scale", "shift", "grads")


@pytest.mark.parametrize("place", range(4 + len(OF_CHAINS)))
def test_kernels_refuse_mixed_dtypes_whose_memory_they_would_misread(place):
    neuron = Trained(1.0, "triangle", 1.0, 1.0)
    tensors = [*random_joint(4, 8, torch.float64), *rand(len(OF_CHAINS), 3, 3, 2)]
    tensors[place] = tensors[place].float()
    low, high, weights, powers, *parts = tensors
    chains = dict(zip(OF_CHAINS, parts, strict=True))
    grads = (chains.pop("grads"), rand(3, 3, 2))
    joint = partial(operator.joint_sums, (low, high), weights, powers, neuron, Windows(8))
    chained = partial(cpp.chain_sums_backward, grads, SimpleNamespace(**chains), None)
    with pytest.raises(ValueError, match="must have one dtype"):
        (joint if place < 4 else chained)()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck of torch 2.15
def test_torch_knows_the_operators():
    currents, numbers, windows = random_steps("four steps", M=5)
    given = list(vars(currents).values())
    named = {**vars(numbers), "gains": list(numbers.gains)}
    torch.library.opcheck(
        torch.ops.sj_robust.bounded_steps.default, given, named | {"kept": 8, "backend": "cpp"}
    )
    trains = random_trains(4, windows, M=120)
    parts = vars(trains).values()
    torch.library.opcheck(
        torch.ops.sj_robust.train_sums.default,
        [randn(3, 4), *parts],
        {"kept": 8, "narrow": None, "backend": "cpp"},
    )
    neuron = Trained(1.0, "triangle", 1.0, 1.0).arguments | {"kept": 8}
    torch.library.opcheck(
        torch.ops.sj_robust.joint_sums.default, random_joint(4, 8, torch.float64, M=70), neuron
    )


def test_a_named_backend_that_cannot_run_says_why():
    currents, numbers, windows = random_steps("four steps", M=5)
    with pytest.raises(ValueError, match="supports only hard resets"):
        operator.bounded_steps(currents, replace(numbers, soft=True), windows, backend="cpp")
    with pytest.raises(ValueError, match="supports 14 windows, got 40"):
        operator.bounded_steps(currents, numbers, Windows(40), backend="cpp")
    half = Currents(currents.low.float(), currents.high.float())
    with pytest.raises(ValueError, match=r"bounds float64 on the CPU, got torch\.float32"):
        operator.bounded_steps(half, numbers, windows, backend="cpp")


def test_without_a_library_the_reference_runs(monkeypatch):
    given = random_steps("four steps", M=20)
    expected = operator.bounded_steps(*given)
    monkeypatch.setattr(cpp, "load_library", lambda: "there is none")
    assert_same(operator.bounded_steps(*given), expected)
    with pytest.raises(ValueError, match="there is none"):
        operator.bounded_steps(*given, backend="cpp")


def test_results_do_not_depend_on_the_number_of_threads(threads):
    given = random_steps("four steps", M=5000)
    low, high, weights, powers = tensors = random_joint(4, 8, torch.float32, M=5000)
    found = []
    for count in (1, 3):
        threads(count)
        steps = operator.bounded_steps(*given, backend="cpp")
        trained = Trained(1.0, "triangle", 1.0, 1.0)
        ends = operator.joint_sums((low, high), weights, powers, trained, Windows(8))
        found.append([steps.v_low, *ends, *gradients(ends, tensors)])
    assert_equal(*found)


def chain_gradients(backend, slope, *, centred):
    """Sums over the chains of a layer, and gradients of currents and weights."""
    torch.manual_seed(0)
    node = neuron.LIFNode(tau=2.0, step_mode="m", surrogate_function=slope)
    parts = nn.Linear(2, 3), node
    model = SpikingClassifier(nn.Sequential(*parts), T=4).double().eval()
    (found_node,) = bounded_neurons(model).values()
    spiking = RealSpiking(found_node, LayerBounds(), surrogate_width=0.5)
    low = (2 * rand(300)).requires_grad_()
    high = (low.detach() + rand(300)).requires_grad_()
    weights = randn(5, 4).requires_grad_()
    chain = DifferentiableChain.of(spiking, 4, Interval(low, high))
    if centred:
        sums = chain.centred(weights, backend)
        found = sums.centre, sums.radius
    else:
        ends = chain.bounds(weights, backend)
        found = ends.low, ends.high
    total = sum((randn(5, 300) * part).sum() for part in found)
    return *found, *torch.autograd.grad(total, [low, high, weights])


# a triangle has no derivative far from its gate, which the kernel omits; a sigmoid has one
@pytest.mark.parametrize("slope", [surrogate.Sigmoid(), surrogate.PiecewiseQuadratic()])
@pytest.mark.parametrize("centred", [False, True])
def test_sums_over_chains_and_their_gradients_are_those_of_the_reference(
    slope, centred, instruction_set
):
    found, expected = (
        chain_gradients(name, slope, centred=centred) for name in ("auto", "reference")
    )
    assert all(other.any() for other in expected)
    assert_close(found, expected, rtol=1e-9, atol=1e-9)
