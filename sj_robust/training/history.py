"""Records of every epoch, and warnings from them."""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["EpochRecord", "catastrophic_overfitting"]


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
