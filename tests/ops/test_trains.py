"""Bounds of spiking layers: the compiled kernel gives what the reference gives."""

import shutil
import subprocess
from dataclasses import fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from spikingjelly.activation_based import neuron, surrogate
from torch import nn
from torch.testing import assert_close

from sj_robust import SpikingClassifier
from sj_robust.ops.dlif import cpp as dlif_cpp
from sj_robust.ops.surrogate import Surrogate
from sj_robust.ops.trains import cpp, operator, reference
from sj_robust.ops.trains.config import (
    Constants,
    Currents,
    StepBounds,
    Trained,
    Trains,
    Windows,
)
from sj_robust.proofs.bounds import bounded_neurons
from sj_robust.proofs.differentiable_chains import DifferentiableChain
from sj_robust.proofs.spiking import Interval, LayerBounds, RealSpiking

needs_kernel = pytest.mark.skipif(
    cpp.unavailable_reason() is not None, reason="the kernel was not built"
)
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
    for field in fields(StepBounds):
        one = getattr(found, field.name)
        other = getattr(expected, field.name)
        assert torch.equal(one, other), field.name


def check_steps(case, *, windowed=True, known=False):
    torch.manual_seed(0)
    given = random_steps(case, windowed=windowed, known=known)
    expected = operator.bounded_steps(*given, backend="reference")
    assert_same(operator.bounded_steps(*given, backend="cpp"), expected)
    return given, expected


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_the_reference_bit_for_bit(case, known, instruction_set):
    check_steps(case, known=known)
    check_steps(case, known=known, windowed=False)


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


def check_sums(T, kept, chain):
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
        exact = operator.in_float32(low, high, slack)
        assert torch.equal(centre, exact[0])
        assert torch.equal(radius, exact[1])


@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.parametrize(("T", "kept"), [(1, 8), (4, 8), (6, 1), (13, 8)])
def test_sums_over_trains_are_those_of_the_reference(T, kept, chain, instruction_set):
    check_sums(T, kept, chain)


KINDS = ("triangle", "atan", "sigmoid", "exponential", "soft_sign", "super_spike", "erf")


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


def both(T, kept, dtype, kind="triangle", width=0.5, *, grid=False):
    """Bounds by kernel and reference, and their gradients."""
    low, high, weights, powers = given = random_joint(T, kept, dtype, grid=grid)
    windows = Windows(kept)
    surrogate = Surrogate(kind, alpha=1.5)
    trained = Trained(1.0, kind, 1.5, width)
    found = operator.joint_sums((low, high), weights, powers, trained, windows)
    neuron = reference.Spiking(1.0, False, lambda z: surrogate.spike(z / width))
    expected = reference.differentiable_sums((low, high), weights, powers, neuron, windows)
    return found, expected, gradients(found, given), gradients(expected, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("T", "kept"), [(1, 8), (4, 8), (6, 1), (12, 8)])
@pytest.mark.parametrize("grid", [False, True])
def test_sums_for_training_and_their_gradients_are_those_of_the_reference(
    T, kept, dtype, grid, instruction_set
):
    found, expected, grads, wanted = both(T, kept, dtype, grid=grid)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    close = 1e-4 if dtype == torch.float32 else 1e-12
    for one, other in zip(grads, wanted, strict=True):
        size = float(other.detach().abs().max())
        assert size > 0 or T == 1
        assert_close(one, other, rtol=close, atol=close * size)


@pytest.mark.parametrize("kind", KINDS)
def test_every_surrogate_has_its_own_derivative(kind, instruction_set):
    for dtype, close in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        _, _, grads, wanted = both(4, 8, dtype, kind)
        for one, other in zip(grads, wanted, strict=True):
            size = float(other.detach().abs().max())
            assert_close(one, other, rtol=close, atol=close * size)


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_the_kernel_of_training_refuses_mixed_dtypes_whose_memory_it_would_misread(place):
    given = list(random_joint(4, 8, torch.float64))
    given[place] = given[place].float()
    low, high, weights, powers = given
    message = r"must have one dtype, got \['torch.float32', 'torch.float64'\]"
    with pytest.raises(ValueError, match=message):
        operator.joint_sums(
            (low, high), weights, powers, Trained(1.0, "triangle", 1.0, 1.0), Windows(8)
        )


@pytest.mark.parametrize(
    "part", ["low", "high", "to_last", "from_first", "scale", "shift", "grads"]
)
def test_the_kernels_of_chains_refuse_mixed_dtypes(part):
    names = ("low", "high", "to_last", "from_first", "scale", "shift", "grads")
    given = {name: rand(3, 3, 2) for name in names}
    given[part] = given[part].float()
    grads = (given.pop("grads"), rand(3, 3, 2))
    with pytest.raises(ValueError, match="must have one dtype"):
        cpp.chain_sums_backward(grads, SimpleNamespace(**given), None)
    rows = torch.zeros(5, dtype=torch.int32)
    with pytest.raises(ValueError, match="must have one dtype"):
        cpp.chain_sums(rows, rows, (rand(3, 3, 2), rand(3, 3, 2).float()))


@pytest.mark.parametrize(("T", "kept"), [(4, 8), (6, 2)])
def test_gradients_of_weights_are_finite_differences(T, kept):
    low, high, weights, powers = random_joint(T, kept, torch.float64)
    trained = Trained(1.0, "triangle", 1.0, 1.0)
    windows = Windows(kept)

    def total(w):
        ends = operator.joint_sums((low, high), w, powers, trained, windows)
        return (ends[0] + 2.0 * ends[1]).sum()

    (found,) = torch.autograd.grad(total(weights), weights)
    step = 1e-6
    for place in range(weights.numel()):
        moved = torch.zeros_like(weights).flatten()
        moved[place] = step
        moved = moved.view_as(weights)
        slope = (total(weights + moved) - total(weights - moved)) / (2 * step)
        assert_close(found.flatten()[place], slope, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck of torch 2.15
def test_torch_knows_the_operators():
    currents, numbers, windows = random_steps("four steps", M=5)
    given = [getattr(currents, field.name) for field in fields(Currents)]
    named = {field.name: getattr(numbers, field.name) for field in fields(Constants)}
    named["gains"] = list(named["gains"])
    torch.library.opcheck(
        torch.ops.sj_robust.bounded_steps.default, given, named | {"kept": 8, "backend": "cpp"}
    )
    trains = random_trains(4, windows, M=120)
    parts = [getattr(trains, field.name) for field in fields(Trains)]
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
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


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


def check_chains():
    # a triangle has no derivative far from its gate, which the kernel omits; a sigmoid has one
    slopes = surrogate.Sigmoid(), surrogate.PiecewiseQuadratic()
    for centred, slope in product((False, True), slopes):
        given = (chain_gradients(name, slope, centred=centred) for name in ("auto", "reference"))
        for one, other in zip(*given, strict=True):
            assert other.any()
            assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_sums_over_chains_and_their_gradients_are_those_of_the_reference(instruction_set):
    check_chains()


FAULTS = {
    "a rounding forgotten": (
        "proving.h",
        "drift[i] = drift[i] + rounded;",
        "drift[i] = drift[i] + 0.0;",
    ),
    "one sure window taken for all": (
        "proving.h",
        "all_sure[i] &= sure[i] | (here ^ 1);",
        "all_sure[i] = sure[i] & here;",
    ),
    "a derivative at the wrong end": (
        "training.h",
        "through_spike(low(t, slot), grad_low(t, slot))",
        "through_spike(high(t, slot), grad_low(t, slot))",
    ),
    "a gate left out": (
        "training.h",
        "count += slope[i] != 0;",
        "count += slope[i] > 0.5;",
    ),
}
"""Those that change the fewest numbers, of steps for proofs and for training."""


def built(folder, name=None, old="", new=""):
    """A library of these kernels, with another text in one of its files."""
    own = Path(cpp.__file__).parent
    for part in ("dlif", "trains"):
        shutil.copytree(own.parent / part, folder / part, ignore=shutil.ignore_patterns("*.so"))
    if name is not None:
        text = (folder / "trains" / name).read_text(encoding="utf-8")
        assert text.count(old) == 1, old
        (folder / "trains" / name).write_text(text.replace(old, new), encoding="utf-8")
    library = folder / "kernel.so"
    flags = ["-std=c++17", "-O0", "-ffp-contract=off", "-pthread", "-fPIC", "-shared"]
    source = folder / "trains" / "kernel.cpp"
    subprocess.run(["c++", *flags, str(source), "-o", str(library), "-ldl"], check=True)
    return dlif_cpp.ctypes.CDLL(str(library))


def check_all():
    for case in ("four steps", "many steps"):
        check_steps(case)
    check_sums(6, 8, False)
    check_chains()
    for one, other in zip(*both(5, 8, torch.float64, width=1.0)[2:], strict=True):
        assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_a_fault_in_the_kernel_is_noticed(fault, tmp_path, monkeypatch):
    library = built(tmp_path, *FAULTS.get(fault, ()))
    monkeypatch.setattr(cpp, "load_library", lambda: library)
    if fault is None:
        check_all()
        return
    with pytest.raises(AssertionError):
        check_all()
