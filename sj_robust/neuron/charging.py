"""Which neurons of a network charge linearly, with their decay and gain."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from sj_robust.core.checks import check_network, check_values
from sj_robust.core.host import is_neuron, neuron
from sj_robust.neuron.dlif import DLIFNode, Spiking, describe_surrogate
from sj_robust.ops import Surrogate

__all__ = [
    "Charging",
    "Neuron",
    "NeuronKey",
    "StatesCharging",
    "emits_spikes",
    "find_neurons",
    "has_known_dynamics",
    "is_neuron",
    "read_charging",
]

NeuronKey = str | type[nn.Module]


@dataclass(frozen=True)
class Charging:
    """How a neuron charges at present: ``h[t] = decay * v[t-1] + gain * input_gain[t] * x[t]``.

    Attributes:
        decay: Fraction of the potential kept per step; a tensor with a gradient if the neuron
            learns it.
        gain: Fixed input gain, 1/tau of a neuron with ``decay_input``.
        input_gain: Learnable gain per time step [T], None if the neuron has none.
    """

    decay: float | Tensor
    gain: float | Tensor = 1.0
    input_gain: Tensor | None = None

    @property
    def decay_value(self) -> float:
        """The decay as a number."""
        if isinstance(self.decay, Tensor):
            return float(self.decay.detach())
        return float(self.decay)

    def gain_at(self, t: int, *, input_gain: bool) -> float | Tensor:
        """Gain of the input of step ``t``, with or without the learnable part."""
        return (
            self.gain
            if self.input_gain is None or not input_gain
            else self.gain * self.input_gain[t]
        )


@runtime_checkable
class StatesCharging(Protocol):
    """A neuron that states how it charges, though it may fire in its own way."""

    def charging(self) -> Charging:
        """How it charges at present."""


@dataclass(frozen=True)
class Neuron:
    """A spiking layer whose charge equation is known, or was stated by the user or its class.

    Attributes:
        name: Name of the module in the network.
        module: The neuron.
        charging: Reads the charge parameters as they are now.
        known: Whether the dynamics are SpikingJelly's or ours, not stated by the user or the class.
    """

    name: str
    module: Any
    charging: Callable[[], Charging]
    known: bool

    def numbers(self, *, learned: bool = True) -> tuple[Any, ...]:
        """Threshold, potential after a spike (None: soft reset), surrogate, decay and gains as they
        are now, to be compared with those of another time. Without ``learned``, tensors among decay
        and gains are left out: reading them would wait for their device.
        """
        charging = self.charging()
        given = [charging.decay, charging.gain, charging.input_gain]
        told = [value for value in given if learned or not isinstance(value, Tensor)]
        fixed = [self.module.v_threshold, self.module.v_reset]
        function = self.module.surrogate_function
        spikes = [getattr(function, name, None) for name in ("spiking", "max_spike_count")]
        return (function, *spikes, *map(_as_numbers, [*fixed, *told]))

    @property
    def type_name(self) -> str:
        """Class name of the neuron."""
        return type(self.module).__name__

    @property
    def time_step(self) -> int:
        """Number of steps since the neuron's reset, for neurons whose gain depends on it."""
        return int(self.module.time_step) if type(self.module) is DLIFNode else 0

    @property
    def surrogate(self) -> Surrogate:
        """The spike function and its surrogate derivative."""
        return describe_surrogate(self.module.surrogate_function)

    @property
    def fires(self) -> bool:
        """Whether the outputs are whole numbers of spikes."""
        function = self.module.surrogate_function
        return self.known and isinstance(function, Spiking) and function.spiking

    @property
    def binary(self) -> bool:
        """Whether the outputs can only be 0 and 1."""
        function = self.module.surrogate_function
        return self.fires and getattr(function, "max_spike_count", 1) == 1


def _as_numbers(value: float | Tensor | None) -> float | tuple[float, ...] | None:
    return tuple(value.detach().flatten().tolist()) if isinstance(value, Tensor) else value


def find_neurons(
    net: nn.Module,
    decay: Mapping[NeuronKey, float] | None = None,
    gain: Mapping[NeuronKey, float] | None = None,
) -> tuple[dict[str, Neuron], dict[str, str], set[str]]:
    """Neurons that can be followed, by name, reasons by name of the others, and the names of those
    others that spike.

    ``decay`` and ``gain`` (a fixed input gain) are those of neurons whose dynamics are not known,
    by module name or exact type; None where a caller does not offer them, so that no reason advises
    them. ValueError if there is no neuron, a key fits none or one of known dynamics, or a value is
    out of range.
    """
    check_network(net)
    check_values(net)
    candidates = {name: module for name, module in net.named_modules() if is_neuron(module)}
    if not candidates:
        raise ValueError(
            f"{type(net).__name__} holds no SpikingJelly neuron, so there is nothing to monitor "
            "or certify; give a network with IF, LIF, PLIF or DLIF neurons"
        )
    decays, gains = decay or {}, gain or {}
    _check_given(candidates, decays, gains)
    followed: dict[str, Neuron] = {}
    unsupported: dict[str, str] = {}
    for name, module in candidates.items():
        given = _lookup(decays, name, module)
        if has_known_dynamics(module):
            followed[name] = Neuron(name, module, partial(read_charging, module), known=True)
        elif isinstance(module, StatesCharging):
            followed[name] = Neuron(name, module, module.charging, known=False)
        elif given is not None:
            fixed_gain = _lookup(gains, name, module)
            stated = partial(
                Charging, float(given), 1.0 if fixed_gain is None else float(fixed_gain)
            )
            followed[name] = Neuron(name, module, stated, known=False)
        else:
            unsupported[name] = _reason(module, offers_decay=decay is not None)
    return followed, unsupported, {name for name in unsupported if emits_spikes(candidates[name])}


def has_known_dynamics(module: nn.Module) -> bool:
    """Whether the dynamics of a module are known; by exact type, since a subclass may change them.
    动力学是否已知。
    """
    return type(module) in _KNOWN


def read_charging(module: nn.Module) -> Charging:
    """How a neuron of known dynamics charges at present. 读取神经元的充电方程。

    Examples:
        >>> read_charging(neuron.LIFNode(tau=2.0))
        Charging(decay=0.5, gain=0.5, input_gain=None)
    """
    return _KNOWN[type(module)](module)


def emits_spikes(module: nn.Module) -> bool:
    """Whether a neuron emits spikes, not potentials as SpikingJelly's non-spiking ones do.
    神经元是否发放脉冲。
    """
    return not any("NonSpiking" in cls.__name__ for cls in type(module).__mro__)


def _parametric_lif(module: Any) -> Charging:
    rate = module.w.sigmoid()
    return Charging(1.0 - rate, rate if module.decay_input else 1.0)


# Exact types: a subclass may charge differently.
_KNOWN: dict[type, Callable[[Any], Charging]] = {
    neuron.IFNode: lambda module: Charging(decay=1.0),
    neuron.LIFNode: lambda module: Charging(
        1.0 - 1.0 / module.tau, 1.0 / module.tau if module.decay_input else 1.0
    ),
    neuron.ParametricLIFNode: _parametric_lif,
    DLIFNode: lambda module: Charging(module.decay, input_gain=module.input_gain),
}


def _reason(module: nn.Module, *, offers_decay: bool) -> str:
    name = type(module).__name__
    if not emits_spikes(module):
        return f"{name} emits potentials, not spikes"
    if isinstance(module, neuron.BaseNode):
        unknown = f"the decay of {name} is not known"
        if not offers_decay:
            return unknown
        return (
            f"{unknown}; if its potential decays by a constant factor per step, pass "
            f"decay={{{name}: factor}}"
        )
    return f"{name} has no membrane potential that decays by a constant factor per step"


def _lookup(given: Mapping[NeuronKey, float], name: str, module: nn.Module) -> float | None:
    return given.get(name, given.get(type(module)))


def _check_given(
    candidates: Mapping[str, nn.Module],
    decay: Mapping[NeuronKey, float],
    gain: Mapping[NeuronKey, float],
) -> None:
    for key, value in decay.items():
        fitting = [module for name, module in candidates.items() if key in (name, type(module))]
        if not fitting:
            known = [f"{name!r} ({type(module).__name__})" for name, module in candidates.items()]
            raise ValueError(
                f"decay: no neuron has the name or exact type {key!r}; the network has "
                f"{', '.join(known)}"
            )
        if any(has_known_dynamics(module) for module in fitting):
            kind = type(fitting[0]).__name__
            raise ValueError(
                f"decay: {key!r} names a {kind}, whose decay is read from the neuron; omit it"
            )
        for module in fitting:
            if not isinstance(module, neuron.BaseNode) or not emits_spikes(module):
                reason = _reason(module, offers_decay=True)
                raise ValueError(f"decay: {key!r} cannot be followed by a decay alone: {reason}")
        if not 0.0 < value <= 1.0:
            raise ValueError(
                f"decay of {key!r} must be in (0, 1], got {value}; a time constant tau means "
                "decay 1 - 1 / tau"
            )
    for key in gain:
        if key not in decay:
            raise ValueError(
                f"gain: {key!r} has no decay; gain belongs to neurons given in decay={{...}}"
            )
