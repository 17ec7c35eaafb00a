"""The processes of a recipe: their device, who goes first, and trackers, such as Weights & Biases,
that every epoch is told to.
"""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from rich.console import Console

from sj_robust.core.console import working
from sj_robust.ops import keep_heap

__all__ = ["first_process_first", "make_accelerator", "tracked"]


def make_accelerator(
    device: Literal["auto", "cpu"] = "auto",
    mixed_precision: Literal["no", "fp16", "bf16"] = "no",
    trackers: Sequence[str] = (),
) -> Accelerator:
    """Accelerator of a recipe, whose processes wait for each other however long one takes. 创建
    Accelerator。

    On a CPU the process keeps freed memory for the next step, see :func:`sj_robust.ops.keep_heap`.

    Args:
        device: ``"auto"`` takes a GPU if there is one.
        mixed_precision: Accelerate's precision.
        trackers: Accelerate's trackers by name, see :func:`tracked`.

    Raises:
        ValueError: If the device does not have the precision.

    Warns:
        UserWarning: If ``accelerate launch`` or its configuration asks for another precision.

    Examples:
        >>> make_accelerator("cpu").device
        device(type='cpu')
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", mixed_precision):
        warnings.warn(
            f"accelerate's mixed precision {asked} is not used, but {mixed_precision}: give the "
            f"training --mixed-precision {asked} (fp16 and bf16 are known)",
            stacklevel=2,
        )
    on_gpu = device == "auto" and torch.cuda.is_available()
    if not on_gpu:
        keep_heap()
    # A process that is done waits for the slowest one, which may evaluate for hours.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=30))
    return Accelerator(
        cpu=not on_gpu,
        mixed_precision=mixed_precision,
        log_with=list(trackers) or None,
        kwargs_handlers=[patience],
    )


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
