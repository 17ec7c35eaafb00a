"""The Triton kernels compile for real GPUs: rounded after every operation, with 64-bit offsets."""

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
F32 = torch.float32
F16 = torch.float16
BF16 = torch.bfloat16
ROUNDED = {F16: r"cvt\.rn\.f16x?2?\.f32", BF16: r"cvt\.rn\.bf16x?2?\.f32"}
# architecture, kernel, dtype, steps, reset, surrogate, tensors that are left out
KERNELS = [
    (80, "dlif_forward", F16, 8, None, "triangle", ()),
    (100, "dlif_forward", F32, 100, -0.25, "triangle", ("v_init",)),
    (80, "dlif_backward", BF16, 16, -0.25, "sigmoid", ahead.ABSENT["dlif_backward"]),
    (90, "dlif_backward", F32, 4, 0.0, "soft_sign", ("checkpoints",)),
    (100, "dlif_backward", F16, 21, None, "erf", ()),
]


@pytest.mark.parametrize(
    ("architecture", "kernel", "dtype", "steps", "v_reset", "kind", "absent"), KERNELS
)
def test_what_is_compiled(architecture, kernel, dtype, steps, v_reset, kind, absent):
    """Nothing is contracted, halves are rounded to nearest, and offsets have 64 bits, since all
    steps of a layer may hold more than 2**31 elements, which no test here has the memory for.
    """
    config = DLIFConfig(0.9, 1.0, v_reset, Surrogate(kind), False)
    asm = ahead.compiled(kernel, dtype, steps, config, architecture=architecture, absent=absent)
    assert "fma.rn.f32" not in asm["ptx"]
    if kernel == "dlif_backward" and dtype in ROUNDED:  # a spike is one of two constants
        assert re.search(ROUNDED[dtype], asm["ptx"])
    if steps <= triton_launch.LONGEST_SEQUENCE_IN_REGISTERS:  # else segments are counted too
        assert set(re.findall(r"arith\.muli .* : (\w+) ", asm["ttir"])) == {"i64"}


def test_a_barrier_stands_between_noting_potentials_and_reading_them():
    absent = ahead.ABSENT["dlif_backward"][:-1]
    ptx = ahead.compiled("dlif_backward", F32, 21, ahead.CONFIG, absent=absent)["ptx"]
    before, barrier, after = ptx.partition("bar.sync")
    assert before.count("st.global") == 2  # the potential before each of two later segments
    assert barrier
    assert "bar.sync" not in after


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
        inputs = Inputs(
            x, torch.ones(steps), v, DLIFConfig(0.9, 1.0, v_reset, Surrogate("atan"), False)
        )
        operator.forward(triton_launch, inputs, v_reset is None)
        operator.backward(triton_launch, inputs, OutputGradients(x, v), v_reset is None)
    for kernel in vars(warmed).values():
        found = ["ld.global.v4" in compiled.asm["ptx"] for compiled in kernel.compiled]
        assert found == [
            False,
            False,
            True,
        ]
