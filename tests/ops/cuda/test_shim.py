"""The CUDA text, run on the CPU through ``cuda_shim.h``, equals the float64 oracle in every
variant.
"""

import sys

import numpy as np
import pytest
from ops.cuda import cases, shim

pytestmark = [
    pytest.mark.slow,
    pytest.mark.kernels,
    pytest.mark.skipif(shim.missing_tool() is not None, reason=str(shim.missing_tool())),
]
EVERY_TRIPLE = cases.variants(
    3
)  # every combination of three template arguments; pairs alone under the sanitizers


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return shim.Library(
        shim.build(cases.text(EVERY_TRIPLE, shim.KERNEL), tmp_path_factory.mktemp("kernels"))
    )


@pytest.fixture
def preload():
    """What a process needs in which a sanitized library is loaded."""
    return shim.sanitizer_runtime() or pytest.skip(
        "g++ has no AddressSanitizer runtime (install libasan)"
    )


@pytest.mark.parametrize("variant", EVERY_TRIPLE, ids=lambda variant: variant.name)
def test_equals_the_oracle(library, variant):
    cases.check(library, variant)


def test_equals_the_oracle_under_address_and_undefined_behaviour_sanitizers(tmp_path, preload):
    chosen = cases.variants(2)
    built = shim.build(cases.text(chosen, shim.KERNEL), tmp_path, sanitize=True)
    command = [sys.executable, "-m", "ops.cuda.cases", str(built), "2"]
    result = shim.run_sanitized(command, preload)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert result.stdout.endswith(f"checked {len(chosen)} variants\n")


def test_sanitizer_sees_a_read_past_the_end(tmp_path, preload):
    text = (
        'extern "C" __global__ void sum(const float* x, float* y) {\n    y[threadIdx.x] = '
        "x[threadIdx.x + 1];\n}\n"
    )
    built = shim.build(text, tmp_path, sanitize=True)
    script = (
        "import numpy as np\nfrom pathlib import Path\nfrom ops.cuda.shim import Library\n"
        f"Library(Path({str(built)!r})).launch('sum', 1, 512, np.zeros(512, 'f4'), np.zeros(512, "
        "'f4'))\n"
    )
    result = shim.run_sanitized([sys.executable, "-c", script], preload)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr


def test_bfloat16_is_rounded_to_nearest_even(library):
    cases.check_bfloat16(library)


def test_every_surrogate_has_its_slope(library):
    cases.check_slopes(library)


SMALL = """
extern "C" __global__ void shift(const float* x, float* y) {
    y[threadIdx.x] = __shfl_down_sync(0xffffffffu, x[threadIdx.x], 3);
}
extern "C" __global__ void stuck(int n) {
    if ((int)threadIdx.x < n) __syncthreads();
}
extern "C" __global__ void race(float* seen) {
    __shared__ float value;
    value = 1.0f;
    __syncthreads();
    const float here = __shfl_down_sync(0xffffffffu, value, 0);
    if (threadIdx.x % 32 == 0) seen[threadIdx.x / 32] = here;
    if (threadIdx.x % 32 == 0) value = 2.0f;
}
extern "C" __global__ void nothing(float* p, long long q, int i, float f) {}
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return shim.Library(shim.build(SMALL, tmp_path_factory.mktemp("small")))


def test_shim_shuffles_and_separates_warps(small):
    x, y = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    for order in range(4):
        small.launch("shift", 1, 64, x, y, order=order)
        lanes = x.reshape(2, 32)
        np.testing.assert_array_equal(y.reshape(2, 32)[:, :29], lanes[:, 3:])
        np.testing.assert_array_equal(y.reshape(2, 32)[:, 29:], lanes[:, 29:])
    with pytest.raises(RuntimeError, match="shuffle"):
        small.launch("shift", 1, 48, x, y)


def test_shim_refuses_a_divergent_barrier(small):
    small.launch("stuck", 2, 64, np.int32(64))
    with pytest.raises(RuntimeError, match="divergent barrier"):
        small.launch("stuck", 2, 64, np.int32(32))


def test_a_missing_barrier_shows_in_one_of_the_orders(small):
    """The second warp may run ahead and overwrite what the first has not read yet, and the other
    way round.
    """
    seen = [np.zeros(2, np.float32) for _ in range(3)]
    for order in range(3):
        small.launch("race", 1, 64, seen[order], order=order)
    assert [array.tolist() for array in seen] == [[1, 2], [2, 1], [1, 1]]


def test_shim_checks_the_width_and_kind_of_arguments(small):
    good = [None, np.int64(1), np.int32(1), np.float32(1)]
    small.launch("nothing", 1, 32, *good)
    for i, bad in enumerate([np.int32(0), np.int32(1), np.int64(1), np.float64(1)]):
        with pytest.raises(TypeError, match=f"argument {i}"):
            small.launch("nothing", 1, 32, *good[:i], bad, *good[i + 1 :])
    with pytest.raises(TypeError, match="takes 4 arguments, got 3"):
        small.launch("nothing", 1, 32, *good[:3])
