"""The settings of a training run."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from sj_robust.core.checks import check_choice, check_size
from sj_robust.core.threat import ThreatModel
from sj_robust.proofs.differentiable import TrainedMethod

__all__ = ["SelectName", "TrainingPlan"]

SelectName = Literal["clean", "fgsm", "pgd", "flips", "moves", "verified"]


@dataclass(frozen=True)
class TrainingPlan:
    """Number of epochs, optimizer, schedule and the other settings of a training. 训练计划。

    Attributes:
        epochs: Passes over the training images, over which the learning rate decays to 0 (cosine).
        batch_size: Images per step over all processes together.
        accumulate: Number of equal parts into which every process splits its share of a step, to
            save memory; their gradients are averaged, and batch norm sees one part at a time.
        optimizer: ``"sgd"`` or ``"adam"``.
        lr: Initial learning rate.
        momentum: Momentum of SGD; not used by Adam.
        weight_decay: Weight decay of all parameters, including DLIF's input gains.
        retraction: Length beta of the step of every weight towards orthonormal rows after the
            optimizer's step; 0 for none.
        deflation: Whether the largest singular component of every gradient is removed before the
            optimizer's step, see :func:`sj_robust.defences.deflate_`.
        seed: Determines the order of the images and the noise of every step.
        select: Validation accuracy that selects the best epoch.
        verified: Threat of the proofs in validation, which give the figure ``"verified"``; None
            skips them.
        verified_method: Method of :func:`sj_robust.proofs.verify` for these proofs.
        checkpoint_steps: Steps between checkpoints within an epoch; None writes only one per epoch.
        workers: Processes that load images in the background.
        single_step_attack: Whether training uses a single-step attack, so that catastrophic
            overfitting is checked for.
        compile: Whether the network is compiled with ``torch.compile``; the reset before every pass
            is not compiled.
        channels_last: Whether images and convolutions use the channels-last format; None uses it on
            CUDA alone.

    Raises:
        TypeError: If ``lr``, ``weight_decay`` or ``retraction`` is no number.
        ValueError: If a number is out of range.

    Source: training recipe of Ding et al. (ICML 2024), section 5.

    Examples:
        >>> TrainingPlan(epochs=30, batch_size=128, accumulate=2).lr
        0.1
    """

    epochs: int
    batch_size: int = 64
    accumulate: int = 1
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    retraction: float = 0.0
    deflation: bool = False
    seed: int = 0
    select: SelectName = "pgd"
    verified: ThreatModel | None = None
    verified_method: TrainedMethod = "joint"
    checkpoint_steps: int | None = None
    workers: int = 0
    single_step_attack: bool = True
    compile: bool = False
    channels_last: bool | None = None

    def __post_init__(self) -> None:
        at_least_one = {"epochs": self.epochs, "accumulate": self.accumulate}
        for name, value in (
            at_least_one | {"checkpoint_steps": self.checkpoint_steps or 1}
        ).items():
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if self.optimizer not in ("sgd", "adam"):
            raise ValueError(f"optimizer must be 'sgd' or 'adam', got {self.optimizer!r}")
        if self.select == "verified" and self.verified is None:
            raise ValueError(
                "select 'verified' needs verified, the threat of the proofs, such as "
                "ThreatModel('Linf', 8 / 255)"
            )
        check_choice("verified_method", self.verified_method, get_args(TrainedMethod))
        check_size("lr", self.lr, positive=True)
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        for name, size in (("weight_decay", self.weight_decay), ("retraction", self.retraction)):
            check_size(name, size)

    def check_select(self, attacks: Iterable[str]) -> None:
        """Raise ValueError unless the best epoch is selected by an accuracy that validation under
        these attacks gives.
        """
        figures = ["clean", *attacks]
        if self.verified is not None:
            figures.append("verified")
        check_choice("select", self.select, figures)

    def check_processes(self, processes: int) -> None:
        """Raise ValueError unless a batch can be split into equal parts for this many processes."""
        parts = processes * self.accumulate
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size must be a multiple of processes * accumulate = {processes} * "
                f"{self.accumulate}, got {self.batch_size}; "
                f"{-(-self.batch_size // parts) * parts} is one"
            )
