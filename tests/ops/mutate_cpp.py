"""Plants faults in the C++ text of the CPU kernels one by one and records which tests notice; by
hand, takes an hour.

In ``tests/``, ``python -m ops.mutate_cpp`` runs the kernels under AddressSanitizer and UBSan, then
with every fault, and rewrites ``mutation_cpp.json``. ``--only sanitizers`` or a part of a fault's
name runs that alone and writes nothing. Faults go into a copy of the tree. The test that counts
instructions of optimised code is left out.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ops import planted
from ops.cuda import shim

DLIF, NORM = ("sj_robust/ops/dlif", "sj_robust/ops/bn_dlif/normalised.h")
BLOCKS, SIMD, WALK = f"{DLIF}/blocks.h", f"{DLIF}/simd.h", f"{DLIF}/walk.h"
TESTS = (
    "tests/ops/test_dlif.py",
    "tests/ops/test_bn_dlif.py",
    "tests/ops/test_cpp.py",
    "tests/neuron/test_stage.py",
)
OF_OPTIMISED_CODE = "tests/ops/test_cpp.py::test_wide_code_stores_past_the_cache"
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
MUTANTS = {  # what is wrong: (file, text, faulty text); the text occurs once
    "current without batch norm": (
        BLOCKS,
        "* W, coupling.input(load(x + k * W), k * W))",
        "* W, load(x + k * W))",
    ),
    "current steps as x does": (
        BLOCKS,
        "      current += b.stride;",
        "      current += b.x_stride;",
    ),
    "gradient of the current read as x": (
        BLOCKS,
        "g_current + t * b.stride + k",
        "g_current + t * b.x_stride + k",
    ),
    "gradient of the current ignored": (
        BLOCKS,
        "if (b.g_current) gc += load(b.g_current + t * b.stride + k * W);",
        "",
    ),
    "unused lanes of that gradient kept": (
        BLOCKS,
        "if (!full && job.g_current) std::memset(gcb, 0, size_t(T * B) * sizeof(C));",
        "",
    ),
    "current of a partial block not written": (
        BLOCKS,
        "if (job.current) write_runs(runs, n_runs, cb, B, T, at<C>(job.current, 0), M, "
        "job.stream);",
        "",
    ),
    "unused lanes of x kept": (
        BLOCKS,
        "      if (!block.is_full()) std::memset(xb, 0, size_t(T * B) * sizeof(C));  "
        "// lanes beyond the tensor are zero",
        "",
    ),
    "soft sign not squared": (
        BLOCKS,
        "return n.height / (root * root);",
        "return n.height / root;",
    ),
    "super spike with alpha": (BLOCKS, "case SUPER_SPIKE: slope = C(1), ", "case SUPER_SPIKE: "),
    "erf scale": (BLOCKS, "job.alpha * 0.56418958354775629", "job.alpha * 0.5642"),
    "exponential one-sided": (
        BLOCKS,
        "exponential(-n.slope * magnitude<C>(z))",
        "exponential(-n.slope * z)",
    ),
    "surrogate by rows at h": (BLOCKS, "(load(h + k) - n.v_threshold, n));", "(load(h + k), n));"),
    "half a row of slopes": (
        BLOCKS,
        "< BLOCK<C>; k += LANES<C>) store(",
        "< BLOCK<C> / 2; k += LANES<C>) store(",
    ),
    "slopes of the first step": (
        BLOCKS,
        "n.slopes(h_row, n, slopes);",
        "n.slopes(b.h, n, slopes);",
    ),
    "large negative exponents": (SIMD, "return x < -87.0f ? Vec<float>{} : y", "return y"),
    "float sums never flushed": (BLOCKS, "if ((summed += block.size) >= FLUSH) flush();", ""),
    "last sums not flushed": (BLOCKS, "  flush();\n}", "}"),
    "current streamed without being aligned": (
        BLOCKS,
        "&& can_stream(job, job.current, sizeof(C))",
        "",
    ),
    "row pairs where there are none": (
        WALK,
        "if (height == 2 && width >= 2)\n",
        "if (width >= 2)\n",
    ),
    "pooled gradient of another cell": (
        WALK,
        ".add_cells(pooled + within / 2,",
        ".add_cells(pooled + within,",
    ),
    "gradient beyond the windows kept": (
        WALK,
        "if (block.n_covered < B) std::memset(gs, 0, size_t(job.T * B) * sizeof(C));",
        "",
    ),
    "odd planes: windows beyond the last row": (WALK, "if (right && below) {", "if (right) {"),
    "one channel too many": (
        WALK,
        "channel >= job.channels) channel = 0;",
        "channel > job.channels) channel = 0;",
    ),
    "pattern of a partial block of planes": (
        WALK,
        "if (block.size == B) block.pattern =",
        "block.pattern =",
    ),
    "pattern of a partial block of channels": (
        WALK,
        "if (size == B) block.pattern = c;",
        "block.pattern = c;",
    ),
    "odd planes: windows beyond the last column": (
        WALK,
        "2 * column + 1 < job.width,",
        "2 * column < job.width,",
    ),
    "pooling stops before the last pairs": (
        WALK,
        "if (n > 0) pool_pairs<C, N / 2>(top, bottom, n, to);",
        "",
    ),
    "shared gradient stops before the last pairs": (
        WALK,
        "if (n > 0) share_pairs<C, N / 2>(from, n, top, bottom);",
        "",
    ),
    "twice the pooled gradient": (WALK, "d[i] = C(0.25) * from[i]", "d[i] = C(0.5) * from[i]"),
    "scales of a partial block kept": (
        NORM,
        "if (block.size < B) std::memset(scale, 0, 5 * B * sizeof(C));",
        "",
    ),
    "total gradient without the scale": (
        NORM,
        "if (!job.g_total) return;\n"
        "      for (int k = 0; k < B; k += W) store(g_sum + k, load(g_sum + k) * load(scale + k));",
        "if (!job.g_total) return;",
    ),
    "total gradient of the first run alone": (
        NORM,
        ".runs, block.n_runs, g_sum, B, 1,",
        ".runs, 1, g_sum, B, 1,",
    ),
    "sums of the block before": (
        NORM,
        "if constexpr (TOTALS) std::memset(g_sum, 0, 2 * B * sizeof(C));",
        "",
    ),
    "mean's gradient left out": (
        NORM,
        "centred * load(slope + k) + load(constant + k)",
        "centred * load(slope + k)",
    ),
    "sum of the first channel": (
        NORM,
        "; ++i) sums[i] += double(from[i]);",
        "; ++i) sums[0] += double(from[i]);",
    ),
    "variance without squares": (NORM, "squares += d * d;", "squares += d;"),
    "uncovered lanes of a full block": (WALK, "block.n_covered < BLOCK<C> || ", ""),
    "planes of 8 columns as if of 4": (
        WALK,
        "::integral_constant<int, 4>{});",
        "::integral_constant<int, 2>{});",
    ),
}


def first_failure(tree: Path, *, flags: str = "", preload: str = "") -> str | None:
    """The first test that fails with the kernels of a tree, built with more flags; None if none
    does.
    """
    library = tree / DLIF / "_kernel.so"
    library.unlink(missing_ok=True)
    build = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force"],
        cwd=tree,
        env={**os.environ, "CFLAGS": flags},
        capture_output=True,
        text=True,
    )
    if not library.exists():
        return f"compiler: {build.stderr[-400:]}"
    arguments = ["-m", "not slow", "--deselect", OF_OPTIMISED_CODE, *TESTS]
    return planted.first_failure(
        tree, *arguments, LD_PRELOAD=preload, ASAN_OPTIONS="detect_leaks=0"
    )


def main() -> None:
    """Try the sanitizers and every fault, and write the result beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="sanitizers, or a part of the name of faults")
    only = parser.parse_args().only
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name)
        planted.copy_tree(tree)
        if only in ("", "sanitizers"):
            clean = first_failure(tree, flags=SANITIZERS, preload=shim.sanitizer_runtime() or "")
            print(f"sanitizers: {clean or 'clean'}", flush=True)
            assert clean is None, "the kernels themselves must pass first"

        def noticed_by(file: str, text: str) -> str | None:
            source = (tree / file).read_text()
            (tree / file).write_text(text)
            failure = first_failure(tree)
            (tree / file).write_text(source)
            return failure

        planted.try_faults(MUTANTS, noticed_by, only, Path(__file__).with_name("mutation_cpp.json"))


if __name__ == "__main__":
    main()
