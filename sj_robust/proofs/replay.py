"""What runs on bounds: neurons and surrogates that do, and the calls behind bounds, which can run
again.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sj_robust.core.host import lif_multi_step, surrogate
from sj_robust.neuron.charging import Charging, Neuron, class_of, emits_spikes, is_neuron
from sj_robust.proofs.rounding import NoBoundsError
from sj_robust.proofs.rules import moved
from sj_robust.proofs.values import Bounds, Call, Origin

__all__ = [
    "NO_BOUNDS",
    "OPEN",
    "as_lif",
    "counts",
    "has_steps",
    "leaves_of",
    "no_bounds",
    "replayed",
    "rows_of",
    "spiking_surrogates",
    "stepped",
]

_Surrogate: Any = surrogate.SurrogateFunctionBase

OPEN = ["PSN", "MaskedPSN", "SlidingPSN", "KLIFNode", "GatedLIFNode", "CUBALIFNode"]
"""Neurons whose own code runs on bounds, operation by operation: linear maps, products, and a step
of their surrogate.
"""

_LIKE_LIF = ["OTTTLIFNode", "SLTTLIFNode", "save_v_LIFNode", "ILIFNode"]
"""Neurons that charge as LIF does in evaluation mode."""

NO_BOUNDS = {
    "AdaptBaseNode": "its spikes change a second state, which adapts its later current",
    "NoisyBaseNode": "it draws noise in every time step",
    "NoisyNonSpikingBaseNode": "it draws noise in every time step",
    "KLIFNode": "its reset is a TorchScript function, which supports no bounds",
    "QIFNode": "its charge depends on the square of its potential",
    "EIFNode": "its charge depends on an exponential of its potential",
    "ComplementaryLIFNode": "its second state is driven by its spikes, and resets the first one",
    "LIAFNode": "it emits an analogue function of its potential",
    "RAFNode": "its potential oscillates, with two states that reset together",
    "MPBNBaseNode": "it normalises its potential before it fires",
    "TernaryIFNode": "its spikes have signs",
    "TernaryLIFNode": "its spikes have signs",
    "DSRIFNode": "it emits a mean rate that is rounded, not spikes",
    "DSRLIFNode": "it emits a weighted rate that is rounded, not spikes",
    "FewSpikeNode": "its thresholds and weights follow a table of steps",
    "STBIFNode": "it fires by the spikes that it has emitted so far",
}
"""Why neurons of a class, or of one that derives from it, have no bounds, by name of the class."""


def as_lif(name: str, module: Any) -> Neuron | None:
    """A neuron that charges as LIF does in evaluation mode; None for another one. 视为 LIF。

    Examples:
        >>> as_lif("0", nn.ReLU()) is None
        True
    """
    if class_of(module, lambda kind: kind.__name__ in _LIKE_LIF) is None or not is_neuron(module):
        return None
    return Neuron(name, module, partial(_charging, module), known=True)


def counts(neuron: Neuron) -> int | None:
    """The largest spike of a neuron that emits integers; None if it emits 0 and 1. 最大脉冲数。"""
    if class_of(neuron.module, lambda kind: kind.__name__ == "ILIFNode") is None:
        return None
    return int(neuron.module.surrogate_function.max_spike_count)


def no_bounds(module: nn.Module) -> str | None:
    """Why a neuron has no bounds, if the reason is known. 没有上下界的原因。

    Examples:
        >>> from spikingjelly.activation_based import neuron
        >>> no_bounds(neuron.QIFNode())
        'its charge depends on the square of its potential'
    """
    names = [cls.__name__ for cls in type(module).__mro__]
    return next((NO_BOUNDS[name] for name in names if name in NO_BOUNDS), None)


def spiking_surrogates(net: nn.Module) -> list[Any]:
    """Surrogates of a network that spike, each once. 网络中的替代函数。"""
    surrogates = [part for part in net.modules() if isinstance(part, _Surrogate)]
    return [part for part in surrogates if part.spiking]


def stepped(module: nn.Module) -> bool:
    """Whether a neuron's own code runs on bounds. 神经元代码可直接在上下界上运行。"""
    function = getattr(module, "surrogate_function", None)
    spikes = isinstance(function, _Surrogate) and function.spiking
    plain = lif_multi_step is not None  # the older release's neurons run scripts of torch
    is_open = class_of(module, lambda kind: kind.__name__ in OPEN) is not None
    return plain and is_open and emits_spikes(module) and spikes


def has_steps(net: nn.Module) -> bool:
    """Whether a network without neurons has something that bounds are known of: a surrogate that
    spikes, a ReLU, or what says that it ``rectifies``. 是否含有阶跃或 ReLU。
    """
    rectifies = any(
        isinstance(part, nn.ReLU) or getattr(part, "rectifies", False) for part in net.modules()
    )
    return bool(spiking_surrogates(net)) or rectifies


def _charging(module: Any) -> Charging:
    share = 1.0 / module.tau
    return Charging(1.0 - share, share if module.decay_input else 1.0)


def replayed(origin: Origin, leaves: Mapping[int, Bounds]) -> Bounds:
    """What the calls behind bounds give for other leaves of the same shapes. 以其他叶子重算上下界。

    Args:
        origin: Where the bounds come from.
        leaves: Bounds by number of the leaf.

    Examples:
        >>> x = Bounds(torch.ones(2).double(), torch.zeros(2).double())
        >>> x.origin = Origin(leaf=0)
        >>> from sj_robust.proofs.values import bounds_of
        >>> y = bounds_of(torch.add, bounds_of(torch.mul, x, 3.0), 1.0)
        >>> other = Bounds(torch.zeros(2).double(), torch.ones(2).double())
        >>> again = replayed(y.origin, {0: other})
        >>> again.centre.tolist(), again.radius.tolist()
        ([1.0, 1.0], [3.0, 3.0])
    """
    walk = _Walk(
        of_leaf=leaves.__getitem__,
        of_call=lambda call, args: call.rule(call.func, *args, **call.kwargs),
    )
    found: Bounds = walk.value_of(origin)
    return found


def rows_of(origin: Origin | None, leaves: Callable[[int], Tensor]) -> Tensor:
    """The number of the sample to which each element of bounds belongs. 每个元素所属的样本。

    Args:
        origin: Where the bounds come from.
        leaves: The same for a leaf, by its number.

    Examples:
        >>> x = Bounds(torch.ones(2, 3).double(), torch.zeros(2, 3).double())
        >>> x.origin = Origin(leaf=0)
        >>> from sj_robust.proofs.values import bounds_of
        >>> turned = bounds_of(Tensor.transpose, x, 0, 1)
        >>> rows_of(turned.origin, lambda _: torch.tensor([[0] * 3, [1] * 3]))
        tensor([[0, 1],
                [0, 1],
                [0, 1]])
    """
    walk = _Walk(of_leaf=leaves, of_call=_rows_behind, of_part=_spread)
    found: Tensor = walk.value_of(origin)
    return found


class _Walk:
    """Values for origins, from those of their leaves up; every call is made once.

    It is a class because a nested function that calls itself would be a cycle, and would keep all
    that the calls made until Python looks for cycles.
    """

    def __init__(
        self,
        *,
        of_leaf: Callable[[int], Any],
        of_call: Callable[[Call, Any], Any],
        of_part: Callable[[Any, Origin], Any] = lambda found, _: found,
    ) -> None:
        """Nothing is made yet.

        Args:
            of_leaf: The value of a leaf, by its number.
            of_call: The value of a call, from the call and the values of its arguments.
            of_part: The value of an origin, from that of its part of a call and the origin.
        """
        self._of_leaf = of_leaf
        self._of_call = of_call
        self._of_part = of_part
        self._made: dict[Call, Any] = {}

    def value_of(self, value: Any) -> Any:
        """An argument of a call, with values in the place of origins."""
        if type(value) in (tuple, list):
            return type(value)(map(self.value_of, value))
        if not isinstance(value, Origin):
            return value
        if value.leaf is not None:
            return self._of_leaf(value.leaf)
        call = value.call
        assert call is not None
        if call not in self._made:
            self._made[call] = self._of_call(call, self.value_of(call.args))
        made = self._made[call]
        return self._of_part(made if value.part is None else made[value.part], value)


def _rows_behind(call: Call, args: Any) -> Any:
    """Samples of the results of a call, for those of its arguments."""
    name = call.func.__name__.strip("_")
    if call.rule is moved:
        func = torch.Tensor.reshape if name == "view" else call.func
        if isinstance(args[0], list | tuple):
            args = (_beside(args, call), *args[1:])
        return func(*args, **call.kwargs)
    first = _first_rows(args, call.args)
    if name in ("mean", "sum"):
        dim = [*args[1:], call.kwargs.get("dim")][0]
        keepdim = call.kwargs.get("keepdim", args[2] if len(args) > 2 else False)
        dims = tuple(range(first.ndim)) if dim is None else dim
        return first.amax(dims, keepdim)
    return first


def _beside(args: Any, call: Call) -> list[Tensor]:
    """What is joined, with constants as of the samples that they stand beside."""
    parts, origins = args[0], call.args[0]
    dim = call.kwargs.get("dim", args[1] if len(args) > 1 else 0)
    like = _first_rows(parts, origins)
    found = []
    for part, origin in zip(parts, origins, strict=True):
        if isinstance(origin, Origin):
            found.append(part)
        elif part.shape == like.shape:
            found.append(like)
        elif like.numel():
            found.append(like.narrow(dim, 0, 1).expand(part.shape))
        else:
            raise NoBoundsError("joining a constant with an empty part, such as s[:-1] at T = 1")
    return found


def _first_rows(args: Any, origins: Any) -> Tensor:
    """Of the first argument that is bounds and has most dimensions."""
    some = [one for one, origin in zip(args, origins, strict=True) if isinstance(origin, Origin)]
    found: Tensor = max(some, key=lambda one: one.ndim)
    return found


def _spread(rows: Tensor, origin: Origin) -> Tensor:
    """Samples of the elements of a result, in which a dimension may have another size."""
    shape = origin.shape
    assert shape is not None
    if rows.ndim == len(shape):
        for dim, size in enumerate(shape):
            if rows.shape[dim] != size:
                rows = rows.narrow(dim, 0, 1)
    return rows.expand(shape)


def leaves_of(origin: Origin | None) -> set[int]:
    """Numbers of the leaves that bounds depend on."""
    found: set[int] = set()
    seen: set[int] = set()
    waiting: list[Any] = [origin]
    while waiting:
        value = waiting.pop()
        if type(value) in (tuple, list):
            waiting += value
        elif isinstance(value, Origin):
            if value.leaf is not None:
                found.add(value.leaf)
            elif id(value.call) not in seen:
                assert value.call is not None
                seen.add(id(value.call))
                waiting.append(value.call.args)
    return found
