"""A network and its images in one call: the evaluation of a network of one's own, and its stress
test.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from torch import Tensor, nn
from torch.utils.data import Dataset

from sj_robust._environment import device_of
from sj_robust._preserved import evaluation_mode, full_precision
from sj_robust.attacks.threat import ThreatModel, parse_eps
from sj_robust.classifier import SpikingClassifier, as_classifier
from sj_robust.evaluation.assess import assess
from sj_robust.evaluation.corruptions import Corruption
from sj_robust.evaluation.data import Batches, Data, given_data
from sj_robust.evaluation.faults import Fault
from sj_robust.evaluation.progress import Position
from sj_robust.evaluation.robustness_report import RobustnessReport
from sj_robust.evaluation.stress_card import StressCard
from sj_robust.evaluation.stressing import stress_network
from sj_robust.evaluation.subject import Subject, check_fits
from sj_robust.evaluation.suites import SuiteName

__all__ = ["evaluate", "stress"]

_Display = tuple[Callable[[str], None], Callable[[Position], None] | None]
"""What says which part begins, and what is called after every step."""


def evaluate(
    model: nn.Module,
    x: Tensor | Batches | Dataset[tuple[Tensor, ...]],
    y: Tensor | None = None,
    *,
    eps: float | str,
    norm: Literal["Linf", "L2", "L0", "moves"] | None = None,
    largest_shift: int | None = None,
    total_shift: int | None = None,
    suite: SuiteName | None = None,
    T: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
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
        T: Number of time steps, for a bare network.
        mean: Mean per channel that a bare network expects to be subtracted.
        std: Standard deviation per channel that it expects to be divided by.
        draws: Fresh forwards in each of which a stochastic network must be wrong for an image to
            count as broken.
        seed: Seeds everything.
        batch_size: Images at a time; results do not depend on it.
        folder: Where progress is kept; None keeps none.
        name: What the report calls the network; None takes its class.
        dataset: What the report calls the images.
        progress: Whether what is being done and the time left are shown.

    Raises:
        TypeError: If the images are no tensor of floating point, or a label is no integer.
        ValueError: If an argument is wrong, T is missing, images lie outside [0, 1], network and
            images do not belong together, or the folder holds another evaluation.

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
    with _prepared(model, x, y, T, mean, std, batch_size, name, dataset, folder, progress) as ready:
        subject, batches, classes, frames, (say, on_step) = ready
        threat = ThreatModel(
            norm or ("L0" if frames else "Linf"), parse_eps(eps), largest_shift, total_shift
        )
        return assess(
            subject,
            batches,
            suite=suite or ("events" if frames else "standard"),
            threat=threat,
            dataset=dataset,
            classes=classes,
            seed=seed,
            draws=draws,
            folder=None if folder is None else Path(folder),
            configuration={"T": T, "mean": mean, "std": std},
            say=say,
            on_step=on_step,
        )


def stress(
    model: nn.Module,
    x: Tensor | Batches | Dataset[tuple[Tensor, ...]],
    y: Tensor | None = None,
    *,
    eps: float | str,
    norm: Literal["Linf", "L2", "L0", "moves"] | None = None,
    largest_shift: int | None = None,
    total_shift: int | None = None,
    suite: Literal["stress", "corruptions"] = "stress",
    faults: Sequence[Fault | Corruption] | None = None,
    draws: int = 5,
    steps: int = 20,
    T: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
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
        T: Number of time steps, for a bare network.
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
    with _prepared(model, x, y, T, mean, std, batch_size, name, dataset, folder, progress) as ready:
        subject, batches, _, frames, (say, on_step) = ready
        threat = ThreatModel(
            norm or ("L0" if frames else "Linf"), parse_eps(eps), largest_shift, total_shift
        )
        return stress_network(
            subject,
            batches,
            suite=suite,
            threat=threat,
            dataset=dataset,
            faults=faults,
            draws=draws,
            steps=steps,
            seed=seed,
            folder=None if folder is None else Path(folder),
            configuration={"T": T, "mean": mean, "std": std},
            say=say,
            on_step=on_step,
        )


@contextmanager
def _prepared(
    model: nn.Module,
    x: Tensor | Batches | Dataset[tuple[Tensor, ...]],
    y: Tensor | None,
    T: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    batch_size: int,
    name: str | None,
    dataset: str,
    folder: str | Path | None,
    progress: bool,
) -> Iterator[tuple[Subject, Data, int, bool, _Display]]:
    """Network, images, number of classes, whether images are event frames, display; evaluation
    mode, full precision.
    """
    data = given_data(x, y, batch_size)
    first = data[0][0]
    frames = first.ndim == 5
    classifier = as_classifier(model, T, mean=mean, std=std, frames=frames)
    network = classifier.net if isinstance(classifier, SpikingClassifier) else classifier
    subject = Subject(name or type(network).__name__, classifier, type(network).__name__)
    device = device_of(classifier)
    with evaluation_mode(classifier), full_precision(device), _shown(progress) as display:
        classes = check_fits(subject, first[:1].to(device), None, dataset)
        try:
            yield subject, data, classes, frames, display
        except KeyboardInterrupt as stopped:
            stopped.add_note(
                "the network is as it was; with folder=... the next evaluation could be continued"
                if folder is None
                else f"the network is as it was; the same call goes on with what is in {folder}"
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
