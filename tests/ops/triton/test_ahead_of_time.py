"""The Triton kernels compile for real GPUs: into registers, with whole vectors, rounded after every
operation.
"""

import re
from types import SimpleNamespace

import pytest
import torch
from ops.triton import ahead

from sj_robust.ops import Surrogate
from sj_robust.ops.dlif import operator, triton_launch
from sj_robust.ops.dlif.config import DLIFConfig, Inputs, OutputGradients

pytestmark = [
    pytest.mark.slow,
    pytest.mark.kernels,
    pytest.mark.skipif(ahead.missing() is not None, reason=str(ahead.missing())),
]
FORWARD = "dlif_forward"
BACKWARD = "dlif_backward"
F32 = torch.float32
F16 = torch.float16
BF16 = torch.bfloat16


def config(v_reset=0.0, kind="triangle", detach=False):
    return DLIFConfig(0.9, 1.0, v_reset, Surrogate(kind), detach)


# architecture, kernel, dtype, steps, constants, tensors that are left out, registers
IN_REGISTERS = [
    (80, FORWARD, F16, 8, config(None), (), 64),
    (100, FORWARD, F16, 100, config(-0.25), ("v_init",), 64),
    (80, BACKWARD, BF16, 16, config(-0.25, "sigmoid"), ahead.ABSENT[BACKWARD], 168),
    (90, BACKWARD, F32, 4, config(-0.25, "soft_sign", True), ("checkpoints",), 168),
    (100, BACKWARD, F32, 21, config(None, "erf"), (), 168),
    (80, BACKWARD, BF16, 100, config(0.0, "triangle", True), ("grad_v_init",), 168),
]


@pytest.mark.parametrize(
    ("architecture", "kernel", "dtype", "steps", "constants", "absent", "registers"),
    IN_REGISTERS,
)
def test_stays_in_registers(architecture, kernel, dtype, steps, constants, absent, registers):
    """At most 168 of 65536, so that an SM holds 12 warps."""
    options = {"architecture": architecture, "absent": absent, "config": constants}
    code = ahead.triton_code(kernel, dtype, steps, **options)
    assert code.stack == 0, "registers are spilled"
    assert code.registers <= registers


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_memory_is_moved_in_whole_vectors(dtype):
    """Per step of x one load on the way forward and one on the way back, of the gradients one load
    and one store.
    """
    for steps in (1, 4, 8):
        forward = ahead.triton_code(FORWARD, dtype, steps, absent=ahead.ABSENT[FORWARD])
        potentials = (
            1 if dtype == F32 else 2
        )  # stores of the last potential: twice as wide as 16-bit spikes
        assert forward.loads == {128: steps, 32: steps}, "x, and the gain"
        assert forward.stores == {128: steps + potentials}
        backward = ahead.triton_code(BACKWARD, dtype, steps, absent=ahead.ABSENT[BACKWARD])
        assert backward.loads[128] == 3 * steps - (steps == 1), "the one step of x is still there"
        assert backward.stores == {128: steps, 32: steps}, "gradient of x, and a sum for the gain"
        assert backward.barriers == 0


def test_nothing_is_contracted_and_halves_are_rounded_to_nearest():
    for dtype, rounding in (
        (F32, None),
        (F16, r"cvt\.rn\.f16x?2?\.f32"),
        (BF16, r"cvt\.rn\.bf16x?2?\.f32"),
    ):
        for kernel in (FORWARD, BACKWARD):
            ptx = ahead.triton_code(kernel, dtype, 4, absent=ahead.ABSENT[kernel]).ptx
            assert "fma.rn.f32" not in ptx
            assert ".f64" not in ptx
            if rounding and kernel == BACKWARD:  # a spike is one of two constants
                assert re.search(rounding, ptx)


def test_a_barrier_stands_between_noting_potentials_and_reading_them():
    ptx = ahead.triton_code(BACKWARD, F32, 21, absent=ahead.ABSENT[BACKWARD][:-1]).ptx
    before, barrier, after = ptx.partition("bar.sync")
    assert before.count("st.global") == 2  # the potential before each of two later segments
    assert barrier
    assert "bar.sync" not in after


def test_addresses_of_the_way_forward_are_not_kept_for_the_way_back():
    """Else there are more than 130 registers."""
    assert ahead.triton_code(BACKWARD, F32, 16, absent=ahead.ABSENT[BACKWARD]).registers <= 112


@pytest.mark.parametrize("kernel", [FORWARD, BACKWARD])
def test_offsets_are_computed_in_64_bits(kernel):
    """All steps of a layer may hold more than 2**31 elements, which no test here has the memory
    for.
    """
    code = ahead.triton_code(kernel, F32, 8, absent=ahead.ABSENT[kernel])
    assert set(re.findall(r"arith\.muli .* : (\w+) ", code.ir)) == {"i64"}


class Warmed:
    """A kernel that is compiled for its arguments where it would be launched."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.compiled = []

    def __getitem__(self, grid):
        return lambda *args, **options: self.compiled.append(
            self.kernel.warmup(*args, grid=grid, **options)
        )


@pytest.fixture
def h100():
    """A GPU for which Triton compiles; none is touched."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    gpu = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    before = dict(vars(driver))  # which has no way back where there is no GPU
    driver.set_active(gpu)
    yield
    vars(driver).clear()
    vars(driver).update(before)


def test_what_the_launcher_passes_compiles_as_triton_itself_sees_it(monkeypatch, h100):
    """One neuron, which Triton takes for a constant; rows that are not aligned; a layer as it
    should be.
    """
    real = triton_launch._kernels()
    warmed = SimpleNamespace(
        dlif_forward=Warmed(real.dlif_forward), dlif_backward=Warmed(real.dlif_backward)
    )
    monkeypatch.setattr(triton_launch, "_kernels", lambda: warmed)
    for steps, neurons, v_reset in ((3, 1, 0.0), (3, 50, None), (2, 1 << 12, -0.25)):
        x = torch.zeros(steps, neurons)
        v = torch.zeros(neurons) if v_reset is None else None
        inputs = Inputs(x, torch.ones(steps), v, config(v_reset, "atan"))
        operator.forward(triton_launch, inputs, v_reset is None)
        operator.backward(triton_launch, inputs, OutputGradients(x, v), v_reset is None)
    for kernel in vars(warmed).values():
        found = ["ld.global.v4" in compiled.asm["ptx"] for compiled in kernel.compiled]
        assert found == [
            False,
            False,
            True,
        ]
