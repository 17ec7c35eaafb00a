"""Body of one process of ``gpu_run``: the rows of one method, one JSON object a line as they come.

``{"begun": i}`` comes before case i and ``{"done": i, ...}`` after it, which tells the reader where
a process died.
"""

import gc
import json
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lab.benchmarking.gpu_plan import PLAN, Part
from lab.benchmarking.task import Task, times_of
from sj_robust._host import quiet_triton

_SECONDS = 20.0
"""A case that has taken so long is content with the passes it has, if there are three."""


def main(
    part: Part, method: str, device: str, rounds: int, cases: Sequence[tuple[str, tuple[int, ...]]]
) -> None:
    """Measure each case, and say why where that fails; end where the device is of no more use."""
    warnings.simplefilter("ignore")  # of peers
    quiet_triton()
    for number, (precision, shape) in enumerate(cases):
        _say({"begun": number})
        try:
            facts = measure(
                lambda shape, of=precision: part.make(method, of, shape),
                device,
                tuple(shape),
                rounds,
            )
        except Exception as error:  # whatever goes wrong with one row is that row's affair
            facts = {"reason": f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]}
        _say({"done": number, **facts})
        if "reason" in facts and not _is_healthy(device):
            os._exit(
                3
            )  # an illegal access leaves every later call of this process without a device


def measure(
    make: Callable[..., Task], device: str, shape: tuple[int, ...], rounds: int
) -> dict[str, Any]:
    """Check and time one case; where memory is short with half the batch, and half of that."""
    while True:
        try:
            with torch.device(device):
                task = make(shape)
                task.check()
            return {
                "shape": list(shape),
                "tensor_mb": task.tensor_bytes / 1e6,
                **_timed(task, device, rounds),
            }
        except Exception as error:
            if not is_out_of_memory(error) or shape[1] == 1:
                raise
        task = None  # type: ignore[assignment]  # frees the memory
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        shape = (shape[0], shape[1] // 2, *shape[2:])


def is_out_of_memory(error: Exception) -> bool:
    """Torch's error on either device, and that of CuPy."""
    said = str(error).lower()
    return (
        "OutOfMemory" in type(error).__name__
        or "out of memory" in said
        or "can't allocate memory" in said
    )


def _timed(task: Task, device: str, rounds: int) -> Mapping[str, float]:
    """Milliseconds of the forward and the backward pass, of the host alone, and the peak of the
    memory.
    """
    for _ in range(3):  # compiles, finds algorithms, fills the allocator
        task.backward(task.forward())
    peak = _peak_bytes(task, device)
    passes: list[tuple[float, float]] = []
    host: list[float] = []
    begun = time.monotonic()
    while len(passes) < rounds and (len(passes) < 3 or time.monotonic() - begun < _SECONDS):
        begin = _mark(device)
        start = time.perf_counter()
        result = task.forward()
        middle = _mark(device)
        task.backward(result)
        del result  # with its graph, before the next pass makes one
        end = _mark(device)
        host.append(1e3 * (time.perf_counter() - start))
        passes.append((_between(device, begin, middle), _between(device, middle, end)))
    return times_of(passes) | {"host": statistics.median(host), "peak_mb": peak / 1e6}


def _mark(device: str) -> Any:
    """A moment: on a GPU, where calls only queue their work, an event in that queue."""
    if device == "cpu":
        return time.perf_counter()
    # untyped in torch
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _between(device: str, first: Any, last: Any) -> float:
    """Milliseconds from one mark to another."""
    if device == "cpu":
        return 1e3 * float(last - first)
    torch.cuda.synchronize()
    return float(first.elapsed_time(last))


def _peak_bytes(task: Task, device: str) -> float:
    if device == "cpu":
        return math.nan
    for tensor in task.inputs:
        tensor.grad = None  # the gradients of this pass are part of its peak
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    task.backward(task.forward())
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _is_healthy(device: str) -> bool:
    try:
        return device == "cpu" or float(torch.ones(1, device=device).sum()) == 1.0
    except RuntimeError:
        return False


def _say(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main(PLAN[sys.argv[1]], sys.argv[2], sys.argv[3], int(sys.argv[4]), json.loads(sys.argv[5]))
