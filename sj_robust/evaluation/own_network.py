"""A network and its images in one call: the evaluation of a network of one's own, and its stress
test.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from sj_robust.attacks import check_frames
from sj_robust.attacks.threat import ThreatModel, parse_eps
from sj_robust.classifier import SpikingClassifier, as_classifier
from sj_robust.core.checks import (
    Channels,
    check_channels,
    check_choice,
    check_classes,
    check_count,
    check_network,
    check_number_of_channels,
    check_seed,
    check_steps,
    check_switch,
    check_text,
)
from sj_robust.core.environment import device_of
from sj_robust.core.folders import check_folder
from sj_robust.core.preserved import evaluation_mode, full_precision
from sj_robust.evaluation.assess import assess
from sj_robust.evaluation.report.report import Report
from sj_robust.evaluation.request import Request
from sj_robust.evaluation.run.corruptions import Corruption, check_images_to_corrupt
from sj_robust.evaluation.run.data import Batches, Data, given_data
from sj_robust.evaluation.run.faults import Fault
from sj_robust.evaluation.run.progress import Watch
from sj_robust.evaluation.run.suites import SuiteName, check_radius, check_shape, check_suite
from sj_robust.evaluation.stressing import stress_network
from sj_robust.evaluation.subject import Subject, check_fits

__all__ = ["evaluate", "stress"]

NormName = Literal["Linf", "L2", "L0", "moves"]
StressName = Literal["stress", "corruptions"]
Images = Tensor | Batches | Dataset[tuple[Tensor, ...]]


def evaluate(
    model: nn.Module,
    x: Images,
    y: Tensor | None = None,
    *,
    eps: float | str,
    norm: NormName | None = None,
    largest_shift: int | None = None,
    total_shift: int | None = None,
    suite: SuiteName | None = None,
    T: int | None = None,
    mean: Channels = None,
    std: Channels = None,
    draws: int = 1,
    seed: int = 0,
    batch_size: int = 256,
    folder: str | Path | None = None,
    name: str | None = None,
    dataset: str = "images",
    progress: bool = True,
) -> Report:
    """How robust a network of your own is. 一次调用评估自己的网络。

    The network stays as it was, also when Ctrl-C stops the evaluation; with a ``folder`` the same
    call goes on from there.

    Args:
        model: A classifier of images in [0, 1], spiking or not; or a bare SpikingJelly network,
            with ``T`` and, if it expects normalised images, ``mean`` and ``std``.
        x: Test images [N, C, H, W] in [0, 1]; or, in place of ``x`` and ``y``, a ``DataLoader``, a
            data set, or a list of batches, which is read once. Binary event frames are [N, T, 2,
            H, W].
        y: Labels [N] int64.
        eps: Radius, a number or a text such as ``"8/255"``; for L0 the number of changed elements,
            for moves that of moved events.
        norm: Norm of the adversary; None takes Linf, and L0 for event frames.
        largest_shift: For moves, the frames by which an event may be moved; None for any number.
        total_shift: For moves, the frames by which all events of a sample may be moved together.
        suite: Name of the suite, see :func:`make_suite`; None takes ``"standard"``, and
            ``"events"`` for event frames.
        T: Number of time steps, for a bare network; None if it brings its own.
        mean: Mean per channel that a bare network expects to be subtracted, as numbers, a tensor or
            an array.
        std: Standard deviation per channel that it expects to be divided by, likewise.
        draws: Fresh forwards in each of which a stochastic network must be wrong for an image to
            count as broken.
        seed: Seeds everything.
        batch_size: Images at a time; results do not depend on it.
        folder: Where progress is kept, for one batch size; None keeps none.
        name: What the report calls the network; None takes its class.
        dataset: What the report calls the images.
        progress: Whether what is being done and the time left are shown.

    Raises:
        TypeError: If an argument has the wrong type, such as images of bytes.
        ValueError: If an argument is wrong, T is missing, images lie outside [0, 1], network and
            images do not belong together, or the folder holds another evaluation.
        ModuleNotFoundError: If the suite needs an extra that is not installed.

    Source: evaluation as asked for by Carlini et al., "On evaluating adversarial robustness" (arXiv
        1902.06705).

    Examples:
        >>> import torch
        >>> from spikingjelly.activation_based import neuron
        >>> net = nn.Sequential(nn.Flatten(2), nn.Linear(4, 3), neuron.LIFNode(step_mode="m"))
        >>> x, y = torch.rand(6, 1, 2, 2), torch.arange(6) % 3
        >>> report = evaluate(net, x, y, eps="8/255", T=4, suite="fast", progress=False)
        >>> report.worst_case.total
        6
    """
    if suite is not None:
        check_choice("suite", suite, get_args(SuiteName))
    options = Options(
        eps=eps,
        norm=norm,
        largest_shift=largest_shift,
        total_shift=total_shift,
        T=T,
        mean=mean,
        std=std,
        draws=draws,
        seed=seed,
        batch_size=batch_size,
        folder=folder,
        name=name,
        dataset=dataset,
        progress=progress,
    )
    inputs = _inputs(model, x, y, options)
    chosen: SuiteName = suite or ("events" if inputs.frames else "standard")
    check_suite(chosen, inputs.threat)
    check_shape(chosen, inputs.first, draws=draws)
    with _prepared(model, inputs, options) as prepared:
        request = options.request(chosen, inputs.threat, prepared)
        return assess(prepared.subject, inputs.data, request)


def stress(
    model: nn.Module,
    x: Images,
    y: Tensor | None = None,
    *,
    eps: float | str,
    norm: NormName | None = None,
    largest_shift: int | None = None,
    total_shift: int | None = None,
    suite: StressName = "stress",
    faults: Sequence[Fault | Corruption] | None = None,
    draws: int = 5,
    steps: int = 20,
    T: int | None = None,
    mean: Channels = None,
    std: Channels = None,
    seed: int = 0,
    batch_size: int = 128,
    folder: str | Path | None = None,
    name: str | None = None,
    dataset: str = "images",
    progress: bool = True,
) -> Report:
    """What faults of deployment, or common corruptions, leave of a network, clean and attacked.
    部署故障压力测试。

    Every fault is one of a copy, so the network stays as it was, and at every level the attack is
    crafted on the faulty copy. Random faults are drawn several times.

    Other arguments and errors are those of :func:`evaluate`.

    Args:
        model: The network.
        x: Test images.
        y: Labels.
        eps: Radius of the attack.
        norm: Norm of the attack.
        largest_shift: Budget of a threat of moves.
        total_shift: Budget of a threat of moves.
        suite: ``"stress"`` for faults, ``"corruptions"`` for the fifteen common corruptions at five
            severities.
        faults: What is measured, from mild to severe; None takes every kind at its usual levels.
        draws: Draws of a fault that is random.
        steps: Steps of the attack.
        T: Number of time steps, for a bare network; None if it brings its own.
        mean: Mean per channel that a bare network expects to be subtracted.
        std: Standard deviation per channel that it expects to be divided by.
        seed: Seeds everything.
        batch_size: Images at a time.
        folder: Where progress is kept.
        name: What the card calls the network.
        dataset: What the card calls the images.
        progress: Whether what is being done is shown.

    Source: quantised and stuck weights, mismatch and lost spikes as in the literature on
        neuromorphic hardware; corruptions of Hendrycks and Dietterich (ICLR 2019).

    Examples:
        >>> import torch
        >>> from spikingjelly.activation_based import neuron
        >>> net = nn.Sequential(nn.Flatten(2), nn.Linear(4, 3), neuron.LIFNode(step_mode="m"))
        >>> x, y = torch.rand(6, 1, 2, 2), torch.arange(6) % 3
        >>> few = [Fault("weight_bits", 4)]
        >>> stress(net, x, y, eps=0.1, T=4, faults=few, steps=2, progress=False).variants
        ('none', 'weight_bits:4')
    """
    check_choice("suite", suite, get_args(StressName))
    if faults is not None:
        faults = _checked_faults(faults, suite)
    steps = check_count("steps", steps)
    options = Options(
        eps=eps,
        norm=norm,
        largest_shift=largest_shift,
        total_shift=total_shift,
        T=T,
        mean=mean,
        std=std,
        draws=draws,
        seed=seed,
        batch_size=batch_size,
        folder=folder,
        name=name,
        dataset=dataset,
        progress=progress,
    )
    inputs = _inputs(model, x, y, options)
    check_radius(inputs.threat)
    if suite == "corruptions":
        check_images_to_corrupt(inputs.first)
    with _prepared(model, inputs, options) as prepared:
        request = options.request(suite, inputs.threat, prepared)
        asked = replace(request, faults=faults, steps=steps)
        return stress_network(prepared.subject, inputs.data, asked)


@dataclass(frozen=True)
class Options:
    """Options of both calls, checked as far as that needs neither network nor images; a radius
    becomes a number, numbers per channel become tuples, a folder a path.
    """

    eps: float | str
    norm: NormName | None
    largest_shift: int | None
    total_shift: int | None
    T: int | None
    mean: Channels
    std: Channels
    draws: int
    seed: int
    batch_size: int
    folder: str | Path | None
    name: str | None
    dataset: str
    progress: bool

    def __post_init__(self) -> None:
        if self.norm is not None:
            check_choice("norm", self.norm, get_args(NormName))
        if self.name is not None:
            check_text("name", self.name)
        check_text("dataset", self.dataset)
        check_switch("progress", self.progress)
        checked = {
            "eps": parse_eps(self.eps),
            "T": check_steps(self.T),
            "mean": check_channels("mean", self.mean),
            "std": check_channels("std", self.std, positive=True),
            "draws": check_count("draws", self.draws),
            "seed": check_seed("seed", self.seed),
            "batch_size": check_count("batch_size", self.batch_size),
            "folder": check_folder("folder", self.folder),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def threat(self, frames: bool) -> ThreatModel:
        """Norm and radius, for images or for event frames."""
        norm = self.norm or ("L0" if frames else "Linf")
        return ThreatModel(norm, parse_eps(self.eps), self.largest_shift, self.total_shift)

    def request(self, suite: str, threat: ThreatModel, prepared: "_Prepared") -> Request:
        """What is asked about the prepared network."""
        return Request(
            suite,
            threat,
            self.dataset,
            prepared.classes,
            seed=self.seed,
            draws=self.draws,
            folder=None if self.folder is None else Path(self.folder),
            configuration={"T": self.T, "mean": self.mean, "std": self.std},
            watch=prepared.watch,
        )


@dataclass(frozen=True)
class _Inputs:
    """Images with labels, and what an adversary may do to them."""

    data: Data
    threat: ThreatModel

    @property
    def first(self) -> Tensor:
        """Images of the first batch."""
        return self.data[0][0]

    @property
    def frames(self) -> bool:
        """Whether they are event frames [N, T, 2, H, W]."""
        return self.first.ndim == 5


@dataclass(frozen=True)
class _Prepared:
    """The network in evaluation mode, number of its classes, and the display."""

    subject: Subject
    classes: int
    watch: Watch


def _inputs(model: nn.Module, x: Images, y: Tensor | None, options: Options) -> _Inputs:
    """The images, if they belong to the threat; the network itself is not asked."""
    check_network(model, "model")
    data = given_data(x, y, options.batch_size)
    first = data[0][0]
    frames = first.ndim == 5
    if frames:
        check_frames(first)
    else:
        _check_channels(first, options)
    return _Inputs(data, options.threat(frames))


def _check_channels(images: Tensor, options: Options) -> None:
    """Numbers per channel fit the images."""
    mean, std = check_channels("mean", options.mean), check_channels("std", options.std)
    check_number_of_channels(images, mean=mean, std=std)


def _checked_faults(
    faults: Sequence[Fault | Corruption], suite: StressName
) -> Sequence[Fault | Corruption]:
    wanted = Fault if suite == "stress" else Corruption
    if not isinstance(faults, Sequence) or isinstance(faults, str):
        raise TypeError(
            f"faults must be a list, got {type(faults).__name__}; write "
            f"faults=[{wanted.__name__}(kind, level)]"
        )
    if not faults:
        raise ValueError("faults must hold one or more, got none; leave it out for the usual ones")
    for fault in faults:
        if not isinstance(fault, wanted):
            other = "corruptions" if isinstance(fault, Corruption) else "stress"
            fits = f", or suite={other!r}" if isinstance(fault, Fault | Corruption) else ""
            raise TypeError(
                f"faults of the suite {suite!r} must be {wanted.__name__}, got {fault!r}; write "
                f"{wanted.__name__}(kind, level){fits}"
            )
    return faults


@contextmanager
def _prepared(model: nn.Module, inputs: _Inputs, options: Options) -> Iterator[_Prepared]:
    """The network as a classifier that has taken an image; evaluation mode, full precision."""
    classifier = as_classifier(
        model, options.T, mean=options.mean, std=options.std, images=inputs.first
    )
    network = classifier.net if isinstance(classifier, SpikingClassifier) else classifier
    kind = type(network).__name__
    subject = Subject(options.name or kind, classifier, kind)
    device = device_of(classifier)
    with evaluation_mode(classifier), full_precision(device), _shown(options.progress) as watch:
        classes = check_fits(subject, inputs.first[:1].to(device), None, options.dataset)
        check_classes(torch.tensor(inputs.data.labels), classes)
        if isinstance(classifier, SpikingClassifier):
            watch.say(f"{subject.name} {classifier.convention}")
        try:
            yield _Prepared(subject, classes, watch)
        except KeyboardInterrupt as stopped:
            if options.folder is None:
                remedy = "with folder=... the next evaluation could be continued"
            else:
                remedy = f"the same call goes on with what is in {options.folder}"
            stopped.add_note(f"the network is as it was; {remedy}")
            raise


@contextmanager
def _shown(progress: bool) -> Iterator[Watch]:
    if not progress:
        yield Watch()
    elif find_spec("rich") is None:  # of the extra recipes
        yield Watch(print)
    else:
        from rich.console import Console

        from sj_robust.evaluation.report.terminal import Display

        with Display(Console(highlight=False)) as display:
            yield Watch(display.say, display.on_step)
