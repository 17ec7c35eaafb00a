"""Looks for an input that leaves the bounds of verify, on random networks with products, attention,
normalisation and other functions; run by hand.

``python -m proofs.fuzz_functions --inputs 100000``, in tests/, tries so many perturbed inputs:
random ones, corners of the ball, and steps along the gradient. At each the results of all products
and functions, all currents, spikes, potentials and logits are held against their bounds. It stops
at the first one outside, with the seed that makes the network again.
"""

import random
from collections import Counter

import torch
import torch.nn.functional as F
from proofs.functions import OPERATIONS
from proofs.fuzz import fill_batch_norms, main, random_node
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from sj_robust import SpikingClassifier
from sj_robust.attacks.projection import linf_bounds
from sj_robust.core.preserved import sums_of_products
from sj_robust.proofs import UnsoundBoundsError, verify
from sj_robust.proofs.bounds import bounded_logits, bounded_neurons
from sj_robust.proofs.soundness import WatchedRun, check_point

IMAGES = 32
CHANNELS = 4
SIDE = 6
TIMES = (1, 2, 3, 4)
PADDINGS = ("zeros", "reflect", "replicate", "circular")
FUNCTIONS = ("relu", "leaky relu", "sigmoid", "tanh", "exp", "elu", "softplus", "abs", "silu")
FUNCTIONS += ("gelu", "clamp", "square as a product")


class InTime(nn.Module):
    """Layers of torch on [T, N, *]."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.Sequential(*parts)

    def forward(self, x):
        return self.parts(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Attention(nn.Module):
    """Queries, keys and values of spikes or of anything else, in one of the host's ways."""

    def __init__(self, case, T):
        super().__init__()
        self.way = case.choice(["softmax", "linear", "gate", "mask"])
        self.spikes = case.random() < 0.7
        self.maps = nn.ModuleList(InTime(nn.Conv2d(CHANNELS, CHANNELS, 1)) for _ in range(3))
        number = 4 if self.spikes else 1
        self.nodes = nn.ModuleList(random_node(case, False, T) for _ in range(number))
        self.factor = case.choice([0.125, -0.5, 1.0])

    def forward(self, x):
        parts = [part(x) for part in self.maps]
        if self.spikes:
            parts = [node(part) for node, part in zip(self.nodes[1:], parts, strict=True)]
        q, k, v = (part.flatten(3) for part in parts)
        found = self.attended(q, k, v)
        return x + self.nodes[0](found.reshape(x.shape))

    def attended(self, q, k, v):
        transposed = k.transpose(-1, -2)
        if self.way == "softmax":
            weights = torch.softmax(q @ transposed, -1)
            return weights @ v
        if self.way == "linear":
            return (v @ transposed) @ q * self.factor
        if self.way == "gate":
            gate = (k * v).sum(-1, keepdim=True)
            return q * gate * self.factor
        return torch.where(k >= 0.5, v, q * self.factor)


class Gated(nn.Module):
    """Attention by channels, as in the host's attention networks."""

    def __init__(self, case, T):
        super().__init__()
        self.first = nn.Linear(CHANNELS, 3)
        self.last = nn.Linear(3, CHANNELS)
        self.by_time = case.random() < 0.5

    def forward(self, x):
        mean = x.mean((-2, -1))
        largest = x.flatten(3).max(-1).values
        scores = self.scores(mean) + self.scores(largest)
        gate = torch.sigmoid(scores).unsqueeze(-1).unsqueeze(-1)
        if self.by_time:
            product = x.transpose(0, 1) * gate.transpose(0, 1)
            return product.transpose(0, 1)
        return x * gate

    def scores(self, pooled):
        hidden = torch.relu(self.first(pooled))
        return self.last(hidden)


class Connected(nn.Module):
    """Two branches of spikes, of which one masks the other."""

    def __init__(self, case, T):
        super().__init__()
        self.way = case.choice(["and", "iand", "max"])
        self.map = InTime(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1))
        self.nodes = nn.ModuleList(random_node(case, False, T) for _ in range(2))

    def forward(self, x):
        a = self.nodes[0](x)
        b = self.nodes[1](self.map(x))
        if self.way == "max":
            return torch.maximum(a, b)
        return a * b if self.way == "and" else a * (1.0 - b)


class Function(nn.Module):
    """A function of the table."""

    def __init__(self, case, T):
        super().__init__()
        self.name = case.choice(FUNCTIONS)

    def forward(self, x):
        return OPERATIONS[self.name](x)


class Threshold(nn.Module):
    """A neuron written by hand, without a memory."""

    def forward(self, x):
        return (x >= 0.25).to(x.dtype)


def normalised(case, T):
    """A norm of groups or of a layer."""
    if case.random() < 0.5:
        groups = case.choice([1, 2, CHANNELS])
        return InTime(nn.GroupNorm(groups, CHANNELS))
    shapes = [[SIDE], [SIDE, SIDE], [CHANNELS, SIDE, SIDE]]
    return nn.LayerNorm(case.choice(shapes))


def padded(case, T):
    """A convolution with one of torch's paddings, or a transposed one."""
    if case.random() < 0.3:
        return InTime(nn.ConvTranspose2d(CHANNELS, CHANNELS, 3, padding=1))
    mode = case.choice(PADDINGS)
    return InTime(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, padding_mode=mode))


def spiking(case, T):
    """IF, LIF, PLIF or DLIF, or one of the newest release's neurons."""
    built = {
        "PSN": {"T": T},
        "MaskedPSN": {
            "k": min(2, T),
            "T": T,
            "lambda_init": 1.0,
        },
        "SlidingPSN": {"k": 2},
        "KLIFNode": {},
        "CUBALIFNode": {},
        "ILIFNode": {},
    }
    there = [name for name in built if hasattr(neuron, name)]
    if hasattr(neuron, "PSN") and case.random() < 0.5:
        name = case.choice(there)
        options = built[name]
        return getattr(neuron, name)(**options)
    return random_node(case, False, T)


KINDS = (Attention, Gated, Connected, Function, normalised, padded, spiking)


def random_network(case, T):
    """A convolution, two to four random parts and a linear layer."""
    parts = [InTime(nn.Conv2d(2, CHANNELS, 3, padding=1))]
    parts.append(random_node(case, False, T))
    for _ in range(case.randint(2, 4)):
        kind = case.choice(KINDS)
        parts.append(kind(case, T))
        if case.random() < 0.1:
            parts.append(Threshold())
        if case.random() < 0.4:
            parts.append(padded(case, T))
            parts.append(spiking(case, T))
    parts.append(InTime(nn.AdaptiveAvgPool2d(2)))
    parts.append(layer.Flatten())
    parts.append(layer.Linear(4 * CHANNELS, 3))
    net = nn.Sequential(*parts)
    fill_batch_norms(net, least_variance=0.05)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.ConvTranspose2d):
            module.weight.data *= case.choice([1.0, 2.0, 4.0])
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    functional.set_step_mode(net, "m")
    return net


def check(seed: int, points: int) -> Counter:
    """Try so many inputs of a random network; AssertionError says what left its bounds."""
    case = random.Random(seed)
    torch.manual_seed(seed)
    T = case.choice(TIMES)
    model = SpikingClassifier(random_network(case, T), T).eval()
    eps = case.choice([0.0, 1e-6, 1e-3, 0.01, 0.05])
    x = torch.rand(IMAGES, 2, SIDE, SIDE)
    with torch.no_grad():
        y = model(x).argmax(1)
    total = Counter(inputs=0, networks=1, verified=0, functions=0)
    try:
        method = case.choice(["ibp", "ibp", "joint"])
        result = verify(model, x, y, eps, method=method)
        margin = torch.tensor(result.margin)
        total["verified"] = int((margin > 0).sum())
        run = WatchedRun(bounded_neurons(model), IMAGES)
        with sums_of_products(x.device):
            logits = bounded_logits(model, run, x, eps)
            for z in points_of_the_ball(model, x, eps, max(1, points // IMAGES)):
                found = check_point(model, run, logits, z)
                lead = leads(found, y)
                assert (lead >= margin).all(), "a margin"
                total["inputs"] += IMAGES
                total["functions"] += len(run.functions)
    except UnsoundBoundsError as error:
        raise AssertionError(error) from error
    return total


def points_of_the_ball(model, x, eps, count):
    """Random points and corners in turn, one in sixteen moved along the gradient."""
    low, high = linf_bounds(x, eps=eps)
    for number in range(count):
        share = torch.rand_like(x)
        if number % 2:
            share = share.round()
        z = low + (high - low) * share
        if number % 16 == 2 and eps:
            z = z + 2 * eps * uphill(model, z)
        yield torch.clamp(z, low, high)


def uphill(model: nn.Module, z: torch.Tensor) -> torch.Tensor:
    """Sign of the gradient of a random sum of logits, if one reaches the images."""
    z = z.clone().requires_grad_()
    logits = model(z)
    total = (logits * torch.randn_like(logits)).sum()
    if not total.requires_grad:
        return torch.zeros_like(z)
    gradient = torch.autograd.grad(total, z, allow_unused=True)[0]
    return torch.zeros_like(z) if gradient is None else gradient.sign()


def leads(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What the logit of each label is above all others, [N]."""
    logits = logits.double()
    right = F.one_hot(y, logits.shape[1]).bool()
    rival = logits.masked_fill(right, -torch.inf).amax(1)
    return logits[right] - rival


if __name__ == "__main__":
    main(check, __doc__)
