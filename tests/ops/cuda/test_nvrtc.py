"""The CUDA text compiles for real GPUs.

One module per architecture holds kernels in which every pair of template arguments (segment length
and vector width, tensor format, reset, potentials, detach, surrogate) occurs, about sixty of them;
the arguments are independent of each other in the text, so that no combination of three could fail
to compile where all pairs do.
"""

import re
from collections import Counter
from itertools import cycle, product

import pytest
from ops.cuda import cases, nvrtc, shim

from sj_robust.ops.dlif import cupy_launch
from sj_robust.ops.dlif.cupy_launch import Variant

pytestmark = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))
SHAPES = [
    (1, False, 4),
    (2, False, 2),
    (8, False, 4),
    (16, False, 2),
    (32, False, 1),
    (16, True, 1),
    (16, True, 2),
]
EVERY_PAIR = cases.variants(2, SHAPES)


@pytest.mark.slow
@pytest.mark.kernels
@pytest.mark.parametrize("architecture", ["sm_75", "sm_100"])
def test_every_variant_compiles_and_stays_in_registers(architecture):
    text = cases.text(EVERY_PAIR, shim.KERNEL)
    binary, log = nvrtc.compile_text(text, architecture, "--ptxas-options=-v")
    assert binary.startswith(b"\x7fELF")
    used = nvrtc.resources(log)
    assert used.keys() >= {
        f"{way}_{variant.name}" for variant in EVERY_PAIR for way in ("forward", "backward")
    }
    for name, (registers, spilled) in used.items():
        assert registers <= 128, (
            f"{name} uses {registers} registers"
        )  # half of an SM's threads and more
        assert spilled <= 64, f"{name} spills {spilled} bytes"


@pytest.mark.slow
@pytest.mark.kernels
@pytest.mark.parametrize("architecture", ["sm_80", "sm_100"])
def test_every_surrogate_stays_in_registers(architecture):
    text = shim.KERNEL
    for name, io, (steps, vec) in zip(
        cases.OTHERS, cycle(cases.IO), [(4, 4), (8, 4), (16, 2), (32, 1)], strict=False
    ):
        text += (
            f"DLIF_BACKWARD(b_{name}, 128, {io}, {steps}, false, {vec}, RESET_TO_VALUE, true, "
            f"false, {name})\n"
        )
    used = nvrtc.resources(nvrtc.compile_text(text, architecture, "--ptxas-options=-v")[1])
    assert len(used) == len(cases.OTHERS)
    assert all(registers <= 128 and spilled == 0 for registers, spilled in used.values()), used


@pytest.mark.slow
@pytest.mark.kernels
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_charging_is_never_contracted(direction):
    """Spikes equal torch's bit by bit only if the product with the decay is rounded before it is
    added.
    """
    surrogate = None if direction == "forward" else "PiecewiseQuadratic"
    ptx, _ = nvrtc.compile_text(_source("float", surrogate=surrogate), "compute_80", ptx=True)
    instructions = re.findall(r"^\s*(mul|add|fma)\.(\S+)", ptx.decode(), re.M)
    rounded = sum(name != "fma" and kind.startswith("rn.") for name, kind in instructions)
    assert (
        rounded == 3 * 4
    )  # 4 steps of two products and a sum: explicitly rounded instructions are left alone
    assert not (direction == "forward" and any(name == "fma" for name, _ in instructions))


@pytest.mark.slow
@pytest.mark.kernels
def test_memory_is_moved_once_and_in_whole_vectors():
    """Per step a load of x and of the gain, on the way back of the gradient and again of the gain,
    and one store.

    Beside these the potentials, and the sums for the gain, whose loop is unrolled to two stores.
    """
    sizes, widths = (1, 4, 8, 16, 32), {"float": 32, "Half": 16, "BFloat16": 16}
    text, wanted = shim.KERNEL, {}
    for io, steps in product(widths, sizes):
        vec = min(4, cupy_launch._VALUES_PER_THREAD // steps)
        common = f"{io}, {steps}, false"
        text += f"DLIF_FORWARD(f_{io}_{steps}, 128, {common}, 4, RESET_TO_ZERO, false)\n"
        text += (
            f"DLIF_BACKWARD(b_{io}_{steps}, 128, {common}, {vec}, RESET_TO_ZERO, false, false, "
            "ATan)\n"
        )
        of_x, of_v = vec * widths[io], vec * 32
        loads = Counter({4 * widths[io]: steps}) + Counter({128: 1}) + Counter({32: steps})
        wanted[f"f_{io}_{steps}"] = loads, Counter({4 * widths[io]: steps}) + Counter({128: 1})
        loads = Counter({of_x: 2 * steps}) + Counter({of_v: 2}) + Counter({32: 2 * steps})
        wanted[f"b_{io}_{steps}"] = (
            loads,
            Counter({of_x: steps}) + Counter({of_v: 1}) + Counter({32: 2}),
        )  # of sums
    ptx = nvrtc.compile_text(text, "compute_80", ptx=True)[0].decode()
    bits_of, found = (
        (lambda moves, way: Counter(int(n or 1) * int(bits) for w, n, bits in moves if w == way)),
        {},
    )
    for name, body in re.findall(r"\.entry (\w+)\((.*?)\n}", ptx, re.S):
        moves = re.findall(
            r"^\s*(?:@\S+ )?(ld|st)\.global(?:\.nc)?(?:\.v(\d))?\.[a-z](\d+)", body, re.M
        )
        found[name] = bits_of(moves, "ld"), bits_of(moves, "st")
    assert found == wanted


@pytest.mark.slow
@pytest.mark.kernels
def test_the_next_gradient_is_on_its_way_before_a_step_is_done():
    text = _source("float", steps=8, vec=4, surrogate="PiecewiseQuadratic")
    ptx = nvrtc.compile_text(text, "compute_80", ptx=True)[0].decode()
    moves = re.findall(r"(ld|st)\.global\.(?:nc\.)?v4", ptx)
    assert (
        moves[moves.index("st") :].count("ld") == 8 - 2
    )  # those of the last two steps were loaded before


@pytest.mark.slow
@pytest.mark.kernels
@pytest.mark.parametrize(("io", "instruction"), [("Half", "f16x2"), ("BFloat16", "bf16x2")])
def test_two_neighbours_are_rounded_at_once_the_first_to_the_lower_half(io, instruction):
    kernel = (
        'extern "C" __global__ void pair(const float* x, unsigned* y) { *y = rounded(%s(), x[0], '
        "x[1]); }"
    )
    text = f"{shim.KERNEL}\n{kernel % io}"
    ptx = nvrtc.compile_text(text, "compute_80", ptx=True)[0].decode()
    loaded = dict(re.findall(r"ld\.global\.(?:nc\.)?f32\s+(%f\d+), \[%rd\d+(\+4)?\]", ptx))
    upper, lower = re.search(rf"cvt\.rn\.{instruction}\.f32 %r\d+, (%f\d+), (%f\d+)", ptx).groups()
    assert (loaded[upper], loaded[lower]) == ("+4", "")
    assert (
        "x2" not in nvrtc.compile_text(text, "compute_75", ptx=True)[0].decode()
    )  # which has no such instruction


@pytest.mark.slow
@pytest.mark.kernels
def test_no_double_precision_and_halves_through_cvt():
    short = [
        variant for variant in EVERY_PAIR if variant.shape[0] <= 3
    ]  # enough for every format and surrogate
    text = cases.text(short, shim.KERNEL)
    ptx = nvrtc.compile_text(text, "compute_75", ptx=True)[0].decode()
    assert ".f64" not in ptx
    assert "cvt.f32.f16" in ptx
    assert "cvt.rn.f16.f32" in ptx


@pytest.mark.slow
@pytest.mark.kernels
@pytest.mark.parametrize("threads", [32, 512, 1024])
def test_block_size_bounds_the_registers(threads):
    """1024 threads of a block share 65536 registers: more than 64 each and the launch would
    fail.
    """
    text = _source("float", steps=32, vec=1, surrogate="Sigmoid", threads=threads)
    _, log = nvrtc.compile_text(text, "sm_80", "--ptxas-options=-v")
    ((registers, _),) = nvrtc.resources(log).values()
    assert registers <= min(255, 65536 // threads)


def test_every_cuda_text_of_spikingjelly_compiles():
    surrogate = pytest.importorskip("spikingjelly.activation_based.surrogate")
    if not hasattr(surrogate, "_has_cuda_"):
        pytest.skip("this SpikingJelly release has no cuda_codes")
    functions = [cls() for cls in surrogate._has_cuda_] + [
        surrogate.ATan(alpha=2),
        surrogate.Sigmoid(alpha=3),
    ]
    text = shim.KERNEL
    for i, function in enumerate(functions):
        struct = cupy_launch.spliced_struct(
            function.cuda_codes(y="derivative", x="z", dtype="float")
        )
        text += struct.replace("struct Spliced", f"struct Spliced{i}")
        text += (
            f"\nDLIF_BACKWARD(b{i}, 128, float, 1, false, 1, RESET_TO_ZERO, false, false, "
            f"Spliced{i})\n"
        )
    nvrtc.compile_text(text, "sm_80")


def test_an_error_in_the_text_is_reported():
    with pytest.raises(RuntimeError, match=r"kernel\.cu\(\d+\): error"):
        nvrtc.compile_text(
            shim.KERNEL.replace("typedef long long i64;", "typedef long long i64"), "sm_80"
        )


def _source(
    io: str, *, steps: int = 4, vec: int = 1, surrogate: str | None = None, threads: int = 128
) -> str:
    variant = Variant(threads, io, steps, False, vec, "RESET_TO_ZERO", False, surrogate=surrogate)
    return variant.source("dlif")
