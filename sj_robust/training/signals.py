"""Interrupts that wait for the end of a step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["TrainingInterrupted", "collected_signals"]


class TrainingInterrupted(Exception):  # noqa: N818  # an interruption asked for is not an error
    """A signal stopped the training after a whole step and a checkpoint.

    Attributes:
        signal_number: The signal; the conventional exit code is 128 plus this.
    """

    def __init__(self, signal_number: int, checkpoint: Path) -> None:
        """Keep the signal and say where the checkpoint is."""
        super().__init__(f"stopped by {signal.Signals(signal_number).name}; {checkpoint} continues with --resume")
        self.signal_number = signal_number


@contextmanager
def collected_signals() -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM instead of stopping; a second one acts as it did before."""
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
