"""Gradients of the estimators in numpy, written from the equations and nothing else."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from oracle import dlif_backward, dlif_forward, surrogate_derivative
from torch import nn

from sj_robust.core.host import functional, neuron, surrogate
from sj_robust.neuron import DLIFNode

T = 4
N = 3
FEATURES = 5
HIDDEN = 6
CLASSES = 4
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
PLIF_RATE = 1.0 / (1.0 + math.exp(float(np.float32(math.log(0.7)))))  # 1 / tau as it is stored


@dataclass(frozen=True)
class Layer:
    """Neurons of ``make_neuron`` with their levels, computed by hand."""

    kind: str
    v_reset: float | None = 0.0
    v_threshold: float = 1.0

    @property
    def decay(self):
        if self.kind == "IF":
            return 1.0
        if self.kind == "PLIF":
            return 1.0 - PLIF_RATE
        return 1.0 - 1.0 / 2.5

    @property
    def gain(self):
        """Gain of every step."""
        if self.kind == "PLIF":
            return [PLIF_RATE] * T
        if self.kind == "LIF_decay":
            return [1.0 / 2.5] * T
        if self.kind == "DLIF":
            return list(np.float32(GAINS).astype(float))
        return [1.0] * T

    def fire(self, x):
        """h and s of neurons for their inputs x [T, ...]."""
        h, s, _ = dlif_forward(
            x,
            self.gain,
            np.full_like(x[0], self.v_reset or 0.0),
            decay=self.decay,
            v_threshold=self.v_threshold,
            v_reset=self.v_reset,
        )
        return h, s

    def scaled(self, grad_h):
        """Times the gain of every step."""
        others = [1] * (grad_h.ndim - 1)
        return grad_h * np.reshape(self.gain, (T, *others))

    def bptt(self, h, s, grad_s, slopes, detach=False):
        """Gradient of x by the chain rule over v[t-1] -> h[t] -> (s[t], v[t])."""
        grad_h, _ = dlif_backward(
            h,
            s,
            slopes,
            decay=self.decay,
            v_threshold=self.v_threshold,
            v_reset=self.v_reset,
            detach_reset=detach,
            grad_spikes=grad_s,
        )
        return self.scaled(grad_h)


def network(kind, **options):
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Linear(FEATURES, HIDDEN),
        make_neuron(kind, **options),
        nn.Linear(HIDDEN, CLASSES),
        make_neuron(kind, **options),
    ).double()
    gain = Layer(kind).gain[0]
    net[0].weight.data.mul_(4 / gain)  # so that neurons fire, whatever their gain
    net[2].weight.data.mul_(3 / gain)
    net[2].bias.data.add_(0.3 / gain)
    return net


def inputs():
    torch.manual_seed(5)
    x = torch.rand(T, N, FEATURES).double()
    weights = torch.randn(T, N, CLASSES).double()
    return 2 * x - 0.4, weights


def gradient(net, x, weights, step_mode="m"):
    """Gradient of the weighted sum of spikes; ``weights`` make it a different one at each step."""
    functional.reset_net(net)
    x = x.clone().requires_grad_()
    out = net(x) if step_mode == "m" else step_by_step(net, x)
    grad = gradient_of(out, x, weights)
    functional.reset_net(net)
    return grad.numpy()


def step_by_step(net, x):
    return torch.stack([net(frame) for frame in x])


def gradient_of(out, x, weights):
    weighted = out * weights
    (grad,) = torch.autograd.grad(weighted.sum(), x)
    return grad


def pdsg_slopes(h, theta):
    """A Gaussian whose width is the deviation of all potentials up to a step, 1 where there is
    none.
    """
    slopes = np.zeros_like(h)
    for t in range(T):
        so_far = h[: t + 1]
        sigma = np.std(so_far, ddof=1) if np.ptp(so_far) else 1.0
        z = h[t] - theta - sigma / 2
        slopes[t] = surrogate_derivative("gaussian", 1 / sigma, z)
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
    size = abs(z)
    m, d = memory or (1.0, 0.0)
    m = 0.9 * m + 0.1 * size
    d = 0.9 * d + 0.1 * abs(size - m)
    memory[:] = m, d
    alpha = omega / (m + 1.5 * d + 1e-4)
    return surrogate_derivative(name, alpha, z)


def rga_gate(x, layer):
    theta = layer.v_threshold
    decay = layer.decay
    u = layer.scaled(x).mean(0) / theta
    low = (u >= 0) & (u < 1 - decay)
    middle = (u >= 1 - decay) & (u <= 2)
    above = (1 - 0.2 + 0.2 * decay) / (1 + decay)
    slope = 0.2 * low + above * middle
    gate = np.broadcast_to(slope / theta, x.shape)
    return layer.scaled(gate)


@dataclass(frozen=True)
class ByHand:
    """One estimator on layers of one kind; ``name`` is without ``+detach``."""

    name: str
    layer: Layer
    detach: bool = False

    @property
    def family(self):
        return self.name.partition(":")[0]

    @property
    def number(self):
        return self.name.partition(":")[2]

    def slopes(self, h, memory):
        theta = self.layer.v_threshold
        z = h - theta
        if self.family in ("training", "hart_mixed"):
            return surrogate_derivative("atan", 3.0, z)
        if self.family == "pdsg":
            return pdsg_slopes(h, theta)
        if self.family == "assg":
            return assg_slopes(z, self.number or "atan", memory)
        alpha = float(self.number or 1)
        if self.family in ("triangle", "rectangle"):
            alpha = 1 / (alpha * theta)
        return surrogate_derivative(self.family, alpha, z)

    def by_rate(self, h, grad_s):
        """HART."""
        theta = self.layer.v_threshold
        alpha = 1 / (float(self.number) * theta)
        slopes = surrogate_derivative("triangle", alpha, h - theta)
        return self.layer.scaled(grad_s.mean(0) * slopes)

    def of_layer(self, x, grad_s, memory):
        """Gradient of the inputs [T, N, F] of a layer of neurons."""
        h, s = self.layer.fire(x)
        if self.family == "bptr":
            return grad_s * (s.sum(0) > 0)
        if self.family == "rga":
            return grad_s * rga_gate(x, self.layer)
        if self.family == "hart":
            return self.by_rate(h, grad_s)
        slopes = self.slopes(h, memory)
        grad = self.layer.bptt(h, s, grad_s, slopes, self.detach)
        if self.family == "hart_mixed":
            return (self.by_rate(h, grad_s) + grad) / 2
        return grad


def gradient_by_hand(name, net, x, weights, layer, memories=None):
    """Gradient of ``network``; ``memories`` are those of both layers."""
    first, second = memories or ([], [])
    detach = name.endswith("+detach")
    by_hand = ByHand(name.removesuffix("+detach"), layer, detach)
    w1 = net[0].weight.detach().numpy()
    b1 = net[0].bias.detach().numpy()
    w2 = net[2].weight.detach().numpy()
    b2 = net[2].bias.detach().numpy()
    x1 = x.numpy() @ w1.T + b1
    _, s1 = layer.fire(x1)
    x2 = s1 @ w2.T + b2
    grad_x2 = by_hand.of_layer(x2, weights.numpy(), second)
    grad_x1 = by_hand.of_layer(x1, grad_x2 @ w2, first)
    return grad_x1 @ w1
