"""Plants faults in the CUDA text one by one and records which check notices each; run by hand,
takes minutes.

``python -m ops.cuda.mutate`` in ``tests/`` rewrites ``mutation.json``; with a part of the names of
faults it tries these alone. A fault goes through the CPU build of all pairs of template arguments,
then through the same under the sanitizers, then through the NVRTC tests.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from ops import planted
from ops.cuda import cases, shim

FILE = "sj_robust/ops/dlif/kernel.cu"
MUTANTS = {  # what is wrong: (text, faulty text); the text occurs once
    "half rounds through bfloat16": (
        "return float_to_half(value).bits",
        "return __float_as_uint(value) >> 16",
    ),
    "bfloat16 truncates": ("(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16", "bits >> 16"),
    "bfloat16 ties go up": ("0x7fffu + ((bits >> 16) & 1u)", "0x8000u"),
    "bfloat16 NaN becomes infinite": ("is_nan ? 0x7fc0u", "is_nan ? 0x7f80u"),
    "default of a null pointer ignored": ("from ? pack.at[j] : otherwise", "pack.at[j]"),
    "null pointer read": ("if (from) pack = load", "pack = load"),
    "vector load ignores its offset": ("pack = load<VEC>(from + i)", "pack = load<VEC>(from)"),
    "triangle not clipped": ("height < 0.0f ? 0.0f : height", "height"),
    "triangle slope alpha": ("alpha - alpha * alpha * fabsf(z)", "alpha - alpha * fabsf(z)"),
    "triangle one-sided": ("alpha * alpha * fabsf(z)", "alpha * alpha * z"),
    "atan not halved": ("0.5f * alpha / (1.0f", "alpha / (1.0f"),
    "atan scale": ("1.57079632679489662f", "1.57f"),
    "sigmoid without alpha": ("return alpha * s * (1.0f - s)", "return s * (1.0f - s)"),
    "sigmoid slope": ("expf(-alpha * z)", "expf(-z)"),
    "exponential not halved": ("return 0.5f * alpha * expf(", "return alpha * expf("),
    "exponential one-sided": ("expf(-alpha * fabsf(z))", "expf(-alpha * z)"),
    "soft sign without alpha": ("root = 1.0f + alpha * fabsf(z)", "root = 1.0f + fabsf(z)"),
    "soft sign not squared": ("return 0.5f * alpha / (root * root)", "return 0.5f * alpha / root"),
    "super spike with alpha": ("root = 1.0f + fabsf(z)", "root = 1.0f + alpha * fabsf(z)"),
    "super spike halved": ("return alpha / (root", "return 0.5f * alpha / (root"),
    "erf scale": ("0.56418958354775629f", "0.5642f"),
    "erf not squared": ("expf(-scaled * scaled)", "expf(-scaled)"),
    "decay forgotten": ("__fmul_rn(v, c.decay)", "v"),
    "gain forgotten": ("__fmul_rn(x, gain)", "x"),
    "leak current forgotten": ("__fadd_rn(h, c.leak_current)", "h"),
    "leak current with every reset": (
        "RESET == RESET_TO_VALUE ? __fadd_rn(h, c.leak_current) : h",
        "__fadd_rn(h, c.v_reset + c.leak_current)",
    ),
    "fused multiply-add allowed": (
        "__fadd_rn(__fmul_rn(v, c.decay), __fmul_rn(x, gain))",
        "v * c.decay + x * gain",
    ),
    "v_reset forgotten": ("RESET == RESET_TO_VALUE ? c.v_reset : 0.0f", "0.0f"),
    "reset only above the threshold": (
        "if (!(h >= c.v_threshold)) return h",
        "if (!(h > c.v_threshold)) return h",
    ),
    "soft reset adds": ("? h - c.v_threshold : potential", "? h + c.v_threshold : potential"),
    "surrogate at h": ("derivative(h - c.v_threshold, c.alpha)", "derivative(h, c.alpha)"),
    "soft reset gradient sign": (
        "grad_spike -= grad_v * c.v_threshold",
        "grad_spike += grad_v * c.v_threshold",
    ),
    "soft reset gradient always detached": (
        "if (!DETACH) grad_spike -=",
        "if (false) grad_spike -=",
    ),
    "soft reset gradient never detached": ("if (!DETACH) grad_spike -=", "grad_spike -="),
    "hard reset gradient sign": (
        "potential_at_rest<RESET>(c) - h)",
        "h - potential_at_rest<RESET>(c))",
    ),
    "hard reset gradient never detached": ("if (!DETACH) grad_spike +=", "grad_spike +="),
    "soft reset loses the direct path": (
        "return grad_spike * g + grad_v;",
        "return grad_spike * g;",
    ),
    "spike keeps its gradient": ("(h >= c.v_threshold ? 0.0f : grad_v)", "grad_v"),
    "gradient gate at equality": (
        "(h >= c.v_threshold ? 0.0f : grad_v)",
        "(h > c.v_threshold ? 0.0f : grad_v)",
    ),
    "warp sum starts too low": ("distance = WARP_SIZE / 2;", "distance = WARP_SIZE / 4;"),
    "warp sum ends too early": ("distance > 0; distance /= 2", "distance > 1; distance /= 2"),
    "threads step over neurons": (
        ".x + threadIdx.x) * VEC;\n    if",
        ".x + threadIdx.x + 1) * VEC;\n    if",
    ),
    "forward writes past the end": ("if (i >= neurons) return;", "if (i > neurons) return;"),
    "backward reads past the end": ("active = i < neurons", "active = i <= neurons"),
    "backward skips the last neurons": ("active = i < neurons", "active = i < neurons - VEC"),
    "spike above the threshold only": (
        "spike[j] = h >= c.v_threshold",
        "spike[j] = h > c.v_threshold",
    ),
    "potentials before reset": (
        "(v_seq + t * neurons + i, v);",
        "(v_seq + t * neurons + i, spike);",
    ),
    "last potential not written": ("store_values(v_last + i, v);", ""),
    "too little shared memory": ("warp_sums[STEPS][MAX_WARPS]", "warp_sums[STEPS][1]"),
    "segments rounded down": ("(steps + STEPS - 1) / STEPS", "steps / STEPS"),
    "gradient of the last potential ignored": ("load_or<VEC>(grad_v, grad_v_last, i, 0.0f);", ""),
    "checkpoint after the first step": ("if (t % STEPS == 0) note", "if (t % STEPS == 1) note"),
    "one checkpoint for all segments": ("checkpoints + t / STEPS * neurons + i", "checkpoints + i"),
    "first pass stops early": ("t < (segments - 1) * STEPS", "t < (segments - 1) * STEPS - 1"),
    "checkpoint not restored": (
        "load_or<VEC>(v, checkpoints + segment * neurons, i, 0.0f);",
        "(void)segment;",
    ),
    "last segment taken as full": ("min(STEPS, steps - first)", "STEPS"),
    "gains of the first segment": (
        "gain = input_gain[first + k];\n#pragma",
        "gain = input_gain[k];\n#pragma",
    ),
    "first step left out of the sum": (
        "float h[STEPS][VEC];\n#pragma unroll\n        for (int k = 0;",
        "float h[STEPS][VEC] = {};\n#pragma unroll\n        for (int k = 1;",
    ),
    "backward stops before step 0": (
        "int k = STEPS - 1; k >= 0; --k",
        "int k = STEPS - 1; k > 0; --k",
    ),
    "second of two neighbours first": (
        "return rounded(format, first) | (unsigned)rounded(format, second) << 16",
        "return rounded(format, second) | (unsigned)rounded(format, first) << 16",
    ),
    "second of two neighbours first, on the GPU": (
        "cvt.rn.bf16x2.f32 %0, %1, %2",
        "cvt.rn.bf16x2.f32 %0, %2, %1",
    ),
    "neighbours rounded one by one": ("__CUDA_ARCH__ >= 800", "__CUDA_ARCH__ >= 8000"),
    "vectors stored number by number": (
        "{ *(unsigned*)to = rounded(IO(), v[0], v[1]); }",
        "{ to[0].bits = rounded(IO(), v[0]), to[1].bits = rounded(IO(), v[1]); }",
    ),
    "gradient of another step first": (
        "(first + count - 1) * neurons + i",
        "(first + STEPS - 1) * neurons + i",
    ),
    "gradient of the same step again": (
        "load<VEC>(grad_spike_seq + at - neurons)",
        "load<VEC>(grad_spike_seq + at)",
    ),
    "gradient not moved on": ("if (k > 0) upcoming =", "if (k > 1) upcoming ="),
    "gradient of potentials overwrites": (
        "grad_v[j] += grad_v_here.at[j]",
        "grad_v[j] = grad_v_here.at[j]",
    ),
    "gradient of x without gain": ("grad_x[j] = grad_h * gain", "grad_x[j] = grad_h"),
    "gain's gradient takes one neuron": ("grad_gain += grad_h", "grad_gain = grad_h"),
    "gradient carried without decay": ("grad_v[j] = grad_h * c.decay", "grad_v[j] = grad_h"),
    "every lane writes the warp's sum": ("if (lane == 0) warp_sums", "if (lane <= 1) warp_sums"),
    "no barrier before the block's sum": (
        "        __syncthreads();\n        for (int k",
        "        for (int k",
    ),
    "barrier in a branch": (
        "__syncthreads();\n        for (int",
        "if (active) __syncthreads();\n        for (int",
    ),
    "no barrier between segments": ("if (LONG) __syncthreads();", ""),
    "first warp left out": ("for (int w = 0; w < warps", "for (int w = 1; w < warps"),
    "one warp too many": ("w < warps; ++w", "w <= warps; ++w"),
    "blocks share a partial sum": ("(i64)blockIdx.x * steps + first", "first"),
    "partial sums of the first segment": ("* steps + first + k] = sum", "* steps + k] = sum"),
    "gradient of v_init unasked": ("if (active && grad_v_init) store", "if (active) store"),
    "double precision slips in": ("0.5f * alpha / (1.0f + scaled", "0.5 * alpha / (1.0f + scaled"),
}


def noticed_by(file: str, kernel: str) -> str | None:
    """Name of the first check that notices."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for sanitize in (False, True):
            stage = "sanitizers" if sanitize else "values"
            try:
                library = shim.build(
                    cases.text(cases.variants(2), kernel), directory, sanitize=sanitize
                )
            except RuntimeError:
                return "compiler"
            command = [sys.executable, "-m", "ops.cuda.cases", str(library), "2"]
            try:
                result = shim.run_sanitized(
                    command, shim.sanitizer_runtime() or "" if sanitize else ""
                )
            except subprocess.TimeoutExpired:
                return "time limit"
            if result.returncode < 0:
                return "crash"
            if result.returncode:
                return "barrier" if "divergent barrier" in result.stderr else stage
        planted.copy_tree(directory)
        (directory / file).write_text(kernel)
        tests = ["tests/ops/cuda/test_nvrtc.py", "-m", "", "-k", "not every_variant"]
        return "nvrtc" if planted.first_failure(directory, *tests) else None


def main() -> None:
    """Try every mutant, or those named, and write the result of all beside this file."""
    assert noticed_by(FILE, shim.KERNEL) is None, "the kernel itself must pass first"
    faults = {wrong: (FILE, *pair) for wrong, pair in MUTANTS.items()}
    planted.try_faults(faults, noticed_by, "".join(sys.argv[1:]), shim.HERE / "mutation.json")


if __name__ == "__main__":
    main()
