"""The kernels for CUDA on a real GPU, through the public operator; compared with the oracle of the
other backends.
"""

import numpy as np
import pytest
import torch
from covering import every_pair
from ops.calls import by_hand, check_slopes, random_call, run
from ops.triton import cases
from oracle import away_from_threshold
from torch.testing import assert_close

from sj_robust.ops import Surrogate, available_backends, dlif_multi_step
from sj_robust.ops.dlif import cupy_launch, operator
from sj_robust.ops.dlif.config import DLIFConfig, Inputs, OutputGradients
from sj_robust.ops.dlif.operator import choose_backend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU")
CHOICES = {
    "v_reset": [0.0, None, -0.25],
    "detach_reset": [False, True],
    "surrogate": [("triangle", 1.0), ("atan", 2.0), ("sigmoid", 4.0)],
    # odd, long, many blocks
    "shape": [
        (1, 5),
        (4, 1 << 16),
        (8, 3, 7, 5),
        (16, 1030),
        (32, 64, 3),
        (33, 130),
        (70, 17),
    ],
    "dtype": [torch.float32, torch.float16, torch.bfloat16],
}


def needs(name):
    """The name of a backend, if it can run."""
    reason = operator.failing_reason(name)
    if reason is not None:
        pytest.skip(f"backend={name!r}: {reason}")
    return name


@pytest.fixture(params=["cupy", "triton"])
def backend(request):
    return needs(request.param)


@pytest.mark.parametrize(tuple(CHOICES), every_pair(CHOICES))
def test_equals_bptt_by_hand(v_reset, detach_reset, surrogate, shape, dtype):
    needs("cupy")
    kind, alpha = surrogate
    inputs, grads = random_call(shape, dtype)
    constants = {"decay": 0.9, "v_threshold": 0.8, "v_reset": v_reset, "detach_reset": detach_reset}
    constants |= {"kind": kind, "alpha": alpha}
    expected = by_hand(inputs, grads, **constants)
    outputs, gradients = run("cupy", on_the_gpu(inputs), on_the_gpu(grads), **constants)
    spikes, v, potentials, grad_x, grad_gain, grad_v_init = (
        a.float().cpu().numpy() for a in (*outputs, *gradients)
    )
    clear = away_from_threshold(expected.h, 0.8, 1e-4)
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(spikes[clear], expected.spikes[clear])
    whole = clear[-1]  # neurons that never came near the threshold
    rtol = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    np.testing.assert_allclose(v[whole], expected.potentials[-1][whole], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        potentials[:, whole], expected.potentials[:, whole], rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(grad_x[:, whole], expected.grad_x[:, whole], rtol=rtol, atol=1e-5)
    np.testing.assert_allclose(
        grad_v_init[whole], expected.grad_v_init[whole], rtol=1e-5, atol=1e-5
    )
    if whole.all():
        scale = np.sqrt(v.size)
        np.testing.assert_allclose(grad_gain, expected.grad_gain, rtol=1e-4, atol=1e-5 * scale)


def test_slopes_by_formula(backend):
    check_slopes(backend, device="cuda")


@pytest.mark.parametrize("case", cases.cases(), ids=str)
def test_triton_equals_the_reference(case):
    """The calls of the interpreter's tests: few, since Triton takes seconds to compile each."""
    needs("triton")
    inputs, grads = random_call((case.steps, case.neurons), case.dtype, seed=case.steps)
    cases.check(case, on_the_gpu(inputs), on_the_gpu(grads))


def on_the_gpu(tensors):
    return [tensor.cuda() for tensor in tensors]


def test_spikes_equal_the_reference_bit_by_bit_and_gradients_repeat(backend):
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(8, 1 << 18, device="cuda", generator=generator)
    gain = torch.rand(8, device="cuda", generator=generator).add_(0.5).requires_grad_()
    results = []
    for name in (backend, backend, "reference"):
        gain.grad = None
        spikes, v, _ = dlif_multi_step(x, gain, decay=0.99, backend=name)
        (spikes.sum() + v.sum()).backward()
        results.append((spikes.detach(), v.detach(), gain.grad))
    for a, b in zip(results[0], results[1], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(results[0][0], results[2][0])
    assert torch.equal(results[0][1], results[2][1])
    assert_close(results[0][2], results[2][2], rtol=1e-4, atol=1e-2)


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
            surrogate = Surrogate("custom", function=cls())
            dlif_multi_step(leaf, gain, decay=0.9, surrogate=surrogate, backend=name)[
                0
            ].sum().backward()
            grads.append(leaf.grad)
        assert_close(*grads, rtol=1e-3, atol=1e-4)
