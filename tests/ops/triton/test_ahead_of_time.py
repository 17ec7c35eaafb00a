"""The Triton kernels compile for real GPUs: into registers, with whole vectors, rounded after every operation."""

import re
from types import SimpleNamespace

import pytest
import torch
from ops.triton import ahead

from sj_robust.ops import Surrogate
from sj_robust.ops.dlif import triton_launch
from sj_robust.ops.dlif.config import DLIFConfig, Inputs, OutputGradients

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ahead.missing() is not None, reason=str(ahead.missing())),
]
FORWARD, BACKWARD = "dlif_forward", "dlif_backward"
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def config(v_reset=0.0, kind="triangle", detach=False):
    return DLIFConfig(0.9, 1.0, v_reset, Surrogate(kind), detach)


VARIANTS = [  # architecture, kernel, dtype, steps, constants, whether every optional tensor is there
    (80, FORWARD, F16, 8, config(None), True),
    (80, BACKWARD, F32, 8, config(None, "atan"), True),
    (80, BACKWARD, BF16, 16, config(-0.25, "sigmoid"), False),
    (90, FORWARD, F32, 21, config(-0.25), True),
    (90, BACKWARD, F32, 4, config(-0.25, "sigmoid", True), True),
    (90, BACKWARD, F16, 8, config(None, "triangle", True), True),
    (90, BACKWARD, F32, 16, config(0.0, "atan"), False),
    (90, BACKWARD, BF16, 21, config(-0.25, "atan"), True),
    (100, FORWARD, BF16, 16, config(0.0), False),
    (100, BACKWARD, F32, 21, config(None, "sigmoid"), True),
    (100, BACKWARD, F16, 4, config(0.0, "atan"), True),
    (100, BACKWARD, BF16, 8, config(0.0, "triangle"), False),
    (90, BACKWARD, F32, 16, config(0.0, "exponential"), False),
    (80, BACKWARD, BF16, 21, config(None, "erf"), True),
    (100, BACKWARD, F16, 8, config(-0.25, "soft_sign"), True),
    (90, BACKWARD, BF16, 16, config(0.0, "super_spike", True), True),
]


@pytest.mark.parametrize(("architecture", "kernel", "dtype", "steps", "constants", "everything"), VARIANTS)
def test_stays_in_registers(architecture, kernel, dtype, steps, constants, everything):
    absent = () if everything else ahead.ABSENT[kernel]
    if steps <= 16:
        absent = tuple({*absent, "checkpoints"} if kernel == BACKWARD else absent)
    code = ahead.triton_code(kernel, dtype, steps, constants, architecture=architecture, absent=absent)
    assert code.stack <= 8, "registers are spilled"  # one pair, once, in 3300 instructions for sm_80
    assert code.registers <= (64 if kernel == FORWARD else 168)  # of 65536: so that an SM holds 12 warps


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_memory_is_moved_in_whole_vectors(dtype):
    """Per step of x one load on the way forward and one on the way back, of the gradients one load and one store."""
    for steps in (1, 4, 8):
        forward = ahead.triton_code(FORWARD, dtype, steps, absent=ahead.ABSENT[FORWARD])
        potentials = 1 if dtype == F32 else 2  # stores of the last potential: twice as wide as 16-bit spikes
        assert forward.loads == {128: steps, 32: steps}, "x, and the gain"
        assert forward.stores == {128: steps + potentials}
        backward = ahead.triton_code(BACKWARD, dtype, steps, absent=ahead.ABSENT[BACKWARD])
        assert backward.loads[128] == 3 * steps - (steps == 1), "the one step of x is still there"
        assert backward.stores == {128: steps, 32: steps}, "gradient of x, and a sum for the gain"
        assert backward.barriers == 0


def test_rows_that_are_not_aligned_fall_back_to_one_neuron_at_a_time():
    forward = ahead.triton_code(FORWARD, F32, 2, absent=ahead.ABSENT[FORWARD], aligned=False)
    assert set(forward.loads) == set(forward.stores) == {32}


def test_nothing_is_contracted_and_halves_are_rounded_to_nearest():
    for dtype, rounding in ((F32, None), (F16, r"cvt\.rn\.f16x?2?\.f32"), (BF16, r"cvt\.rn\.bf16x?2?\.f32")):
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
    """All steps of a layer may hold more than 2**31 elements, which no test here has the memory for."""
    code = ahead.triton_code(kernel, F32, 8, absent=ahead.ABSENT[kernel])
    assert set(re.findall(r"arith\.muli .* : (\w+) ", code.ir)) == {"i64"}


class Warmed:
    """A kernel that is compiled for its arguments where it would be launched."""

    def __init__(self, kernel):
        self.kernel, self.compiled = kernel, []

    def __getitem__(self, grid):
        return lambda *args, **options: self.compiled.append(self.kernel.warmup(*args, grid=grid, **options))


def test_what_the_launcher_passes_compiles_as_triton_itself_sees_it(monkeypatch):
    """One neuron, which Triton takes for a constant; rows that are not aligned; a layer as it should be."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    real = triton_launch._kernels()
    warmed = SimpleNamespace(dlif_forward=Warmed(real.dlif_forward), dlif_backward=Warmed(real.dlif_backward))
    monkeypatch.setattr(triton_launch, "_kernels", lambda: warmed)
    gpu = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    before = dict(vars(driver))  # which has no way back where there is no GPU
    driver.set_active(gpu)
    try:
        for steps, neurons, v_reset in ((3, 1, 0.0), (3, 50, None), (2, 1 << 12, -0.25)):
            x, v = torch.zeros(steps, neurons), torch.zeros(neurons) if v_reset is None else None
            inputs = Inputs(x, torch.ones(steps), v, config(v_reset, "atan"))
            triton_launch.forward(inputs, v_reset is None)
            triton_launch.backward(inputs, OutputGradients(x, v), v_reset is None)
    finally:
        vars(driver).clear()
        vars(driver).update(before)
    for kernel in vars(warmed).values():
        assert ["ld.global.v4" in compiled.asm["ptx"] for compiled in kernel.compiled] == [False, False, True]
