"""Checks of a proof's assumptions on the network that runs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sj_robust.classifier import SpikingClassifier
from sj_robust.core.host import functional
from sj_robust.core.preserved import Snapshot, preserved
from sj_robust.neuron.charging import Charging, Neuron, has_known_dynamics
from sj_robust.proofs.bounds import BoundedRun
from sj_robust.proofs.joint import JointRun
from sj_robust.proofs.neurons import counts, spiking_surrogates
from sj_robust.proofs.program import Operation, plain
from sj_robust.proofs.rules import moved
from sj_robust.proofs.spiking import Interval
from sj_robust.proofs.values import Bounds, interval, rule_of

__all__ = [
    "UnprovableError",
    "UnsoundBoundsError",
    "WatchedJointRun",
    "WatchedRun",
    "check_kept",
    "check_neurons",
    "check_point",
    "check_surrogates",
    "check_unchanged",
]

_NEURONS = 512
"""Neurons of a layer that get random currents."""


class UnsoundBoundsError(NotImplementedError):
    """A network contradicts its bounds, so nothing is proved.
    网络的行为与上下界不符，不给出证明。
    """


class UnprovableError(ValueError):
    """A network of which nothing is proved as it is: it changes or draws numbers in a forward, is
    not in evaluation mode, or has values whose rounding is not covered. 网络当前状态下无法证明。
    """


class WatchedRun(BoundedRun):
    """A run that keeps bounds of every value that the program computes, and of the potentials."""

    def __init__(self, neurons: dict[str, Neuron], samples: int, **given: Any) -> None:
        """Nothing has run yet; ``given`` is what the run beside it may be told."""
        super().__init__(neurons, samples, **given)
        self.seen: list[_Seen] = []

    def apply(self, operation: Operation, args: Any, kwargs: Any) -> Any:
        """See :class:`BoundedRun`."""
        found = super().apply(operation, args, kwargs)
        func = operation.func
        potential = self.potential(func.name) if isinstance(func, Neuron) else None
        parts = found if isinstance(found, tuple | list) else (found,)
        values: list[Interval | None] = []
        if isinstance(func, nn.Module | Neuron) or rule_of(func) is not moved:
            values = [interval(part) if isinstance(part, Bounds) else None for part in parts]
        self.seen.append(_Seen(values, potential))
        return found


class WatchedJointRun(WatchedRun, JointRun):
    """The same of bounds that hold together over time."""


@dataclass(frozen=True)
class _Seen:
    """Bounds of the results of an operation, and of the potential behind a spiking layer's."""

    values: list[Interval | None]
    potential: Interval | None


def check_kept(model: Callable[[Tensor], Tensor], images: Tensor) -> Snapshot:
    """What a network holds, if a forward on other images than these, [N, *], leaves it.
    前向不改变网络。

    What a proof says of a network it says of the values that it holds now. Values in objects that
    are no modules or containers, such as a counter in a closure, are not seen.

    Raises:
        UnprovableError: If the forward changes a value; it is named.
    """
    with torch.no_grad():
        model(images.clone())
        if isinstance(model, nn.Module):
            functional.reset_net(model)
        before = Snapshot(model, strict=True)
        model(1.0 - images)
    check_unchanged(model, before)
    return before


def check_unchanged(model: object, before: Snapshot) -> None:
    """Raise UnprovableError, with the names, if what a network holds has changed. 网络未被改变。"""
    if isinstance(model, nn.Module):
        functional.reset_net(model)
    changed = before.changed()
    if changed:
        raise UnprovableError(
            "model must not change during a forward pass in evaluation mode, but one changes "
            f"{', '.join(sorted(changed))}; let forward write to local variables, or register the "
            "state with register_memory of SpikingJelly's base.MemoryModule, so that it is reset"
        )


def check_neurons(neurons: dict[str, Neuron], T: int, like: Tensor) -> None:
    """Raise :class:`UnsoundBoundsError` unless every spiking layer does its charge equation.

    Each layer gets random currents x [T, 1, n], half of them close to what brings a resting neuron
    to its threshold. Its spikes must be those of the bounds of these very currents::

        s[t] in {0, 1}, sure(x, x)[t] <= s[t] <= possible(x, x)[t]

    in evaluation mode and in training mode, in which SpikingJelly 0.0.0.0.14 runs other code.

    Args:
        neurons: Neurons of known dynamics by name.
        T: Time steps.
        like: A tensor of the network's device and precision.
    """
    generator = torch.Generator().manual_seed(0)
    for name, neuron in neurons.items():
        currents = _random_currents(neuron, T, generator).to(like)
        with torch.no_grad(), preserved(neuron.module):
            if not _follows_its_equation(neuron, currents):
                raise _other_dynamics(name, neuron)


def _follows_its_equation(neuron: Neuron, currents: Tensor) -> bool:
    """Whether the spikes for these currents are those of their bounds, in every mode."""
    module = neuron.module
    most = counts(neuron)
    functional.reset_net(module)
    exact = Interval(currents.double(), currents.double())
    bounds = BoundedRun({neuron.name: neuron}, 1).spikes(neuron, exact)
    modes: tuple[bool, ...] = (False, True)
    if most is not None or not has_known_dynamics(module):
        modes = (False,)  # bounds are those of evaluation mode alone
    for training in modes:
        functional.reset_net(module)
        module.training = training
        spikes = _run_alone(module, currents)
        is_whole = spikes == spikes.round()
        is_number = is_whole & (spikes >= 0) & (spikes <= (most or 1))
        if not bool(is_number.all()) or not bounds.holds(spikes):
            return False
    return True


def check_surrogates(net: nn.Module, neurons: dict[str, Neuron], like: Tensor) -> None:
    """Raise :class:`UnsoundBoundsError` unless surrogates outside of these neurons are steps.

    They get random values of all sizes, both signs, and 0::

        s(z) = 1 if z >= 0 else 0

    Args:
        net: The network.
        neurons: Neurons of known dynamics, whose surrogates are looked at with them.
        like: A tensor of the network's device and precision.
    """
    generator = torch.Generator().manual_seed(0)
    exponent = 12.0 * torch.rand(2 * _NEURONS, generator=generator) - 8.0
    size = 10.0**exponent
    zero = torch.zeros(1)
    values = torch.cat([size, -size, zero]).to(like)
    owned = {id(neuron.module.surrogate_function) for neuron in neurons.values()}
    for function in spiking_surrogates(net):
        if id(function) in owned:
            continue
        with torch.no_grad():
            spikes = function(values)
        if not torch.equal(spikes, (values >= 0).to(values)):
            raise UnsoundBoundsError(
                f"the surrogate {type(function).__name__} is not a step at 0 in its forward, as "
                "its bounds say; use one of SpikingJelly's that spikes"
            )


def check_point(model: SpikingClassifier, run: BoundedRun, logits: Bounds, point: Tensor) -> Tensor:
    """Logits [N, classes] of a network at a point of the ball, if all that runs is within bounds.

    Args:
        model: The classifier.
        run: The run of the bounds, whose program must give the same logits, bit for bit; of a
            :class:`WatchedRun` every value is looked at as well.
        logits: Bounds of the logits.
        point: Images [N, *], each of the ball of the image in its place.

    Raises:
        UnsoundBoundsError: If the network gives other logits than its program, or a value, a
            potential or a logit is outside its bounds.
    """
    expected = iter(run.seen if isinstance(run, WatchedRun) else ())
    fired: dict[str, list[Tensor]] = {}

    def apply(operation: Operation, args: Any, kwargs: Any) -> Any:
        found = plain(operation, args, kwargs)
        func = operation.func
        where = f"the layer {operation.where}"
        if isinstance(func, Neuron):
            where = f"the layer {func.name}"
            steps = found if func.module.step_mode == "m" else found.unsqueeze(0)
            fired.setdefault(func.name, []).append(steps)
        seen = next(expected, _Seen([], None))
        parts = found if isinstance(found, tuple | list) else (found,)
        for value, part in zip(seen.values, parts, strict=False):
            if value is not None and not value.holds(part):
                raise _outside("a value", where)
        if seen.potential is not None and not seen.potential.holds(func.module.v):
            raise _outside("a membrane potential", where)
        return found

    with torch.no_grad():
        found: Tensor = model(point.clone())
        functional.reset_net(model.net)
        replayed = run.program.run(point.clone(), apply)
        functional.reset_net(model.net)
    if not torch.equal(found, replayed):
        raise UnsoundBoundsError(
            "the network computes something else in a plain call than where its operations are "
            "recorded, as when forward asks whether a mode of torch is on; remove that, and if "
            "there is no such thing, report a bug with the network"
        )
    if not interval(logits).holds(found):
        raise _outside("a logit", "the output")
    if isinstance(run, WatchedJointRun):
        for name, parts in fired.items():
            if not run.holds(name, torch.cat(parts)):
                raise _outside("a sum over time of spikes", f"the layer {name}")
    return found


def _other_dynamics(name: str, neuron: Neuron) -> UnsoundBoundsError:
    return UnsoundBoundsError(
        f"the layer {name} ({neuron.type_name}) does not spike as its charge equation says: the "
        "forward of its surrogate is not a step at the threshold, or a method of the neuron was "
        "replaced; use the neurons and surrogates of SpikingJelly or sj_robust unchanged"
    )


def _outside(what: str, where: str) -> UnsoundBoundsError:
    return UnsoundBoundsError(
        f"{what} of {where} is outside its bounds at a point of the ball, so nothing is proved: "
        "the bounds have a bug; please report it with the network"
    )


def _random_currents(neuron: Neuron, T: int, generator: torch.Generator) -> Tensor:
    """Currents [T, 1, n] in float64: the first half near the threshold, the others far and wide."""
    module = neuron.module
    shape = (T, 1, _NEURONS)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    exponent = 8.0 * uniform - 6.0
    magnitude = 10.0**exponent
    rest = 0.0 if module.v_reset is None else float(module.v_reset)
    needed = float(module.v_threshold) - rest
    scale = max(abs(needed), 1e-3)
    near = needed + scale * magnitude * normal.sign()
    far = 4.0 * scale * normal
    in_first_half = torch.arange(_NEURONS) < _NEURONS // 2
    charge = torch.where(in_first_half, near, far)
    return charge / _gains(neuron.charging(), T).view(T, 1, 1)


def _gains(charging: Charging, T: int) -> Tensor:
    """Gain of every step [T], with 1 instead of 0."""
    gains = []
    for t in range(T):
        gain = torch.as_tensor(charging.gain_at(t, input_gain=True))
        gains.append(gain.detach().double().cpu())
    found = torch.stack(gains)
    return torch.where(found == 0, 1.0, found)


def _run_alone(module: Any, currents: Tensor) -> Tensor:
    """Spikes [T, 1, n] of a neuron outside its network, without hooks."""
    if module.step_mode == "m":
        found: Tensor = module.forward(currents)
        return found
    return torch.stack([module.forward(current) for current in currents])
