"""Gradients of the estimators in loops over single numbers, written from the equations and nothing else."""

import math

import numpy as np
import torch
from torch import nn

from sj_robust._host import functional, neuron, surrogate
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
    return decay, {"LIF": [1.0] * T, "LIF_decay": [1.0 / 2.5] * T, "DLIF": list(np.float32(GAINS).astype(float))}[kind]


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
    """h and s of one neuron for its inputs x[t]."""
    decay, gain = constants(kind)
    rest = 0.0 if v_reset is None else v_reset
    v, h, s = rest, [], []
    for t in range(T):
        h.append(decay * v + (1 - decay) * rest + gain[t] * x[t])
        s.append(1.0 if h[t] >= theta else 0.0)
        v = h[t] - theta * s[t] if v_reset is None else (v_reset if s[t] else h[t])
    return h, s


def bptt(h, s, grad_s, slope, kind, v_reset, theta, detach):
    """Gradient of x[t] by the chain rule over v[t-1] -> h[t] -> (s[t], v[t])."""
    decay, gain = constants(kind)
    grad_x, grad_v = [0.0] * T, 0.0
    for t in reversed(range(T)):
        grad_spike = grad_s[t]
        if not detach:
            grad_spike += grad_v * (-theta if v_reset is None else v_reset - h[t])
        grad_h = grad_spike * slope[t] + grad_v * (1.0 if v_reset is None else 1.0 - s[t])
        grad_x[t], grad_v = grad_h * gain[t], grad_h * decay
    return grad_x


def shape(name, z, alpha):
    if name == "triangle":
        return max(0.0, alpha - alpha**2 * abs(z))
    if name == "atan":
        return alpha / 2 / (1 + (math.pi / 2 * alpha * z) ** 2)
    if name == "sigmoid":
        s = 1 / (1 + math.exp(-alpha * z))
        return alpha * s * (1 - s)
    if name == "rectangle":
        return alpha / 2 if abs(z) <= 1 / alpha else 0.0
    if name == "exponential":
        return alpha / 2 * math.exp(-alpha * abs(z))
    if name == "gaussian":
        return alpha * math.exp(-((alpha * z) ** 2) / 2) / math.sqrt(2 * math.pi)
    assert name == "straight_through"
    return 1.0


def assg_slopes(z, name, memory):
    """Slopes of one neuron; ``memory`` holds M and D per step and is moved on."""
    share = 0.85
    omega = {
        "atan": 2 * math.tan(math.pi * 0.425) / math.pi,
        "sigmoid": 2 * math.atanh(share),
        "gaussian": NORMAL_QUANTILE_85,
        "triangle": 1 - math.sqrt(1 - share),
        "rectangle": share,
    }[name]
    slopes = []
    for t in range(T):
        m, d = memory[t]
        m = 0.9 * m + 0.1 * abs(z[t])
        d = 0.9 * d + 0.1 * abs(abs(z[t]) - m)
        memory[t] = (m, d)
        slopes.append(shape(name, z[t], omega / (m + 1.5 * d + 1e-4)))
    return slopes


def rga_gate(x, kind, theta):
    decay, gain = constants(kind)
    u = sum(gain[t] * x[t] for t in range(T)) / T / theta
    slope = 0.0
    if 0 <= u < 1 - decay:
        slope = 0.2
    elif 1 - decay <= u <= 2:
        slope = (1 - 0.2 + 0.2 * decay) / (1 + decay)
    return [slope * gain[t] / theta for t in range(T)]


def layer_by_hand(name, x, grad_s, kind, v_reset, theta, detach, memory):
    """Gradient of the inputs [T, N, F] of a layer of neurons."""
    _, gain = constants(kind)
    family, _, number = name.partition(":")
    grad_x = np.zeros_like(x)
    all_h = np.zeros_like(x)
    for i in np.ndindex(*x.shape[1:]):
        all_h[(slice(None), *i)] = fire(x[(slice(None), *i)], kind, v_reset, theta)[0]
    for i in np.ndindex(*x.shape[1:]):
        at = (slice(None), *i)
        h, s = fire(x[at], kind, v_reset, theta)
        z = [h[t] - theta for t in range(T)]
        arguments = (kind, v_reset, theta, detach)
        if family == "bptr":
            grad_x[at] = [grad_s[at][t] * (sum(s) > 0) for t in range(T)]
        elif family == "rga":
            gate = rga_gate(x[at], kind, theta)
            grad_x[at] = [grad_s[at][t] * gate[t] for t in range(T)]
        elif family in ("hart", "hart_mixed"):
            alpha = 1 / (float(number) * theta)
            mean = sum(grad_s[at]) / T
            by_rate = [mean * shape("triangle", z[t], alpha) * gain[t] for t in range(T)]
            own = bptt(h, s, grad_s[at], [shape("atan", z[t], 3.0) for t in range(T)], *arguments)
            mixed = [(a + b) / 2 for a, b in zip(by_rate, own, strict=True)]
            grad_x[at] = by_rate if family == "hart" else mixed
        else:
            if family == "training":
                slopes = [shape("atan", z[t], 3.0) for t in range(T)]
            elif family == "pdsg":
                slopes = []
                for t in range(T):
                    sigma = float(np.std(all_h[: t + 1], ddof=1)) or 1.0
                    slopes.append(math.exp(-(((z[t] - sigma / 2) / sigma) ** 2) / 2) / sigma / math.sqrt(2 * math.pi))
            elif family == "assg":
                slopes = assg_slopes(z, number or "atan", memory.setdefault(i, [(1.0, 0.0)] * T))
            else:
                alpha = float(number or 1)
                if family in ("triangle", "rectangle"):
                    alpha = 1 / (alpha * theta)
                slopes = [shape(family, z[t], alpha) for t in range(T)]
            grad_x[at] = bptt(h, s, grad_s[at], slopes, *arguments)
    return grad_x


def gradient_by_hand(name, net, x, weights, kind, v_reset, theta, memories=None):
    name, detach = name.removesuffix("+detach"), name.endswith("+detach")
    memories = memories if memories is not None else ({}, {})
    w1, b1, w2, b2 = (p.detach().numpy() for p in (net[0].weight, net[0].bias, net[2].weight, net[2].bias))
    x1 = x.numpy() @ w1.T + b1
    s1 = np.zeros_like(x1)
    for i in np.ndindex(*x1.shape[1:]):
        s1[(slice(None), *i)] = fire(x1[(slice(None), *i)], kind, v_reset, theta)[1]
    x2 = s1 @ w2.T + b2
    grad_x2 = layer_by_hand(name, x2, weights.numpy(), kind, v_reset, theta, detach, memories[1])
    grad_x1 = layer_by_hand(name, x1, grad_x2 @ w2, kind, v_reset, theta, detach, memories[0])
    return grad_x1 @ w1
