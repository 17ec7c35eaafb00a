"""Perturbation dynamics in plain numpy and an independent capture of currents and spikes, for the
monitor's tests.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.testing import assert_allclose
from spikingjelly.activation_based import functional


class Run(NamedTuple):
    """Input currents and spikes [T, N, *] of one neuron in one run."""

    x: torch.Tensor
    spikes: torch.Tensor


def captured(net, names, x, run=None):
    """A :class:`Run` of each named neuron of a reset network, with its graph."""
    seen = {name: ([], []) for name in names}
    handles = []
    for name, (currents, spikes) in seen.items():

        def keep(module, args, kwargs, output, currents=currents, spikes=spikes):
            x = args[0] if args else kwargs["x"]
            currents.append(x[None] if module.step_mode == "s" else x)
            spikes.append(output[None] if module.step_mode == "s" else output)

        node = net.get_submodule(name)
        handles.append(node.register_forward_hook(keep, with_kwargs=True))
    functional.reset_net(net)
    (run or net)(x)
    functional.reset_net(net)
    for handle in handles:
        handle.remove()
    return {name: Run(*map(torch.cat, parts)) for name, parts in seen.items()}


def captured_pair(net, names, x, x_perturbed, run=None):
    """Both runs of each neuron in float64 of numpy: ``(clean, perturbed)`` by name."""
    found = {name: [] for name in names}
    with torch.no_grad():
        for inputs in (x, x_perturbed):
            for name, seen in captured(net, names, inputs, run).items():
                found[name].append(Run(*(part.double().numpy() for part in seen)))
    return found


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
    """How a neuron charges and resets; ``gain`` is one number, or one per step."""

    decay: float
    gain: float | tuple[float, ...] = 1.0
    v_threshold: float = 1.0
    v_reset: float | None = 0.0

    def gains(self, steps):
        """The gain of every step."""
        return self.gain if isinstance(self.gain, tuple) else [self.gain] * steps

    def potentials(self, run):
        """Potential after the reset for the spikes that were really emitted."""
        rest = self.v_reset or 0.0
        v = np.full_like(run.x[0], rest)
        seq = []
        for x, spikes, gain in zip(run.x, run.spikes, self.gains(len(run.x)), strict=True):
            h = self.decay * v + gain * x + (1.0 - self.decay) * rest
            if self.v_reset is None:
                v = h - self.v_threshold * spikes
            else:
                v = np.where(spikes == 1, self.v_reset, h)
            seq.append(v)
        return np.stack(seq)


def silent_by_hand(spikes):
    """Share of the neurons that have not fired for any sample, [T]."""
    fired = spikes.sum(1).cumsum(0)
    shares = [(fired_so_far == 0).mean() for fired_so_far in fired]
    return np.array(shares)


def statistics_by_hand(clean, perturbed, dynamics, learned=True):
    """Every statistic of LayerStats for one pair of runs, [T] each, and the tensors of LayerTrace;
    ``learned`` is whether eps contains the gain.
    """
    axes = tuple(range(1, clean.x.ndim))
    gains = dynamics.gains(len(clean.x)) if learned else [1.0] * len(clean.x)
    eps = eps_by_hand(clean.x, perturbed.x, dynamics.decay, gains).numpy()
    v, v_perturbed = (dynamics.potentials(run) for run in (clean, perturbed))
    steps = np.arange(1, len(eps) + 1).reshape(-1, *[1] * len(axes))
    rates, rates_perturbed = (run.spikes.cumsum(0) / steps for run in (clean, perturbed))
    found = {
        "firing_rate": clean.spikes.mean(axes),
        "firing_rate_perturbed": perturbed.spikes.mean(axes),
        "silent": silent_by_hand(clean.spikes),
        "silent_perturbed": silent_by_hand(perturbed.spikes),
        "spike_distance": np.abs(clean.spikes - perturbed.spikes).mean(axes),
        "tasad": np.abs(rates_perturbed - rates).mean(axes),
    }
    for prefix, difference in {"": eps, "full_": v - v_perturbed}.items():
        size = np.abs(difference)
        found[f"{prefix}ms_mppd"] = (size**2).mean(axes)
        found[f"{prefix}l1"] = size.mean(axes)
        found[f"{prefix}max_abs"] = size.max(axes)
    traced = {
        "x_seq": clean.x,
        "spike_seq": clean.spikes,
        "v_seq": v,
        "x_seq_perturbed": perturbed.x,
        "spike_seq_perturbed": perturbed.spikes,
        "v_seq_perturbed": v_perturbed,
        "eps": eps,
        "full": v - v_perturbed,
    }
    return found, traced


def assert_stats(stats, expected, rtol=1e-4, atol=1e-6):
    for name, value in expected.items():
        found = getattr(stats, name).numpy()
        assert_allclose(found, value, rtol=rtol, atol=atol, err_msg=f"{stats.name}: {name}")
