"""Batch norm, DLIF and pooling in one pass against all written by hand, and against torch's batch
norm.
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from covering import every_pair, pairwise
from ops.calls import KERNELS, assert_equal, laid_out, needs_kernel
from ops.stage_calls import Call, Case, cases, check
from oracle import dlif_bptt
from torch import nn
from torch.testing import assert_close

from sj_robust.ops import Surrogate
from sj_robust.ops.bn_dlif import dispatch, reference
from sj_robust.ops.bn_dlif.config import BatchNorm, repeat_step
from sj_robust.ops.bn_dlif.dispatch import batch_norm_dlif_multi_step, runs_in_one_pass
from sj_robust.ops.dlif import cpp
from sj_robust.ops.surrogate import HOST_NAMES


def by_hand(x, weight, bias, gain, v_init, statistics, grads, constants, eps):
    """Spikes, potentials and gradients of x, weight, bias, gain and v_init in float64 numpy.

    ``statistics`` is (mean, variance) or None for those of the batch.
    """
    axes = (0, 1, *range(3, x.ndim))
    shape = (1, 1, -1, *[1] * (x.ndim - 3))

    def by_channel(values):
        return values.reshape(shape)

    if statistics is None:
        mean = x.mean(axes)
        variance = x.var(axes)
    else:
        mean, variance = statistics
    inverse_std = 1 / np.sqrt(variance + eps)
    x_hat = (x - by_channel(mean)) * by_channel(inverse_std)
    y = x_hat * by_channel(weight) + by_channel(bias)
    neuron = dlif_bptt(
        y,
        gain,
        v_init,
        grad_spikes=grads[0],
        grad_v=grads[1],
        grad_potentials=grads[2],
        **constants,
    )
    grad_x_hat = neuron.grad_x * by_channel(weight)
    if statistics is None:
        of_mean = grad_x_hat.mean(axes, keepdims=True)
        of_variance = (grad_x_hat * x_hat).mean(axes, keepdims=True)
        grad_x_hat = grad_x_hat - of_mean - x_hat * of_variance
    return {
        "spikes": neuron.spikes,
        "potentials": neuron.potentials,
        "x": grad_x_hat * by_channel(inverse_std),
        "weight": (neuron.grad_x * x_hat).sum(axes),
        "bias": neuron.grad_x.sum(axes),
        "gain": neuron.grad_gain,
        "v_init": neuron.grad_v_init,
    }


def random_call(shape, seed=0):
    """Values of x, weight, bias, gain and v_init, gradients of the outputs, and running
    statistics.
    """
    rng = np.random.default_rng(seed)
    channels = shape[2]
    plane = [1] * (len(shape) - 3)
    x = rng.normal(0.5, 2.0, shape)
    x = x * rng.uniform(0.5, 2, (channels, *plane))
    weight = rng.normal(1.0, 0.3, channels)
    bias = rng.normal(0.3, 0.3, channels)
    gain = rng.normal(1.0, 0.3, shape[0])
    v_init = rng.normal(0.2, 0.4, shape[1:])
    grads = [rng.normal(size=size) for size in (shape, shape[1:], shape)]
    mean = rng.normal(0.4, 0.2, channels)
    variance = rng.uniform(0.5, 4.0, channels)
    return (x, weight, bias, gain, v_init), grads, (mean, variance)


CHOICES = {
    "backend": ["reference", *KERNELS],
    # planes of odd sizes, rows longer than a block of neurons, more channels than a block has,
    # fewer than two, and none
    "shape": [
        (4, 3, 5, 8, 8),
        (3, 2, 3, 7, 9),
        (2, 1, 2, 3, 150),
        (2, 2, 70, 4, 2),
        (3, 2, 1, 2, 33),
        (3, 2, 200, 3, 6),
        (5, 6, 9),
        (2, 3, 70, 2),
        (1, 40, 130),
    ],
    "statistics": ["batch", "running", None],
    "average_pool": [False, True],
    "channels_last": [False, True],
    "v_reset": [0.0, None, -0.25],
    "detach_reset": [False, True],
    "surrogate": list(product(HOST_NAMES, [2.0])),
}


@dataclass(frozen=True)
class OneCall:
    """A call that is compared with one by hand, by the names of CHOICES."""

    backend: str
    shape: tuple[int, ...]
    statistics: str | None
    average_pool: bool
    channels_last: bool
    v_reset: float | None
    detach_reset: bool
    surrogate: tuple[str, float]

    @property
    def neuron(self):
        return {
            "decay": 0.9,
            "v_threshold": 0.8,
            "v_reset": self.v_reset,
            "detach_reset": self.detach_reset,
        }


def at_random(draw):
    """One call; only images are pooled and have two orders in memory."""
    case = OneCall(*(draw.choice(values) for values in CHOICES.values()))
    is_image = len(case.shape) == 5
    if is_image:
        return case
    return replace(case, average_pool=False, channels_last=False)


CALLS = [(case.backend, case) for case in pairwise([], at_random, 300)]


def expected_call(case):
    """A call, and what comes out of it by hand."""
    values, grads, running = random_call(case.shape)
    if case.average_pool:
        grads[0] = means(grads[0])
    given = (values, list(grads), running)
    x, weight, bias, gain, v_init = values
    if case.statistics is None:  # a batch norm that changes nothing
        weight = np.ones(case.shape[2])
        bias = np.zeros(case.shape[2])
        running = (bias, weight)
    if case.average_pool:
        grads[0] = shares(grads[0], case.shape)
    kind, alpha = case.surrogate
    expected = by_hand(
        x,
        weight,
        bias,
        gain,
        v_init,
        statistics=None if case.statistics == "batch" else running,
        grads=grads,
        constants={**case.neuron, "kind": kind, "alpha": alpha},
        eps=1e-5 if case.statistics else 0.0,
    )
    assert 0.05 < expected["spikes"].mean() < 0.95
    return given, expected


@pytest.mark.parametrize(("backend", "case"), CALLS, indirect=["backend"], ids=str)
def test_equals_all_written_by_hand(backend, case):
    (values, grads, running), expected = expected_call(case)
    x, weight, bias, gain, v_init = leaves_of(values)
    found = {"x": x, "gain": gain, "v_init": v_init}
    norm = None
    if case.statistics is not None:
        batch = case.statistics == "batch"
        norm = BatchNorm(weight, bias, *map(torch.tensor, running), use_batch_statistics=batch)
        found |= {"weight": weight, "bias": bias}
    outputs = batch_norm_dlif_multi_step(
        laid_out(x, case.channels_last),
        norm,
        gain,
        laid_out(v_init[None], case.channels_last)[0],
        average_pool=case.average_pool,
        surrogate=Surrogate(*case.surrogate),
        store_v_seq=True,
        backend=backend,
        **case.neuron,
    )
    torch.autograd.backward(outputs, [torch.tensor(a) for a in grads])
    spikes, v, potentials = (a.detach() for a in outputs)
    wanted = means(expected["spikes"]) if case.average_pool else expected["spikes"]
    np.testing.assert_array_equal(spikes, wanted)
    np.testing.assert_array_equal(v, potentials[-1])
    np.testing.assert_allclose(potentials, expected["potentials"], rtol=0, atol=1e-11)
    for name, tensor in found.items():
        wanted = expected[name]
        np.testing.assert_allclose(tensor.grad, wanted, rtol=1e-9, atol=1e-10, err_msg=name)


def leaves_of(values):
    return [torch.tensor(value, requires_grad=True) for value in values]


def means(spikes):
    """Means over 2x2 neurons in numpy, without the last odd row and column."""
    *head, height, width = spikes.shape
    whole = spikes[..., : height // 2 * 2, : width // 2 * 2]
    return whole.reshape(*head, height // 2, 2, width // 2, 2).mean((-1, -3))


def shares(grad_means, shape):
    """What the gradient of the means gives to every neuron."""
    spread = np.repeat(np.repeat(grad_means, 2, -1), 2, -2) / 4
    missing = [whole - given for whole, given in zip(shape, spread.shape, strict=True)]
    return np.pad(spread, [(0, size) for size in missing])


@needs_kernel
@pytest.mark.parametrize("case", cases(), ids=str)
def test_equals_the_reference(case):
    check(case, "cpp")


HALVES = {
    "instruction_set": cpp.instruction_sets(),
    "dtype": [torch.bfloat16, torch.float16],
    "channels_last": [False, True],
    "kind": [
        ("batch", False, False),
        (None, True, False),
        ("batch", True, False),
        ("batch", False, True),
        ("running", False, True),
    ],
}


@needs_kernel
@pytest.mark.parametrize(tuple(HALVES), every_pair(HALVES), indirect=["instruction_set"], ids=str)
def test_halves_are_a_float32_run_of_the_same_numbers(instruction_set, dtype, channels_last, kind):
    """Arithmetic and state are float32's: only what is stored is rounded, once, and a repeated
    image's gradient too.
    """
    statistics, average_pool, repeated = kind
    shapes = [(4, 3, 33, 8, 8), (3, 2, 5, 7, 9)]
    if not repeated:
        shapes.append((2, 16, 64, 32, 32))  # written past the cache
    for T, *step in shapes:
        case = Case(
            steps=T,
            shape=tuple(step),
            dtype=dtype,
            statistics=statistics,
            average_pool=average_pool,
            channels_last=channels_last,
            repeated=repeated,
        )
        half = Call("cpp", case, dtype)
        whole = Call("cpp", case, torch.float32)
        spikes, *states = half.outputs
        assert spikes.dtype == dtype
        assert {state.dtype for state in states} == {torch.float32}
        grad_x = half.gradients[0]
        assert spikes.stride() == laid_out(spikes, channels_last).stride()
        assert grad_x.stride() == half.x.stride() == laid_out(half.x, channels_last).stride()
        rounded = [a.to(b.dtype) for a, b in zip(whole.results, half.results, strict=True)]
        assert_equal(half.results, rounded, msg=f"{case}: {{}}".format)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_kernel)])
@pytest.mark.parametrize("momentum", [0.1, 0.7])
def test_running_statistics_are_those_of_torch(backend, momentum):
    torch.manual_seed(0)
    norm = BatchNorm(None, None, None, None, use_batch_statistics=True)
    layer = nn.BatchNorm2d(6)
    assert (norm.momentum, norm.eps) == (layer.momentum, layer.eps)
    layer = nn.BatchNorm2d(6, momentum=momentum)
    running = torch.zeros(6), torch.ones(6)
    for _ in range(3):
        x = 3 + 2 * torch.randn(4, 5, 6, 7, 3)
        layer(x.flatten(0, 1))
        norm = BatchNorm(None, None, *running, use_batch_statistics=True, momentum=momentum)
        batch_norm_dlif_multi_step(x, norm, torch.ones(4), decay=0.9, backend=backend)
    assert_close(running[0], layer.running_mean, rtol=1e-6, atol=1e-6)
    assert_close(running[1], layer.running_var, rtol=1e-6, atol=1e-6)


@needs_kernel
def test_statistics_survive_a_large_mean(instruction_set):
    torch.manual_seed(0)
    x = (1000 + 0.25 * torch.randn(4, 8, 3, 16, 16)).requires_grad_()
    norm = BatchNorm(None, None, None, None, use_batch_statistics=True)
    _, _, potentials = batch_norm_dlif_multi_step(
        x, norm, torch.ones(4), decay=1.0, v_threshold=1e6, store_v_seq=True, backend="cpp"
    )
    exact = x.double()
    mean = exact.mean((0, 1, 3, 4), keepdim=True)
    variance = exact.var((0, 1, 3, 4), keepdim=True, unbiased=False)
    y = (exact - mean) / (variance + 1e-5).sqrt()
    # scale * x + offset, torch's own form, loses 1000 / 0.25 * 2^-24 here
    assert_close(potentials[0].double(), y[0], rtol=0, atol=2e-3)


@needs_kernel
def test_result_does_not_depend_on_the_number_of_threads(threads):
    case = Case(4, (16, 12, 33, 9))
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(Call("cpp", case, torch.float32).results)
    for other in results[1:]:
        assert_equal(other, results[0])


@needs_kernel
@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "gain"])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_that_nobody_needs_are_left_out(frozen, training):
    values, grads, running = random_call((4, 3, 5, 8, 8))
    results = []
    for keep_all in (True, False):
        x, weight, bias, gain, v_init = leaves_of(values)
        tensors = {"x": x, "weight": weight, "bias": bias, "gain": gain}
        tensors[frozen].requires_grad_(keep_all)
        norm = BatchNorm(weight, bias, *map(torch.tensor, running), use_batch_statistics=training)
        spikes, _, _ = batch_norm_dlif_multi_step(x, norm, gain, v_init, decay=0.9, backend="cpp")
        (spikes * torch.tensor(grads[0])).sum().backward()
        gradients = {name: tensor.grad for name, tensor in tensors.items()}
        results.append(gradients)
    every, without = results
    assert without.pop(frozen) is None
    for name, gradient in without.items():
        assert torch.equal(every[name], gradient)


@needs_kernel
def test_without_batch_norm_nobody_needs_the_gradient_of_an_input():
    slopes = []
    for needed in (True, False):
        x = torch.linspace(-1, 2, 96).view(3, 1, 2, 4, 4).requires_grad_(needed)
        gain = torch.ones(3, requires_grad=True)
        spikes, _, _ = batch_norm_dlif_multi_step(
            x, None, gain, decay=0.9, average_pool=True, backend="cpp"
        )
        spikes.sum().backward()
        slopes.append(gain.grad)
    assert slopes[0].all()
    assert torch.equal(*slopes)


@needs_kernel
@pytest.mark.parametrize("average_pool", [False, True])
def test_nothing_of_the_scratch_gets_into_the_result(instruction_set, monkeypatch, average_pool):
    empty = torch.empty

    def full_of_nan(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        if tensor.dtype == torch.uint8:
            return tensor.fill_(255)
        return tensor

    less_than_a_block = (2, 5, 3 if average_pool else 1, 3)
    case = Case(3, less_than_a_block, average_pool=average_pool)
    plain = Call("cpp", case, torch.float32)
    monkeypatch.setattr(torch, "empty", full_of_nan)
    assert_equal(Call("cpp", case, torch.float32).results, plain.results)


@needs_kernel
@pytest.mark.parametrize(
    "shape",
    [
        (2, 2, 3, 512, 513),  # more than 2^20 neurons: a thread takes over 4096 at once
        (5, 16, 64, 32, 32),  # 20 MiB, written past the cache
    ],
)
def test_large_tensors(instruction_set, shape):
    spikes, grad_x, *sums = large_call(shape, "cpp")
    expected, wanted, *wanted_sums = of_the_reference(shape)
    same = (spikes == expected).all(0)  # neurons that rounding did not flip
    assert same.float().mean() > 0.9999
    assert_close(grad_x[:, same], wanted[:, same], rtol=1e-3, atol=1e-4)
    # of a million terms of size one
    assert_close(sums, wanted_sums, rtol=1e-3, atol=1.0)


def large_call(shape, backend):
    """Spikes, and gradients of x, weight, bias and gain; the numbers are always the same."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    weights = torch.randn_like(x)
    T, _, channels, *_ = shape
    leaves = [x, torch.ones(channels), torch.zeros(channels), torch.ones(T)]
    x, weight, bias, gain = [leaf.requires_grad_() for leaf in leaves]
    norm = BatchNorm(weight, bias, None, None, use_batch_statistics=True)
    spikes, _, _ = batch_norm_dlif_multi_step(x, norm, gain, decay=0.9, backend=backend)
    gradients = torch.autograd.grad((spikes * weights).sum(), leaves)
    return [spikes.detach(), *gradients]


@cache
def of_the_reference(shape):
    """Once for all instruction sets."""
    return large_call(shape, "reference")


@needs_kernel
@pytest.mark.parametrize("repeat", [True, False])
def test_of_an_image_repeated_over_time_one_step_is_saved(repeat):
    image = torch.randn(1, 3, 4, 6, 6, requires_grad=True)
    x = repeat_step(image, 5) if repeat else image.expand(5, *image.shape[1:])
    norm = BatchNorm(torch.ones(4), torch.zeros(4), None, None, use_batch_statistics=True)
    with saved_for_backward() as saved:
        batch_norm_dlif_multi_step(x, norm, torch.ones(5), decay=0.9, backend="cpp")
    assert image.data_ptr() in [tensor.data_ptr() for tensor in saved]
    assert elements_beside(image, saved) <= 4 * 4 + 5


@contextmanager
def saved_for_backward():
    """Tensors that operators save for the backward pass meanwhile."""
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    def give_back(tensor):
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, give_back):
        yield saved


def elements_beside(x, saved):
    """How many numbers are saved that are not those of the input."""
    return sum(tensor.numel() for tensor in saved if tensor.data_ptr() != x.data_ptr())


def test_other_memory_formats_run_apart():
    torch.manual_seed(0)
    x = torch.randn(3, 2, 4, 6, 6)
    norm = BatchNorm(None, None, None, None, use_batch_statistics=True)
    turned = x.transpose(3, 4).contiguous().transpose(3, 4)
    assert not runs_in_one_pass(turned, norm, Surrogate())
    gradients = []
    for values in (x, turned):
        leaf = values.clone().requires_grad_()
        spikes, _, _ = batch_norm_dlif_multi_step(
            leaf, norm, torch.ones(3), decay=0.9, average_pool=True
        )
        spikes.square().sum().backward()
        gradients.append(leaf.grad)
    assert_close(*gradients, rtol=1e-4, atol=1e-4)


@needs_kernel
def test_nothing_but_the_input_is_saved():
    x = torch.randn(4, 3, 5, 8, 8, requires_grad=True)
    norm = BatchNorm(torch.ones(5), torch.zeros(5), None, None, use_batch_statistics=True)
    with saved_for_backward() as saved:
        batch_norm_dlif_multi_step(x, norm, torch.ones(4), decay=0.9, backend="cpp")
    assert elements_beside(x, saved) <= 4 * 5 + 4


def test_what_cannot_run_in_one_pass_runs_in_two():
    torch.manual_seed(0)
    norm = BatchNorm(None, None, None, None, use_batch_statistics=True)
    x = torch.randn(3, 4, 5, 6)
    custom = Surrogate("custom", function=torch.sigmoid)
    assert not runs_in_one_pass(x, norm, custom)
    spikes, _, _ = batch_norm_dlif_multi_step(x, norm, torch.ones(3), decay=0.9, surrogate=custom)
    assert ((spikes > 0) & (spikes < 1)).all()
    mixed = BatchNorm(torch.ones(5).double(), None, None, None, use_batch_statistics=True)
    assert not runs_in_one_pass(x.half(), mixed, Surrogate())
    for thin in (torch.randn(3, 4, 5, 6, 1), torch.randn(3, 4, 5, 1, 6)):
        assert runs_in_one_pass(thin, norm, Surrogate())
        assert not runs_in_one_pass(thin, norm, Surrogate(), average_pool=True)
        with pytest.raises(RuntimeError, match="Output size is too small"):
            batch_norm_dlif_multi_step(thin, norm, torch.ones(3), decay=0.9, average_pool=True)


@pytest.mark.parametrize("plane", [(2, 2), (8, 8), (7, 4), (4, 9), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pooling_of_spikes_apart_equals_torchs(plane, dtype):
    torch.manual_seed(0)
    spikes = (torch.rand(3, 2, 5, *plane) > 0.5).to(dtype)
    assert dispatch.can_pool(spikes)
    means = []
    gradients = []
    seconds = []
    for run in (dispatch.pool, reference.pool):
        leaf = spikes.clone().requires_grad_()
        means.append(run(leaf))
        (gradient,) = torch.autograd.grad(means[-1].square().sum(), leaf, create_graph=True)
        gradients.append(gradient)
        seconds.append(torch.autograd.grad(gradient.square().sum(), leaf)[0])
    assert torch.equal(*means)
    assert_close(*gradients)
    assert_close(*seconds)


def test_what_is_not_pooled_apart():
    spikes = torch.ones(3, 2, 5, 8, 8)
    channels_last = laid_out(spikes, True)
    others = (
        spikes[..., :1],
        spikes.flatten(3),
        spikes.bfloat16(),
        spikes.long(),
        spikes.bool(),
        channels_last,
        None,
    )
    assert not any(map(dispatch.can_pool, (*others, spikes.to("meta"))))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("repeat", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_running_statistics_apart_are_those_of_torch(affine, repeat, dtype):
    torch.manual_seed(0)
    of_norm = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias, mean, variance = torch.rand(4, 5, dtype=of_norm) + 0.1
    step = torch.randn(1 if repeat else 4, 3, 5, 4, 2).to(dtype)
    upstream = torch.randn(4, 3, 5, 4, 2).to(dtype)
    found = []
    for run in (dispatch.normalise, reference.normalise):
        x = step.clone().requires_grad_()
        leaves = [x]
        norm = BatchNorm(None, None, mean, variance, use_batch_statistics=False, eps=1e-3)
        if affine:
            parameters = {"weight": weight.clone(), "bias": bias.clone()}
            leaves += [parameter.requires_grad_() for parameter in parameters.values()]
            norm = replace(norm, **parameters)
        y_seq = run(repeat_step(x, 4) if repeat else x, norm)
        gradients = torch.autograd.grad((y_seq * upstream).sum(), leaves)
        assert y_seq.dtype == dtype
        found.append([y_seq, *gradients])
    assert_close(*found)


def test_wrong_arguments():
    norm = BatchNorm(None, None, None, None, use_batch_statistics=True)
    of_four = BatchNorm(torch.ones(4), None, None, None, use_batch_statistics=True)
    x = torch.zeros(3, 4, 5)
    gain = torch.ones(3)
    for message, *arguments in (
        (r"x_seq must be \[T, N, C, \*\]", torch.zeros(3, 4), norm, gain),
        (r"one value per step, \[T\] = \[3\], got \(4,\)", x, norm, torch.ones(4)),
        ("v_init must have the shape of one step", x, norm, gain, torch.zeros(4)),
        ("input_gain must be on the device of x_seq", x, norm, gain.to("meta")),
        ("more than one value per channel", torch.zeros(1, 1, 5), norm, torch.ones(1)),
        (r"weight must be \[C\] = \[5\], got \(4,\)", x, of_four, gain),
    ):
        with pytest.raises(ValueError, match=message):
            batch_norm_dlif_multi_step(*arguments, decay=0.9)
    with pytest.raises(ValueError, match="must be given when use_batch_statistics is False"):
        BatchNorm(None, None, None, None, use_batch_statistics=False)
    with pytest.raises(
        ValueError, match=r"average_pool needs x_seq \[T, N, C, H, W\], got shape \(3, 4, 5\)"
    ):
        batch_norm_dlif_multi_step(x, norm, gain, decay=0.9, average_pool=True)
    if cpp.unavailable_reason() is None:
        strided = torch.zeros(3, 4, 6, 5).transpose(2, 3)
        with pytest.raises(ValueError, match="contiguous or channels last"):
            batch_norm_dlif_multi_step(strided, norm, gain, decay=0.9, backend="cpp")
