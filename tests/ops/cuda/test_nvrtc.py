"""The CUDA text compiles for real GPUs.

One module per architecture holds kernels in which every pair of template arguments (segment length and vector
width, tensor format, reset, potentials, detach, surrogate) occurs, about sixty of them; the arguments are
independent of each other in the text, so that no combination of three could fail to compile where all pairs do.
"""

import re
from itertools import cycle

import pytest
from ops.cuda import cases, nvrtc, shim

from sj_robust.ops.dlif import cupy_launch
from sj_robust.ops.dlif.cupy_launch import Variant

pytestmark = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))
SHAPES = [(1, False, 4), (2, False, 2), (8, False, 4), (16, False, 2), (32, False, 1), (16, True, 1), (16, True, 2)]
EVERY_PAIR = cases.variants(2, SHAPES)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_75", "sm_100"])
def test_every_variant_compiles_and_stays_in_registers(architecture):
    text = cases.text(EVERY_PAIR, shim.KERNEL)
    binary, log = nvrtc.compile_text(text, architecture, "--ptxas-options=-v")
    assert binary.startswith(b"\x7fELF")
    used = nvrtc.resources(log)
    assert used.keys() >= {f"{way}_{variant.name}" for variant in EVERY_PAIR for way in ("forward", "backward")}
    for name, (registers, spilled) in used.items():
        assert registers <= 128, f"{name} uses {registers} registers"  # half of an SM's threads and more
        assert spilled <= 64, f"{name} spills {spilled} bytes"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_100"])
def test_every_surrogate_stays_in_registers(architecture):
    text = shim.KERNEL
    for name, io, (steps, vec) in zip(cases.OTHERS, cycle(cases.IO), [(4, 4), (8, 4), (16, 2), (32, 1)], strict=False):
        text += f"DLIF_BACKWARD(b_{name}, 128, {io}, {steps}, false, {vec}, RESET_TO_VALUE, true, false, {name})\n"
    used = nvrtc.resources(nvrtc.compile_text(text, architecture, "--ptxas-options=-v")[1])
    assert len(used) == len(cases.OTHERS)
    assert all(registers <= 128 and spilled == 0 for registers, spilled in used.values()), used


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_charging_is_never_contracted(direction):
    """Spikes equal torch's bit by bit only if the product with the decay is rounded before it is added."""
    surrogate = None if direction == "forward" else "PiecewiseQuadratic"
    ptx, _ = nvrtc.compile_text(_source("float", surrogate=surrogate), "compute_80", ptx=True)
    instructions = re.findall(r"^\s*(mul|add|fma)\.(\S+)", ptx.decode(), re.M)
    rounded = sum(name != "fma" and kind.startswith("rn.") for name, kind in instructions)
    assert rounded == 3 * 4  # 4 steps of two products and a sum: explicitly rounded instructions are left alone
    assert not (direction == "forward" and any(name == "fma" for name, _ in instructions))


@pytest.mark.parametrize(("io", "width"), [("float", 32), ("Half", 16), ("BFloat16", 16)])
def test_memory_is_moved_four_neurons_at_a_time(io, width):
    ptx, _ = nvrtc.compile_text(_source(io, vec=4), "compute_80", ptx=True)
    moves = re.findall(rf"(ld|st)\.global(?:\.nc)?\.v4\.[a-z]+{width}\b", ptx.decode())
    assert moves.count("ld") >= 4
    assert moves.count("st") >= 4


def test_no_double_precision_and_halves_through_cvt():
    short = [variant for variant in EVERY_PAIR if variant.shape[0] <= 3]  # enough for every format and surrogate
    text = cases.text(short, shim.KERNEL)
    ptx = nvrtc.compile_text(text, "compute_75", ptx=True)[0].decode()
    assert ".f64" not in ptx
    assert "cvt.f32.f16" in ptx
    assert "cvt.rn.f16.f32" in ptx


@pytest.mark.parametrize("threads", [32, 512, 1024])
def test_block_size_bounds_the_registers(threads):
    """1024 threads of a block share 65536 registers: more than 64 each and the launch would fail."""
    text = _source("float", steps=32, vec=1, surrogate="Sigmoid", threads=threads)
    _, log = nvrtc.compile_text(text, "sm_80", "--ptxas-options=-v")
    ((registers, _),) = nvrtc.resources(log).values()
    assert registers <= min(255, 65536 // threads)


def test_every_cuda_text_of_spikingjelly_compiles():
    surrogate = pytest.importorskip("spikingjelly.activation_based.surrogate")
    if not hasattr(surrogate, "_has_cuda_"):
        pytest.skip("this SpikingJelly release has no cuda_codes")
    functions = [cls() for cls in surrogate._has_cuda_] + [surrogate.ATan(alpha=2), surrogate.Sigmoid(alpha=3)]
    text = shim.KERNEL
    for i, function in enumerate(functions):
        struct = cupy_launch.spliced_struct(function.cuda_codes(y="derivative", x="z", dtype="float"))
        text += struct.replace("struct Spliced", f"struct Spliced{i}")
        text += f"\nDLIF_BACKWARD(b{i}, 128, float, 1, false, 1, RESET_TO_ZERO, false, false, Spliced{i})\n"
    nvrtc.compile_text(text, "sm_80")


def test_an_error_in_the_text_is_reported():
    with pytest.raises(RuntimeError, match=r"kernel\.cu\(\d+\): error"):
        nvrtc.compile_text(shim.KERNEL.replace("typedef long long i64;", "typedef long long i64"), "sm_80")


def _source(io: str, *, steps: int = 4, vec: int = 1, surrogate: str | None = None, threads: int = 128) -> str:
    variant = Variant(threads, io, steps, False, vec, "RESET_TO_ZERO", False, surrogate=surrogate)
    return variant.source("dlif")
