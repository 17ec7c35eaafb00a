"""Global random generators in a checkpoint, and seeds made of several numbers."""

import random
from typing import Any

import numpy as np
import torch

__all__ = ["mixed", "random_state", "set_random_state"]


def mixed(*numbers: int) -> int:
    """A seed that differs for every tuple of numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def random_state() -> dict[str, Any]:
    """State of every global random generator, in types that a checkpoint may hold."""
    # The global state of numpy is what other libraries draw from.
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002  # see above
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    return {
        "python": random.getstate(),
        "numpy": numpy,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put every global random generator into a state of :func:`random_state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002  # as above
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
