"""Checks of a proof's assumptions on the network that runs."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sj_robust.classifier import SpikingClassifier
from sj_robust.core.host import functional
from sj_robust.core.preserved import Snapshot, preserved
from sj_robust.neuron.charging import Neuron
from sj_robust.proofs.bounds import BoundedRun
from sj_robust.proofs.neurons import counts, spiking_surrogates
from sj_robust.proofs.program import plain
from sj_robust.proofs.spiking import Interval
from sj_robust.proofs.values import Bounds, interval

__all__ = [
    "UnprovableError",
    "UnsoundBoundsError",
    "check_kept",
    "check_run",
    "check_stated",
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


def check_stated(neurons: dict[str, Neuron], T: int, like: Tensor) -> None:
    """Raise :class:`UnsoundBoundsError` unless the layers whose charge equation the user stated
    spike as it says, in evaluation mode and for random currents.

    Args:
        neurons: Neurons by name; the code of the others is known.
        T: Time steps.
        like: A tensor of the network's device and precision.
    """
    generator = torch.Generator().manual_seed(0)
    for name, neuron in neurons.items():
        if neuron.known:
            continue
        module = neuron.module
        normal = torch.randn((T, 1, _NEURONS), generator=generator, dtype=torch.float64)
        reach = 2.0 * abs(float(module.v_threshold)) / abs(float(neuron.charging().gain) or 1.0)
        currents = (reach * normal).to(like)
        exact = Interval(currents.double(), currents.double())
        bounds = BoundedRun({name: neuron}, 1).spikes(neuron, exact)
        with torch.no_grad(), preserved(module):
            functional.reset_net(module)
            if module.step_mode == "m":
                spikes = module(currents)
            else:
                spikes = torch.stack([module(current) for current in currents])
        if not bounds.holds(spikes):
            raise UnsoundBoundsError(
                f"the layer {name} ({neuron.type_name}) does not spike as its charge equation "
                "says: give the decay and the gain that it has, and let it fire and reset as a "
                "BaseNode of SpikingJelly"
            )


def check_surrogates(net: nn.Module, neurons: dict[str, Neuron], like: Tensor) -> None:
    """Raise :class:`UnsoundBoundsError` unless surrogates are what their bounds say.

    They get random values of all sizes, both signs, and 0::

        s(z) = 1 if z >= 0 else 0,   or of I-LIF neurons   s(z) = round(clamp(z, 0, most))

    Args:
        net: The network.
        neurons: Its neurons of known dynamics.
        like: A tensor of the network's device and precision.
    """
    generator = torch.Generator().manual_seed(0)
    exponent = 12.0 * torch.rand(2 * _NEURONS, generator=generator) - 8.0
    size = 10.0**exponent
    zero = torch.zeros(1)
    values = torch.cat([size, -size, zero]).to(like)
    step = (values >= 0).to(values)
    owned = [(n.module.surrogate_function, counts(n)) for n in neurons.values()]
    known = {id(function) for function, _ in owned}
    others = [(one, None) for one in spiking_surrogates(net) if id(one) not in known]
    for function, most in (*owned, *others):
        expected = step if most is None else values.clamp(0, most).round()
        with torch.no_grad():
            is_known = torch.equal(function(values), expected)
        if not is_known:
            raise UnsoundBoundsError(
                f"the surrogate {type(function).__name__} is not a step at 0 in its forward, as "
                "its bounds say; use one of SpikingJelly's that spikes"
            )


def check_run(model: SpikingClassifier, run: BoundedRun, bounds: Bounds, images: Tensor) -> Tensor:
    """The network's logits [N, classes] of the images that a run is for, held against it.

    Raises:
        UnsoundBoundsError: If the network gives other logits than the program of the run, bit for
            bit, or they are outside their bounds.
    """
    with torch.no_grad():
        logits: Tensor = model(images.clone())
        functional.reset_net(model.net)
        again = run.program.run(images.clone(), plain)
        functional.reset_net(model.net)
    if not torch.equal(logits, again):
        raise UnsoundBoundsError(
            "the network computes something else in a plain call than where its operations are "
            "recorded, as when forward asks whether a mode of torch is on; remove that, and if "
            "there is no such thing, report a bug with the network"
        )
    if not interval(bounds).holds(logits):
        raise UnsoundBoundsError(
            "a logit is outside its bounds at an image of the ball, so nothing is proved: the "
            "bounds have a bug; please report it with the network"
        )
    return logits
