"""A network that is measured stays as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sj_robust._host import base, functional
from sj_robust.attacks.randomness import seeded_globals

__all__ = ["preserved"]


@contextmanager
def preserved(model: object, seed: int, device: torch.device) -> Iterator[None]:
    """Evaluation mode, neurons reset, all randomness seeded; modes, states and generators restored afterwards.

    The generators are torch's global ones and those that modules of the network keep as attributes. A model that is no
    ``nn.Module`` has nothing to restore but the global generators.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [(module, module.training) for module in modules]
    states = [(module, module._memories) for module in modules if isinstance(module, base.MemoryModule)]
    generators = {
        generator: generator.get_state()
        for module in modules
        for generator in vars(module).values()
        if isinstance(generator, torch.Generator)
    }
    try:
        with seeded_globals(seed, device):
            for module, memories in states:  # copies, since a reset may write into the tensors of a state
                module._memories = {name: _copied(value) for name, value in memories.items()}
            if isinstance(model, nn.Module):
                model.eval()
                functional.reset_net(model)
            for generator in generators:
                generator.manual_seed(seed)
            yield
    finally:
        for module, training in modes:
            module.training = training
        for module, memories in states:
            module._memories = memories
        for generator, state in generators.items():
            generator.set_state(state)


def _copied(value: object) -> object:
    return value.detach().clone() if isinstance(value, Tensor) else value
