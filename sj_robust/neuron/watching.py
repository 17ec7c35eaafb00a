"""The interface between spiking layers and the code that observes them."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sj_robust.core.host import check_hooks_run, first_argument, is_neuron, memories
from sj_robust.neuron.dlif import DLIFNode

__all__ = [
    "NeuronHook",
    "SpikingCall",
    "Wants",
    "Watched",
    "Watcher",
    "register_watcher",
    "watch",
]


class Wants(IntEnum):
    """What a watcher needs of a call of a neuron; SPIKES includes the input."""

    NOTHING = 0
    INPUT = 1
    SPIKES = 2


@dataclass(frozen=True)
class SpikingCall:
    """One call of a spiking layer that has just ended.

    Attributes:
        name: Name of the neuron in the network.
        node: The neuron, in the state after the call.
        input: Its input currents, [T, N, *] in step mode ``"m"``, [N, *] in ``"s"``; None if they
            were not wanted and therefore not computed.
        spikes: Its spikes in the same shape; None likewise.
        v_before: Its potential before the call: a tensor [N, *], or the number after a reset.
        time_step: Number of steps between its reset and the call; 0 for neurons that do not count.
    """

    name: str
    node: Any
    input: Tensor | None
    spikes: Tensor | None
    v_before: Any
    time_step: int


class Watcher(Protocol):
    """An object that is notified of the calls of neurons."""

    def wants(self, name: str) -> Wants:
        """What the watcher needs from the next call of the neuron ``name``."""

    def called(self, call: SpikingCall) -> None:
        """Record a call; a compiled graph omits calls from which nothing is needed."""


@contextmanager
def watch(net: nn.Module, watcher: Watcher, names: Iterable[str] | None = None) -> Iterator[None]:
    """Context in which a watcher is notified of every call of the neurons of a network.

    In a :class:`Stage` a call that tells the input alone keeps its speed; outside one the watcher
    is told by torch's hooks, before other hooks may change the spikes.
    监听脉冲神经元的调用。

    Args:
        net: The network.
        watcher: Who is told.
        names: Names of the neurons; None for all.

    Examples:
        >>> class Count:
        ...     seen = 0
        ...
        ...     def wants(self, name):
        ...         return Wants.NOTHING
        ...
        ...     def called(self, call):
        ...         self.seen += 1
        >>> net, count = nn.Sequential(DLIFNode(T=2)), Count()
        >>> with watch(net, count):
        ...     _ = net(torch.ones(2, 1))
        >>> count.seen
        1
    """
    with ExitStack() as stack:
        for handle in register_watcher(net, watcher, names):
            stack.callback(handle.remove)
        yield


def register_watcher(
    net: nn.Module, watcher: Watcher, names: Iterable[str] | None = None
) -> list[RemovableHandle]:
    """Tell a watcher of the calls of neurons, as :func:`watch`, until the handles are removed;
    ValueError if SpikingJelly's ``memopt`` runs them.
    """
    check_hooks_run(net, "watching neurons")
    keep_out_of_graphs()
    if names is None:
        names = [name for name, module in net.named_modules() if is_neuron(module)]
    handles = []
    for name in names:
        node = net.get_submodule(name)
        watched = Watched(name, watcher)
        handles.append(node.register_forward_pre_hook(_Before(watched)))
        # ahead of others, which may change what the neuron puts out
        after = node.register_forward_hook(_After(watched), with_kwargs=True, prepend=True)
        handles.append(after)
    return handles


class Watched:
    """One neuron and its watcher, which is None in a copy of the network."""

    def __init__(self, name: str, watcher: Watcher | None) -> None:
        """Keep the name and the watcher."""
        self.name = name
        self.watcher = watcher
        self.v_before: Any = None
        self.time_step = 0

    def __reduce__(self) -> tuple[type["Watched"], tuple[str, None]]:
        return Watched, (self.name, None)

    def wants(self) -> Wants:
        """What the watcher needs of the next call."""
        return Wants.NOTHING if self.watcher is None else self.watcher.wants(self.name)

    def enter(self, node: Any, *, copies: bool) -> None:
        """Note the state before a call; it is cloned if the call may change it in place."""
        v = memories(node).get("v")
        self.v_before = v.clone() if copies and isinstance(v, Tensor) else v
        self.time_step = node.time_step if isinstance(node, DLIFNode) else 0

    def leave(self, node: Any, x: Tensor | None, spikes: Tensor | None) -> None:
        """Tell the watcher of the call that :meth:`enter` began."""
        v_before, self.v_before = self.v_before, None
        if self.watcher is not None:
            call = SpikingCall(
                name=self.name,
                node=node,
                input=x,
                spikes=spikes,
                v_before=v_before,
                time_step=self.time_step,
            )
            self.watcher.called(call)

    def is_idle(self) -> bool:
        """Whether no watcher has to be notified of the next call."""
        if self.watcher is None:
            return True
        return torch.compiler.is_compiling() and self.wants() == Wants.NOTHING


class NeuronHook:
    """A hook of this package on a neuron; a stage recognises it by this type."""

    def __init__(self, watched: Watched) -> None:
        """Keep the watched neuron."""
        self.watched = watched


class _Before(NeuronHook):
    def __call__(self, node: nn.Module, args: Any) -> None:
        if not self.watched.is_idle():
            self.watched.enter(node, copies=self.watched.wants() > Wants.NOTHING)


class _After(NeuronHook):
    def __call__(
        self, node: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        if not self.watched.is_idle():
            self.watched.leave(node, first_argument(args, kwargs), output)


def watched_of(node: nn.Module) -> list[Watched]:
    """The watchers of a neuron."""
    hooks: Iterable[Any] = node._forward_hooks.values()
    return [hook.watched for hook in hooks if isinstance(hook, NeuronHook)]


def keep_out_of_graphs() -> None:
    """Keep the compiler away from watchers, if it is in use."""
    if "torch._dynamo" in sys.modules:
        _disable()


@cache
def _disable() -> None:
    """Tell the compiler, once; this imports it, which takes as long as importing torch."""
    disabled = torch.compiler.disable(Watched.leave)  # type: ignore[no-untyped-call]  # torch's
    Watched.leave = disabled  # type: ignore[method-assign]
