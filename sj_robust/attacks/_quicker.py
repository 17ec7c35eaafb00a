"""A faster network with the same spikes, for attacks that only need logits."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from sj_robust.attacks.call import Model
from sj_robust.attacks.logits import differ

__all__ = ["quicker"]


@runtime_checkable
class _HasQuicker(Protocol):
    """A model that knows a faster copy of itself."""

    def quicker(self) -> Model | None:
        """The copy; None if there is none."""


@torch.no_grad()
def quicker(model: Model, x: Tensor, logits: Tensor) -> Model:
    """A faster copy of the model, if it has one that gives the logits of ``x`` as well; else the
    model itself.

    The copy may round differently and then spike differently, so an image that fools it has to be
    tried on the model.
    """
    copy = model.quicker() if isinstance(model, _HasQuicker) else None
    if copy is None:
        return model
    try:
        found = copy(x)
    except RuntimeError:  # a neuron that runs in two places takes more than T steps
        return model
    return model if differ(logits, found) else copy
