"""A spiking network as a pure function from images or event frames to logits."""

import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from sj_robust.core.broadcast import along
from sj_robust.core.checks import (
    Channels,
    check_channels,
    check_generator,
    check_network,
    check_steps,
    check_values,
)
from sj_robust.core.convention import (
    TAKES,
    Convention,
    Takes,
    checked_logits,
    find_convention,
    own_steps,
    step_mode_of,
)
from sj_robust.core.environment import device_of
from sj_robust.core.host import (
    EVAL_MODE_HAS_NO_GRADIENT,
    base,
    functional,
    is_neuron,
    neuron,
    step_mode,
)
from sj_robust.core.preserved import from_reset, one_thread_at_a_time, preserved
from sj_robust.neuron import DLIFNode, replace_neurons

__all__ = ["PoissonEncoder", "SpikingClassifier", "SpikingEventClassifier"]

_OF_FRAMES: tuple[Takes, ...] = ("sequence", "steps")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_MAXIMA = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_AVERAGES = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_OF_FIXED_RANK = _CONVOLUTIONS + _TRANSPOSED + _NORMS + _MAXIMA + _AVERAGES


class SpikingClassifier(nn.Module):
    """A map from images in [0, 1] to logits; the same images give the same logits, whatever ran
    before. 图像到输出的纯函数。

    Equation: ``logits = mean_t net(encode(images))[t]`` after ``functional.reset_net(net)``.

    Every forward resets the network first, so any attack library, training loop or evaluation can
    treat it as a plain ``nn.Module``. On SpikingJelly 0.0.0.0.14, whose IF and LIF neurons have no
    gradient in evaluation mode, the neurons (and nothing else) run in training mode while gradients
    are enabled.

    Shapes: images [N, C, H, W] or features [N, F], floating point; logits [N, classes] in float32
    or float64. The network takes a sequence [T, N, C, H, W], one step [N, C, H, W] at a time, or
    images [N, C, H, W] that it repeats over time itself. It returns [T, N, classes] (averaged
    here), [N, classes] per step, or [N, classes] if it does the averaging itself. The first
    forward, or :meth:`find_convention`, finds by trial which input it takes, and :attr:`convention`
    shows the result. The output is checked in every forward, so it may differ between training and
    evaluation.

    Args:
        net: A SpikingJelly network with any neurons.
        T: Number of time steps; None for a network that repeats its images itself, which has its
            own.
        encoder: Turns images into the frame of one step, and is called T times, such as
            :class:`PoissonEncoder` or an encoder of SpikingJelly; None repeats the image (direct
            encoding).
        mean: Mean per channel subtracted from the frames: a sequence, a tensor, or one number for
            all channels.
        std: Standard deviation per channel by which the frames are divided.
        takes: What the network is called with: ``"sequence"``, ``"steps"`` or ``"images"``; None
            finds out.

    Raises:
        TypeError: If ``net`` is not a network, T is not an integer, mean or std are not numbers, or
            the images are not floating point.
        ValueError: If an argument, the shape of the images or of the network's output does not fit,
            images and weights differ in device or dtype, the network does not run T steps, or it
            keeps a state that is not reset.

    Source: direct encoding and rate decoding of Ding et al. (ICML 2024), section 5.

    Examples:
        >>> from sj_robust.neuron import DLIFNode
        >>> net = nn.Sequential(nn.Linear(3, 2, bias=False), DLIFNode(T=4))
        >>> SpikingClassifier(net, T=4)(torch.rand(5, 3)).shape
        torch.Size([5, 2])
    """

    T: int
    """Number of time steps; if only the network knows it, this is not set before the first forward.
    """

    mean: Tensor | None
    std: Tensor | None

    takes: Takes | None = None
    _T_is_its_own = False
    _found: tuple[object, Convention] | None = None
    resets_itself: ClassVar[bool] = True
    """Tells attacks that no state is carried from one forward into the next."""

    def __init__(
        self,
        net: nn.Module,
        T: int | None = None,
        encoder: Callable[[Tensor], Tensor] | None = None,
        *,
        mean: Channels = None,
        std: Channels = None,
        takes: Takes | None = None,
    ) -> None:
        """Wrap a network; see the class."""
        super().__init__()
        T = check_steps(T)
        check_network(net)
        if isinstance(net, SpikingClassifier):
            got = type(net).__name__
            raise ValueError(
                f"net must be a bare network, got a {got}; use it directly, or pass its .net"
            )
        if isinstance(net, nn.DataParallel):
            raise ValueError(
                "net must not be in nn.DataParallel, whose copies lose the neurons' states; pass "
                "the bare network, and use torch.nn.parallel.DistributedDataParallel (torchrun "
                "or accelerate launch) for several devices"
            )
        self.net = net
        self._T_is_its_own = T is None
        steps = own_steps(net) if T is None else T
        if steps is not None:
            self.T = steps
        self.encoder = encoder
        if takes is not None and takes not in self._possible:
            raise ValueError(
                f"takes must be one of {', '.join(map(repr, self._possible))} here or None, got "
                f"{takes!r}; None detects it automatically"
            )
        self.takes = takes
        means = check_channels("mean", mean)
        deviations = check_channels("std", std, positive=True)
        self.register_buffer("mean", None if means is None else torch.tensor(means))
        self.register_buffer("std", None if deviations is None else torch.tensor(deviations))
        for name, module in net.named_modules():
            if T is not None and isinstance(module, DLIFNode) and module.T > T:
                warnings.warn(
                    f"{type(self).__name__} runs T={T} of the T={module.T} time steps that the "
                    f"DLIF neuron {name!r} has gains for; use T={module.T}, or call "
                    f"sj_robust.models.set_time_steps(net, {T}) first if this is intended",
                    stacklevel=2,
                )
                break

    @one_thread_at_a_time
    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes] of images [N, C, H, W] or features [N, F]."""
        self._check(images)
        functional.reset_net(self.net)
        try:
            convention = self._convention_for(images)
            with _differentiable(self.net):
                outputs = self._run(images, convention)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            self._raise_for_usual_mistake(error, images)
            raise
        return self._logits(outputs, len(images), convention)

    @property
    def convention(self) -> Convention | None:
        """The input and output conventions found for the network; None before the first forward."""
        return None if self._found is None else self._found[1]

    def find_convention(self, images: Tensor, *, again: bool = True) -> Convention:
        """Find out by a few small forwards how the network is called, as the first forward does.

        The network is left as it was. Only the shape, dtype and device of the images matter. With
        ``again``, a network that brings its own time steps is asked even if it is known how it is
        called, since their number may have been changed.
        """
        self._check(images)
        found = self.convention
        brings_steps = found is not None and found.takes == "images"
        if again and brings_steps and not torch.compiler.is_compiling():
            self.forget_convention()
        try:
            return self._convention_for(images)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            self._raise_for_usual_mistake(error, images)
            raise

    def forget_convention(self) -> None:
        """Let the next forward find out anew how the network is called."""
        self._found = None

    def quicker(self) -> "SpikingClassifier | None":
        """A copy whose IF, LIF and PLIF neurons run on DLIF's kernels; None if the network has no
        such neurons, runs them step by step, is itself one or shares parts with its copies.
        更快的等价副本。

        Its logits equal those of the network up to rounding, which can change a spike. It is meant
        for attacks.

        Examples:
            >>> net = nn.Sequential(nn.Flatten(2), nn.Linear(4, 3), neuron.LIFNode(step_mode="m"))
            >>> SpikingClassifier(net, T=2).quicker().net[2].T
            2
        """
        neurons = [module for module in self.net.modules() if is_neuron(module)]
        multi_step = all(step_mode(node) == "m" for node in neurons)
        if not neurons or self.net in neurons or not multi_step or "T" not in vars(self):
            return None
        duplicate = copy.deepcopy(self)
        if set(duplicate.net.modules()) & set(self.net.modules()):  # its copies share parts with it
            return None
        return duplicate if replace_neurons(duplicate.net, self.T).replaced else None

    def __deepcopy__(self, memo: dict[int, Any]) -> "SpikingClassifier":
        """A copy; the network that is copied is left reset."""
        # States of the last forward may belong to a graph, which cannot be copied; the next forward
        # resets them anyway.
        functional.reset_net(self.net)
        duplicate = type(self).__new__(type(self))
        memo[id(self)] = duplicate
        duplicate.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return duplicate

    def _raise_for_usual_mistake(self, error: Exception, images: Tensor) -> None:
        """Raise what a failed forward comes from, if it is one of the usual mistakes."""
        weights = self.net.parameters()
        weight = next((value for value in weights if value.is_floating_point()), None)
        if weight is not None and weight.device != images.device:
            raise ValueError(
                f"images and network must be on the same device, got images on {images.device} and "
                f"weights on {weight.device}; move both with .to(device)"
            ) from error
        if (
            weight is not None
            and weight.dtype != images.dtype
            and not torch.is_autocast_enabled(images.device.type)
        ):
            raise ValueError(
                f"images and network must have the same dtype, got {images.dtype} images and "
                f"{weight.dtype} weights; convert the images with images.to({weight.dtype})"
            ) from error
        if (
            isinstance(self.mean, Tensor)
            and images.ndim == 4
            and len(self.mean) not in (1, images.shape[1])
        ):
            raise ValueError(
                f"mean and std must have one value per channel, got {len(self.mean)} for images "
                f"of shape {tuple(images.shape)} (channels: {images.shape[1]}); give one value "
                "per channel, or one for all"
            ) from error
        T = vars(self).get("T", 0)
        for name, module in self.net.named_modules():
            if isinstance(module, DLIFNode) and module.T < T:
                raise RuntimeError(
                    f"SpikingClassifier runs T={T} time steps, but the DLIF neuron {name!r} "
                    f"has T={module.T}; use SpikingClassifier(net, T={module.T}), or "
                    f"sj_robust.models.set_time_steps(classifier, {T})"
                ) from error
        foreign = [
            name for name, module in _without_containers(self.net) if _needs_step_mode(module)
        ]
        multi_step = self.takes in (None, "sequence") and step_mode_of(self.net) == "m"
        if T and multi_step and foreign and not isinstance(error, ValueError):
            error.add_note(
                f"The network got a sequence [T, N, ...] = {(T, *images.shape)}. Layers "
                f"{', '.join(foreign[:3])} are from torch.nn and accept no time dimension: use "
                "spikingjelly.activation_based.layer (layer.Conv2d, layer.Flatten, ...) and "
                "functional.set_step_mode(net, 'm'), or step mode 's' for the whole network."
            )

    def extra_repr(self) -> str:
        """Parameters shown by ``print``."""
        if self.convention is not None:
            return str(self.convention)
        return f"T={vars(self).get('T')}, takes={self.takes or 'found by the first forward'}"

    def _check(self, images: Tensor) -> None:
        self._check_shape(images)
        if not images.is_floating_point():
            raise TypeError(
                f"images must be floating point, got {images.dtype}; scale bytes with "
                "images.float() / 255"
            )

    def _check_shape(self, images: Tensor) -> None:
        if images.ndim not in (2, 4):
            raise ValueError(
                "images must be [N, C, H, W] (or [N, F] for features), got shape "
                f"{tuple(images.shape)}; add the batch dimension with images.unsqueeze(0), or "
                "pass event frames to SpikingEventClassifier"
            )

    def _convention_for(self, images: Tensor) -> Convention:
        """How the network is called; tried once per step mode, number of steps and kind of
        images.
        """
        T = own_steps(self.net) if self._T_is_its_own else self.T
        key = (step_mode_of(self.net), T, images.ndim)
        if self._found is not None and self._found[0] == key:
            return self._found[1]
        if torch.compiler.is_compiling():  # which follows no trial
            if self.takes is None or T is None:
                raise RuntimeError(
                    "how the network is called must be known before torch.compile; call "
                    "classifier.find_convention(images) once, or pass T and takes"
                )
            return Convention(self.takes, "logits", T)
        given = None if self._T_is_its_own else self.T
        find = partial(find_convention, self.net, self._frames_of_random_images(images), given)
        if "torch._dynamo" in sys.modules:  # else nothing compiles a trial
            find = torch.compiler.disable(find)  # type: ignore[no-untyped-call]  # torch's own
        try:
            takes = self._possible if self.takes is None else (self.takes,)
            convention = find(takes=takes)
        except Exception as error:
            self._check_encoder(images, T)
            if "images" not in self._possible:
                self._refuse_images(find, error)
            raise
        self._found = key, convention
        self.T = convention.T
        return convention

    @property
    def _possible(self) -> tuple[Takes, ...]:
        """What the network may be called with."""
        return TAKES if self.encoder is None else _OF_FRAMES

    def _check_encoder(self, images: Tensor, T: int | None) -> None:
        """Say so, if it is the encoder that fails."""
        if self.encoder is None or T is None:
            return
        try:
            self._frames_of_random_images(images)(1, T)
        except RuntimeError as error:
            raise ValueError(f"the encoder cannot make T={T} frames: {error}") from error

    def _refuse_images(self, find: Callable[..., Convention], error: Exception) -> None:
        """Say so, if a network that gets frames repeats images itself."""
        try:
            found = find(takes=("images",))
        except Exception:  # it is something else
            return
        raise ValueError(
            f"net must take frames [T, N, C, H, W], got one that {found}; build it so that it does "
            "not repeat its input over time"
        ) from error

    def _frames_of_random_images(self, images: Tensor) -> Callable[[int, int], Tensor]:
        """Gives frames [T, N, *] for a number of random images N and of steps T."""

        def frames(n: int, steps: int) -> Tensor:
            # of numpy, since vmap refuses torch's
            drawn = np.random.default_rng(n).random((n, *images.shape[1:]))
            x = torch.from_numpy(drawn).to(images)
            with preserved(self.encoder, "all"), from_reset(self.encoder, 0, images.device):
                return self._frames(x, steps)

        return frames

    def _frames(self, images: Tensor, steps: int) -> Tensor:
        """What the network gets in every step, [T, N, *]."""
        if self.encoder is None:
            frame = self._normalise(images, channel_dim=1)
            return frame.expand(steps, *frame.shape)
        if isinstance(self.encoder, nn.Module):
            functional.reset_net(self.encoder)
        frames = torch.stack([self.encoder(images) for _ in range(steps)])
        return self._normalise(frames, channel_dim=2)

    def _run(self, images: Tensor, convention: Convention) -> object:
        """What the network returns; a list for single steps."""
        if convention.takes == "images":
            return self.net(self._normalise(images, channel_dim=1))
        frames = self._frames(images, convention.T)
        if convention.takes == "sequence":
            return self.net(frames)
        return [self.net(frame) for frame in frames]

    def _logits(self, outputs: object, images: int, convention: Convention) -> Tensor:
        """Outputs averaged over time, where they still are a sequence."""
        if isinstance(outputs, list) and convention.takes == "steps":
            outputs = torch.stack([checked_logits(output, images) for output in outputs])
        logits = checked_logits(outputs, images, convention.T)
        return logits if logits.dtype == torch.float64 else logits.float()

    def _normalise(self, frames: Tensor, channel_dim: int) -> Tensor:
        if self.mean is not None:
            mean = self.mean.to(frames.dtype)
            frames = frames - along(mean, channel_dim, frames.ndim)
        if self.std is not None:
            std = self.std.to(frames.dtype)
            frames = frames / along(std, channel_dim, frames.ndim)
        return frames


class SpikingEventClassifier(SpikingClassifier):
    """A map from event frames to logits; the same frames give the same logits, whatever ran before.
    事件帧到输出的纯函数。

    Equation: ``logits = mean_t net(frames)[t]`` after ``functional.reset_net(net)``.

    The sample dimension of the frames comes first, [N, T, C, H, W], as a loader of SpikingJelly's
    event data sets stacks them and as every attack and evaluation expects its samples. The network
    gets [T, N, C, H, W], as always in SpikingJelly: the two dimensions are exchanged here and
    nowhere else. For frames stored as [T, N, C, H, W], pass ``frames.transpose(0, 1)``.

    Everything else is as in :class:`SpikingClassifier`; frames are neither encoded nor normalised.

    Args:
        net: A SpikingJelly network with any neurons that takes [T, N, C, H, W] (step mode ``"m"``)
            or [N, C, H, W] once per step (step mode ``"s"``).
        T: Number of frames per sample.
        takes: What the network is called with: ``"sequence"`` or ``"steps"``; None finds out.

    Raises:
        ValueError: If an argument, the shape of the frames or the network's output does not fit, or
            the network itself repeats its input over time.

    Source: frames of events as in ``spikingjelly.datasets`` (``data_type="frame"``); rate decoding
        of Ding et al. (ICML 2024), section 5.

    Examples:
        >>> from sj_robust.neuron import DLIFNode
        >>> net = nn.Sequential(nn.Flatten(2), nn.Linear(2 * 6 * 6, 3), DLIFNode(T=4))
        >>> SpikingEventClassifier(net, T=4)(torch.randint(2, (5, 4, 2, 6, 6)).float()).shape
        torch.Size([5, 3])
    """

    def __init__(self, net: nn.Module, T: int, *, takes: Takes | None = None) -> None:
        """Wrap a network; see the class."""
        super().__init__(net, T, takes=takes)

    def _check_shape(self, images: Tensor) -> None:
        if images.ndim != 5:
            raise ValueError(
                f"frames must be [N, T, C, H, W], got shape {tuple(images.shape)}; add the batch "
                "dimension with frames.unsqueeze(0), or pass images to SpikingClassifier"
            )
        if images.shape[1] != self.T:
            hint = "; use frames.transpose(0, 1)" if images.shape[0] == self.T else ""
            raise ValueError(
                f"frames must be [N, T, C, H, W] with T = {self.T}, got shape "
                f"{tuple(images.shape)}: {images.shape[1]} frames per sample{hint}"
            )

    @property
    def _possible(self) -> tuple[Takes, ...]:
        return _OF_FRAMES

    def _frames(self, images: Tensor, steps: int) -> Tensor:
        return images.transpose(0, 1).contiguous()


class PoissonEncoder(nn.Module):
    """Rate coding: a pixel of intensity x spikes with probability x, with a straight-through
    gradient.

    Equation: ``s = 1 if u <= x else 0`` with u uniform in [0, 1]; the backward pass uses ds/dx = 1,
    so that attacks see the mean of the encoding.

    Args:
        generator: Source of u; None uses torch's global generator.

    Source: Poisson encoding as in SpikingJelly's ``encoding.PoissonEncoder``, with the gradient of
        its expectation.

    Examples:
        >>> PoissonEncoder(torch.Generator().manual_seed(0))(torch.tensor([0.0, 0.5, 1.0]))
        tensor([0., 0., 1.])
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        """Keep the generator."""
        super().__init__()
        check_generator(generator)
        self.generator = generator

    def forward(self, images: Tensor) -> Tensor:
        """Spikes of one time step, in the shape and dtype of ``images``."""
        # torch.rand with generator=None does not compile for shapes that change
        uniform = images.new_empty(images.shape).uniform_(generator=self.generator)
        spikes = (uniform <= images).to(images.dtype)
        return spikes + (images - images.detach()) if images.requires_grad else spikes


def as_classifier(
    net: nn.Module,
    T: int | None = None,
    *,
    mean: Channels = None,
    std: Channels = None,
    images: Tensor | None = None,
) -> nn.Module:
    """A network as a function of images: a bare SpikingJelly network gets its classifier.
    把任意网络变为图像的函数。

    Args:
        net: A bare network of SpikingJelly neurons; or what takes images already, a
            :class:`SpikingClassifier` or a network without spiking neurons, which is returned as it
            is.
        T: Number of time steps, for a bare network; None if it repeats its images itself.
        mean: Mean per channel that a bare network expects to be subtracted from images in [0, 1].
        std: Standard deviation per channel that it expects them to be divided by.
        images: What it will get, images or event frames [N, T, C, H, W], by which it is found out
            at once how it is called; None leaves that to the first forward.

    Raises:
        TypeError: If ``net`` is not a network, or T no integer.
        ValueError: If T is missing, T, mean or std are given for a classifier, which has its own,
            the network is on the device ``meta``, or it cannot be found out how it is called.
    """
    check_network(net)
    check_values(net)
    if isinstance(net, SpikingClassifier):
        T = check_steps(T)
        if T is not None and vars(net).get("T", T) != T:
            raise ValueError(
                f"T must be the classifier's {net.T} or None, got {T}; build a classifier for "
                "another T"
            )
        if mean is not None or std is not None:
            raise ValueError(
                "a SpikingClassifier has its own mean and std; omit them, or pass the bare network"
            )
        _find_convention_once(net, images)
        return net
    if isinstance(getattr(net, "_orig_mod", None), SpikingClassifier):
        raise ValueError(
            "the network must be given before torch.compile, got a compiled SpikingClassifier; "
            "give the classifier that was compiled"
        )
    frames = images is not None and images.ndim == 5
    normalised = mean is not None or std is not None
    spiking = any(map(is_neuron, net.modules()))
    if T is None and not normalised and not spiking:
        return net
    made: SpikingClassifier
    if frames and normalised:
        raise ValueError("event frames are not normalised; omit mean and std")
    if images is not None and frames:
        made = SpikingEventClassifier(net, images.shape[1] if T is None else T)
    else:
        steps = 1 if T is None and not spiking else T
        made = SpikingClassifier(net, steps, mean=mean, std=std)
    made.training = net.training
    made = made.to(device_of(net))
    _find_convention_once(made, images)
    return made


def _find_convention_once(classifier: SpikingClassifier, images: Tensor | None) -> None:
    """Find out how the network is called, if there are images that it can take."""
    weight = next(classifier.net.parameters(), None)
    if not isinstance(images, Tensor) or not images.is_floating_point() or not len(images):
        return  # which the call itself is about to refuse
    if weight is None or weight.dtype == images.dtype:
        classifier.find_convention(images[:1].to(device_of(classifier)))


def check_classifier(model: object) -> SpikingClassifier:
    """The model, if it is a :class:`SpikingClassifier`; else TypeError. 检查参数是否为
    SpikingClassifier。
    """
    if not isinstance(model, SpikingClassifier):
        got = type(model).__name__
        raise TypeError(
            f"model must be a SpikingClassifier, got {got}; wrap the network: "
            "SpikingClassifier(net, T=4)"
        )
    return model


def _without_containers(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules by name, except for those in a container of SpikingJelly that takes the time
    dimension from them.
    """
    yield name, module
    if isinstance(module, base.MultiStepModule):
        return
    for child_name, child in module.named_children():
        yield from _without_containers(child, f"{name}.{child_name}" if name else child_name)


def _needs_step_mode(module: nn.Module) -> bool:
    """Whether a module of plain torch takes no time dimension, where one of SpikingJelly's layers
    would.
    """
    if isinstance(module, nn.Flatten):
        return module.start_dim == 1 and not isinstance(module, base.StepModule)
    return isinstance(module, _OF_FIXED_RANK) and not isinstance(module, base.StepModule)


@contextmanager
def _differentiable(net: nn.Module) -> Iterator[None]:
    """Neurons in a mode that has a gradient, if one may be wanted; their modes restored
    afterwards.
    """
    neurons: list[nn.Module] = []
    if EVAL_MODE_HAS_NO_GRADIENT and torch.is_grad_enabled():
        nodes = [m for m in net.modules() if isinstance(m, neuron.BaseNode)]
        neurons = [node for node in nodes if not node.training]
    for module in neurons:
        module.training = True
    try:
        yield
    finally:
        for module in neurons:
            module.training = False
