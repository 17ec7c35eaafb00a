"""``torch.compile`` during training."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sj_robust.core.convention import Takes
from sj_robust.core.host import functional

__all__ = ["compiled"]

_BACKEND = "inductor"
_OPTIONS = {
    "layout_optimization": False
}  # the memory order is the run's; around kernels another one means copies


@contextmanager
def compiled(net: nn.Module, *, takes: Takes = "sequence") -> Iterator[None]:
    """Run ``net`` through ``torch.compile`` until the context ends. 在上下文内编译网络。

    It is compiled in place: modules, hooks and ``state_dict`` keys stay. A network that runs all
    steps in one call also resets its states after every pass, inside the graph, which then need not
    hand them out or wait for their gradients. Compiling happens at the first pass of every kind
    (training, attack, another batch size), which then takes long. ``net`` is the network inside a
    classifier, and ``takes`` what its convention says.

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

    own_forward = net.__dict__.get("forward")
    if takes != "steps":
        forward = net.forward

        def forward_and_reset(
            *args: Any, **kwargs: Any
        ) -> Any:  # a hook would do it too, but more slowly
            outputs = forward(*args, **kwargs)
            functional.reset_net(net)
            return outputs

        net.forward = forward_and_reset
    net.compile(backend=_BACKEND, options=_OPTIONS if _BACKEND == "inductor" else None)
    try:
        yield
    except TorchDynamoException as error:
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise ValueError(
            "compile=True, but torch.compile cannot compile this network here "
            f"({type(error).__name__}: {reason}); train with compile=False, or see that a C++ "
            "compiler (on a GPU also Triton) is installed"
        ) from error
    finally:
        net._compiled_call_impl = None  # torch has no public way back
        net.__dict__.pop("forward", None)
        if own_forward is not None:
            net.forward = own_forward
        torch.compiler.reset()
