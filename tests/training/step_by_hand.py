"""One training step from the formulas alone, in float64: torch's autograd, nothing of the
package.
"""

import torch
import torch.nn.functional as F

T, TAU = 3, 4.0
DECAY = 1 - 1 / TAU
NEURONS = {
    "2": (4, 6, 6),
    "6": (5, 3, 3),
    "9": (210,),
}  # spiking layers of the network below with their shapes


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
        return grad * torch.relu(1 - z.abs() / ctx.width) / ctx.width, None


def potentials(x_seq, *, decay, gain, v_reset=0.0, detach=False):
    """Potentials before the reset and spikes, [T, N, *], with the graph; ``gain`` holds one number
    per step.
    """
    v, hs, spikes = v_reset or 0.0, [], []
    for t in range(T):
        hs.append(
            decay * v + gain[t] * x_seq[t] + (0.0 if v_reset is None else (1 - decay) * v_reset)
        )
        spikes.append(Triangle.apply(hs[-1] - 1))
        reset = spikes[-1].detach() if detach else spikes[-1]
        v = hs[-1] - reset if v_reset is None else (1 - reset) * hs[-1] + reset * v_reset
    return torch.stack(hs), torch.stack(spikes)


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
        return {n: v for n, v in self.w.items() if "running" not in n and "tracked" not in n}

    def run(self, x, *, training):
        """Logits [N, classes], and per spiking layer currents, spikes and potentials before the
        reset, [T, N, *].
        """
        seen = {}
        frames = torch.stack([F.conv2d(x, self.w["0.weight"], padding=1)] * T)
        out = self.neuron("2", self.norm("1", frames, training), seen)
        out = torch.stack([F.avg_pool2d(frame, 2) for frame in out])
        out = torch.stack(
            [F.conv2d(frame, self.w["4.weight"], self.w["4.bias"], padding=1) for frame in out]
        )
        out = self.neuron("6", self.norm("5", out, training), seen)
        out = out.flatten(2) @ self.w["8.weight"].T + self.w["8.bias"]
        out = self.neuron("9", out, seen)
        return (out @ self.w["10.weight"].T + self.w["10.bias"]).mean(0), seen

    def norm(self, name, x_seq, training):
        w = {
            part: self.w[f"{name}.{part}"]
            for part in ("weight", "bias", "running_mean", "running_var")
        }
        mean, var = w["running_mean"], w["running_var"]
        if training:
            dims, count = (0, 1, 3, 4), x_seq[:, :, 0].numel()
            mean = x_seq.sum(dims) / count
            var = (x_seq - mean[:, None, None]).square().sum(dims) / count
            self.statistics.setdefault(name, (mean, var))  # of the clean images, which come first
            with torch.no_grad():
                self.w[f"{name}.running_mean"] = 0.9 * w["running_mean"] + 0.1 * mean
                self.w[f"{name}.running_var"] = 0.9 * w["running_var"] + 0.1 * var * count / (
                    count - 1
                )
                self.w[f"{name}.num_batches_tracked"] = self.w[f"{name}.num_batches_tracked"] + 1
        scale = w["weight"] / (var + 1e-5).sqrt()
        return (x_seq - mean[:, None, None]) * scale[:, None, None] + w["bias"][:, None, None]

    def neuron(self, name, x_seq, seen):
        gain = self.w.get(f"{name}.input_gain", torch.full((T,), 1 / TAU, dtype=torch.float64))
        h, spikes = potentials(x_seq, decay=DECAY, gain=gain)
        seen[name] = {"x": x_seq, "s": spikes, "h": h, "gain": gain}
        self.margin = min(self.margin, float((h - 1).abs().min().detach()))
        return spikes

    def lead(self, x, y, eps):
        """Upper bounds of every class's lead over the right one, with the batch statistics of the
        clean images.
        """
        ends = [torch.stack([end] * T) for end in ((x - eps).clamp(0, 1), (x + eps).clamp(0, 1))]
        ends = self.affine(ends, lambda z, w: F.conv2d(z, w, padding=1), "0")
        ends = self.neuron_bounds("2", self.norm_bounds("1", ends))
        ends = [torch.stack([F.avg_pool2d(frame, 2) for frame in end]) for end in ends]
        ends = self.affine(ends, lambda z, w: F.conv2d(z, w, padding=1), "4")
        ends = self.neuron_bounds("6", self.norm_bounds("5", ends))
        ends = self.affine([end.flatten(2) for end in ends], lambda z, w: z @ w.T, "8")
        lower, upper = self.neuron_bounds("9", ends)
        weight, bias = self.w["10.weight"], self.w["10.bias"]
        over = weight[None] - weight[y][:, None]  # [N, classes, features]
        middle, radius = ((upper + lower) / 2).mean(0), ((upper - lower) / 2).mean(0)
        return (
            (over @ middle[..., None] + over.abs() @ radius[..., None])[..., 0]
            + bias
            - bias[y][:, None]
        )

    def affine(self, ends, function, name):
        """Through a convolution or linear layer, frame by frame."""
        weight, bias = self.w[f"{name}.weight"], self.w.get(f"{name}.bias")
        middle, radius = (ends[0] + ends[1]) / 2, (ends[1] - ends[0]) / 2
        middle = torch.stack([function(frame, weight) for frame in middle])
        radius = torch.stack([function(frame, weight.abs()) for frame in radius])
        if bias is not None:
            middle = middle + (bias[:, None, None] if weight.ndim == 4 else bias)
        return middle - radius, middle + radius

    def norm_bounds(self, name, ends):
        mean, var = self.statistics[name]
        scale = (self.w[f"{name}.weight"] / (var + 1e-5).sqrt())[:, None, None]
        shift = self.w[f"{name}.bias"][:, None, None] - mean[:, None, None] * scale
        return in_order([end * scale + shift for end in ends], scale)

    def neuron_bounds(self, name, ends):
        """Hard reset to 0, which passes no gradient on."""
        gain = self.w.get(f"{name}.input_gain", torch.full((T,), 1 / TAU, dtype=torch.float64))
        low = high = torch.zeros_like(ends[0][0])
        sure_seq, possible_seq = [], []
        for t in range(T):
            currents = in_order([gain[t] * ends[0][t], gain[t] * ends[1][t]], gain[t])
            h_low, h_high = DECAY * low + currents[0], DECAY * high + currents[1]
            sure_seq.append(Triangle.apply(h_low - 1, self.width))
            possible_seq.append(Triangle.apply(h_high - 1, self.width))
            self.margin = min(
                self.margin, *(float((h - 1).abs().min().detach()) for h in (h_low, h_high))
            )
            sure, undecided = h_low >= 1, (h_low < 1) & (h_high >= 1)
            zero = torch.zeros_like(h_low)
            low = torch.where(sure, zero, torch.where(undecided, h_low.clamp(max=0), h_low))
            high = torch.where(sure, zero, torch.where(undecided, h_high.clamp(0, 1), h_high))
        return torch.stack(sure_seq), torch.stack(possible_seq)


def in_order(ends, factor):
    """Ends of an interval that were multiplied by ``factor``; where both are equal, each still has
    the gradient of its own.
    """
    swapped = factor < 0
    return torch.where(swapped, ends[1], ends[0]), torch.where(swapped, ends[0], ends[1])


def cross_entropy(logits, y):
    return (logits.exp().sum(1).log() - logits[torch.arange(len(y)), y]).mean()


def divergence(logits, logits_perturbed):
    p, q = (z.exp() / z.exp().sum(1, keepdim=True) for z in (logits, logits_perturbed))
    return (p * (p / q).log()).sum(1).mean()


def perturbed_images(mode, network, x, y, noise, *, eps, noise_std):
    """The images of every mode; ``noise`` is normal, and uniform in [0, 1) for pgd_at."""
    if mode == "none":
        return None
    if mode == "gaussian":
        return x + eps * noise
    clean = network.run(x, training=False)[0].detach()
    if mode in ("at", "rat", "certified"):
        start, step, steps = x + noise_std * noise, eps, 1
    elif mode == "pgd_at":
        start, step, steps = (x + eps * (2 * noise - 1)).clamp(0, 1), eps / 4, 7
    else:
        start, step, steps = x + noise_std * noise, eps / 4, 10
    at = start
    for _ in range(steps):
        at = at.detach().requires_grad_()
        logits, _ = network.run(at, training=False)
        goal = divergence(clean, logits) if mode == "trades" else cross_entropy(logits, y)
        (grad,) = torch.autograd.grad(goal, at)
        assert (
            grad.abs()[grad != 0].min() > 1e-12
        )  # a sign that rounding could turn would compare nothing
        at = (at + step * grad.sign()).detach()
        at = torch.minimum(torch.maximum(at, x - eps), x + eps).clamp(0, 1)
    return at


def perturbation(indicator, norm, clean, perturbed, *, input_gain):
    """MS-MPPD of one layer, or a distance of its spikes, with the clean run as a constant."""
    if indicator == "mppd":
        eps, differences = 0.0, []
        for t in range(T):
            gain = clean["gain"][t] if input_gain or len(clean["gain"].unique()) == 1 else 1.0
            eps = DECAY * eps + gain * (clean["x"][t].detach() - perturbed["x"][t])
            differences.append(eps)
        difference = torch.stack(differences)
    else:
        difference = clean["s"].detach() - perturbed["s"]
        if indicator == "tasad":
            difference = difference.sum(0) / T
    return (difference**2).mean() if norm == "l2" else difference.abs().mean()


def guarded(seen, margin):
    return (margin - (seen["h"] - 1).abs()).clamp(min=0).mean()


def sparsity(network, x, y, *, h, squared):
    """Finite difference along the sign of the gradient of exp(z_y) / (exp(z_y) + exp(z_m)), in a
    pass of its own.
    """
    x = x.detach().requires_grad_()
    logits, seen = network.run(x, training=True)
    rows = torch.arange(len(y))
    others = logits.detach().clone()
    others[rows, y] = -torch.inf
    m = others.argmax(1)

    def probability(z):
        return z[rows, y].exp() / (z[rows, y].exp() + z[rows, m].exp())

    f = probability(logits)
    (grad,) = torch.autograd.grad(f.sum(), x, retain_graph=True)

    def penalty():
        slope = (probability(network.run(x.detach() + h * grad.sign(), training=True)[0]) - f) / h
        return (slope**2).mean() if squared else slope.abs().mean()

    return logits, seen, penalty


def retracted(weight, beta, rows=None):
    """(1 + beta) W - beta W W^T W on the chosen rows of the matrix [out, everything else]."""
    matrix = weight.reshape(len(weight), -1).clone()
    rows = torch.arange(len(matrix)) if rows is None else rows
    part = matrix[rows]
    matrix[rows] = (1 + beta) * part - beta * torch.einsum("ik,jk,jl->il", part, part, part)
    return matrix.reshape(weight.shape)
