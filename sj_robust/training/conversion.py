"""A network of ReLUs turned into a spiking network of the same weights."""

import copy
import math
from collections import Counter, OrderedDict
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Node

from sj_robust.classifier import SpikingClassifier
from sj_robust.core.checks import (
    Channels,
    check_count,
    check_images,
    check_network,
    check_number,
    check_size,
    check_switch,
)
from sj_robust.core.host import invalidate_reset_cache, is_neuron, step_mode
from sj_robust.core.preserved import full_precision, preserved
from sj_robust.defences import ClippedReLU
from sj_robust.models.direct import DirectlyEncoded
from sj_robust.neuron import DLIFNode

__all__ = ["Rescale", "convert"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
PASSING: tuple[type[nn.Module], ...] = (
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.Dropout,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.Flatten,
    nn.Identity,
)
"""Modules that keep the order of the channels and are linear in evaluation mode."""

PASSING_CALLS = {"flatten", "reshape", "view", "contiguous", "dropout", "avg_pool2d"}
PASSING_CALLS |= {"adaptive_avg_pool2d"}
LINEAR_CALLS = PASSING_CALLS | {"add", "iadd", "sub", "neg", "cat", "mean", "getitem"}
LINEAR_CALLS |= {"getattr", "size", "dim"}
PRODUCTS = {"mul", "truediv", "div", "matmul", "linear", "conv2d"}
"""Linear in one of their arguments."""


def convert(
    twin: nn.Module,
    x: Tensor,
    *,
    T: int = 16,
    quantile: float = 0.99,
    per_channel: bool = False,
    gain_fall: float = 0.0,
    mean: Channels = None,
    std: Channels = None,
) -> SpikingClassifier:
    """A spiking network with the weights of a network of ReLUs. 将 ReLU 网络转换为脉冲网络。

    Equation: with the ``quantile`` s of the positive activations of a ReLU on the images ``x``, or
    the threshold of a :class:`sj_robust.defences.ClippedReLU`, an IF neuron with a soft reset and
    threshold 1 takes its place, whose input and output carry the scale, and which begins half a
    threshold above rest::

        v[-1] = 1 / 2,    h[t] = v[t-1] + current / s,    a = s * spikes,    v[t] = h[t] - spikes[t]

    so that the number of spikes in T steps of a constant current is the activation divided by s,
    rounded to a multiple of 1 / T and clipped to [0, 1]. In the first layer it is exactly that; in
    later layers it also depends on when the spikes come. There the gains are ``1 + gain_fall * (1 -
    2 t / (T - 1))``, so that early currents count for more: spikes that the last currents would
    take back have been emitted by then. The scales are put into the batch norm,
    convolution or linear layer before and into the weights behind a neuron, where a module of its
    own has them alone; elsewhere, as around the sum of a residual network, a :class:`Rescale` is
    added. A network of this package keeps its modules, and its weights fit
    ``NetworkSpec(neuron="dlif", tau=math.inf, options={"v_reset": None, "v_init": 0.5})``.

    Unlike ``spikingjelly.activation_based.ann2snn``, neurons are DLIF (so stages run in one pass
    and gains can be trained), begin at half a threshold, and a network of which an
    operation is not kept by counts of spikes is refused.

    Args:
        twin: A ``SpikingClassifier`` with one time step around a network of ReLUs, such as
            ``--neuron relu`` trains, or a bare network of ReLUs that takes images [N, *].
        x: Images [N, *] in [0, 1] on which the activations are measured.
        T: Number of time steps, >= 1.
        quantile: Of the positive activations of a ReLU, in (0, 1].
        per_channel: Whether every channel of a ReLU has a scale of its own.
        gain_fall: How far the gains behind the first layer fall to either side of 1, in [0, 1]; 0.3
            keeps more of a network of few time steps.
        mean: Mean per channel that a bare network expects to be subtracted.
        std: Standard deviation per channel that it expects to be divided by.

    Returns:
        The spiking network in a classifier, in evaluation mode; ``twin`` is not changed.

    Raises:
        TypeError: If ``twin`` is not a network or T not an integer.
        ValueError: If there is no ReLU, if an operation is not linear and no ReLU, such as max
            pooling, if the forward cannot be traced by ``torch.fx``, or if an argument is out of
            range.

    Source: Rueckauer et al., "Conversion of continuous-valued deep networks to efficient
        event-driven networks" (Frontiers in Neuroscience 2017); half a threshold: Bu et al.,
        "Optimized potential initialization for low-latency spiking neural networks" (AAAI
        2022); robust networks by conversion: Ozdenizci and Legenstein (TMLR 2024).

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> twin = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> x = torch.rand(20, 1, 2, 2)
        >>> spiking = convert(twin, x, T=64, quantile=1.0)
        >>> bool((spiking(x) - twin(x)).abs().max() < 0.02)
        True
    """
    check_network(twin, "twin")
    T = check_count("T", T)
    quantile = check_size("quantile", quantile, positive=True, at_most=1.0)
    check_switch("per_channel", per_channel)
    if not 0 <= check_number("gain_fall", gain_fall) <= 1:
        raise ValueError(f"gain_fall must be in [0, 1], got {gain_fall}")
    check_images(x)
    if any(is_neuron(module) for module in twin.modules()):
        raise ValueError(
            "twin must be a network of ReLUs, got one of spiking neurons; train it with "
            "--neuron relu --T 1, or with nn.ReLU in their place"
        )
    model = copy.deepcopy(twin)
    if not isinstance(model, SpikingClassifier):
        model = SpikingClassifier(model, 1, mean=mean, std=std, takes="steps")
    elif mean is not None or std is not None:
        raise ValueError("mean and std are for a bare network, got a classifier; omit them")
    with torch.no_grad(), full_precision(x.device), preserved(model):
        traced = _Traced(model, x)
    gains = torch.ones(T)  # the first layer's
    with torch.no_grad():
        for node in traced.relus():
            scale = traced.scale(node, quantile, per_channel=per_channel)
            traced.replace(node, scale, gains)
            gains = 1.0 + gain_fall * torch.linspace(1.0, -1.0, T) * (T > 1)
    net = traced.network(T)
    takes = None if isinstance(net, DirectlyEncoded) else model.takes
    encoder = model.encoder
    return SpikingClassifier(net, T, encoder, mean=model.mean, std=model.std, takes=takes).eval()


class Rescale(nn.Module):
    """A scale per channel, beside a neuron whose neighbours cannot hold it.

    Equation: ``x * scale``; shapes [T, N, C, *] or [N, C, *] as ``scale`` [C, 1, ...].
    """

    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        """Keep the scale; see the class."""
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """Scaled."""
        return x * self.scale


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = isinstance(m, ClippedReLU) or type(m).__module__.startswith("spikingjelly")
        return own or super().is_leaf_module(m, module_qualified_name)


class _Traced:
    """The operations of a network of ReLUs, and the values that images give them."""

    def __init__(self, model: SpikingClassifier, x: Tensor) -> None:
        self.net = model.net
        given: list[Tensor] = []
        hook = self.net.register_forward_pre_hook(lambda module, args: given.append(args[0]))
        model(x)
        hook.remove()
        frames = given[0]
        self.root = self.net
        if isinstance(self.net, DirectlyEncoded):
            parts = OrderedDict(first=self.net.first, stages=self.net.stages)
            self.root = nn.Sequential(parts)
            frames = frames.unsqueeze(0)
        self.modules = dict(self.root.named_modules())
        self.multi_step = any(step_mode(module, "s") == "m" for module in self.modules.values())
        self.graph = _graph_of(self.root)
        recorder = fx.Interpreter(self.root, garbage_collect_values=False, graph=self.graph)
        recorder.run(frames)
        self.values: dict[Node, Any] = recorder.env
        self.calls = Counter(
            str(node.target) for node in self.graph.nodes if node.op == "call_module"
        )
        self.rewritten = False
        self._check()

    def relus(self) -> list[Node]:
        """Every call of a ReLU, in order."""
        return [node for node in self.graph.nodes if self._is_relu(node)]

    def _is_relu(self, node: Node) -> bool:
        if node.op == "call_module":
            return isinstance(self.modules[str(node.target)], (nn.ReLU, ClippedReLU))
        return node.op in CALLS and _name(node) == "relu"

    def _check(self) -> None:
        """Refuse what is neither linear nor a ReLU."""
        if not self.relus():
            raise ValueError(
                "twin must be a network of ReLUs, got one without; pass the network "
                "that --neuron relu trains, or one with nn.ReLU"
            )
        images = {next(iter(self.graph.nodes))}
        for node in self.graph.nodes:
            inputs = [one for one in _inputs(node) if one in images]
            if not inputs:
                continue
            if _name(node) not in ("size", "dim", "getattr"):
                images.add(node)
            if self._is_relu(node) or node.op == "output":
                continue
            if node.op == "call_module":
                linear = isinstance(
                    self.modules[str(node.target)], (*PASSING, *CONVOLUTIONS, *NORMS, nn.Linear)
                )
                what = f"{node.target} ({type(self.modules[str(node.target)]).__name__})"
            else:
                linear = _name(node) in LINEAR_CALLS
                linear |= _name(node) in PRODUCTS and len(inputs) == 1
                what = f"torch's {_name(node)}"
            if not linear:
                raise ValueError(
                    f"twin must be linear between its ReLUs, got {what}, which counts of spikes do "
                    "not keep; train it with average pooling, batch norm and ReLU"
                )

    def scale(self, node: Node, quantile: float, *, per_channel: bool) -> Tensor:
        """What becomes one spike per step, [C]."""
        activation = self.modules.get(str(node.target))
        if isinstance(activation, ClippedReLU):
            return activation.threshold.clone()
        by_channel = self.values[node].movedim(self._channel, 0).flatten(1)
        of_layer = _quantile(by_channel.flatten(), quantile)
        if not per_channel:
            return of_layer.expand(len(by_channel)).clone()
        return torch.stack([_quantile(channel, quantile, of_layer) for channel in by_channel])

    @property
    def _channel(self) -> int:
        """Dimension of the channels."""
        return 2 if self.multi_step else 1

    def replace(self, node: Node, scale: Tensor, gains: Tensor) -> None:
        """A spiking neuron with these gains in place of a ReLU, with its scale in its neighbours or
        beside it.
        """
        shape = (-1, *[1] * (self.values[node].ndim - self._channel - 1))
        mode = "m" if self.multi_step else "s"
        like = self.values[node]
        neuron = DLIFNode(len(gains), tau=math.inf, v_reset=None, v_init=0.5, step_mode=mode)
        neuron.input_gain.copy_(gains)
        neuron.to(like)
        parts: list[nn.Module] = [neuron]
        if not self._scaled_before(node, 1.0 / scale):
            parts.insert(0, Rescale((1.0 / scale).view(shape)))
        if not self._scaled_behind(node, scale):
            parts.append(Rescale(scale.view(shape)))
        self._put(node, parts[0] if len(parts) == 1 else nn.Sequential(*parts))

    def _put(self, node: Node, spiking: nn.Module) -> None:
        name = str(node.target)
        if node.op != "call_module" or self.calls[name] > 1:  # a call of its own gets its module
            name = f"spiking_{node.name}"
            self.root.add_module(name, spiking)
            with self.graph.inserting_after(node):
                called = self.graph.call_module(name, node.args[:1])
            node.replace_all_uses_with(called)
            self.graph.erase_node(node)
            self.rewritten = True
            return
        owner, _, attribute = name.rpartition(".")
        setattr(self.root.get_submodule(owner), attribute, spiking)

    def _scaled_before(self, node: Node, scale: Tensor) -> bool:
        """Whether the module before a ReLU could take the scale."""
        producer = _inputs(node)[0]
        module: Any = self._own_module(producer)
        if module is None or len(producer.users) > 1 or getattr(module, "weight", None) is None:
            return False
        if not isinstance(module, (*CONVOLUTIONS, *NORMS, nn.Linear)):
            return False
        if module.bias is not None:
            module.bias *= scale
        module.weight *= scale.view(-1, *[1] * (module.weight.ndim - 1))
        return True

    def _scaled_behind(self, node: Node, scale: Tensor) -> bool:
        """Whether the modules behind a ReLU could take the scale."""
        weights = []
        waiting = list(node.users)
        while waiting:
            user = waiting.pop()
            module: Any = self._own_module(user)
            passes = _name(user) in PASSING_CALLS and len(_inputs(user)) == 1
            if isinstance(module, PASSING) or (user.op in CALLS and passes):
                waiting.extend(user.users)
                continue
            if not isinstance(module, (*CONVOLUTIONS, nn.Linear)):
                return False
            given = self.values[_inputs(user)[0]]
            if isinstance(module, nn.Linear):
                flat = given.ndim == self._channel + 1 and given.shape[-1] % len(scale) == 0
                factor = scale.repeat_interleave(given.shape[-1] // len(scale))
            else:
                flat = module.groups == 1
                factor = scale.view(-1, *[1] * (module.weight.ndim - 2))
            if not flat:
                return False
            weights.append((module.weight, factor))
        for weight, factor in weights:
            weight *= factor
        return bool(weights)

    def _own_module(self, node: Node) -> nn.Module | None:
        """The module that a node calls, if nothing else calls it."""
        if node.op != "call_module" or self.calls[str(node.target)] > 1:
            return None
        module: nn.Module = self.modules[str(node.target)]
        return module

    def network(self, T: int) -> nn.Module:
        """The network with its neurons."""
        if isinstance(self.net, DirectlyEncoded):
            self.net.T = T
        net = fx.GraphModule(self.root, self.graph) if self.rewritten else self.net
        invalidate_reset_cache(net)
        return net


CALLS = ("call_function", "call_method")


def _name(node: Node) -> str:
    """Name of what a node calls, of an operation in place as of the other."""
    name = getattr(node.target, "__name__", str(node.target))
    return name.removesuffix("_") if node.op in CALLS else name


def _inputs(node: Node) -> list[Node]:
    """What a node is called with, as often as it is."""
    found: list[Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


def _graph_of(root: nn.Module) -> fx.Graph:
    try:
        return _Tracer().trace(root)
    except (fx.proxy.TraceError, TypeError) as error:
        raise ValueError(
            f"twin must have a forward that torch.fx can trace, got {type(root).__name__}, whose "
            f"forward decides by values or shapes ({error}); write it without such decisions"
        ) from error


def _quantile(values: Tensor, quantile: float, otherwise: Tensor | None = None) -> Tensor:
    """Quantile of the positive values, of at most ten million; 1 or ``otherwise`` if none is."""
    positive = values[values > 0]
    if len(positive) == 0:
        return torch.ones_like(values[0]) if otherwise is None else otherwise
    few = positive[:: 1 + len(positive) // 10_000_000]
    return torch.quantile(few.float(), quantile).to(values)
