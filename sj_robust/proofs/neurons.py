"""Which neurons and surrogates run on bounds, and why others do not."""

from functools import partial
from typing import Any

from torch import nn

from sj_robust.core.host import lif_multi_step, surrogate
from sj_robust.neuron.charging import Charging, Neuron, class_of, emits_spikes, is_neuron

__all__ = [
    "NO_BOUNDS",
    "OPEN",
    "as_lif",
    "counts",
    "has_steps",
    "no_bounds",
    "other_forwards",
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


def other_forwards(module: nn.Module) -> list[str]:
    """Forwards that a neuron has in the place of its class's, and not from this package.
    被替换的前向方法。
    """
    found = []
    for name in ("forward", "single_step_forward", "multi_step_forward"):
        own = vars(module).get(name)
        if own is not None and not own.__module__.startswith("sj_robust."):
            found.append(name)
    return found


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
