"""What Python's collector of cycles would have to free."""

import gc
from contextlib import contextmanager

import torch


@contextmanager
def no_collection():
    """Context without the collector, after it has run."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def tensors_of_cycles():
    """Shapes of the tensors that nothing holds but a cycle."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    return [tuple(one.shape) for one in gc.garbage if isinstance(one, torch.Tensor)]
