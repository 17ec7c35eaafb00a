"""State of a network and of its random numbers, kept and put back."""

import copy
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from sj_robust.core.host import functional, within_backward
from sj_robust.core.randomness import SampleSeeds

__all__ = [
    "RandomNumbers",
    "Snapshot",
    "draws_numbers",
    "evaluation_mode",
    "from_reset",
    "full_precision",
    "generators_of",
    "has_hooks",
    "locked",
    "one_thread_at_a_time",
    "other_forward",
    "preserved",
    "same",
    "seeded_network",
    "sums_of_products",
    "uncompiled",
]

_Module = TypeVar("_Module", bound=nn.Module)
_Rest = ParamSpec("_Rest")
_Result = TypeVar("_Result")

What = Literal["modes", "states", "all"]
"""What of a network is kept: modes; also states of neurons and of generators; or all it holds."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_NEW_LOCK = threading.Lock()


def locked(network: nn.Module) -> AbstractContextManager[object]:
    """Other threads that ask for the same module wait until this thread is done.
    同一网络同一时刻只由一个线程使用。

    A thread that holds a network may ask for it again, and a network may run its parts in threads
    of its own, since each module has its own lock. Two threads that hold a network each and ask for
    that of the other wait forever, so attack from one network to another in one order. Torch's
    global generators belong to all threads: a network that draws random numbers is repeatable in
    one thread at a time only. Nothing is kept on the modules. A compiler that follows the code, and
    the recomputation of a checkpoint within a backward pass, do not wait.
    """
    # The thread of a backward pass recomputes on behalf of a thread that waits for it.
    if torch.compiler.is_compiling() or within_backward():
        return nullcontext()
    with _NEW_LOCK:
        lock: AbstractContextManager[object] = _LOCKS.setdefault(network, threading.RLock())
    return lock


def one_thread_at_a_time(
    forward: Callable[Concatenate[_Module, _Rest], _Result],
) -> Callable[Concatenate[_Module, _Rest], _Result]:
    """A forward that has the module for itself, see :func:`locked`. 前向过程加锁。"""

    @wraps(forward)
    def run(self: _Module, /, *args: _Rest.args, **kwargs: _Rest.kwargs) -> _Result:
        with locked(self):
            return forward(self, *args, **kwargs)

    return run


class Snapshot:
    """What the modules of a network hold, to be compared and put back. 网络内容快照。

    Values are compared, since batch norm changes its means on a CPU without torch counting that.
    Parameters keep their values; those that get their shape meanwhile have none again.

    Args:
        net: The network; what is not an ``nn.Module`` holds nothing.
        what: What is put back.
        strict: Whether a change of a parameter or state, a new number and what is gone count as
            changes, too, as for a network that has run before and is reset.

    Examples:
        >>> net = nn.BatchNorm1d(2)
        >>> before = Snapshot(net)
        >>> _ = net(torch.rand(3, 2))
        >>> before.changed()
        ('running_mean', 'running_var', 'num_batches_tracked')
        >>> before.restore()
        >>> before.changed()
        ()
    """

    def __init__(self, net: object, what: What = "all", *, strict: bool = False) -> None:
        """Copy it; see the class."""
        self._all = what == "all"
        self._strict = strict
        self._modules = dict(net.named_modules()) if isinstance(net, nn.Module) else {}
        modules = self._modules.values()
        self._modes = [(module, module.training) for module in modules]
        generators = [] if what == "modes" else generators_of(net)
        self._generators = [(generator, generator.get_state()) for generator in generators]
        self._attributes: list[tuple[nn.Module, type, dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._lazy: list[tuple[Any, type]] = []
        for module in () if what == "modes" else modules:
            held = dict(vars(module))
            if not self._all:
                held = {name: value for name, value in held.items() if name == "_memories"}
            self._attributes.append((module, type(module), held))
            for part in held.values():
                if isinstance(part, dict | list | set):
                    self._containers.append((part, copy.copy(part)))
            if self._all:
                tensors = (*module._parameters.values(), *module._buffers.values())
                self._lazy += [(tensor, type(tensor)) for tensor in tensors if is_lazy(tensor)]
        self._values: dict[str, tuple[Any, Any]] = {}
        if self._all:
            self._values = {name: (value, _copied(value)) for name, value in self._now()}

    def _now(self) -> Iterator[tuple[str, object]]:
        """Tensors and numbers by the names that users know, without states and parameters unless it
        is strict.
        """
        for path, module in self._modules.items():
            prefix = f"{path}." if path else ""
            for name, value in _named(vars(module), states=self._strict):
                if isinstance(value, Tensor):
                    is_free = isinstance(value, nn.Parameter) and not self._strict
                    seen = not is_free and not is_lazy(value)
                else:
                    seen = isinstance(value, int | float) and name != "training"
                if seen:
                    yield prefix + name, value

    def changed(self) -> tuple[str, ...]:
        """Names of tensors and numbers that are not what they were; states of SpikingJelly's memory
        modules only if it is strict.
        """
        unlike = []
        now = dict(self._now())
        for name, value in now.items():
            if name in self._values:
                if not same(value, self._values[name][1]):
                    unlike.append(name)
            elif self._strict or isinstance(value, Tensor):
                unlike.append(name)
        gone = self._values.keys() - now.keys() if self._strict else ()
        return (*unlike, *sorted(gone))

    def restore(self) -> None:
        """Put it back."""
        for module, kind, attributes in self._attributes:
            if type(module) is not kind:  # a lazy module of torch becomes another
                module.__class__ = kind
            now = vars(module)
            for name in now.keys() - attributes.keys() if self._all else ():
                del now[name]
            now.update(attributes)
        for container, content in self._containers:
            container.clear()
            if isinstance(container, list):
                container.extend(content)
            else:
                container.update(content)
        for tensor, kind in self._lazy:
            if not is_lazy(tensor):
                tensor.grad = None
                tensor.data = torch.empty(0, device=tensor.device, dtype=tensor.dtype)
                tensor.__class__ = kind
        for value, before in self._values.values():
            if isinstance(value, Tensor) and not same(value, before):
                with torch.inference_mode(value.is_inference()), torch.no_grad():
                    value.copy_(before)
        for module, training in self._modes:
            module.training = training
        for generator, state in self._generators:
            generator.set_state(state)


@contextmanager
def preserved(net: object, what: What = "states", *, hooks: bool = True) -> Iterator[Snapshot]:
    """Evaluation mode; the network is as before afterwards. 保持网络原状。

    Other threads wait for the network until then, see :func:`locked`. Inside, states are copies
    without a graph, since a reset may write into their tensors. A callable that is not an
    ``nn.Module`` has nothing to be kept.

    Args:
        net: The network.
        what: What is kept. ``"all"`` is for a trial: meanwhile the network is not compiled.
        hooks: Whether its hooks are called; those of ``torch.nn.utils``, such as weight norm's, are
            part of what it computes and always are.

    Examples:
        >>> from spikingjelly.activation_based import neuron
        >>> net = neuron.IFNode()
        >>> _ = net(torch.tensor([0.5]))
        >>> with preserved(net):
        ...     net.reset()
        >>> net.v
        tensor([0.5000])
    """
    if not isinstance(net, nn.Module):
        yield Snapshot(net)
        return
    with locked(net), ExitStack() as stack:
        snapshot = Snapshot(net, what)
        stack.callback(snapshot.restore)
        net.eval()
        for module in () if what == "modes" else net.modules():
            memories = vars(module).get("_memories", {})
            memories.update({name: _copied(value) for name, value in memories.items()})
            if not hooks:
                _remove_hooks(module)
        if what == "all":
            # weights that autocast has cast without a graph would lose the caller's gradients
            stack.callback(torch.clear_autocast_cache)
            stack.enter_context(uncompiled(net))
        yield snapshot


def evaluation_mode(net: object) -> AbstractContextManager[Snapshot]:
    """Evaluation mode, and every module's own mode afterwards. 评估模式。

    Examples:
        >>> net = nn.Sequential(nn.Dropout(), nn.Identity().eval())
        >>> with evaluation_mode(net):
        ...     [module.training for module in net]
        [False, False]
        >>> [module.training for module in net]
        [True, False]
    """
    return preserved(net, "modes")


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


class RandomNumbers:
    """What a network draws from here on: the present states of the sources of random numbers, which
    are torch's generators of the CPU and of ``device``, those that modules keep as attributes,
    Python's and numpy's.

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
        self._own = generators_of(model)
        self._of_torch = [torch.default_generator]
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            self._of_torch.append(torch.cuda.default_generators[index])
        self._states = self._now()

    def _now(self) -> list[Any]:
        numbers = np.random.get_state()  # noqa: NPY002  # a network may draw from the global one
        states = [generator.get_state() for generator in (*self._of_torch, *self._own)]
        return [random.getstate(), numbers, *states]

    def drawn(self) -> bool:
        """Whether numbers have been drawn since."""
        python, *others = self._now()
        return python != self._states[0] or not same(others, self._states[1:])

    def seed(self, seed: int) -> None:
        """Begin anew; the generators of modules have seeds of their own, derived from ``seed``."""
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002  # as above
        for generator in self._of_torch:
            generator.manual_seed(seed)
        for number, generator in enumerate(self._own):
            generator.manual_seed(SampleSeeds([seed]).derived("generator", number).single())

    def restore(self) -> None:
        """Go back to the remembered states."""
        self._set(self._states)

    def _set(self, states: list[Any]) -> None:
        python, numbers, *of_torch = states
        random.setstate(python)
        np.random.set_state(numbers)  # noqa: NPY002  # as above
        for generator, state in zip((*self._of_torch, *self._own), of_torch, strict=True):
            generator.set_state(state)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw the numbers that followed; afterwards all sources go on where they were."""
        before = self._now()
        try:
            self.restore()
            yield
        finally:
            self._set(before)


@contextmanager
def seeded_network(model: object, seed: int, device: torch.device) -> Iterator[None]:
    """The sources of :class:`RandomNumbers` seeded, and as before afterwards.

    Restored without a seed of our own, they would show an attack the very numbers of the caller's
    next forward.

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
    numbers = RandomNumbers(model, device)
    try:
        numbers.seed(seed)
        yield
    finally:
        numbers.restore()


@contextmanager
def from_reset(model: object, seed: int, device: torch.device) -> Iterator[None]:
    """Evaluation mode, neurons reset, all randomness seeded; the network and all generators are as
    before afterwards.

    The generators are torch's global ones and those that modules of the network keep as attributes.
    A model that is not an ``nn.Module`` has nothing to restore but the global generators.
    """
    with preserved(model), seeded_network(model, seed, device):
        if isinstance(model, nn.Module):
            functional.reset_net(model)
        yield


def draws_numbers(model: nn.Module, x: Tensor) -> bool:
    """Whether a forward draws random numbers. 前向是否抽取随机数。

    Examples:
        >>> draws_numbers(nn.Dropout(), torch.ones(2)), draws_numbers(nn.ReLU(), torch.ones(2))
        (True, False)
    """
    with torch.no_grad():
        numbers = RandomNumbers(model, x.device)
        model(x)
        return numbers.drawn()


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


def has_hooks(net: nn.Module) -> bool:
    """Whether a network has hooks that are not torch's own."""
    hooks: list[object] = []
    for module in net.modules():
        for name in _HOOKS:
            hooks += vars(module)[name].values()
    return not all(map(_is_of_torch, hooks))


def same(a: object, b: object) -> bool:
    """Whether two values are equal, however they are nested; NaN equals NaN in tensors.

    Objects of other classes cannot be looked into: two of one class count as equal.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
            return False
        return bool(torch.isclose(a, b, 0, 0, equal_nan=True).all())
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, int | float | str):
        return a == b or (a != a and b != b)
    return type(a) is type(b)


def _copied(value: object) -> object:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _named(attributes: Mapping[str, Any], *, states: bool) -> Iterator[tuple[str, object]]:
    """Attributes and what is in their containers, by the name under which a user knows it."""
    for name, value in attributes.items():
        if name in ("_buffers", "_parameters"):
            yield from value.items()
        elif name == "_memories":
            yield from value.items() if states else ()
        else:
            yield from _inside(name, value)


def _inside(name: str, value: object) -> Iterator[tuple[str, object]]:
    """A value, or those in a container, however they are nested."""
    if isinstance(value, dict):
        for key, kept in value.items():
            yield from _inside(f"{name}[{key!r}]", kept)
    elif isinstance(value, list | tuple):
        for index, kept in enumerate(value):
            yield from _inside(f"{name}[{index}]", kept)
    else:
        yield name, value


def _is_of_torch(hook: object) -> bool:
    gives_shapes = getattr(hook, "__func__", None) is LazyModuleMixin._infer_parameters
    return gives_shapes or type(hook).__module__.startswith("torch.nn.utils")


def _remove_hooks(module: nn.Module) -> None:
    """Leave a module torch's own hooks alone."""
    for name in _HOOKS:
        hooks = vars(module)[name]
        for key, hook in list(hooks.items()):
            if not _is_of_torch(hook):
                del hooks[key]
