"""What a stress test does: a copy of a network with faulty weights, neurons, spikes or steps, and
images with common corruptions by imagecorruptions (extra ``corruptions``).
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sj_robust.attacks.timing import random_moves
from sj_robust.classifier import SpikingClassifier, SpikingEventClassifier
from sj_robust.core.checks import check_choice
from sj_robust.core.host import base, check_hooks_run, first_argument, is_neuron, quantize
from sj_robust.core.preserved import preserved
from sj_robust.core.randomness import SampleSeeds
from sj_robust.core.threat import ThreatModel
from sj_robust.core.weights import LAYERS
from sj_robust.defences.node import PerNeuron
from sj_robust.models.time_steps import keep_time_steps
from sj_robust.neuron import DLIFNode
from sj_robust.neuron.charging import emits_spikes, has_known_dynamics, read_charging
from sj_robust.ops.recurrence import charge, fire, reset

__all__ = [
    "CORRUPTIONS",
    "FAULTS",
    "Corruption",
    "Fault",
    "corrupted",
    "default_corruptions",
    "default_faults",
    "faulty",
]


@dataclass(frozen=True)
class Fault:
    """One fault of deployment at one level. 一种部署故障及其程度。

    | kind | level | what it does |
    | --- | --- | --- |
    | ``weight_bits`` | bits >= 2 | <= 2^bits - 1 values per output channel, symmetric around 0 |
    | ``stuck_at_zero`` | share | exactly this share of all weights, at random, is 0 |
    | ``stuck_at_largest`` | share | exactly this share of all weights is its layer's largest one |
    | ``threshold_drift`` | spread | every neuron has the threshold times exp(level z), z normal |
    | ``tau_drift`` | spread | every time constant is multiplied by exp(level z), at least 1 |
    | ``lost_spikes`` | probability | a spike is lost, drawn again in every forward |
    | ``added_spikes`` | probability | a silent neuron spikes, drawn again in every forward |
    | ``lost_steps`` | steps | this many of the T time steps, at random, reach no layer |
    | ``first_steps`` | steps | the output is read after this many of the T steps |
    | ``jitter`` | sigma, or frames | normal noise, clamped to [0, 1]; events move by at most this |

    In a transposed convolution, ``weight_bits`` is per input channel.

    Attributes:
        kind: Name of the fault.
        level: Its level, see the table.

    Raises:
        ValueError: If the kind is unknown or the level out of range.

    Examples:
        >>> Fault("stuck_at_zero", 0.05).random, Fault("weight_bits", 4).random
        (True, False)
    """

    kind: str
    level: float

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, FAULTS)
        kind = _KINDS[self.kind]
        number = isinstance(self.level, int | float) and not isinstance(self.level, bool)
        if (
            not number
            or not kind.least <= self.level <= kind.most
            or (kind.whole and self.level % 1 != 0)
        ):
            what = "an integer" if kind.whole else "a number"
            end = "" if kind.most == math.inf else f" and <= {kind.most:g}"
            raise ValueError(
                f"level of {self.kind} must be {what} >= {kind.least:g}{end}, got {self.level!r}"
            )

    @property
    def random(self) -> bool:
        """Whether two draws of it differ."""
        return self.kind not in ("weight_bits", "first_steps")

    @property
    def noisy(self) -> bool:
        """Whether it is drawn again in every forward, so that the network draws random numbers."""
        return self.kind in ("lost_spikes", "added_spikes", "jitter")


def default_faults(model: nn.Module) -> tuple[Fault, ...]:
    """Every kind at its levels of ``FAULTS``, as far as they exist for the T time steps of a
    network. 默认故障。

    Examples:
        >>> net = SpikingClassifier(nn.Sequential(nn.Flatten(2), nn.Linear(4, 3)), T=2)
        >>> [fault.level for fault in default_faults(net) if "steps" in fault.kind]
        [1, 1]
    """
    T = model.T if isinstance(model, SpikingClassifier) else 1
    steps = ("lost_steps", "first_steps")
    levels = dict(FAULTS)
    if not any(_leaks(module) for module in model.modules()):
        levels["tau_drift"] = ()
    for kind in steps:
        levels[kind] = tuple(level for level in FAULTS[kind] if level < T)
    if isinstance(model, SpikingEventClassifier):
        levels["jitter"] = tuple(range(1, min(T, 4)))
    return tuple(Fault(kind, level) for kind in FAULTS for level in levels[kind])


def faulty(model: nn.Module, fault: Fault, *, seed: int = 0, counts: bool = False) -> nn.Module:
    """A copy of a network with a fault; the network itself is not changed. 返回带故障的网络副本。

    With the same seed, what is drawn for a mild level is part of what is drawn for a severe level.

    Args:
        model: The network; faults of steps and jitter need it inside a ``SpikingClassifier``.
        fault: The fault.
        seed: Determines which weights, neurons or steps are affected. Noise comes from torch's
            global generators.
        counts: Whether event frames hold numbers of events, and not 0 or 1, which jitter moves.

    Raises:
        ValueError: If the network has nothing that the fault affects, neurons with unknown
            dynamics, layers that compute their weights, weights for each time step that cannot be
            taken apart, or parts that SpikingJelly's ``memopt`` runs. If its own number of time
            steps cannot be changed, at the latest in the first forward.

    Examples:
        >>> net = nn.Linear(64, 10)
        >>> int((faulty(net, Fault("stuck_at_zero", 0.1)).weight == 0).sum())
        64
    """
    check_hooks_run(model, "a copy with a fault", copied=True)
    with preserved(model):
        damaged = copy.deepcopy(model)
    damage = _KINDS[fault.kind].damage
    if fault.kind == "jitter":
        damage = partial(_jitter, counts=counts)
    with torch.no_grad():
        damage(damaged, fault.level, seed)
    return damaged


def _quantised(model: nn.Module, bits: float, seed: int) -> None:
    """Per output channel, by SpikingJelly's quantiser of [0, 1] on the magnitudes: the sign is one
    of the bits.
    """
    for weight in _weights(model):
        rows = weight.flatten(1)
        largest = rows.abs().amax(1, keepdim=True)
        share = rows.abs() / torch.where(largest > 0, largest, 1.0)
        magnitude = quantize.k_bit_quantize(share, int(bits) - 1)
        coarse = rows.sign() * magnitude * largest
        weight.copy_(coarse.view_as(weight))


def _stuck(model: nn.Module, share: float, seed: int, *, at_zero: bool) -> None:
    weights = _weights(model)
    sizes = [weight.numel() for weight in weights]
    total = sum(sizes)
    order = torch.randperm(total, generator=_generator(seed))
    stuck = torch.zeros(total, dtype=torch.bool)
    stuck[order[: round(share * total)]] = True
    for weight, mask in zip(weights, torch.split(stuck, sizes), strict=True):
        value = 0.0 if at_zero else float(weight.max())
        weight[mask.view_as(weight).to(weight.device)] = value


def _drifting(model: nn.Module, spread: float, seed: int, *, what: str) -> None:
    spiking = _spiking(model)
    if what == "tau" and not any(_leaks(module) for _, module in spiking):
        raise ValueError("a drift of tau needs a neuron that leaks, such as LIF, got none")
    for number, (name, module) in enumerate(spiking):
        if not has_known_dynamics(module):
            raise ValueError(
                f"{what} of {name} ({type(module).__name__}) cannot drift: its dynamics are not "
                "known"
            )
        module.forward = _Drifting(module, what, spread, seed + 2**20 * (number + 1))


class _Drifting:
    """Forward of a neuron whose elements have thresholds or time constants of their own."""

    def __init__(self, module: Any, what: str, spread: float, seed: int) -> None:
        self.module, self.what, self.spread, self.seed = module, what, spread, seed
        self.factor = torch.empty(0)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Spikes [T, N, *], in step mode "s" [N, *]; moves the state on."""
        module = self.module
        x: Tensor = first_argument(args, kwargs)
        x_seq = x if module.step_mode == "m" else x.unsqueeze(0)
        if self.factor.shape != x_seq.shape[2:] or self.factor.device != x.device:
            normal = torch.randn(
                x_seq.shape[2:], generator=_generator(self.seed), dtype=torch.float64
            )
            self.factor = (self.spread * normal).exp().to(x)
        charging = read_charging(module)
        rest = module.v_reset or 0.0
        threshold = module.v_threshold - rest
        if self.what == "tau":
            leak = ((1.0 - charging.decay) / self.factor).clamp(max=1.0)
            gain = leak if getattr(module, "decay_input", False) else charging.gain
            charging = replace(charging, decay=1.0 - leak, gain=gain)
        else:
            threshold = threshold * self.factor
        start = module.time_step if isinstance(module, DLIFNode) else 0
        above = module.v - rest  # the potential above rest, whose own reset is to 0
        v_reset = None if module.v_reset is None else 0.0
        spikes = []
        for t, current in enumerate(x_seq, start):
            gain = charging.gain_at(t, input_gain=True)
            h = charge(above, current, decay=charging.decay, gain=gain, v_reset=v_reset)
            spike = fire(h, threshold, module.surrogate_function)
            reset_spike = spike.detach() if module.detach_reset else spike
            above = reset(h, reset_spike, v_threshold=threshold, v_reset=v_reset)
            spikes.append(spike)
        module.v = above + rest
        if isinstance(module, DLIFNode):
            module.time_step = start + len(x_seq)
        return torch.stack(spikes) if module.step_mode == "m" else spikes[0]


def _noisy_spikes(model: nn.Module, probability: float, seed: int, *, added: bool) -> None:
    for _, module in _spiking(model):
        module.register_forward_hook(partial(_with_noise, probability, added))


def _with_noise(
    probability: float, added: bool, module: nn.Module, inputs: object, spikes: Tensor
) -> Tensor:
    hit = torch.rand_like(spikes) < probability
    return spikes.masked_fill(hit, 1.0 if added else 0.0)


def _fewer_steps(model: nn.Module, count: float, seed: int, *, lost: bool) -> None:
    """Lose so many steps, or read so many; each that is left has its own gain of a DLIF neuron."""
    if not isinstance(model, SpikingClassifier):
        raise ValueError(
            "faults of time steps need a SpikingClassifier, which knows T; wrap the network in one"
        )
    if count >= model.T:
        raise ValueError(
            f"steps must be < T = {model.T}, got {count:g}: at least one step must remain, "
            "and one must be lost"
        )
    kept = list(range(int(count)))
    if lost:
        shuffled = torch.randperm(model.T, generator=_generator(seed)).tolist()
        kept = sorted(shuffled[int(count) :])
    encoder = model.encoder
    model.encoder = None  # its code is still that of all steps
    keep_time_steps(model, kept)
    if isinstance(model, SpikingEventClassifier):
        model.register_forward_pre_hook(partial(_only_frames, kept))
    elif encoder is not None:
        model.encoder = _LosingSteps(encoder, kept)
    else:
        model.register_forward_hook(partial(_check_steps, len(kept)))


def _check_steps(steps: int, module: SpikingClassifier, inputs: object, outputs: object) -> None:
    """Refuse a network that brings its own steps, and others than these."""
    found = module.convention
    if found is not None and steps != found.T:
        raise ValueError(
            f"the network ({type(module.net).__name__}) runs {found.T} time steps instead of "
            f"{steps}, whatever its attributes T say"
        )


class _LosingSteps(base.MemoryModule):
    """An encoder of whose frames only those of some steps arrive."""

    def __init__(self, encoder: Callable[[Tensor], Tensor], kept: list[int]) -> None:
        super().__init__()
        self.encoder = encoder
        self.kept = kept
        self.register_memory("arrived", 0)
        self.register_memory("made", 0)

    def forward(self, images: Tensor) -> Tensor:
        """The next frame that arrives."""
        wanted = self.kept[self.arrived]
        self.arrived += 1
        while self.made <= wanted:
            frame = self.encoder(images)
            self.made += 1
        return frame


def _only_frames(kept: list[int], module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    return inputs[0][:, kept]


def _jitter(model: nn.Module, level: float, seed: int, *, counts: bool = False) -> None:
    if not isinstance(model, SpikingClassifier):
        raise ValueError(
            "jitter needs a SpikingClassifier, whose input it moves; wrap the network in one"
        )
    if isinstance(model, SpikingEventClassifier) and level % 1 != 0:
        raise ValueError(f"jitter of event frames must be a number of frames, got {level!r}")
    model.register_forward_pre_hook(partial(_jittered, level, counts))


def _jittered(level: float, counts: bool, module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """The input moved, its gradient that of the input itself."""
    (x,) = inputs
    if isinstance(module, SpikingEventClassifier):
        shift = min(int(level), x.shape[1] - 1)
        if shift == 0:
            return x
        generator = _generator(int(torch.randint(2**62, ())))
        events = max(1, int(x.flatten(1).sum(1).max())) if len(x) else 1
        moved = random_moves(
            None,
            x.detach(),
            eps=ThreatModel("moves", events, largest_shift=shift, counts=counts),
            generator=generator,
        )
    else:
        moved = (x.detach() + level * torch.randn_like(x)).clamp(0, 1)
    return x + (moved - x).detach()


@dataclass(frozen=True)
class _Kind:
    """What a kind of fault does, its usual levels and the range of its level."""

    damage: Callable[[nn.Module, float, int], None]
    levels: tuple[float, ...]
    least: float = 0
    most: float = 1
    whole: bool = False


_COMMON = (0.01, 0.02, 0.05, 0.1, 0.2)
_RARE = (0.001, 0.002, 0.005, 0.01, 0.02)
_SPREADS = (0.02, 0.05, 0.1, 0.2, 0.5)
_KINDS = {
    "weight_bits": _Kind(
        _quantised,
        levels=(8, 6, 4, 3, 2),
        least=2,
        most=32,
        whole=True,
    ),
    "stuck_at_zero": _Kind(partial(_stuck, at_zero=True), _COMMON),
    "stuck_at_largest": _Kind(partial(_stuck, at_zero=False), _RARE),
    "threshold_drift": _Kind(partial(_drifting, what="threshold"), _SPREADS, most=math.inf),
    "tau_drift": _Kind(partial(_drifting, what="tau"), _SPREADS, most=math.inf),
    "lost_spikes": _Kind(partial(_noisy_spikes, added=False), _COMMON),
    "added_spikes": _Kind(partial(_noisy_spikes, added=True), _RARE),
    "lost_steps": _Kind(
        partial(_fewer_steps, lost=True),
        levels=(1, 2, 3),
        least=1,
        most=math.inf,
        whole=True,
    ),
    "first_steps": _Kind(
        partial(_fewer_steps, lost=False),
        levels=(7, 6, 5, 4, 3, 2, 1),
        least=1,
        most=math.inf,
        whole=True,
    ),
    "jitter": _Kind(_jitter, (0.02, 0.05, 0.1, 0.2), most=math.inf),
}

FAULTS: dict[str, tuple[float, ...]] = {name: kind.levels for name, kind in _KINDS.items()}
"""The kinds of fault, each with levels from mild to severe; jitter is in units of images."""


def _weights(model: nn.Module) -> list[Tensor]:
    """Weights of synapses: parameters of two dimensions or more, output channels first (input
    channels in transposed convolutions), but for those of neurons, their gates and encoders.
    """
    found: dict[int, Tensor] = {}
    for name, module in _outside_neurons(model):
        if isinstance(module, LAYERS):
            if "weight" not in module._parameters or hasattr(module, "get_weight"):
                raise ValueError(
                    f"{name} ({type(module).__name__}) computes its weights from parameters, so "
                    "no fault of a single weight is possible; replace it by a layer that has the "
                    "computed weights (of torch.nn.utils: parametrize.remove_parametrizations, "
                    "remove_weight_norm, prune.remove)"
                )
            found[id(module.weight)] = module.weight
        else:
            held = module.parameters(recurse=False)
            found |= {id(weight): weight for weight in held if weight.ndim > 1}
    if not found:
        raise ValueError(
            "a fault of weights needs a network with some, got parameters of one dimension or none"
        )
    return list(found.values())


def _outside_neurons(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules and their names, but for neurons, gates, encoders, layer norm and what is in them."""
    if is_neuron(module) or isinstance(module, PerNeuron | nn.LayerNorm):
        return
    yield name, module
    for child_name, child in module.named_children():
        if not (isinstance(module, SpikingClassifier) and child_name == "encoder"):
            yield from _outside_neurons(child, f"{name}.{child_name}".removeprefix("."))


def _leaks(module: nn.Module) -> bool:
    """Whether it is a neuron that keeps less than its whole potential, or of unknown dynamics."""
    if not is_neuron(module) or not emits_spikes(module):
        return False
    return not has_known_dynamics(module) or read_charging(module).decay_value != 1.0


def _spiking(model: nn.Module) -> list[tuple[str, Any]]:
    found = [
        (name, module)
        for name, module in model.named_modules()
        if is_neuron(module) and emits_spikes(module)
    ]
    if not found:
        raise ValueError(
            f"a fault of spikes needs SpikingJelly neurons, got a {type(model).__name__} without "
            "any"
        )
    return found


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
"""The fifteen common corruptions, in the order of their source."""

_SEEDED = (
    "impulse_noise",
    "glass_blur",
)  # which the library does not draw from NumPy's global generator
_LEAST = 32  # pixels to a side that the library asks for


@dataclass(frozen=True)
class Corruption:
    """One common corruption at one severity. 一种常见图像损坏及其强度。

    Attributes:
        kind: ``"gaussian_noise"``, ``"shot_noise"``, ``"impulse_noise"``, ``"defocus_blur"``,
            ``"glass_blur"``, ``"motion_blur"``, ``"zoom_blur"``, ``"snow"``, ``"frost"``,
            ``"fog"``, ``"brightness"``, ``"contrast"``, ``"elastic_transform"``, ``"pixelate"`` or
            ``"jpeg_compression"``.
        level: Severity, 1 to 5.

    Raises:
        ValueError: If the corruption or the severity does not exist.

    Source: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions
        and Perturbations" (ICLR 2019).

    Examples:
        >>> Corruption("fog", 3).level
        3
    """

    kind: str
    level: int

    def __post_init__(self) -> None:
        check_choice("corruption", self.kind, CORRUPTIONS)
        if isinstance(self.level, bool) or self.level not in (1, 2, 3, 4, 5):
            raise ValueError(
                f"severity of {self.kind} must be an integer from 1 to 5, got {self.level!r}"
            )


def default_corruptions(images: Tensor) -> tuple[Corruption, ...]:
    """Every corruption at every severity. 全部损坏类型与强度。

    Raises:
        ValueError: If these are no images of one or three channels.
        ModuleNotFoundError: If imagecorruptions is not installed.
    """
    check_images_to_corrupt(images)
    return tuple(Corruption(kind, severity) for kind in CORRUPTIONS for severity in range(1, 6))


def check_images_to_corrupt(images: Tensor) -> None:
    """Images have one or three channels, and what corrupts them is installed; raises as
    :func:`default_corruptions`.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            "corruptions need images [N, C, H, W] of 1 or 3 channels, got shape "
            f"{tuple(images.shape)}; event frames have the suite stress"
        )
    _library()


def corrupted(x: Tensor, corruption: Corruption, *, seed: int, start: int = 0) -> Tensor:
    """Images with a corruption, each from its own seed; they pass through 8 bits. 添加常见损坏。

    Images below 32 pixels to a side, which the library refuses, are extended by their edge and cut
    again. Severities are those of ImageNet-C, and harder on small images than those of CIFAR-10-C.
    ``x`` is [N, C, H, W] in [0, 1] of one or three channels; ``start`` is the number of its first
    image in the data set, part of that image's seed.

    Raises:
        ModuleNotFoundError: If imagecorruptions is not installed.
    """
    corrupt = _library()
    high, wide = (max(0, _LEAST - size) for size in x.shape[2:])
    top, left = high // 2, wide // 2
    margin = ((top, high - top), (left, wide - left), (0, 0))
    cut = (slice(top, top + x.shape[2]), slice(left, left + x.shape[3]))
    bytes_of_images = (x * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    seeds = (
        SampleSeeds(range(start, start + len(x)))
        .derived(corruption.kind, corruption.level, seed)
        .seeds
    )
    state = np.random.get_state()  # noqa: NPY002  # the library draws from NumPy's global generator
    found = []
    try:
        for image, own in zip(bytes_of_images, seeds, strict=True):
            np.random.seed(own % 2**32)  # noqa: NPY002
            options = {"seed": own % 2**31} if corruption.kind in _SEEDED else {}
            pixels = np.pad(image, margin, mode="edge")
            done = corrupt(
                pixels, severity=corruption.level, corruption_name=corruption.kind, **options
            )[cut]
            found.append(done if x.shape[1] == 3 else done.mean(2, keepdims=True))
    finally:
        np.random.set_state(state)  # noqa: NPY002
    corrupted_images = torch.from_numpy(np.stack(found))
    return corrupted_images.permute(0, 3, 1, 2).to(x) / 255


def _library() -> Callable[..., Any]:
    try:
        from imagecorruptions import corrupt
    except ImportError as error:
        raise ModuleNotFoundError(
            f"the suite corruptions needs imagecorruptions ({error}): pip install "
            "'sj_robust[corruptions]'"
        ) from error
    corruption: Callable[..., Any] = corrupt
    return corruption
