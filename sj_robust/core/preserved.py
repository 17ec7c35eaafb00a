"""A network that is attacked or measured stays as it was: modes, states of its neurons, generators;
exact sums; one thread at a time.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

__all__ = [
    "all_generators",
    "alone",
    "evaluation_mode",
    "full_precision",
    "generators_of",
    "one_thread_at_a_time",
    "other_forward",
    "preserved",
]

_Module = TypeVar("_Module", bound=nn.Module)
_Rest = ParamSpec("_Rest")
_Result = TypeVar("_Result")


def alone(modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """Other threads that ask for one of these modules wait until this thread is done with them.
    同一网络同一时刻只由一个线程使用。

    A thread that holds a module may ask for it again. Threads that work on different networks do
    not wait for each other; torch's global generators belong to all of them, so a network that
    draws random numbers is repeatable in one thread at a time only. Nothing is kept on the modules.
    A compiler that follows the code, and the recomputation of a checkpoint within a backward pass,
    do not wait.

    Raises:
        RuntimeError: If two threads would wait for each other forever.
    """
    # The thread of a backward pass recomputes on behalf of a thread that waits for it.
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
        return nullcontext()
    return _HELD.by_this_thread(modules)


def one_thread_at_a_time(
    forward: Callable[Concatenate[_Module, _Rest], _Result],
) -> Callable[Concatenate[_Module, _Rest], _Result]:
    """A forward that has the module's children for itself, see :func:`alone`. 前向过程加锁。"""

    @wraps(forward)
    def run(self: _Module, /, *args: _Rest.args, **kwargs: _Rest.kwargs) -> _Result:
        with alone(tuple(self.children())):
            return forward(self, *args, **kwargs)

    return run


class _Held:
    """Which thread holds which modules, and for whom a waiting thread waits."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._owners: dict[int, int] = {}
        self._depths: dict[int, int] = {}
        self._waiting: dict[int, set[int]] = {}

    @contextmanager
    def by_this_thread(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """All of the modules at once; nothing of them is taken while one belongs to another."""
        keys = [id(module) for module in modules]  # which live as long as this context
        thread = threading.get_ident()
        with self._changed:
            while others := self._others(keys, thread):
                self._wait(thread, others)
            for key in keys:
                self._owners[key] = thread
                self._depths[key] = self._depths.get(key, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                for key in keys:
                    self._depths[key] -= 1
                    if self._depths[key] == 0:
                        del self._depths[key], self._owners[key]
                self._changed.notify_all()

    def _others(self, keys: Sequence[int], thread: int) -> set[int]:
        """Threads that hold one of the modules, without this one."""
        return {self._owners[key] for key in keys if key in self._owners} - {thread}

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


_HELD = _Held()


@contextmanager
def evaluation_mode(model: object) -> Iterator[None]:
    """Evaluation mode, and every module's own mode afterwards; what is no ``nn.Module`` has none.
    评估模式。

    Other threads wait for the network until then, see :func:`alone`.

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
    modules = list(model.modules())
    with alone(modules):
        modes = [module.training for module in modules]
        try:
            model.eval()
            yield
        finally:
            for module, training in zip(modules, modes, strict=True):
                module.training = training


@contextmanager
def preserved(model: object) -> Iterator[None]:
    """Evaluation mode; modes, states of neurons and generators of modules are as before afterwards.
    保持网络原状。

    Inside, states are copies without a graph, since a reset may write into their tensors. A
    callable that is no network has nothing to be kept.

    Examples:
        >>> from spikingjelly.activation_based import neuron
        >>> net = neuron.IFNode()
        >>> _ = net(torch.tensor([0.5]))
        >>> with preserved(net):
        ...     net.reset()
        >>> net.v
        tensor([0.5000])
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    with evaluation_mode(model):
        states = [
            (module, vars(module)["_memories"]) for module in modules if "_memories" in vars(module)
        ]
        generators = [(generator, generator.get_state()) for generator in generators_of(model)]
        try:
            for module, memories in states:
                vars(module)["_memories"] = {
                    name: _copied(value) for name, value in memories.items()
                }
            yield
        finally:
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


def all_generators(model: object, device: torch.device) -> list[torch.Generator]:
    """Torch's global generators of the CPU and of a device, and those of :func:`generators_of`."""
    found = [torch.default_generator, *generators_of(model)]
    if device.type == "cuda":
        found.append(torch.cuda.default_generators[device.index or 0])
    return found


def generators_of(model: object) -> list[torch.Generator]:
    """Generators that modules of a network keep as attributes, such as that of a Poisson encoder;
    each once.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    found = (
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, torch.Generator)
    )
    return list(dict.fromkeys(found))


def _copied(value: object) -> object:
    return value.detach().clone() if isinstance(value, Tensor) else value


@contextmanager
def other_forward(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Context in which a module runs another forward; afterwards its own, or that of its class, as
    before.
    """
    own = {key: value for key, value in vars(module).items() if key == "forward"}
    module.forward = forward
    try:
        yield
    finally:
        del vars(module)["forward"]  # its class has it still
        vars(module).update(own)
