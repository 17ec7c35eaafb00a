"""Validation after every epoch, and the final report."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from sj_robust.attacks import Attack, ThreatModel
from sj_robust.classifier import SpikingClassifier
from sj_robust.core.datasets import SACCADES
from sj_robust.core.environment import device_of
from sj_robust.core.eps import eps_text
from sj_robust.core.host import is_neuron, run_past_hooks
from sj_robust.core.preserved import evaluation_mode
from sj_robust.core.randomness import SampleSeeds
from sj_robust.data import ImageSplits, image_loader
from sj_robust.data.images import split_numbers
from sj_robust.evaluation import Member, Report
from sj_robust.evaluation.intervals import wilson_interval
from sj_robust.evaluation.report.pictures import gallery_within
from sj_robust.evaluation.result import Row
from sj_robust.evaluation.run.data import Data
from sj_robust.evaluation.run.loop import Asked, alone, run
from sj_robust.evaluation.run.member import Variant
from sj_robust.evaluation.run.progress import Position, Watch
from sj_robust.evaluation.run.proofs import proof_row
from sj_robust.models.weights import read_weights
from sj_robust.neuron.charging import find_neurons
from sj_robust.perturbation import MPPDMonitor
from sj_robust.proofs import verify
from sj_robust.proofs.differentiable import TrainedMethod
from sj_robust.proofs.gains.design import gain_scalars
from sj_robust.training.journal import EpochRecord, Journal, catastrophic_overfitting
from sj_robust.training.modes import NOISE
from sj_robust.training.processes import mixed

__all__ = ["Validation", "check_start", "final_report", "read_test_images", "seen_before"]

_BATCH = 128
_START = 256
"""Number of validation images on which a network is tried before its training."""
_SPLIT = ("seed", "train_limit", "validation_fraction")
"""Options of a training that say which images are held out of the training set."""


class Validation:
    """Accuracy on the validation images, the same figure on any number of processes.
    多进程分担的验证。

    The images come in fixed batches, each with its own seed. Process r of P takes the batches r, r
    + P, ..., and the counts are summed. ``seed`` is that of the attacks; ``pin_memory`` as in
    :func:`image_loader`.

    Examples:
        >>> images = torch.utils.data.TensorDataset(
        ...     torch.eye(2).view(2, 1, 1, 2), torch.tensor([0, 0])
        ... )
        >>> Validation(images, Accelerator(cpu=True), seed=0).accuracy(nn.Flatten(), {})
        {'clean': 0.5}
    """

    def __init__(
        self,
        images: Dataset[tuple[Tensor, ...]],
        accelerator: Accelerator,
        *,
        seed: int,
        pin_memory: bool = False,
    ) -> None:
        """Choose this process's share; see the class."""
        self._accelerator = accelerator
        self._seed = seed
        self._size = len(images)  # type: ignore[arg-type]  # every set here has a length
        batches = math.ceil(self._size / _BATCH)
        self._own_batches = range(accelerator.process_index, batches, accelerator.num_processes)
        own_images: list[int] = []
        for number in self._own_batches:
            first = number * _BATCH
            own_images += range(first, min(first + _BATCH, self._size))
        self._loader = image_loader(Subset(images, own_images), _BATCH, pin_memory=pin_memory)

    def accuracy(
        self,
        model: nn.Module,
        attacks: Mapping[str, Attack],
        verified: ThreatModel | None = None,
        verified_method: TrainedMethod = "joint",
    ) -> dict[str, float]:
        """Accuracy in [0, 1] on clean images and under each attack; every process gets the same
        figures.

        With a threat ``verified`` also the share of images that are ``"verified"`` for it.
        """
        counts = dict.fromkeys(["clean", *attacks], 0)
        for number, (x, y) in zip(self._own_batches, self._batches(), strict=True):
            seeds = _seeds(len(y), mixed(self._seed, number))
            right = alone(model, x, y, attacks, seeds=seeds)
            for name in counts:
                counts[name] += right[name]
        if verified is not None:
            counts["verified"] = self._verified(model, verified, verified_method)
        own = torch.tensor(list(counts.values()), device=self._accelerator.device)
        totals = self._accelerator.reduce(own, "sum").tolist()
        return {name: total / self._size for name, total in zip(counts, totals, strict=True)}

    def _verified(self, model: nn.Module, threat: ThreatModel, method: TrainedMethod) -> int:
        """Number of this process's images that are verified.

        All batches go into one call, so that the network is checked only once.
        """
        batches = list(self._batches())
        if not batches:
            return 0
        x, y = map(torch.cat, zip(*batches, strict=True))
        with evaluation_mode(model):
            found = verify(model, x, y, threat, method=method, batch_size=_BATCH)
        return sum(found.verified)

    def scalars(self, classifier: SpikingClassifier, attack: Attack) -> dict[str, float]:
        """Scalars for the log: MS-MPPD per layer under ``attack`` on this process's first images,
        and every gain; none for a network without spiking neurons that can be followed, or with
        some that SpikingJelly's ``memopt`` runs.
        """
        net = classifier.net
        x, y = next(self._batches())
        if not any(map(is_neuron, net.modules())) or not find_neurons(net)[0]:
            return {}
        if run_past_hooks(net):
            return {}
        x_adv = attack(classifier, x, y, generator=torch.Generator().manual_seed(self._seed))
        with MPPDMonitor(net) as monitor:
            stats = monitor.compare(x, x_adv, forward=classifier)
        scalars = {}
        for name, moved in stats.items():
            scalars[f"ms_mppd/{name}"] = float(moved.ms_mppd.mean())
        for name, module in net.named_modules():
            gains = getattr(module, "input_gain", None)
            if isinstance(gains, nn.Parameter):
                scalars |= {
                    f"input_gain/{name}/t{t}": gain for t, gain in enumerate(gains.tolist())
                }
        return scalars | gain_scalars(net, classifier.T)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self._accelerator.device
        for x, y in self._loader:
            yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def _seeds(images: int, seed: int) -> SampleSeeds:
    return SampleSeeds(range(images)).derived("validation", seed % 2**31)


def check_start(
    classifier: SpikingClassifier, splits: ImageSplits, journal: Journal, origin: str
) -> None:
    """Say how accurate a network with trained weights is before training, and warn if it is not.
    训练前检查初始准确率。

    There are two warnings: the network is better on images that are normalised with their own mean
    and standard deviation, so that the weights expect a normalisation; or it is no better than
    guessing.

    Args:
        classifier: The network.
        splits: The data set; the first of its validation images are used.
        journal: Where it is said.
        origin: Where the weights are from.
    """
    device = device_of(classifier)
    x, y = next(iter(image_loader(splits.validation, _START)))
    x, y = x.to(device), y.to(device)
    right = _count_right(classifier, x, y)
    journal.say(
        f"starting from {origin}: {right / len(y):.1%} of {len(y)} validation images correct"
    )
    low, high = wilson_interval(right, len(y))
    warning = None
    if not splits.frames:
        warning = _lost_normalisation(classifier, x, y, high)
    if warning is None and low <= 1 / splits.classes:
        warning = "that is no better than guessing; check the weights, --mean, --std and --tau"
    if warning is not None:
        journal.say(f"WARNING: {warning}")


def seen_before(checkpoint: Path, splits: ImageSplits) -> str | None:
    """A warning if a checkpoint of ``recipes/adv_train.py`` was trained on validation images.
    检查预训练是否用过验证图像。

    None also for other files, which do not say what images they were trained on.

    Args:
        checkpoint: Where the weights are from.
        splits: The data set of the training that starts from them.
    """
    options = read_weights(checkpoint).options
    train, validation = splits.train, splits.validation
    if options is None or not options.keys() >= {"dataset", *_SPLIT}:
        return None
    if _images_of(options["dataset"]) != _images_of(splits.name):
        return None
    if not (isinstance(train, Subset) and isinstance(validation, Subset)):
        return None
    images = train.dataset
    if images is not validation.dataset or not isinstance(images, Sized):
        return None
    earlier, _ = split_numbers(
        len(images),
        seed=options["seed"],
        train_limit=options["train_limit"],
        fraction=options["validation_fraction"],
    )
    seen = len(set(earlier).intersection(validation.indices))
    if not seen:
        return None
    same = [f"--{name.replace('_', '-')} {options[name]}" for name in _SPLIT]
    return (
        f"{checkpoint} was trained on {seen} of the {len(validation)} validation images, so the "
        "validation accuracies are too high and may select the wrong epoch; train with the options "
        f"of that training, {' '.join(same)}"
    )


def _images_of(dataset: str) -> str:
    """The data set whose images another one shows as events, or itself."""
    return SACCADES.get(dataset, dataset)


def _lost_normalisation(
    classifier: SpikingClassifier, x: Tensor, y: Tensor, accuracy: float
) -> str | None:
    """A warning if a classifier that does not normalise its images would be significantly better
    than ``accuracy`` if it did.
    """
    normalises = classifier.mean is not None or classifier.std is not None
    if normalises or classifier.encoder is not None:
        return None
    dims = [0, *range(2, x.ndim)]
    mean = [round(value, 3) for value in x.mean(dims).tolist()]
    std = [round(value, 3) for value in x.std(dims).tolist()]
    if not all(value > 0 for value in std):
        return None
    normalising = SpikingClassifier(
        classifier.net, classifier.T, mean=mean, std=std, takes=classifier.takes
    )
    right = _count_right(normalising.to(x.device), x, y)
    low, _ = wilson_interval(right, len(y))
    if low <= accuracy:
        return None
    means = " ".join(map(str, mean))
    stds = " ".join(map(str, std))
    return (
        f"with --mean {means} --std {stds}, which these images have, {right / len(y):.1%} are "
        "right: the network expects normalised images"
    )


def _count_right(model: nn.Module, x: Tensor, y: Tensor) -> int:
    counts = alone(model, x, y, {}, seeds=_seeds(len(y), 0))
    return counts["clean"]


def final_report(
    name: str,
    classifier: SpikingClassifier,
    history: Sequence[EpochRecord],
    splits: ImageSplits,
    data: Data,
    attacks: Mapping[str, Attack],
    threat: ThreatModel,
    journal: Journal,
    *,
    seed: int,
    single_step: bool,
    verified: bool = False,
    verified_method: TrainedMethod = "joint",
    dataset: str = "images",
    configuration: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Report:
    """Report of a trained network on the test images, with the curves of its training.
    训练结束后的评估。

    The report has the accuracy under each attack by itself. The network is a variant of the report,
    so that the reports of several networks can be merged. TensorBoard gets pictures of an attack on
    validation images.

    Args:
        name: Name of the network in the report.
        classifier: The network.
        history: Records of its epochs, which become the curves.
        splits: The data set; its validation images are shown.
        data: Its test images, from :func:`read_test_images`: the same for all reports that are
            merged, even if the data set draws other images in every pass.
        attacks: Attacks by name, budgets inside.
        threat: The budget, for the report.
        journal: Shows the progress.
        seed: Seeds the attacks.
        single_step: Whether it was trained with a single-step attack, so that catastrophic
            overfitting is looked for.
        verified: Whether the test images are verified within the threat, for a row ``"verified"``
            and a warning that says how many.
        verified_method: Method of :func:`sj_robust.proofs.verify` that proves them.
        dataset: Name of the data set.
        configuration: Options of the run.
        environment: Versions, device, commit.
    """
    members = [
        Member(attack_name, attack, group="", threat=None if attack_name == NOISE else threat)
        for attack_name, attack in attacks.items()
    ]
    variant = Variant(members, name, seed)
    steps = len(data) * (1 + len(members))
    which = "held-out" if splits.test is splits.validation else "test"
    with journal.steps(f"evaluating {name} on {len(data.labels)} {which} images", steps) as step:
        watch = Watch(on_step=partial(_stepped, step))
        outcome = run(
            classifier,
            data,
            [variant],
            asked=Asked(threat, may_draw=True),
            network=name,
            watch=watch,
            shared=False,  # the first process reports alone
        )
    if journal.writes and threat.eps > 0 and len(splits.validation):
        x, y = next(iter(image_loader(splits.validation, _BATCH)))
        with suppress(ValueError):  # no image is right
            names = splits.class_names
            shown = gallery_within(classifier, x, y, threat, seed=seed, class_names=names)
            journal.show_gallery(name.replace(" ", "_"), shown, len(history))
    rows = outcome.rows
    notes = []
    if single_step:
        notes += _overfitting_warnings(history)
    if verified:
        proofs = _proofs(name, classifier, data, journal, threat=threat, method=verified_method)
        rows = (*rows, proofs)
        notes.append(_share_verified(proofs, threat))
    return Report(
        name=name,
        dataset=dataset,
        suite="training",
        labels=data.labels,
        rows=rows,
        threat=threat,
        classes=splits.classes,
        seed=seed,
        data=data.fingerprint,
        curves={name: [asdict(record) for record in history]},
        configuration=dict(configuration or {}),
        environment=dict(environment or {}),
        warnings=(*outcome.warnings, *[f"{name}: {note}" for note in notes]),
    )


def read_test_images(splits: ImageSplits) -> Data:
    """The test images, read once."""
    return Data.of(image_loader(splits.test, 32 if splits.frames else 512))


def _overfitting_warnings(history: Sequence[EpochRecord]) -> list[str]:
    """A warning for every epoch that looks like catastrophic overfitting."""
    found = []
    for epochs in range(1, len(history) + 1):
        warning = catastrophic_overfitting(history[:epochs])
        if warning is not None:
            found.append(warning)
    return found


def _proofs(
    name: str,
    classifier: SpikingClassifier,
    data: Data,
    journal: Journal,
    *,
    threat: ThreatModel,
    method: TrainedMethod,
) -> Row:
    """Which of the test images are verified."""
    device = device_of(classifier)
    verified: list[int] = []
    text = f"verifying {name} on {len(data.labels)} test images"
    start = time.perf_counter()
    with journal.steps(text, len(data)) as step, evaluation_mode(classifier):
        first = 0
        for x, y in data:
            x, y = x.to(device), y.to(device)
            found = verify(classifier, x, y, threat, method=method)
            verified += [first + row for row, good in enumerate(found.verified) if good]
            first += len(y)
            step()
    row = proof_row(threat, len(data.labels), verified)
    seconds = time.perf_counter() - start
    return replace(row, member="verified", variant=name, seconds=seconds)


def _share_verified(proofs: Row, threat: ThreatModel) -> str:
    """How many images are verified, in words."""
    verified, images = len(proofs.stood), len(proofs.seen)
    share = f"{verified} of {images} test images ({verified / images:.1%})"
    shift = "" if threat.largest_shift is None else f" by {threat.largest_shift} frames at most"
    return f"{share} verified at {threat.norm} {eps_text(threat.eps)}{shift}"


def _stepped(step: Callable[[], None], position: Position) -> None:
    step()
