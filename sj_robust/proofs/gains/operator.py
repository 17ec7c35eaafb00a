"""The norm of the linear map between the spiking layers of a real network."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sj_robust.core.convention import Takes, step_mode_of
from sj_robust.core.host import functional
from sj_robust.core.preserved import full_precision, preserved
from sj_robust.neuron.charging import find_neurons
from sj_robust.proofs.gains._affine import (
    INPUT,
    POOLINGS,
    AffineMap,
    CutRun,
    call_key,
    cut_run,
)
from sj_robust.proofs.gains._lanczos import SingularValue, largest_singular_value

__all__ = ["INPUT", "InputMap", "input_maps"]


@dataclass(frozen=True)
class InputMap:
    """The linear map into one spiking layer from all spiking layers that feed it, in one time step.

    Attributes:
        name: Name of the layer.
        feeds: Layers whose spikes feed it, side by side in the map; ``"input"`` is the network's
            input.
        norm: Spectral norm of the map, approached from below, or with ``upper_bound`` a bound on
            what the map does; None if the layer is not covered.
        upper_bound: Whether there is max pooling in between, which enters by its Lipschitz
            constant.
        residual: Largest possible distance of the estimate from an exact singular value.
        iterations: Number of products with the map, and with its adjoint.
        not_covered: The reason if the layer has no norm, else None.
    """

    name: str
    feeds: tuple[str, ...]
    norm: float | None
    upper_bound: bool = False
    residual: float = 0.0
    iterations: int = 0
    not_covered: str | None = None


def input_maps(
    net: nn.Module,
    frame: Tensor,
    *,
    takes: Takes | None = None,
    T: int = 8,
    tolerance: float = 1e-4,
    max_iterations: int = 300,
    seed: int = 0,
) -> dict[str, InputMap]:
    """The norm of the linear map before every spiking layer, in order of execution.
    各脉冲层之前线性映射的谱范数。

    Equation: with the spikes ``s_k`` of the layers (or the network's input) that feed a layer, its
    current is ``x = sum_k W_k s_k + b``; the norm is that of the stacked map ``[W_1 W_2 ...]``, so
    that

        ||x - x~||_2 <= norm * sqrt(sum_k ||s_k - s~_k||_2^2)

    The network itself is run in evaluation mode, with the output of every spiking layer replaced by
    a free variable: everything between them (convolutions with their stride, padding and groups,
    linear layers, batch norm, average pooling, residual sums) is one map, whose products are
    computed by automatic differentiation. The largest singular value is found by Lanczos
    bidiagonalisation, a power iteration that keeps all earlier vectors. The estimate approaches the
    norm from below: compare with ``norm * (1 + 1e-3)``.

    A max pooling module is also replaced and enters by its Lipschitz constant, the square root of
    the number of windows that contain the same value (1 for disjoint windows, 2 for 3x3 windows of
    stride 2). With the constant c_k of pooling k and the map W_0 from everything that is not
    pooled, the result is ``||[W_0 W_k sqrt(c_k) ...]|| * sqrt(1 + sum_k c_k)`` (without the 1 if
    there is no W_0), which is an upper bound by Cauchy-Schwarz and is labelled as one.

    Random values are used to check that the map is affine, complete, and the same at each of T
    steps, whatever the other steps hold; a layer that fails (attention, products of spikes, dropout
    in evaluation mode, recurrence, delays) is reported together with the modules that ran before
    it. Modes, states, gradients and hooks of the network and the random state are restored;
    existing hooks see the runs. Layers that do not run are not listed.

    Args:
        net: A SpikingJelly network, not the classifier around it.
        frame: Input of one time step, normalised as for the network: [N, C, H, W] or [N, F]; only
            the shape of its first sample is used.
        takes: What ``net`` is called with, see :class:`sj_robust.core.convention.Convention`; None
            reads it from the outermost step module. Where it takes images, the map from the input
            goes to the currents of all time steps.
        T: Number of time steps of the check. A mixture with steps longer ago is not seen.
        tolerance: Residual to stop at, relative to the norm.
        max_iterations: Largest number of iterations; the residual then shows the accuracy that was
            reached.
        seed: Seed of the random values and start vectors.

    Raises:
        ValueError: If the network has no SpikingJelly neuron, the frame has no sample, or the
            network cannot run for one step and for T.

    Source: derived here; convolutions by their products as in Ryu et al., "Plug-and-Play Methods
        Provably Converge with Properly Trained Denoisers" (ICML 2019).

    Examples:
        >>> from spikingjelly.activation_based import layer, neuron
        >>> net = nn.Sequential(layer.Linear(2, 2, bias=False), neuron.IFNode())
        >>> _ = net[0].weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        >>> found = input_maps(net, torch.rand(1, 2))["1"]
        >>> found.feeds, round(found.norm, 4)
        (('input',), 3.0)
    """
    if len(frame) == 0:
        raise ValueError(f"frame must hold a sample, got shape {tuple(frame.shape)}")
    neurons, others, _ = find_neurons(net)
    with full_precision(frame.device), preserved(net):
        if takes is None:
            takes = "steps" if step_mode_of(net) == "s" else "sequence"
        network = _CutNetwork(
            net=net,
            frame=frame[:1].detach(),
            neurons=[*neurons, *others],
            takes=takes,
            T=max(T, 2),
            seed=seed,
        )
        found: dict[str, InputMap] = {}
        for name in network.run.currents:
            found[name] = _measured(network, name, found, tolerance, max_iterations)
    # Further calls of a layer have keys of their own; the first one's entry says why it is not
    # covered.
    layers = network.cuts.keys() - network.run.windows.keys()
    return {name: found[name] for name in found if name in layers}


_Value = Callable[[str, Tensor], Tensor]


class _CutNetwork:
    """A network cut at its neurons and max poolings, and the values of its currents for chosen
    leaves.
    """

    def __init__(
        self,
        net: nn.Module,
        frame: Tensor,
        neurons: list[str],
        takes: Takes,
        T: int,
        seed: int,
    ) -> None:
        self.net = net
        self.takes = takes
        self.T = T
        self.multi_step = takes == "sequence"
        self.frame = frame.unsqueeze(0) if self.multi_step else frame
        self.generator = torch.Generator().manual_seed(seed)
        poolings = [name for name, module in net.named_modules() if isinstance(module, POOLINGS)]
        self.cuts = {name: net.get_submodule(name) for name in [*neurons, *poolings]}
        self.random: list[dict[str, Tensor]] = [{}, {}]
        self.run = self._run(lambda name, like: self.noise(like))
        self.at_zero = self._run(lambda name, like: torch.zeros_like(like)).currents
        # Two sizes and both signs: what is linear near one point may not be so far from it.
        self.at_random = [
            self._run(self._random_leaves(0, scale=1.0)).currents,
            self._run(self._random_leaves(1, scale=-1000.0)).currents,
        ]
        self.shares = self.noise(torch.zeros(T)).tolist()
        # A run on images holds all steps, each with leaves of its own.
        self.steps = [] if takes == "images" else self._steps()

    def _run(self, value: _Value, frame: Tensor | None = None, *, reset: bool = True) -> CutRun:
        if frame is None:
            frame = self.frame
        if reset:
            functional.reset_net(self.net)
        try:
            return cut_run(self.net, frame, self.cuts, value)
        except (RuntimeError, IndexError) as error:
            if not self.multi_step:
                raise
            raise ValueError(
                f"the network must run for one time step and for {self.T}, got an error for "
                f"{len(frame)} ({error}); give inputs of the network's own shape. A layer with "
                "weights for a fixed number of steps has no map of one step"
            ) from error

    def noise(self, like: Tensor, scale: float = 1.0) -> Tensor:
        """Random values of a tensor's shape, device and dtype."""
        values = torch.randn(like.shape, generator=self.generator, dtype=torch.float32)
        return (scale * values).to(like)

    def _random_leaves(self, i: int, scale: float) -> _Value:
        def value(name: str, like: Tensor) -> Tensor:
            self.random[i][name] = self.noise(like, scale)
            return self.random[i][name].clone()

        return value

    def _steps(self) -> list[dict[str, Tensor]]:
        """Currents of each of T steps in a row, whose leaves are shares of the second random
        ones.
        """
        if self.multi_step:
            return self._steps_of_a_sequence()
        steps = []
        for t, share in enumerate(self.shares):
            value = partial(_share_of, self.random[1], share)
            steps.append(_without_graph(self._run(value, reset=t == 0)))
        return steps

    def _steps_of_a_sequence(self) -> list[dict[str, Tensor]]:
        frames = torch.cat([self.frame] * self.T)
        currents = _without_graph(self._run(self._leaf_of_a_sequence, frames))
        steps: list[dict[str, Tensor]] = [{} for _ in self.shares]
        for key, one in self.at_random[1].items():
            current = currents.get(key)
            if current is not None and len(current) == self.T * len(one):
                for step, of_step in zip(steps, torch.split(current, len(one)), strict=True):
                    step[key] = of_step
                continue
            for t, step in enumerate(steps):
                later = currents.get(self._a_step_on(key, t))
                if later is not None:
                    step[key] = later
        return steps

    def _leaf_of_a_sequence(self, key: str, like: Tensor) -> Tensor:
        second = self.random[1]
        leaf = second.get(key)
        if leaf is not None and len(like) == self.T * len(leaf):
            return torch.cat([share * leaf for share in self.shares])
        # A single-step layer of a multi-step network is handed the steps in turn.
        for t, share in enumerate(self.shares):
            earlier = second.get(self._a_step_on(key, -t))
            if earlier is not None and earlier.shape == like.shape:
                return torch.mul(earlier, share)
        return self.noise(like)

    def same_at_every_step(self, key: str) -> bool:
        """Whether each step's current is the map of that step's leaves alone."""
        if self.takes == "images":
            return True
        zero = self.at_zero[key]
        second = self.at_random[1][key]
        for share, currents in zip(self.shares, self.steps, strict=True):
            current = currents.get(key)
            wanted = zero + share * (second - zero)
            if current is None or not _close(current, wanted, second, zero):
                return False
        return True

    def _a_step_on(self, key: str, steps: int) -> str:
        """Key of a layer's call so many steps later, if it is handed the steps in turn."""
        layer, _, call = key.removesuffix(")").partition(" (call ")
        number = int(call or 1) + steps * self.run.calls[layer]
        return call_key(layer, number)


def _without_graph(run: CutRun) -> dict[str, Tensor]:
    """Currents of a run for comparison."""
    return {key: current.detach() for key, current in run.currents.items()}


def _share_of(leaves: Mapping[str, Tensor], share: float, key: str, _: Tensor) -> Tensor:
    return leaves[key] * share


def _measured(
    network: _CutNetwork,
    name: str,
    found: Mapping[str, InputMap],
    tolerance: float,
    max_iterations: int,
) -> InputMap:
    affine = AffineMap(network.run.currents[name], network.run.leaves)
    windows = network.run.windows
    feeds: list[str] = []
    # How much of the perturbation each leaf can carry: a spiking layer its own part, a max pooling
    # its bound.
    bounds = {}
    for key in affine.feeds:
        if key not in windows:
            feeds.append(_layer_name(key))
            continue
        pooling = found[key]
        feeds.extend(pooling.feeds)
        if pooling.norm is not None:
            bounds[key] = math.sqrt(windows[key]) * pooling.norm
    feeding = tuple(dict.fromkeys(feeds))
    reason = _reason(network, name, affine, found)
    if reason is not None:
        return InputMap(name, feeding, None, not_covered=reason)
    scales = [math.sqrt(bounds.get(key, 1.0)) for key in affine.feeds]
    not_pooled = 1.0 if len(bounds) < len(affine.feeds) else 0.0
    factor = math.sqrt(sum(bounds.values()) + not_pooled)
    largest = _largest_singular_value(affine, scales, network.noise, tolerance, max_iterations)
    return InputMap(
        name,
        feeding,
        largest.value * factor,
        upper_bound=bool(bounds),
        residual=largest.residual * factor,
        iterations=largest.iterations,
    )


def _layer_name(key: str) -> str:
    return key.split(" (call ")[0]


def _largest_singular_value(
    affine: AffineMap,
    scales: list[float],
    noise: Callable[[Tensor], Tensor],
    tolerance: float,
    max_iterations: int,
) -> SingularValue:
    sizes = [leaf.numel() for leaf in affine.leaves]

    def apply(vector: Tensor) -> Tensor:
        parts = zip(torch.split(vector, sizes), affine.leaves, scales, strict=True)
        scaled = [scale * part.view_as(leaf) for part, leaf, scale in parts]
        return affine.apply(scaled).flatten()

    def adjoint(cotangent: Tensor) -> Tensor:
        found = affine.adjoint(cotangent.view_as(affine.current))
        parts = zip(found, scales, strict=True)
        return torch.cat([scale * part.flatten() for part, scale in parts])

    leaves = [leaf.detach().flatten() for leaf in affine.leaves]
    start = noise(torch.cat(leaves))
    return largest_singular_value(
        apply, adjoint, start, tolerance=tolerance, max_iterations=max_iterations
    )


def _reason(
    network: _CutNetwork, name: str, affine: AffineMap, found: Mapping[str, InputMap]
) -> str | None:
    """Why a layer is not covered; None if it is."""
    for key in (name, *affine.feeds):
        layer = _layer_name(key)
        calls = network.run.calls[layer]
        pooling = key in network.run.windows
        if calls > 1 and not pooling:
            called = "it" if layer == name else layer
            per = "forward pass, step by step" if network.takes == "images" else "time step"
            return f"{called} is called {calls} times per {per}"
        if key in found and pooling and found[key].not_covered is not None:
            return f"the max pooling {key} before it: {found[key].not_covered}"
    if not affine.feeds:
        return "neither a spiking layer nor the input reaches it through differentiable operations"
    zero = network.at_zero[name]
    for leaves, currents in zip(network.random, network.at_random, strict=True):
        try:
            linear = affine.apply([leaves[key] for key in affine.feeds])
        except RuntimeError as error:
            return (
                f"the backward pass of what is before it cannot be differentiated ({error}); "
                f"{_ran(network, name)} ran before it"
            )
        if not _close(linear + zero, currents[name], linear, zero):
            feeds = ["the input" if key == INPUT else f"layer {key}" for key in affine.feeds]
            return f"not affine in {_listed(feeds)}, because {_ran(network, name)} ran in between"
    if not network.same_at_every_step(name):
        return f"not the same map at every time step; {_ran(network, name)} ran before it"
    return None


def _close(a: Tensor, b: Tensor, *scales: Tensor) -> bool:
    """Whether two currents agree within rounding of what they were computed from; not if a value is
    not finite.
    """
    if a.shape != b.shape:
        return False
    scale = max(float(scale.detach().norm()) for scale in scales)
    return float((a - b).detach().norm()) <= 1e-4 * scale


def _ran(network: _CutNetwork, name: str) -> str:
    """What ran before a layer and is not known to be linear, or else all that ran."""
    modules, operations = network.run.between(name)
    all_named = []
    named = []
    for module in dict.fromkeys(modules):
        kind = type(network.net.get_submodule(module))
        all_named.append(f"{module} ({kind.__name__})")
        if not any(base.__name__.startswith(_LINEAR_MODULES) for base in kind.__mro__):
            named.append(all_named[-1])
    unknown = set()
    for operation in operations:
        if not operation.startswith(_LINEAR_OPERATIONS):
            node = operation.rsplit("::")[-1]  # such as MulBackward0
            unknown.add(node.rstrip("0123456789").removesuffix("Backward").lower())
    named += [f"the operation {operation}" for operation in sorted(unknown)]
    named = named or all_named or ["operations without a gradient"]
    return _listed(named)


def _listed(names: list[str]) -> str:
    """Names as in a sentence."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


_LINEAR_MODULES = (
    "Conv",
    "Linear",
    "BatchNorm",
    "_BatchNorm",
    "AvgPool",
    "AdaptiveAvgPool",
    "Flatten",
    "Identity",
    "Upsample",
    "ZeroPad",
    "ConstantPad",
    "Fold",
    "Unfold",
)
_LINEAR_OPERATIONS = (
    "Convolution",
    "Addmm",
    "Mm",
    "NativeBatchNorm",
    "CudnnBatchNorm",
    "MiopenBatchNorm",
    "Add",
    "Sub",
    "Rsub",
    "Neg",
    "View",
    "UnsafeView",
    "Reshape",
    "Clone",
    "torch::autograd::",
    "TBackward",
    "Transpose",
    "Permute",
    "Squeeze",
    "Unsqueeze",
    "Expand",
    "Repeat",
    "Mean",
    "Sum",
    "AvgPool",
    "AdaptiveAvgPool",
    "MkldnnAdaptiveAvg",
    "Cat",
    "Stack",
    "Slice",
    "Select",
    "Index",
    "Alias",
    "Unbind",
    "Split",
    "ConstantPad",
    "ToCopy",
    "Upsample",
    "AsStrided",
    "Copy",
)
