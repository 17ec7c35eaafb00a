"""Looks for an input that leaves the bounds of verify, on random networks; run by hand.

``python -m proofs.fuzz --inputs 1000000``, in tests/, tries so many perturbed inputs: random ones,
corners of the ball and steps along the gradient of a logit or of a spike of one neuron. It stops at
the first spike, sum over time of spikes, potential, logit or margin outside its bounds, with the
seed that makes the network again.
"""

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from importlib.metadata import version

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from sj_robust import DLIFNode, SpikingClassifier
from sj_robust.attacks.projection import linf_bounds
from sj_robust.classifier import SpikingEventClassifier
from sj_robust.core.preserved import full_precision
from sj_robust.neuron import fuse
from sj_robust.ops import available_backends
from sj_robust.proofs import verify
from sj_robust.proofs.bounds import BoundedRun, bounded_logits, bounded_neurons
from sj_robust.proofs.changes import Flips
from sj_robust.proofs.joint import JointRun, OverTime
from sj_robust.proofs.maps import Maps
from sj_robust.proofs.moves import MovedEvents
from sj_robust.proofs.rules import Bounds
from sj_robust.proofs.spiking import Float32Spiking, LayerBounds

METHODS = ["joint"] * 14 + ["ibp"] * 4 + ["mip"] * 2
IMAGES = 2
T = 4
STEPS = (4, 1, 2, 6, 4, 11)
EVERY = 8
"""Networks of which one has ReLU."""
RELEASE = version("spikingjelly")
BACKENDS = [name for name, state in available_backends().items() if state == "available"]
if RELEASE >= "2":
    BACKENDS.append("spikingjelly")


def main(check: Callable[[int, int], Counter], about: str) -> None:
    """Check networks in turn until enough inputs are tried."""
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=1_000_000, help="inputs to try (1000000)")
    parser.add_argument("--points", type=int, default=8000, help="inputs per network (8000)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (0)")
    options = parser.parse_args()
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
        node = DLIFNode(T=T, tau=tau, backend=case.choice(BACKENDS), **given)
        digits = 1 if grid else 9
        gains = [round(case.gauss(0.7, 1.2), digits) for _ in range(T)]
        node.input_gain.data = torch.tensor(gains)
        return node
    given["decay_input"] = case.random() < 0.5
    if kind == "LIF":
        return neuron.LIFNode(tau, **given)
    return neuron.ParametricLIFNode(tau, **given)


POOLING = [
    None,
    None,
    partial(layer.AvgPool2d, 2, ceil_mode=True),
    partial(layer.MaxPool2d, 2, ceil_mode=True),
    partial(layer.MaxPool2d, 3, stride=2, padding=1),
    partial(layer.AdaptiveAvgPool2d, 2),
]


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

    def normalised(channels: int) -> list[nn.Module]:
        if grid or case.random() < 0.5:
            return []
        return [layer.BatchNorm2d(channels)]

    def spiking(share: float) -> list[nn.Module]:
        node = random_node(case, grid, T, relu)
        return [node] if case.random() < share else []

    def residual(channels: int) -> nn.Module:
        groups = case.choice([1, channels])
        convolution = layer.Conv2d(channels, channels, 3, padding=1, groups=groups)
        return Residual(convolution, *normalised(channels), *spiking(0.7))

    def block(channels: int, wide: int) -> list[nn.Module]:
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
        return [convolution, *normalised(wide), *spiking(1.0)]

    for _ in range(case.randint(1, 3)):
        if parts and case.random() < 0.4:
            parts.append(residual(channels))
        else:
            wide = case.choice([2, 4, 6])
            parts += block(channels, wide)
            channels = wide
        pool = case.choice(POOLING)
        if pool is not None:
            parts.append(pool())
    bias = case.random() < 0.5
    head = layer.Linear(4 * channels, 3, bias=bias)
    parts += [layer.AdaptiveAvgPool2d(2), layer.Flatten(), head]
    return nn.Sequential(*parts, *spiking(0.3))


def random_classifier(
    case: random.Random, grid: bool, T: int = T, relu: bool = False
) -> SpikingClassifier:
    """A network in evaluation mode that fires. On the grid potentials meet thresholds but for
    rounding. With ``relu`` it has one time step, and ReLU in the place of some neurons.
    """
    steps = 1 if relu else T
    net = random_network(case, grid, steps, relu)
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
    if case.random() < 0.3:
        return SpikingEventClassifier(net, steps).eval()
    statistics = {} if grid else {"mean": [0.5, 0.4], "std": [0.3, 0.2]}
    return SpikingClassifier(net, steps, **statistics).eval()


def fill_batch_norms(net: nn.Module, *, least_variance: float) -> None:
    """Random statistics and weights, as if a batch norm had seen data and learned."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(least_variance, 2.0)
            module.weight.data.normal_(1.0, 0.5)
            module.bias.data.normal_()


@dataclass
class StepBounds:
    """What bounds say of one step of a layer, or of all, [T, N, *], once they are stacked."""

    h_low: torch.Tensor  # before firing
    h_high: torch.Tensor
    sure: torch.Tensor  # it fires
    possible: torch.Tensor  # it may fire
    v_low: torch.Tensor  # after the reset
    v_high: torch.Tensor

    @classmethod
    def stacked(cls, steps: list["StepBounds"]) -> "StepBounds":
        """Bounds of all steps in one."""
        parts = {}
        for field in fields(cls):
            parts[field.name] = torch.stack([getattr(step, field.name) for step in steps])
        return cls(**parts)

    def for_points(self) -> "StepBounds":
        """The same with an axis for the inputs of each image, [T, N, 1, *]."""
        parts = {name: part.unsqueeze(2) for name, part in vars(self).items()}
        return StepBounds(**parts)

    def assert_hold(self, fired: torch.Tensor, v: torch.Tensor, layer: str) -> None:
        """AssertionError unless spikes and potentials after the reset are inside."""
        assert (fired >= self.sure).all(), f"a spike of {layer} is missing"
        assert (fired <= self.possible).all(), f"a spike of {layer}"
        assert (v >= self.v_low).all(), f"a potential of {layer} is too low"
        assert (v <= self.v_high).all(), f"a potential of {layer} is too high"
        # where nothing fires the potential is still the charged one
        inside = (v >= self.h_low) & (v <= self.h_high)
        assert (fired | inside).all(), f"a charged potential of {layer}"

    def assert_within(self, wider: "StepBounds", what: str) -> None:
        """AssertionError unless these bounds are nowhere looser than others, but for what float64
        rounds.
        """
        rounding = 1e-12
        assert (wider.h_low - rounding <= self.h_low).all(), what
        assert (self.h_high <= wider.h_high + rounding).all(), what
        assert (wider.sure <= self.sure).all(), what
        assert (self.possible <= wider.possible).all(), what
        assert (wider.v_low - rounding <= self.v_low).all(), what
        assert (self.v_high <= wider.v_high + rounding).all(), what


class Keeps(Float32Spiking):
    """A call of a layer that keeps the bounds of every step with the layer."""

    def step(self, v, x):
        h, spikes = super().step(v, x)
        after = self.reset(h, spikes)
        found = StepBounds(
            h_low=h.low,
            h_high=h.high,
            sure=spikes.low.bool(),
            possible=spikes.high.bool(),
            v_low=after.low,
            v_high=after.high,
        )
        kept(self.layer).append(found)
        return h, spikes


class Recorded(BoundedRun):
    """A run of intervals that keeps the bounds of every spiking layer and step."""

    def _spiking(self, neuron):
        return Keeps(neuron, self.layers[neuron.name])


class RecordedJoint(JointRun):
    """A run of joint bounds that keeps them."""

    def spikes(self, neuron, x_seq):
        found = super().spikes(neuron, x_seq)
        steps = []
        for step in self.memories[neuron.name].steps:
            bounds = StepBounds(
                h_low=step.h.low,
                h_high=step.h.high,
                sure=step.spikes.low.bool(),
                possible=step.spikes.high.bool(),
                v_low=step.v.low,
                v_high=step.v.high,
            )
            steps.append(bounds)
        kept(self.layers[neuron.name])[:] = steps
        return found


def kept(layer: LayerBounds) -> list[StepBounds]:
    """What a layer has kept, step by step."""
    return vars(layer).setdefault("kept", [])


def bounds_of(run: BoundedRun) -> dict[str, StepBounds]:
    """By layer what its steps have kept."""
    return {name: StepBounds.stacked(kept(layer)) for name, layer in run.layers.items()}


@dataclass
class Proved:
    """All that bounds say of a network on some images."""

    margin: torch.Tensor  # [N, 1, 1]
    logits: Bounds
    layers: dict[str, StepBounds]
    run: JointRun

    @classmethod
    def of(
        cls,
        model: SpikingClassifier,
        x,
        y,
        eps: float,
        method: str,
        norm: str = "Linf",
        largest_shift: int | None = None,
        counts: bool = False,
    ) -> "Proved":
        """Joint bounds, held against those of intervals, and the margin of a method."""
        given = {"norm": norm, "largest_shift": largest_shift, "counts": counts}
        result = verify(model, x, y, eps, method=method, time_limit=1.0, **given)
        ball = Flips(eps, counts) if norm == "L0" else eps
        if norm == "moves":
            ball = MovedEvents.of(x, eps, largest_shift, counts=counts)
        margin = torch.tensor(result.margin, dtype=torch.float64)
        neurons = bounded_neurons(model)
        intervals = Recorded(neurons, len(x))
        with full_precision(x.device):
            maps = Maps(partial(bounded_logits, model), neurons, x[0])
            run = RecordedJoint(neurons, len(x), over_time=OverTime(maps, model.T))
            wider = bounded_logits(model, intervals, x, ball)
            logits = bounded_logits(model, run, x, ball)
            lead = run.lead(logits, y)
            assert (lead <= intervals.lead(wider, y)).all(), "a looser margin"
        layers = bounds_of(run)
        for name, wide in bounds_of(intervals).items():
            layers[name].assert_within(wide, f"looser bounds of {name}")
        return cls(margin=margin.view(-1, 1, 1), logits=logits, layers=layers, run=run)

    @property
    def open_spikes(self) -> int:
        """Spikes that may be and may not be."""
        is_open = [layer.possible & ~layer.sure for layer in self.layers.values()]
        return sum(int(spikes.sum()) for spikes in is_open)

    def assert_logits(self, found: torch.Tensor, y: torch.Tensor) -> None:
        """AssertionError unless logits of several inputs for each image are inside."""
        rows = found.detach().double().unflatten(0, (len(y), -1))
        assert (rows >= self.logits.lower.unsqueeze(1)).all(), "a logit is too low"
        assert (rows <= self.logits.upper.unsqueeze(1)).all(), "a logit is too high"
        label = y.view(-1, 1, 1).expand(-1, rows.shape[1], 1)
        rival = rows.scatter(2, label, -torch.inf).amax(2, keepdim=True)
        assert (rows.gather(2, label) - rival >= self.margin).all(), "a margin"

    def assert_layers(self, seen: dict, case: random.Random) -> int:
        """AssertionError unless spikes and potentials are inside; returns the number of spikes."""
        total = 0
        for name, (spikes, v) in seen.items():
            by_image = (len(self.margin), -1)
            fired = spikes.detach().bool().unflatten(1, by_image)
            potential = v.detach().double().unflatten(1, by_image)
            self.layers[name].for_points().assert_hold(fired, potential, name)
            assert_sums(self.run, name, fired.double(), case)
            total += fired.numel()
        return total


@contextmanager
def float32_products(model: SpikingClassifier, *, climbs: bool, onednn: bool) -> Iterator[None]:
    """Forwards with or without a gradient, by torch's own code or by oneDNN's."""
    for module in model.modules():
        if isinstance(module, neuron.BaseNode):
            # in evaluation mode the older release has no gradient, and code of its own
            module.train(climbs)
    products = torch.backends.mkldnn.flags(onednn, allow_tf32=None)
    with torch.backends.nnpack.flags(False), products, torch.set_grad_enabled(climbs):
        yield


def check(seed: int, points: int) -> Counter:
    """Try so many inputs of a random network; AssertionError says what left its bounds."""
    case = random.Random(seed)
    torch.manual_seed(seed)
    grid = case.random() < 0.4
    relu = seed % EVERY == 0
    steps = 1 if relu else STEPS[seed % len(STEPS)]
    model = random_classifier(case, grid, steps, relu)
    method = case.choice(METHODS[:-2] if relu else METHODS)
    some = 10 ** case.uniform(-3.5, -1)
    eps = case.choice([0.0, 1e-7, some, 0.0 if grid else some])
    x = random_images(case, model, grid)
    y = model(x).argmax(1)
    proved = Proved.of(model, x, y, eps, method)
    verified = int((proved.margin > 0).sum())
    total = Counter(inputs=0, networks=1, verified=verified, spikes=0)
    if eps == 0:
        total["spikes open at eps 0"] = proved.open_spikes
    count = max(1, points // (4 * IMAGES))
    low, high = (end.repeat_interleave(count, 0) for end in linf_bounds(x, eps=eps))
    share = torch.rand_like(low)
    share[::2] = share[::2].round()  # corners
    z = (low + (high - low) * share).clamp(low, high)
    uphill = torch.zeros_like(z)
    for step, onednn in ((0.0, True), (2.0, True), (-2.0, False), (0.5, True)):
        climbs = step == 0.0
        moved = z.detach() + step * eps * uphill
        z = moved.clamp(low, high).requires_grad_(climbs)
        with float32_products(model, climbs=climbs, onednn=onednn):
            seen, found = run_of(model, z)
            # while hooks look, the parts of a stage run apart
            alone = [model(z)] if hasattr(model.net, "fused") else []
        for logits in (found, *alone):
            proved.assert_logits(logits, y)
        total["spikes"] += proved.assert_layers(seen, case)
        total["inputs"] += len(z)
        if climbs:
            by_input = [spikes.movedim(0, 1) for spikes, _ in seen.values()]
            uphill = signed_gradient(case, z, [found, *by_input])
    return total


def random_images(case: random.Random, model: SpikingClassifier, grid: bool) -> torch.Tensor:
    """Images or frames of events, on a grid where the network is on one."""
    events = isinstance(model, SpikingEventClassifier)
    levels = 1 if events else case.choice([1, 2, 10])
    steps = [model.T] if events else []
    x = torch.rand(IMAGES, *steps, 2, 6, 6)
    if events or grid:
        return x.mul(levels).round() / levels
    return x


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


def caught(use):
    """A branch that is lost where a use of it raises an error, as it does on bounds alone."""

    def way(part, x):
        found = part(x)
        try:
            use(found)
        except Exception:
            return 0 * found
        return found

    return way


HIDDEN = [without_graph, in_inference_mode, in_a_function]
"""Ways to compute outside the graph, which bounds see."""

LOST = [detached, by_data, through_numpy, caught(lambda x: x.detach().numpy())]
"""Ways out of torch."""


class Cut(nn.Module):
    """A part of a network that runs outside the graph."""

    def __init__(self, part: nn.Module, way) -> None:
        super().__init__()
        self.part = part
        self.way = way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.way(self.part, x)


def check_cut(seed: int) -> bool:
    """Whether a random network with one of its layers outside the graph has the bounds that it has
    otherwise, or is refused if values leave torch.
    """
    case = random.Random(seed)
    torch.manual_seed(seed)
    model = random_classifier(case, grid=False)
    layers = [
        name
        for name, module in model.net.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear | nn.modules.batchnorm._BatchNorm)
    ]
    events = isinstance(model, SpikingEventClassifier)
    x = torch.rand(IMAGES, *[T] * events, 2, 6, 6)
    with torch.no_grad():
        y = model(x).argmax(1)
    method = case.choice(("ibp", "joint"))
    plain = verify(model, x, y, 0.01, method=method)
    owner, _, name = case.choice(layers).rpartition(".")
    way = case.choice(HIDDEN + LOST)
    parent = model.net.get_submodule(owner)
    setattr(parent, name, Cut(getattr(parent, name), way).eval())
    try:
        found = verify(model, x, y, 0.01, method=method)
    except NotImplementedError:
        return way in LOST
    return way in HIDDEN and found.margin == pytest.approx(plain.margin, abs=1e-6)


def run_of(model: SpikingClassifier, z: torch.Tensor) -> tuple[dict, torch.Tensor]:
    """Spikes and potentials after the reset of every spiking layer, time steps first, and the
    logits.
    """
    calls = {}

    def keep(name, module, args, out):
        if module.step_mode == "m":
            pair = (out, module.v_seq)
        else:
            pair = (out.unsqueeze(0), module.v.unsqueeze(0))
        calls.setdefault(name, []).append(pair)

    hooks = []
    for name, module in model.net.named_modules():
        if isinstance(module, neuron.BaseNode):
            module.store_v_seq = module.step_mode == "m"
            hooks.append(module.register_forward_hook(partial(keep, name)))
    logits = model(z)
    for handle in hooks:
        handle.remove()
    seen = {}
    for name, pairs in calls.items():
        spikes, potentials = zip(*pairs, strict=True)
        seen[name] = (torch.cat(spikes), torch.cat(potentials))
    return seen, logits


def signed_gradient(
    case: random.Random, z: torch.Tensor, outputs: list[torch.Tensor]
) -> torch.Tensor:
    """Sign of the gradient of a value of its own for every input: a logit or a spike, which is to
    rise or to fall.
    """
    values = case.choice(outputs).flatten(1)
    places = torch.randint(values.shape[1], (len(z), 1))
    chosen = values.gather(1, places).squeeze(1)
    total = (chosen * torch.randn(len(z))).sum()
    gradient = torch.autograd.grad(total, z, allow_unused=True)[0]
    if gradient is None:
        return torch.zeros_like(z)
    return gradient.sign()


if __name__ == "__main__":
    main(check, __doc__)
