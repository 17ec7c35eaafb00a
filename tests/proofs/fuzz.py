"""Looks for an input that leaves the bounds of verify, on random networks; run by hand.

``python -m proofs.fuzz --inputs 1000000``, in tests/, tries so many perturbed inputs: random ones,
ends of the ball and steps along the gradient of a logit or of a spike of one neuron; with ``--norm
L0`` or ``moves`` changed or moved events. It stops at the first current, spike, sum over time of
spikes, potential, result of a function, logit or margin outside its bounds, with the seed that
makes the network again.
"""

import argparse
import random
import sys
import time
from collections import Counter
from functools import partial
from importlib.metadata import version

import torch
from proofs.functions import Function
from proofs.watched import WatchedJointRun, WatchedRun, check_point
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.classifier import SpikingEventClassifier
from sj_robust.core.preserved import sums_of_products
from sj_robust.core.threat import ThreatModel, linf_bounds
from sj_robust.neuron import fuse
from sj_robust.ops import available_backends
from sj_robust.proofs import verify
from sj_robust.proofs.bounds import bounded_logits, bounded_neurons
from sj_robust.proofs.changes import Flips
from sj_robust.proofs.joint import OverTime
from sj_robust.proofs.maps import Maps
from sj_robust.proofs.moves import MovedEvents

METHODS = ["joint"] * 14 + ["ibp"] * 4 + ["mip"] * 2
IMAGES = 2
COPIES = 16
"""Inputs of each image that run together."""
STEPS = (4, 1, 2, 6, 4, 11)
RELEASE = version("spikingjelly")
BACKENDS = [name for name, state in available_backends().items() if state == "available"]
if RELEASE >= "2":
    BACKENDS.append("spikingjelly")
FUNCTIONS = ("relu", "sigmoid", "silu", "gelu", "abs", "softplus", "clamp", "square as a product")


def random_node(case: random.Random, grid: bool, T: int) -> nn.Module:
    """IF, LIF, PLIF or DLIF with either reset, any threshold and gains of both signs."""
    given = {
        "v_reset": case.choice([0.0, None, -0.5, 0.2]),
        "v_threshold": case.choice([0.1, 0.3, 0.5, 0.7, 1.0]),
    }
    tau = 2.0 if grid else case.uniform(1.1, 20.0)
    kind = case.choice(["IF", "LIF", "PLIF", "DLIF"])
    if kind == "IF":
        return neuron.IFNode(**given)
    if kind == "DLIF":
        node = DLIFNode(T=T, tau=tau, backend=case.choice(BACKENDS), **given)
        digits = 1 if grid else 9
        gains = [round(case.gauss(0.7, 1.2), digits) for _ in range(T)]
        node.input_gain.data = torch.tensor(gains)
        return node
    given["decay_input"] = case.random() < 0.5
    if kind == "LIF":
        return neuron.LIFNode(tau, **given)
    return neuron.ParametricLIFNode(tau, **given)


class Residual(nn.Module):
    def __init__(self, *inside: nn.Module) -> None:
        super().__init__()
        self.inside = nn.Sequential(*inside)

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x) + x


class Attention(nn.Module):
    """Of spikes, with or without a softmax."""

    def __init__(self, case: random.Random, grid: bool, channels: int, T: int) -> None:
        super().__init__()
        maps = [layer.Conv2d(channels, channels, 1) for _ in range(3)]
        self.parts = nn.ModuleList(nn.Sequential(one, random_node(case, grid, T)) for one in maps)
        self.softmax = case.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).flatten(-2) for part in self.parts)
        weights = q @ k.transpose(-1, -2) * 0.25
        if self.softmax:
            weights = torch.softmax(weights, -1)
        return x + (weights @ v).view(x.shape)


POOLING = [
    None,
    None,
    partial(layer.AvgPool2d, 2, ceil_mode=True),
    partial(layer.MaxPool2d, 2, ceil_mode=True),
    partial(layer.MaxPool2d, 3, stride=2, padding=1),
    partial(layer.AdaptiveAvgPool2d, 2),
]


def convolutions(case: random.Random, grid: bool, T: int, functions: bool) -> list[nn.Module]:
    """One to three convolutions with what may stand around them."""
    parts: list[nn.Module] = []
    channels = 2

    def normalised(channels: int) -> list[nn.Module]:
        if grid or case.random() < 0.5:
            return []
        return [layer.BatchNorm2d(channels)]

    def residual(channels: int) -> nn.Module:
        groups = case.choice([1, channels])
        convolution = layer.Conv2d(channels, channels, 3, padding=1, groups=groups)
        nodes = [random_node(case, grid, T)] if case.random() < 0.7 else []
        return Residual(convolution, *normalised(channels), *nodes)

    def function(channels: int) -> nn.Module:
        kind = case.choice(["attention", "norm", *FUNCTIONS])
        if kind == "attention":
            return Attention(case, grid, channels, T)
        return layer.GroupNorm(2, channels) if kind == "norm" else Function(kind)

    for _ in range(case.randint(1, 3)):
        if parts and case.random() < 0.4:
            parts.append(residual(channels))
        else:
            wide = case.choice([2, 4, 6])
            size = case.choice([1, 3, 5])
            convolution = layer.Conv2d(
                channels,
                wide,
                size,
                stride=case.choice([1, 2]),
                padding=size // 2,
                groups=case.choice([1, 2]),
                bias=case.random() < 0.7,
            )
            parts += [convolution, *normalised(wide), random_node(case, grid, T)]
            channels = wide
        if functions and case.random() < 0.5:
            parts.append(function(channels))
        pool = case.choice(POOLING)
        if pool is not None:
            parts.append(pool())
    return [*parts, layer.AdaptiveAvgPool2d(2), layer.Flatten(), layer.Linear(4 * channels, 3)]


def random_classifier(
    case: random.Random, grid: bool, T: int, *, functions: bool = False, events: bool = False
) -> SpikingClassifier:
    """A network in evaluation mode that fires. On the grid potentials meet thresholds but for
    rounding.
    """
    if case.random() < (0.4 if events else 0.1):
        nodes = [random_node(case, grid, T) for _ in range(2)]
        sizes = [layer.Linear(72, 5), layer.Linear(5, 4), layer.Linear(4, 3)]
        parts = [layer.Flatten(), sizes[0], nodes[0], sizes[1], nodes[1], sizes[2]]
    else:
        parts = convolutions(case, grid, T, functions)
    if case.random() < 0.3:
        parts.append(random_node(case, grid, T))
    net = nn.Sequential(*parts)
    fill_batch_norms(net, least_variance=0.05)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            for value in module.parameters():
                value.data *= 3
                if grid:
                    value.data = value.data.mul(10).round() / 10
    functional.set_step_mode(net, case.choice("ms"))
    if case.random() < 0.3:
        net.fused = fuse(net).stages
    if events or case.random() < 0.3:
        return SpikingEventClassifier(net, T).eval()
    statistics = {} if grid else {"mean": [0.5, 0.4], "std": [0.3, 0.2]}
    return SpikingClassifier(net, T, **statistics).eval()


def fill_batch_norms(net: nn.Module, *, least_variance: float) -> None:
    """Random statistics and weights, as if a batch norm had seen data and learned."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(least_variance, 2.0)
            module.weight.data.normal_(1.0, 0.5)
            module.bias.data.normal_()


def random_images(case: random.Random, model: SpikingClassifier, grid: bool) -> Tensor:
    """Images or frames of events, on a grid where the network is on one."""
    events = isinstance(model, SpikingEventClassifier)
    levels = 1 if events else case.choice([1, 2, 10])
    x = torch.rand(IMAGES, *[model.T] * events, 2, 6, 6)
    return x.mul(levels).round() / levels if events or grid else x


def random_ball(case: random.Random, norm: str, x: Tensor, grid: bool) -> tuple:
    """A threat and its ball."""
    if norm == "Linf":
        some = 10 ** case.uniform(-3.5, -1)
        eps = case.choice([0.0, 1e-7, some, 0.0 if grid else some])
        return ThreatModel("Linf", eps), eps
    budget = case.choice([1, 1, 2, 3, 5, 10])
    counts = bool((x > 1).any())
    if norm == "L0":
        return ThreatModel("L0", budget, counts=counts), Flips(budget, counts)
    T = x.shape[1]
    shift = case.choice([None, min(1, T - 1) or None, min(2, T - 1) or None])
    threat = ThreatModel("moves", budget, shift, counts=counts)
    return threat, MovedEvents.of(x, budget, shift, counts=counts)


def uphill(case: random.Random, model: SpikingClassifier, z: Tensor) -> Tensor:
    """The gradient of a value of its own for every input: a logit or a spike, which is to rise or
    to fall.
    """
    outputs = []
    hooks = []
    for module in model.modules():
        if isinstance(module, neuron.BaseNode):
            # in evaluation mode the older release has no gradient
            keep = partial(kept, outputs, by_step=module.train().step_mode == "m")
            hooks.append(module.register_forward_hook(keep))
    z = z.clone().requires_grad_()
    outputs.append(model(z))
    for hook in hooks:
        hook.remove()
    model.eval()
    values = case.choice(outputs).flatten(1)
    places = torch.randint(values.shape[1], (len(z), 1))
    total = (values.gather(1, places).squeeze(1) * torch.randn(len(z))).sum()
    (gradient,) = torch.autograd.grad(total, z, allow_unused=True)
    return torch.randn_like(z) if gradient is None else gradient + 1e-9 * torch.randn_like(z)


def kept(outputs: list, module: nn.Module, args: tuple, out: Tensor, *, by_step: bool) -> None:
    outputs.append(out.movedim(0, 1) if by_step else out)


def lowest(ball, x: Tensor, weights: Tensor) -> Tensor:
    """The ends of balls whose sums with weights are least."""
    if isinstance(ball, float):
        low, high = linf_bounds(x, eps=ball)
        return torch.where(weights > 0, low, high)
    return ball.lowest(x, weights).to(x.dtype)


def moved(case: random.Random, model: SpikingClassifier, ball, x: Tensor) -> Tensor:
    """One input of the ball for each: drawn, one of its ends, changed around one place, or along a
    gradient.
    """
    way = case.choice(["drawn", "end", "place", "uphill"])
    noise = torch.randn_like(x)
    if way == "uphill":
        return lowest(ball, x, uphill(case, model, x))
    if way == "drawn" and isinstance(ball, float):
        low, high = linf_bounds(x, eps=ball)
        return (low + (high - low) * torch.rand_like(x)).clamp(low, high)
    if way == "place":
        row, column = (torch.arange(6) - case.randrange(6) for _ in range(2))
        noise = noise / (1 + row.abs().view(-1, 1) + column.abs())
    return lowest(ball, x, noise)


def check(seed: int, points: int, norm: str = "Linf") -> Counter:
    """Try so many inputs of a random network; AssertionError says what left its bounds."""
    case = random.Random(seed)
    torch.manual_seed(seed)
    grid = case.random() < 0.4
    T = STEPS[seed % len(STEPS)]
    functions = norm == "Linf" and case.random() < 0.3
    model = random_classifier(case, grid, T, functions=functions, events=norm != "Linf")
    x = random_images(case, model, grid)
    if norm != "Linf":
        x *= torch.rand(x.shape) < case.choice([0.2, 0.6, 1.0])
        x *= torch.randint(1, case.choice([2, 2, 4]), x.shape)
    threat, ball = random_ball(case, norm, x, grid)
    y = model(x).argmax(1)
    method = case.choice(METHODS[:-2] if functions or norm != "Linf" else METHODS)
    result = verify(model, x, y, threat, method=method, time_limit=1.0)
    margin = torch.tensor(result.margin, dtype=torch.float64).repeat(COPIES)
    x, y = x.repeat(COPIES, *[1] * (x.ndim - 1)), y.repeat(COPIES)
    neurons = bounded_neurons(model)
    total = Counter(inputs=0, networks=1, verified=sum(result.verified))
    with sums_of_products(x.device):
        maps = Maps(model, neurons, x[0])
        wide = WatchedRun(neurons, len(x))
        wider = bounded_logits(model, wide, x, ball)
        run = WatchedJointRun(neurons, len(x), over_time=OverTime(maps, model.T))
        logits = bounded_logits(model, run, x, ball)
        assert (run.lead(logits, y) <= wide.lead(wider, y)).all(), "a looser margin"
        for name, one in run.layers.items():
            found, before = torch.tensor([one.undecided, wide.layers[name].undecided])
            assert (found <= before).all(), f"looser bounds of {name}"
        while total["inputs"] < points:
            z = moved(case, model, ball, x)
            onednn = case.random() < 0.5
            with torch.backends.mkldnn.flags(onednn, allow_tf32=None):
                check_point(model, wide, wider, z)
                lead = leads(check_point(model, run, logits, z), y)
                total["inputs"] += len(z)
                if hasattr(model.net, "fused"):  # its parts ran apart while watched
                    with torch.no_grad():
                        lead = torch.minimum(lead, leads(model(z), y))
            assert (lead >= margin).all(), "a margin"
    return total


def leads(logits: Tensor, y: Tensor) -> Tensor:
    """What the logit of each label is above all others, [N], in float64."""
    label = y.unsqueeze(1)
    rival = logits.double().scatter(1, label, -torch.inf).amax(1)
    return logits.double().gather(1, label).squeeze(1) - rival


def main() -> None:
    """Check networks in turn until enough inputs are tried."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=1_000_000, help="inputs to try (1000000)")
    parser.add_argument("--points", type=int, default=8000, help="inputs per network (8000)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (0)")
    parser.add_argument("--norm", default="Linf", help="Linf, L0 or moves (Linf)")
    options = parser.parse_args()
    totals = Counter()
    seed = options.seed
    began = time.monotonic()
    while totals["inputs"] < options.inputs:
        try:
            totals += check(seed, options.points, options.norm)
        except AssertionError as error:
            sys.exit(f"--seed {seed}: {error}")
        seed += 1
        counts = ", ".join(f"{count} {name}" for name, count in totals.items())
        print(f"{counts}; seed {seed}, {time.monotonic() - began:.0f} s", flush=True)
    print(f"SpikingJelly {RELEASE}: nothing left its bounds")


if __name__ == "__main__":
    main()
