"""Perturbation dynamics in plain numpy and an independent capture of currents and spikes, for the
monitor's tests.
"""

import numpy as np
import torch
from spikingjelly.activation_based import functional


def captured(net, names, x, run=None):
    """Input currents and spikes [T, N, *] with their graph of the named neurons in one run of a
    reset network.
    """
    seen = {name: ([], []) for name in names}

    def hook(name):
        def keep(module, inputs, output):
            for values, value in zip(seen[name], (inputs[0], output), strict=True):
                values.extend([value] if module.step_mode == "s" else value)

        return keep

    handles = [net.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    functional.reset_net(net)
    (run or net)(x)
    functional.reset_net(net)
    for handle in handles:
        handle.remove()
    return {name: [torch.stack(values) for values in both] for name, both in seen.items()}


def captured_pair(net, names, x, x_perturbed, run=None):
    """Those of a clean and of a perturbed run in float64 numpy, four arrays for each name."""
    with torch.no_grad():
        clean, perturbed = (captured(net, names, a, run) for a in (x, x_perturbed))
    return {name: [a.double().numpy() for a in (*clean[name], *perturbed[name])] for name in names}


def eps_by_hand(x, x_perturbed, decay, gain):
    """Simplified perturbation in float64 as an explicit weighted sum over earlier steps, with the
    perturbed graph.

    ``gain`` holds one number per step.
    """
    dx = torch.as_tensor(x).detach().double() - torch.as_tensor(x_perturbed).double()
    return torch.stack(
        [sum(decay ** (t - k) * gain[k] * dx[k] for k in range(t + 1)) for t in range(len(dx))]
    )


def potentials_by_hand(x, spikes, decay, gain, v_threshold, v_reset):
    """Potential after the reset for the spikes that were really emitted."""
    v = np.full_like(x[0], v_reset or 0.0)
    seq = []
    for t in range(len(x)):
        h = decay * v + gain[t] * x[t] + (0.0 if v_reset is None else (1.0 - decay) * v_reset)
        v = h - v_threshold * spikes[t] if v_reset is None else np.where(spikes[t] == 1, v_reset, h)
        seq.append(v)
    return np.stack(seq)


def statistics_by_hand(x, s, xp, sp, decay, gain, v_threshold=1.0, v_reset=0.0):
    """Every statistic of LayerStats for one pair of runs, [T] each."""
    T = len(x)
    axes = tuple(range(1, x.ndim))
    eps = eps_by_hand(x, xp, decay, gain).numpy()
    d = potentials_by_hand(x, s, decay, gain, v_threshold, v_reset) - potentials_by_hand(
        xp, sp, decay, gain, v_threshold, v_reset
    )

    def silent(spikes):
        return [(spikes[: t + 1].sum((0, 1)) == 0).mean() for t in range(T)]

    return {
        "firing_rate": s.mean(axes),
        "firing_rate_perturbed": sp.mean(axes),
        "silent": np.array(silent(s)),
        "silent_perturbed": np.array(silent(sp)),
        "ms_mppd": (eps**2).mean(axes),
        "l1": np.abs(eps).mean(axes),
        "max_abs": np.abs(eps).max(axes),
        "full_ms_mppd": (d**2).mean(axes),
        "full_l1": np.abs(d).mean(axes),
        "full_max_abs": np.abs(d).max(axes),
        "spike_distance": np.abs(s - sp).mean(axes),
        "tasad": np.array(
            [np.abs(sp[: t + 1].mean(0) - s[: t + 1].mean(0)).mean() for t in range(T)]
        ),
    }


def assert_stats(stats, expected, rtol=1e-4, atol=1e-6):
    for name, value in expected.items():
        np.testing.assert_allclose(
            getattr(stats, name).numpy(),
            value,
            rtol=rtol,
            atol=atol,
            err_msg=f"{stats.name}: {name}",
        )
