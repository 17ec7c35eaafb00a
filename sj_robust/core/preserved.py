"""Restores an attacked or measured network: modes, neuron states and random generators."""

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property, wraps
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "draws_numbers",
    "evaluation_mode",
    "full_precision",
    "generators_of",
    "locked",
    "one_thread_at_a_time",
    "other_forward",
    "preserved",
    "states_of_sources",
    "uncompiled",
    "within_backward",
]

_Module = TypeVar("_Module", bound=nn.Module)
_Rest = ParamSpec("_Rest")
_Result = TypeVar("_Result")

Use = Literal["forward", "session", "change"]
"""What a thread holds a network for."""


def within_backward() -> bool:
    """Whether a backward pass runs in this thread, as where activation checkpointing calls a module
    once more. 是否处于反向传播中。
    """
    return torch._C._current_graph_task_id() != -1  # torch has no public way to ask


def locked(network: nn.Module, use: Use = "change") -> AbstractContextManager[None]:
    """Other threads that ask for the network or a part of it wait until this thread is done.
    同一网络同一时刻只由一个线程使用。

    A thread that holds a network may ask for it and its parts again. A network may run its parts in
    threads of its own and wait for them: unless it is held for a change, its parts may run in other
    threads, each in one thread at a time, in the mode that they are in. Threads that work on
    different networks do not wait for each other; torch's global generators belong to all of them,
    so a network that draws random numbers is repeatable in one thread at a time only. Nothing is
    kept on the modules. A compiler that follows the code, and the recomputation of a checkpoint
    within a backward pass, do not wait.

    Args:
        network: The outermost module of what is used.
        use: ``"forward"`` for one forward; ``"session"`` for several, which find the network in
            one mode; ``"change"`` to change modes or states, for which parts must not run.

    Raises:
        RuntimeError: If two threads would wait for each other forever.
    """
    # The thread of a backward pass recomputes on behalf of a thread that waits for it.
    if torch.compiler.is_compiling() or within_backward():
        return nullcontext()
    return _LOCKS.held(network, use)


def one_thread_at_a_time(
    forward: Callable[Concatenate[_Module, _Rest], _Result],
) -> Callable[Concatenate[_Module, _Rest], _Result]:
    """A forward that has the module for itself, see :func:`locked`. 前向过程加锁。"""

    @wraps(forward)
    def run(self: _Module, /, *args: _Rest.args, **kwargs: _Rest.kwargs) -> _Result:
        with locked(self, "forward"):
            return forward(self, *args, **kwargs)

    return run


class _Lock:
    """A network that a thread holds or asks for.

    Attributes:
        thread: The thread.
        use: What for, see :func:`locked`.
        network: The outermost module of what is used.
    """

    def __init__(self, network: nn.Module, use: Use) -> None:
        self.thread = threading.get_ident()
        self.use = use
        self.network = network

    @cached_property
    def modules(self) -> frozenset[int]:
        """The network and all of its parts, by their ``id``; nobody asks while there is one
        thread.
        """
        return frozenset(map(id, self.network.modules()))

    def is_part_of(self, other: "_Lock") -> bool:
        """Whether it is for a forward of a part of the other one, which lets its parts run."""
        return (
            self.use == "forward"
            and other.use != "change"
            and self.network is not other.network
            and id(self.network) in other.modules
        )


class _Locks:
    """All locks that are held, in the order in which they were given, and who waits for whom."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held: list[_Lock] = []
        self._waiting: dict[int, set[int]] = {}

    @contextmanager
    def held(self, network: nn.Module, use: Use) -> Iterator[None]:
        """The network, as soon as no other thread holds a module of it."""
        lock = _Lock(network, use)
        with self._changed:
            others = self._in_the_way(lock)
            while others:
                self._wait(lock.thread, others)
                others = self._in_the_way(lock)
            self._held.append(lock)
        try:
            yield
        finally:
            with self._changed:
                self._held.remove(lock)
                self._changed.notify_all()

    def _in_the_way(self, lock: _Lock) -> set[int]:
        """Threads that hold a module of the network."""
        threads = set()
        enclosing: list[_Lock] = []  # of this thread, given after the lock that is looked at
        for held in reversed(self._held):
            if held.thread == lock.thread:
                enclosing.append(held)
            elif not (
                lock.modules.isdisjoint(held.modules)
                or lock.is_part_of(held)
                or any(lock.modules <= own.modules for own in enclosing)
            ):
                threads.add(held.thread)
        return threads

    def _wait(self, thread: int, others: set[int]) -> None:
        self._waiting[thread] = others
        try:
            if self._waits_for(others, thread):
                raise RuntimeError(
                    "two threads would wait for each other forever: each holds a network that the "
                    "other one asks for; attack from one network to the other in one thread"
                )
            self._changed.wait()
        finally:
            del self._waiting[thread]

    def _waits_for(self, threads: set[int], thread: int) -> bool:
        """Whether one of the threads waits, over others or not, for ``thread``."""
        seen: set[int] = set()
        while threads:
            seen |= threads
            further = [self._waiting.get(one, set()) for one in threads]
            threads = set().union(*further) - seen
        return thread in seen


_LOCKS = _Locks()


@contextmanager
def evaluation_mode(model: object) -> Iterator[None]:
    """Evaluation mode, and every module's own mode afterwards; what is not an ``nn.Module`` has
    none. 评估模式。

    Other threads wait for the network until then, see :func:`locked`.

    Examples:
        >>> net = nn.Sequential(nn.Dropout(), nn.Identity().eval())
        >>> with evaluation_mode(net):
        ...     [module.training for module in net]
        [False, False]
        >>> [module.training for module in net]
        [True, False]
    """
    if not isinstance(model, nn.Module):
        yield
        return
    with locked(model, "session"):
        with locked(model):
            modules = list(model.modules())
            modes = [module.training for module in modules]
            model.eval()
        try:
            yield
        finally:
            with locked(model):
                for module, training in zip(modules, modes, strict=True):
                    module.training = training


@contextmanager
def preserved(model: object) -> Iterator[None]:
    """Evaluation mode; modes, states of neurons and generators of modules are as before afterwards.
    保持网络原状。

    Inside, states are copies without a graph, since a reset may write into their tensors. A
    callable that is not a network has nothing to be kept.

    Examples:
        >>> from spikingjelly.activation_based import neuron
        >>> net = neuron.IFNode()
        >>> _ = net(torch.tensor([0.5]))
        >>> with preserved(net):
        ...     net.reset()
        >>> net.v
        tensor([0.5000])
    """
    if not isinstance(model, nn.Module):
        yield
        return
    with evaluation_mode(model):
        generators = [(generator, generator.get_state()) for generator in generators_of(model)]
        with locked(model):
            states = []
            for module in model.modules():
                memories = vars(module).get("_memories")
                if memories is not None:
                    states.append((module, memories))
                    copies = {name: _copied(value) for name, value in memories.items()}
                    vars(module)["_memories"] = copies
        try:
            yield
        finally:
            with locked(model):
                for module, memories in states:
                    vars(module)["_memories"] = memories
                for generator, state in generators:
                    generator.set_state(state)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, no TF32, no inference mode, and a random state of its own. 全精度计算。"""
    cudnn = torch.backends.cudnn
    with (
        torch.inference_mode(False),
        torch.autocast(device.type, enabled=False),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        cudnn.flags(enabled=cudnn.enabled, deterministic=cudnn.deterministic, allow_tf32=False),
        _highest_matmul_precision(),
    ):
        yield


@contextmanager
def sums_of_products(device: torch.device) -> Iterator[None]:
    """:func:`full_precision`, and convolutions that are sums of products. 卷积只做乘积求和。

    The error of a float32 sum of n products is at most gamma_n in any order, which proofs count
    with. Winograd's and the FFT algorithm are no such sums. cuDNN may take either whatever its
    flags ``deterministic`` and ``benchmark`` say (its Winograd is deterministic), so it is switched
    off: torch's own CUDA convolutions are direct or matrix products. NNPACK, which torch takes on a
    CPU without oneDNN, is Winograd's; oneDNN's convolutions are direct as torch calls them.
    """
    cudnn, nnpack = torch.backends.cudnn, torch.backends.nnpack
    with full_precision(device), cudnn.flags(enabled=False, allow_tf32=False), nnpack.flags(False):
        yield


@contextmanager
def _highest_matmul_precision() -> Iterator[None]:
    """Matrix products in float32: no TF32 on a GPU, no bfloat16 on a CPU."""
    cuda: Any = torch.backends.cuda.matmul
    if not hasattr(cuda, "fp32_precision"):  # before torch 2.9
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
        return
    mkldnn: Any = torch.backends.mkldnn
    owners = [cuda, mkldnn.matmul]
    before = [owner.fp32_precision for owner in owners]
    for owner in owners:
        owner.fp32_precision = "ieee"
    try:
        yield
    finally:
        for owner, precision in zip(owners, before, strict=True):
            owner.fp32_precision = precision


def states_of_sources(model: object, device: torch.device) -> list[object]:
    """What the sources of random numbers give next, as values to be compared: Python's and numpy's,
    torch's of the CPU and of a device, and those of :func:`generators_of`.
    """
    generators = [torch.default_generator, *generators_of(model)]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    numbers: Any = np.random.get_state()  # noqa: NPY002  # a network may draw from the global one
    states = [generator.get_state().numpy().tobytes() for generator in generators]
    return [random.getstate(), numbers[1].tobytes(), numbers[2], *states]


def draws_numbers(model: nn.Module, x: Tensor) -> bool:
    """Whether a forward draws random numbers. 前向是否抽取随机数。

    Examples:
        >>> draws_numbers(nn.Dropout(), torch.ones(2)), draws_numbers(nn.ReLU(), torch.ones(2))
        (True, False)
    """
    with torch.no_grad():
        states = states_of_sources(model, x.device)
        model(x)
        return states_of_sources(model, x.device) != states


def generators_of(model: object) -> list[torch.Generator]:
    """Generators that modules of a network keep as attributes, such as that of a Poisson encoder;
    each once.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    found: list[torch.Generator] = []
    for module in modules:
        held = vars(module).values()
        found += [value for value in held if isinstance(value, torch.Generator)]
    return list(dict.fromkeys(found))


def _copied(value: object) -> object:
    return value.detach().clone() if isinstance(value, Tensor) else value


@contextmanager
def other_forward(
    module: nn.Module, forward: Callable[..., Tensor], *, as_called: bool = False
) -> Iterator[None]:
    """Context in which a module runs another forward; afterwards its own, or that of its class, as
    before. A single argument is given by place, even if the network names it, unless the forward is
    to be called ``as_called``.
    """

    def placed(*args: Any, **kwargs: Any) -> Tensor:
        if args or len(kwargs) != 1:
            return forward(*args, **kwargs)
        return forward(*kwargs.values())

    own = {key: value for key, value in vars(module).items() if key == "forward"}
    module.forward = forward if as_called else placed
    try:
        yield
    finally:
        del vars(module)["forward"]  # its class has it still
        vars(module).update(own)


@contextmanager
def uncompiled(network: nn.Module) -> Iterator[None]:
    """Context in which a network and its parts run without ``torch.compile``; afterwards as before.
    其内不使用编译后的代码。

    Examples:
        >>> net = nn.Linear(2, 2)
        >>> net.compile()
        >>> with uncompiled(net):  # compiles nothing
        ...     net(torch.ones(1, 2)).shape
        torch.Size([1, 2])
    """
    with ExitStack() as stack:
        for module in list(network.modules()):
            compiled_in_place = module._compiled_call_impl
            if compiled_in_place is not None:
                module._compiled_call_impl = None
                stack.callback(setattr, module, "_compiled_call_impl", compiled_in_place)
            wrapped = module._modules.get("_orig_mod")  # of what torch.compile(module) returns
            if wrapped is not None:
                stack.enter_context(other_forward(module, wrapped.__call__, as_called=True))
        yield
