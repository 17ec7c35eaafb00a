"""The DLIF operator against back-propagation through time written by hand."""

import itertools

import numpy as np
import pytest
import torch
from oracle import away_from_threshold, dlif_bptt
from torch import nn

from sj_robust.ops import Surrogate, available_backends, check_backend, choose_backend, dlif_multi_step
from sj_robust.ops.dlif import eager

CPU_BACKENDS = [name for name in ("reference", "eager", "cpp") if available_backends()[name] == "available"]
SURROGATES = [("triangle", 1.0), ("atan", 2.0), ("sigmoid", 4.0)]
RESETS = [0.0, None, -0.25]


def run(backend, x, gain, v_init, *, kind, alpha, grads, **kwargs):
    """Outputs and gradients of the operator as numpy arrays."""
    x, gain, v_init = (torch.tensor(a, requires_grad=True) for a in (x, gain, v_init))
    spikes, v, potentials = dlif_multi_step(
        x, gain, v_init, surrogate=Surrogate(kind, alpha), store_v_seq=True, backend=backend, **kwargs
    )
    torch.autograd.backward([spikes, v, potentials], [torch.tensor(g, dtype=x.dtype) for g in grads])
    return [a.detach().numpy() for a in (spikes, v, potentials, x.grad, gain.grad, v_init.grad)]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("v_reset", RESETS)
@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize(("kind", "alpha"), SURROGATES)
@pytest.mark.parametrize("T", [1, 2, 3, 4, 7, 8, 13, 16])
def test_equals_bptt_by_hand(backend, v_reset, detach_reset, kind, alpha, T):
    rng = np.random.default_rng(T)
    shape = (T, 3, 7, 5)
    x, gain, v_init = rng.normal(0.3, 0.8, shape), rng.normal(1.0, 0.3, T), rng.normal(0.2, 0.4, shape[1:])
    grads = rng.normal(size=shape), rng.normal(size=shape[1:]), rng.normal(size=shape)
    constants = {"decay": 0.9, "v_threshold": 0.8, "v_reset": v_reset, "detach_reset": detach_reset}
    expected = dlif_bptt(
        x, gain, v_init, kind=kind, alpha=alpha,
        grad_spikes=grads[0], grad_v=grads[1], grad_potentials=grads[2], **constants,
    )  # fmt: skip
    assert 0.05 < expected.spikes.mean() < 0.95
    spikes, v, potentials, *gradients = run(backend, x, gain, v_init, kind=kind, alpha=alpha, grads=grads, **constants)
    np.testing.assert_array_equal(spikes, expected.spikes)
    np.testing.assert_allclose(potentials, expected.potentials, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(v, potentials[-1])
    for actual, wanted in zip(gradients, (expected.grad_x, expected.grad_gain, expected.grad_v_init), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("v_reset", RESETS)
def test_float32_spikes_equal_away_from_the_threshold(backend, v_reset):
    rng = np.random.default_rng(0)
    shape, T = (8, 4, 33, 17), 8
    x, gain, v_init = rng.normal(0.2, 0.8, shape), rng.normal(1.0, 0.2, T), rng.normal(0.0, 0.3, shape[1:])
    x, gain, v_init = (a.astype(np.float32) for a in (x, gain, v_init))
    grads = [rng.normal(size=s).astype(np.float32) for s in (shape, shape[1:], shape)]
    constants = {"decay": 0.99, "v_threshold": 1.0, "v_reset": v_reset, "detach_reset": False}
    expected = dlif_bptt(
        *(a.astype(np.float64) for a in (x, gain, v_init)), kind="triangle", alpha=1.0,
        grad_spikes=grads[0], grad_v=grads[1], grad_potentials=grads[2], **constants,
    )  # fmt: skip
    spikes, _, potentials, grad_x, *_ = run(
        backend, x, gain, v_init, kind="triangle", alpha=1.0, grads=grads, **constants
    )
    certain = away_from_threshold(expected.h, 1.0, 1e-5)
    assert certain.mean() > 0.999
    np.testing.assert_array_equal(spikes[certain], expected.spikes[certain])
    np.testing.assert_allclose(potentials[certain], expected.potentials[certain], atol=1e-5)
    # a gradient looks at the whole sequence of its neuron, so only neurons certain to the last step count
    np.testing.assert_allclose(grad_x[:, certain[-1]], expected.grad_x[:, certain[-1]], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_spikes_exactly_at_the_threshold(backend):
    # quarters are exact in binary, so that h == v_threshold really happens, which random numbers never show
    values = np.array(list(itertools.product([0.0, 0.25, 0.5, 1.0], repeat=3))).T.reshape(3, -1, 1)
    ones = np.ones(3)
    expected = dlif_bptt(
        values, ones, np.zeros(values.shape[1:]), decay=0.5, v_threshold=1.0, v_reset=0.0, kind="triangle", alpha=1.0,
        detach_reset=False, grad_spikes=np.ones_like(values), grad_v=np.zeros(values.shape[1:]),
        grad_potentials=np.zeros_like(values),
    )  # fmt: skip
    assert (expected.h == 1.0).sum() > 10
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor(values, dtype=dtype, requires_grad=True)
        spikes, _, _ = dlif_multi_step(x, torch.ones(3), decay=0.5, backend=backend)
        spikes.sum().backward()
        np.testing.assert_array_equal(spikes.detach().numpy(), expected.spikes)
        np.testing.assert_allclose(x.grad.numpy(), expected.grad_x, atol=1e-7)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("shape", [(3, 0), (1, 1), (2, 1, 1), (4, 2, 3, 5, 7), (5, 0, 4), (40, 2, 3), (3, 70001)])
def test_odd_shapes(backend, shape):
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    gain = torch.rand(shape[0], requires_grad=True)
    spikes, v, potentials = dlif_multi_step(x, gain, decay=0.9, backend=backend, store_v_seq=True)
    expected, expected_v, expected_potentials = dlif_multi_step(
        x, gain, decay=0.9, backend="reference", store_v_seq=True
    )
    assert spikes.shape == x.shape
    assert torch.equal(spikes, expected)
    assert torch.equal(v, expected_v)
    assert torch.equal(potentials, expected_potentials)
    weights = torch.randn(shape)
    actual = torch.autograd.grad((spikes * weights).sum(), [x, gain])
    wanted = torch.autograd.grad((expected * weights).sum(), [x, gain])
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_keep_a_float32_state(backend, dtype):
    torch.manual_seed(0)
    x = (torch.randn(6, 3, 11) * 2).to(dtype).requires_grad_()
    gain = torch.rand(6).requires_grad_()
    spikes, v, _ = dlif_multi_step(x, gain, decay=0.99, backend=backend)
    spikes.float().sum().backward()
    x32 = x.detach().float().requires_grad_()
    gain32 = gain.detach().requires_grad_()
    expected, expected_v, _ = dlif_multi_step(x32, gain32, decay=0.99, backend="reference")
    expected.sum().backward()
    assert (spikes.dtype, v.dtype, x.grad.dtype) == (dtype, torch.float32, dtype)
    assert torch.equal(spikes.float(), expected)
    assert torch.equal(v, expected_v)
    torch.testing.assert_close(x.grad.float(), x32.grad, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(gain.grad, gain32.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_memory_formats_are_not_mixed_up(backend):
    torch.manual_seed(0)
    plain = torch.randn(4, 2, 3, 5, 6)
    channels_last = plain.flatten(0, 1).contiguous(memory_format=torch.channels_last).view(4, 2, 3, 5, 6)
    repeated = plain[:1].expand(4, -1, -1, -1, -1)
    sliced = torch.randn(4, 2, 3, 5, 12)[..., ::2]
    v_init = torch.randn(2, 3, 5, 6)
    for x in (channels_last, repeated, sliced):
        actual = dlif_multi_step(x, torch.ones(4), v_init, decay=0.9, store_v_seq=True, backend=backend)
        wanted = dlif_multi_step(
            x.contiguous(), torch.ones(4), v_init, decay=0.9, store_v_seq=True, backend="reference"
        )
        for a, b in zip(actual, wanted, strict=True):
            assert torch.equal(a, b)
    x = channels_last.clone().requires_grad_()
    weights = torch.randn_like(plain)
    (dlif_multi_step(x, torch.ones(4), v_init, decay=0.9, backend=backend)[0] * weights).sum().backward()
    y = plain.clone().requires_grad_()
    (dlif_multi_step(y, torch.ones(4), v_init, decay=0.9, backend="reference")[0] * weights).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("v_reset", [0.0, None, -0.5])
@pytest.mark.parametrize("from_rest", [True, False])
@pytest.mark.parametrize("needs", ["spikes", "potential", "potentials", "all"])
@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("T", [1, 3])
def test_eager_in_several_blocks(monkeypatch, v_reset, from_rest, needs, detach_reset, T):
    monkeypatch.setattr(eager, "_CPU_BLOCK_LIMIT", 1)
    torch.manual_seed(0)
    inputs = [torch.randn(T, 2 * 4096 + 17), torch.rand(T) + 0.5]
    if not from_rest:
        inputs.append(torch.randn(2 * 4096 + 17))
    assert len(eager._blocks(inputs[0])) == 3
    kept = {"spikes": [0], "potential": [1], "potentials": [2], "all": [0, 1, 2]}[needs]
    results = []
    for backend in ("eager", "reference"):
        leaves = [a.clone().requires_grad_() for a in inputs]
        outputs = dlif_multi_step(
            *leaves, decay=0.9, v_reset=v_reset, detach_reset=detach_reset, store_v_seq=True, backend=backend
        )
        torch.manual_seed(1)
        weights = [torch.randn_like(a) for a in outputs]
        grads = torch.autograd.grad([outputs[i] for i in kept], leaves, [weights[i] for i in kept])
        results.append((outputs, grads))
    for a, b in zip(*(outputs for outputs, _ in results), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(*(grads for _, grads in results), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_eager_keeps_the_digits_of_long_sums():
    x = torch.full((1, 1 << 23), 0.1)
    gain = torch.ones(1, requires_grad=True)
    spikes, _, _ = dlif_multi_step(x, gain, decay=0.9, backend="eager")
    spikes.sum().backward()
    exact = (1 - (1 - x.double())).mul(x.double()).sum()  # triangle at z = 0.1 - 1, times x
    assert abs(float(gain.grad) / float(exact) - 1) < 1e-5


def test_eager_saves_its_inputs_and_nothing_else():
    saved = []
    x = torch.randn(4, 10, requires_grad=True)
    gain = torch.ones(4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dlif_multi_step(x, gain, decay=0.9, backend="eager")
    addresses = {t.data_ptr() for t in saved}
    assert addresses == {x.data_ptr(), gain.data_ptr()}


@pytest.mark.parametrize("v_reset", [0.0, None, -0.5])
def test_gradcheck_with_a_smooth_spike(v_reset):
    torch.manual_seed(0)
    smooth = Surrogate("custom", function=lambda z: torch.sigmoid(2 * z))
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    gain = torch.rand(4, dtype=torch.float64, requires_grad=True)
    v_init = torch.randn(3, dtype=torch.float64, requires_grad=True)
    for backend in ("reference", "eager"):

        def function(*inputs, backend=backend):
            return dlif_multi_step(
                *inputs, decay=0.8, v_reset=v_reset, surrogate=smooth, store_v_seq=True, backend=backend
            )

        assert torch.autograd.gradcheck(function, (x, gain, v_init))


def test_custom_surrogate_equals_the_compiled_in_one():
    class Spike(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return (z >= 0).to(z)

        @staticmethod
        def backward(ctx, grad):
            (z,) = ctx.saved_tensors
            return grad * (1 - z.abs()).clamp(min=0)

    x = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    results = []
    for surrogate in (Surrogate("triangle"), Surrogate("custom", function=Spike.apply)):
        spikes, _, _ = dlif_multi_step(
            x, torch.ones(5), decay=0.9, v_threshold=0.5, surrogate=surrogate, backend="eager"
        )
        results.append((spikes, torch.autograd.grad((spikes * x.detach()).sum(), x)[0]))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


def test_second_derivative_is_refused_not_wrong():
    x = torch.randn(3, 4, requires_grad=True)
    spikes, _, _ = dlif_multi_step(x, torch.ones(3), decay=0.9, backend="eager")
    with pytest.raises(RuntimeError, match="differentiable once.*backend='reference'"):
        torch.autograd.grad(spikes.sum(), x, create_graph=True)
    spikes, _, _ = dlif_multi_step(x, torch.ones(3), decay=0.9, backend="reference")
    (grad,) = torch.autograd.grad(spikes.sum(), x, create_graph=True)
    assert grad.requires_grad


def test_gradient_of_the_potential_alone():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for backend in CPU_BACKENDS:
        _, v, _ = dlif_multi_step(x, torch.ones(3), decay=0.5, v_threshold=100.0, backend=backend)
        (grad,) = torch.autograd.grad(v.sum(), x)
        torch.testing.assert_close(grad[:, 0], torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64))


class TestContract:
    def test_unknown_backend(self):
        with pytest.raises(ValueError, match="backend must be one of"):
            check_backend("numpy")

    def test_named_backend_that_cannot_run_says_what_to_do(self):
        trainable = nn.PReLU()
        x = torch.zeros(2, 3)
        with pytest.raises(ValueError, match="backend='eager' cannot run this call.*backend='auto'"):
            choose_backend("eager", x, Surrogate("custom", function=trainable))
        assert choose_backend("auto", x, Surrogate("custom", function=trainable)) == "reference"

    def test_a_compiler_gets_plain_torch(self, monkeypatch):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        x = torch.zeros(3, 2)
        assert choose_backend("auto", x, Surrogate()) == "eager"
        assert choose_backend("auto", x, Surrogate("custom", function=torch.sigmoid)) == "reference"

    def test_missing_backend_says_what_is_missing(self):
        missing = [name for name, state in available_backends().items() if state != "available"]
        for name in missing:
            with pytest.raises(RuntimeError, match=f"backend='{name}' is not available: .*take backend='auto'"):
                check_backend(name)

    def test_trainable_surrogate_gets_its_gradient(self):
        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.tensor(2.0))

            def forward(self, z):
                return torch.sigmoid(self.scale * z)

        surrogate = Scaled()
        spikes, _, _ = dlif_multi_step(
            torch.randn(3, 4), torch.ones(3), decay=0.9, surrogate=Surrogate("custom", function=surrogate)
        )
        spikes.sum().backward()
        assert surrogate.scale.grad.abs() > 0

    @pytest.mark.parametrize(
        ("x", "gain", "v_init", "error", "match"),
        [
            (torch.zeros(3, 2, dtype=torch.int64), torch.ones(3), None, TypeError, "floating point, got torch.int64"),
            (torch.zeros(0, 2), torch.ones(0), None, ValueError, "T >= 1"),
            (torch.tensor(1.0), torch.ones(1), None, ValueError, "T >= 1"),
            (torch.zeros(3, 2), torch.ones(2), None, ValueError, "one value per step"),
            (torch.zeros(3, 2), torch.ones(3), torch.zeros(3), ValueError, "shape of one step"),
        ],
    )
    def test_wrong_arguments(self, x, gain, v_init, error, match):
        with pytest.raises(error, match=match):
            dlif_multi_step(x, gain, v_init, decay=0.9)

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"kind": "tanh"}, "kind must be one of"),
            ({"kind": "atan", "alpha": 0.0}, "alpha must be finite and > 0"),
            ({"kind": "atan", "alpha": float("inf")}, "alpha must be finite and > 0"),
            ({"kind": "atan", "alpha": float("nan")}, "alpha must be finite and > 0"),
            ({"kind": "custom"}, "function must be given"),
            ({"kind": "atan", "function": torch.sigmoid}, "function must be given"),
        ],
    )
    def test_wrong_surrogates(self, arguments, match):
        with pytest.raises(ValueError, match=match):
            Surrogate(**arguments)
