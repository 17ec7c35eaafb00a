"""Accuracy of a classifier, clean and under attack."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from sj_robust.attacks import Attack, check_images, check_labels
from sj_robust.attacks.threat import ThreatModel
from sj_robust.core.environment import device_of
from sj_robust.core.preserved import evaluation_mode
from sj_robust.core.randomness import seeded_globals
from sj_robust.evaluation.report import Report, Score

__all__ = ["accuracy", "evaluate_attacks"]


def evaluate_attacks(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, ...]],
    attacks: Mapping[str, Attack],
    *,
    threat: ThreatModel,
    network: str = "network",
    seed: int = 0,
    on_batch: Callable[[], None] | None = None,
) -> Report:
    """Accuracy on clean images (``"clean"``) and under each attack. 评估干净与受攻击时的准确率。

    The same seed gives the same figures whatever ran before and whichever other attacks are
    measured, unless the model draws from a generator of its own; modes, gradients and global random
    state stay as they were.

    Args:
        model: Images [N, C, H, W] in [0, 1] to logits.
        batches: Batches of (images, labels); iterated once.
        attacks: Attacks by the name they get in the report, budgets inside.
        threat: The budget, for the report.
        network: Name of the network in the report.
        seed: Seeds every attack on every batch.
        on_batch: Called after every batch, to show progress.

    Raises:
        ValueError: If there are no images, an image is not finite or outside [0, 1], or logits are
            not finite.

    Source: evaluation protocol of Ding et al. (ICML 2024), section 5.

    Examples:
        >>> from functools import partial
        >>> from sj_robust.attacks import fgsm
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> batches = [(torch.rand(5, 1, 2, 2), torch.zeros(5, dtype=torch.int64))]
        >>> report = evaluate_attacks(
        ...     model, batches, {"fgsm": partial(fgsm, eps=0.1)}, threat=ThreatModel("Linf", 0.1)
        ... )
        >>> [score.attack for score in report.scores]
        ['clean', 'fgsm']
    """
    return Report(threat, _scores(network, model, batches, attacks, seed, on_batch))


def accuracy(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, ...]],
    attacks: Mapping[str, Attack],
    *,
    seed: int = 0,
) -> dict[str, float]:
    """The figures of :func:`evaluate_attacks` alone, in [0, 1], for use during training.
    仅返回准确率。

    Args:
        model: As in :func:`evaluate_attacks`.
        batches: As in :func:`evaluate_attacks`.
        attacks: Attacks by name; ``"clean"`` comes first by itself.
        seed: As in :func:`evaluate_attacks`.

    Examples:
        >>> accuracy(nn.Flatten(), [(torch.eye(2).view(2, 1, 1, 2), torch.tensor([0, 0]))], {})
        {'clean': 0.5}
    """
    return {score.attack: score.accuracy for score in _scores("", model, batches, attacks, seed)}


def _scores(
    network: str,
    model: nn.Module,
    batches: Iterable[tuple[Tensor, ...]],
    attacks: Mapping[str, Attack],
    seed: int,
    on_batch: Callable[[], None] | None = None,
) -> tuple[Score, ...]:
    """Images classified right, clean and under each attack."""
    if "clean" in attacks:
        raise ValueError(
            "the name 'clean' is taken by the images without an attack; call the attack otherwise"
        )
    correct = dict.fromkeys(("clean", *attacks), 0)
    total = 0
    device, generator = device_of(model), torch.Generator()
    with evaluation_mode(model):
        for number, (x, y) in enumerate(batches):
            x, y = x.to(device), y.to(device)
            check_images(x)
            check_labels(y, x)
            total += len(y)
            batch_seed = seed * 1_000_003 + number
            with seeded_globals(batch_seed, device):
                correct["clean"] += _right(model, x, y)
            for name, attack in attacks.items():
                generator.manual_seed(batch_seed)
                with seeded_globals(batch_seed, device):
                    correct[name] += _right(model, attack(model, x, y, generator=generator), y)
            if on_batch is not None:
                on_batch()
    if total == 0:
        raise ValueError("batches must hold at least one image, got none")
    return tuple(Score(network, name, count, total) for name, count in correct.items())


@torch.no_grad()
def _right(model: nn.Module, x: Tensor, y: Tensor) -> int:
    logits = model(x)
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(
            "logits must be finite, got NaN or infinity: the accuracy of a broken network means "
            "nothing"
        )
    return int((logits.argmax(1) == y).sum())
