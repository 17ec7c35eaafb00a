"""The CUDA text, run on the CPU through ``cuda_shim.h``, equals the reference in every variant."""

import sys

import numpy as np
import pytest
from ops.cuda import cases, shim

pytestmark = [
    pytest.mark.slow,
    pytest.mark.kernels,
    pytest.mark.skipif(shim.missing_tool() is not None, reason=str(shim.missing_tool())),
]


def test_equals_the_reference_under_address_and_undefined_behaviour_sanitizers(tmp_path):
    library = shim.build(cases.text(shim.KERNEL), tmp_path, sanitize=True)
    result = shim.run_sanitized([sys.executable, "-m", "ops.cuda.cases", str(library)])
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-4000:]
    assert result.stdout.splitlines()[-1].startswith("checked ")


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
"""


def test_shim_shuffles_within_warps_and_shows_barriers_that_diverge_or_are_missing(tmp_path):
    small = shim.Library(shim.build(SMALL, tmp_path))
    x = np.arange(64, dtype=np.float32)
    y = np.zeros(64, np.float32)
    lanes = x.reshape(2, 32)
    for order in range(4):
        small.launch("shift", 1, 64, x, y, order=order)
        shifted = np.concatenate([lanes[:, 3:], lanes[:, 29:]], axis=1)
        np.testing.assert_array_equal(y.reshape(2, 32), shifted)
    with pytest.raises(RuntimeError, match="shuffle"):
        small.launch("shift", 1, 48, x, y)
    small.launch("stuck", 2, 64, np.int32(64))
    with pytest.raises(RuntimeError, match="divergent barrier"):
        small.launch("stuck", 2, 64, np.int32(32))
    with pytest.raises(TypeError, match="argument 0 of stuck must be i"):
        small.launch("stuck", 2, 64, np.int64(32))
    # one warp may run ahead and overwrite what the other has not read yet
    seen = [np.zeros(2, np.float32) for _ in range(3)]
    for order in range(3):
        small.launch("race", 1, 64, seen[order], order=order)
    assert [array.tolist() for array in seen] == [[1, 2], [2, 1], [1, 1]]
