"""The kernels for GPUs, without one: on the table of calls through an interpreter or a stand-in for
CUDA, and compiled for real GPUs.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ops import compilers, gpu_texts, shim
from ops.calls import BF16, F16, F32, assert_equal
from ops.compilers import compile_text, needs_nvrtc, needs_triton
from ops.gpu_texts import FakeCuPy, install

from sj_robust.ops import Surrogate
from sj_robust.ops.dlif import cupy_launch, operator, triton_launch
from sj_robust.ops.dlif.config import DLIFConfig, Inputs, OutputGradients
from sj_robust.ops.dlif.cupy_launch import Variant

missing = shim.missing_tool()
needs_compiler = pytest.mark.skipif(missing is not None, reason=str(missing))
CPU = torch.device("cpu")


def kernels(test):
    """A test that asks compilers and emulators."""
    return pytest.mark.slow(pytest.mark.kernels(test))


def layer(T=2, M=8, dtype=F32, v_init=None, **options):
    constants = {"decay": 0.5, "v_threshold": 1.0, "v_reset": 0.0, "surrogate": Surrogate()}
    config = DLIFConfig(**{**constants, "detach_reset": False, **options})
    return Inputs(torch.rand(T, M).to(dtype), torch.ones(T), v_init, config)


def backward(launcher, inputs, needs_v_init=False):
    grads = OutputGradients(torch.ones_like(inputs.x_seq))
    return operator.backward(launcher, inputs, grads, needs_v_init)


# ---- results ----


@kernels
@needs_triton
def test_the_triton_text_equals_the_reference():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ops.gpu_texts"]
    tests = Path(__file__).parents[1]
    result = subprocess.run(command, cwd=tests, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]


@kernels
@needs_compiler
def test_the_cuda_text_equals_the_reference_under_sanitizers(tmp_path):
    library = shim.build(gpu_texts.text(), tmp_path, sanitize=True)
    result = shim.run_sanitized([sys.executable, "-m", "ops.gpu_texts", str(library)])
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-4000:]


# ---- launches through CuPy ----


@pytest.fixture
def cupy(tmp_path, monkeypatch):
    def build(code, name):
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        library = shim.Library(shim.build(code, folder))
        return lambda *call, order: library.launch(name, *call, order=order)

    yield install(FakeCuPy(build), monkeypatch)
    cupy_launch._compiled.cache_clear()


@pytest.mark.slow
@needs_compiler
def test_a_kernel_is_compiled_once_and_runs_on_torchs_stream(cupy):
    """More than one block, so that the partial sums of the gain's gradient are really added up."""
    inputs = layer(2, 1000)
    assert_equal(*(list(backward(cupy_launch, inputs)) for _ in range(2)))
    device = ("device", None)
    stream = ("stream", (0, 0x1234))
    compiled = ("compile", "dlif_backward")
    wanted = []
    for new in ([compiled], []):
        launch = ("launch", "dlif_backward", (2,), (128,))
        wanted += [("enter", *device), ("enter", *stream), *new, launch]
        wanted += [("exit", *stream), ("exit", *device)]
    assert cupy.log == wanted


@pytest.mark.parametrize("is_new", [True, False])
def test_device_and_stream_of_the_tensor_are_entered_and_left_on_errors(monkeypatch, is_new):
    fake = install(FakeCuPy(lambda *kernel: 1 / 0, has_from_external=is_new), monkeypatch)
    second = torch.device("cuda", 1)
    streams = {second: SimpleNamespace(cuda_stream=7)}
    monkeypatch.setattr(torch.cuda, "current_stream", streams.__getitem__)

    class Elsewhere(torch.Tensor):
        device = second

    inputs = layer()
    inputs = inputs._replace(x_seq=inputs.x_seq.as_subclass(Elsewhere))
    with pytest.raises(RuntimeError, match=r"(?s)ZeroDivisionError.*cupy-cuda\d+x\[ctk\]"):
        cupy_launch.forward(inputs, operator.room_for_outputs(torch.empty(2, 8), False))
    entered = [("device", 1), ("stream", (0, 7)) if is_new else ("external", 7)]
    wanted = [("enter", *what) for what in entered] + [("compile", "dlif_forward")]
    assert fake.log == wanted + [("exit", *what) for what in reversed(entered)]


@pytest.mark.parametrize("launcher", [triton_launch, cupy_launch])
def test_no_neurons_no_launch(launcher, monkeypatch):
    monkeypatch.setattr(launcher, "importlib", None)
    inputs = layer(3, 0)
    outputs = operator.forward(launcher, inputs, True)
    assert [output.shape for output in outputs] == [(3, 0), (0,), (3, 0)]
    grads = backward(launcher, inputs, needs_v_init=True)
    assert_equal(list(grads), [inputs.x_seq, torch.zeros(3), torch.zeros(0)])


def test_a_triton_variant_that_spills_gets_more_registers_from_its_next_launch_on(monkeypatch):
    monkeypatch.setattr(triton_launch, "_register_limits", {})
    given = []

    class Needy:
        def __getitem__(self, grid):
            return self.launch

        def launch(self, x, *, STEPS, num_warps, enable_fp_fusion, maxnreg):
            given.append((x.dtype, STEPS, maxnreg))
            needed = 260 if STEPS == 8 and x.dtype == F32 else 40
            registers = min(needed, maxnreg or 230)
            return SimpleNamespace(n_regs=registers, n_spills=needed - registers)

    calls = [(F32, 8), (F32, 4), (BF16, 8), (F32, 8), (F32, 8), (F32, 8), (F32, 4), (BF16, 8)]
    kernel = Needy()
    for dtype, steps in calls:
        x = torch.zeros(2, dtype=dtype)
        triton_launch.launch(kernel, 3, constants={"STEPS": steps}, warps=1, x=x)
    found = [limit for dtype, steps, limit in given if (dtype, steps) == (F32, 8)]
    assert found == [None, 246, 255, 255]
    assert {limit for dtype, steps, limit in given if (dtype, steps) != (F32, 8)} == {None}


# ---- the CUDA text as NVRTC compiles it ----


@kernels
@needs_nvrtc
@pytest.mark.parametrize(("architecture", "first"), [("sm_75", 0), ("sm_100", 1)])
def test_every_cuda_kernel_of_the_table_compiles_and_stays_in_registers(architecture, first):
    chosen = gpu_texts.lines()[first::2]
    text = "\n".join([cupy_launch.kernel_text(), *chosen])
    binary, log = compile_text(text, architecture, "--ptxas-options=-v")
    assert binary.startswith(b"\x7fELF")
    used = compilers.resources(log)
    assert len(used) == len(chosen) > 30
    for name, (registers, spilled) in used.items():
        assert registers <= 128, f"{name}: {registers} registers"  # half of an SM's threads
        assert spilled <= 64, f"{name} spills {spilled} bytes"


def cuda_kernel(io, steps, backward):
    return Variant(
        io=io,
        steps=steps,
        is_long=False,
        vec=min(4, cupy_launch._VALUES_PER_THREAD // steps) if backward else 4,
        reset="RESET_TO_ZERO",
        v_seq=False,
        surrogate="ATan" if backward else None,
    )


@kernels
@needs_nvrtc
@pytest.mark.parametrize(("io", "width"), [("float", 32), ("Half", 16), ("BFloat16", 16)])
@pytest.mark.parametrize("steps", [1, 8, 32])
@pytest.mark.parametrize("backward", [False, True])
def test_memory_is_moved_once_and_in_whole_vectors_and_charging_is_never_contracted(
    io, width, steps, backward
):
    """Per step a load of x and of the gain, on the way back of the gradient and again of the gain,
    and one store. Beside these the potentials, and the sums for the gain, whose loop is unrolled to
    two stores.
    """
    variant = cuda_kernel(io, steps, backward)
    ptx = compile_text(variant.source(), "compute_80", ptx=True)[0].decode()
    of_x = variant.vec * width
    of_v = variant.vec * 32
    passes = 1 + backward
    move = r"^\s*(?:@\S+ )?(ld|st)\.global(?:\.nc)?(?:\.v(\d))?\.[a-z](\d+)"
    found = {"ld": Counter(), "st": Counter()}
    for way, count, bits in re.findall(move, ptx, re.M):
        found[way][int(count or 1) * int(bits)] += 1
    loads = Counter({of_x: passes * steps}) + Counter({of_v: passes})
    loads += Counter({32: passes * steps})
    stores = Counter({of_x: steps}) + Counter({of_v: 1}) + Counter({32: 2 * backward})
    assert found == {"ld": loads, "st": stores}
    # spikes equal torch's bit by bit only if the product with the decay is rounded by itself
    rounded = re.findall(r"^\s*(?:mul|add)\.rn\.", ptx, re.M)
    assert len(rounded) == 3 * variant.vec * steps
    assert ("fma.rn" in ptx) == backward
    assert ".f64" not in ptx


@kernels
@needs_nvrtc
@pytest.mark.parametrize(("io", "instruction"), [("Half", "f16x2"), ("BFloat16", "bf16x2")])
def test_two_neighbours_are_rounded_at_once_the_first_to_the_lower_half(io, instruction):
    pair = 'extern "C" __global__ void pair(const float* x, unsigned* y)'
    text = f"{cupy_launch.kernel_text()}\n{pair} {{ *y = rounded({io}(), x[0], x[1]); }}"
    ptx = compile_text(text, "compute_80", ptx=True)[0].decode()
    loaded = dict(re.findall(r"ld\.global\.(?:nc\.)?f32\s+(%f\d+), \[%rd\d+(\+4)?\]", ptx))
    upper, lower = re.search(rf"cvt\.rn\.{instruction}\.f32 %r\d+, (%f\d+), (%f\d+)", ptx).groups()
    assert (loaded[upper], loaded[lower]) == ("+4", "")


# ---- the Triton text as Triton compiles it ----

ROUNDED = {F16: r"cvt\.rn\.f16x?2?\.f32", BF16: r"cvt\.rn\.bf16x?2?\.f32"}
ABSENT = ("v_init", "grad_v_last", "grad_v_seq", "grad_v_init")  # in a training step


@kernels
@needs_triton
@pytest.mark.parametrize(
    ("architecture", "kernel", "dtype", "steps", "v_reset", "kind", "absent"),
    [
        (80, "dlif_forward", F16, 8, None, "triangle", ()),
        (100, "dlif_forward", F32, 100, -0.25, "triangle", ("v_init",)),
        (80, "dlif_backward", BF16, 16, -0.25, "sigmoid", (*ABSENT, "checkpoints")),
        (90, "dlif_backward", F32, 4, 0.0, "soft_sign", ("checkpoints",)),
        (100, "dlif_backward", F16, 21, None, "erf", ()),
        (90, "dlif_backward", F32, 21, 0.0, "triangle", ABSENT),
    ],
)
def test_what_triton_compiles(architecture, kernel, dtype, steps, v_reset, kind, absent):
    """Nothing is contracted, halves are rounded to nearest, and offsets have 64 bits, since all
    steps of a layer may hold more than 2**31 elements, which no test here has the memory for. A
    barrier stands between noting the potentials before later segments and reading them.
    """
    config = layer(v_reset=v_reset, surrogate=Surrogate(kind)).config
    asm = compilers.compiled(kernel, dtype, steps, config, architecture=architecture, absent=absent)
    ptx = asm["ptx"]
    assert "fma.rn.f32" not in ptx
    if kernel == "dlif_backward" and dtype in ROUNDED:  # a spike is one of two constants
        assert re.search(ROUNDED[dtype], ptx)
    if steps <= triton_launch.LONGEST_SEQUENCE_IN_REGISTERS:  # else segments are counted too
        assert set(re.findall(r"arith\.muli .* : (\w+) ", asm["ttir"])) == {"i64"}
    if absent == ABSENT:
        before, barrier, after = ptx.partition("bar.sync")
        assert before.count("st.global") == 2
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


@kernels
@needs_triton
def test_what_the_launcher_passes_compiles_as_triton_itself_sees_it(monkeypatch, h100):
    """One neuron, which Triton takes for a constant; rows that are not aligned; a layer as it
    should be.
    """
    real = triton_launch._kernels()
    warmed = {name: Warmed(getattr(real, name)) for name in ("dlif_forward", "dlif_backward")}
    monkeypatch.setattr(triton_launch, "_kernels", lambda: SimpleNamespace(**warmed))
    for steps, neurons, v_reset in ((3, 1, 0.0), (3, 50, None), (2, 1 << 12, -0.25)):
        v = torch.zeros(neurons) if v_reset is None else None
        inputs = layer(steps, neurons, v_init=v, v_reset=v_reset)
        operator.forward(triton_launch, inputs, v_reset is None)
        backward(triton_launch, inputs, v_reset is None)
    for kernel in warmed.values():
        found = ["ld.global.v4" in compiled.asm["ptx"] for compiled in kernel.compiled]
        assert found == [False, False, True]
