"""Indicators of a perturbation between two runs, per neuron and over the neurons of a layer."""

from torch import Tensor

from sj_robust.perturbation import dynamics
from sj_robust.perturbation._statistics import LayerTrace

__all__ = ["INDICATORS", "neuron_indicators", "over_neurons"]

INDICATORS = ("mppd_l1", "mppd_l2", "mppd_max", "full", "std", "tasad")
"""Their names."""


def neuron_indicators(trace: LayerTrace) -> dict[str, Tensor]:
    """Every indicator of a layer's perturbation for every sample and neuron. 逐神经元的扰动指标。

    Equation, with ``eps`` the simplified perturbation, ``d`` the full one and means over time::

        mppd_l1 = mean |eps|    mppd_l2 = mean eps^2    mppd_max = max |eps|    full = mean d^2
        std = mean |s - s~|     tasad = |mean s - mean s~|

    Args:
        trace: One pair of runs of the layer, from :func:`spike_traces` or
            ``MPPDMonitor(net, keep="trace")``.

    Returns:
        Tensors [N, features] by the names in :data:`INDICATORS`.

    Source: Ding et al., "Robust Stable Spiking Neural Networks" (ICML 2024).

    Examples:
        >>> import torch
        >>> from spikingjelly.activation_based import neuron
        >>> from sj_robust.perturbation import spike_traces
        >>> net = torch.nn.Sequential(neuron.IFNode(step_mode="m"))
        >>> layer = spike_traces(net, torch.full((2, 1, 1), 0.5), torch.full((2, 1, 1), 0.75))["0"]
        >>> {name: value.item() for name, value in neuron_indicators(layer).items()}
        {'mppd_l1': 0.375, 'mppd_l2': 0.15625, 'mppd_max': 0.5, 'full': 0.03125,
        'std': 0.0, 'tasad': 0.0}
    """
    eps = trace.eps.flatten(2)
    size = eps.abs()
    full = trace.full.flatten(2)
    spikes = trace.spike_seq.float().flatten(2)
    spikes_perturbed = trace.spike_seq_perturbed.float().flatten(2)
    return {
        "mppd_l1": size.mean(0),
        "mppd_l2": eps.square().mean(0),
        "mppd_max": size.amax(0),
        "full": full.square().mean(0),
        "std": dynamics.spike_train_distance(spikes, spikes_perturbed),
        "tasad": dynamics.tasad(spikes, spikes_perturbed),
    }


def over_neurons(name: str, value: Tensor) -> Tensor:
    """One number per sample of an indicator [N, features]: its mean, for ``mppd_max`` the
    maximum.
    """
    return value.amax(1) if name == "mppd_max" else value.mean(1)
