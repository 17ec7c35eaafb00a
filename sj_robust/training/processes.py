"""How a run is carried out: interrupts, random generators, compilation and memory order."""

import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from sj_robust.core.convention import Takes
from sj_robust.core.host import functional

__all__ = [
    "TrainingInterrupted",
    "collected_signals",
    "compiled",
    "mixed",
    "random_state",
    "set_random_state",
    "share_buffers",
    "store_channels_last",
]


_BACKEND = "inductor"
_OPTIONS = {
    "layout_optimization": False
}  # the memory order is the run's; around kernels another one means copies


class TrainingInterrupted(Exception):  # noqa: N818  # an interruption asked for is not an error
    """A signal stopped the training; the current step was completed and a checkpoint was written.

    Attributes:
        signal_number: The signal; the conventional exit code is 128 plus this number.
    """

    def __init__(self, signal_number: int, checkpoint: Path) -> None:
        """Keep the signal and say where the checkpoint is."""
        super().__init__(
            f"stopped by {signal.Signals(signal_number).name}; {checkpoint} continues with --resume"
        )
        self.signal_number = signal_number


@contextmanager
def collected_signals() -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM instead of stopping; a second one acts as it did
    before.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def receive(number: int, frame: object) -> None:
        received.append(number)
        restore()

    for number in previous:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()


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


def store_channels_last(module: nn.Module) -> None:
    """Put the weights of two-dimensional convolutions into this order; the parameters stay the same
    objects.
    """
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def share_buffers(net: nn.Module) -> None:
    """Give every process the floating-point buffers of the first, in one message; only where there
    are processes.
    """
    buffers = [buffer for buffer in net.buffers() if buffer.is_floating_point()]
    if not buffers or not dist.is_available() or not dist.is_initialized():
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    dist.broadcast(flat, 0)
    sizes = [buffer.numel() for buffer in buffers]
    for buffer, values in zip(buffers, torch.split(flat, sizes), strict=True):
        buffer.copy_(values.view_as(buffer))
