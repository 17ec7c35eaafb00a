"""Perturbation dynamics in plain numpy and an independent capture of currents and spikes, for the monitor's tests."""

import numpy as np
import torch
from spikingjelly.activation_based import functional


def capture(net, names, run):
    """Currents and spikes [T, N, *] in float64 of the named neurons in one run of a reset network."""
    seen = {name: ([], []) for name in names}
    handles = []
    for name, module in net.named_modules():
        if name in seen:

            def hook(module, inputs, output, name=name):
                steps = (lambda a: [a]) if module.step_mode == "s" else list
                for store, value in zip(seen[name], (inputs[0], output), strict=True):
                    store.extend(step.detach().double().numpy().copy() for step in steps(value))

            handles.append(module.register_forward_hook(hook))
    functional.reset_net(net)
    with torch.no_grad():
        run()
    functional.reset_net(net)
    for handle in handles:
        handle.remove()
    return {name: (np.stack(x), np.stack(s)) for name, (x, s) in seen.items() if x}


def eps_by_hand(x, x_perturbed, decay, gain):
    """Simplified perturbation as an explicit weighted sum over earlier steps; ``gain`` holds one number per step."""
    dx = x - x_perturbed
    return np.stack(
        [sum(decay ** (t - k) * gain[k] * dx[k] for k in range(t + 1)) for t in range(len(dx))],
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
    eps = eps_by_hand(x, xp, decay, gain)
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
        "tasad": np.array([np.abs(sp[: t + 1].mean(0) - s[: t + 1].mean(0)).mean() for t in range(T)]),
    }


def assert_stats(stats, expected, rtol=1e-4, atol=1e-6):
    for name, value in expected.items():
        np.testing.assert_allclose(
            getattr(stats, name).numpy(), value, rtol=rtol, atol=atol, err_msg=f"{stats.name}: {name}"
        )
