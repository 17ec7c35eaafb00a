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
    Inputs,
    Outputs,
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
from sj_robust.ops.dlif.operator import check_backend, choose_backend
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
        options = {"v_threshold": 0.8, **vars(self)}
        del options["shape"]
        return options


CALLS = [(backend, OneCall(*values)) for backend, *values in every_pair(CHOICES)]
FEW_CALLS = each_in_turn(BACKENDS, [case for _, case in CALLS[:12]])


@backend_and("case", CALLS)
def test_equals_bptt_by_hand(backend, case):
    call = random_call(case.shape)
    expected = by_hand(*call, decay=0.9, **case.constants)
    assert expected.h.size < 100 or 0.05 < expected.spikes.mean() < 0.95
    found = run(backend, *call, decay=0.9, **case.constants)
    outputs = found.outputs
    np.testing.assert_array_equal(outputs.spikes, expected.spikes)
    np.testing.assert_allclose(outputs.potentials, expected.potentials, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(outputs.v, outputs.potentials[-1])
    tolerance = {"rtol": 1e-9, "atol": 1e-11}
    np.testing.assert_allclose(found.gradients.x, expected.grad_x, **tolerance)
    np.testing.assert_allclose(found.gradients.gain, expected.grad_gain, **tolerance)
    np.testing.assert_allclose(found.gradients.v_init, expected.grad_v_init, **tolerance)


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
    np.testing.assert_array_equal(outputs.spikes[:, sure], expected.spikes[:, sure])
    potentials = outputs.potentials[:, sure]
    np.testing.assert_allclose(potentials, expected.potentials[:, sure], atol=1e-5)
    tolerance = {"rtol": 1e-4, "atol": 2e-5}
    np.testing.assert_allclose(gradients.x[:, sure], expected.grad_x[:, sure], **tolerance)
    grad_v_init = gradients.v_init[sure]
    np.testing.assert_allclose(grad_v_init, expected.grad_v_init[sure], **tolerance)
    scale = np.abs(expected.grad_x).sum(1).max()
    np.testing.assert_allclose(gradients.gain, expected.grad_gain, rtol=1e-4, atol=1e-5 * scale)


OF_GPUS = [(FAST[0], cases.LAST)]
for backend, *values in every_pair({"backend": FAST, **cases.CHOICES}):
    OF_GPUS.append((backend, cases.Case(*values)))


@backend_and("case", OF_GPUS)
def test_equals_the_reference_on_the_table_of_the_kernels_for_gpus(backend, case):
    cases.check(case, backend=backend)


def test_gain_may_lie_anywhere_in_memory(backend):
    inputs, grads = random_call((4, 3, 50))
    from_rest = inputs._replace(v_init=None)
    column = torch.stack((torch.zeros(4), inputs.gain, torch.ones(4)), 1)[:, 1]
    repeated = inputs.gain[:1].expand(4)
    for gain in (column, repeated):
        found = run(backend, from_rest._replace(gain=gain), grads, decay=0.9)
        wanted = run(backend, from_rest._replace(gain=gain.contiguous()), grads, decay=0.9)
        assert_equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slopes_by_formula(backend, dtype):
    check_slopes(backend, dtype)


def test_formulas_are_those_of_spikingjelly():
    for (kind, name), alpha in itertools.product(HOST_NAMES.items(), slopes.ALPHAS):
        if name == "SuperSpike" and not hasattr(host, name):  # in SpikingJelly 0.0.0.0.14
            continue
        surrogate = getattr(host, name)(alpha=alpha)
        z = torch.tensor(slopes.points(alpha, np.float64), requires_grad=True)
        (found,) = torch.autograd.grad(surrogate(z).sum(), z)
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
    state = state_of(dtype)
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 1e-1}.get(dtype, 1e-4)
    inputs, grads = random_call(shape, dtype)
    from_rest = inputs._replace(v_init=None)
    for given, v_reset in ((inputs, 0.0), (from_rest, None), (from_rest, -0.25)):
        wanted = run("reference", given, grads, decay=0.9, v_reset=v_reset)
        for name in FAST:
            backend = choose(monkeypatch, name)
            outputs, gradients = run(backend, given, grads, decay=0.9, v_reset=v_reset)
            assert [a.dtype for a in outputs] == [dtype, state, state]
            assert outputs.spikes.shape == shape
            assert_equal(outputs, wanted.outputs)
            assert_close(gradients, wanted.gradients, rtol=tolerance, atol=tolerance)


def state_of(dtype):
    """The dtype of potentials and gains."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_widened_and_then_treated_as_float32(backend, dtype):
    inputs, grads = random_call((6, 3, 11), dtype)
    wide = inputs._replace(x=inputs.x.float())
    half = run(backend, inputs, grads, decay=0.99)
    whole = run(backend, wide, grads, decay=0.99)
    assert_equal([a.float() for a in half.outputs], list(whole.outputs))
    assert_close(half.gradients.x.float(), whole.gradients.x, rtol=1e-2, atol=1e-2)
    assert_close(half.gradients.gain, whole.gradients.gain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@backend_and("v_reset", each_in_turn(BACKENDS, [0.0, None]))
def test_spikes_exactly_at_the_threshold(backend, dtype, v_reset):
    x = quarters(dtype)
    state = state_of(dtype)
    inputs = Inputs(x, torch.ones(3, dtype=state), torch.zeros(64, dtype=state))
    grads = Outputs(
        spikes=torch.ones_like(x),
        v=torch.zeros(64, dtype=state),
        potentials=torch.zeros(3, 64, dtype=state),
    )
    constants = {"decay": 0.5, "v_threshold": 1.0, "v_reset": v_reset, "detach_reset": False}
    expected = by_hand(inputs, grads, **constants)
    assert (expected.h == 1.0).sum() > 10
    found = run(backend, inputs._replace(v_init=None), grads, **constants)
    np.testing.assert_array_equal(found.outputs.spikes.double(), expected.spikes)
    np.testing.assert_array_equal(found.outputs.v, expected.potentials[-1])
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 1e-2}.get(dtype, 1e-7)
    np.testing.assert_allclose(found.gradients.x.double(), expected.grad_x, atol=tolerance)


@pytest.mark.parametrize("starts", [False, True])
def test_every_optional_input_and_gradient_may_be_missing(backend, starts):
    constants = {"decay": 0.9, "v_threshold": 0.8, "v_reset": -0.25, "detach_reset": False}
    inputs, every_grad = random_call((4, 200))
    whole = inputs
    if not starts:
        whole = inputs._replace(v_init=torch.full_like(inputs.v_init, -0.25))
        inputs = inputs._replace(v_init=None)
    for used in some_of(Outputs._fields):
        unused = [name for name in Outputs._fields if name not in used]
        given = every_grad._replace(**dict.fromkeys(unused))
        zeros = {name: torch.zeros_like(getattr(every_grad, name)) for name in unused}
        expected = by_hand(whole, every_grad._replace(**zeros), **constants)
        found = run(backend, inputs, given, **constants).gradients
        np.testing.assert_allclose(found.x, expected.grad_x, atol=1e-11)
        np.testing.assert_allclose(found.gain, expected.grad_gain, atol=1e-10)
        if starts:
            np.testing.assert_allclose(found.v_init, expected.grad_v_init, atol=1e-11)


def some_of(names):
    """Every choice of one or more."""
    for number in range(1, len(names) + 1):
        yield from itertools.combinations(names, number)


def test_not_a_number_and_infinity(backend):
    """The reference multiplies an infinite potential by the 0 of a reset; the others select."""
    for inputs, grads, options in not_finite():
        found = run(backend, inputs, grads, **options)
        assert found.outputs.spikes[1, 5] == 1
        assert found.outputs.spikes[:, 3].sum() == 0
        assert found.outputs.v[[3, 69]].isnan().all()
        if backend == "cpp":
            wanted = run("eager", inputs, grads, **options)
            assert_close(found, wanted, equal_nan=True)


def test_memory_formats_are_not_mixed_up(backend):
    torch.manual_seed(0)
    plain = torch.randn(4, 2, 3, 5, 6)
    repeated = plain[:1].expand(4, -1, -1, -1, -1)
    sliced = torch.randn(4, 2, 3, 5, 12)[..., ::2]
    _, grads = random_call(plain.shape, torch.float32)
    v_init = torch.randn(2, 3, 5, 6)
    for x in (laid_out(plain, True), repeated, sliced):
        own_layout = x.clone(memory_format=torch.preserve_format).requires_grad_()
        contiguous = x.contiguous().clone().requires_grad_()
        found = potentials_too(own_layout, v_init, backend)
        wanted = potentials_too(contiguous, v_init, "reference")
        assert_equal(found, wanted)
        torch.autograd.backward(found, grads)
        torch.autograd.backward(wanted, grads)
        assert_close(own_layout.grad, contiguous.grad)


def potentials_too(x, v_init, backend):
    """All that the operator can give."""
    gain = torch.ones(len(x))
    return dlif_multi_step(x, gain, v_init, decay=0.9, store_v_seq=True, backend=backend)


@pytest.mark.parametrize("v_reset", [0.0, None, -0.5])
@pytest.mark.parametrize("detach_reset", [False, True])
def test_eager_in_several_blocks(monkeypatch, v_reset, detach_reset):
    monkeypatch.setattr(eager, "_CPU_BLOCK_LIMIT", 1)
    options = {"decay": 0.9, "v_reset": v_reset, "detach_reset": detach_reset}
    kept = [*[[name] for name in Outputs._fields], Outputs._fields]
    for T, from_rest, used in itertools.product((1, 3), (True, False), kept):
        inputs, grads = random_call((T, 2 * 4096 + 17), torch.float32)
        assert len(eager._blocks(inputs.x)) == 3
        if from_rest:
            inputs = inputs._replace(v_init=None)
        unused = set(Outputs._fields).difference(used)
        given = grads._replace(**dict.fromkeys(unused))
        found = run("eager", inputs, given, **options)
        expected = run("reference", inputs, given, **options)
        assert_equal(found.outputs, expected.outputs)
        for a, b in zip(found.gradients, expected.gradients, strict=True):
            if b is not None:
                assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_eager_keeps_the_digits_of_long_sums():
    x = torch.full((1, 1 << 23), 0.1)
    gain = torch.ones(1, requires_grad=True)
    spikes, _, _ = dlif_multi_step(x, gain, decay=0.9, backend="eager")
    spikes.sum().backward()
    z = x.double() - 1
    triangle = 1 - z.abs()
    exact = (triangle * x.double()).sum()
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


class Elementwise(nn.Module):
    """A surrogate without parameters."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, z):
        return self.function(z)


class Registered(nn.Module):
    """A surrogate whose buffer requires a gradient."""

    def __init__(self):
        super().__init__()
        self.register_buffer("width", torch.ones(1, requires_grad=True))

    def forward(self, z):
        return torch.sigmoid(self.width * z)


@pytest.mark.parametrize("v_reset", [0.0, None, -0.5])
def test_gradcheck_with_a_smooth_spike(v_reset):
    torch.manual_seed(0)
    smooth = Surrogate("custom", function=Elementwise(lambda z: torch.sigmoid(2 * z)))
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
    options = {"decay": 0.9, "v_threshold": 0.5, "backend": "eager"}

    def spikes_and_gradient(surrogate):
        spikes, _, _ = dlif_multi_step(x, torch.ones(5), surrogate=surrogate, **options)
        (gradient,) = torch.autograd.grad((spikes * x.detach()).sum(), x)
        return spikes, gradient

    spikes, gradient = spikes_and_gradient(Surrogate("triangle"))
    own_spikes, own_gradient = spikes_and_gradient(
        Surrogate("custom", function=Elementwise(Spike.apply))
    )
    assert torch.equal(spikes, own_spikes)
    assert_close(gradient, own_gradient)


@pytest.mark.parametrize("kind", HOST_NAMES)
def test_second_derivative_of_every_surrogate(kind):
    x = torch.randn(1, 8, dtype=torch.float64, requires_grad=True)
    gain = torch.ones(1, dtype=torch.float64)

    def gradient(x):
        surrogate = Surrogate(kind, alpha=2.0)
        options = {"decay": 0.9, "surrogate": surrogate, "backend": "reference"}
        spikes, _, _ = dlif_multi_step(x, gain, **options)
        (found,) = torch.autograd.grad(spikes.sum(), x, create_graph=True)
        return found

    assert gradient(x).grad_fn is not None
    assert torch.autograd.gradcheck(gradient, (x,))


def test_second_derivative_at_rest_is_that_of_spikingjelly():
    """Without input, a potential lies exactly where the triangle reaches zero."""
    slopes = []
    for function in (Surrogate("triangle", alpha=1.0).spike, host.PiecewiseQuadratic(1.0)):
        z = torch.full((3,), -1.0, requires_grad=True)
        (found,) = torch.autograd.grad(function(z).sum(), z, create_graph=True)
        slopes.append(torch.autograd.grad(found.sum(), z)[0])
    assert slopes[0].tolist() == [1.0, 1.0, 1.0]
    assert torch.equal(*slopes)


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

    def test_what_a_function_uses_gets_its_gradient(self):
        scale = torch.tensor(2.0, requires_grad=True)
        x = torch.randn(3, 4)
        gradients = []
        for backend in ("auto", "reference"):
            surrogate = Surrogate("custom", function=lambda z: torch.sigmoid(scale * z))
            options = {"decay": 0.9, "surrogate": surrogate, "backend": backend}
            spikes, _, _ = dlif_multi_step(x, torch.ones(3), **options)
            gradients += torch.autograd.grad(spikes.sum(), scale)
        assert gradients[0].abs() > 0
        assert torch.equal(*gradients)

    @pytest.mark.parametrize(
        ("function", "needed"),
        [
            (torch.sigmoid, False),
            (torch.autograd.Function.apply, False),
            (Elementwise(torch.sigmoid).forward, False),
            (lambda z: z.sigmoid(), True),
            (nn.PReLU(), True),
            (nn.PReLU().forward, True),
            (Registered(), True),
        ],
    )
    def test_which_functions_may_have_gradients_of_their_own(self, function, needed):
        surrogate = Surrogate("custom", function=function)
        assert surrogate.needs_graph == needed
        with torch.no_grad():
            assert not surrogate.needs_graph

    @pytest.mark.parametrize(
        ("x", "steps", "message"),
        [
            (torch.zeros(0, 2), 0, "T >= 1"),
            (torch.tensor(1.0), 1, "T >= 1"),
            (torch.zeros(3, 2), 2, "one value per step"),
        ],
    )
    def test_wrong_shapes(self, x, steps, message):
        with pytest.raises(ValueError, match=message):
            dlif_multi_step(x, torch.ones(steps), decay=0.9)

    def test_a_potential_of_another_shape(self):
        with pytest.raises(ValueError, match="shape of one step"):
            dlif_multi_step(torch.zeros(3, 2), torch.ones(3), torch.zeros(3), decay=0.9)

    @pytest.mark.parametrize("backend", ["auto", "reference", "eager", "cpp"])
    @pytest.mark.parametrize("name", ["input_gain", "v_init"])
    def test_tensors_on_another_device(self, name, backend):
        states = {"input_gain": torch.ones(3), "v_init": torch.zeros(2)}
        states[name] = states[name].to("meta")
        message = f"{name} must be on the device of x_seq, cpu, got meta"
        with pytest.raises(ValueError, match=message):
            dlif_multi_step(torch.zeros(3, 2), **states, decay=0.9, backend=backend)

    def test_integers(self):
        x = torch.zeros(3, 2, dtype=torch.int64)
        with pytest.raises(TypeError, match="floating point, got torch.int64"):
            dlif_multi_step(x, torch.ones(3), decay=0.9)

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
