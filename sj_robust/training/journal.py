"""What a run records of every epoch: console, log file, TensorBoard, and warnings."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from torch.utils.tensorboard import SummaryWriter

from sj_robust.core.console import moving, working, write_over
from sj_robust.core.environment import bfloat16_units, environment
from sj_robust.evaluation.report.pictures import Gallery

__all__ = ["EpochRecord", "Journal", "catastrophic_overfitting", "changed_options"]

Track = Callable[[dict[str, float], int], None]
"""What is told the figures of an epoch, and its number."""

_BAR = 12
_AROUND_STATUS = _BAR + 14
"""Columns of a line of progress that are taken by the bar, the time left and what is between
them.
"""


@dataclass(frozen=True)
class EpochRecord:
    """The figures of one epoch. 单轮训练记录。

    Attributes:
        epoch: Number of the epoch, from 1.
        losses: Mean over the epoch's batches of every field of ``Losses``, and of every penalty
            before its weight as ``"penalty/NAME"``.
        validation: Validation accuracy in [0, 1], ``"clean"`` and under each attack.
        lr: Learning rate of the epoch.

    Examples:
        >>> EpochRecord(1, {"total": 2.3}, {"clean": 0.5, "fgsm": 0.2, "pgd": 0.1}, 0.1).validation[
        ...     "pgd"
        ... ]
        0.1
    """

    epoch: int
    losses: dict[str, float]
    validation: dict[str, float]
    lr: float


def catastrophic_overfitting(history: Sequence[EpochRecord]) -> str | None:
    """A warning if the last epoch looks like catastrophic overfitting of single-step training.
    检测灾难性过拟合。

    The network then fools the single-step attack alone: accuracy under FGSM rises above that on
    clean images, or far above that under PGD, while the latter falls. The rule: PGD has lost 10
    points or half of its best so far, and FGSM is above clean by 2 points or above PGD by 30.

    Args:
        history: Records of all epochs so far; their validation has ``"clean"``, ``"fgsm"`` and
            ``"pgd"``.

    Source: Wong et al., "Fast is better than free" (ICLR 2020), section 5.4, where the failure was
        described.

    Examples:
        >>> good = EpochRecord(1, {}, {"clean": 0.9, "fgsm": 0.6, "pgd": 0.5}, 0.1)
        >>> bad = EpochRecord(2, {}, {"clean": 0.8, "fgsm": 0.95, "pgd": 0.0}, 0.1)
        >>> catastrophic_overfitting([good]), catastrophic_overfitting([good, bad]) is None
        (None, False)
    """
    if not history:
        return None
    best = max(record.validation["pgd"] for record in history)
    now = history[-1].validation
    clean, fgsm, pgd = now["clean"], now["fgsm"], now["pgd"]
    fallen = pgd < max(best - 0.1, best / 2)
    if not (fallen and (fgsm > clean + 0.02 or fgsm > pgd + 0.3)):
        return None
    return (
        f"catastrophic overfitting at epoch {history[-1].epoch}: validation accuracy is "
        f"{fgsm:.1%} under FGSM but {pgd:.1%} under PGD (best so far {best:.1%}), clean "
        f"{clean:.1%}; the network has learnt to fool the single-step attack. Try a smaller "
        "step_size, more noise at the start or fewer epochs"
    )


class Journal:
    """Writes ``log.txt`` and ``tensorboard/`` in a folder and shows progress on the console.
    训练日志。

    On a terminal, a bar shows the parts of the loss, accuracy, images per second and remaining time
    at every step; in a notebook, one line is overwritten; otherwise, one line is printed per epoch.
    Images per second include the time for perturbed images, but not validation.

    Args:
        folder: Where to write; None makes a silent journal, for all processes except the first.
        track: Called after every epoch with its figures by name and its number, such as
            ``accelerator.log``.

    Attributes:
        console: The console that it prints to; lines printed to it do not break the progress bar.

    Examples:
        >>> Journal(None).say("nobody hears this")
    """

    def __init__(self, folder: Path | None, track: Track | None = None) -> None:
        """Nothing is written yet; a resumed run continues the log that is there."""
        self._folder = folder
        self._track = track
        self.console = Console(quiet=folder is None, highlight=False, soft_wrap=True)
        self._writer: SummaryWriter | None = None
        self._progress = Progress(
            SpinnerColumn("line"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=_BAR),
            TextColumn("{task.fields[status]}", markup=False),
            TimeRemainingColumn(),
            console=self.console,
            disable=not moving(self.console),
            transient=True,
        )
        self._name, self._epochs, self._images = "", 0, 0
        self._task = TaskID(0)
        self._times: list[float] = []  # when the epoch began and every step of it ended

    @property
    def writes(self) -> bool:
        """Whether it has a folder and therefore writes pictures."""
        return self._folder is not None

    def say(self, text: str) -> None:
        """Print a line and log it.

        Raises:
            OSError: If the log cannot be written.
        """
        if self.console.is_jupyter:
            write_over(text, self.console)
        else:
            self.console.print(text, markup=False)
        self._log(text)

    def _log(self, text: str) -> None:
        if self._folder is None:
            return
        path = self._folder / "log.txt"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        except OSError as error:
            raise OSError(
                f"{path} could not be written ({error.strerror}); the checkpoints are intact. "
                "Free some space  or restore the folder, then continue with --resume"
            ) from error

    def begin(
        self,
        configuration: Mapping[str, Any],
        defaults: Mapping[str, Any],
        accelerator: Accelerator,
    ) -> dict[str, str]:
        """Log versions, device, commit and every option; the console shows the versions and the
        options that differ from their defaults.

        Returns the environment, for the report.
        """
        where = environment(accelerator.device) | {"processes": str(accelerator.num_processes)}
        for title, values in (("environment", where), ("configuration", configuration)):
            self._log(
                "\n  ".join([f"{title}:", *(f"{name}: {value}" for name, value in values.items())])
            )
        units = bfloat16_units()
        if (accelerator.device.type, accelerator.mixed_precision) == (
            "cpu",
            "no",
        ) and units is not None:
            self._log(
                f"this processor multiplies in bfloat16 ({units}); for larger networks try "
                "--mixed-precision bf16"
            )
        shown = ", ".join(
            f"{name} {where[name]}" for name in ("sj_robust", "spikingjelly", "torch", "device")
        )
        options = changed_options(configuration, defaults)
        self.console.print(f"{shown}\noptions: {options}\nwriting to {self._folder}", markup=False)
        return where

    @contextmanager
    def steps(self, text: str, total: int) -> Iterator[Callable[[], None]]:
        """Log and show a task with this many steps; yields a function to call after each step."""
        self._log(text)
        with working(text, self.console, total=total) as step:
            yield step

    def show_status(self, text: str) -> None:
        """Show on the bar what happens between the steps of a training."""
        if not self._progress.disable:
            self._progress.update(self._task, status=text)

    @contextmanager
    def follow(
        self, name: str, *, epochs: int, batches: int, images: int, epoch: int, batch: int
    ) -> Iterator[None]:
        """Follow the training of one network in steps of ``images``, starting at ``batch`` of
        ``epoch``, both counted from 0.
        """
        if self._folder is None:
            yield
            return
        self._name, self._epochs, self._images = name, epochs, images
        self._writer = SummaryWriter(self._folder / "tensorboard" / name, purge_step=epoch + 1)
        self._started, self._first_epoch = time.monotonic(), epoch + batch / batches
        self._task = self._progress.add_task(
            name, total=epochs * batches, completed=epoch * batches + batch, status=""
        )
        self._progress.start()
        self._times = [time.monotonic()]
        try:
            yield
        finally:
            self._progress.stop()
            self._progress.remove_task(self._task)
            self._writer.close()

    def on_step(self, losses: Mapping[str, float]) -> None:
        """Show the losses of a step."""
        if self._folder is None:
            return
        self._times.append(time.monotonic())
        if not self._progress.disable:
            rate = f", {_per_second(self._times[-21:]) * self._images:.0f} images/s"
            self._progress.update(self._task, advance=1, status=self._fitting(losses, rate))

    def on_epoch(
        self, record: EpochRecord, scalars: Mapping[str, float], warning: str | None
    ) -> None:
        """Log an epoch, with further scalars for TensorBoard."""
        if self._folder is None:
            return
        validation = ", ".join(f"{name} {value:.1%}" for name, value in record.validation.items())
        rate = _per_second(self._times) * self._images
        self.say(
            f"{self._name} epoch {record.epoch}/{self._epochs}: {_summary(record.losses)}; "
            "validation "
            f"{validation}{f'; {rate:.0f} images/s' if rate else ''}{self._time_left(record.epoch)}"
        )
        if warning is not None:
            self.say(f"WARNING: {warning}")
        values = {f"train/{name}": value for name, value in record.losses.items()}
        values |= {f"validation/{name}": value for name, value in record.validation.items()}
        values |= {"train/images_per_second": rate} if rate else {}
        values |= {"train/lr": record.lr} | dict(scalars)
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, record.epoch)
        if self._track is not None:
            self._track(values, record.epoch)
        self._times = [time.monotonic()]

    def show_gallery(self, name: str, gallery: Gallery, epoch: int) -> None:
        """Write images under attack, both runs, and histograms of the perturbation in every layer
        to TensorBoard.
        """
        if self._folder is None:
            return
        with SummaryWriter(self._folder / "tensorboard" / name) as writer:
            for title, figure in gallery.figures().items():
                writer.add_figure(f"attack/{title}", figure, epoch)
            for layer, trace in gallery.traces.items():
                writer.add_histogram(f"potential/{layer}", trace.v_seq, epoch)
                writer.add_histogram(f"mppd/{layer}", trace.eps, epoch)

    def _fitting(self, losses: Mapping[str, float], rate: str) -> str:
        """The longest of the texts on a step that the line has room for beside name, bar and
        time.
        """
        room = self.console.width - len(self._name) - _AROUND_STATUS
        short = f"loss {losses['total']:.3f}, accuracy {_accuracies(losses)}"
        texts = (_summary(losses) + rate, short + rate, short)
        return next((text for text in texts if len(text) <= room), f"loss {losses['total']:.3f}")

    def _time_left(self, epoch: int) -> str:
        """Estimate from the epochs of this process; there are none if it resumed after the last
        batch of an epoch.
        """
        done = epoch - self._first_epoch
        passed = time.monotonic() - self._started
        return f"; {passed / done * (self._epochs - epoch):.0f} s left" if done > 0 else ""


def _per_second(times: list[float]) -> float:
    """Steps per second between the times at which they ended; 0 if there were none."""
    passed = times[-1] - times[0]
    return (len(times) - 1) / passed if passed > 0 else 0.0


def _summary(losses: Mapping[str, float]) -> str:
    """The losses in words, without the parts and the passes that training does not have."""
    penalties = [name for name in losses if name.startswith("penalty/")]
    shown = [
        name
        for name in ("clean", "perturbed", "mppd", "certified", *(penalties or ["penalty"]))
        if losses.get(name)
    ]
    parts = ", ".join(f"{name.removeprefix('penalty/')} {losses[name]:.3f}" for name in shown)
    return f"loss {losses['total']:.3f} ({parts}), accuracy {_accuracies(losses)}"


def _accuracies(losses: Mapping[str, float]) -> str:
    """Accuracy on clean and on perturbed images, and by the bounds of the loss, as far as training
    looks at them.
    """
    passes = (
        ("clean", "accuracy"),
        ("perturbed", "accuracy_perturbed"),
        ("certified", "accuracy_certified"),
    )
    return " / ".join(f"{losses[name]:.1%}" for loss, name in passes if losses[loss])


def changed_options(configuration: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """The options that differ from their defaults, in one line."""
    changed = {name: value for name, value in configuration.items() if value != defaults[name]}
    return ", ".join(f"{name} {_word(value)}" for name, value in changed.items()) or "defaults"


def _word(value: object) -> str:
    """The value of an option as the command line has it."""
    return json.dumps(value, default=str).strip('"')
