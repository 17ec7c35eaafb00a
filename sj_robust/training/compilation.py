"""A network through ``torch.compile`` for the time of a training."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["compiled"]

_BACKEND = "inductor"
_OPTIONS = {"layout_optimization": False}  # the memory order is the run's; around kernels another one means copies


@contextmanager
def compiled(net: nn.Module) -> Iterator[None]:
    """Run ``net`` through ``torch.compile`` until the context ends. 在上下文内编译网络。

    It is compiled in place: modules, hooks and ``state_dict`` keys stay. The reset of the states before every pass is
    the classifier's and stays outside. Compiling happens at the first pass of every kind (training, attack, another
    batch size), which then takes long.

    Args:
        net: A network, not the classifier around it.

    Raises:
        ValueError: If torch cannot compile the network on this machine.

    Source: Ansel et al., "PyTorch 2" (ASPLOS 2024).

    Examples:
        >>> net = nn.Linear(2, 1)
        >>> with compiled(net):  # compiles nothing before the first pass
        ...     list(net.state_dict())
        ['weight', 'bias']
    """
    from torch._dynamo.exc import TorchDynamoException  # imports the compiler, which takes seconds

    net.compile(backend=_BACKEND, options=_OPTIONS if _BACKEND == "inductor" else None)
    try:
        yield
    except TorchDynamoException as error:
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise ValueError(
            f"compile=True, but torch.compile cannot compile this network here ({type(error).__name__}: {reason}); "
            "train with compile=False, or see that a C++ compiler (on a GPU also Triton) is installed"
        ) from error
    finally:
        net._compiled_call_impl = None  # torch has no public way back
        torch.compiler.reset()
