"""Evaluate or stress-test a network in one call."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from sj_robust.attacks.events import check_frames
from sj_robust.classifier import SpikingClassifier, SpikingEventClassifier, as_classifier
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
from sj_robust.core.eps import several
from sj_robust.core.folders import check_folder
from sj_robust.core.preserved import evaluation_mode, full_precision
from sj_robust.core.threat import NormName, Threat, ThreatModel, as_threat
from sj_robust.evaluation.assess import assess, stress_network
from sj_robust.evaluation.report.report import Report
from sj_robust.evaluation.request import Request
from sj_robust.evaluation.run.data import Batches, Data, given_data
from sj_robust.evaluation.run.faults import Corruption, Fault, check_images_to_corrupt
from sj_robust.evaluation.run.progress import Watch
from sj_robust.evaluation.run.suites import (
    SuiteName,
    check_radius,
    check_rounds,
    check_shape,
    check_suite,
)
from sj_robust.evaluation.subject import Subject, check_fits
from sj_robust.neuron.charging import NeuronKey, stated

__all__ = ["evaluate", "stress"]

StressName = Literal["stress", "corruptions"]
Images = Tensor | Batches | Dataset[tuple[Tensor, ...]]


def evaluate(
    model: nn.Module,
    x: Images,
    y: Tensor | None = None,
    *,
    eps: Threat | Iterable[Threat],
    suite: SuiteName | None = None,
    rounds: int = 1,
    T: int | None = None,
    mean: Channels = None,
    std: Channels = None,
    decay: Mapping[NeuronKey, float] | None = None,
    gain: Mapping[NeuronKey, float] | None = None,
    draws: int | None = None,
    surrogate_model: nn.Module | None = None,
    seed: int = 0,
    batch_size: int = 256,
    folder: str | Path | None = None,
    name: str | None = None,
    dataset: str = "images",
    progress: bool = True,
) -> Report:
    """Evaluate the robustness of your own network. 一次调用评估自己的网络。

    The network is not changed. With a ``folder``, the same call resumes an interrupted evaluation.
    On Linux without a GPU, copies of this process share the attacks: as many as torch has threads
    (``torch.set_num_threads``).

    Args:
        model: A classifier of images in [0, 1], spiking or not; or a bare SpikingJelly network,
            with ``T`` and, if it expects normalised images, ``mean`` and ``std``.
        x: Test images [N, C, H, W] in [0, 1]; or, instead of ``x`` and ``y``, a ``DataLoader``, a
            data set, or a list of batches, which is read once. Event frames are [N, T, 2, H, W].
        y: Labels [N] int64.
        eps: Linf radius, a number or a string such as ``"8/255"``, for event frames the number of
            changed events; or a ``ThreatModel`` of any norm. Of several, which differ in their
            radius, ``Report.over_eps`` has them all; the suite runs at the largest.
        suite: Name of the suite, see :func:`make_suite`; None means ``"standard"``, or ``"events"``
            for event frames.
        rounds: How many times the attacks of ``"fast"``, ``"standard"``, ``"gradient"``,
            ``"long"`` or ``"events"`` are run, each time with other random numbers and at the same
            cost.
        T: Number of time steps, for a bare network; None if it brings its own.
        mean: Mean per channel that a bare network expects to be subtracted, as numbers, a tensor or
            an array.
        std: Standard deviation per channel that it expects to be divided by, likewise.
        decay: For neurons whose dynamics are not known, as in ``sj_robust.MPPDMonitor``.
        gain: Their input gain.
        draws: Number of forwards of a stochastic network. An image counts as broken if the
            network is wrong in more than half of them, and attacks average the gradient over a
            third as many. None uses 10 for a network that draws random numbers and 1 for any other.
        surrogate_model: A differentiable network from the same images to logits that stands in for
            ``model`` where its own gradients do not lead, such as the network of ReLUs that it was
            converted from: ``transfer/...`` are crafted on it and judged on ``model``, and the
            search starts from their images too. None takes the network of rates behind
            integrate-and-fire neurons with a soft reset, if all of ``model`` are.
        seed: Random seed.
        batch_size: Images at a time; results do not depend on it, except those of stochastic
            networks, of the estimator ``pdsg`` and MS-MPPD, which is that of the first batch.
        folder: Folder in which progress is saved, for one batch size; None saves nothing.
        name: Name of the network in the report; None uses the name of its class.
        dataset: Name of the images in the report.
        progress: Whether to show the current task and the remaining time.

    Raises:
        TypeError: If an argument has the wrong type, such as images stored as bytes.
        ValueError: If an argument is wrong, T is missing, images lie outside [0, 1], network and
            images do not belong together, or the folder holds another evaluation.
        ModuleNotFoundError: If the suite needs an extra that is not installed.

    Source: recommendations of Carlini et al., "On evaluating adversarial robustness" (arXiv
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
    given = _Given(
        model,
        T=check_steps(T),
        mean=check_channels("mean", mean),
        std=check_channels("std", std, positive=True),
        name=name,
        progress=progress,
        decay=decay,
        gain=gain,
    )
    check_text("dataset", dataset)
    if draws is not None:
        draws = check_count("draws", draws)
    if surrogate_model is not None:
        check_network(surrogate_model, "surrogate_model")
    data = given_data(x, y, check_count("batch_size", batch_size))
    threats = _threats(eps, data)
    threat = threats[-1]
    check_radius(threats[0])
    _check_fits(data, threat, given)
    chosen: SuiteName = suite or ("events" if _holds_frames(data) else "standard")
    check_suite(chosen, threat)
    check_rounds(chosen, rounds)
    check_shape(chosen, data[0][0], draws=draws or 1)
    request = Request(
        chosen,
        threat,
        dataset,
        seed=check_seed("seed", seed),
        draws=draws,
        surrogate_model=surrogate_model,
        radii=tuple(one.eps for one in threats) if len(threats) > 1 else (),
        rounds=rounds,
        folder=check_folder("folder", folder),
    )
    with given.ready(data, request) as (subject, asked):
        return assess(subject, data, asked)


def stress(
    model: nn.Module,
    x: Images,
    y: Tensor | None = None,
    *,
    eps: Threat,
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
    """Accuracy under hardware faults or common corruptions, clean and attacked. 部署故障压力测试。

    Faults are injected into a copy of the network, and the attack is crafted on the faulty copy.
    Random faults are drawn several times.

    Other arguments and errors are those of :func:`evaluate`.

    Args:
        model: The network.
        x: Test images.
        y: Labels.
        eps: Radius or threat model of the attack.
        suite: ``"stress"`` for faults, ``"corruptions"`` for the fifteen common corruptions at five
            severities.
        faults: Faults to measure, from mild to severe; None measures every kind at its default
            levels.
        draws: Number of draws of each random fault.
        steps: Steps of the attack.
        T: Number of time steps, for a bare network; None if it brings its own.
        mean: Mean per channel to subtract from the images of a bare network.
        std: Standard deviation per channel to divide them by.
        seed: Random seed.
        batch_size: Images per batch.
        folder: Folder for the progress.
        name: Name of the network in the report.
        dataset: Name of the images in the report.
        progress: Show progress.

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
    given = _Given(
        model,
        T=check_steps(T),
        mean=check_channels("mean", mean),
        std=check_channels("std", std, positive=True),
        name=name,
        progress=progress,
    )
    check_text("dataset", dataset)
    data = given_data(x, y, check_count("batch_size", batch_size))
    threat = as_threat(eps, *_norms(data))
    check_radius(threat)
    _check_fits(data, threat, given)
    if suite == "corruptions":
        check_images_to_corrupt(data[0][0])
    request = Request(
        suite,
        threat,
        dataset,
        seed=check_seed("seed", seed),
        draws=check_count("draws", draws),
        faults=faults,
        steps=check_count("steps", steps),
        folder=check_folder("folder", folder),
    )
    with given.ready(data, request) as (subject, asked):
        return stress_network(subject, data, asked)


def _norms(data: Data) -> tuple[NormName, ...]:
    """All norms, first that of a number: changed events for event frames, else Linf."""
    return ("L0" if _holds_frames(data) else "Linf", *get_args(NormName))


def _threats(eps: Threat | Iterable[Threat], data: Data) -> list[ThreatModel]:
    """One or several that differ in their radius alone, in increasing order."""
    norms = _norms(data)
    threats = sorted({as_threat(one, *norms) for one in several(eps)}, key=lambda one: one.eps)
    if not threats:
        raise ValueError("eps must hold a radius or more, got none; give one such as '8/255'")
    for one in threats:
        if replace(one, eps=threats[-1].eps) != threats[-1]:
            raise ValueError(f"eps must be threats that differ in eps alone, got {threats}")
    return threats


@dataclass(frozen=True)
class _Given:
    """A network as it was given, with what a bare one needs beside it, and what shows it."""

    model: nn.Module
    T: int | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    name: str | None
    progress: bool
    decay: Mapping[NeuronKey, float] | None = None
    gain: Mapping[NeuronKey, float] | None = None

    def __post_init__(self) -> None:
        check_network(self.model, "model")
        if self.name is not None:
            check_text("name", self.name)
        check_switch("progress", self.progress)

    @contextmanager
    def ready(self, data: Data, request: Request) -> Iterator[tuple[Subject, Request]]:
        """The network as a classifier that has taken an image, in evaluation mode and full
        precision, and the request with what is known of it then.
        """
        first = data[0][0]
        classifier = as_classifier(self.model, self.T, mean=self.mean, std=self.std, images=first)
        network = classifier.net if isinstance(classifier, SpikingClassifier) else classifier
        kind = type(network).__name__
        subject = Subject(self.name or kind, classifier, kind)
        device = device_of(classifier)
        with (
            stated(network, self.decay, self.gain),
            evaluation_mode(classifier),
            full_precision(device),
            _shown(self.progress) as watch,
        ):
            classes = check_fits(subject, first[:1].to(device), None, request.dataset)
            check_classes(torch.tensor(data.labels), classes)
            if request.surrogate_model is not None:
                other = Subject("surrogate_model", request.surrogate_model, "")
                with evaluation_mode(other.model):
                    check_fits(other, first[:1].to(device), classes, request.dataset)
            configuration = {
                "T": self.T,
                "mean": self.mean,
                "std": self.std,
                "decay": _by_name(self.decay),
                "gain": _by_name(self.gain),
            }
            if isinstance(classifier, SpikingClassifier):
                watch.say(f"{subject.name} {classifier.convention}")
            try:
                yield (
                    subject,
                    replace(request, classes=classes, configuration=configuration, watch=watch),
                )
            except KeyboardInterrupt as stopped:
                remedy = "with folder=..., the evaluation could be resumed"
                if request.folder is not None:
                    remedy = f"the same call resumes from {request.folder}"
                stopped.add_note(f"the network is unchanged; {remedy}")
                raise


def _check_fits(data: Data, threat: ThreatModel, given: _Given) -> None:
    """Images fit what was said of the network, which itself is not asked."""
    first = data[0][0]
    if _holds_frames(data) or isinstance(given.model, SpikingEventClassifier):
        check_frames(first, counts=threat.counts)
    else:
        check_number_of_channels(first, mean=given.mean, std=given.std)


def _holds_frames(data: Data) -> bool:
    """Whether they are event frames [N, T, 2, H, W]."""
    return data[0][0].ndim == 5


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
        raise ValueError("faults must contain at least one, got none; omit it for the default ones")
    for fault in faults:
        if not isinstance(fault, wanted):
            other = "corruptions" if isinstance(fault, Corruption) else "stress"
            fits = f", or suite={other!r}" if isinstance(fault, Fault | Corruption) else ""
            raise TypeError(
                f"faults of the suite {suite!r} must be {wanted.__name__}, got {fault!r}; write "
                f"{wanted.__name__}(kind, level){fits}"
            )
    return faults


def _by_name(values: Mapping[NeuronKey, float] | None) -> dict[str, float]:
    """What was said of neurons, by the name of the module or of the class."""
    named = {}
    for key, value in (values or {}).items():
        named[key if isinstance(key, str) else key.__name__] = float(value)
    return named


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
