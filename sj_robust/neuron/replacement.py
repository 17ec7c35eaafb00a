"""How an existing network gets DLIF neurons."""

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sj_robust._checks import check_network
from sj_robust._host import base, invalidate_reset_cache, is_neuron, neuron
from sj_robust.neuron.dlif import DLIFNode

__all__ = ["ReplacementReport", "replace_neurons"]


_HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook",
)  # fmt: skip


@dataclass(frozen=True)
class ReplacementReport:
    """What :func:`replace_neurons` did, by the name of the module.

    Attributes:
        replaced: Neurons that became DLIF, with what they were.
        skipped: Neurons that stay as they are, with the reason.
        notes: What the user should know of a replaced neuron.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def replace_neurons(net: nn.Module, T: int, *, backend: str = "auto") -> ReplacementReport:
    """Swap the IF, LIF and PLIF neurons of a network for DLIF neurons that start with the same dynamics.

    Threshold, reset, surrogate, ``detach_reset``, step mode, ``store_v_seq``, training mode, device and hooks are kept.
    ``decay_input=True`` becomes ``input_gain_init = 1 / tau``; IF becomes ``tau = inf``; the learnable tau of PLIF is
    frozen at its present value, which ``notes`` reports. 将网络中的 IF/LIF/PLIF 神经元替换为 DLIF。

    Args:
        net: A SpikingJelly network, changed in place; its states are those after a reset.
        T: Number of time steps the network will run for.
        backend: Backend of the new neurons.

    Returns:
        What was replaced and what was not, by module name.

    Raises:
        TypeError: If ``net`` is no network.
        ValueError: If ``net`` itself is a neuron or has none, or an argument is out of range.

    Source: equivalences of method section 1 (Ding et al., ICML 2024, and SpikingJelly's charge equations).

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
        raise ValueError("net is itself a neuron, which cannot be replaced in place; wrap it in nn.Sequential")
    if not any(is_neuron(module) for module in net.modules()):
        raise ValueError(
            f"{type(net).__name__} holds no SpikingJelly neuron, so there is nothing to replace; put neurons where its "
            "activations are, such as neuron.IFNode() in place of nn.ReLU()"
        )
    report = ReplacementReport()
    successors: dict[nn.Module, DLIFNode] = {}
    place = next(net.parameters(), torch.empty(0))
    for name, module in list(net.named_modules(remove_duplicate=False)):
        place = next(module.parameters(recurse=False), place)
        if isinstance(module, DLIFNode) or not is_neuron(module):
            continue
        dynamics = _lif_dynamics(module)
        if dynamics is None:
            report.skipped[name] = f"{type(module).__name__} is not IF, LIF or PLIF, so no DLIF neuron has its dynamics"
            continue
        if module not in successors:
            successors[module] = _successor(module, T, *dynamics, backend, place)
        net.set_submodule(name, successors[module])
        report.replaced[name] = type(module).__name__
        if type(module) is neuron.ParametricLIFNode:
            report.notes[name] = f"learnable tau frozen at {dynamics[0]:.6g}"
    for module in net.modules():
        for name, value in list(vars(module).items()):
            vars(module)[name] = _exchanged(value, successors)
    invalidate_reset_cache(net)
    return report


def _exchanged(value: Any, successors: dict[nn.Module, DLIFNode]) -> Any:
    """An attribute with the new neurons in it, which forward may read from a plain list, tuple or dict."""
    if isinstance(value, nn.Module):
        return successors.get(value, value)
    if type(value) is tuple:
        return tuple(_exchanged(one, successors) for one in value)
    if type(value) in (list, dict):
        for key, one in enumerate(value) if type(value) is list else list(value.items()):
            value[key] = _exchanged(one, successors)
    return value


def _lif_dynamics(module: Any) -> tuple[float, float] | None:
    """Tau and input gain of an IF, LIF or PLIF neuron; None for anything else, subclasses included."""
    if type(module) is neuron.IFNode:
        return math.inf, 1.0
    if type(module) is neuron.LIFNode:
        tau = float(module.tau)
    elif type(module) is neuron.ParametricLIFNode:
        tau = 1.0 / float(module.w.detach().double().sigmoid())
    else:
        return None
    return tau, 1.0 / tau if module.decay_input else 1.0


def _successor(module: Any, T: int, tau: float, input_gain: float, backend: str, place: Tensor) -> DLIFNode:
    """A DLIF neuron with the settings of ``module``, on the device and in the dtype of ``place``."""
    node = DLIFNode(
        T=T,
        tau=tau,
        v_threshold=module.v_threshold,
        v_reset=module.v_reset,
        surrogate_function=copy.deepcopy(module.surrogate_function),
        detach_reset=module.detach_reset,
        step_mode=module.step_mode,
        backend=backend,
        store_v_seq=module.store_v_seq,
    )
    node.to(place.device, place.dtype).train(module.training)
    nn.init.constant_(node.input_gain, input_gain)
    for name in _HOOKS:
        setattr(node, name, getattr(module, name))  # the same dictionary, so that handles remove from it
    return node
