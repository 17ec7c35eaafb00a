"""The kernels for CUDA on a real GPU, on the table of calls of the other backends."""

import pytest
import torch
from ops.calls import LARGE, TABLE, check, of_every_number, results
from torch.testing import assert_close

from sj_robust.ops import Surrogate, available_backends, dlif_multi_step
from sj_robust.ops.dlif import cupy_launch, operator
from sj_robust.ops.dlif.config import DLIFConfig, Inputs, OutputGradients
from sj_robust.ops.dlif.operator import choose_backend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU")


@pytest.fixture(params=["cupy", "triton"])
def backend(request):
    return needs(request.param)


def needs(name):
    """The name of a backend, if it can run."""
    reason = operator.failing_reason(name)
    if reason is not None:
        pytest.skip(f"backend={name!r}: {reason}")
    return name


CASES = [*TABLE, *(case for case in LARGE if case.stage is None and case.dtype != torch.float64)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference_and_repeats(backend, case):
    check(case, backend, device="cuda")
    first, second = (results(backend, case, device="cuda").listed() for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_slopes_by_formula(backend):
    of_every_number(backend, device="cuda")


def test_auto_chooses_the_first_that_works():
    working = [
        name for name in ("cupy", "triton", "eager") if available_backends()[name] == "available"
    ]
    found = choose_backend("auto", torch.zeros(2, 2, device="cuda"), Surrogate())
    assert found == working[0]


def test_runs_on_torchs_current_stream(backend):
    stream = torch.cuda.Stream()
    x = torch.zeros(4, 1 << 22, device="cuda")
    gain = torch.ones(4, device="cuda")
    dlif_multi_step(x, gain, decay=0.5, backend=backend)  # compiled before it is timed by the sleep
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.fill_(2.0)  # seen only by a kernel that waits for its stream
        spikes, _, _ = dlif_multi_step(x, gain, decay=0.5, backend=backend)
    stream.synchronize()
    assert spikes.all()


@pytest.mark.parametrize("threads", [32, 512, 1024])
def test_block_sizes(threads):
    needs("cupy")
    x = torch.randn(32, 4096, device="cuda")
    gain = torch.ones(32, device="cuda")
    config = DLIFConfig(0.9, 1.0, None, Surrogate("sigmoid", 4.0), False)
    launcher = cupy_launch.Launcher(threads_per_block=threads)
    arguments = Inputs(x, gain, None, config), OutputGradients(torch.ones_like(x)), True
    found, wanted = (operator.backward(one, *arguments) for one in (launcher, cupy_launch))
    for got, expected in zip(found, wanted, strict=True):
        assert_close(got, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_gpu_is_used_and_the_current_one_kept(backend):
    x = torch.full((4, 64), 2.0, device="cuda:1")
    gain = torch.ones(4, device="cuda:1")
    spikes, _, _ = dlif_multi_step(x, gain, decay=0.5, backend=backend)
    assert spikes.device.index == 1
    assert spikes.all()
    assert torch.cuda.current_device() == 0


def test_surrogates_of_spikingjelly_with_a_cuda_text():
    host = pytest.importorskip("spikingjelly.activation_based.surrogate")
    if not hasattr(host, "_has_cuda_"):
        pytest.skip("this SpikingJelly release has no cuda_codes")
    needs("cupy")
    x = torch.randn(4, 1000, device="cuda")
    gain = torch.ones(4, device="cuda")
    for cls in host._has_cuda_:
        grads = []
        for name in ("cupy", "reference"):
            leaf = x.clone().requires_grad_()
            own = Surrogate("custom", function=cls())
            spikes, _, _ = dlif_multi_step(leaf, gain, decay=0.9, surrogate=own, backend=name)
            grads += torch.autograd.grad(spikes.sum(), leaf)
        assert_close(*grads, rtol=1e-3, atol=1e-4)
