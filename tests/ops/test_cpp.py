"""The compiled CPU kernel and its surroundings: library, processor, threads, halves. Its results:
test_dlif.py.
"""

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from ops.calls import assert_equal, needs_kernel, random_call
from torch.testing import assert_close

from sj_robust.ops import Surrogate, available_backends, dlif_multi_step
from sj_robust.ops.dlif import cpp, eager, operator
from sj_robust.ops.dlif.config import DLIFConfig, Inputs, OutputGradients


@pytest.fixture
def fresh_library():
    cpp._load.cache_clear()
    yield
    cpp._load.cache_clear()


def config(v_reset=0.0, decay=0.9, v_threshold=0.8, detach_reset=False):
    return DLIFConfig(decay, v_threshold, v_reset, Surrogate(), detach_reset)


def call(T, M, dtype=torch.float32, seed=0):
    """Inputs and incoming gradients, each in the dtype that the contract asks for."""
    inputs, grads = random_call((T, M), dtype, seed)
    return Inputs(*inputs, config()), OutputGradients(*grads)


def test_kernel_is_there_where_it_can_be_built():
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        pytest.skip("no C++ compiler, so there is nothing to expect")
    assert cpp.unavailable_reason() is None, "install the package first, e.g. pip install -e ."
    assert available_backends()["cpp"] == "available"


@pytest.mark.slow
@needs_kernel
@pytest.mark.parametrize(
    "M", [(1 << 20) + 64, (1 << 20) + 3]
)  # rows aligned, so written past the cache, and not
def test_large_tensors(instruction_set, threads, M):
    threads(2)
    inputs, grads = call(5, M)
    inputs = inputs._replace(v_init=None)
    assert_equal(*(operator.forward(one, inputs, True) for one in (cpp, eager)))
    actual, wanted = (
        operator.backward(one, inputs, OutputGradients(grads.spike_seq), False)
        for one in (cpp, eager)
    )
    assert_close(actual[0], wanted[0], rtol=1e-5, atol=1e-5)
    assert_close(actual[1], wanted[1], rtol=1e-4, atol=1.0)  # sums of a million terms of size one


@needs_kernel
def test_a_sum_of_a_million_terms_keeps_its_digits(instruction_set):
    """Each rounding goes the same way, so a sum in float32 alone is off by more the longer it
    is.
    """
    M = 1 << 20
    gain = torch.ones(1)
    one, many = (
        operator.backward(
            cpp,
            Inputs(torch.full((1, n), 0.1), gain, None, config()),
            OutputGradients(torch.full((1, n), 0.3)),
            False,
        )
        for n in (1, M)
    )
    expected = M * one[1].double()
    assert_close(many[1].double(), expected, rtol=2e-5, atol=0)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_number_is_converted_as_torch_does(instruction_set, dtype):
    patterns = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    x = patterns[None]
    c = config(
        None, v_threshold=float("nan"), decay=1.0
    )  # nobody fires, so the potential is the input itself
    inputs = Inputs(x, torch.ones(1), torch.zeros(x.shape[1]), c)
    _, v, _ = operator.forward(cpp, inputs, False)
    assert_close(v, patterns.float(), rtol=0, atol=0, equal_nan=True)
    # and back: with no spike and no spike gradient grad_x is grad_v
    exact = patterns.float()
    between = (exact + exact.roll(-1)) / 2  # ties of the rounding
    tiny_steps = exact * (1 + torch.tensor([2.0**-20]))
    for grad_v in (
        exact,
        between,
        tiny_steps,
        exact * 1e-3,
        torch.full_like(exact, 65519.996),
        exact * 1e30,
    ):
        inputs = Inputs(
            torch.zeros_like(x), torch.ones(1), None, config(None, 1.0, 10.0, detach_reset=True)
        )
        grads = OutputGradients(torch.zeros_like(x), grad_v.contiguous())
        grad_x, _, _ = operator.backward(cpp, inputs, grads, False)
        assert_close(grad_x[0], grad_v.to(dtype), rtol=0, atol=0, equal_nan=True)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_does_not_depend_on_the_number_of_threads(threads, dtype):
    inputs, grads = call(6, 150_001, dtype)
    results = []
    for count in (1, 2, 3, 16):
        threads(count)
        outputs = operator.forward(cpp, inputs, True)
        results.append([*outputs, *operator.backward(cpp, inputs, grads, True)])
    for other in results[1:]:
        assert_equal(other, results[0])


@needs_kernel
def test_calls_from_several_threads_at_once(threads):
    threads(2)
    calls = [call(4, 100_003, seed=seed) for seed in range(4)]
    expected = [operator.backward(cpp, *one, True) for one in calls]
    actual = [None] * len(calls)

    def work(i):
        for _ in range(5):
            actual[i] = operator.backward(cpp, *calls[i], True)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert_equal(actual, expected)


FORK = """
import os, sys
import numpy, torch
from sj_robust.ops import Surrogate
from sj_robust.ops.dlif import cpp, operator
from sj_robust.ops.dlif.config import DLIFConfig, Inputs, OutputGradients
torch.set_num_threads(2)
x = torch.randn(4, 200_000)
inputs = Inputs(x, torch.ones(4), None, DLIFConfig(0.9, 1.0, 0.0, Surrogate(), False))
def results():
    outputs = operator.forward(cpp, inputs, True)
    outputs += operator.backward(cpp, inputs, OutputGradients(x), True)
    return [tensor.numpy() for tensor in outputs]
def exit_code(before):
    child = os.fork()
    if child == 0:
        found = results()
        os._exit(0 if all(numpy.array_equal(a, b) for a, b in zip(before or found, found)) else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
torch.randn(1 << 20).exp()  # the threads of torch's own operators are there
sys.exit(exit_code(None) or exit_code(results()))
"""


@pytest.mark.slow
@needs_kernel
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_works_in_children_forked_before_and_after_the_first_use():
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=True, timeout=60)


@needs_kernel
@pytest.mark.skipif("avx2" not in cpp.instruction_sets(), reason="this processor has no AVX2")
def test_wide_code_stores_past_the_cache():
    """A compiler that takes another branch of the preprocessor gives the same results, a third
    slower.
    """
    code = Path(cpp.__file__).with_name(cpp._LIBRARY_NAME).read_bytes()
    vmovntps_ymm = (b"\xc5\xfc\x2b", b"\xc5\x7c\x2b")
    assert sum(code.count(opcode) for opcode in vmovntps_ymm) > 50


@needs_kernel
def test_what_a_gpu_kernel_is_tried_with_spikes_once_in_a_right_one():
    assert operator._spikes_of_one_neuron("cpp", torch.device("cpu")) == [0.0, 1.0]


@needs_kernel
def test_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv(cpp.INSTRUCTION_SET_VARIABLE, "altivec")
    with pytest.raises(ValueError, match="must be one of .*'baseline'.* got 'altivec'"):
        operator.forward(cpp, call(2, 3)[0], False)


@needs_kernel
def test_calls_it_cannot_run_are_refused_by_name_and_left_to_others_by_auto():
    custom = Surrogate("custom", function=torch.sigmoid)
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="supports the surrogates"):
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
    [
        (None, "was not built"),
        (b"built for another system", "cannot be loaded"),
        (b"", "cannot be"),
    ],
)
def test_missing_or_foreign_library_falls_back(
    tmp_path, monkeypatch, fresh_library, content, reason
):
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
        operator.forward(cpp, call(3, 5)[0], False)


@needs_kernel
def test_library_of_another_version_falls_back(monkeypatch, fresh_library):
    monkeypatch.setattr(cpp, "_INTERFACE", -1)
    assert "another version" in cpp.unavailable_reason()
