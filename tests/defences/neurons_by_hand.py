"""The neurons of the defences as plain loops: one equation a line, gradients by autograd."""

import torch

T = 4


def numbers(*shape, low=0.0, high=1.0, seed=0):
    """Uniform numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(shape, generator=generator, dtype=torch.float64)
    return low + (high - low) * drawn


def normals(shape, generator):
    """Normal numbers in float64."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def spike_of(z):
    """1 where z >= 0, with the triangle of width 1 as derivative."""
    value = z.detach()
    distance = value.abs()
    slope = (1 - distance).clamp(min=0)
    step = (value >= 0).to(z.dtype)
    nothing = z - value
    return step + nothing * slope


class Rules:
    """What all of them share: threshold, reset, and whether it has a gradient."""

    def __init__(self, v_reset=0.0, detach_reset=False):
        self.v_reset = v_reset
        self.detach_reset = detach_reset

    def start(self, x_seq):
        return torch.full_like(x_seq[0], self.v_reset or 0.0)

    def leaked(self, v, decay):
        """A potential after the leak, which leads to the reset potential."""
        rest = self.v_reset or 0.0
        return rest + decay * (v - rest)

    def after(self, h, s, threshold):
        if self.detach_reset:
            s = s.detach()
        if self.v_reset is None:
            return h - s * threshold
        above = h - self.v_reset
        return h - s * above


def noisy(x_seq, rules, *, tau, noise_seq):
    v = rules.start(x_seq)
    spikes = []
    potentials = []
    for x, noise in zip(x_seq, noise_seq, strict=True):
        h = rules.leaked(v, 1 - 1 / tau) + x
        s = spike_of(h + noise - 1.0)
        v = rules.after(h, s, 1.0)
        spikes.append(s)
        potentials.append(v)
    return torch.stack(spikes), torch.stack(potentials)


def evolving(x_seq, rules, *, leak):
    v = rules.start(x_seq)
    spikes = []
    potentials = []
    for x, share in zip(x_seq, leak, strict=True):
        h = share * v + x
        s = spike_of(h - 1.0)
        v = rules.after(h, s, 1.0)
        spikes.append(s)
        potentials.append(v)
    return torch.stack(spikes), torch.stack(potentials)


def homeostatic(x_seq, rules, *, tau, rate, signature):
    v = rules.start(x_seq)
    threshold = torch.ones_like(v)
    spikes = []
    potentials = []
    for x, usual in zip(x_seq, signature, strict=True):
        h = rules.leaked(v, 1 - 1 / tau) + x
        threshold = threshold + rate * (h - usual)
        s = spike_of(h - threshold)
        v = rules.after(h, s, threshold)
        spikes.append(s)
        potentials.append(v)
    return torch.stack(spikes), torch.stack(potentials)
