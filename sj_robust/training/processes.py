"""The processes of a run: their device, order, interrupts and random generators."""

import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from rich.console import Console

from sj_robust.core.console import working
from sj_robust.ops import keep_heap

__all__ = [
    "TrainingInterrupted",
    "collected_signals",
    "first_process_first",
    "make_accelerator",
    "mixed",
    "random_state",
    "set_random_state",
]


def make_accelerator(
    device: Literal["auto", "cpu"] = "auto", mixed_precision: Literal["no", "fp16", "bf16"] = "no"
) -> Accelerator:
    """Accelerator of a recipe, whose processes wait for each other however long one takes. 创建
    Accelerator。

    On a CPU the process keeps freed memory for the next step, see :func:`sj_robust.ops.keep_heap`.

    Args:
        device: ``"auto"`` takes a GPU if there is one.
        mixed_precision: Accelerate's precision.

    Raises:
        ValueError: If the device does not have the precision.

    Examples:
        >>> make_accelerator("cpu").device
        device(type='cpu')
    """
    on_gpu = device == "auto" and torch.cuda.is_available()
    if not on_gpu:
        keep_heap()
    # A process that is done waits for the slowest one, which may evaluate for hours.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=30))
    return Accelerator(cpu=not on_gpu, mixed_precision=mixed_precision, kwargs_handlers=[patience])


@contextmanager
def first_process_first(accelerator: Accelerator, text: str) -> Iterator[None]:
    """What the first process does before the others do it too, with progress on its console.
    主进程先执行。

    Args:
        accelerator: The processes.
        text: What is done.

    Examples:
        >>> with first_process_first(make_accelerator("cpu"), "loading"):
        ...     print("images")
        loading
        images
    """
    console = Console(quiet=not accelerator.is_main_process, highlight=False, soft_wrap=True)
    with accelerator.main_process_first(), working(text, console):
        yield


class TrainingInterrupted(Exception):  # noqa: N818  # an interruption asked for is not an error
    """A signal stopped the training after a whole step and a checkpoint.

    Attributes:
        signal_number: The signal; the conventional exit code is 128 plus this.
    """

    def __init__(self, signal_number: int, checkpoint: Path) -> None:
        """Keep the signal and say where the checkpoint is."""
        super().__init__(
            f"stopped by {signal.Signals(signal_number).name}; {checkpoint} continues with --resume"
        )
        self.signal_number = signal_number


@contextmanager
def collected_signals() -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM instead of stopping; a second one acts as it did
    before.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def receive(number: int, frame: object) -> None:
        received.append(number)
        restore()

    for number in previous:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()


def mixed(*numbers: int) -> int:
    """A seed that differs for every tuple of numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def random_state() -> dict[str, Any]:
    """State of every global random generator, in types that a checkpoint may hold."""
    # The global state of numpy is what other libraries draw from.
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002  # see above
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    return {
        "python": random.getstate(),
        "numpy": numpy,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put every global random generator into a state of :func:`random_state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002  # as above
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
