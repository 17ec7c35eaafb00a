"""Parts of logits [N, classes] that losses and verdicts are made of."""

import torch
from torch import Tensor

__all__ = ["likeliest_wrong", "margin", "of_class", "without"]


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Logit of the label minus the largest other one, ``z_y - max_{c != y} z_c``, [N]; negative
    where it is wrong.

    Examples:
        >>> margin(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([2]))
        tensor([-1.])
    """
    return of_class(logits, y) - without(logits, y).amax(1)


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
    return list(without(logits, y).topk(count).indices.unbind(1))
