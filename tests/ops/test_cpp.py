"""The compiled CPU kernel against back-propagation through time written by hand, and against its surroundings."""

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import away_from_threshold, dlif_bptt

from sj_robust.ops import Surrogate, available_backends, dlif_multi_step
from sj_robust.ops.dlif import cpp, eager
from sj_robust.ops.dlif.config import DLIFConfig

needs_kernel = pytest.mark.skipif(cpp.unavailable_reason() is not None, reason=str(cpp.unavailable_reason()))
RESETS = [0.0, None, -0.25]
SURROGATES = [("triangle", 1.0), ("triangle", 0.6), ("atan", 2.0), ("sigmoid", 4.0)]


@pytest.fixture(params=cpp.instruction_sets() or ("baseline",))
def instruction_set(request, monkeypatch):
    monkeypatch.setenv(cpp.INSTRUCTION_SET_VARIABLE, request.param)
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def fresh_library():
    cpp._load.cache_clear()
    yield
    cpp._load.cache_clear()


def config(v_reset=0.0, kind="triangle", alpha=1.0, detach_reset=False, decay=0.9, v_threshold=0.8):
    return DLIFConfig(decay, v_threshold, v_reset, Surrogate(kind, alpha), detach_reset)


def random_call(T, M, dtype=torch.float32, seed=0):
    """Inputs and incoming gradients, each in the dtype that the contract asks for."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    x = (0.3 + 0.8 * torch.randn(T, M, generator=generator, dtype=state)).to(dtype)
    gain = 1 + 0.3 * torch.randn(T, generator=generator, dtype=state)
    v_init = 0.4 * torch.randn(M, generator=generator, dtype=state)
    grad_spikes = torch.randn(T, M, generator=generator, dtype=state).to(dtype)
    grad_v = torch.randn(M, generator=generator, dtype=state)
    grad_v_seq = torch.randn(T, M, generator=generator, dtype=state)
    return x, gain, v_init, grad_spikes, grad_v, grad_v_seq


def by_hand(call, c):
    x, gain, v_init, grad_spikes, grad_v, grad_v_seq = (a.double().numpy() for a in call)
    return dlif_bptt(
        x, gain, v_init, decay=c.decay, v_threshold=c.v_threshold, v_reset=c.v_reset, kind=c.surrogate.kind,
        alpha=c.surrogate.alpha, detach_reset=c.detach_reset, grad_spikes=grad_spikes, grad_v=grad_v,
        grad_potentials=grad_v_seq,
    )  # fmt: skip


def test_kernel_is_there_where_it_can_be_built():
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        pytest.skip("no C++ compiler, so there is nothing to expect")
    assert cpp.unavailable_reason() is None, "install the package first, e.g. pip install -e ."
    assert available_backends()["cpp"] == "available"


@needs_kernel
@pytest.mark.parametrize("v_reset", RESETS)
@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize(("kind", "alpha"), SURROGATES)
def test_float64_equals_bptt_by_hand(instruction_set, v_reset, detach_reset, kind, alpha):
    c = config(v_reset, kind, alpha, detach_reset)
    for T, M in ((1, 1), (2, 31), (5, 64), (16, 65), (3, 4099)):
        call = random_call(T, M, torch.float64)
        x, gain, v_init, *grads = call
        expected = by_hand(call, c)
        spikes, v, v_seq = cpp.forward(x, gain, v_init, c, True)
        np.testing.assert_array_equal(spikes, expected.spikes)
        np.testing.assert_allclose(v_seq, expected.potentials, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(v, v_seq[-1])
        grad_x, grad_gain, grad_v_init = cpp.backward(x, gain, v_init, c, *grads, True)
        np.testing.assert_allclose(grad_x, expected.grad_x, rtol=1e-10, atol=1e-11)
        np.testing.assert_allclose(grad_gain, expected.grad_gain, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(grad_v_init, expected.grad_v_init, rtol=1e-10, atol=1e-11)


@needs_kernel
@pytest.mark.parametrize("v_reset", RESETS)
@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize(("kind", "alpha"), SURROGATES)
def test_float32_gradients_equal_bptt_by_hand(instruction_set, v_reset, detach_reset, kind, alpha):
    c = config(v_reset, kind, alpha, detach_reset)
    call = random_call(8, 4099)
    x, gain, v_init, *grads = call
    expected = by_hand(call, c)
    certain = away_from_threshold(expected.h, c.v_threshold, 1e-6)[-1]
    assert certain.mean() > 0.999
    spikes, _, _ = cpp.forward(x, gain, v_init, c, False)
    grad_x, grad_gain, grad_v_init = cpp.backward(x, gain, v_init, c, *grads, True)
    np.testing.assert_array_equal(spikes[:, certain], expected.spikes[:, certain])
    np.testing.assert_allclose(grad_x[:, certain], expected.grad_x[:, certain], rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(grad_v_init[certain], expected.grad_v_init[certain], rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(
        grad_gain, expected.grad_gain, rtol=1e-4, atol=1e-5 * np.abs(expected.grad_x).sum(1).max()
    )


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("v_reset", RESETS)
def test_spikes_and_potentials_equal_plain_torch_bit_for_bit(instruction_set, dtype, v_reset):
    c = config(v_reset)
    for T, M in ((1, 1), (7, 33), (4, 63), (4, 127), (4, 257), (2, 20000), (1500, 3)):
        x, gain, v_init, *_ = random_call(T, M, dtype)
        for start in (v_init, None):
            for a, b in zip(cpp.forward(x, gain, start, c, True), eager.forward(x, gain, start, c, True), strict=True):
                assert a.dtype == b.dtype
                assert torch.equal(a, b)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("v_reset", [0.0, None])
def test_spikes_exactly_at_the_threshold(instruction_set, dtype, v_reset):
    # quarters are exact in binary, so that h == v_threshold really happens, which random numbers never show
    values = torch.cartesian_prod(*[torch.tensor([0.0, 0.25, 0.5, 1.0])] * 3).T.contiguous()
    c = config(v_reset, decay=0.5, v_threshold=1.0)
    zeros, ones = torch.zeros(64), torch.ones(3)
    expected = by_hand((values, ones, zeros, torch.ones(3, 64), zeros, torch.zeros(3, 64)), c)
    assert (expected.h == 1.0).sum() > 10
    x, gain = values.to(dtype), ones.to(torch.float64 if dtype == torch.float64 else torch.float32)
    spikes, v, _ = cpp.forward(x, gain, None, c, False)
    grad_x, _, _ = cpp.backward(x, gain, None, c, torch.ones_like(x), None, None, False)
    np.testing.assert_array_equal(spikes.double(), expected.spikes)
    np.testing.assert_array_equal(v, expected.potentials[-1])
    np.testing.assert_allclose(grad_x.double(), expected.grad_x, atol=1e-2 if dtype == torch.bfloat16 else 1e-3)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_over_thousands_of_steps(instruction_set, dtype):
    c = config(None, "sigmoid", 2.0)
    x, gain, v_init, *grads = random_call(2000, 70, dtype)
    tolerance = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}[dtype]
    actual, wanted = (m.backward(x, gain, v_init, c, *grads, True) for m in (cpp, eager))
    for a, b in zip(actual, wanted, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@needs_kernel
@pytest.mark.parametrize("present", range(8))
def test_every_optional_gradient_may_be_missing(instruction_set, present):
    c = config(-0.25)
    x, gain, v_init, grad_spikes, grad_v, grad_v_seq = random_call(4, 200, torch.float64)
    missing = torch.zeros_like
    with_zeros = (
        x, gain, v_init if present & 4 else torch.full_like(v_init, -0.25), grad_spikes,
        grad_v if present & 1 else missing(grad_v), grad_v_seq if present & 2 else missing(grad_v_seq),
    )  # fmt: skip
    expected = by_hand(with_zeros, c)
    grad_x, grad_gain, grad_v_init = cpp.backward(
        x, gain, v_init if present & 4 else None, c, grad_spikes, grad_v if present & 1 else None,
        grad_v_seq if present & 2 else None, bool(present & 4),
    )  # fmt: skip
    np.testing.assert_allclose(grad_x, expected.grad_x, atol=1e-11)
    np.testing.assert_allclose(grad_gain, expected.grad_gain, atol=1e-10)
    assert (grad_v_init is None) == (not present & 4)
    if grad_v_init is not None:
        np.testing.assert_allclose(grad_v_init, expected.grad_v_init, atol=1e-11)


@needs_kernel
@pytest.mark.parametrize("M", [(1 << 20) + 64, (1 << 20) + 3])  # rows aligned, so written past the cache, and not
def test_large_tensors(instruction_set, threads, M):
    threads(2)
    c = config(0.0)
    x, gain, _, grad_spikes, *_ = random_call(5, M)
    for a, b in zip(cpp.forward(x, gain, None, c, True), eager.forward(x, gain, None, c, True), strict=True):
        assert torch.equal(a, b)
    actual, wanted = (m.backward(x, gain, None, c, grad_spikes, None, None, False) for m in (cpp, eager))
    torch.testing.assert_close(actual[0], wanted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual[1], wanted[1], rtol=1e-4, atol=1.0)  # sums of a million terms of size one


@needs_kernel
def test_not_a_number_and_infinity_behave_as_in_plain_torch(instruction_set):
    c = config(0.0)
    x = torch.zeros(4, 70)
    x[1, 3], x[1, 5], x[1, 7], x[1, 69] = float("nan"), float("inf"), -float("inf"), float("nan")
    gain = torch.ones(4)
    for a, b in zip(cpp.forward(x, gain, None, c, True), eager.forward(x, gain, None, c, True), strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    spikes, v, _ = cpp.forward(x, gain, None, c, False)
    assert spikes[1, 5] == 1
    assert spikes[:, 3].sum() == 0
    assert v[[3, 69]].isnan().all()
    grad_v = torch.zeros(70)  # said outright: plain torch leaves out a gradient that is None, and 0 * inf is not 0
    for kind in ("triangle", "atan", "sigmoid"):
        arguments = x, gain, None, config(0.0, kind), torch.ones_like(x), grad_v, None, True
        for a, b in zip(cpp.backward(*arguments), eager.backward(*arguments), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_number_is_converted_as_torch_does(instruction_set, dtype):
    patterns = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    x = patterns[None]
    c = config(None, v_threshold=float("nan"), decay=1.0)  # nobody fires, so the potential is the input itself
    _, v, _ = cpp.forward(x, torch.ones(1), torch.zeros(x.shape[1]), c, False)
    torch.testing.assert_close(v, patterns.float(), rtol=0, atol=0, equal_nan=True)
    # and back: with no spike and no spike gradient grad_x is grad_v
    exact = patterns.float()
    between = (exact + exact.roll(-1)) / 2  # ties of the rounding
    tiny_steps = exact * (1 + torch.tensor([2.0**-20]))
    for grad_v in (exact, between, tiny_steps, exact * 1e-3, torch.full_like(exact, 65519.996), exact * 1e30):
        c = config(None, v_threshold=10.0, decay=1.0, detach_reset=True)
        grad_x, _, _ = cpp.backward(
            torch.zeros_like(x), torch.ones(1), None, c, torch.zeros_like(x), grad_v.contiguous(), None, False
        )
        torch.testing.assert_close(grad_x[0], grad_v.to(dtype), rtol=0, atol=0, equal_nan=True)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_does_not_depend_on_the_number_of_threads(threads, dtype):
    x, gain, v_init, *grads = random_call(6, 150_001, dtype)
    results = []
    for count in (1, 2, 3, 16):
        threads(count)
        results.append(
            [*cpp.forward(x, gain, v_init, config(), True), *cpp.backward(x, gain, v_init, config(), *grads, True)]
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_kernel
def test_calls_from_several_threads_at_once(threads):
    threads(2)
    calls = [random_call(4, 100_003, seed=seed) for seed in range(4)]
    expected = [cpp.backward(*call[:3], config(), *call[3:], True) for call in calls]
    actual = [None] * len(calls)

    def work(i):
        for _ in range(5):
            actual[i] = cpp.backward(*calls[i][:3], config(), *calls[i][3:], True)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for one, other in zip(actual, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


FORK = """
import os, sys
import numpy, torch
from sj_robust.ops import Surrogate
from sj_robust.ops.dlif import cpp
from sj_robust.ops.dlif.config import DLIFConfig
torch.set_num_threads(2)
config = DLIFConfig(0.9, 1.0, 0.0, Surrogate(), False)
x, gain = torch.randn(4, 200_000), torch.ones(4)
def results():
    outputs = cpp.forward(x, gain, None, config, True) + cpp.backward(x, gain, None, config, x, None, None, True)
    return [tensor.numpy() for tensor in outputs]
before = results() if sys.argv[1] == "after" else None
torch.randn(1 << 20).exp()  # the threads of torch's own operators are there
child = os.fork()
if child == 0:
    found = results()
    same = before is None or all(numpy.array_equal(a, b) for a, b in zip(before, found))
    os._exit(0 if same else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@needs_kernel
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
@pytest.mark.parametrize("first_use", ["before", "after"])
def test_works_in_a_child_forked_before_or_after_the_first_use(first_use):
    order = {"before": "after", "after": "before"}[first_use]
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK, order], check=True, timeout=60)


@needs_kernel
@pytest.mark.skipif("avx2" not in cpp.instruction_sets(), reason="this processor has no AVX2")
def test_wide_code_stores_past_the_cache():
    """A compiler that takes another branch of the preprocessor gives the same results, a third slower."""
    code = Path(cpp.__file__).with_name(cpp._LIBRARY_NAME).read_bytes()
    vmovntps_ymm = (b"\xc5\xfc\x2b", b"\xc5\x7c\x2b")
    assert sum(code.count(opcode) for opcode in vmovntps_ymm) > 50


@needs_kernel
def test_empty_batch():
    x = torch.zeros(3, 0)
    spikes, v, v_seq = cpp.forward(x, torch.ones(3), None, config(), True)
    assert (spikes.shape, v.shape, v_seq.shape) == ((3, 0), (0,), (3, 0))
    grad_x, grad_gain, grad_v_init = cpp.backward(x, torch.ones(3), None, config(), x, None, None, True)
    assert (grad_x.shape, grad_v_init.shape) == ((3, 0), (0,))
    assert torch.equal(grad_gain, torch.zeros(3))


@needs_kernel
def test_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv(cpp.INSTRUCTION_SET_VARIABLE, "altivec")
    with pytest.raises(ValueError, match="must be one of .*'baseline'.* got 'altivec'"):
        cpp.forward(torch.zeros(2, 3), torch.ones(2), None, config(), False)


@needs_kernel
def test_calls_it_cannot_run_are_refused_by_name_and_left_to_others_by_auto():
    custom = Surrogate("custom", function=torch.sigmoid)
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="knows the surrogates"):
        dlif_multi_step(x, torch.ones(2), decay=0.9, surrogate=custom, backend="cpp")
    dlif_multi_step(x, torch.ones(2), decay=0.9, surrogate=custom)
    assert "on meta" in cpp.unsupported_reason(x.to("meta"), Surrogate())
    assert "float8" in cpp.unsupported_reason(x.to(torch.float8_e5m2), Surrogate())
    assert cpp.unsupported_reason(x, Surrogate("atan")) is None


def pretend_library(tmp_path, monkeypatch, content):
    if content is not None:
        (tmp_path / cpp._LIBRARY_NAME).write_bytes(content)
    monkeypatch.setattr(cpp, "__file__", str(tmp_path / "cpp.py"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "was not built"), (b"built for another system", "cannot be loaded"), (b"", "cannot be")],
)
def test_missing_or_foreign_library_falls_back(tmp_path, monkeypatch, fresh_library, content, reason):
    pretend_library(tmp_path, monkeypatch, content)
    assert reason in cpp.unavailable_reason()
    assert "install" in cpp.unavailable_reason()
    assert available_backends()["cpp"] == cpp.unavailable_reason()
    assert cpp.instruction_sets() == ()
    x = torch.randn(3, 5)
    dlif_multi_step(x, torch.ones(3), decay=0.9)
    with pytest.raises(RuntimeError, match=reason):
        dlif_multi_step(x, torch.ones(3), decay=0.9, backend="cpp")
    with pytest.raises(RuntimeError, match=reason):
        cpp.forward(x, torch.ones(3), None, config(), False)


@needs_kernel
def test_library_of_another_version_falls_back(monkeypatch, fresh_library):
    monkeypatch.setattr(cpp, "_INTERFACE", -1)
    assert "another version" in cpp.unavailable_reason()
