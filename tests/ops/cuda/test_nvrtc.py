"""The CUDA text compiles for real GPUs: every kernel that the table of calls asks for, with
registers to spare, whole vectors, and nothing contracted.
"""

import re
from collections import Counter

import pytest
from ops.cuda import cases, nvrtc, shim

from sj_robust.ops.dlif import cupy_launch
from sj_robust.ops.dlif.cupy_launch import Variant

pytestmark = [
    pytest.mark.slow,
    pytest.mark.kernels,
    pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing())),
]
WIDTHS = {"float": 32, "Half": 16, "BFloat16": 16}


@pytest.mark.parametrize(("architecture", "first"), [("sm_75", 0), ("sm_100", 1)])
def test_every_kernel_of_the_table_compiles_and_stays_in_registers(architecture, first):
    chosen = cases.lines()[first::2]
    text = "\n".join([shim.KERNEL, *chosen])
    binary, log = nvrtc.compile_text(text, architecture, "--ptxas-options=-v")
    assert binary.startswith(b"\x7fELF")
    used = nvrtc.resources(log)
    assert len(used) == len(chosen) > 30
    for name, (registers, spilled) in used.items():
        assert registers <= 128, f"{name}: {registers} registers"  # half of an SM's threads
        assert spilled <= 64, f"{name} spills {spilled} bytes"


def ptx_of(variant):
    return nvrtc.compile_text(variant.source(), "compute_80", ptx=True)[0].decode()


def kernel(io, steps, backward, threads=128):
    return Variant(
        threads=threads,
        io=io,
        steps=steps,
        is_long=False,
        vec=min(4, cupy_launch._VALUES_PER_THREAD // steps) if backward else 4,
        reset="RESET_TO_ZERO",
        v_seq=False,
        surrogate="ATan" if backward else None,
    )


@pytest.mark.parametrize("io", WIDTHS)
@pytest.mark.parametrize("steps", [1, 8, 32])
@pytest.mark.parametrize("backward", [False, True])
def test_memory_is_moved_once_and_in_whole_vectors_and_charging_is_never_contracted(
    io, steps, backward
):
    """Per step a load of x and of the gain, on the way back of the gradient and again of the gain,
    and one store. Beside these the potentials, and the sums for the gain, whose loop is unrolled to
    two stores.
    """
    variant = kernel(io, steps, backward)
    ptx = ptx_of(variant)
    of_x = variant.vec * WIDTHS[io]
    of_v = variant.vec * 32
    passes = 1 + backward
    move = r"^\s*(?:@\S+ )?(ld|st)\.global(?:\.nc)?(?:\.v(\d))?\.[a-z](\d+)"
    found = {"ld": Counter(), "st": Counter()}
    for way, count, bits in re.findall(move, ptx, re.M):
        found[way][int(count or 1) * int(bits)] += 1
    loads = Counter({of_x: passes * steps})
    stores = Counter({of_x: steps})
    loads += Counter({of_v: passes}) + Counter({32: passes * steps})
    stores += Counter({of_v: 1}) + Counter({32: 2 * backward})
    assert found == {"ld": loads, "st": stores}
    # spikes equal torch's bit by bit only if the product with the decay is rounded by itself
    rounded = re.findall(r"^\s*(?:mul|add)\.rn\.", ptx, re.M)
    assert len(rounded) == 3 * variant.vec * steps
    assert ("fma.rn" in ptx) == backward
    assert ".f64" not in ptx


def test_the_next_gradient_is_on_its_way_before_a_step_is_done():
    moves = re.findall(r"(ld|st)\.global\.(?:nc\.)?v4", ptx_of(kernel("float", 8, True)))
    behind = moves[moves.index("st") :].count("ld")
    assert behind == 8 - 2  # those of the last two steps were loaded before


@pytest.mark.parametrize(("io", "instruction"), [("Half", "f16x2"), ("BFloat16", "bf16x2")])
def test_two_neighbours_are_rounded_at_once_the_first_to_the_lower_half(io, instruction):
    pair = 'extern "C" __global__ void pair(const float* x, unsigned* y)'
    text = f"{shim.KERNEL}\n{pair} {{ *y = rounded({io}(), x[0], x[1]); }}"
    ptx = nvrtc.compile_text(text, "compute_80", ptx=True)[0].decode()
    loaded = dict(re.findall(r"ld\.global\.(?:nc\.)?f32\s+(%f\d+), \[%rd\d+(\+4)?\]", ptx))
    upper, lower = re.search(rf"cvt\.rn\.{instruction}\.f32 %r\d+, (%f\d+), (%f\d+)", ptx).groups()
    assert (loaded[upper], loaded[lower]) == ("+4", "")


@pytest.mark.parametrize("threads", [32, 512, 1024])
def test_block_size_bounds_the_registers(threads):
    """1024 threads share 65536 registers: with more than 64 each the launch would fail."""
    variant = kernel("float", 32, True, threads)
    _, log = nvrtc.compile_text(variant.source(), "sm_80", "--ptxas-options=-v")
    ((registers, _),) = nvrtc.resources(log).values()
    assert registers <= min(255, 65536 // threads)
