"""The processes of a run: interrupts and random generators."""

import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = [
    "TrainingInterrupted",
    "collected_signals",
    "mixed",
    "random_state",
    "set_random_state",
]


class TrainingInterrupted(Exception):  # noqa: N818  # an interruption asked for is not an error
    """A signal stopped the training; the current step was completed and a checkpoint was written.

    Attributes:
        signal_number: The signal; the conventional exit code is 128 plus this number.
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
