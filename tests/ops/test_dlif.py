"""Every backend of the DLIF operator against back-propagation through time by hand, and against the
reference.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from covering import each_in_turn, every_pair, mostly_slow
from ops import slopes
from ops.calls import (
    KERNELS,
    assert_equal,
    by_hand,
    check_slopes,
    choose,
    laid_out,
    not_finite,
    quarters,
    random_call,
    run,
)
from ops.triton import cases
from oracle import away_from_threshold
from torch import nn
from torch.testing import assert_close

from sj_robust.core.host import surrogate as host
from sj_robust.ops import Surrogate, available_backends, dlif_multi_step
from sj_robust.ops.dlif import eager
from sj_robust.ops.dlif.dispatch import check_backend, choose_backend
from sj_robust.ops.surrogate import HOST_NAMES

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
FAST = ["eager", *KERNELS]
BACKENDS = ["reference", *FAST]
CHOICES = {
    "backend": BACKENDS,
    "shape": [(1, 1), (2, 31), (3, 4099), (4, 3, 7, 5), (5, 64), (8, 3, 7, 5), (13, 105), (16, 65)],
    "v_reset": [0.0, None, -0.25],
    "detach_reset": [False, True],
    "kind": list(HOST_NAMES),
    "alpha": [0.6, 2.0],
}
not_the_reference = pytest.mark.parametrize("backend", FAST, indirect=True)


def backend_and(name, rows):
    """Parameters of a test: a backend, and what is called, in every row."""
    return pytest.mark.parametrize(("backend", name), rows, indirect=["backend"], ids=str)


@dataclass(frozen=True)
class OneCall:
    """A call that is compared with one by hand, by the names of CHOICES."""

    shape: tuple[int, ...]
    v_reset: float | None
    detach_reset: bool
    kind: str
    alpha: float

    @property
    def constants(self):
        return {"v_threshold": 0.8, **{k: v for k, v in vars(self).items() if k != "shape"}}


CALLS = [(backend, OneCall(*values)) for backend, *values in every_pair(CHOICES)]
FEW_CALLS = each_in_turn(BACKENDS, [case for _, case in CALLS[:12]])


@backend_and("case", CALLS)
def test_equals_bptt_by_hand(backend, case):
    call = random_call(case.shape)
    expected = by_hand(*call, decay=0.9, **case.constants)
    assert expected.h.size < 100 or 0.05 < expected.spikes.mean() < 0.95
    outputs, gradients = run(backend, *call, decay=0.9, **case.constants)
    spikes, v, potentials = outputs
    np.testing.assert_array_equal(spikes, expected.spikes)
    np.testing.assert_allclose(potentials, expected.potentials, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(v, potentials[-1])
    wanted = expected.grad_x, expected.grad_gain, expected.grad_v_init
    for found, exact in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(found, exact, rtol=1e-9, atol=1e-11)


@backend_and("case", FEW_CALLS)
@pytest.mark.parametrize("decay", [0.9, 0.99])
def test_float32_equals_bptt_by_hand_away_from_the_threshold(backend, case, decay):
    """A gradient looks at the whole sequence of its neuron, so only neurons certain to the last
    step count.
    """
    call = random_call((8, 4099), torch.float32)
    expected = by_hand(*call, decay=decay, **case.constants)
    sure = away_from_threshold(expected.h, 0.8, 1e-6)[-1]
    assert sure.mean() > 0.999
    outputs, gradients = run(backend, *call, decay=decay, **case.constants)
    spikes, _, potentials = outputs
    grad_x, grad_gain, grad_v_init = gradients
    np.testing.assert_array_equal(spikes[:, sure], expected.spikes[:, sure])
    np.testing.assert_allclose(potentials[:, sure], expected.potentials[:, sure], atol=1e-5)
    tolerance = {"rtol": 1e-4, "atol": 2e-5}
    np.testing.assert_allclose(grad_x[:, sure], expected.grad_x[:, sure], **tolerance)
    np.testing.assert_allclose(grad_v_init[sure], expected.grad_v_init[sure], **tolerance)
    scale = np.abs(expected.grad_x).sum(1).max()
    np.testing.assert_allclose(grad_gain, expected.grad_gain, rtol=1e-4, atol=1e-5 * scale)


OF_GPUS = [(FAST[0], cases.LAST)]
for backend, *values in every_pair({"backend": FAST, **cases.CHOICES}):
    OF_GPUS.append((backend, cases.Case(*values)))


@backend_and("case", OF_GPUS)
def test_equals_the_reference_on_the_table_of_the_kernels_for_gpus(backend, case):
    cases.check(case, backend=backend)


def test_gain_may_lie_anywhere_in_memory(backend):
    inputs, grads = random_call((4, 3, 50))
    _, gain, _ = inputs
    column = torch.stack((torch.zeros(4), gain, torch.ones(4)), 1)[:, 1]
    for given in (column, gain[:1].expand(4)):
        found, wanted = (
            run(backend, (inputs[0], g, None), grads, decay=0.9)
            for g in (given, given.contiguous())
        )
        assert_equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slopes_by_formula(backend, dtype):
    check_slopes(backend, dtype)


def test_formulas_are_those_of_spikingjelly():
    for (kind, name), alpha in itertools.product(HOST_NAMES.items(), slopes.ALPHAS):
        if name != "SuperSpike" or hasattr(host, name):  # which 0.0.0.0.14 does not have
            z = torch.tensor(slopes.points(alpha, np.float64), requires_grad=True)
            (found,) = torch.autograd.grad(getattr(host, name)(alpha=alpha)(z).sum(), z)
            slopes.check(kind, alpha, z.detach().numpy(), found.numpy())


SHAPES = [
    (1, 1),
    (7, 33),
    (4, 63),
    (4, 127),
    (4, 257),
    (2, 20000),
    (3, 70001),
    (1500, 70),
    (40, 2, 3),
    (2, 1, 1),
    (4, 2, 3, 5, 7),
    (3, 0),
    (5, 0, 4),
]
SHAPES_AND_DTYPES = each_in_turn(SHAPES, DTYPES)
FEW_STEPS = [case for case in SHAPES_AND_DTYPES if case[0][0] < 1000]


@pytest.mark.parametrize(
    ("shape", "dtype"), mostly_slow(SHAPES_AND_DTYPES, quick=FEW_STEPS), ids=str
)
def test_outputs_equal_the_reference_bit_for_bit(monkeypatch, dtype, shape):
    state = torch.float64 if dtype == torch.float64 else torch.float32
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 1e-1}.get(dtype, 1e-4)
    (x, gain, v_init), grads = random_call(shape, dtype)
    for v_reset, first in ((0.0, v_init), (None, None), (-0.25, None)):
        call = (x, gain, first), grads
        wanted = run("reference", *call, decay=0.9, v_reset=v_reset)
        for name in FAST:
            backend = choose(monkeypatch, name)
            outputs, gradients = run(backend, *call, decay=0.9, v_reset=v_reset)
            assert [a.dtype for a in outputs] == [dtype, state, state]
            assert outputs[0].shape == shape
            assert_equal(outputs, wanted[0])
            assert_close(gradients, wanted[1], rtol=tolerance, atol=tolerance)


def test_half_inputs_are_widened_and_then_treated_as_float32(backend):
    for dtype in (torch.float16, torch.bfloat16):
        (x, gain, v_init), grads = random_call((6, 3, 11), dtype)
        half, whole = (run(backend, (a, gain, v_init), grads, decay=0.99) for a in (x, x.float()))
        found = [a.float() for a in half[0]]
        assert_equal(found, whole[0])
        found = half[1][0].float()
        assert_close(found, whole[1][0], rtol=1e-2, atol=1e-2)
        assert_close(half[1][1], whole[1][1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@backend_and("v_reset", each_in_turn(BACKENDS, [0.0, None]))
def test_spikes_exactly_at_the_threshold(backend, dtype, v_reset):
    x = quarters(dtype)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = x, torch.ones(3, dtype=state), torch.zeros(64, dtype=state)
    grads = torch.ones_like(x), torch.zeros(64, dtype=state), torch.zeros(3, 64, dtype=state)
    constants = {"decay": 0.5, "v_threshold": 1.0, "v_reset": v_reset, "detach_reset": False}
    expected = by_hand(inputs, grads, **constants)
    assert (expected.h == 1.0).sum() > 10
    (spikes, v, _), (grad_x, *_) = run(backend, (*inputs[:2], None), grads, **constants)
    np.testing.assert_array_equal(spikes.double(), expected.spikes)
    np.testing.assert_array_equal(v, expected.potentials[-1])
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 1e-2}.get(dtype, 1e-7)
    np.testing.assert_allclose(grad_x.double(), expected.grad_x, atol=tolerance)


def test_every_optional_input_and_gradient_may_be_missing(backend):
    constants = {"decay": 0.9, "v_threshold": 0.8, "v_reset": -0.25, "detach_reset": False}
    (x, gain, v_init), every_grad = random_call((4, 200))
    at_reset = torch.full_like(v_init, -0.25)
    for starts, *used in itertools.product([False, True], repeat=4):
        if not any(used):
            continue
        grads = list(every_grad)
        given = list(every_grad)
        for number in range(3):
            if not used[number]:
                grads[number] = torch.zeros_like(every_grad[number])
                given[number] = None
        expected = by_hand((x, gain, v_init if starts else at_reset), grads, **constants)
        inputs = (x, gain, v_init if starts else None)
        _, (grad_x, grad_gain, grad_v_init) = run(backend, inputs, given, **constants)
        np.testing.assert_allclose(grad_x, expected.grad_x, atol=1e-11)
        np.testing.assert_allclose(grad_gain, expected.grad_gain, atol=1e-10)
        if starts:
            np.testing.assert_allclose(grad_v_init, expected.grad_v_init, atol=1e-11)


def test_not_a_number_and_infinity(backend):
    """The reference multiplies an infinite potential by the 0 of a reset; the others select."""
    for inputs, grads, options in not_finite():
        outputs, gradients = run(backend, inputs, grads, **options)
        assert outputs[0][1, 5] == 1
        assert outputs[0][:, 3].sum() == 0
        assert outputs[1][[3, 69]].isnan().all()
        if backend == "cpp":
            wanted, wanted_gradients = run("eager", inputs, grads, **options)
            assert_close(outputs, wanted, equal_nan=True)
            assert_close(gradients, wanted_gradients, equal_nan=True)


def test_memory_formats_are_not_mixed_up(backend):
    torch.manual_seed(0)
    plain = torch.randn(4, 2, 3, 5, 6)
    repeated = plain[:1].expand(4, -1, -1, -1, -1)
    sliced = torch.randn(4, 2, 3, 5, 12)[..., ::2]
    _, grads = random_call(plain.shape, torch.float32)
    v_init = torch.randn(2, 3, 5, 6)
    for x in (laid_out(plain, True), repeated, sliced):
        leaves = [
            a.requires_grad_()
            for a in (x.clone(memory_format=torch.preserve_format), x.contiguous().clone())
        ]
        results = [
            dlif_multi_step(leaf, torch.ones(4), v_init, decay=0.9, store_v_seq=True, backend=name)
            for leaf, name in zip(leaves, (backend, "reference"), strict=True)
        ]
        assert_equal(*results)
        for outputs in results:
            torch.autograd.backward(outputs, grads)
        assert_close(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize("v_reset", [0.0, None, -0.5])
@pytest.mark.parametrize("detach_reset", [False, True])
def test_eager_in_several_blocks(monkeypatch, v_reset, detach_reset):
    monkeypatch.setattr(eager, "_CPU_BLOCK_LIMIT", 1)
    kept = {"spikes": [0], "potential": [1], "potentials": [2], "all": [0, 1, 2]}
    for T, from_rest, needs in itertools.product((1, 3), (True, False), kept):
        (x, gain, v_init), grads = random_call((T, 2 * 4096 + 17), torch.float32)
        inputs = (x, gain, None if from_rest else v_init)
        assert len(eager._blocks(x)) == 3
        given = [None, None, None]
        for number in kept[needs]:
            given[number] = grads[number]
        options = {"decay": 0.9, "v_reset": v_reset, "detach_reset": detach_reset}
        outputs, gradients = run("eager", inputs, given, **options)
        expected, expected_gradients = run("reference", inputs, given, **options)
        assert_equal(outputs, expected)
        for a, b in zip(gradients, expected_gradients, strict=True):
            if b is not None:
                assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_eager_keeps_the_digits_of_long_sums():
    x = torch.full((1, 1 << 23), 0.1)
    gain = torch.ones(1, requires_grad=True)
    spikes, _, _ = dlif_multi_step(x, gain, decay=0.9, backend="eager")
    spikes.sum().backward()
    exact = (1 - (1 - x.double())).mul(x.double()).sum()  # triangle at z = 0.1 - 1, times x
    assert abs(float(gain.grad) / float(exact) - 1) < 1e-5


@not_the_reference
def test_inputs_are_saved_and_nothing_else(backend):
    saved = []
    x = torch.randn(4, 10, requires_grad=True)
    gain = torch.ones(4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dlif_multi_step(x, gain, decay=0.9, backend=backend)
    expected = {x.data_ptr(), gain.data_ptr()}
    assert {t.data_ptr() for t in saved} == expected


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
                *inputs,
                decay=0.8,
                v_reset=v_reset,
                surrogate=smooth,
                store_v_seq=True,
                backend=backend,
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
    assert_close(results[0][1], results[1][1])


def test_second_derivative_is_refused_not_wrong(backend):
    x = torch.randn(3, 4, requires_grad=True)
    spikes, _, _ = dlif_multi_step(x, torch.ones(3), decay=0.9, backend=backend)
    if backend == "reference":
        (grad,) = torch.autograd.grad(spikes.sum(), x, create_graph=True)
        assert grad.requires_grad
        return
    with pytest.raises(RuntimeError, match="differentiable once.*backend='reference'"):
        torch.autograd.grad(spikes.sum(), x, create_graph=True)
    with torch.no_grad():
        x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        spikes.sum().backward()


class TestContract:
    def test_unknown_backend(self):
        with pytest.raises(ValueError, match="backend must be one of"):
            check_backend("numpy")

    def test_named_backend_that_cannot_run_says_what_to_do(self):
        trainable = Surrogate("custom", function=nn.PReLU())
        x = torch.zeros(2, 3)
        with pytest.raises(
            ValueError, match="backend='eager' cannot run this call.*backend='auto'"
        ):
            choose_backend("eager", x, trainable)
        assert choose_backend("auto", x, trainable) == "reference"

    def test_a_compiler_gets_the_kernel_and_a_surrogate_of_ones_own_plain_torch(self, monkeypatch):
        x = torch.zeros(3, 2)
        fastest = choose_backend("auto", x, Surrogate())
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert choose_backend("auto", x, Surrogate()) == fastest
        assert choose_backend("auto", x, Surrogate("custom", function=torch.sigmoid)) == "reference"

    def test_missing_backend_says_what_is_missing(self):
        missing = [name for name, state in available_backends().items() if state != "available"]
        for name in missing:
            with pytest.raises(
                RuntimeError, match=f"backend='{name}' is not available: .*use backend='auto'"
            ):
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
            torch.randn(3, 4),
            torch.ones(3),
            decay=0.9,
            surrogate=Surrogate("custom", function=surrogate),
        )
        spikes.sum().backward()
        assert surrogate.scale.grad.abs() > 0

    @pytest.mark.parametrize(
        ("x", "gain", "v_init", "error", "match"),
        [
            (
                torch.zeros(3, 2, dtype=torch.int64),
                torch.ones(3),
                None,
                TypeError,
                "floating point, got torch.int64",
            ),
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
