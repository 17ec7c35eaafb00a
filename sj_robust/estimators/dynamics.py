"""How a known neuron charges, and its charged potentials recovered from its spikes."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from sj_robust.core.broadcast import along
from sj_robust.core.host import base
from sj_robust.neuron.charging import Charging, emits_spikes, is_neuron, read_charging

__all__ = ["Sequence", "next_charging", "spiking_neurons"]


@dataclass(frozen=True)
class Sequence:
    """One run of a neuron whose values are settled and whose backward pass is to be chosen.

    Attributes:
        x_seq: Input currents [T, N, *], with the graph behind them.
        spike_seq: Spikes as the neuron fired them, no graph.
        v: Potential after the last step, no graph.
        v_seq: Potential after every step, or None.
        v_init: Potential before the first step with its graph, or the number that stands for it
            after a reset.
        charging: How the neuron charged; a gain per step is that of these steps, [T].
        v_threshold: Threshold.
        v_reset: Potential after a spike; None is the soft reset.
        detach_reset: Whether the reset is left out of the gradient.
    """

    x_seq: Tensor
    spike_seq: Tensor
    v: Tensor
    v_seq: Tensor | None
    v_init: Tensor | float
    charging: Charging
    v_threshold: float
    v_reset: float | None
    detach_reset: bool

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the arithmetic: float64 for float64 inputs, otherwise float32."""
        return torch.float64 if self.x_seq.dtype == torch.float64 else torch.float32

    def per_step(self, gain: float | Tensor) -> float | Tensor:
        """The gain in a shape that multiplies [T, N, *], without its graph."""
        if not isinstance(gain, Tensor):
            return gain
        gain = gain.detach().to(self.dtype)
        if gain.ndim == 0:
            return gain
        return along(gain, 0, self.x_seq.ndim)

    @cached_property
    def charged(self) -> tuple[Tensor, Tensor | None]:
        """Charged potentials h [T, N, *], and v[t-1] of every step if the decay needs a
        gradient.

        It is :mod:`sj_robust.ops.recurrence` in place, with sums of products that round once.
        """
        decay = self.charging.decay_value
        learned = _needs_gradient(self.charging.decay)
        leak = (1 - decay) * (self.v_reset or 0.0)
        current = self.x_seq.detach().to(self.dtype)
        h_seq = current * self.per_step(self.charging.gain)
        spike_seq = self.spike_seq.to(self.dtype)
        v = self.v_init
        if isinstance(v, Tensor):
            v = v.detach().to(self.dtype)
        before = []
        for h, spike in zip(h_seq.unbind(0), spike_seq.unbind(0), strict=True):
            if learned:
                before.append(v if isinstance(v, Tensor) else torch.full_like(h, v))
            offset = leak
            if isinstance(v, Tensor):
                h.add_(v, alpha=decay)
            else:
                offset += decay * v
            if offset:
                h.add_(offset)
            if self.v_reset is None:
                v = torch.add(h, spike, alpha=-self.v_threshold)
            else:
                above_reset = h - self.v_reset if self.v_reset else h
                v = torch.addcmul(h, above_reset, spike, value=-1)
        return h_seq, torch.stack(before) if learned else None

    @property
    def differentiable(self) -> bool:
        """Whether anything that the outputs depend on needs a gradient."""
        values = (self.x_seq, self.v_init, self.charging.gain, self.charging.decay)
        return any(_needs_gradient(value) for value in values)


def spiking_neurons(model: nn.Module) -> dict[str, Any]:
    """Spiking neurons of a network by name: SpikingJelly's, what derives from them, and whatever
    else spikes.
    """
    return {name: module for name, module in model.named_modules() if _spikes(module)}


def next_charging(node: Any, steps: int) -> Charging:
    """How a neuron of known dynamics charges in its next ``steps`` steps; a gain per step is that
    of these, [T].
    """
    charging = read_charging(node)
    if charging.input_gain is None:
        return charging
    first = node.time_step
    return Charging(charging.decay, charging.input_gain[first : first + steps])


def _spikes(module: nn.Module) -> bool:
    if not emits_spikes(module):
        return False
    if is_neuron(module):
        return True
    has_surrogate = callable(getattr(module, "surrogate_function", None))
    return has_surrogate and isinstance(module, base.MemoryModule)


def _needs_gradient(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
