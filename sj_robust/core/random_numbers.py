"""The random numbers of a network: seeded, or the same once more."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sj_robust.core.preserved import generators_of
from sj_robust.core.randomness import SampleSeeds, seeded_globals

__all__ = ["RandomNumbers", "seeded_network"]


@contextmanager
def seeded_network(model: object, seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators of CPU and ``device``, and those that modules of the network keep
    as attributes, seeded and then restored; each has a seed of its own, derived from ``seed``.

    Examples:
        >>> encoder = torch.nn.Identity()
        >>> encoder.generator = torch.Generator()
        >>> before = encoder.generator.get_state()
        >>> with seeded_network(encoder, 3, torch.device("cpu")):
        ...     first = torch.rand(2, generator=encoder.generator)
        >>> with seeded_network(encoder, 3, torch.device("cpu")):
        ...     bool((torch.rand(2, generator=encoder.generator) == first).all())
        True
        >>> bool((encoder.generator.get_state() == before).all())
        True
    """
    kept = [(generator, generator.get_state()) for generator in generators_of(model)]
    try:
        for number, (generator, _) in enumerate(kept):
            generator.manual_seed(SampleSeeds([seed]).derived("generator", number).single())
        with seeded_globals(seed, device):
            yield
    finally:
        for generator, state in kept:
            generator.set_state(state)


class RandomNumbers:
    """What a network draws from here on: the present states of torch's global generators of the CPU
    and of ``device``, and of the generators that its modules keep as attributes.

    Two passes that are compared must not differ by their random numbers.

    Args:
        model: The network.
        device: Where it runs.

    Examples:
        >>> numbers = RandomNumbers(torch.nn.Dropout(), torch.device("cpu"))
        >>> first = torch.rand(3)
        >>> with numbers.again():
        ...     bool((torch.rand(3) == first).all())
        True
        >>> bool((torch.rand(3) == first).any())
        False
    """

    def __init__(self, model: object, device: torch.device) -> None:
        """Remember the states."""
        self._generators = [torch.default_generator, *generators_of(model)]
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            self._generators.append(torch.cuda.default_generators[index])
        self._states = [generator.get_state() for generator in self._generators]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw the numbers that followed; afterwards all generators go on where they were."""
        before = [generator.get_state() for generator in self._generators]
        try:
            for generator, state in zip(self._generators, self._states, strict=True):
                generator.set_state(state)
            yield
        finally:
            for generator, state in zip(self._generators, before, strict=True):
                generator.set_state(state)
