"""Quantities of logits [N, classes] for losses and verdicts."""

from collections.abc import Callable

import torch
from torch import Tensor

from sj_robust.core.checks import logits_of

__all__ = [
    "clean_logits",
    "differ",
    "differing",
    "leads",
    "likeliest_wrong",
    "margin",
    "of_class",
    "without",
]


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Logit of the label minus the largest other one, ``z_y - max_{c != y} z_c``, [N]; negative
    where it is wrong.

    Examples:
        >>> margin(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([2]))
        tensor([-1.])
    """
    best_other = without(logits, y).amax(1)
    return of_class(logits, y) - best_other


def leads(logits: Tensor, y: Tensor) -> Tensor:
    """Logit of the label minus that of every class, ``z_y - z_c``, [N, classes]; infinity for the
    label itself.

    Examples:
        >>> leads(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([2]))
        tensor([[-1., 1., inf]])
    """
    every = of_class(logits, y)[:, None] - logits
    return every.scatter(1, y[:, None], torch.inf)


def of_class(logits: Tensor, classes: Tensor) -> Tensor:
    """One logit per sample, ``z_c`` with c out of ``classes`` [N], [N]."""
    return logits.gather(1, classes[:, None]).squeeze(1)


def without(logits: Tensor, y: Tensor) -> Tensor:
    """Logits with that of the label at minus infinity, [N, classes]."""
    return logits.scatter(1, y[:, None], -torch.inf)


def likeliest_wrong(logits: Tensor, y: Tensor, count: int) -> list[Tensor]:
    """The likeliest class other than the label of every sample, the second likeliest, and so on,
    each [N].

    Examples:
        >>> likeliest_wrong(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([2]), 2)
        [tensor([0]), tensor([1])]
    """
    classes = without(logits, y).topk(count).indices
    return list(classes.unbind(1))


def differ(first: Tensor, other: Tensor) -> bool:
    """Whether two answers to the same images differ by more than rounding.

    Examples:
        >>> differ(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.00001]]))
        False
    """
    return bool(differing(first, other).any())


def differing(first: Tensor, other: Tensor) -> Tensor:
    """The images for which they do, [N] bool."""
    change = torch.linalg.vector_norm(first - other, dim=1)
    length = torch.linalg.vector_norm(first, dim=1)
    found: Tensor = change > 1e-4 * length
    return found


@torch.no_grad()
def clean_logits(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
) -> Tensor:
    """Logits of the images, of at least two classes."""
    logits = logits_of(model, x, y)
    if logits.shape[1] < 2:
        raise ValueError(
            f"the model must return at least 2 classes, got {logits.shape[1]}; return one logit "
            "per class"
        )
    return logits
