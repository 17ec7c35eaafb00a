"""One training step from the formulas alone, in float64: torch's autograd, nothing of the
package.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

T = 3
TAU = 4.0
DECAY = 1 - 1 / TAU
# Spiking layers of the network below with their shapes.
NEURONS = {
    "2": (4, 6, 6),
    "6": (5, 3, 3),
    "9": (210,),
}


class Triangle(torch.autograd.Function):
    """Heaviside step with the derivative max(0, 1 - |z| / width) / width."""

    @staticmethod
    def forward(ctx, z, width=1.0):
        ctx.save_for_backward(z)
        ctx.width = width
        return (z >= 0).double()

    @staticmethod
    def backward(ctx, grad):
        (z,) = ctx.saved_tensors
        slope = torch.relu(1 - z.abs() / ctx.width) / ctx.width
        return grad * slope, None


def fire(h, width=1.0):
    return Triangle.apply(h - 1, width)


def potentials(x_seq, *, decay, gain, v_reset=0.0, detach=False, noise=(0.0,) * T):
    """Potentials before the reset and spikes, [T, N, *], with the graph; ``gain`` and ``noise``,
    which decides spikes alone, have one entry per step.
    """
    rest = v_reset or 0.0
    v = rest
    h_seq = []
    spike_seq = []
    for t in range(T):
        leak = (1 - decay) * rest
        h = decay * v + gain[t] * x_seq[t] + leak
        spike = fire(h + noise[t])
        h_seq.append(h)
        spike_seq.append(spike)
        reset = spike.detach() if detach else spike
        v = h - reset
        if v_reset is not None:
            v = (1 - reset) * h + reset * v_reset
    return torch.stack(h_seq), torch.stack(spike_seq)


@dataclass
class Seen:
    """One spiking layer in one pass: currents, spikes, potentials before the reset, [T, N, *], and
    the gain of every step.
    """

    x_seq: torch.Tensor
    spike_seq: torch.Tensor
    h_seq: torch.Tensor
    gain: torch.Tensor


@dataclass
class Ends:
    """Lower and upper bounds of every value."""

    low: torch.Tensor
    high: torch.Tensor

    def map(self, function):
        """Each end through a function."""
        return Ends(function(self.low), function(self.high))

    def in_order(self, factor):
        """Exchanged where they were multiplied by a factor below 0; where both are equal, each
        still has the gradient of its own.
        """
        swapped = factor < 0
        low = torch.where(swapped, self.high, self.low)
        high = torch.where(swapped, self.low, self.high)
        return Ends(low, high)

    @property
    def middle(self):
        return (self.low + self.high) / 2

    @property
    def radius(self):
        return (self.high - self.low) / 2


def conv(x_seq, weight):
    return torch.stack([F.conv2d(x, weight, padding=1) for x in x_seq])


def pool(x_seq):
    return torch.stack([F.avg_pool2d(x, 2) for x in x_seq])


def linear(x_seq, weight):
    return x_seq @ weight.T


def repeated(x):
    return torch.stack([x] * T)


def per_channel(values):
    return values[:, None, None]


class Network:
    """Convolution - norm - neuron - pooling - convolution - norm - neuron - linear - neuron -
    linear from a state dict.

    ``w`` holds a tensor per name; neurons are DLIF where ``w`` has their gains, else LIF with input
    gain 1/tau.
    """

    def __init__(self, state):
        self.w = {name: value.detach().clone() for name, value in state.items()}
        self.margin = float("inf")
        self.width = 1.0
        self.statistics = {}

    def parameters(self):
        names = [name for name in self.w if "running" not in name and "tracked" not in name]
        return {name: self.w[name] for name in names}

    def run(self, x, *, training):
        """Logits [N, classes], and what was seen of every spiking layer."""
        seen = {}
        frame = conv([x], self.w["0.weight"])
        out = frame.expand(T, -1, -1, -1, -1)
        out = self.norm("1", out, training)
        out = self.neuron("2", out, seen)
        out = conv(pool(out), self.w["4.weight"])
        out = out + per_channel(self.w["4.bias"])
        out = self.norm("5", out, training)
        out = self.neuron("6", out, seen)
        out = linear(out.flatten(2), self.w["8.weight"])
        out = out + self.w["8.bias"]
        out = self.neuron("9", out, seen)
        out = linear(out, self.w["10.weight"])
        out = out + self.w["10.bias"]
        return out.mean(0), seen

    def norm(self, name, x_seq, training):
        weight = self.w[f"{name}.weight"]
        bias = self.w[f"{name}.bias"]
        mean = self.w[f"{name}.running_mean"]
        var = self.w[f"{name}.running_var"]
        if training:
            mean, var = self.batch_statistics(name, x_seq)
        scale = weight / (var + 1e-5).sqrt()
        centred = x_seq - per_channel(mean)
        return centred * per_channel(scale) + per_channel(bias)

    def batch_statistics(self, name, x_seq):
        """Mean and variance of a batch, which move the running ones."""
        dims = (0, 1, 3, 4)
        count = x_seq[:, :, 0].numel()
        mean = x_seq.sum(dims) / count
        squared = (x_seq - per_channel(mean)).square()
        var = squared.sum(dims) / count
        self.statistics.setdefault(name, (mean, var))  # of the clean images, which come first
        with torch.no_grad():
            unbiased = var * count / (count - 1)
            self.move(f"{name}.running_mean", mean)
            self.move(f"{name}.running_var", unbiased)
            self.w[f"{name}.num_batches_tracked"] = self.w[f"{name}.num_batches_tracked"] + 1
        return mean, var

    def move(self, name, value):
        self.w[name] = 0.9 * self.w[name] + 0.1 * value

    def neuron(self, name, x_seq, seen):
        gain = self.gain_of(name)
        h_seq, spike_seq = potentials(x_seq, decay=DECAY, gain=gain)
        seen[name] = Seen(
            x_seq=x_seq,
            spike_seq=spike_seq,
            h_seq=h_seq,
            gain=gain,
        )
        self.note_margin(h_seq)
        return spike_seq

    def gain_of(self, name):
        constant = torch.full((T,), 1 / TAU).double()
        return self.w.get(f"{name}.input_gain", constant)

    def note_margin(self, h):
        """How near to the threshold any potential came."""
        nearest = (h - 1).abs().min()
        self.margin = min(self.margin, float(nearest.detach()))

    def lead(self, x, y, eps):
        """Upper bounds of every class's lead over the right one, with the batch statistics of the
        clean images.
        """
        low = (x - eps).clamp(0, 1)
        high = (x + eps).clamp(0, 1)
        ends = Ends(low, high).map(repeated)
        ends = self.affine(ends, conv, "0")
        ends = self.norm_bounds("1", ends)
        ends = self.neuron_bounds("2", ends)
        ends = self.affine(ends.map(pool), conv, "4")
        ends = self.norm_bounds("5", ends)
        ends = self.neuron_bounds("6", ends)
        ends = ends.map(lambda value: value.flatten(2))
        ends = self.affine(ends, linear, "8")
        ends = self.neuron_bounds("9", ends)
        weight = self.w["10.weight"]
        bias = self.w["10.bias"]
        over = weight[None] - weight[y][:, None]  # [N, classes, features]
        middle = ends.middle.mean(0)[..., None]
        radius = ends.radius.mean(0)[..., None]
        lead = (over @ middle + over.abs() @ radius)[..., 0]
        return lead + bias - bias[y][:, None]

    def affine(self, ends, function, name):
        """Through a convolution or linear layer."""
        weight = self.w[f"{name}.weight"]
        middle = function(ends.middle, weight)
        radius = function(ends.radius, weight.abs())
        bias = self.w.get(f"{name}.bias")
        if bias is not None:
            middle = middle + (per_channel(bias) if function is conv else bias)
        return Ends(middle - radius, middle + radius)

    def norm_bounds(self, name, ends):
        mean, var = self.statistics[name]
        scale = per_channel(self.w[f"{name}.weight"] / (var + 1e-5).sqrt())
        shift = per_channel(self.w[f"{name}.bias"]) - per_channel(mean) * scale
        moved = ends.map(lambda value: value * scale + shift)
        return moved.in_order(scale)

    def neuron_bounds(self, name, ends):
        """Hard reset to 0, which passes no gradient on."""
        gain = self.gain_of(name)
        low = torch.zeros_like(ends.low[0])
        high = low
        sure_seq = []
        possible_seq = []
        for t in range(T):
            currents = Ends(gain[t] * ends.low[t], gain[t] * ends.high[t]).in_order(gain[t])
            h_low = DECAY * low + currents.low
            h_high = DECAY * high + currents.high
            self.note_margin(h_low)
            self.note_margin(h_high)
            sure_seq.append(fire(h_low, self.width))
            possible_seq.append(fire(h_high, self.width))
            sure = h_low >= 1
            undecided = (h_high >= 1) & ~sure
            low = torch.where(undecided, h_low.clamp(max=0), h_low)
            high = torch.where(undecided, h_high.clamp(0, 1), h_high)
            low = low.masked_fill(sure, 0)
            high = high.masked_fill(sure, 0)
        return Ends(torch.stack(sure_seq), torch.stack(possible_seq))


def softmax(logits):
    weights = logits.exp()
    return weights / weights.sum(1, keepdim=True)


def cross_entropy(logits, y):
    rows = torch.arange(len(y))
    normaliser = logits.exp().sum(1).log()
    losses = normaliser - logits[rows, y]
    return losses.mean()


def divergence(logits, logits_perturbed):
    p = softmax(logits)
    q = softmax(logits_perturbed)
    terms = p * (p / q).log()
    return terms.sum(1).mean()


def perturbed_images(mode, network, x, y, noise, *, eps, noise_std):
    """The images of every mode; ``noise`` is normal, and uniform in [0, 1) for pgd_at."""
    if mode == "none":
        return None
    if mode == "gaussian":
        return x + eps * noise
    start = x + noise_std * noise
    if mode in ("at", "rat", "certified"):
        step = eps
        steps = 1
    elif mode == "pgd_at":
        uniform = 2 * noise - 1
        start = (x + eps * uniform).clamp(0, 1)
        step = eps / 4
        steps = 7
    else:
        step = eps / 4
        steps = 10
    clean, _ = network.run(x, training=False)
    at = start
    for _ in range(steps):
        at = at.detach().requires_grad_()
        logits, _ = network.run(at, training=False)
        goal = cross_entropy(logits, y)
        if mode == "trades":
            goal = divergence(clean.detach(), logits)
        (grad,) = torch.autograd.grad(goal, at)
        smallest = grad.abs()[grad != 0].min()
        assert smallest > 1e-12  # a sign that rounding could turn would compare nothing
        at = at.detach() + step * grad.sign()
        at = torch.maximum(at, x - eps)
        at = torch.minimum(at, x + eps)
        at = at.clamp(0, 1)
    return at


def perturbation(indicator, norm, clean, perturbed, *, input_gain):
    """MS-MPPD of one layer, or a distance of its spikes, with the clean run as a constant."""
    if indicator == "mppd":
        difference = simplified(clean, perturbed, input_gain)
    else:
        difference = clean.spike_seq.detach() - perturbed.spike_seq
        if indicator == "tasad":
            difference = difference.sum(0) / T
    if norm == "l2":
        return (difference**2).mean()
    return difference.abs().mean()


def simplified(clean, perturbed, input_gain):
    """The perturbation without reset; a fixed gain always counts."""
    fixed = len(clean.gain.unique()) == 1
    eps = 0.0
    eps_seq = []
    for t in range(T):
        gain = clean.gain[t] if input_gain or fixed else 1.0
        dx = clean.x_seq[t].detach() - perturbed.x_seq[t]
        eps = DECAY * eps + gain * dx
        eps_seq.append(eps)
    return torch.stack(eps_seq)


def guarded(seen, margin):
    distance = (seen.h_seq - 1).abs()
    return (margin - distance).clamp(min=0).mean()


class Sparsity:
    """Finite difference along the sign of the gradient of exp(z_y) / (exp(z_y) + exp(z_m)), in a
    pass of its own; ``logits`` and ``seen`` are those of the first pass.
    """

    def __init__(self, network, x, y, *, h, squared):
        self.network = network
        self.x = x.detach()
        self.y = y
        self.h = h
        self.squared = squared
        images = x.detach().requires_grad_()
        self.logits, self.seen = network.run(images, training=True)
        self.rows = torch.arange(len(y))
        others = self.logits.detach().clone()
        others[self.rows, y] = -torch.inf
        self.m = others.argmax(1)
        self.before = self.probability(self.logits)
        (grad,) = torch.autograd.grad(self.before.sum(), images, retain_graph=True)
        self.direction = grad.sign()

    def probability(self, logits):
        right = logits[self.rows, self.y].exp()
        wrong = logits[self.rows, self.m].exp()
        return right / (right + wrong)

    def penalty(self):
        moved = self.x + self.h * self.direction
        logits, _ = self.network.run(moved, training=True)
        slope = (self.probability(logits) - self.before) / self.h
        if self.squared:
            return (slope**2).mean()
        return slope.abs().mean()


def retracted(weight, beta, rows=None):
    """(1 + beta) W - beta W W^T W on the chosen rows of the matrix [out, everything else]."""
    matrix = weight.reshape(len(weight), -1).clone()
    if rows is None:
        rows = torch.arange(len(matrix))
    part = matrix[rows]
    cubed = part @ part.T @ part
    matrix[rows] = (1 + beta) * part - beta * cubed
    return matrix.reshape(weight.shape)
