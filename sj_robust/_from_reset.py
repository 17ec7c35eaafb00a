"""What is measured on a network begins at a reset and a seed, and leaves the network as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sj_robust._host import functional
from sj_robust._preserved import generators_of, preserved
from sj_robust.randomness import seeded_globals

__all__ = ["from_reset"]


@contextmanager
def from_reset(model: object, seed: int, device: torch.device) -> Iterator[None]:
    """Evaluation mode, neurons reset, all randomness seeded; the network and all generators are as before afterwards.

    The generators are torch's global ones and those that modules of the network keep as attributes. A model that is no
    ``nn.Module`` has nothing to restore but the global generators.
    """
    with preserved(model), seeded_globals(seed, device):
        if isinstance(model, nn.Module):
            functional.reset_net(model)
        for generator in generators_of(model):
            generator.manual_seed(seed)
        yield
