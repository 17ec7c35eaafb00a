"""Firing rates of every spiking layer, to detect dead networks."""

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sj_robust.core.host import check_hooks_run
from sj_robust.core.preserved import from_reset
from sj_robust.neuron.charging import emits_spikes, is_neuron

__all__ = ["LayerActivity", "firing"]


@dataclass(frozen=True)
class LayerActivity:
    """Firing of one spiking layer over all images and time steps. 单层的发放统计。

    Attributes:
        layer: Name of the neuron's module in the network.
        neuron: Class of the neuron.
        rate: Share of neurons and time steps in which a neuron fires.
        silent: Share of the layer's neurons that never fired.
        saturated: Share of the layer's neurons that fired in every time step of every image.

    Examples:
        >>> LayerActivity("net.2", "LIFNode", rate=0.0, silent=1.0, saturated=0.0).silent
        1.0
    """

    layer: str
    neuron: str
    rate: float
    silent: float
    saturated: float


def firing(
    model: nn.Module, x: Tensor, *, seed: int = 0, batch_size: int | None = None
) -> tuple[LayerActivity, ...]:
    """Firing rate and share of silent and saturated neurons of every spiking layer, by hooks on the
    neurons.

    统计每个脉冲层的发放率、静默与饱和神经元比例。

    Equation, with the output ``s[t, n, i]`` of neuron i of a layer for image n at step t, which is
    a spike if it is not zero::

        rate = mean(s != 0)
        silent = mean_i(all_tn(s == 0))
        saturated = mean_i(all_tn(s != 0))

    The model runs without gradients, in evaluation mode and after a reset; its modes, neuron
    states and hooks and all generators are then restored. Every spiking neuron of SpikingJelly and
    every subclass of one is followed, in either step mode. A fused pair of batch norm and DLIF is
    run as two modules meanwhile.

    Args:
        model: A ``SpikingClassifier`` (or another module around a spiking network), or a bare
            SpikingJelly network in step mode ``"m"``.
        x: The input of ``model``, at least one image: images [N, ...], or the sequence [T, N, ...]
            of a bare network.
        seed: Seeds stochastic encoders.
        batch_size: Images at a time, for a model that takes images [N, ...]; None runs all at once.

    Returns:
        One entry per spiking layer in the order of execution. Neurons that were not called are
        omitted, and a neuron that is called more than once counts with all of its calls. For a
        network without spiking neurons the result is empty.

    Raises:
        TypeError: If ``model`` is not an ``nn.Module``.
        ValueError: If ``x`` contains no image, or SpikingJelly's ``memopt`` runs neurons.

    Source: firing rates as recorded by the monitors of SpikingJelly; the two shares are defined
        here.

    Examples:
        >>> from sj_robust.neuron import DLIFNode
        >>> net = nn.Sequential(nn.Identity(), DLIFNode(T=2, tau=2.0))
        >>> firing(net, torch.tensor([[[0.0, 0.9, 2.0, 0.9]], [[0.0, 0.9, 2.0, 0.1]]]))
        (LayerActivity(layer='1', neuron='DLIFNode', rate=0.375, silent=0.5, saturated=0.25),)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be an nn.Module, whose neurons can be hooked, got {type(model).__name__}"
        )
    if x.numel() == 0:
        raise ValueError(f"x must hold at least one image, got shape {tuple(x.shape)}")
    check_hooks_run(model, "counting spikes")
    counts: dict[str, _Count] = {}
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if is_neuron(module) and emits_spikes(module):
                hooks.callback(module.register_forward_hook(partial(_count, counts, name)).remove)
        with torch.no_grad(), from_reset(model, seed, x.device):
            for part in torch.split(x, batch_size or len(x)):
                model(part)
    return tuple(count.activity(name) for name, count in counts.items())


class _Count:
    """Spikes of every neuron of one layer; neurons of calls with other shapes are other neurons."""

    def __init__(self, neuron: str) -> None:
        self.neuron = neuron
        self.outputs: Counter[torch.Size] = Counter()  # of one neuron, over steps and images
        self.spikes: dict[torch.Size, Tensor] = {}

    def add(self, fired: Tensor) -> None:
        """Count outputs [steps and images, *]."""
        shape = fired.shape[1:]
        self.outputs[shape] += len(fired)
        self.spikes[shape] = self.spikes.get(shape, 0) + fired.sum(0)

    def activity(self, name: str) -> LayerActivity:
        neurons = outputs = fired = ever = always = 0
        for shape, spikes in self.spikes.items():
            most = self.outputs[shape]
            neurons += spikes.numel()
            outputs += spikes.numel() * most
            fired += int(spikes.sum())
            ever += int((spikes > 0).sum())
            always += int((spikes == most).sum())
        return LayerActivity(
            name,
            self.neuron,
            rate=fired / outputs,
            silent=1.0 - ever / neurons,
            saturated=always / neurons,
        )


def _count(
    counts: dict[str, _Count], name: str, module: nn.Module, inputs: Any, output: Any
) -> None:
    """Count what the neuron ``name`` returns, as a hook of it."""
    output = output[0] if isinstance(output, tuple) else output
    if not isinstance(output, Tensor) or output.numel() == 0:
        return
    fired = output != 0
    if getattr(module, "step_mode", "m") == "m" and fired.ndim > 1:
        fired = fired.flatten(0, 1)  # steps and images alike
    counts.setdefault(name, _Count(type(module).__name__)).add(fired)
