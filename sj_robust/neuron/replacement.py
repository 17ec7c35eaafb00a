"""How an existing network gets DLIF neurons, and how it gets rid of them."""

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sj_robust.core.checks import check_network
from sj_robust.core.host import base, invalidate_reset_cache, is_neuron, neuron
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
        replaced: Neurons that became others, with what they were.
        skipped: Neurons that stay as they are, with the reason.
        notes: What the user should know of a replaced neuron.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def replace_neurons(net: nn.Module, T: int, *, backend: str = "auto") -> ReplacementReport:
    """Swap the IF, LIF and PLIF neurons of a network for DLIF neurons that start with the same
    dynamics.

    Threshold, reset, surrogate, ``detach_reset``, step mode, ``store_v_seq``, training mode, device
    and hooks are kept. ``decay_input=True`` becomes ``input_gain_init = 1 / tau``; IF becomes ``tau
    = inf``; the learnable tau of PLIF is frozen at its present value, which ``notes`` reports.
    将网络中的 IF/LIF/PLIF 神经元替换为 DLIF。

    Args:
        net: A SpikingJelly network, changed in place; its states are those after a reset.
        T: Number of time steps the network will run for.
        backend: Backend of the new neurons.

    Returns:
        What was replaced and what was not, by module name.

    Raises:
        TypeError: If ``net`` is no network.
        ValueError: If ``net`` itself is a neuron or has none, or an argument is out of range.

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
    report = ReplacementReport()
    successors: dict[nn.Module, Any] = {}
    place = next(net.parameters(), torch.empty(0))
    for name, module in list(net.named_modules(remove_duplicate=False)):
        place = next(module.parameters(recurse=False), place)
        if isinstance(module, DLIFNode) or not is_neuron(module):
            continue
        dynamics = _lif_dynamics(module)
        if dynamics is None:
            report.skipped[name] = (
                f"{type(module).__name__} is not IF, LIF or PLIF, so no DLIF neuron has its "
                "dynamics"
            )
            continue
        if module not in successors:
            successors[module] = _successor(module, T, *dynamics, backend, place)
        report.replaced[name] = type(module).__name__
        if type(module) is neuron.ParametricLIFNode:
            report.notes[name] = f"learnable tau frozen at {dynamics[0]:.6g}"
    _exchange(net, successors)
    return report


def dlif_to_lif(net: nn.Module) -> ReplacementReport:
    """Swap DLIF neurons whose gain is the same at every step for SpikingJelly's LIF and IF neurons.

    For what knows SpikingJelly's neurons alone, such as its export to NIR, its exchange with chips
    and some of its energy models. With gain g, which must be > 0::

        g = 1        LIFNode(tau, decay_input=False), or IFNode() for tau = inf
        g = 1 / tau  LIFNode(tau, decay_input=True)
        other g      as for 1, of potentials v / g: threshold and v_reset are divided by g

    The spikes are the same up to rounding, and so are the gradients for the first two; for another
    g, which ``notes`` names, the surrogate sees the divided potential. Hooks and settings are kept,
    states are those after a reset. Subclasses of DLIFNode stay. 将增益恒定的 DLIF 神经元替换为
    LIF/IF。

    Args:
        net: A network with DLIF neurons, changed in place.

    Returns:
        What was replaced and what not, by module name.

    Raises:
        TypeError: If ``net`` is no network.
        ValueError: If ``net`` is itself a neuron, has no DLIF neuron to replace, or one whose gain
            differs between steps or is not positive; ``net`` is as it was then.

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
    report = ReplacementReport()
    successors: dict[nn.Module, Any] = {}
    for name, module in net.named_modules(remove_duplicate=False):
        if type(module) is not DLIFNode and isinstance(module, DLIFNode):
            report.skipped[name] = f"{type(module).__name__} may have dynamics of its own"
        elif isinstance(module, DLIFNode):
            successors[module] = node = _without_gain(name, module)
            report.replaced[name] = type(module).__name__
            if node.v_threshold != module.v_threshold:
                reset = "None" if node.v_reset is None else f"{node.v_reset:.6g}"
                report.notes[name] = (
                    "potentials are divided by the gain "
                    f"{float(module.input_gain.detach()[0]):.6g}: "
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
    as_input_decay = math.isclose(gain * module.tau, 1.0, rel_tol=1e-6)
    settings = _settings(module, scale=1.0 if as_input_decay else gain)
    if math.isinf(module.tau):
        return _take_over(neuron.IFNode(**settings), module)
    return _take_over(
        neuron.LIFNode(tau=module.tau, decay_input=as_input_decay, **settings), module
    )


def _exchange(net: nn.Module, successors: dict[nn.Module, Any]) -> None:
    """Put the new neurons in the place of the old ones, wherever the network refers to these."""
    for name, module in list(net.named_modules(remove_duplicate=False)):
        if module in successors:
            net.set_submodule(name, successors[module])
    for module in net.modules():
        for name, value in list(vars(module).items()):
            vars(module)[name] = _exchanged(value, successors)
    invalidate_reset_cache(net)


def _exchanged(value: Any, successors: dict[nn.Module, Any]) -> Any:
    """An attribute with the new neurons in it, which forward may read from a plain list, tuple or
    dict.
    """
    if isinstance(value, nn.Module):
        return successors.get(value, value)
    if type(value) is tuple:
        return tuple(_exchanged(one, successors) for one in value)
    if type(value) in (list, dict):
        for key, one in enumerate(value) if type(value) is list else list(value.items()):
            value[key] = _exchanged(one, successors)
    return value


def _lif_dynamics(module: Any) -> tuple[float, float] | None:
    """Tau and input gain of an IF, LIF or PLIF neuron; None for anything else, subclasses
    included.
    """
    if type(module) is neuron.IFNode:
        return math.inf, 1.0
    if type(module) is neuron.LIFNode:
        tau = float(module.tau)
    elif type(module) is neuron.ParametricLIFNode:
        tau = 1.0 / float(module.w.detach().double().sigmoid())
    else:
        return None
    return tau, 1.0 / tau if module.decay_input else 1.0


def _successor(
    module: Any, T: int, tau: float, input_gain: float, backend: str, place: Tensor
) -> Any:
    """A DLIF neuron with the settings of ``module``, on the device and in the dtype of
    ``place``.
    """
    node = DLIFNode(T=T, tau=tau, backend=backend, **_settings(module)).to(
        place.device, place.dtype
    )
    nn.init.constant_(node.input_gain, input_gain)
    return _take_over(node, module)


def _settings(module: Any, scale: float = 1.0) -> dict[str, Any]:
    """What every neuron is built with, its potentials divided by ``scale``."""
    return {
        "v_threshold": module.v_threshold / scale,
        "v_reset": None if module.v_reset is None else module.v_reset / scale,
        "surrogate_function": copy.deepcopy(module.surrogate_function),
        "detach_reset": module.detach_reset,
        "step_mode": module.step_mode,
        "store_v_seq": module.store_v_seq,
    }


def _take_over(node: Any, module: nn.Module) -> Any:
    """The new neuron in the mode and with the hooks of the old one."""
    node.train(module.training)
    for name in _HOOKS:
        setattr(
            node, name, getattr(module, name)
        )  # the same dictionary, so that handles remove from it
    return node
