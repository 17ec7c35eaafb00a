"""Private randomness: what an attack or an evaluation draws neither moves nor follows the caller's generators."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["draw_seed", "private_generator", "seeded_globals"]


def private_generator(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    """Generator on ``device``, seeded by one number of ``generator`` or, without one, by fresh entropy."""
    private = torch.Generator(device=device)
    if generator is None:
        private.seed()
    elif isinstance(generator, torch.Generator):
        private.manual_seed(draw_seed(generator))
    else:
        raise TypeError(
            f"generator must be a torch.Generator, got {type(generator).__name__}; "
            "use torch.Generator().manual_seed(seed)"
        )
    return private


@contextmanager
def seeded_globals(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators of CPU and ``device``, which encoders and dropout draw from, seeded and then restored.

    Restored without a seed of our own, they would show an attack the very numbers of the caller's next forward.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def draw_seed(generator: torch.Generator) -> int:
    """A number that seeds another generator."""
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))
