"""A network and its images in one call: the evaluation of a network of one's own, and its stress
test.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from sj_robust.evaluation.corruptions import Corruption, check_images_to_corrupt
from sj_robust.evaluation.data import Batches, Data, given_data
from sj_robust.evaluation.faults import Fault
from sj_robust.evaluation.progress import Position
from sj_robust.evaluation.robustness_report import RobustnessReport
from sj_robust.evaluation.stress_card import StressCard
from sj_robust.evaluation.stressing import stress_network
from sj_robust.evaluation.subject import Subject, check_fits
from sj_robust.evaluation.suites import SuiteName, check_shape, make_suite

__all__ = ["evaluate", "stress"]

NormName = Literal["Linf", "L2", "L0", "moves"]
StressName = Literal["stress", "corruptions"]
Images = Tensor | Batches | Dataset[tuple[Tensor, ...]]

_Display = tuple[Callable[[str], None], Callable[[Position], None] | None]
"""What says which part begins, and what is called after every step."""


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
) -> RobustnessReport:
    """How robust a network of your own is. 一次调用评估自己的网络。

    This is :func:`sj_robust.evaluation.assess.assess` on a network and images as you have them. The
    network stays as it was, also when Ctrl-C stops the evaluation; with a ``folder`` the same call
    goes on from there.

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
        folder: Where progress is kept; None keeps none.
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
    draws = check_count("draws", draws)
    asked = _Asked.checked(
        eps=eps,
        norm=norm,
        largest_shift=largest_shift,
        total_shift=total_shift,
        T=T,
        mean=mean,
        std=std,
        seed=seed,
        batch_size=batch_size,
        folder=folder,
        name=name,
        dataset=dataset,
        progress=progress,
    )
    given = _given(model, x, y, asked)
    chosen: SuiteName = suite or ("events" if given.frames else "standard")
    make_suite(chosen, given.threat, classes=2, eot_samples=draws)
    check_shape(chosen, given.first)
    with _prepared(model, given, asked) as ready:
        return assess(
            ready.subject,
            given.data,
            suite=chosen,
            threat=given.threat,
            dataset=dataset,
            classes=ready.classes,
            seed=asked.seed,
            draws=draws,
            folder=asked.folder,
            configuration=asked.configuration,
            say=ready.say,
            on_step=ready.on_step,
        )


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
) -> StressCard:
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
        >>> card = stress(
        ...     net, x, y, eps=0.1, T=4, faults=[Fault("weight_bits", 4)], steps=2, progress=False
        ... )
        >>> card.images, card.kinds
        (6, ('weight_bits',))
    """
    check_choice("suite", suite, get_args(StressName))
    if faults is not None:
        faults = _checked_faults(faults, suite)
    draws, steps = check_count("draws", draws), check_count("steps", steps)
    asked = _Asked.checked(
        eps=eps,
        norm=norm,
        largest_shift=largest_shift,
        total_shift=total_shift,
        T=T,
        mean=mean,
        std=std,
        seed=seed,
        batch_size=batch_size,
        folder=folder,
        name=name,
        dataset=dataset,
        progress=progress,
    )
    given = _given(model, x, y, asked)
    if suite == "corruptions":
        check_images_to_corrupt(given.first)
    with _prepared(model, given, asked) as ready:
        return stress_network(
            ready.subject,
            given.data,
            suite=suite,
            threat=given.threat,
            dataset=dataset,
            faults=faults,
            draws=draws,
            steps=steps,
            seed=asked.seed,
            folder=asked.folder,
            configuration=asked.configuration,
            say=ready.say,
            on_step=ready.on_step,
        )


@dataclass(frozen=True)
class _Asked:
    """Arguments of both calls that need neither network nor images to be checked, as plain data."""

    eps: float
    norm: NormName | None
    largest_shift: int | None
    total_shift: int | None
    T: int | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    seed: int
    batch_size: int
    folder: Path | None
    name: str | None
    dataset: str
    progress: bool

    @classmethod
    def checked(
        cls,
        *,
        eps: float | str,
        norm: NormName | None,
        largest_shift: int | None,
        total_shift: int | None,
        T: int | None,
        mean: Channels,
        std: Channels,
        seed: int,
        batch_size: int,
        folder: str | Path | None,
        name: str | None,
        dataset: str,
        progress: bool,
    ) -> "_Asked":
        """The arguments, if none of them is wrong by itself."""
        if norm is not None:
            check_choice("norm", norm, get_args(NormName))
        if name is not None:
            check_text("name", name)
        check_text("dataset", dataset)
        check_switch("progress", progress)
        return cls(
            eps=parse_eps(eps),
            norm=norm,
            largest_shift=largest_shift,
            total_shift=total_shift,
            T=check_steps(T),
            mean=check_channels("mean", mean),
            std=check_channels("std", std, positive=True),
            seed=check_seed("seed", seed),
            batch_size=check_count("batch_size", batch_size),
            folder=check_folder("folder", folder),
            name=name,
            dataset=dataset,
            progress=progress,
        )

    @property
    def configuration(self) -> dict[str, object]:
        """What the report says of the call."""
        return {"T": self.T, "mean": self.mean, "std": self.std}

    def threat(self, frames: bool) -> ThreatModel:
        """Norm and radius, for images or for event frames."""
        norm = self.norm or ("L0" if frames else "Linf")
        threat = ThreatModel(norm, self.eps, self.largest_shift, self.total_shift)
        if threat.eps <= 0:
            raise ValueError(
                f"eps must be > 0 to attack at all, got {threat.eps}; give a radius such as "
                "eps='8/255'"
            )
        return threat


@dataclass(frozen=True)
class _Given:
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
class _Ready:
    """The network in evaluation mode, number of its classes, and the display."""

    subject: Subject
    classes: int
    say: Callable[[str], None]
    on_step: Callable[[Position], None] | None


def _given(model: nn.Module, x: Images, y: Tensor | None, asked: _Asked) -> _Given:
    """The images, if they belong to the threat; the network itself is not asked."""
    check_network(model, "model")
    data = given_data(x, y, asked.batch_size)
    first = data[0][0]
    frames = first.ndim == 5
    if frames:
        check_frames(first)
    else:
        check_number_of_channels(first, mean=asked.mean, std=asked.std)
    return _Given(data, asked.threat(frames))


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
def _prepared(model: nn.Module, given: _Given, asked: _Asked) -> Iterator[_Ready]:
    """The network as a classifier that has taken an image; evaluation mode, full precision."""
    classifier = as_classifier(model, asked.T, mean=asked.mean, std=asked.std, images=given.first)
    network = classifier.net if isinstance(classifier, SpikingClassifier) else classifier
    subject = Subject(asked.name or type(network).__name__, classifier, type(network).__name__)
    device = device_of(classifier)
    with evaluation_mode(classifier), full_precision(device), _shown(asked.progress) as display:
        classes = check_fits(subject, given.first[:1].to(device), None, asked.dataset)
        check_classes(torch.tensor(given.data.labels), classes)
        if isinstance(classifier, SpikingClassifier):
            say, _ = display
            say(f"{subject.name} {classifier.convention}")
        try:
            yield _Ready(subject, classes, *display)
        except KeyboardInterrupt as stopped:
            stopped.add_note(
                "the network is as it was; with folder=... the next evaluation could be continued"
                if asked.folder is None
                else f"the network is as it was; the same call goes on with what is in "
                f"{asked.folder}"
            )
            raise


@contextmanager
def _shown(progress: bool) -> Iterator[_Display]:
    if not progress:
        yield lambda text: None, None
    elif find_spec("rich") is None:  # of the extra recipes
        yield print, None
    else:
        from rich.console import Console

        from sj_robust.evaluation.terminal import Display

        with Display(Console(highlight=False)) as display:
            yield display.say, display.on_step
