"""Networks by name, as described in checkpoints."""

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sj_robust.classifier import PoissonEncoder, SpikingClassifier, SpikingEventClassifier
from sj_robust.core.checks import check_choice, check_tau
from sj_robust.core.convention import Takes
from sj_robust.core.digest import fingerprint
from sj_robust.core.environment import CODE_KEY, machine
from sj_robust.core.host import is_neuron
from sj_robust.core.preserved import full_precision, preserved, seeded_network
from sj_robust.defences import (
    ClippedReLU,
    EvolvingLeakNode,
    FrequencyEncoder,
    HomeostaticNode,
    NoisyLIFNode,
    OrthogonalEncoder,
    SmoothingEncoder,
    StochasticGate,
)
from sj_robust.models.chain import VGG, VGG_FEATURES, FullyConnected, SmallConvNet
from sj_robust.models.foreign import call_with_known, find_function
from sj_robust.models.wide_resnet import WIDE_RESNETS, WideResNet
from sj_robust.models.zoo import build_zoo_network
from sj_robust.neuron import DLIFNode, Stage, fuse, replace_neurons

__all__ = [
    "NETWORKS",
    "EncoderName",
    "NetworkSpec",
    "build_classifier",
    "build_encoder",
    "build_network",
    "code_of",
    "options_for_lif",
]

EncoderName = Literal["direct", "poisson", "feel", "rsc", "stod"]
"""Names of the encoders of images."""

NeuronName = Literal[
    "dlif", "lif", "if", "plif", "relu", "clipped_relu", "tgo", "feel", "hosnn", "stog"
]
"""Names of the neurons."""

_WITHOUT_SPIKES: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "clipped_relu": ClippedReLU}

NETWORKS = ("small", "mlp", *VGG_FEATURES, *WIDE_RESNETS)
"""Names of the architectures of this package."""


@dataclass(frozen=True)
class NetworkSpec:
    """Everything :func:`build_network` needs, in plain types. 构建网络所需的全部参数。

    Attributes:
        name: ``"small"`` or ``"mlp"``; ``"vgg5"``, ``"vgg11"``, ``"vgg13"``, ``"vgg16"`` or
            ``"vgg19"``; ``"wrn16_4"`` or ``"wrn28_10"``; ``"zoo:NAME"`` for a network of
            SpikingJelly's model zoo (:func:`sj_robust.models.zoo_networks`);
            ``"module:function"`` or ``"file.py:function"`` for a function of your own that returns
            the network, bare or in a ``SpikingClassifier``. It is called with those of
            ``image_shape``, ``classes``, ``T`` and ``spiking_neuron`` (which builds one neuron)
            that are in its signature, and with ``options``.
        neuron: ``"dlif"``, or one of SpikingJelly's ``"lif"`` and ``"plif"``
            (``decay_input=False``, as DLIF with all gains 1) and ``"if"``; all with the triangle
            surrogate and a hard reset to 0; or the neuron of a defence of
            :mod:`sj_robust.defences`: ``"tgo"`` (``NoisyLIFNode``), ``"feel"``
            (``EvolvingLeakNode``), ``"hosnn"`` (``HomeostaticNode``), ``"stog"`` (LIF with a
            ``StochasticGate`` behind it). For T = 1, ``"relu"`` and ``"clipped_relu"``
            (:class:`sj_robust.defences.ClippedReLU`) build an ordinary network instead, as a
            baseline without spikes and for :func:`sj_robust.training.convert`. With ``"dlif"``, the
            IF, LIF and PLIF neurons of your own network or of the model zoo are converted by
            ``replace_neurons``, which keeps their own tau.
        image_shape: (C, H, W) of one image or frame.
        classes: Number of classes.
        T: Number of time steps, or of frames per sample.
        tau: Membrane time constant in steps (unused by ``"if"``); for ``"plif"``, its initial
            value.
        learn_gain: Whether the gains of DLIF are trained; False keeps them at one, which is LIF
            (the same spikes) at the speed of DLIF's kernels.
        channels: Output channels of the convolutions of ``"small"``, widths of ``"mlp"``.
        hidden: Widths of the hidden linear layers of a VGG; for ``"small"``, set them in
            ``options``.
        fused: Whether batch norm and the DLIF neurons that follow it run in one pass where
            possible.
        mean: Mean per channel, subtracted from images in [0, 1] inside the classifier; None for
            none.
        std: Standard deviation per channel by which they are divided; None for none.
        frames: Whether samples are event frames [T, C, H, W] instead of images.
        options: Further keyword arguments of the architecture, as plain data.
        encoder: How an image becomes the frames of the time steps: ``"direct"`` repeats it,
            ``"poisson"`` is :class:`sj_robust.classifier.PoissonEncoder`, ``"feel"``, ``"rsc"``
            and ``"stod"`` are :class:`sj_robust.defences.FrequencyEncoder`,
            :class:`sj_robust.defences.SmoothingEncoder` and
            :class:`sj_robust.defences.OrthogonalEncoder`.
        encoder_options: Keyword arguments of the encoder, as plain data.

    Examples:
        >>> NetworkSpec(neuron="lif", T=8).tau
        100.0
    """

    name: str = "small"
    neuron: NeuronName = "dlif"
    image_shape: tuple[int, int, int] = (1, 8, 8)
    classes: int = 10
    T: int = 4
    tau: float = 100.0
    learn_gain: bool = True
    channels: tuple[int, ...] = (16, 32)
    hidden: tuple[int, ...] = (4096, 4096)
    fused: bool = True
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    frames: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    encoder: EncoderName = "direct"
    encoder_options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_own(self) -> bool:
        """Whether a function of one's own builds it."""
        return ":" in self.name and not self.name.startswith("zoo:")


def build_network(spec: NetworkSpec) -> nn.Module:
    """Build the network of a specification, with random weights from torch's global random state.
    按规格构建网络。

    Args:
        spec: What to build.

    Returns:
        A network in step mode ``"m"``, or your own network in the step mode set by your function.

    Raises:
        ModuleNotFoundError, FileNotFoundError: If your own module or file does not exist.
        ValueError: If the architecture, the neuron or an option is unknown, an argument is out of
            range, or your own function fails or does not return a network.

    Source: networks of Ding et al. (ICML 2024), section 5.

    Examples:
        >>> build_network(NetworkSpec()).T
        4
    """
    built = _built(spec)
    return built.net if isinstance(built, SpikingClassifier) else built


def _built(spec: NetworkSpec) -> nn.Module:
    """The network, or the classifier that a function of the user returns, with the neurons of the
    specification, fused where it asks for that.
    """
    if spec.name not in NETWORKS and ":" not in spec.name:
        raise ValueError(
            f"network must be one of {', '.join(NETWORKS)}, zoo:NAME, module:function or "
            f"file.py:function, got {spec.name!r}"
        )
    node = _neuron(spec)
    from_elsewhere = spec.name not in NETWORKS
    if not from_elsewhere:
        built = _packaged_network(spec, node)
    elif spec.name.startswith("zoo:"):
        built = build_zoo_network(
            spec.name.removeprefix("zoo:"),
            spec.image_shape,
            spec.classes,
            T=spec.T,
            spiking_neuron=node,
            options=spec.options,
        )
    else:
        built = _own_network(spec, node)
    net: nn.Module = built.net if isinstance(built, SpikingClassifier) else built
    if from_elsewhere and spec.neuron == "dlif":
        _convert(net, spec)
    for module in net.modules():
        if isinstance(module, DLIFNode):
            module.input_gain.requires_grad_(spec.learn_gain)
    if from_elsewhere:
        with suppress(_TrialError):
            fuse(net, run=partial(_try, built, spec))
    for module in net.modules():
        if isinstance(module, Stage) and not spec.fused:
            module.one_pass = False
    if any(map(is_lazy, net.parameters())):
        _find_shapes(built, spec)
    return built


class _TrialError(Exception):
    """A network does not run on the images of its specification, so that nothing is fused."""


def _try(built: nn.Module, spec: NetworkSpec) -> None:
    """Run a network from elsewhere once.

    Raises:
        _TrialError: If it fails; its first use will say why.
    """
    like = next(built.parameters(), torch.empty(0))
    try:
        classifier = _wrapped(built, spec)
        with torch.no_grad(), full_precision(like.device), preserved(classifier, "all"):
            classifier(_black(spec).to(like))
    except Exception as error:
        raise _TrialError from error


def _wrapped(built: nn.Module, spec: NetworkSpec, takes: Takes | None = None) -> SpikingClassifier:
    """A network from elsewhere as a classifier without mean, std or encoder."""
    if isinstance(built, SpikingClassifier):
        return built
    kind = SpikingEventClassifier if spec.frames else SpikingClassifier
    return kind(built, spec.T, takes=takes)


def _black(spec: NetworkSpec) -> Tensor:
    """One black image, or a recording without events."""
    steps = (spec.T,) if spec.frames else ()
    return torch.zeros(1, *steps, *spec.image_shape)


@torch.no_grad()
def _find_shapes(built: nn.Module, spec: NetworkSpec) -> None:
    """Run the network once, so that what has one value per neuron finds its shape."""
    images = torch.zeros(1, *spec.image_shape)
    run = built
    if not isinstance(built, SpikingClassifier) and spec.name not in NETWORKS:
        images = _black(spec)
        trial = _wrapped(copy.deepcopy(built), spec).find_convention(images)
        run = _wrapped(built, spec, trial.takes)
    run.eval()(images)
    built.train()
    functional.reset_net(built)


def code_of(spec: NetworkSpec) -> dict[str, str]:
    """What a function of one's own builds from a fixed seed: the digest of the network and of its
    logits on noise, under a name with the machine that they are rounded on; nothing for another
    network. 自定义网络代码的摘要。
    """
    if not spec.is_own:
        return {}
    cpu = torch.device("cpu")
    with seeded_network(None, 0, cpu), torch.no_grad():
        classifier = build_classifier(spec).eval()
        logits = classifier(torch.rand_like(_black(spec)))
    name = f"{CODE_KEY} {machine(cpu)}, torch {torch.__version__}"
    return {name: fingerprint([classifier, logits])}


def build_classifier(spec: NetworkSpec) -> SpikingClassifier:
    """Build the network of a specification as a pure function from images in [0, 1] or event frames
    to logits. 构建分类器。

    The result is a ``SpikingClassifier``, or a ``SpikingEventClassifier`` for frames; a classifier
    returned by your own function is used as it is, with its encoder, mean and std.

    Args:
        spec: What to build; ``mean`` and ``std`` are applied inside, so that attacks see images in
            [0, 1].

    Raises:
        ValueError: As for :func:`build_network`; also if the numbers of means or deviations differ
            from the number of channels, if there are any for frames, or if the encoder is unknown,
            does not accept its options, or is given together with frames or a network that has its
            own.

    Examples:
        >>> import torch
        >>> build_classifier(NetworkSpec(mean=(0.3,), std=(0.2,)))(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    for name, values in (("mean", spec.mean), ("std", spec.std)):
        if values is not None and spec.frames:
            raise ValueError(f"{name} is for images, not for event frames, got {values}; omit it")
        if values is not None and len(values) != spec.image_shape[0]:
            raise ValueError(
                f"{name} must have one value per channel ({spec.image_shape[0]}), got {values}"
            )
    encoder = build_encoder(spec)
    net = _built(spec)
    if encoder is not None and (spec.frames or isinstance(net, SpikingClassifier)):
        raise ValueError(
            f"encoder {spec.encoder!r} is for images of a bare network, got event frames or a "
            "network that comes in a classifier; omit it"
        )
    if isinstance(net, SpikingClassifier):
        return net
    if spec.frames:
        return SpikingEventClassifier(net, spec.T)
    return SpikingClassifier(net, spec.T, encoder, mean=spec.mean, std=spec.std)


def build_encoder(spec: NetworkSpec) -> nn.Module | None:
    """The encoder of a specification; None repeats the image."""
    kinds: dict[str, Callable[..., nn.Module]] = {
        "poisson": PoissonEncoder,
        "feel": FrequencyEncoder,
        "rsc": SmoothingEncoder,
        "stod": partial(OrthogonalEncoder, spec.image_shape, spec.T),
    }
    check_choice("encoder", spec.encoder, get_args(EncoderName))
    if spec.encoder == "direct":
        if spec.encoder_options:
            raise ValueError(
                f"encoder_options belong to an encoder, got {spec.encoder_options} for 'direct'; "
                "omit them"
            )
        return None
    try:
        return kinds[spec.encoder](**spec.encoder_options)
    except TypeError as error:
        raise ValueError(
            f"encoder {spec.encoder!r} cannot be built with {spec.encoder_options} ({error})"
        ) from error


def _neuron(spec: NetworkSpec) -> Callable[..., nn.Module]:
    """A function that builds one neuron of the specification; keywords that it is called with
    replace the settings of the specification.
    """
    check_tau(spec.tau)
    kinds = _spiking_neurons(spec.T, float(spec.tau))
    if spec.neuron in _WITHOUT_SPIKES:
        if spec.T != 1:
            raise ValueError(
                f"T must be 1 for {spec.neuron}, which has no state over time, got {spec.T}"
            )
        return _WITHOUT_SPIKES[spec.neuron]
    if spec.neuron not in kinds:
        raise ValueError(
            f"neuron must be one of {', '.join(get_args(NeuronName))}, got {spec.neuron!r}"
        )
    kind = kinds[spec.neuron]

    def spiking_neuron(**arguments: Any) -> nn.Module:
        settings = {
            "surrogate_function": surrogate.PiecewiseQuadratic(alpha=1.0),  # one for each neuron
            "v_reset": 0.0,
            "step_mode": "s",
        }
        return kind(**settings | arguments)

    return spiking_neuron


def _spiking_neurons(T: int, tau: float) -> dict[str, Callable[..., nn.Module]]:
    """What builds each spiking neuron."""
    return {
        "dlif": partial(DLIFNode, T=T, tau=tau),
        "lif": partial(neuron.LIFNode, tau=tau, decay_input=False),
        "plif": partial(neuron.ParametricLIFNode, init_tau=tau, decay_input=False),
        "if": neuron.IFNode,
        "tgo": partial(NoisyLIFNode, tau=tau),
        "feel": partial(EvolvingLeakNode, T=T, tau=tau),
        "hosnn": partial(HomeostaticNode, T=T, tau=tau),
        "stog": partial(_gated, tau=tau),
    }


def options_for_lif(name: NeuronName, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a network without those arguments of its neuron that a LIF neuron does not have.

    Examples:
        >>> options_for_lif("tgo", {"batch_norm": False, "noise_std": 0.3})
        {'batch_norm': False}
    """
    kinds = _spiking_neurons(1, 2.0)
    if name not in kinds:
        return dict(options)
    own = set(inspect.signature(kinds[name]).parameters)
    own -= set(inspect.signature(kinds["lif"]).parameters)
    return {key: value for key, value in options.items() if key not in own}


def _gated(
    *,
    tau: float,
    step_mode: str,
    temperature: float = 0.5,
    generator: torch.Generator | None = None,
    **arguments: Any,
) -> nn.Module:
    """A LIF neuron, or IF without a leak, with gates behind it."""
    node = neuron.IFNode(step_mode=step_mode, **arguments)
    if not math.isinf(tau):
        node = neuron.LIFNode(tau=tau, decay_input=False, step_mode=step_mode, **arguments)
    gate = StochasticGate(temperature=temperature, generator=generator, step_mode=step_mode)
    return nn.Sequential(node, gate)


def _packaged_network(spec: NetworkSpec, node: Callable[..., nn.Module]) -> nn.Module:
    """One of :data:`NETWORKS`."""
    kind: Callable[..., nn.Module]
    if spec.name == "small":
        kind = partial(SmallConvNet, channels=spec.channels)
    elif spec.name == "mlp":
        kind = partial(FullyConnected, widths=spec.channels)
    elif spec.name in VGG_FEATURES:
        kind = partial(VGG, spec.name, hidden=spec.hidden)
    else:
        depth, widen_factor = WIDE_RESNETS[spec.name]
        kind = partial(WideResNet, depth=depth, widen_factor=widen_factor)
    arguments: dict[str, Any] = {"T": spec.T, "spiking_neuron": node} | spec.options
    try:
        return kind(spec.image_shape, spec.classes, **arguments)
    except (TypeError, AssertionError) as error:
        if not spec.options:
            raise
        said = str(error) or "SpikingJelly requires floats, such as 1.0"
        raise ValueError(
            f"{spec.name} cannot be built with the options {spec.options} ({said}); they are "
            f"keyword arguments of the architecture or of its neurons ({spec.neuron})"
        ) from error


def _own_network(spec: NetworkSpec, node: Callable[..., nn.Module]) -> nn.Module:
    """What a function of the user returns."""
    offered = {
        "image_shape": spec.image_shape,
        "classes": spec.classes,
        "T": spec.T,
        "spiking_neuron": node,
    }
    net = call_with_known(find_function(spec.name), spec.name, offered, spec.options)
    if not isinstance(net, nn.Module):
        raise ValueError(
            f"{spec.name} must return a network (nn.Module), got {type(net).__name__}; return an "
            "instance"
        )
    if isinstance(net, SpikingClassifier) and net.T != spec.T:
        raise ValueError(
            f"{spec.name} returns a classifier with T={net.T}, but T={spec.T} was requested "
            "(--T); use the same"
        )
    return net


def check_has_neuron(net: nn.Module, spec: NetworkSpec) -> None:
    """Raise ValueError if a network of one's own does not have the neuron of its specification.

    A function that does not take ``spiking_neuron`` builds the same neurons whatever is asked for.
    ``"dlif"`` replaces them, ``"lif"`` leaves them as they are, and a ReLU has none.

    Examples:
        >>> own = NetworkSpec("mynet.py:build", neuron="tgo")
        >>> check_has_neuron(nn.Sequential(neuron.LIFNode()), own)
        Traceback (most recent call last):
            ...
        ValueError: mynet.py:build builds LIFNode, not the neuron 'tgo' that was asked for: build \
the neurons with its argument spiking_neuron, or name the neuron that it has
    """
    if not spec.is_own or spec.neuron == "dlif":
        return
    neurons = {type(module) for module in net.modules() if is_neuron(module)}
    if spec.neuron in ("lif", *_WITHOUT_SPIKES):
        has_it = bool(neurons) == (spec.neuron == "lif")
    else:
        asked = StochasticGate if spec.neuron == "stog" else type(_neuron(spec)())
        has_it = asked in map(type, net.modules())
    if not has_it:
        names = ", ".join(sorted(kind.__name__ for kind in neurons)) or "no spiking neuron"
        raise ValueError(
            f"{spec.name} builds {names}, not the neuron {spec.neuron!r} that was asked for: build "
            "the neurons with its argument spiking_neuron, or name the neuron that it has"
        )


def _convert(net: nn.Module, spec: NetworkSpec) -> None:
    """Replace the IF, LIF and PLIF neurons of a network from elsewhere by DLIF neurons."""
    try:
        report = replace_neurons(net, spec.T)
    except ValueError as error:
        raise ValueError(
            f"{spec.name!r} has no neuron that could be DLIF ({error}); name another neuron"
        ) from error
    functional.reset_net(net)
    if not any(isinstance(module, DLIFNode) for module in net.modules()):
        stays = "; ".join(f"{name}: {reason}" for name, reason in report.skipped.items())
        raise ValueError(
            f"{spec.name!r} has no neuron that could be DLIF ({stays}); name another neuron"
        )
