"""The table of calls of ``ops/triton/cases.py``, run by the launcher of CuPy and the CUDA text.

``python -m ops.cuda.cases LIBRARY`` in ``tests/`` runs the kernels of a library that was built from
:func:`text`, so that this process can be one under AddressSanitizer.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
from ops.cuda import fake_cupy, shim
from ops.triton import cases

from sj_robust.ops.dlif import cpp, cupy_launch, operator

ROUND_TRIP = """
extern "C" __global__ void round_trip(const float* from, BFloat16* bits, float* back, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        store_values(bits + i, {from[i]});
        back[i] = to_float(bits[i]);
    }
}
"""


def run_table(patch: pytest.MonkeyPatch) -> None:
    """Every call of the table and the special ones, against the reference."""
    for name in ("unavailable_reason", "unsupported_reason"):
        patch.setattr(cupy_launch, name, lambda *call: None)
    cases.run_all(cases.cases(), cases.check, cases.SPECIAL, [], [operator, cupy_launch], "cupy")


def lines() -> list[str]:
    """The kernels that the table asks for: a first run, where the kernel for CPUs computes."""

    def also(ours, plain):
        def call(*arguments):
            ours(*arguments)
            return plain(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        fake = fake_cupy.install(fake_cupy.FakeCuPy(None, collect=True), patch)
        for name in ("forward", "backward"):
            ours = getattr(cupy_launch, name)
            plain = getattr(cpp, name)
            patch.setattr(cupy_launch, name, also(ours, plain))
        run_table(patch)
    return sorted(fake.lines)


def text(kernel: str) -> str:
    """The CUDA text with all of them, and rounding to bfloat16 by itself."""
    return "\n".join([kernel, ROUND_TRIP, *lines(), ""])


def check_bfloat16(library: shim.Library) -> None:
    """Every bfloat16, the values half-way to the next, and their neighbours: to nearest, ties to
    even.
    """
    steps = np.array([0, 0x7FFF, 0x8000, 0x8001], np.uint32)
    low, high = np.meshgrid(steps, np.arange(0x10000, dtype=np.uint32))
    values = ((high << 16) | low).ravel().view(np.float32)
    bits = np.zeros(values.size, np.uint16)
    back = np.zeros(values.size, np.float32)
    library.launch("round_trip", 1, 32, values, bits, back, np.int32(values.size))
    number = ~np.isnan(values)
    np.testing.assert_array_equal(np.isnan(back), ~number)
    up = (low > 0x8000) | ((low == 0x8000) & (high % 2 == 1))
    expected = (high + up).ravel()[number]
    np.testing.assert_array_equal(bits[number], expected)
    wanted = (expected << 16).astype(np.uint32).view(np.float32)
    np.testing.assert_array_equal(back[number], wanted)


def main(path: Path) -> None:
    """Run them all; AssertionError with what differs."""
    library = shim.Library(path)
    check_bfloat16(library)
    with pytest.MonkeyPatch.context() as patch:
        fake_cupy.install(fake_cupy.FakeCuPy(None, library=library), patch)
        run_table(patch)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
