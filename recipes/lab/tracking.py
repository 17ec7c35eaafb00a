"""Trackers of Accelerate, such as Weights & Biases, that every epoch is told to."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

__all__ = ["tracked"]


@contextmanager
def tracked(
    accelerator: Accelerator, folder: Path, name: str, configuration: Mapping[str, Any]
) -> Iterator[None]:
    """Within it ``accelerator.log`` goes to a run of its own in every tracker that the accelerator
    was made with. 实验跟踪器。

    Args:
        accelerator: The processes, with ``log_with``.
        folder: Folder of the run, where trackers that write files write.
        name: Name of the network.
        configuration: Options in plain data.

    Examples:
        >>> with tracked(Accelerator(cpu=True), Path("runs/mine"), "dlif_at", {"T": 4}):
        ...     pass
    """
    if not accelerator.log_with:
        yield
        return
    of_wandb = {"name": f"{folder.name}/{name}", "dir": str(folder)}
    accelerator.init_trackers(
        "sj_robust", config=dict(configuration), init_kwargs={"wandb": of_wandb}
    )
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers = []  # the next network has a run of its own
