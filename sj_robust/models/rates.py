"""The network of rates behind one of integrate-and-fire neurons, which has a true gradient."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from sj_robust.classifier import SpikingClassifier, SpikingEventClassifier
from sj_robust.core.host import potential_at_reset
from sj_robust.models.time_steps import set_time_steps
from sj_robust.neuron.charging import Neuron, find_neurons, is_neuron

__all__ = ["Rate", "rate_twin"]


class Rate(nn.Module):
    """Spikes per step of an integrate-and-fire neuron with a soft reset, before they are rounded.
    积分发放神经元的发放率（未取整）。

    Equation, with the threshold theta, the potential v_init before the first step, T steps of the
    current x and the mean of the gains: with equal gains the neuron fires ``floor((v_init + T *
    gain * x) / theta)`` times, so ``rate = clamp(gain * x / theta + (v_init / theta - 1 / 2) / T,
    0, 1)`` is off by 1 / (2 T) at most.

    Shapes: [T, N, *] or [N, *], as the current.

    Examples:
        >>> Rate(slope=1.0, shift=-0.125)(torch.tensor([-1.0, 0.5, 2.0]))
        tensor([0.0000, 0.3750, 1.0000])
    """

    def __init__(self, slope: float, shift: float) -> None:
        """Keep ``gain / theta`` and ``(v_init / theta - 1 / 2) / T``."""
        super().__init__()
        self.slope = slope
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        """The rate of a current."""
        return (self.slope * x + self.shift).clamp(0, 1)


def rate_twin(model: nn.Module) -> SpikingClassifier | None:
    """The network of rates of a spiking network, with its own weights and one time step; None if it
    has none. 脉冲网络对应的发放率网络。

    A network has one if all its neurons integrate without leak and subtract their threshold after a
    spike, as those of :func:`sj_robust.training.convert`, and it repeats its images itself (direct
    encoding). Weights and buffers are those of ``model``, not
    copies.

    Examples:
        >>> from sj_robust.neuron import DLIFNode
        >>> node = DLIFNode(T=4, tau=float("inf"), v_reset=None)
        >>> spiking = SpikingClassifier(nn.Sequential(nn.Linear(3, 2), node), T=4)
        >>> twin, x = rate_twin(spiking), torch.rand(5, 3)
        >>> bool((spiking(x) - twin(x)).abs().max() <= 1 / 8)
        True
    """
    if not isinstance(model, SpikingClassifier) or isinstance(model, SpikingEventClassifier):
        return None
    modules = list(model.modules())
    if model.encoder is not None or "T" not in vars(model) or not any(map(is_neuron, modules)):
        return None
    followed, others, _ = find_neurons(model)
    rates = {name: _rate(one, model.T) for name, one in followed.items()}
    if others or None in rates.values():
        return None
    shared = {id(held): held for held in (*model.parameters(), *model.buffers())}
    try:
        twin = copy.deepcopy(model, shared)
        by_module = {twin.get_submodule(name): rate for name, rate in rates.items()}
        for parent in list(twin.modules()):
            for name, child in parent._modules.items():
                if child in by_module:
                    parent._modules[name] = by_module[child]
        set_time_steps(twin, 1)
    except Exception:  # an object that cannot be copied, or steps that the network alone knows
        return None
    return twin.eval()


def _rate(neuron: Neuron, T: int) -> Rate | None:
    """The rate of a neuron, if it has one."""
    module: Any = neuron.module
    charging = neuron.charging()
    gains = torch.ones(1) if charging.input_gain is None else charging.input_gain.detach()
    slope = float(charging.gain) * float(gains.mean()) / float(module.v_threshold)
    start = float(potential_at_reset(module)) / float(module.v_threshold)
    keeps = charging.decay_value == 1.0 and module.v_reset is None and neuron.binary
    if not keeps or slope <= 0:
        return None
    return Rate(slope, (start - 0.5) / T)
