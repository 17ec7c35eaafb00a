"""Gradients of the estimators in numpy, written from the equations and nothing else."""

import math

import numpy as np
import torch
from oracle import dlif_backward, dlif_forward, surrogate_derivative
from torch import nn

from sj_robust.core.host import functional, neuron, surrogate
from sj_robust.neuron import DLIFNode

T, N, FEATURES, HIDDEN, CLASSES = 4, 3, 5, 6, 4
GAINS = [0.7, 1.3, 0.9, 1.1]
NORMAL_QUANTILE_85 = 1.4395314709384563  # of (1 + 0.85) / 2; sqrt(2) * erfinv(0.85)


def make_neuron(kind, v_reset=0.0, v_threshold=1.0, step_mode="m", surrogate_function=None):
    options = {
        "v_reset": v_reset,
        "v_threshold": v_threshold,
        "step_mode": step_mode,
        "surrogate_function": surrogate_function or surrogate.ATan(alpha=3.0),
    }
    if kind == "IF":
        return neuron.IFNode(**options)
    if kind == "PLIF":
        return neuron.ParametricLIFNode(init_tau=1.7, decay_input=True, **options)
    if kind == "DLIF":
        node = DLIFNode(T=T, tau=2.5, **options)
        node.input_gain.data.copy_(torch.tensor(GAINS))
        return node
    return neuron.LIFNode(tau=2.5, decay_input=kind == "LIF_decay", **options)


KINDS = ("IF", "LIF", "LIF_decay", "PLIF", "DLIF")


def constants(kind):
    """Decay and gain per step of a neuron of ``make_neuron``."""
    if kind == "IF":
        return 1.0, [1.0] * T
    if kind == "PLIF":
        rate = 1.0 / (1.0 + math.exp(float(np.float32(math.log(0.7)))))
        return 1.0 - rate, [rate] * T
    decay = 1.0 - 1.0 / 2.5
    return decay, {
        "LIF": [1.0] * T,
        "LIF_decay": [1.0 / 2.5] * T,
        "DLIF": list(np.float32(GAINS).astype(float)),
    }[kind]


def network(kind, **options):
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Linear(FEATURES, HIDDEN),
        make_neuron(kind, **options),
        nn.Linear(HIDDEN, CLASSES),
        make_neuron(kind, **options),
    ).double()
    gain = constants(kind)[1][0]
    net[0].weight.data.mul_(4 / gain)  # so that neurons fire, whatever their gain
    net[2].weight.data.mul_(3 / gain)
    net[2].bias.data.add_(0.3 / gain)
    return net


def inputs():
    generator = torch.Generator().manual_seed(5)
    x = 2 * torch.rand(T, N, FEATURES, generator=generator, dtype=torch.float64) - 0.4
    return x, torch.randn(T, N, CLASSES, generator=generator, dtype=torch.float64)


def gradient(net, x, weights, step_mode="m"):
    """Gradient of the weighted sum of spikes; ``weights`` make it a different one at each step."""
    functional.reset_net(net)
    x = x.clone().requires_grad_()
    out = net(x) if step_mode == "m" else torch.stack([net(frame) for frame in x])
    (grad,) = torch.autograd.grad((out * weights).sum(), x)
    functional.reset_net(net)
    return grad.numpy()


def fire(x, kind, v_reset, theta):
    """h and s of neurons for their inputs x [T, ...]."""
    decay, gain = constants(kind)
    rest = np.full_like(x[0], v_reset or 0.0)
    return dlif_forward(x, gain, rest, decay=decay, v_threshold=theta, v_reset=v_reset)[:2]


def per_step(gain, x):
    return np.reshape(gain, (T, *(1 for _ in x.shape[1:])))


def bptt(h, s, grad_s, slopes, kind, v_reset, theta, detach):
    """Gradient of x by the chain rule over v[t-1] -> h[t] -> (s[t], v[t])."""
    decay, gain = constants(kind)
    options = {"decay": decay, "v_threshold": theta, "v_reset": v_reset, "detach_reset": detach}
    return dlif_backward(h, s, slopes, grad_spikes=grad_s, **options)[0] * per_step(gain, h)


def pdsg_slopes(h, theta):
    """A Gaussian whose width is the deviation of all potentials up to a step, 1 where there is
    none.
    """
    slopes = np.zeros_like(h)
    for t in range(T):
        sigma = np.std(h[: t + 1], ddof=1) if np.ptp(h[: t + 1]) else 1.0
        slopes[t] = surrogate_derivative("gaussian", 1 / sigma, h[t] - theta - sigma / 2)
    return slopes


def assg_slopes(z, name, memory):
    """``memory`` holds M and D of every neuron and step and is moved on."""
    share = 0.85
    omega = {
        "atan": 2 * math.tan(math.pi * 0.425) / math.pi,
        "sigmoid": 2 * math.atanh(share),
        "gaussian": NORMAL_QUANTILE_85,
        "triangle": 1 - math.sqrt(1 - share),
        "rectangle": share,
    }[name]
    m, d = memory or (1.0, 0.0)
    m = 0.9 * m + 0.1 * abs(z)
    d = 0.9 * d + 0.1 * abs(abs(z) - m)
    memory[:] = m, d
    return surrogate_derivative(name, omega / (m + 1.5 * d + 1e-4), z)


def rga_gate(x, kind, theta):
    decay, gain = constants(kind)
    gain = per_step(gain, x)
    u = (gain * x).mean(0) / theta
    middle = np.where((1 - decay <= u) & (u <= 2), (1 - 0.2 + 0.2 * decay) / (1 + decay), 0.0)
    return np.where((u >= 0) & (u < 1 - decay), 0.2, middle) * gain / theta


def layer_by_hand(name, x, grad_s, kind, v_reset, theta, detach, memory):
    """Gradient of the inputs [T, N, F] of a layer of neurons."""
    family, _, number = name.partition(":")
    h, s = fire(x, kind, v_reset, theta)
    z = h - theta
    if family == "bptr":
        return grad_s * (s.sum(0) > 0)
    if family == "rga":
        return grad_s * rga_gate(x, kind, theta)
    if family in ("training", "hart", "hart_mixed"):
        slopes = surrogate_derivative("atan", 3.0, z)
    elif family == "pdsg":
        slopes = pdsg_slopes(h, theta)
    elif family == "assg":
        slopes = assg_slopes(z, number or "atan", memory)
    else:
        alpha = float(number or 1)
        slopes = surrogate_derivative(
            family, 1 / (alpha * theta) if family in ("triangle", "rectangle") else alpha, z
        )
    grad = bptt(h, s, grad_s, slopes, kind, v_reset, theta, detach)
    if family in ("hart", "hart_mixed"):
        by_rate = grad_s.mean(0) * surrogate_derivative("triangle", 1 / (float(number) * theta), z)
        by_rate = by_rate * per_step(constants(kind)[1], x)
        return by_rate if family == "hart" else (by_rate + grad) / 2
    return grad


def gradient_by_hand(name, net, x, weights, kind, v_reset, theta, memories=None):
    name, detach = name.removesuffix("+detach"), name.endswith("+detach")
    memories = memories if memories is not None else ([], [])
    w1, b1, w2, b2 = (
        p.detach().numpy() for p in (net[0].weight, net[0].bias, net[2].weight, net[2].bias)
    )
    x1 = x.numpy() @ w1.T + b1
    x2 = fire(x1, kind, v_reset, theta)[1] @ w2.T + b2
    grad_x2 = layer_by_hand(name, x2, weights.numpy(), kind, v_reset, theta, detach, memories[1])
    return layer_by_hand(name, x1, grad_x2 @ w2, kind, v_reset, theta, detach, memories[0]) @ w1
