"""Plants faults in the Triton texts one by one and records which check notices each; run by hand,
takes minutes.

``TRITON_INTERPRET=1 python -m ops.triton.mutate`` in ``tests/`` rewrites ``mutation.json``; with a
part of the names of faults it tries these alone. A fault goes through the interpreter's cases in a
process forked from this one; one that survives goes through the tests of the machine code.
"""

import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from ops import planted
from ops.triton import cases, stage_cases

from sj_robust.ops.bn_dlif import triton_launch as stage_launch
from sj_robust.ops.dlif import triton_launch

DLIF, BN_DLIF = (f"sj_robust/ops/{folder}/triton_kernel.py" for folder in ("dlif", "bn_dlif"))
CHECKS = {  # of a text: its cases, what loads it, and the tests of its machine code
    DLIF: (cases, triton_launch, "not in_registers and not one_pass"),
    BN_DLIF: (stage_cases, stage_launch, "one_pass"),
}
CHARGE = """h = charge(v, x, tl.load(input_gain + first + k), decay, leak_current, RESET)
        v = reset(h, v_threshold, v_reset, RESET)
        """
LATER = "FIRST + segment * SEGMENT, v, x_seq, input_gain, spike_seq"
MUTANTS = {
    DLIF: {  # what is wrong: (text, faulty text); the text occurs once
        "decay forgotten": ("h = v * decay + x * gain", "h = v + x * gain"),
        "gain forgotten": ("h = v * decay + x * gain", "h = v * decay + x"),
        "leak current forgotten": ("        h = h + leak_current\n", "        h = h\n"),
        "soft reset adds": ("h - v_threshold, h)", "h + v_threshold, h)"),
        "soft reset above the threshold only": (
            "(h >= v_threshold, h - v",
            "(h > v_threshold, h - v",
        ),
        "hard reset above the threshold only": (
            "(h >= v_threshold, v_reset",
            "(h > v_threshold, v_reset",
        ),
        "v_reset forgotten": (
            "return tl.where(h >= v_threshold, v_reset, h)",
            "return tl.where(h >= v_threshold, 0.0, h)",
        ),
        "triangle not clipped": ("tl.where(height < 0.0, 0.0, height)", "height"),
        "triangle hides what is not a number": (
            "tl.where(height < 0.0, 0.0, height)",
            "tl.maximum(height, 0.0)",
        ),
        "triangle slope alpha": ("alpha - alpha * alpha * tl.abs(z)", "alpha - alpha * tl.abs(z)"),
        "triangle one-sided": ("alpha * alpha * tl.abs(z)", "alpha * alpha * z"),
        "atan scale": ("1.57079632679489662", "1.57"),
        "atan not halved": ("return 0.5 * alpha / (1.0", "return alpha / (1.0"),
        "sigmoid without alpha": ("return alpha * s * (1.0 - s)", "return s * (1.0 - s)"),
        "sigmoid slope": ("tl.exp(-alpha * z)", "tl.exp(-z)"),
        "exponential not halved": ("return 0.5 * alpha * tl.exp(", "return alpha * tl.exp("),
        "exponential one-sided": ("tl.exp(-alpha * tl.abs(z))", "tl.exp(-alpha * z)"),
        "soft sign without alpha": ("root = 1.0 + alpha * tl.abs(z)", "root = 1.0 + tl.abs(z)"),
        "soft sign not squared": (
            "return 0.5 * alpha / (root * root)",
            "return 0.5 * alpha / root",
        ),
        "super spike with alpha": ("root = 1.0 + tl.abs(z)", "root = 1.0 + alpha * tl.abs(z)"),
        "super spike halved": ("return alpha / (root", "return 0.5 * alpha / (root"),
        "erf scale": ("0.56418958354775629", "0.5642"),
        "erf not squared": ("tl.exp(-scaled * scaled)", "tl.exp(-scaled)"),
        "surrogate at h": ("_derivative(h - v_threshold, alpha", "_derivative(h, alpha"),
        "soft reset gradient sign": (
            "grad_spike - grad_v * v_threshold",
            "grad_spike + grad_v * v_threshold",
        ),
        "soft reset gradient never detached": (
            "if not DETACH:\n            grad_spike = grad_spike - ",
            "if True:\n            grad_spike = grad_spike - ",
        ),
        "soft reset loses the direct path": (
            "return grad_spike * g + grad_v\n",
            "return grad_spike * g\n",
        ),
        "hard reset gradient sign": ("grad_v * (v_reset - h)", "grad_v * (h - v_reset)"),
        "hard reset gradient never detached": (
            "if not DETACH:\n            grad_spike = grad_spike + ",
            "if True:\n            grad_spike = grad_spike + ",
        ),
        "hard reset gradient always detached": (
            "if not DETACH:\n            grad_spike = grad_spike + ",
            "if False:\n            grad_spike = grad_spike + ",
        ),
        "spike keeps its gradient": ("tl.where(h >= v_threshold, 0.0, grad_v)", "grad_v"),
        "gradient gate at equality": (
            "tl.where(h >= v_threshold, 0.0, grad_v)",
            "tl.where(h > v_threshold, 0.0, grad_v)",
        ),
        "load outside": (
            "return tl.load(pointer + at + i, mask=inside, other=0.0)",
            "return tl.load(pointer + at + i)",
        ),
        "store outside": (
            "value.to(pointer.dtype.element_ty), mask=inside)",
            "value.to(pointer.dtype.element_ty))",
        ),
        "what is not loaded is 1": ("mask=inside, other=0.0", "mask=inside, other=1.0"),
        "default of a missing tensor ignored": (" + otherwise", ""),
        "first neuron of every block for all": (
            "return load(pointer, at, i,",
            "return load(pointer, at, i * 0,",
        ),
        "forward one step late": (
            "at = (first + k) * row + block\n",
            "at = (first + k + 1) * row + block\n",
        ),
        "gains of the first segment, forward": (
            f"{CHARGE}if spike",
            f"{CHARGE}if spike".replace("first + k", "k"),
        ),
        "spike above the threshold only": (
            "tl.where(h >= v_threshold, 1.0, 0.0)",
            "tl.where(h > v_threshold, 1.0, 0.0)",
        ),
        "potentials before reset": (
            "store(v_seq, at, i, inside, v)",
            "store(v_seq, at, i, inside, h)",
        ),
        "last potential not written": ("    store(v_last, block, i, inside, v)\n", ""),
        "potential not handed on": (LATER, LATER.replace(" v,", " v * 0,")),
        "segments overlap": (LATER, LATER.removeprefix("FIRST + ")),
        "first segment left out": (
            "0:\n        for done in range(LATER):",
            "0:\n        for done in range(1, LATER):",
        ),
        "gains of the first segment, backward": (
            f"{CHARGE}hs",
            f"{CHARGE}hs".replace("first + k", "k"),
        ),
        "gradient of another step first": (
            "(first + STEPS - 1) * row_again",
            "(first + STEPS - 2) * row_again",
        ),
        "backward stops before step 0": (
            "tl.static_range(STEPS - 1, -1, -1)",
            "tl.static_range(STEPS - 1, 0, -1)",
        ),
        "gradient of the spikes not moved on": ("        grad_spike = upcoming\n", ""),
        "gradient of the same step again": (
            "load(grad_spike_seq, at - row_again,",
            "load(grad_spike_seq, at,",
        ),
        "gradient of potentials overwrites": (
            "grad_v += load(grad_v_seq",
            "grad_v = load(grad_v_seq",
        ),
        "gradient of x without gain": ("grad_h * tl.load(input_gain + t))", "grad_h)"),
        "gradient of x with the gain of the segment": (
            "tl.load(input_gain + t))",
            "tl.load(input_gain + k))",
        ),
        "gain's gradient of the segment": (
            "tl.store(partial_grad_gain + t,",
            "tl.store(partial_grad_gain + k,",
        ),
        "gain's gradient without x": ("tl.sum(grad_h * x, 0)", "tl.sum(grad_h, 0)"),
        "gain's gradient takes the largest": ("tl.sum(grad_h * x, 0)", "tl.max(grad_h * x, 0)"),
        "gradient carried without decay": (
            "        grad_v = grad_h * decay\n",
            "        grad_v = grad_h\n",
        ),
        "programs share a partial sum": ("tl.program_id(0).to(tl.int64) * (FIRST", "0 * (FIRST"),
        "partial sums of the first segment": ("* (FIRST + LATER * SEGMENT)\n", "* FIRST\n"),
        "gradient of the last potential ignored": (
            "= load_or(grad_v_last, block,",
            "= load_or(None, block,",
        ),
        "initial potential ignored": (
            "    start = load_or(v_init, block,",
            "    start = load_or(None, block,",
        ),
        "one checkpoint for all segments": (
            "store(checkpoints, segment * row + block",
            "store(checkpoints, block",
        ),
        "first pass stops early": ("if segment < LATER - 1:", "if segment < LATER - 2:"),
        "checkpoint not restored": (
            "v = load(checkpoints, segment * row + block, i, inside)",
            "v = v",
        ),
        "segments forward": ("segment = LATER - 1 - done", "segment = done"),
        "first segment from the end": (
            "        0, start, grad_v, x_seq",
            "        0, start * 0, grad_v, x_seq",
        ),
        "gradient of v_init not written": (
            "        store(grad_v_init, block, i, inside, grad_v)\n",
            "        pass\n",
        ),
        "offsets in 32 bits": (
            "= tl.cast(neurons, tl.int64)\n    row_a",
            "= tl.cast(neurons, tl.int32)\n    row_a",
        ),
        "no barrier behind the checkpoints": (
            "        tl.debug_barrier()",
            "        # tl.debug_barrier()",
        ),
        "addresses kept for the way back": (
            "row_again = tl.cast(neurons_again",
            "row_again = tl.cast(neurons",
        ),
    },
    BN_DLIF: {
        "sample of the first position for all": (
            "return first // rows, line //",
            "return first // rows, first //",
        ),
        "lines of a plane in a row": (
            "line // rows, line % rows, column",
            "line // rows, line % 1, column",
        ),
        "next line not begun": ("column = at % span", "column = at"),
        "channel of the first program": (
            "(program * CHANNELS + tl.arange",
            "(0 * CHANNELS + tl.arange",
        ),
        "channels last as planes": (
            "sample * plane + pixel) * channels + c",
            "sample * channels + c) * plane + pixel",
        ),
        "second row of a window is the first": (
            "tl.arange(0, 2)[:, None, None]",
            "0 * tl.arange(0, 2)[:, None, None]",
        ),
        "members of a window the other way round": (
            "row = 2 * row + member // 2",
            "row = 2 * row + member % 2",
        ),
        "third member is the first": ("column = 2 * column + member % 2", "column = 2 * column"),
        "odd width as it is": ("span = width + width % 2", "span = width"),
        "odd height without its last row": ("rows = (height + 1) // 2", "rows = height // 2"),
        "row outside of the plane": (
            "< samples) & (row < height) & (column < width",
            "< samples) & (column < width",
        ),
        "column outside of the plane": ("(row < height) & (column < width)", "(row < height)"),
        "sample outside of the batch": (
            "inside = (sample < samples) & (row < height)",
            "inside = (row < height)",
        ),
        "channel outside of the tensor": ("(column < width) & (c < channels)", "(column < width)"),
        "odd width has a window more": (
            "columns = units * UNIT // 2",
            "columns = (units * UNIT + 1) // 2",
        ),
        "windows of the last row": ("rows = height // 2", "rows = (height + 1) // 2"),
        "tile begins with the first sample": (
            "\n    return first.to(tl.int64)",
            "\n    return 0 * first.to(tl.int64)",
        ),
        "sum of a window": ("0.25 * s[None, :, :]", "s[None, :, :]"),
        "windows of one row": ("s = tl.sum(s, 0)\n", "s = tl.max(s, 0)\n"),
        "larger of two columns": ("s = tl.sum(tl.reshape(s,", "s = tl.max(tl.reshape(s,"),
        "gradient of a window for each neuron": ("g = 0.25 * means", "g = 1.0 * means"),
        "gradient of the mean in the order of rows": (
            "tl.broadcast_to(g[:, :, None, :], [1, g.shape[1], 2, g.shape[2]])",
            "tl.broadcast_to(g[:, None, :, :], [1, 2, g.shape[1], g.shape[2]])",
        ),
        "scale for offset": (
            "_of_channels(moments, 3, c, channels)",
            "_of_channels(moments, 2, c, channels)",
        ),
        "variance for scale": (
            "return _of_channels(moments, 2, c,",
            "return _of_channels(moments, 1, c,",
        ),
        "current without offset": ("return x * affine[0] + affine[1]", "return x * affine[0]"),
        "spikes above the threshold only": (
            "tl.where(h >= v_threshold, 1.0, 0.0)",
            "tl.where(h > v_threshold, 1.0, 0.0)",
        ),
        "means in the rows of neurons": (
            "_store_spikes(spike_seq, t * window_row,",
            "_store_spikes(spike_seq, t * row,",
        ),
        "x of a repeated step moves on, forward": (
            "(load(x_seq, t * x_row + block",
            "(load(x_seq, t * row + block",
        ),
        "x of a repeated step moves on, backward": (
            "load(x_seq, (first + k) * x_row",
            "load(x_seq, (first + k) * row",
        ),
        "x of a repeated step moves on, way back": (
            "x = load(x_seq, t * x_row_again",
            "x = load(x_seq, t * row",
        ),
        "currents not normalised": (
            ", t * row + block, i, inside, y)",
            ", t * row + block, i, inside, h)",
        ),
        "potential not handed on": (
            "FIRST + segment * SEGMENT, v, x_seq, affine, input_gain, spike_seq",
            "FIRST + segment * SEGMENT, v * 0, x_seq, affine, input_gain, spike_seq",
        ),
        "gradient of means in the rows of neurons": (
            "load(grad_spike_seq, t * window_row",
            "load(grad_spike_seq, t * row",
        ),
        "gain's gradient from x": ("tl.sum(grad_h * _current(x, affine))", "tl.sum(grad_h * x)"),
        "gradient of the current forgotten": (
            "grad_x += load(grad_current_seq",
            "grad_x += 0 * load(grad_current_seq",
        ),
        "gradient of x without gain": (
            "grad_x = grad_h * tl.load(input_gain + t)",
            "grad_x = grad_h",
        ),
        "sum of the last step": ("grad_sum += grad_x", "grad_sum = grad_x"),
        "product with x, not with its distance": (
            "product_sum += grad_x * (x - mean)",
            "product_sum += grad_x * x",
        ),
        "gradient of x without scale": ("grad_x = grad_x * affine[0]", "grad_x = grad_x"),
        "slope of x, not of its distance": ("+ (x - mean) * slopes[0]", "+ x * slopes[0]"),
        "constant forgotten": ("(x - mean) * slopes[0] + slopes[1]\n", "(x - mean) * slopes[0]\n"),
        "gradient carried without decay": ("grad_v = grad_h * decay", "grad_v = grad_h"),
        "partial sums of the first segment": ("* (FIRST + LATER * SEGMENT)\n", "* FIRST\n"),
        "sums begin anew in every segment": (
            "* SEGMENT, v, grad_v, grad_sum,",
            "* SEGMENT, v, grad_v, grad_sum * 0,",
        ),
        "one checkpoint for all segments": (
            "store(checkpoints, segment * row + block",
            "store(checkpoints, block",
        ),
        "segments forward": ("segment = LATER - 1 - done", "segment = done"),
        "gradient of the last potential ignored": (
            "= load_or(grad_v_last, block,",
            "= load_or(None, block,",
        ),
        "gradient of v_init not written": (
            "        store(grad_v_init, block, i, inside, grad_v)\n",
            "        pass\n",
        ),
        "gradient of a repeated step without scale": ("grad_sum * affine[0])", "grad_sum)"),
        "sums share a row": (
            "at = program.to(tl.int64) * (2 * channels)",
            "at = program.to(tl.int64) * 0",
        ),
        "sums of the members apart": ("tl.sum(tl.sum(other, 0), 0)", "tl.sum(tl.max(other, 0), 0)"),
        "first x of the tensor for every channel": (
            ", c * _to_next_channel(units",
            ", 0 * c * _to_next_channel(units",
        ),
        "statistics of the same tile again": ("program * COUNT + k, c,", "program * COUNT, c,"),
        "what is outside counts": (
            "tl.where(inside, load(x_seq, block, i, inside).to(tl.float32) - near, 0.0)",
            "load(x_seq, block, i, inside).to(tl.float32) - near",
        ),
        "squares of x": ("other += d * d", "other += (d + near) * (d + near)"),
        "mean as the distance": ("mean = near + distance", "mean = distance"),
        "variance about another mean": ("- distance * distance", ""),
        "eps forgotten": (
            "scale = 1.0 / tl.sqrt(variance + EPS)",
            "scale = 1.0 / tl.sqrt(variance)",
        ),
        "weight forgotten": ("load(weight, 0, c, inside).to(tl.float64) * scale", "1.0 * scale"),
        "bias without the mean": (
            "inside).to(tl.float64) - mean * scale",
            "inside).to(tl.float64)",
        ),
        "mean without scale": ("offset = -mean * scale", "offset = -mean"),
        "weight's gradient without deviation": ("product_sum * inverse_std)", "product_sum)"),
        "slope of a sum": ("inverse_std * product_sum / count", "inverse_std * product_sum"),
        "constant of a sum": ("-scale * grad_sum / count", "-scale * grad_sum"),
        "no barrier behind the checkpoints": (
            "        tl.debug_barrier()",
            "        # tl.debug_barrier()",
        ),
        "addresses in 32 bits": (
            "tl.cast(neurons, tl.int64), tl.cast(window_row, tl.int64)\n    x_row_again",
            "tl.cast(neurons, tl.int32), tl.cast(window_row, tl.int64)\n    x_row_again",
        ),
        "addresses of an odd span": ("if UNIT > 1:", "if UNIT > 99:"),
    },
}


def noticed_by(file: str, text: str) -> str | None:
    """Name of the first check that notices."""
    checks, launcher, tests = CHECKS[file]
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name)
        planted.copy_tree(tree)
        (tree / file).write_text(text)
        child = os.fork()
        if child == 0:
            os._exit(_interpreted(checks, launcher, tree / file))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            return {1: "values", 2: "error"}.get(code, "crash")
        arguments = ["tests/ops/triton/test_ahead_of_time.py", "-m", "", "-k", tests]
        return (
            "machine code"
            if planted.first_failure(tree, *arguments, TRITON_INTERPRET="0")
            else None
        )


def _interpreted(checks: Any, launcher: Any, kernel: Path) -> int:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    try:
        spec = importlib.util.spec_from_file_location("mutated_kernel", kernel)
        module = importlib.util.module_from_spec(spec)
        sys.modules["mutated_kernel"] = module
        spec.loader.exec_module(module)
        launcher._kernels = lambda: module
        checks.main(0)
    except AssertionError:
        return 1
    except Exception:
        return 2
    return 0


def main() -> None:
    """Try every mutant, or those named, and write the result of all beside this file."""
    torch.set_num_threads(1)
    for file in CHECKS:
        assert noticed_by(file, (planted.ROOT / file).read_text()) is None, (
            "the kernel itself must pass first"
        )
    faults = {
        f"{Path(file).parent.name}: {wrong}": (file, *pair)
        for file, pairs in MUTANTS.items()
        for wrong, pair in pairs.items()
    }
    planted.try_faults(
        faults, noticed_by, "".join(sys.argv[1:]), Path(__file__).with_name("mutation.json")
    )


if __name__ == "__main__":
    main()
