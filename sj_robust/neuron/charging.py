"""Which neurons of a network charge linearly, with their decay and gain."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from sj_robust.core.checks import check_network, check_number
from sj_robust.core.host import is_neuron, neuron
from sj_robust.neuron.dlif import DLIFNode, Spiking, describe_surrogate
from sj_robust.ops import Surrogate

__all__ = [
    "Charging",
    "Neuron",
    "NeuronKey",
    "StatesCharging",
    "class_of",
    "emits_spikes",
    "find_neurons",
    "has_known_dynamics",
    "is_neuron",
    "known_change",
    "read_charging",
    "stated",
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
        stated: Whether the user stated them, see :func:`stated`.
    """

    name: str
    module: Any
    charging: Callable[[], Charging]
    known: bool
    stated: bool = False

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
        return int(self.module.time_step) if isinstance(self.module, DLIFNode) else 0

    @property
    def initial(self) -> Any:
        """Potential that its reset sets, before the first step."""
        return self.module._memories_rv["v"]  # the host has no other name for it

    @property
    def surrogate(self) -> Surrogate:
        """The spike function and its surrogate derivative."""
        return describe_surrogate(self.module.surrogate_function)

    @property
    def spiking(self) -> bool:
        """Whether its surrogate spikes."""
        function = self.module.surrogate_function
        return isinstance(function, Spiking) and function.spiking

    @property
    def fires(self) -> bool:
        """Whether the outputs are whole numbers of spikes."""
        return self.known and self.spiking

    @property
    def binary(self) -> bool:
        """Whether the outputs can only be 0 and 1."""
        function = self.module.surrogate_function
        return self.fires and getattr(function, "max_spike_count", 1) == 1


def _as_numbers(value: float | Tensor | None) -> float | tuple[float, ...] | None:
    return tuple(value.detach().flatten().tolist()) if isinstance(value, Tensor) else value


def find_neurons(
    net: nn.Module, *, offers_decay: bool = False
) -> tuple[dict[str, Neuron], dict[str, str], set[str]]:
    """Neurons that can be followed, by name, reasons by name of the others, and the names of those
    others that spike.

    Args:
        net: The network; ValueError if it has no neuron.
        offers_decay: Whether the caller has the options of :func:`stated`, which reasons then
            advise.
    """
    check_network(net)
    followed: dict[str, Neuron] = {}
    unsupported: dict[str, str] = {}
    candidates = _candidates(net)
    for name, module in candidates.items():
        if has_known_dynamics(module):
            followed[name] = Neuron(name, module, partial(read_charging, module), known=True)
        elif isinstance(module, StatesCharging):
            charging = module.charging
            by_user = isinstance(charging, _Stated)
            followed[name] = Neuron(name, module, charging, known=False, stated=by_user)
        else:
            unsupported[name] = _reason(module, offers_decay=offers_decay)
    return followed, unsupported, {name for name in unsupported if emits_spikes(candidates[name])}


@contextmanager
def stated(
    net: nn.Module,
    decay: Mapping[NeuronKey, float] | None = None,
    gain: Mapping[NeuronKey, float] | None = None,
) -> Iterator[None]:
    """Context in which neurons whose dynamics are not known charge as the user says: by ``decay``
    and a fixed input gain, 1 by default. 用户声明的充电方程。

    Equation: ``h = decay * v + gain * x``, plus ``(1 - decay) * v_reset`` for a hard reset.

    Args:
        net: The network.
        decay: Fraction of the potential kept per step, by module name or class.
        gain: Input gain of neurons in ``decay``, with the same keys.

    Raises:
        ValueError: If there is no neuron, a key fits none or one of known dynamics, or a value is
            out of range.

    Examples:
        >>> class Quiet(neuron.LIFNode):
        ...     def neuronal_charge(self, x):
        ...         self.v = 0.9 * self.v + 0.5 * x
        >>> net = nn.Sequential(Quiet())
        >>> with stated(net, {Quiet: 0.9}, {Quiet: 0.5}):
        ...     find_neurons(net)[0]["0"].charging()
        Charging(decay=0.9, gain=0.5, input_gain=None)
    """
    decays, gains = decay or {}, gain or {}
    candidates = _candidates(net) if decays or gains else {}
    _check_given(candidates, decays, gains)
    before: list[tuple[nn.Module, dict[str, Any]]] = []
    try:
        for name, module in candidates.items():
            kept = _lookup(decays, name, module)
            if kept is not None:
                own = {key: vars(module)[key] for key in ("charging",) if key in vars(module)}
                before.append((module, own))
                fixed = _lookup(gains, name, module)
                given_gain = 1.0 if fixed is None else float(fixed)
                vars(module)["charging"] = _Stated(float(kept), given_gain)
        yield
    finally:
        for module, own in before:
            del vars(module)["charging"]
            vars(module).update(own)


@dataclass(frozen=True)
class _Stated:
    """How the user says that a neuron charges."""

    decay: float
    gain: float

    def __call__(self) -> Charging:
        return Charging(self.decay, self.gain)


def has_known_dynamics(module: nn.Module) -> bool:
    """Whether the dynamics of a module are known: those of IF, LIF, PLIF or DLIF, or of a subclass
    that does not change them. 动力学是否已知。

    Examples:
        >>> class MyLIF(neuron.LIFNode):
        ...     def __init__(self):
        ...         super().__init__(tau=4.0)
        >>> has_known_dynamics(MyLIF()), has_known_dynamics(neuron.QIFNode())
        (True, False)
    """
    return class_of(module, _KNOWN.__contains__) is not None


def read_charging(module: nn.Module) -> Charging:
    """How a neuron of known dynamics charges at present. 读取神经元的充电方程。

    Examples:
        >>> read_charging(neuron.LIFNode(tau=2.0))
        Charging(decay=0.5, gain=0.5, input_gain=None)
    """
    kind = next(cls for cls in type(module).__mro__ if cls in _KNOWN)
    return _KNOWN[kind](module)


def class_of(module: nn.Module, fits: Callable[[type], bool]) -> type | None:
    """The nearest class of a neuron that fits, if its code is what the neuron runs; else None.
    神经元实际运行其代码的类。

    A subclass changes nothing if it overrides no attribute of that class but the constructor and
    the text of ``print``, so that it may add arguments, methods and states of its own.
    """
    kind = next(filter(fits, type(module).__mro__), None)
    return None if kind is None or _change(module, kind) else kind


def known_change(module: nn.Module) -> str | None:
    """What a neuron changes of IF, LIF, PLIF or DLIF, in words; None if it is none of them or
    changes nothing. 对已知动力学的改动。

    Examples:
        >>> class Early(neuron.LIFNode):
        ...     def neuronal_fire(self):
        ...         return self.v * 0 + 1
        >>> known_change(Early())
        'replaces neuronal_fire of LIFNode'
    """
    kind = next((cls for cls in type(module).__mro__ if cls in _KNOWN), None)
    name = None if kind is None else _change(module, kind)
    if kind is None or name is None:
        return None
    of_its_own = name in vars(module)
    return f"has a {name} of its own" if of_its_own else f"replaces {name} of {kind.__name__}"


def _change(module: nn.Module, kind: type) -> str | None:
    """Name of an attribute of a class that a neuron, or its own class, replaces."""
    replaced = _DYNAMICS if type(module) is kind else (*_DYNAMICS, *_FORWARDS)
    for name in replaced:
        if name in vars(module):
            return name
    for cls in type(module).__mro__:
        if cls in kind.__mro__:
            continue
        for name, value in vars(cls).items():
            if name in _HARMLESS:
                continue
            if name in _DYNAMICS or hasattr(kind, name):
                return name
            # a setting, such as v_threshold, which the constructor sets
            if hasattr(value, "__set__") and name in inspect.signature(kind).parameters:
                return name
    return None


def emits_spikes(module: nn.Module) -> bool:
    """Whether a neuron emits spikes, not potentials as SpikingJelly's non-spiking ones do.
    神经元是否发放脉冲。
    """
    return not any("NonSpiking" in cls.__name__ for cls in type(module).__mro__)


def _parametric_lif(module: Any) -> Charging:
    rate = module.w.sigmoid()
    return Charging(1.0 - rate, rate if module.decay_input else 1.0)


_OF_EVERY_CLASS = (
    *("__module__", "__doc__", "__dict__", "__weakref__", "__annotations__"),
    *("__firstlineno__", "__static_attributes__"),  # from Python 3.13 on
    *("__annotate_func__", "__annotations_cache__"),  # from Python 3.14 on
)
_HARMLESS = frozenset({*_OF_EVERY_CLASS, "__init__", "__repr__", "extra_repr"})

_DYNAMICS = (
    "neuronal_charge",
    "neuronal_fire",
    "neuronal_reset",
    "v_float_to_tensor",
    "single_step_functional_forward",
    "multi_step_functional_forward",
    "materialize_states",
)
"""Methods by which a neuron of either release of SpikingJelly says what it does."""

_FORWARDS = ("forward", "single_step_forward", "multi_step_forward")
"""Methods that the constructor of a subclass may replace; on a class of SpikingJelly, this package
does.
"""

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
        change = known_change(module)
        if change is not None:
            unknown += f", since it {change}"
        if not offers_decay:
            return unknown
        return (
            f"{unknown}; if its potential decays by a constant factor per step, pass "
            f"decay={{{name}: factor}}"
        )
    return f"{name} has no membrane potential that decays by a constant factor per step"


def _candidates(net: nn.Module) -> dict[str, nn.Module]:
    """The neurons of a network by name; ValueError if it has none."""
    found = {name: module for name, module in net.named_modules() if is_neuron(module)}
    if not found:
        raise ValueError(
            f"{type(net).__name__} holds no SpikingJelly neuron, so there is nothing to monitor "
            "or certify; give a network with IF, LIF, PLIF or DLIF neurons"
        )
    return found


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
        remedy = "a time constant tau means decay 1 - 1 / tau"
        check_number(f"decay of {key!r}", value, above=0.0, most=1.0, remedy=remedy)
    for key in gain:
        if key not in decay:
            raise ValueError(
                f"gain: {key!r} has no decay; gain belongs to neurons given in decay={{...}}"
            )
