"""Body of one process of :func:`sj_robust.benchmarking.race`: weigh a method once, then time a pass per order."""

import json
import sys
import threading
import time
import warnings
from collections.abc import Callable
from ctypes import CDLL, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sj_robust.benchmarking.methods import Layer, build

_SAME_DYNAMICS = ("DLIF", "SpikingJelly")
"""Methods that must spike as the reference does; the others reset a step later, so only their range is checked."""


def main(method: str, shape: tuple[int, ...], threads: int) -> None:
    """Answer every line of standard input with the seconds of one forward and one backward pass."""
    warnings.simplefilter("ignore")  # of peers; this package is silent
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    facts: dict[str, Any] = {}
    if method == "copy":
        once = _copy(shape, threads)
    else:
        try:
            layer = build(method, shape[0])
        except (ImportError, RuntimeError) as error:
            _answer({"missing": str(error)})
            return
        _refuse_unless_right(method, layer, shape[0])
        x_seq, grad = torch.randn(shape).mul_(0.5).requires_grad_(), torch.randn(shape)

        def once() -> tuple[float, float]:
            return _timed_pass(layer, x_seq, grad)

        tensor = 4 * x_seq.numel()
        facts = {"saved_tensors": _saved_bytes(layer, x_seq) / tensor, "peak_tensors": _peak_bytes(once) / tensor}
    once()
    _answer(facts)
    for _ in sys.stdin:
        _answer(once())


def _answer(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _timed_pass(layer: Layer, x_seq: Tensor, grad: Tensor) -> tuple[float, float]:
    """Seconds of the forward and of the backward pass; results are dropped, as after a training step."""
    x_seq.grad = None
    start = time.perf_counter()
    spikes = layer(x_seq)
    middle = time.perf_counter()
    torch.autograd.backward(spikes, grad)
    return middle - start, time.perf_counter() - middle


def _refuse_unless_right(method: str, layer: Layer, T: int) -> None:
    """Compare spikes and gradients with the reference before anything is timed."""
    x_seq = torch.randn(T, 3, 1000).mul_(0.7).requires_grad_()
    spikes = layer(x_seq)
    if not bool(((spikes == 0) | (spikes == 1)).all()):
        raise SystemExit(f"{method} gives spikes that are neither 0 nor 1: it is not timed")
    if not method.startswith(_SAME_DYNAMICS):
        return
    reference = build("textbook loop", T)(x_seq)
    weights = torch.randn_like(x_seq)
    (grad,) = torch.autograd.grad((spikes * weights).sum(), x_seq)
    (wanted,) = torch.autograd.grad((reference * weights).sum(), x_seq)
    # a neuron whose spikes differ by rounding at the threshold is left out; there may be one in a thousand
    same = (spikes == reference).all(0)
    if float(same.float().mean()) < 0.999 or not torch.allclose(grad[:, same], wanted[:, same], rtol=1e-3, atol=1e-4):
        raise SystemExit(f"{method} does not equal the reference: it is not timed")


def _saved_bytes(layer: Layer, x_seq: Tensor) -> int:
    """Bytes that the graph keeps alive beyond the input; the last potential, a state, belongs to it."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x_seq)
    storages.pop(x_seq.untyped_storage().data_ptr(), None)
    return sum(size for size in storages.values() if size > 4096)  # gains and thresholds do not count


def _peak_bytes(once: Callable[[], Any]) -> float:
    """Growth of the resident set at its highest during a pass; NaN where Linux does not tell."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return float("nan")

    def kilobytes(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))

    reset.write_text("5")  # peak := present
    before = kilobytes("VmRSS:")
    once()
    return 1024 * (kilobytes("VmHWM:") - before)


def _copy(shape: tuple[int, ...], threads: int) -> Callable[[], tuple[float, float]]:
    """Seconds to copy one tensor with the C library's memcpy, each thread its share: the speed of this memory."""
    memcpy = CDLL(None).memcpy
    memcpy.argtypes = (c_void_p, c_void_p, c_size_t)
    source, target = torch.zeros(shape), torch.zeros(shape)
    share = source.numel() // threads * 4

    def once() -> tuple[float, float]:
        parts = [
            threading.Thread(target=memcpy, args=(target.data_ptr() + i * share, source.data_ptr() + i * share, share))
            for i in range(threads)
        ]
        start = time.perf_counter()
        for part in parts:
            part.start()
        for part in parts:
            part.join()
        return time.perf_counter() - start, 0.0

    return once


if __name__ == "__main__":
    main(sys.argv[1], tuple(json.loads(sys.argv[2])), int(sys.argv[3]))
