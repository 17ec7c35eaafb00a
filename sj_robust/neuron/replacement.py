"""Replaces neurons of an existing network by DLIF neurons, and DLIF by SpikingJelly's neurons."""

import math
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from sj_robust.core.checks import check_network
from sj_robust.core.host import (
    base,
    check_hooks_run,
    invalidate_reset_cache,
    is_neuron,
    neuron,
    potential_at_reset,
    start_from,
)
from sj_robust.neuron.charging import has_known_dynamics, known_change
from sj_robust.neuron.dlif import DLIFNode

__all__ = ["ReplacementReport", "dlif_to_lif", "replace_neurons"]


_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)


@dataclass(frozen=True)
class ReplacementReport:
    """What :func:`replace_neurons` or :func:`dlif_to_lif` did, by the name of the module.

    Attributes:
        replaced: Former class of each neuron that was replaced.
        skipped: Reason for each neuron that was not.
        notes: What the user should know about a replaced neuron.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def replace_neurons(net: nn.Module, T: int, *, backend: str = "auto") -> ReplacementReport:
    """Replace the IF, LIF and PLIF neurons of a network by DLIF neurons that start with the same
    dynamics.

    Threshold, reset, surrogate, ``detach_reset``, step mode, ``store_v_seq``, training mode, device
    and hooks are kept. ``decay_input=True`` becomes ``input_gain_init = 1 / tau``; IF becomes ``tau
    = inf``; a learnable tau, as of PLIF, or threshold is frozen at its present value, which
    ``notes`` reports. A neuron that only a closure refers to is not replaced.
    将网络中的 IF/LIF/PLIF 神经元替换为 DLIF。

    Args:
        net: A SpikingJelly network, changed in place; afterwards it is in the state after a reset.
        T: Number of time steps for which the network will run.
        backend: Backend of the new neurons.

    Returns:
        What was replaced and what was not, by module name.

    Raises:
        TypeError: If ``net`` is not a network.
        ValueError: If ``net`` itself is a neuron or has none, SpikingJelly's ``memopt`` runs
            neurons of it, or an argument is out of range.

    Source: equivalences of method section 1 (Ding et al., ICML 2024, and SpikingJelly's charge
        equations).

    Examples:
        >>> from spikingjelly.activation_based import neuron
        >>> net = nn.Sequential(nn.Linear(4, 2), neuron.LIFNode(tau=2.0, step_mode="m"))
        >>> replace_neurons(net, T=4).replaced
        {'1': 'LIFNode'}
        >>> net[1].tau, net[1].input_gain.tolist()
        (2.0, [0.5, 0.5, 0.5, 0.5])
    """
    check_network(net)
    if isinstance(net, base.MemoryModule) and is_neuron(net):
        raise ValueError(
            "net is itself a neuron, which cannot be replaced in place; wrap it in nn.Sequential"
        )
    if not any(is_neuron(module) for module in net.modules()):
        raise ValueError(
            f"{type(net).__name__} holds no SpikingJelly neuron, so there is nothing to replace; "
            "put neurons where its activations are, such as neuron.IFNode() in place of nn.ReLU()"
        )
    check_hooks_run(net, "replacing neurons")
    report = ReplacementReport()
    successors: dict[nn.Module, Any] = {}
    like = next(net.parameters(), torch.empty(0))
    for name, module in list(net.named_modules(remove_duplicate=False)):
        # a new neuron has the device and dtype of the last parameter up to its place
        like = next(module.parameters(recurse=False), like)
        if isinstance(module, DLIFNode) or not is_neuron(module):
            continue
        if not has_known_dynamics(module):
            change = known_change(module) or "is not IF, LIF or PLIF"
            report.skipped[name] = (
                f"{type(module).__name__} {change}, so no DLIF neuron has its dynamics"
            )
            continue
        if any(isinstance(value, Tensor) and value.numel() > 1 for value in _levels(module)):
            report.skipped[name] = "its v_threshold or v_reset has several values, DLIF's has one"
            continue
        tau, input_gain = _lif_dynamics(module)
        if module not in successors:
            node = DLIFNode(T=T, tau=tau, backend=backend, **_settings(module))
            # not of the surrogate, which other neurons may share
            node.input_gain.data = node.input_gain.data.to(like.device, like.dtype)
            nn.init.constant_(node.input_gain, input_gain)
            successors[module] = _take_over(node, module)
        report.replaced[name] = type(module).__name__
        frozen = _learned(module, tau)
        if frozen:
            told = [f"{what} frozen at {value:.6g}" for what, value in frozen.items()]
            report.notes[name] = f"learnable {', '.join(told)}"
    _exchange(net, successors)
    return report


def dlif_to_lif(net: nn.Module) -> ReplacementReport:
    """Replace DLIF neurons whose gain is the same at every step by SpikingJelly's LIF and IF
    neurons.

    It is for code that knows only SpikingJelly's neurons, such as its export to NIR, its exchange
    with chips and some of its energy models. With gain g, which must be > 0::

        g = 1        LIFNode(tau, decay_input=False), or IFNode() for tau = inf
        g = 1 / tau  LIFNode(tau, decay_input=True)
        other g      as for 1, with potentials v / g: threshold and v_reset are divided by g

    The spikes are the same up to rounding, and so are the gradients in the first two cases; in the
    third case, which is listed in ``notes``, the surrogate gets the divided potential. Hooks and
    settings are kept, and states are reset. Subclasses of DLIFNode that change its dynamics
    are left as they are.
    将增益恒定的 DLIF 神经元替换为 LIF/IF。

    Args:
        net: A network with DLIF neurons, changed in place.

    Returns:
        What was replaced and what was not, by module name.

    Raises:
        TypeError: If ``net`` is not a network.
        ValueError: If ``net`` is itself a neuron, has no DLIF neuron to replace, or has one whose
            gain differs between steps or is not positive or that SpikingJelly's ``memopt`` runs;
            ``net`` is then unchanged.

    Source: the charge equations of DLIF and LIF, divided by g.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 2), DLIFNode(T=4, tau=2.0, input_gain_init=2.0))
        >>> dlif_to_lif(net).notes
        {'1': 'potentials are divided by the gain 2: v_threshold=0.5, v_reset=0'}
    """
    check_network(net)
    if isinstance(net, DLIFNode):
        raise ValueError(
            "net is itself a neuron, which cannot be replaced in place; wrap it in nn.Sequential"
        )
    check_hooks_run(net, "replacing neurons")
    report = ReplacementReport()
    successors: dict[nn.Module, Any] = {}
    for name, module in net.named_modules(remove_duplicate=False):
        if not isinstance(module, DLIFNode):
            continue
        if not has_known_dynamics(module):
            report.skipped[name] = f"{type(module).__name__} {known_change(module)}"
            continue
        node = _without_gain(name, module)
        successors[module] = node
        report.replaced[name] = type(module).__name__
        if node.v_threshold != module.v_threshold:
            gain = float(module.input_gain.detach()[0])
            reset = "None" if node.v_reset is None else f"{node.v_reset:.6g}"
            report.notes[name] = (
                f"potentials are divided by the gain {gain:.6g}: "
                f"v_threshold={node.v_threshold:.6g}, v_reset={reset}"
            )
    if not successors:
        raise ValueError(f"{type(net).__name__} holds no DLIFNode, so there is nothing to replace")
    _exchange(net, successors)
    return report


def _without_gain(name: str, module: DLIFNode) -> Any:
    """The LIF or IF neuron with the dynamics of a DLIF neuron of constant gain."""
    gains = module.input_gain.detach().double()
    gain = float(gains[0])
    if not bool((gains == gain).all()) or not gain > 0.0:
        raise ValueError(
            f"the gains of {name!r} must be one number > 0 at every step, got "
            f"{[round(g, 4) for g in gains.tolist()]}: no other neuron has a gain per step. "
            "Train with constant gains (input_gain.requires_grad_(False)), or set them to their "
            "mean, node.input_gain.data.fill_(node.input_gain.mean()), and measure the network "
            "again"
        )
    decays_input = math.isclose(gain * module.tau, 1.0, rel_tol=1e-6)
    scale = 1.0 if decays_input else gain
    settings = _settings(module, scale)
    node: Any
    if math.isinf(module.tau):
        node = neuron.IFNode(**settings)
    else:
        node = neuron.LIFNode(tau=module.tau, decay_input=decays_input, **settings)
    return _take_over(node, module, scale)


def _exchange(net: nn.Module, successors: dict[nn.Module, Any]) -> None:
    """Put the new neurons in the place of the old ones: as submodules, and in the attributes of
    every module.
    """
    for name, module in list(net.named_modules(remove_duplicate=False)):
        if module in successors:
            net.set_submodule(name, successors[module])
    seen: set[int] = set()
    for module in net.modules():
        _exchange_within(vars(module), successors, seen)
    invalidate_reset_cache(net)


def _exchange_within(
    container: list[Any] | deque[Any] | dict[Any, Any],
    successors: dict[nn.Module, Any],
    seen: set[int],
) -> None:
    """Put the new neurons into a container, and into those that it holds, once for each."""
    if id(container) in seen:
        return
    seen.add(id(container))
    keys = list(container) if isinstance(container, dict) else range(len(container))
    for key in keys:
        before = container[key]
        after = _exchanged(before, successors, seen)
        if after is not before:
            container[key] = after


def _exchanged(value: Any, successors: dict[nn.Module, Any], seen: set[int]) -> Any:
    """A value with the new neurons in it: itself, or a new tuple, method or partial function."""
    if isinstance(value, nn.Module):
        return successors.get(value, value)
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
        owner = successors.get(value.__self__)
        return value if owner is None else _method_of(owner, value)
    if isinstance(value, partial):
        func, args, keywords = (
            _exchanged(part, successors, seen) for part in (value.func, value.args, value.keywords)
        )
        is_same = func is value.func and args is value.args
        return value if is_same else partial(func, *args, **keywords)
    if isinstance(value, tuple):
        items = [_exchanged(one, successors, seen) for one in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, list | deque | dict):
        _exchange_within(value, successors, seen)
    return value


def _method_of(owner: Any, method: MethodType) -> MethodType:
    """A method of an old neuron as one of the new neuron: that of the new class, unless it is a
    function from elsewhere that was bound to the old neuron.
    """
    name = method.__name__
    of_old_class = getattr(type(method.__self__), name, None)
    if method.__func__ is of_old_class:
        return MethodType(getattr(type(owner), name, of_old_class), owner)
    return MethodType(method.__func__, owner)


def _lif_dynamics(module: Any) -> tuple[float, float]:
    """Tau and input gain of an IF, LIF or PLIF neuron."""
    if isinstance(module, neuron.IFNode):
        return math.inf, 1.0
    if isinstance(module, neuron.LIFNode):
        tau = float(module.tau)
    else:
        tau = 1.0 / float(module.w.detach().double().sigmoid())
    input_gain = 1.0 / tau if module.decay_input else 1.0
    return tau, input_gain


def _learned(module: nn.Module, tau: float) -> dict[str, float]:
    """What a neuron learns and DLIF does not, by name."""
    parameters = dict(module.named_parameters(recurse=False))
    found = {}
    if isinstance(module, neuron.ParametricLIFNode):
        found["tau"] = tau
    for name in ("v_threshold", "v_reset"):
        if name in parameters:
            found[name] = _as_number(parameters[name])
    return found


def _settings(module: Any, scale: float = 1.0) -> dict[str, Any]:
    """Arguments that every neuron is built with, its threshold and reset divided by ``scale``."""
    threshold, rest = map(_as_number, _levels(module))
    return {
        "v_threshold": threshold / scale,
        "v_reset": None if rest is None else rest / scale,
        "surrogate_function": module.surrogate_function,  # which other neurons may share
        "detach_reset": module.detach_reset,
        "step_mode": module.step_mode,
        "store_v_seq": module.store_v_seq,
    }


def _levels(module: Any) -> tuple[Any, Any]:
    """Threshold and reset of a neuron."""
    return module.v_threshold, module.v_reset


def _as_number(value: Any) -> Any:
    """A tensor of one element as a number; anything else as it is."""
    return float(value.detach()) if isinstance(value, Tensor) else value


def _take_over(node: Any, module: nn.Module, scale: float = 1.0) -> Any:
    """The new neuron in the mode, from the first potential and with the hooks of the old one, its
    potentials divided by ``scale``.
    """
    start_from(node, potential_at_reset(module) / scale)
    node.train(module.training)
    for name in _HOOKS:
        hooks = getattr(module, name)
        setattr(node, name, hooks)  # no copy, so that the handles can still remove their hooks
    return node
