"""Perturbation dynamics in plain numpy and an independent capture of currents and spikes, for the
monitor's tests.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.testing import assert_allclose
from spikingjelly.activation_based import functional


class Captured:
    """Forward hook that keeps input currents and spikes of every step, with their graph."""

    def __init__(self):
        self.currents = []
        self.spikes = []

    def __call__(self, module, inputs, output):
        if module.step_mode == "s":
            self.currents.append(inputs[0])
            self.spikes.append(output)
        else:
            self.currents.extend(inputs[0])
            self.spikes.extend(output)

    @property
    def x_seq(self):
        return torch.stack(self.currents)

    @property
    def spike_seq(self):
        return torch.stack(self.spikes)


def captured(net, names, x, run=None):
    """What the named neurons of a reset network read and fired in one run."""
    seen = {name: Captured() for name in names}
    handles = []
    for name, keep in seen.items():
        handles.append(net.get_submodule(name).register_forward_hook(keep))
    functional.reset_net(net)
    run = run or net
    run(x)
    functional.reset_net(net)
    for handle in handles:
        handle.remove()
    return seen


@dataclass(frozen=True)
class Pair:
    """Input currents and spikes [T, N, *] of one neuron in a clean and a perturbed run."""

    x: np.ndarray
    spikes: np.ndarray
    x_perturbed: np.ndarray
    spikes_perturbed: np.ndarray


def captured_pair(net, names, x, x_perturbed, run=None):
    """A :class:`Pair` in float64 for each name."""
    with torch.no_grad():
        clean = captured(net, names, x, run)
        perturbed = captured(net, names, x_perturbed, run)
    pairs = {}
    for name in names:
        pairs[name] = Pair(
            x=clean[name].x_seq.double().numpy(),
            spikes=clean[name].spike_seq.double().numpy(),
            x_perturbed=perturbed[name].x_seq.double().numpy(),
            spikes_perturbed=perturbed[name].spike_seq.double().numpy(),
        )
    return pairs


def eps_by_hand(x, x_perturbed, decay, gain):
    """Simplified perturbation in float64 as an explicit weighted sum over earlier steps, with the
    perturbed graph.

    ``gain`` holds one number per step.
    """
    x = torch.as_tensor(x).detach().double()
    dx = x - torch.as_tensor(x_perturbed).double()
    eps = []
    for t in range(len(dx)):
        terms = [decay ** (t - k) * gain[k] * dx[k] for k in range(t + 1)]
        eps.append(sum(terms))
    return torch.stack(eps)


@dataclass(frozen=True)
class Dynamics:
    """How a neuron charges and resets; ``gain`` holds one number per step."""

    decay: float
    gain: list[float]
    v_threshold: float = 1.0
    v_reset: float | None = 0.0

    def potentials(self, x, spikes):
        """Potential after the reset for the spikes that were really emitted."""
        rest = self.v_reset or 0.0
        v = np.full_like(x[0], rest)
        seq = []
        for t in range(len(x)):
            h = self.decay * v + self.gain[t] * x[t] + (1.0 - self.decay) * rest
            if self.v_reset is None:
                v = h - self.v_threshold * spikes[t]
            else:
                v = np.where(spikes[t] == 1, self.v_reset, h)
            seq.append(v)
        return np.stack(seq)


def silent_by_hand(spikes):
    """Share of the neurons that have not fired for any sample, [T]."""
    fired = spikes.sum(1).cumsum(0)
    shares = [(fired_so_far == 0).mean() for fired_so_far in fired]
    return np.array(shares)


def statistics_by_hand(pair, dynamics):
    """Every statistic of LayerStats for one pair of runs, [T] each."""
    axes = tuple(range(1, pair.x.ndim))
    eps = eps_by_hand(pair.x, pair.x_perturbed, dynamics.decay, dynamics.gain).numpy()
    v = dynamics.potentials(pair.x, pair.spikes)
    v_perturbed = dynamics.potentials(pair.x_perturbed, pair.spikes_perturbed)
    d = v - v_perturbed
    size = np.abs(eps)
    full_size = np.abs(d)
    differ = np.abs(pair.spikes - pair.spikes_perturbed)
    tasad = []
    for t in range(len(pair.x)):
        rate = pair.spikes[: t + 1].mean(0)
        rate_perturbed = pair.spikes_perturbed[: t + 1].mean(0)
        tasad.append(np.abs(rate_perturbed - rate).mean())
    return {
        "firing_rate": pair.spikes.mean(axes),
        "firing_rate_perturbed": pair.spikes_perturbed.mean(axes),
        "silent": silent_by_hand(pair.spikes),
        "silent_perturbed": silent_by_hand(pair.spikes_perturbed),
        "ms_mppd": (eps**2).mean(axes),
        "l1": size.mean(axes),
        "max_abs": size.max(axes),
        "full_ms_mppd": (d**2).mean(axes),
        "full_l1": full_size.mean(axes),
        "full_max_abs": full_size.max(axes),
        "spike_distance": differ.mean(axes),
        "tasad": np.array(tasad),
    }


def assert_stats(stats, expected, rtol=1e-4, atol=1e-6):
    for name, value in expected.items():
        found = getattr(stats, name).numpy()
        assert_allclose(found, value, rtol=rtol, atol=atol, err_msg=f"{stats.name}: {name}")
