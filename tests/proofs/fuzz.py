"""Looks for an input that leaves the bounds of verify, on random networks; run by hand.

``python tests/proofs/fuzz.py --inputs 1000000`` tries so many perturbed inputs: random ones,
corners of the ball and steps along the gradient of a logit or of a spike of one neuron. It stops at
the first spike, sum over time of spikes, potential, logit or margin outside its bounds, with the
seed that makes the network again.
"""

import argparse
import random
import sys
import time
from collections import Counter
from functools import partial
from importlib.metadata import version

import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.attacks import linf_bounds
from sj_robust.classifier import SpikingEventClassifier
from sj_robust.core.preserved import full_precision
from sj_robust.neuron import fuse
from sj_robust.ops import available_backends
from sj_robust.proofs import verify
from sj_robust.proofs.bounds import BoundedRun
from sj_robust.proofs.joint import JointRun, OverTime
from sj_robust.proofs.relaxation import Maps
from sj_robust.proofs.spiking import Float32Spiking, LayerBounds
from sj_robust.proofs.verification import bounded_logits, bounded_neurons
from sj_robust.proofs.windows import WindowedSpiking

METHODS = ["joint"] * 12 + ["ibp"] * 2 + ["crown"] * 4 + ["bab", "mip"]
IMAGES = 2
T = 4
STEPS = (4, 1, 2, 6, 4, 11)
EVERY = 8
"""Networks of which one has ReLU."""
RELEASE = version("spikingjelly")


def main(arguments: list[str] | None = None) -> None:
    """Networks in turn until enough inputs are tried."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--inputs", type=int, default=1_000_000, help="perturbed inputs to try (1000000)"
    )
    parser.add_argument("--points", type=int, default=8000, help="inputs per network (8000)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (0)")
    options = parser.parse_args(arguments)
    totals = Counter()
    seed = options.seed
    began = time.monotonic()
    while totals["inputs"] < options.inputs:
        try:
            totals += check(seed, options.points)
        except AssertionError as error:
            sys.exit(f"--seed {seed}: {error}")
        seed += 1
        counts = ", ".join(f"{count} {name}" for name, count in totals.items())
        print(f"{counts}; seed {seed}, {time.monotonic() - began:.0f} s", flush=True)
    print(f"SpikingJelly {RELEASE}: nothing left its bounds")


def random_node(case: random.Random, grid: bool, T: int, relu: bool = False) -> nn.Module:
    """IF, LIF, PLIF or DLIF with either reset, any threshold and gains of both signs; or ReLU."""
    if relu and case.random() < 0.7:
        return nn.ReLU()
    given = {
        "v_reset": case.choice([0.0, None, -0.5, 0.2]),
        "v_threshold": case.choice([0.1, 0.3, 0.5, 0.7, 1.0]),
    }
    tau = 2.0 if grid else case.uniform(1.1, 20.0)
    kind = case.choice(["IF", "LIF", "PLIF", "DLIF"])
    if kind == "IF":
        return neuron.IFNode(**given)
    if kind == "DLIF":
        backends = [name for name, state in available_backends().items() if state == "available"]
        backend = case.choice([*backends, *["spikingjelly"] * (RELEASE >= "2")])
        node = DLIFNode(T=T, tau=tau, backend=backend, **given)
        node.input_gain.data = torch.tensor(
            [round(case.gauss(0.7, 1.2), 1 if grid else 9) for _ in range(T)]
        )
        return node
    given["decay_input"] = case.random() < 0.5
    if kind == "LIF":
        return neuron.LIFNode(tau, **given)
    return neuron.ParametricLIFNode(tau, **given)


class Residual(nn.Module):
    def __init__(self, *inside: nn.Module) -> None:
        super().__init__()
        self.inside = nn.Sequential(*inside)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inside(x) + x


def random_network(case: random.Random, grid: bool, T: int, relu: bool) -> nn.Sequential:
    """One to three convolutions with what may stand around them, then linear layers."""
    parts: list[nn.Module] = []
    channels = 2
    for _ in range(case.randint(1, 3)):
        if parts and case.random() < 0.4:
            inside = [
                layer.Conv2d(channels, channels, 3, padding=1, groups=case.choice([1, channels]))
            ]
            inside += [layer.BatchNorm2d(channels)] * (not grid and case.random() < 0.5)
            inside += [random_node(case, grid, T, relu)] * (case.random() < 0.7)
            parts.append(Residual(*inside))
        else:
            wide = case.choice([2, 4, 6])
            size = case.choice([1, 3, 5])
            stride = case.choice([1, 2])
            options = {
                "padding": size // 2,
                "groups": case.choice([1, 2]),
                "bias": case.random() < 0.7,
            }
            parts.append(layer.Conv2d(channels, wide, size, stride, **options))
            parts += [layer.BatchNorm2d(wide)] * (not grid and case.random() < 0.5)
            parts.append(random_node(case, grid, T, relu))
            channels = wide
        pooling = [
            None,
            None,
            layer.AvgPool2d(2, ceil_mode=True),
            layer.MaxPool2d(2, ceil_mode=True),
        ]
        pooling += [layer.MaxPool2d(3, 2, 1), layer.AdaptiveAvgPool2d(2)]
        parts += [part for part in [case.choice(pooling)] if part is not None]
    parts += [
        layer.AdaptiveAvgPool2d(2),
        layer.Flatten(),
        layer.Linear(4 * channels, 3, bias=case.random() < 0.5),
    ]
    parts += [random_node(case, grid, T, relu)] * (case.random() < 0.3)
    return nn.Sequential(*parts)


def random_classifier(
    case: random.Random, grid: bool, T: int = T, relu: bool = False
) -> SpikingClassifier:
    """A network in evaluation mode that fires. On the grid potentials meet thresholds but for
    rounding. With ``relu`` it has one time step, and ReLU in the place of some neurons.
    """
    steps = 1 if relu else T
    net = random_network(case, grid, steps, relu)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.05, 2.0)
            module.weight.data.normal_(1.0, 0.5)
            module.bias.data.normal_()
        elif isinstance(module, nn.Conv2d | nn.Linear):
            for value in module.parameters():
                value.data *= 3
                value.data = value.data.mul(10).round() / 10 if grid else value.data
    functional.set_step_mode(net, case.choice("ms"))
    if case.random() < 0.3:
        net.fused = fuse(net).stages
    if case.random() < 0.3:
        return SpikingEventClassifier(net, steps).eval()
    statistics = {} if grid else {"mean": [0.5, 0.4], "std": [0.3, 0.2]}
    return SpikingClassifier(net, steps, **statistics).eval()


class Keeps(Float32Spiking):
    """A call of a layer that keeps the bounds of every step with the layer: of h, whether it fires
    and can, of v.
    """

    def step(self, v, x):
        after, spikes = super().step(v, x)
        kept(self.layer)[-1] += [after.low, after.high]
        return after, spikes

    def decided(self, h, error, gain):
        h, spikes = super().decided(h, error, gain)
        kept(self.layer).append([h.low, h.high, spikes.low.bool(), spikes.high.bool()])
        return h, spikes


class KeepsWindows(Keeps, WindowedSpiking):
    """The same of joint bounds."""


class Recorded(BoundedRun):
    """A run of intervals that keeps the bounds of every spiking layer and step."""

    def _spiking(self, neuron):
        return Keeps(neuron, self.layers[neuron.name])


class RecordedJoint(JointRun):
    """A run of joint bounds that keeps them."""

    windowed = KeepsWindows


def kept(layer: LayerBounds) -> list[list[torch.Tensor]]:
    """What a layer has kept, step by step."""
    return vars(layer).setdefault("kept", [])


def bounds_of(run: BoundedRun) -> dict[str, list[torch.Tensor]]:
    """By layer what its steps have kept, each part [T, N, *]."""
    return {
        name: [torch.stack(parts) for parts in zip(*kept(layer), strict=True)]
        for name, layer in run.layers.items()
    }


def check(seed: int, points: int) -> Counter:
    """Try so many inputs of a random network; AssertionError says what left its bounds."""
    case = random.Random(seed)
    torch.manual_seed(seed)
    grid = case.random() < 0.4
    relu = seed % EVERY == 0
    T = 1 if relu else STEPS[seed % len(STEPS)]
    model = random_classifier(case, grid, T, relu)
    method = case.choice(METHODS[:-1] if relu else METHODS)
    some = 10 ** case.uniform(-3.5, -1)
    eps = case.choice([0.0, 1e-7, some, 0.0 if grid else some])
    events = isinstance(model, SpikingEventClassifier)
    levels = 1 if events else case.choice([1, 2, 10])
    x = torch.rand(IMAGES, *[model.T] * events, 2, 6, 6)
    x = x.mul(levels).round() / levels if events or grid else x
    y = model(x).argmax(1)
    margin = verify(model, x, y, eps, method=method, time_limit=1.0).margin
    margin = torch.tensor(margin, dtype=torch.float64).view(-1, 1, 1)
    neurons = bounded_neurons(model)
    intervals = Recorded(neurons, IMAGES)
    with full_precision(x.device):
        maps = Maps(partial(bounded_logits, model), neurons, x[0])
        run = RecordedJoint(neurons, IMAGES, over_time=OverTime(maps, model.T))
        wider = bounded_logits(model, intervals, x, eps)
        logits = bounded_logits(model, run, x, eps)
        assert (run.lead(logits, y) <= intervals.lead(wider, y)).all(), "a looser margin"
    bounds = bounds_of(run)
    for name, parts in bounds_of(intervals).items():
        assert_within(bounds[name], parts, f"looser bounds of {name}")
    total = Counter(inputs=0, networks=1, verified=int((margin > 0).sum()), spikes=0)
    if eps == 0:
        total["spikes open at eps 0"] = sum(
            int((can & ~sure).sum()) for _, _, sure, can, _, _ in bounds.values()
        )
    count = max(1, points // (4 * IMAGES))
    ends = [end.repeat_interleave(count, 0) for end in linf_bounds(x, eps=eps)]
    share = torch.rand_like(ends[0])
    share[::2] = share[::2].round()  # corners
    z = (ends[0] + (ends[1] - ends[0]) * share).clamp(*ends)
    uphill = torch.zeros_like(z)
    for step, onednn in ((0.0, True), (2.0, True), (-2.0, False), (0.5, True)):
        climbs = step == 0.0
        z = (z.detach() + step * eps * uphill).clamp(*ends)
        for module in model.modules():
            if isinstance(module, neuron.BaseNode):
                module.train(
                    climbs
                )  # in evaluation mode the older release has no gradient, and code of its own
        with (
            torch.backends.nnpack.flags(False),
            torch.backends.mkldnn.flags(onednn, allow_tf32=None),
        ):
            with torch.set_grad_enabled(climbs):
                seen, found = run_of(model, z.requires_grad_(climbs))
            alone = (
                [model(z)] if hasattr(model.net, "fused") else []
            )  # while hooks look, its parts run apart
        for out in (found, *alone):
            rows = out.detach().double().unflatten(0, (IMAGES, count))
            assert (
                (rows >= logits.lower.unsqueeze(1)) & (rows <= logits.upper.unsqueeze(1))
            ).all(), "a logit"
            own = rows.gather(2, (right := y.view(-1, 1, 1).expand(-1, count, 1)))
            lead = rows.scatter(2, right, -torch.inf).amax(2, keepdim=True)
            assert (own - lead >= margin).all(), f"a margin of {method}"
        for name, (spikes, v) in seen.items():
            h_lower, h_upper, sure, can, v_lower, v_upper = (
                part.unsqueeze(2) for part in bounds[name]
            )
            fired, v = (
                part.detach().unflatten(1, (IMAGES, count)) for part in (spikes.bool(), v.double())
            )
            assert ((fired >= sure) & (fired <= can)).all(), f"a spike of {name}"
            assert ((v >= v_lower) & (v <= v_upper)).all(), f"a potential of {name}"
            assert (fired | ((v >= h_lower) & (v <= h_upper))).all(), (
                f"a charged potential of {name}"
            )
            assert_sums(run, name, fired.double(), case)
            total["spikes"] += fired.numel()
        total["inputs"] += len(z)
        if climbs:
            uphill = signed_gradient(
                case, z, [found, *(spikes.movedim(0, 1) for spikes, _ in seen.values())]
            )
    return total


def assert_within(parts: list, wider: list, what: str) -> None:
    """AssertionError unless bounds, as :func:`bounds_of` gives them, are nowhere looser."""
    low, high, sure, can, v_low, v_high = parts
    for less, more in ((wider[0], low), (high, wider[1]), (wider[4], v_low), (v_high, wider[5])):
        assert (less <= more).all(), what
    assert (wider[2] <= sure).all(), what
    assert (can <= wider[3]).all(), what


def assert_sums(run: JointRun, name: str, spikes: torch.Tensor, case: random.Random) -> None:
    """AssertionError unless the count and random sums over time are within their bounds, for
    spikes [T, N, points, *].
    """
    generator = torch.Generator().manual_seed(case.randrange(2**31))
    weights = torch.randn(6, len(spikes), generator=generator, dtype=torch.float64)
    weights[0] = 1.0
    weights[1] = weights[1].sign()
    weights[2] = weights[2].round()
    bounds = run.memories[name].trains.bounds(weights)
    sums = torch.einsum("ft,t...->f...", weights, spikes)
    rounding = 1e-9
    low = bounds.low.unsqueeze(2) - rounding
    high = bounds.high.unsqueeze(2) + rounding
    assert ((sums >= low) & (sums <= high)).all(), f"a sum over time of {name}"


def without_graph(part, x):
    with torch.no_grad():
        return part(x)


def in_inference_mode(part, x):
    with torch.inference_mode():
        return part(x)


def in_a_function(part, x):
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return part(x)

        @staticmethod
        def backward(ctx, grad):
            return grad.new_zeros(x.shape)

    return Function.apply(x)


def detached(part, x):
    return part(x.detach())


def by_data(part, x):
    return part(x.data)


def through_numpy(part, x):
    return torch.from_numpy(part(x).detach().numpy())


CUTS = [without_graph, in_inference_mode, in_a_function, detached, by_data, through_numpy]


class Cut(nn.Module):
    """A part of a network that runs outside the graph."""

    def __init__(self, part: nn.Module, way) -> None:
        super().__init__()
        self.part = part
        self.way = way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.way(self.part, x)


def check_cut(seed: int) -> bool:
    """Whether a random network is refused as soon as one of its layers runs outside the graph."""
    case = random.Random(seed)
    torch.manual_seed(seed)
    model = random_classifier(case, grid=False)
    layers = [
        name
        for name, module in model.net.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear | nn.modules.batchnorm._BatchNorm)
    ]
    owner, _, name = case.choice(layers).rpartition(".")
    parent = model.net.get_submodule(owner)
    setattr(parent, name, Cut(getattr(parent, name), case.choice(CUTS)).eval())
    events = isinstance(model, SpikingEventClassifier)
    x = torch.rand(IMAGES, *[T] * events, 2, 6, 6)
    try:
        with torch.no_grad():
            y = model(x).argmax(1)
        verify(model, x, y, 0.01, method=case.choice(METHODS), time_limit=1.0)
    except NotImplementedError:
        return True
    return False


def run_of(model: SpikingClassifier, z: torch.Tensor) -> tuple[dict, torch.Tensor]:
    """Spikes and potentials after the reset of every spiking layer, time steps first, and the
    logits.
    """
    found = {}
    hooks = []
    for name, module in model.net.named_modules():
        if isinstance(module, neuron.BaseNode):
            module.store_v_seq = module.step_mode == "m"

            def hook(module, args, out, name=name):
                multi_step = module.step_mode == "m"
                if multi_step:
                    pair = (out, module.v_seq)
                else:
                    pair = (out.unsqueeze(0), module.v.unsqueeze(0))
                found.setdefault(name, []).append(pair)

            hooks.append(module.register_forward_hook(hook))
    logits = model(z)
    for handle in hooks:
        handle.remove()
    return {
        name: [torch.cat(parts) for parts in zip(*calls, strict=True)]
        for name, calls in found.items()
    }, logits


def signed_gradient(
    case: random.Random, z: torch.Tensor, outputs: list[torch.Tensor]
) -> torch.Tensor:
    """Sign of the gradient of a value of its own for every input: a logit or a spike, which is to
    rise or to fall.
    """
    values = case.choice(outputs).flatten(1)
    chosen = values.gather(1, torch.randint(values.shape[1], (len(z), 1))).squeeze(1)
    gradient = torch.autograd.grad((chosen * torch.randn(len(z))).sum(), z, allow_unused=True)[0]
    if gradient is None:
        return torch.zeros_like(z)
    return gradient.sign()


if __name__ == "__main__":
    main()
