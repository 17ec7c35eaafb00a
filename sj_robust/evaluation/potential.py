"""How far an attack moves the membrane potential of every spiking layer."""

import warnings
from typing import Any

from torch import Tensor, nn

from sj_robust.perturbation import MPPDMonitor
from sj_robust.randomness import seeded_globals

__all__ = ["layer_perturbation"]


def layer_perturbation(model: nn.Module, x: Tensor, x_adv: Tensor, *, seed: int = 0) -> dict[str, Any]:
    """MS-MPPD of every spiking layer per time step between clean and adversarial images. 各层各步的膜电位扰动。

    Equation: ``mean(eps[t]^2)`` with ``eps[t] = decay * eps[t-1] + gain[t] * (x[t] - x~[t])``, see ``MPPDMonitor``.

    Args:
        model: Images to logits, such as ``SpikingClassifier``.
        x: Clean images [N, ...].
        x_adv: Adversarial images of the same shape.
        seed: Seeds the global generators, for stochastic encoders.

    Returns:
        ``samples``, ``layers`` (per layer, in order of execution, a list over time steps) and ``warnings`` (neurons
        that cannot be followed); empty if the network has no neuron that can.

    Source: Ding et al., "Robust Stable Spiking Neural Networks" (ICML 2024).

    Examples:
        >>> import torch
        >>> from spikingjelly.activation_based import neuron
        >>> model = nn.Sequential(neuron.IFNode(step_mode="m"))
        >>> layer_perturbation(model, torch.full((2, 1, 1), 0.5), torch.full((2, 1, 1), 0.75))["layers"]
        {'0': [0.0625, 0.25]}
    """
    with warnings.catch_warnings(record=True) as caught, seeded_globals(seed, x.device):
        warnings.simplefilter("always")
        try:
            with MPPDMonitor(model) as monitor:
                stats = monitor.compare(x, x_adv, forward=model)
        except (ValueError, RuntimeError):  # there is no neuron to follow, or none that runs
            return {}
    layers = {name: layer.ms_mppd.tolist() for name, layer in stats.items()}
    return {"samples": len(x), "layers": layers, "warnings": sorted({str(warning.message) for warning in caught})}
