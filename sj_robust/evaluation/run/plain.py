"""A network as it was before the first query, which no query changes."""

import contextvars
import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from sj_robust.core.host import EVAL_MODE_HAS_NO_GRADIENT, functional, is_neuron
from sj_robust.core.preserved import preserved

__all__ = ["Plain", "plain_copy"]


class Plain(nn.Module):
    """A network whose every forward runs on a new copy, without gradients. 每次前向都用新副本。

    No forward sees what an earlier one left in the network, who asks, nor whether a gradient is
    wanted. Where one is wanted, it is that of the operations that this forward runs, recorded here:
    what the network says of its own gradient (``detach``, a custom ``autograd.Function``, a hook, a
    switch on ``torch.is_grad_enabled()``) plays no part. Spiking neurons alone keep their
    surrogate, and rounding and clamps have the gradient of the identity.

    What lies outside of the network, such as a global variable or a file, is not copied.

    Args:
        network: The network, of which a copy is kept; what its classes say of copying is not asked.

    Raises:
        TypeError: If something in the network cannot be copied; and RuntimeError or whatever else
            the copied object raises.

    Examples:
        >>> class Counts(nn.Module):
        ...     calls = 0
        ...
        ...     def forward(self, x):
        ...         self.calls += 1
        ...         return x.detach() * self.calls
        >>> plain = Plain(Counts())
        >>> x = torch.ones(1, requires_grad=True)
        >>> plain(x).item(), plain(x).item()
        (1.0, 1.0)
        >>> torch.autograd.grad(plain(3 * x), x)
        (tensor([3.]),)
    """

    resets_itself = True

    def __init__(self, network: nn.Module) -> None:
        """Copy the network."""
        super().__init__()
        self.network = _copied(network)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes] of images [N, ...]."""
        network = _copied(self.network)
        if not (torch.is_grad_enabled() and images.requires_grad):
            return self._logits(network, images).detach()
        recording = _Recording()
        for module in network.modules():
            if is_neuron(module):
                module.training |= EVAL_MODE_HAS_NO_GRADIENT
                module.forward = partial(recording.run, module.forward)
        # a copy, since a leaf of the graph could not be changed in place
        try:
            logits = self._logits(network, recording.wrapped(images.clone()))
        finally:
            recording.is_open = False
        return logits.graph if isinstance(logits, _Recorded) else logits

    def _logits(self, network: nn.Module, images: Tensor) -> Tensor:
        """From a thread without a gradient, whose stack does not tell who asks."""
        kind = images.device.type
        lowered = torch.is_autocast_enabled(kind)
        autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=lowered)
        place = torch.cuda.device(images.device) if images.is_cuda else nullcontext()

        def ask() -> Tensor:
            with torch.no_grad(), autocast, place:
                logits: Tensor = network(images)
            return logits

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(contextvars.copy_context().run, ask).result()


def plain_copy(network: nn.Module) -> tuple[Plain | None, str]:
    """The plain network, or none and the reason, as a remark for a report. 副本，或无法复制的原因。

    Examples:
        >>> plain_copy(nn.Identity())[1]
        ''
    """
    try:
        return Plain(network), ""
    except Exception as error:  # an object of somebody's that cannot be copied
        return None, (
            f"The network cannot be copied ({type(error).__name__}: {error}), so the verdict is "
            "its own after all that the attacks have asked it; give that object a __deepcopy__."
        )


def _copied(network: nn.Module) -> nn.Module:
    """A copy of a network, reset and not compiled."""
    memo: dict[int, Any] = {}
    with preserved(network):
        functional.reset_net(network)
        modules = [one for one in network.modules() if not isinstance(one, torch.jit.ScriptModule)]
        for module in modules:
            original = module._modules.get("_orig_mod", module)  # of what torch.compile returns
            if id(module) not in memo:
                memo[id(module)] = memo.get(id(original), object.__new__(type(original)))
            memo[id(original)] = memo[id(module)]
        for module in modules:
            if "_orig_mod" in module._modules:
                continue
            attributes = copy.deepcopy(vars(module), memo)
            vars(memo[id(module)]).update(attributes | {"_compiled_call_impl": None})
        return copy.deepcopy(network, memo)  # for most networks the copy that was just filled


class _Recording:
    """The graph of one forward."""

    is_open = True
    """Whether the forward runs; what somebody keeps of it later is no more than its values."""

    def wrapped(self, graph: Tensor) -> "_Recorded":
        """The tensor whose graph this is."""
        found: _Recorded = graph.detach().as_subclass(_Recorded)
        found.graph, found.recording = graph, self
        return found

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a function, or a spiking neuron, returns, its graph recorded whatever mode is on."""
        given = tree_map_only(_Recorded, _Recorded.content, (args, kwargs))
        with _enabled():
            found = function(*given[0], **given[1])
        return tree_map_only(Tensor, self.wrapped, found)

    def step(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a function of steps returns, with the gradient of the identity."""
        changed = function in _STEPS_IN_PLACE and isinstance(args[0], _Recorded)
        found = self.run(_STEPS_IN_PLACE[function] if changed else function, *args, **kwargs)
        moved = [one for one in tree_leaves((args, kwargs)) if isinstance(one, _Recorded)]
        with _enabled():
            graph = moved[0].content()
            if graph.shape != found.shape:  # limits that depend on the images
                return found
            jump = (found.content() - graph).detach()
            if changed:
                graph.add_(jump)
                return moved[0]
            return self.wrapped(graph + jump)


class _Recorded(Tensor):
    """A tensor without a gradient, as far as anyone can see, beside its graph."""

    graph: Tensor
    recording: _Recording

    def content(self) -> Tensor:
        """The tensor with its graph, as long as that is recorded."""
        return self.graph if self.recording.is_open else self.graph.detach()

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the function with its graph, or as if there were none."""
        given: tuple[Any, ...] = (args, kwargs or {})
        recorded = [one for one in tree_leaves(given) if isinstance(one, cls)]
        recording = next((one.recording for one in recorded if one.recording.is_open), None)
        if recording is not None and func not in _TELLS:
            if func in _CUTS:
                return recorded[0]
            run = recording.run if func not in _STEPS else recording.step
            return run(func, *given[0], **given[1])
        with torch._C.DisableTorchFunctionSubclass():
            given = tree_map_only(cls, lambda one: one.graph.detach(), given)
            return func(*given[0], **given[1])


def _getter(name: str) -> Any:
    """What torch is asked for an attribute."""
    return getattr(Tensor, name).__get__


_CUTS = (torch.detach, Tensor.detach, Tensor.detach_, Tensor.requires_grad_, _getter("data"))
"""Functions that only change the graph, or look behind it."""
_NAMES = ("round", "floor", "ceil", "trunc", "fix", "sign", "clamp", "clip", "floor_divide")
_STEPS_IN_PLACE: dict[Any, Any] = {
    getattr(place, f"{name}_"): getattr(place, name)
    for place, name in product((torch, Tensor), _NAMES)
    if hasattr(place, f"{name}_")
}
"""Those that change their first argument, and what gives the same without."""
_STEPS = (
    *(getattr(place, name) for place, name in product((torch, Tensor), _NAMES)),
    *_STEPS_IN_PLACE,
    Tensor.__floordiv__,
)
"""Functions that take the gradient of the identity, where their own is zero."""
_TELLS = (
    *map(_getter, ("requires_grad", "grad_fn", "is_leaf", "grad")),
    Tensor.numpy,
    Tensor.__array__,
    Tensor.tolist,
    Tensor.item,
    Tensor.register_hook,
)
"""Functions that tell whether there is a graph, or leave torch."""


@contextmanager
def _enabled() -> Iterator[None]:
    """Plain tensors with gradients."""
    with (
        torch._C.DisableTorchFunctionSubclass(),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        yield
