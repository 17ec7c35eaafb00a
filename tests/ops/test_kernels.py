"""Every backend of DLIF, and of batch norm, DLIF and pooling, on the table of calls.py; the kernels
for GPUs without one: test_gpu_texts.py.
"""

import itertools
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from covering import mostly_slow
from ops.calls import (
    ALPHAS,
    BF16,
    F16,
    F32,
    F64,
    KERNELS,
    LARGE,
    STAGE_TABLE,
    TABLE,
    WITHOUT_TABLE,
    Case,
    Drawn,
    assert_equal,
    by_hand,
    check,
    check_slopes,
    needs_kernel,
    of_every_number,
    points,
    random_call,
    results,
    run,
)
from oracle import away_from_threshold
from torch import nn
from torch.testing import assert_close

from sj_robust.core.host import surrogate as host
from sj_robust.ops import Surrogate, dlif_multi_step
from sj_robust.ops.bn_dlif import dispatch, reference
from sj_robust.ops.bn_dlif.config import BatchNorm, repeat_step
from sj_robust.ops.dlif import cpp, eager
from sj_robust.ops.dlif.config import HOST_NAMES

FAST = ["eager", *KERNELS]
ROWS = [
    *itertools.product(FAST, TABLE),
    *itertools.product(KERNELS, STAGE_TABLE),
    *itertools.product(["eager"], STAGE_TABLE[:8]),
    *mostly_slow(itertools.product(FAST, LARGE), quick=[]),
]


@pytest.mark.parametrize(("backend", "case"), ROWS, indirect=["backend"], ids=str)
def test_equals_the_reference(backend, case):
    if backend == "eager" and case.stage:  # three operators that round in between
        case = replace(case, dtype=F32, stores=False)
    check(case, backend)


@pytest.mark.parametrize(
    "case", [case for case in TABLE if case.shape > (0,) and len(case.shape) == 1], ids=str
)
@pytest.mark.parametrize("dtype", [F64, F32])
def test_the_reference_is_bptt_by_hand_away_from_the_threshold(case, dtype):
    """A gradient looks at the whole sequence of its neuron, so only neurons certain to the last
    step count.
    """
    call = random_call((case.steps, *case.shape), dtype, seed=case.steps)
    outputs, gradients = run("reference", *call, **case.neuron)
    kind, alpha = case.surrogate
    constants = {name: value for name, value in case.neuron.items() if name != "surrogate"}
    expected = by_hand(*call, kind=kind, alpha=alpha, **constants)
    close = 1e-12 if dtype == F64 else 1e-5
    sure = away_from_threshold(expected.h, 0.8, 0.1 * close)[-1]
    assert sure.mean() > 0.999
    spikes, v, potentials = outputs
    np.testing.assert_array_equal(spikes[:, sure], expected.spikes[:, sure])
    np.testing.assert_array_equal(v, potentials[-1])
    grad_x, grad_gain, grad_v_init = gradients
    for found, wanted in (
        (potentials, expected.potentials),
        (grad_x, expected.grad_x),
        (grad_v_init, expected.grad_v_init),
    ):
        np.testing.assert_allclose(
            found[..., sure], wanted[..., sure], rtol=10 * close, atol=10 * close
        )
    scale = np.abs(expected.grad_x).sum(1).max()
    np.testing.assert_allclose(grad_gain, expected.grad_gain, rtol=close, atol=close * scale)


@pytest.mark.parametrize("backend", ["reference", *KERNELS], indirect=True)
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_stage_is_torchs_batch_norm_a_layer_of_dlif_and_torchs_pooling(backend, pool, training):
    torch.manual_seed(0)
    x = 3 + 2 * torch.randn(4, 5, 6, 7, 4, dtype=F64)
    norm = nn.BatchNorm2d(6, momentum=0.3, eps=1e-3, dtype=F64).train(training)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.running_var.uniform_(0.5, 4.0)
    running = norm.running_mean.clone(), norm.running_var.clone()
    own = BatchNorm(norm.weight, norm.bias, *running, training, momentum=0.3, eps=1e-3)
    call = {"decay": 0.9, "backend": backend}
    gain = torch.linspace(0.5, 2.0, 4, dtype=F64)
    spikes = dispatch.batch_norm_dlif_multi_step(x, own, gain, average_pool=pool, **call)[0]
    wanted = dlif_multi_step(norm(x.flatten(0, 1)).view(x.shape), gain, **call)[0].flatten(0, 1)
    wanted = nn.AvgPool2d(2)(wanted) if pool else wanted
    assert 0.1 < wanted.mean() < 0.9
    assert_close(spikes.flatten(0, 1), wanted)
    assert_close(running, (norm.running_mean, norm.running_var))


@pytest.mark.parametrize("special", WITHOUT_TABLE, ids=lambda special: special.__name__)
def test_what_no_table_holds(backend, special):
    special(backend)


def test_slopes_in_float64(backend):
    of_every_number(backend, F64)


def test_formulas_are_those_of_spikingjelly():
    for (kind, name), alpha in itertools.product(HOST_NAMES.items(), ALPHAS):
        if name == "SuperSpike" and not hasattr(host, name):  # in SpikingJelly 0.0.0.0.14
            continue
        z = points(alpha).requires_grad_()
        (found,) = torch.autograd.grad(getattr(host, name)(alpha=alpha)(z).sum(), z)
        check_slopes(kind, alpha, z, found)


@pytest.mark.parametrize("used", [(1,), (2,), (1, 2), (0, 2)])
def test_a_gradient_that_is_missing_is_zero(backend, used):
    inputs, grads = random_call((4, 200))
    leaves = [tensor.requires_grad_() for tensor in inputs]
    found = []
    for name in (backend, "reference"):
        outputs = dlif_multi_step(*leaves, decay=0.9, store_v_seq=True, backend=name)
        given = [grads[i] for i in used]
        found.append(torch.autograd.grad([outputs[i] for i in used], leaves, given))
    assert_close(*found)


def test_a_gain_may_lie_anywhere_in_memory(backend):
    (x, gain, v_init), grads = random_call((4, 3, 50))
    column = torch.stack((torch.zeros(4), gain, torch.ones(4)), 1)[:, 1]
    for one in (column, gain[:1].expand(4)):
        found = run(backend, (x, one, v_init), grads, decay=0.9)
        wanted = run(backend, (x, one.contiguous(), v_init), grads, decay=0.9)
        assert_equal(found, wanted)


@pytest.mark.parametrize("case", TABLE[:12], ids=str)
def test_eager_in_several_blocks(monkeypatch, case):
    monkeypatch.setattr(eager, "_CPU_BLOCK_LIMIT", 1)
    check(replace(case, shape=(2 * 4096 + 17,)), "eager")


# ---- the compiled kernel ----


@needs_kernel
@pytest.mark.parametrize(
    "case", [Case(6, (50_003,), BF16), Case(4, (16, 12, 33, 9), stage="batch")]
)
def test_results_do_not_depend_on_the_number_of_threads(threads, case):
    found = []
    for count in (1, 2, 5, 16):
        threads(count)
        found.append(results("cpp", case).listed())
    for other in found[1:]:
        assert_equal(other, found[0])


@needs_kernel
def test_calls_from_several_threads_at_once(threads):
    threads(2)
    cases = [Case(4, (100_003 + i,)) for i in range(3)]
    expected = [results("cpp", case).listed() for case in cases]
    actual = [None] * len(cases)

    def work(i):
        for _ in range(3):
            actual[i] = results("cpp", cases[i]).listed()

    workers = [Thread(target=work, args=(i,)) for i in range(len(cases))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert_equal(actual, expected)


FORK = """
import os, sys, numpy, torch
from sj_robust.ops import dlif_multi_step
torch.set_num_threads(2)
x = torch.randn(4, 200_000)
neuron = dict(decay=0.9, v_threshold=1.0, v_reset=0.0, surrogate="atan", alpha=2.0)
call = dict(**neuron, detach_reset=False, backend="cpp")
def numbers():
    given = x, torch.ones(4), None
    outputs = torch.ops.sj_robust.dlif(*given, **call, store_v_seq=True)
    grads = torch.ops.sj_robust.dlif_backward(x, None, None, *given, **call, needs_v_init=False)
    return [tensor.numpy() for tensor in (*outputs, *grads)]
def exit_code(before):
    child = os.fork()
    if child == 0:
        found = numbers()
        os._exit(0 if all(numpy.array_equal(a, b) for a, b in zip(before or found, found)) else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
torch.randn(1 << 20).exp()  # the threads of torch's own operators are there
sys.exit(exit_code(None) or exit_code(numbers()))
"""


@pytest.mark.slow
@needs_kernel
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_works_in_children_forked_before_and_after_the_first_use():
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=True, timeout=100)


@pytest.mark.parametrize("backend", FAST, indirect=True)
def test_a_sum_of_many_terms_keeps_its_digits(backend):
    """Each rounding goes the same way, so a sum in float32 alone is off by more the longer it
    is.
    """
    x = torch.full((1, 1 << 22), 0.1)
    gain = torch.ones(1, requires_grad=True)
    dlif_multi_step(x, gain, decay=0.9, backend=backend)[0].sum().backward()
    triangle = x[0, 0].double()  # at a potential of x
    assert_close(gain.grad.double() / x.numel(), (triangle * triangle)[None], rtol=2e-5, atol=0)


@needs_kernel
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_every_half_number_is_converted_as_torch_does(instruction_set, dtype):
    numbers = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    soft = {"v_reset": None, "backend": "cpp"}
    # nobody fires, so the potential is the input itself
    _, v, _ = dlif_multi_step(numbers[None], torch.ones(1), decay=1.0, v_threshold=1e38, **soft)
    in_range = numbers.isfinite() & (numbers.float() < 1e38)
    assert_equal(v[in_range], numbers.float()[in_range])
    # and back: with no spike gradient that of x is that of v
    exact = numbers.float()
    ties = (exact + exact.roll(-1)) / 2
    tiny_steps = exact * (1 + torch.tensor([2.0**-20]))
    edge = torch.full_like(exact, 65519.996)
    for grad in (exact, ties, tiny_steps, edge, exact * 1e-3, exact * 1e30):
        x = torch.zeros_like(numbers)[None].requires_grad_()
        _, v, _ = dlif_multi_step(x, torch.ones(1), decay=1.0, detach_reset=True, **soft)
        (found,) = torch.autograd.grad(v, x, grad)
        assert_equal(found[0], grad.to(dtype))


@needs_kernel
def test_statistics_survive_a_large_mean(instruction_set):
    torch.manual_seed(0)
    exact = (1000 + 0.25 * torch.randn(4, 8, 3, 16, 16)).double()
    norm = BatchNorm(None, None, None, None, use_batch_statistics=True)
    call = {"decay": 1.0, "v_threshold": 1e6, "store_v_seq": True, "backend": "cpp"}
    given = exact.float(), norm, torch.ones(4)
    _, _, potentials = dispatch.batch_norm_dlif_multi_step(*given, **call)
    y = torch.nn.functional.batch_norm(exact.flatten(0, 1), None, None, training=True)
    # scale * x + offset, torch's own form, loses 1000 / 0.25 * 2^-24 here
    assert_close(potentials[0].double(), y.view(exact.shape)[0], rtol=0, atol=2e-3)


@needs_kernel
@pytest.mark.parametrize("frozen", ["x", "gain", "weight", "bias"])
@pytest.mark.parametrize("stage", ["batch", "running", "none"])
def test_gradients_that_nobody_needs_are_left_out(frozen, stage):
    drawn = Drawn(Case(4, (3, 5, 8, 8), stage=stage))
    every = drawn.leaves
    if frozen not in every:
        pytest.skip("there is none")
    spikes = drawn.outputs("cpp")["spikes"]
    wanted = torch.autograd.grad(spikes.square().sum(), list(every.values()))
    every[frozen].requires_grad_(False)
    spikes = drawn.outputs("cpp")["spikes"]
    others = [leaf for name, leaf in every.items() if name != frozen]
    found = torch.autograd.grad(spikes.square().sum(), others)
    kept = [gradient for name, gradient in zip(every, wanted, strict=True) if name != frozen]
    assert_equal(found, tuple(kept))


@needs_kernel
@pytest.mark.parametrize("pool", [False, True])
def test_nothing_of_the_scratch_gets_into_the_result(instruction_set, monkeypatch, pool):
    empty = torch.empty

    def full_of_nan(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(255) if tensor.dtype == torch.uint8 else tensor

    less_than_a_block = (2, 5, 3 if pool else 1, 3)
    case = Case(3, less_than_a_block, stage="batch", pool=pool)
    plain = results("cpp", case)
    monkeypatch.setattr(torch, "empty", full_of_nan)
    assert_equal(results("cpp", case).listed(), plain.listed())


@needs_kernel
@pytest.mark.skipif("avx2" not in cpp.instruction_sets(), reason="this processor has no AVX2")
def test_wide_code_stores_past_the_cache():
    """A compiler that takes another branch of the preprocessor gives the same results, a third
    slower.
    """
    code = Path(cpp.__file__).with_name(cpp._LIBRARY_NAME).read_bytes()
    vmovntps_ymm = (b"\xc5\xfc\x2b", b"\xc5\x7c\x2b")
    assert sum(code.count(opcode) for opcode in vmovntps_ymm) > 50


def test_the_kernel_is_there_where_it_can_be_built():
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        pytest.skip("no C++ compiler, so there is nothing to expect")
    assert cpp.unavailable_reason() is None, "install the package first, e.g. pip install -e ."


# ---- what is kept for the backward pass ----


SAVED = [Case(4, (10,)), Case(4, (3, 5, 8, 8), stage="batch")]
SAVED += [replace(SAVED[1], repeated=True), replace(SAVED[1], repeated=True, stage="none")]


@needs_kernel
@pytest.mark.parametrize("case", SAVED, ids=str)
def test_the_input_is_saved_and_nothing_of_its_size(case):
    drawn = Drawn(replace(case, starts=False))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        drawn.outputs("cpp")
    x = drawn.leaves["x"]
    assert x.data_ptr() in [tensor.data_ptr() for tensor in saved]
    assert sum(t.numel() for t in saved if t.data_ptr() != x.data_ptr()) <= 4 * 5 + 4


# ---- batch norm and pooling apart, around a neuron with a replaced forward ----


@pytest.mark.parametrize("plane", [(2, 2), (8, 8), (7, 4), (4, 9), (3, 5)])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_pooling_of_spikes_apart_equals_torchs(plane, dtype):
    torch.manual_seed(0)
    spikes = (torch.rand(3, 2, 5, *plane) > 0.5).to(dtype).requires_grad_()
    assert dispatch.can_pool(spikes)
    found = []
    for pool in (dispatch.pool, reference.pool):
        means = pool(spikes)
        (first,) = torch.autograd.grad(means.square().sum(), spikes, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), spikes)
        found.append((means, first, second))
    assert torch.equal(found[0][0], found[1][0])
    assert_close(*found)


def test_what_is_not_pooled_apart():
    spikes = torch.ones(3, 2, 5, 8, 8)
    others = [spikes[..., :1], spikes.flatten(3), spikes.bfloat16(), spikes.long(), spikes.bool()]
    others += [spikes.transpose(3, 4), None, spikes.to("meta")]
    assert not any(map(dispatch.can_pool, others))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("repeat", [True, False])
@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_running_statistics_apart_are_those_of_torch(affine, repeat, dtype):
    torch.manual_seed(0)
    of_norm = torch.rand(4, 5, dtype=F64 if dtype == F64 else F32) + 0.1
    x = torch.randn(1 if repeat else 4, 3, 5, 4, 2).to(dtype).requires_grad_()
    upstream = torch.randn(4, 3, 5, 4, 2).to(dtype)
    weight, bias, *running = of_norm.unbind()
    parameters = [weight.requires_grad_(), bias.requires_grad_()] if affine else []
    norm = BatchNorm(*(parameters or (None, None)), *running, False, eps=1e-3)
    found = []
    for normalise in (dispatch.normalise, reference.normalise):
        y_seq = normalise(repeat_step(x, 4) if repeat else x, norm)
        assert y_seq.dtype == dtype
        gradients = torch.autograd.grad((y_seq * upstream).sum(), [x, *parameters])
        found.append([y_seq, *gradients])
    assert_close(*found)


def test_what_cannot_run_in_one_pass_runs_in_two():
    torch.manual_seed(0)
    norm = BatchNorm(None, None, None, None, use_batch_statistics=True)
    x = torch.randn(3, 4, 5, 6, 4)
    mixed = BatchNorm(torch.ones(5).double(), None, None, None, use_batch_statistics=True)
    custom = Surrogate("custom", function=torch.sigmoid)
    turned = x.transpose(3, 4).contiguous().transpose(3, 4)
    for given in ((x, norm, custom), (x.half(), mixed, Surrogate()), (turned, norm, Surrogate())):
        assert not dispatch.runs_in_one_pass(*given)
    call = {"decay": 0.9, "average_pool": True}
    gradients = []
    for values in (x, turned):
        leaf = values.clone().requires_grad_()
        spikes = dispatch.batch_norm_dlif_multi_step(leaf, norm, torch.ones(3), **call)[0]
        gradients.append(torch.autograd.grad(spikes.square().sum(), leaf)[0])
    assert_close(*gradients, rtol=1e-4, atol=1e-4)
    for thin in (x[..., :1].contiguous(), x[..., :1, :].contiguous()):
        assert dispatch.runs_in_one_pass(thin, norm, Surrogate()) == (not cpp.unavailable_reason())
        assert not dispatch.runs_in_one_pass(thin, norm, Surrogate(), average_pool=True)
        with pytest.raises(RuntimeError, match="Output size is too small"):
            dispatch.batch_norm_dlif_multi_step(thin, norm, torch.ones(3), **call)


# ---- surrogates of one's own, second derivatives ----


class Elementwise(nn.Module):
    """A surrogate without parameters."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, z):
        return self.function(z)


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("v_reset", [0.0, None, -0.5])
def test_gradcheck_with_a_smooth_spike(backend, v_reset):
    smooth = Surrogate("custom", function=Elementwise(lambda z: torch.sigmoid(2 * z)))
    call = {"decay": 0.8, "v_reset": v_reset, "surrogate": smooth, "store_v_seq": True}
    leaves = [tensor.requires_grad_() for tensor in random_call((4, 3))[0]]
    assert torch.autograd.gradcheck(
        lambda *inputs: dlif_multi_step(*inputs, backend=backend, **call), leaves
    )


def test_a_surrogate_of_ones_own_equals_the_one_compiled_in():
    own = Surrogate("custom", function=Elementwise(host.PiecewiseQuadratic(1.0)))
    call = random_call((5, 9))
    found, wanted = (run("eager", *call, decay=0.9, surrogate=one) for one in (own, Surrogate()))
    assert_close(found, wanted)


@pytest.mark.parametrize("kind", HOST_NAMES)
def test_second_derivative_of_every_surrogate(kind):
    surrogate = Surrogate(kind, alpha=2.0)
    x = torch.randn(1, 8, dtype=F64, requires_grad=True)

    def gradient(x):
        call = {"decay": 0.9, "surrogate": surrogate, "backend": "reference"}
        spikes, _, _ = dlif_multi_step(x, torch.ones(1, dtype=F64), **call)
        return torch.autograd.grad(spikes.sum(), x, create_graph=True)[0]

    assert gradient(x).grad_fn is not None
    assert torch.autograd.gradcheck(gradient, (x,))


def test_second_derivative_at_rest_is_that_of_spikingjelly():
    """Without input, a potential lies exactly where the triangle reaches zero."""
    z = torch.full((3,), -1.0, requires_grad=True)
    for function in (Surrogate("triangle", alpha=1.0).spike, host.PiecewiseQuadratic(1.0)):
        (found,) = torch.autograd.grad(function(z).sum(), z, create_graph=True)
        assert torch.autograd.grad(found.sum(), z)[0].tolist() == [1.0, 1.0, 1.0]


class Scaled(nn.Module):
    """A surrogate whose width is a parameter, or a buffer that requires a gradient."""

    def __init__(self, as_buffer=False):
        super().__init__()
        if as_buffer:
            self.register_buffer("width", torch.tensor(2.0, requires_grad=True))
        else:
            self.width = nn.Parameter(torch.tensor(2.0))

    def forward(self, z):
        return torch.sigmoid(self.width * z)


def test_what_a_surrogate_uses_gets_its_gradient():
    width = torch.tensor(2.0, requires_grad=True)
    modules = Scaled(), Scaled(as_buffer=True)
    given = [(lambda z: torch.sigmoid(width * z), width)]
    given += [(module, module.width) for module in modules]
    x = torch.linspace(-1, 2, 12).view(3, 4)
    found = []
    for function, used in given:
        surrogate = Surrogate("custom", function=function)
        spikes, _, _ = dlif_multi_step(x, torch.ones(3), decay=0.9, surrogate=surrogate)
        found += torch.autograd.grad(spikes.sum(), used)
    assert found[0] != 0
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("function", "needed"),
    [
        (torch.sigmoid, False),
        (torch.autograd.Function.apply, False),
        (Elementwise(torch.sigmoid).forward, False),
        (lambda z: z.sigmoid(), True),
        (Scaled().forward, True),
        (Scaled(as_buffer=True), True),
    ],
)
def test_which_functions_may_have_gradients_of_their_own(function, needed):
    surrogate = Surrogate("custom", function=function)
    assert surrogate.needs_graph == needed
    with torch.no_grad():
        assert not surrogate.needs_graph
