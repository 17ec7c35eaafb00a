"""The CuPy backend on a real GPU, through the public operator; compared with the oracle of the other backends."""

import numpy as np
import pytest
import torch
from ops.calls import by_hand, random_call, run
from oracle import away_from_threshold

from sj_robust.ops import Surrogate, available_backends, choose_backend, dlif_multi_step
from sj_robust.ops.dlif import cupy_launch

_REASON = cupy_launch.unavailable_reason()
pytestmark = pytest.mark.skipif(_REASON is not None, reason=f"backend='cupy': {_REASON}")
SURROGATES = [("triangle", 1.0), ("atan", 2.0), ("sigmoid", 4.0)]
SHAPES = [(1, 5), (4, 1 << 16), (8, 3, 7, 5), (16, 1030), (32, 64, 3), (33, 130), (70, 17)]  # odd, long, many blocks


@pytest.mark.parametrize("v_reset", [0.0, None, -0.25])
@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize(("kind", "alpha"), SURROGATES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_equals_bptt_by_hand(v_reset, detach_reset, kind, alpha, shape, dtype):
    inputs, grads = random_call(shape, dtype)
    constants = {"decay": 0.9, "v_threshold": 0.8, "v_reset": v_reset, "detach_reset": detach_reset}
    constants |= {"kind": kind, "alpha": alpha}
    expected = by_hand(inputs, grads, **constants)
    outputs, gradients = run("cupy", *([a.cuda() for a in given] for given in (inputs, grads)), **constants)
    spikes, v, potentials, grad_x, grad_gain, grad_v_init = (a.float().cpu().numpy() for a in (*outputs, *gradients))
    clear = away_from_threshold(expected.h, 0.8, 1e-4)
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(spikes[clear], expected.spikes[clear])
    whole = clear[-1]  # neurons that never came near the threshold
    rtol = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    np.testing.assert_allclose(v[whole], expected.potentials[-1][whole], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(potentials[:, whole], expected.potentials[:, whole], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grad_x[:, whole], expected.grad_x[:, whole], rtol=rtol, atol=1e-5)
    np.testing.assert_allclose(grad_v_init[whole], expected.grad_v_init[whole], rtol=1e-5, atol=1e-5)
    if whole.all():
        scale = np.sqrt(v.size)
        np.testing.assert_allclose(grad_gain, expected.grad_gain, rtol=1e-4, atol=1e-5 * scale)


def test_spikes_equal_the_reference_bit_by_bit_and_gradients_repeat():
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(8, 1 << 18, device="cuda", generator=generator)
    gain = torch.rand(8, device="cuda", generator=generator).add_(0.5).requires_grad_()
    results = []
    for backend in ("cupy", "cupy", "reference"):
        gain.grad = None
        spikes, v, _ = dlif_multi_step(x, gain, decay=0.99, backend=backend)
        (spikes.sum() + v.sum()).backward()
        results.append((spikes.detach(), v.detach(), gain.grad))
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert torch.equal(results[0][0], results[2][0])
    assert torch.equal(results[0][1], results[2][1])
    torch.testing.assert_close(results[0][2], results[2][2], rtol=1e-4, atol=1e-2)


def test_auto_chooses_it():
    assert available_backends()["cupy"] == "available"
    assert choose_backend("auto", torch.zeros(2, 2, device="cuda"), Surrogate()) == "cupy"


def test_runs_on_torchs_current_stream():
    stream = torch.cuda.Stream()
    x, gain = torch.zeros(4, 1 << 22, device="cuda"), torch.ones(4, device="cuda")
    dlif_multi_step(x, gain, decay=0.5, backend="cupy")  # compiled before it is timed by the sleep
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.fill_(2.0)  # seen only by a kernel that waits for its stream
        spikes, _, _ = dlif_multi_step(x, gain, decay=0.5, backend="cupy")
    stream.synchronize()
    assert spikes.all()


@pytest.mark.parametrize("threads", [32, 512, 1024])
def test_block_sizes(threads):
    x, gain = torch.randn(32, 4096, device="cuda"), torch.ones(32, device="cuda")
    config = cupy_launch.DLIFConfig(0.9, 1.0, None, Surrogate("sigmoid", 4.0), False)
    launcher = cupy_launch.Launcher(threads_per_block=threads)
    arguments = (x, gain, None, config, torch.ones_like(x), None, None, True)
    for got, expected in zip(launcher.backward(*arguments), cupy_launch.backward(*arguments), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_gpu_is_used_and_the_current_one_kept():
    x, gain = torch.full((4, 64), 2.0, device="cuda:1"), torch.ones(4, device="cuda:1")
    spikes, _, _ = dlif_multi_step(x, gain, decay=0.5, backend="cupy")
    assert spikes.device.index == 1
    assert spikes.all()
    assert torch.cuda.current_device() == 0


def test_surrogates_of_spikingjelly_with_a_cuda_text():
    host = pytest.importorskip("spikingjelly.activation_based.surrogate")
    if not hasattr(host, "_has_cuda_"):
        pytest.skip("this SpikingJelly release has no cuda_codes")
    x, gain = torch.randn(4, 1000, device="cuda"), torch.ones(4, device="cuda")
    for cls in host._has_cuda_:
        grads = []
        for backend in ("cupy", "reference"):
            leaf = x.clone().requires_grad_()
            surrogate = Surrogate("custom", function=cls())
            dlif_multi_step(leaf, gain, decay=0.9, surrogate=surrogate, backend=backend)[0].sum().backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)
