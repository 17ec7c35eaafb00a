"""Checks of a proof's assumptions on the network that runs."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sj_robust.core.host import functional
from sj_robust.core.preserved import Snapshot, other_forward, preserved
from sj_robust.neuron.charging import Charging, Neuron, has_known_dynamics
from sj_robust.proofs.bounds import BoundedRun
from sj_robust.proofs.joint import JointRun
from sj_robust.proofs.maps import Maps
from sj_robust.proofs.program import counts, spiking_surrogates
from sj_robust.proofs.rounding import is_rounding
from sj_robust.proofs.rules import NONLINEAR, Bounds
from sj_robust.proofs.spiking import Interval
from sj_robust.proofs.values import HeldPotential

__all__ = [
    "UnprovableError",
    "UnsoundBoundsError",
    "WatchedJointRun",
    "WatchedRun",
    "check_kept",
    "check_maps",
    "check_neurons",
    "check_point",
    "check_surrogates",
    "check_unchanged",
]

_SAMPLES = 2
"""Samples of the run at random leaves, each with leaves of its own."""

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
    """A run that keeps, for every call of a spiking layer, the bounds of what goes in and comes
    out.
    """

    def __init__(self, neurons: dict[str, Neuron], samples: int, **given: Any) -> None:
        """Nothing has run yet; ``given`` is what the run beside it may be told."""
        super().__init__(neurons, samples, **given)
        self.calls: dict[str, list[_Call]] = {name: [] for name in neurons}
        self.functions: list[tuple[str, Interval | None]] = []
        """Products, functions and steps outside of neurons, in the order in which they ran, with
        bounds of what came out if that depends on the input.
        """
        self.surrogates: list[Any] = []

    @contextmanager
    def replacing_neurons(self, net: nn.Module) -> Iterator[None]:
        """See :class:`BoundedRun`; functions are noted."""
        self.surrogates = spiking_surrogates(net)
        modules = [neuron.module for neuron in self.neurons.values()]
        with ExitStack() as stack:
            stack.enter_context(super().replacing_neurons(net))
            noting = _noting_functions(self._function, modules, self.surrogates)
            stack.enter_context(noting)
            yield

    def _function(self, name: str, found: Any) -> None:
        value = found[0] if isinstance(found, tuple) else found
        bounds = Interval(value.lower, value.upper) if isinstance(value, Bounds) else None
        self.functions.append((name, bounds))

    def _passed(self, name: str, current: Bounds, spikes: Interval) -> None:
        of_current = Interval(current.lower, current.upper)
        self.calls[name].append(_Call(of_current, spikes, self.potential(name)))


class WatchedJointRun(WatchedRun, JointRun):
    """The same of bounds that hold together over time."""


@dataclass(frozen=True)
class _Call:
    """Bounds of one call of a spiking layer, in the layout of the network."""

    current: Interval
    spikes: Interval
    v: Interval

    def left(self, current: Tensor, spikes: Tensor, v: Tensor) -> str | None:
        """What of a run is not within the bounds."""
        if not self.current.holds(current):
            return "an input current"
        if not self.spikes.holds(spikes):
            return "a spike"
        if not self.v.holds(v):
            return "a membrane potential"
        return None


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


def check_maps(maps: Maps) -> None:
    """Raise :class:`UnsoundBoundsError` unless autograd knows all of every affine map.

    Bounds of the output, and all that goes back through the layers, use the maps ``y = A z + b``
    between the leaves z (input, spikes, maxima) and the currents y as the graph of the run gives
    them. What runs outside the graph would count as a constant.

    Equation, for random leaves z, in float64 and element by element::

        | y(z) - b - A z |  <=  1e-9 (|A| |z| + |b|)

    with y(z) what the network computes, and b and A from the graph of another run, at zero.

    Args:
        maps: The affine maps of a network.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(like: Tensor) -> Tensor:
        drawn = torch.randn(like.shape, generator=generator, dtype=torch.float64)
        return drawn.to(like.device)

    run = maps.traced(_SAMPLES, noise, sized=True)
    for number, name in enumerate(run.names):
        leaves = [leaf.centre.detach() for leaf in run.leaves]
        expected = maps.shift(number, _SAMPLES) + maps.image(number, leaves, _SAMPLES)
        gap = run.currents[number].detach() - expected
        if not is_rounding(gap, run.sizes[number]):
            raise UnsoundBoundsError(
                f"autograd does not see everything that reaches {name}: what the network computes "
                f"there differs from its graph by up to {float(gap.abs().max()):.1e}; use torch "
                "operations that record their graph, without torch.no_grad(), detach or custom "
                "autograd.Function"
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


def check_point(model: nn.Module, run: BoundedRun, logits: Bounds, point: Tensor) -> Tensor:
    """Logits [N, classes] of a network at a point of the ball, if all that runs is within bounds.

    Args:
        model: The classifier.
        run: The run of the bounds; of a :class:`WatchedRun` the layers are looked at as well.
        logits: Bounds of the logits.
        point: Images [N, *], each of the ball of the image in its place.

    Raises:
        UnsoundBoundsError: If a current, a spike, a potential, a product, another function's result
            or a logit is outside its bounds.
    """
    with torch.no_grad(), _watching(run):
        found: Tensor = model(point.clone())
    if not Interval(logits.lower, logits.upper).holds(found):
        raise _outside("a logit", "the output")
    return found


@contextmanager
def _watching(run: BoundedRun) -> Iterator[None]:
    """Context in which every call of a spiking layer is compared with the bounds that are kept."""
    fired: dict[str, list[Tensor]] = {name: [] for name in run.neurons}
    with ExitStack() as stack:
        if isinstance(run, WatchedRun):
            compared_functions = _compared_functions(iter(run.functions))
            modules = [neuron.module for neuron in run.neurons.values()]
            noting = _noting_functions(compared_functions, modules, run.surrogates)
            for name, neuron in run.neurons.items():
                compared = _compared(name, neuron.module, iter(run.calls[name]), fired[name])
                stack.enter_context(other_forward(neuron.module, compared))
            stack.enter_context(noting)
        yield
    if isinstance(run, WatchedJointRun):
        for name, parts in fired.items():
            if parts and not run.holds(name, torch.cat(parts)):
                raise _outside("a sum over time of spikes", f"the layer {name}")


def _compared(
    name: str, module: Any, calls: Iterator[_Call], fired: list[Tensor]
) -> Callable[..., Tensor]:
    """The forward of a neuron, which is held against its bounds call by call; its spikes are added
    to those ``fired``.
    """
    original = module.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        current = x.clone()
        spikes: Tensor = original(x, *args, **kwargs)
        bounds = next(calls, None)
        left = "a call" if bounds is None else bounds.left(current, spikes, module.v)
        if left is not None:
            raise _outside(left, f"the layer {name}")
        kept = spikes.clone()  # the network may add to them in place
        fired.append(kept if module.step_mode == "m" else kept.unsqueeze(0))
        return spikes

    return forward


def _compared_functions(
    expected: Iterator[tuple[str, Interval | None]],
) -> Callable[[str, Any], None]:
    """What holds every product, function and step that runs against its bounds."""

    def compare(name: str, found: Any) -> None:
        other, bounds = next(expected, ("nothing more", None))
        if other != name:
            raise UnsoundBoundsError(
                f"the network calls {name} at a point of the ball where it called {other} on its "
                "bounds, so nothing is proved: let forward call the same functions for every input"
            )
        value = found[0] if isinstance(found, tuple) else found
        if bounds is not None and not bounds.holds(value):
            raise _outside(f"a result of {name}", "the network")

    return compare


class _Functions(TorchFunctionMode):
    """Tells of the calls of functions that are no affine maps, unless it is paused."""

    def __init__(self, note: Callable[[str, Any], None]) -> None:
        super().__init__()
        self.note = note
        self.paused = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if HeldPotential in types:  # which is no value of the network
            return found
        if _is_lowered(found):
            raise UnsoundBoundsError(
                "the forward of the network switches autocast on, so that it computes in lower "
                "precision than float32, for whose rounding bounds are; take autocast out of it"
            )
        name = getattr(func, "__name__", "").strip("_")
        if not self.paused and name in NONLINEAR:
            self.note(name, found)
        return found

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Context of which nothing is told; it may be entered inside another one."""
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1

    def silent(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A forward of which nothing is told."""

        def paused(*args: Any, **kwargs: Any) -> Any:
            with self.pause():
                return forward(*args, **kwargs)

        return paused

    def told(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A forward of which only the result is told, and that only if the caller is not silent."""

        def noted(*args: Any, **kwargs: Any) -> Any:
            caller_is_told = not self.paused
            with self.pause():
                found = forward(*args, **kwargs)
                if caller_is_told:
                    self.note("a surrogate", found)
            return found

        return noted


def _is_lowered(found: Any) -> bool:
    """Whether autocast is on for the device of a function's result."""
    kind = found.device.type if isinstance(found, Tensor) else "cpu"
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


@contextmanager
def _noting_functions(
    note: Callable[[str, Any], None], neurons: list[Any], surrogates: list[Any]
) -> Iterator[None]:
    """Context in which functions outside of these neurons, and surrogates, are told of."""
    mode = _Functions(note)
    with ExitStack() as stack:
        for module in neurons:
            stack.enter_context(other_forward(module, mode.silent(module.forward)))
        for module in surrogates:
            stack.enter_context(other_forward(module, mode.told(module.forward)))
        stack.enter_context(mode)
        yield


def _other_dynamics(name: str, neuron: Neuron) -> UnsoundBoundsError:
    return UnsoundBoundsError(
        f"the layer {name} ({neuron.type_name}) does not spike as its charge equation says: the "
        "forward of its surrogate is not a step at the threshold, or a method of the neuron was "
        "replaced; use the neurons and surrogates of SpikingJelly or sj_robust unchanged"
    )


def _outside(what: str, where: str) -> UnsoundBoundsError:
    return UnsoundBoundsError(
        f"{what} of {where} is outside its bounds at a point of the ball, so nothing is proved: "
        "the network computes something else in a plain call than for its bounds, as when forward "
        "checks the type of its input or torch.is_grad_enabled(), or it keeps a state that its "
        "reset does not clear; remove that, and if there is no such thing, report a bug with the "
        "network"
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
