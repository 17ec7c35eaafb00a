"""The CuPy backend on a real GPU, through the public operator; compared with the oracle of the other backends."""

import numpy as np
import pytest
import torch
from oracle import away_from_threshold, dlif_bptt

from sj_robust.ops import Surrogate, available_backends, choose_backend, dlif_multi_step
from sj_robust.ops.dlif import cupy_launch

_REASON = cupy_launch.unavailable_reason()
pytestmark = pytest.mark.skipif(_REASON is not None, reason=f"backend='cupy': {_REASON}")
SURROGATES = [("triangle", 1.0), ("atan", 2.0), ("sigmoid", 4.0)]
SHAPES = [(1, 5), (4, 1 << 16), (8, 3, 7, 5), (16, 1030), (32, 64, 3), (33, 130), (70, 17)]  # odd, long, many blocks


def run(x, gain, v_init, *, kind, alpha, grads, dtype=torch.float32, **kwargs):
    """Outputs and gradients of the operator on the GPU as float32 numpy arrays."""
    x = torch.tensor(x, device="cuda").to(dtype).requires_grad_()
    gain, v_init = (torch.tensor(a, device="cuda", dtype=torch.float32, requires_grad=True) for a in (gain, v_init))
    outputs = dlif_multi_step(
        x, gain, v_init, surrogate=Surrogate(kind, alpha), store_v_seq=True, backend="cupy", **kwargs
    )
    grads = [torch.tensor(g, device="cuda").to(out.dtype) for g, out in zip(grads, outputs, strict=True)]
    torch.autograd.backward(list(outputs), grads)
    return [a.detach().float().cpu().numpy() for a in (*outputs, x.grad, gain.grad, v_init.grad)]


@pytest.mark.parametrize("v_reset", [0.0, None, -0.25])
@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize(("kind", "alpha"), SURROGATES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_equals_bptt_by_hand(v_reset, detach_reset, kind, alpha, shape, dtype):
    rng = np.random.default_rng(shape[0])
    T = shape[0]
    to_format = lambda a: torch.tensor(a).to(dtype).double().numpy()  # noqa: E731  # what the tensor really holds
    x, grad_spikes = to_format(rng.normal(0.3, 0.8, shape)), to_format(rng.normal(size=shape))
    gain = rng.normal(1.0, 0.3, T).astype(np.float32).astype(np.float64)
    v_init = rng.normal(0.2, 0.4, shape[1:]).astype(np.float32).astype(np.float64)
    grads = grad_spikes, rng.normal(size=shape[1:]), rng.normal(size=shape)
    constants = {"decay": 0.9, "v_threshold": 0.8, "v_reset": v_reset, "detach_reset": detach_reset}
    expected = dlif_bptt(
        x, gain, v_init, kind=kind, alpha=alpha, grad_spikes=grads[0], grad_v=grads[1], grad_potentials=grads[2],
        **constants,
    )  # fmt: skip
    spikes, v, potentials, grad_x, grad_gain, grad_v_init = run(
        x, gain, v_init, kind=kind, alpha=alpha, grads=grads, dtype=dtype, **constants
    )
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
        scale = np.sqrt(v_init.size)
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
