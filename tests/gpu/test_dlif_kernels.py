"""The kernels for CUDA on a real GPU, on the table of calls of the other backends."""

import pytest
import torch
from ops.calls import LARGE, TABLE, check, of_every_number, results

from sj_robust.ops import Surrogate, available_backends, dlif_multi_step
from sj_robust.ops.dlif import operator
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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_gpu_is_used_and_the_current_one_kept(backend):
    x = torch.full((4, 64), 2.0, device="cuda:1")
    gain = torch.ones(4, device="cuda:1")
    spikes, _, _ = dlif_multi_step(x, gain, decay=0.5, backend=backend)
    assert spikes.device.index == 1
    assert spikes.all()
    assert torch.cuda.current_device() == 0
