"""Plants faults in the Triton text one by one and records which check notices each; run by hand, takes minutes.

``TRITON_INTERPRET=1 python -m ops.triton.mutate`` in ``tests/`` rewrites ``mutation.json``. A fault goes through the
interpreter's cases in a process forked from this one; one that survives goes through the tests of the machine code.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from ops.triton import cases

from sj_robust.ops.dlif import triton_launch

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
KERNEL = ROOT / "sj_robust" / "ops" / "dlif" / "triton_kernel.py"
CHARGE = """h = _charge(v, x, tl.load(input_gain + first + k), decay, leak_current, RESET)
        v = _reset(h, v_threshold, v_reset, RESET)
        """
LATER = "FIRST + segment * SEGMENT, v, x_seq, input_gain, spike_seq"
MUTANTS = {  # what is wrong: (text, faulty text); the text occurs once
    "decay forgotten": ("h = v * decay + x * gain", "h = v + x * gain"),
    "gain forgotten": ("h = v * decay + x * gain", "h = v * decay + x"),
    "leak current forgotten": ("        h = h + leak_current\n", "        h = h\n"),
    "soft reset adds": ("h - v_threshold, h)", "h + v_threshold, h)"),
    "soft reset above the threshold only": ("(h >= v_threshold, h - v", "(h > v_threshold, h - v"),
    "hard reset above the threshold only": ("(h >= v_threshold, v_reset", "(h > v_threshold, v_reset"),
    "v_reset forgotten": ("return tl.where(h >= v_threshold, v_reset, h)", "return tl.where(h >= v_threshold, 0.0, h)"),
    "triangle not clipped": ("tl.where(height < 0.0, 0.0, height)", "height"),
    "triangle hides what is not a number": ("tl.where(height < 0.0, 0.0, height)", "tl.maximum(height, 0.0)"),
    "triangle slope alpha": ("alpha - alpha * alpha * tl.abs(z)", "alpha - alpha * tl.abs(z)"),
    "triangle one-sided": ("alpha * alpha * tl.abs(z)", "alpha * alpha * z"),
    "atan scale": ("1.57079632679489662", "1.57"),
    "atan not halved": ("return 0.5 * alpha / (1.0", "return alpha / (1.0"),
    "sigmoid without alpha": ("return alpha * s * (1.0 - s)", "return s * (1.0 - s)"),
    "sigmoid slope": ("tl.exp(-alpha * z)", "tl.exp(-z)"),
    "exponential not halved": ("return 0.5 * alpha * tl.exp(", "return alpha * tl.exp("),
    "exponential one-sided": ("tl.exp(-alpha * tl.abs(z))", "tl.exp(-alpha * z)"),
    "soft sign without alpha": ("root = 1.0 + alpha * tl.abs(z)", "root = 1.0 + tl.abs(z)"),
    "soft sign not squared": ("return 0.5 * alpha / (root * root)", "return 0.5 * alpha / root"),
    "super spike with alpha": ("root = 1.0 + tl.abs(z)", "root = 1.0 + alpha * tl.abs(z)"),
    "super spike halved": ("return alpha / (root", "return 0.5 * alpha / (root"),
    "erf scale": ("0.56418958354775629", "0.5642"),
    "erf not squared": ("tl.exp(-scaled * scaled)", "tl.exp(-scaled)"),
    "surrogate at h": ("_derivative(h - v_threshold, alpha", "_derivative(h, alpha"),
    "soft reset gradient sign": ("grad_spike - grad_v * v_threshold", "grad_spike + grad_v * v_threshold"),
    "soft reset gradient never detached": ("if not DETACH:\n            grad_spike = grad_spike - ",
                                           "if True:\n            grad_spike = grad_spike - "),
    "soft reset loses the direct path": ("return grad_spike * g + grad_v\n", "return grad_spike * g\n"),
    "hard reset gradient sign": ("grad_v * (v_reset - h)", "grad_v * (h - v_reset)"),
    "hard reset gradient never detached": ("if not DETACH:\n            grad_spike = grad_spike + ",
                                           "if True:\n            grad_spike = grad_spike + "),
    "hard reset gradient always detached": ("if not DETACH:\n            grad_spike = grad_spike + ",
                                            "if False:\n            grad_spike = grad_spike + "),
    "spike keeps its gradient": ("tl.where(h >= v_threshold, 0.0, grad_v)", "grad_v"),
    "gradient gate at equality": ("tl.where(h >= v_threshold, 0.0, grad_v)", "tl.where(h > v_threshold, 0.0, grad_v)"),
    "load outside": ("return tl.load(pointer + at + i, mask=inside, other=0.0)", "return tl.load(pointer + at + i)"),
    "store outside": ("value.to(pointer.dtype.element_ty), mask=inside)", "value.to(pointer.dtype.element_ty))"),
    "what is not loaded is 1": ("mask=inside, other=0.0", "mask=inside, other=1.0"),
    "default of a missing tensor ignored": (" + otherwise", ""),
    "first neuron of every block for all": ("return _load(pointer, at, i, inside)",
                                            "return _load(pointer, at, i * 0, inside)"),
    "forward one step late": ("at = (first + k) * row + block\n", "at = (first + k + 1) * row + block\n"),
    "gains of the first segment, forward": (f"{CHARGE}if spike", f"{CHARGE}if spike".replace("first + k", "k")),
    "spike above the threshold only": ("tl.where(h >= v_threshold, 1.0, 0.0)", "tl.where(h > v_threshold, 1.0, 0.0)"),
    "potentials before reset": ("_store(v_seq, at, i, inside, v)", "_store(v_seq, at, i, inside, h)"),
    "last potential not written": ("    _store(v_last, block, i, inside, v)\n", ""),
    "potential not handed on": (LATER, LATER.replace(" v,", " v * 0,")),
    "segments overlap": (LATER, LATER.removeprefix("FIRST + ")),
    "first segment left out": ("    if LATER > 0:\n        for segment in range(LATER):\n            v = _forward",
                               "    if LATER > 0:\n        for segment in range(1, LATER):\n            v = _forward"),
    "gains of the first segment, backward": (f"{CHARGE}hs", f"{CHARGE}hs".replace("first + k", "k")),
    "gradient of another step first": ("(first + STEPS - 1) * row_again", "(first + STEPS - 2) * row_again"),
    "backward stops before step 0": ("tl.static_range(STEPS - 1, -1, -1)", "tl.static_range(STEPS - 1, 0, -1)"),
    "gradient of the spikes not moved on": ("        grad_spike = upcoming\n", ""),
    "gradient of the same step again": ("_load(grad_spike_seq, at - row_again,", "_load(grad_spike_seq, at,"),
    "gradient of potentials overwrites": ("grad_v += _load(grad_v_seq", "grad_v = _load(grad_v_seq"),
    "gradient of x without gain": ("grad_h * tl.load(input_gain + t))", "grad_h)"),
    "gradient of x with the gain of the segment": ("tl.load(input_gain + t))", "tl.load(input_gain + k))"),
    "gain's gradient of the segment": ("tl.store(partial_grad_gain + t,", "tl.store(partial_grad_gain + k,"),
    "gain's gradient without x": ("tl.sum(grad_h * x, 0)", "tl.sum(grad_h, 0)"),
    "gain's gradient takes the largest": ("tl.sum(grad_h * x, 0)", "tl.max(grad_h * x, 0)"),
    "gradient carried without decay": ("        grad_v = grad_h * decay\n", "        grad_v = grad_h\n"),
    "programs share a partial sum": ("tl.program_id(0).to(tl.int64) * (FIRST", "0 * (FIRST"),
    "partial sums of the first segment": ("* (FIRST + LATER * SEGMENT)\n", "* FIRST\n"),
    "gradient of the last potential ignored": ("= _load_or(grad_v_last, block,", "= _load_or(None, block,"),
    "initial potential ignored": ("    start = _load_or(v_init, block,", "    start = _load_or(None, block,"),
    "one checkpoint for all segments": ("_store(checkpoints, segment * row + block", "_store(checkpoints, block"),
    "first pass stops early": ("if segment < LATER - 1:", "if segment < LATER - 2:"),
    "checkpoint not restored": ("v = _load(checkpoints, segment * row + block, i, inside)", "v = v"),
    "segments forward": ("segment = LATER - 1 - done", "segment = done"),
    "first segment from the end": ("        0, start, grad_v, x_seq", "        0, start * 0, grad_v, x_seq"),
    "gradient of v_init not written": ("        _store(grad_v_init, block, i, inside, grad_v)\n", "        pass\n"),
    "offsets in 32 bits": ("row = tl.cast(neurons, tl.int64)\n    row_a",
                           "row = tl.cast(neurons, tl.int32)\n    row_a"),
    "no barrier behind the checkpoints": ("        tl.debug_barrier()", "        # tl.debug_barrier()"),
    "addresses kept for the way back": ("row_again = tl.cast(neurons_again", "row_again = tl.cast(neurons"),
}  # fmt: skip


def noticed_by(text: str) -> str:
    """Name of the first check that notices, or "survived"."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "kernel.py").write_text(text)
        child = os.fork()
        if child == 0:
            os._exit(_interpreted(folder))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            return {1: "values", 2: "error"}.get(code, "crash")
        return "machine code" if _machine_code_tests_fail(text, folder / "tree") else "survived"


def _interpreted(folder: Path) -> int:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    try:
        spec = importlib.util.spec_from_file_location("mutated_kernel", folder / "kernel.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["mutated_kernel"] = module
        spec.loader.exec_module(module)
        triton_launch._kernels = lambda: module
        cases.main(0)
    except AssertionError:
        return 1
    except Exception:
        return 2
    return 0


def _machine_code_tests_fail(text: str, tree: Path) -> bool:
    for folder in ("sj_robust", "tests"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__", "trained"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    (tree / "sj_robust" / "ops" / "dlif" / "triton_kernel.py").write_text(text)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "tests/ops/triton/test_ahead_of_time.py",
        "-k",
        "not in_registers",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{tree}{os.pathsep}{tree / 'tests'}"}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True).returncode != 0


def main() -> None:
    """Try every mutant, or those named, and write the result of all beside this file."""
    torch.set_num_threads(1)
    kernel = KERNEL.read_text(encoding="utf-8")
    chosen = {name: MUTANTS[name] for name in sys.argv[1:]} or MUTANTS
    results = {}
    for name, (text, _) in chosen.items():
        assert kernel.count(text) == 1, f"{name}: the text to change occurs {kernel.count(text)} times"
    if chosen is MUTANTS:
        assert noticed_by(kernel) == "survived", "the kernel itself must pass first"
    for name, (text, faulty) in chosen.items():
        results[name] = noticed_by(kernel.replace(text, faulty))
        print(f"{results[name]:12s} {name}", flush=True)
    survivors = sum(result == "survived" for result in results.values())
    summary = {"mutants": len(results), "noticed": len(results) - survivors, "by": results}
    if chosen is MUTANTS:
        (HERE / "mutation.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"{len(results) - survivors} of {len(results)} noticed")


if __name__ == "__main__":
    main()
