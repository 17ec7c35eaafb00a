"""Makes your own network robust in one call."""

import tempfile
from collections.abc import Iterator, Mapping, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from sj_robust.attacks import Attack, ThreatModel
from sj_robust.classifier import SpikingClassifier, as_classifier
from sj_robust.core.checks import (
    Channels,
    check_channels,
    check_choice,
    check_count,
    check_images,
    check_labels,
    check_network,
    check_number_of_channels,
    check_seed,
    check_size,
    check_steps,
    check_switch,
)
from sj_robust.core.digest import fingerprint
from sj_robust.core.environment import device_of, environment
from sj_robust.core.folders import check_folder, locked
from sj_robust.core.preserved import evaluation_mode, seeded_network, uncompiled
from sj_robust.core.threat import Threat, as_threat
from sj_robust.data import ImageSplits
from sj_robust.data.checked import CheckedImages
from sj_robust.data.stored import FileImages, StoredImages
from sj_robust.evaluation import Report
from sj_robust.evaluation.run.data import Data
from sj_robust.evaluation.subject import Subject, check_fits
from sj_robust.models.checkpoint import check_same_run, load_checkpoint, load_run
from sj_robust.neuron.charging import NeuronKey, stated
from sj_robust.training.engine import check_training, train
from sj_robust.training.journal import EpochRecord, Journal
from sj_robust.training.modes import (
    MODES,
    Mode,
    ModeName,
    final_attacks,
    training_attack,
    validation_attacks,
)
from sj_robust.training.objective import Objective
from sj_robust.training.plan import TrainingPlan
from sj_robust.training.processes import TrainingInterrupted
from sj_robust.training.validation import final_report, read_test_images

__all__ = ["finetune"]

_SELECTED_BY = (
    "The figures are those of the held-out images, by which the epoch was selected, so those after "
    "the training are too high for new images: pass images of their own as test=."
)
_BEFORE = "before.json"
"""File in the folder of a training: the report on the network before it."""

Images = Dataset[Any] | DataLoader[Any] | tuple[Tensor, Tensor]
"""Images with labels: a data set, its loader, or two tensors."""


def finetune(
    net: nn.Module,
    data: ImageSplits | Images,
    *,
    eps: Threat,
    test: Images | None = None,
    mode: ModeName = "at",
    rho: float | None = None,
    epochs: int = 10,
    lr: float = 0.01,
    batch_size: int = 64,
    validation_fraction: float = 0.1,
    T: int | None = None,
    mean: Channels = None,
    std: Channels = None,
    decay: Mapping[NeuronKey, float] | None = None,
    gain: Mapping[NeuronKey, float] | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Report:
    """Make your own network robust: adversarial training, by default with MS-MPPD.
    对自己的网络做鲁棒微调。

    Equation of mode ``"at"``, with x~ the image after one step of attack::

        L = 0.5 * CE(f(x), y) + 0.5 * CE(f(x~), y) + rho * MS-MPPD(x, x~)

    The network is trained in place, without ``torch.compile`` if it is compiled. A part of the
    training images is held out, and the network gets the weights of the epoch that is best on them
    under attack. With a ``folder``, the same call resumes an interrupted training.

    Args:
        net: A bare SpikingJelly network, with ``T`` and, if it expects normalised images, ``mean``
            and ``std``; or a :class:`SpikingClassifier`. A network with random weights is trained
            from scratch.
        data: Images of :func:`sj_robust.data.load_images`; or training images in [0, 1] as a data
            set of pairs (image [C, H, W], class), a ``DataLoader``, whose data set is used, or two
            tensors (x [N, C, H, W], y [N]).
        eps: Linf radius of the attack, a number, text such as ``"8/255"`` or a ``ThreatModel``.
        test: Images for the report, in the same form as ``data``; None uses the test images of
            ``ImageSplits``, or the held-out images of other data, by which the epoch is selected,
            so that the accuracies are too high; the report then has a warning.
        mode: Training mode, a key of :data:`MODES`.
        rho: Weight of MS-MPPD; None uses that of the mode. Mode ``"none"`` has no such term.
        epochs: Passes over the training images.
        lr: Initial learning rate of SGD; it decays to 0. For random weights use about 0.1.
        batch_size: Images per step.
        validation_fraction: Share of the training images that is held out, for data other than
            ``ImageSplits``.
        T: Number of time steps, for a bare network; None if it has its own.
        mean: Mean per channel that a bare network expects to be subtracted.
        std: Standard deviation per channel that it expects to be divided by.
        decay: For neurons whose dynamics are not known, as in ``sj_robust.MPPDMonitor``.
        gain: Their input gain.
        seed: Random seed.
        folder: Folder for checkpoints and log; None saves nothing. It resumes only the training of
            the same network, images and options, of which it holds fingerprints: build a network
            with random weights after ``torch.manual_seed``. Of a data set of your own, which may
            draw other images in every pass, the labels alone are compared. ``"before"`` is measured
            once, at the first call, and then read from the folder.
        progress: Whether to show the progress.

    Returns:
        A report with the accuracies on the test images (clean, under Gaussian noise, FGSM and PGD)
        in the variants ``"before"`` and ``"after"``, and with the training curves. It is a quick
        look: :func:`sj_robust.evaluate` measures the network.

    Raises:
        BlockingIOError: If another process trains in the folder.
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is wrong, network and images do not belong together, the network
            has no spiking layers, no weight that requires a gradient or one in half precision, the
            images are event frames, the folder holds another training, or no weight changes in an
            epoch.
        NonFiniteLossError: If the loss becomes NaN or infinite.
        TrainingInterrupted: After Ctrl-C; the network then holds the weights of the last step.

    Source: Ding et al., "Robust Stable Spiking Neural Networks" (ICML 2024), section 4.

    Examples:
        >>> from spikingjelly.activation_based import neuron
        >>> net = nn.Sequential(nn.Flatten(2), nn.Linear(4, 3), neuron.LIFNode(step_mode="m"))
        >>> x, y = torch.rand(40, 1, 2, 2), torch.arange(40) % 3
        >>> report = finetune(net, (x, y), eps="8/255", T=4, epochs=1, batch_size=8, progress=False)
        >>> report.variants
        ('before', 'after')
    """
    check_network(net, "net")
    check_choice("mode", mode, get_args(ModeName))
    check_switch("progress", progress)
    check_size("validation_fraction", validation_fraction)
    threat = as_threat(eps, "Linf")
    if threat.eps == 0 and mode != "none":
        raise ValueError(
            f"eps must be > 0 in mode {mode!r}, got 0; give a radius such as '8/255', or mode='none'"
        )
    kept = check_folder("folder", folder)
    splits = _splits(
        data, test, fraction=validation_fraction, seed=check_seed("seed", seed), mean=mean, std=std
    )
    classifier = _classifier(net, splits, T=T, mean=mean, std=std)
    chosen = MODES[mode]
    if rho is None:
        rho = chosen.rho
    check_size("rho", rho)
    if rho != chosen.rho and "rho" in chosen.idle:
        raise ValueError(f"rho has no effect in mode {mode!r}, got {rho}; omit it")
    certified = chosen.loss == "certified"
    plan = TrainingPlan(
        check_count("epochs", epochs),
        batch_size=check_count("batch_size", batch_size),
        lr=lr,
        weight_decay=chosen.weight_decay,
        retraction=chosen.retraction,
        select=chosen.select,
        single_step_attack=chosen.single_step,
        verified=threat if certified else None,
        verified_method="ibp" if certified else "joint",
        seed=seed,
    )
    with stated(classifier.net, decay, gain):
        objective = Objective(
            classifier,
            kappa=chosen.kappa,
            rho=rho,
            loss=chosen.loss,
            certified_eps=threat if certified else None,
        )
    configuration = {
        "mode": mode,
        "eps": threat.eps,
        "rho": rho,
        "epochs": epochs,
        "lr": lr,
        "batch_size": batch_size,
        "images": len(splits.train),
        "seed": seed,
        "T": classifier.T,
        "mean": None if classifier.mean is None else classifier.mean.tolist(),
        "std": None if classifier.std is None else classifier.std.tolist(),
        "validation_fraction": None if isinstance(data, ImageSplits) else validation_fraction,
    }
    description: dict[str, Any] = {"finetune": configuration}
    accelerator = Accelerator(cpu=device_of(classifier).type == "cpu")
    watching = objective.monitor or nullcontext()
    with (
        watching,  # whose hooks are gone afterwards
        stated(classifier.net, decay, gain),
        evaluation_mode(net),
        uncompiled(net),
        _folder(kept, net, accelerator) as place,
    ):
        splits = _with_classes(splits, classifier)
        journal = Journal(place if progress else None)
        is_trained = False
        if kept is not None:
            weights, is_trained = _weights_before(place, classifier)
            description["images and labels"] = _digest_of_images(splits)
            description["network"] = {"modules": fingerprint(str(net)), "weights": weights}
            if (place / "last.pt").exists():
                check_same_run(load_run(place / "last.pt")["description"], description)
        run = _Run(
            objective=objective,
            splits=splits,
            data=read_test_images(splits),
            plan=plan,
            mode=chosen,
            threat=threat,
            accelerator=accelerator,
            description=description,
            journal=journal,
            folder=place,
        )
        run.check()
        before = run.before(is_trained=is_trained)
        try:
            history = run.train()
        except TrainingInterrupted as stopped:
            remedy = "with folder=... the next training could be continued"
            if kept is not None:
                remedy = f"the same call continues from {place}"
            stopped.add_note(f"the network holds the weights of the last step; {remedy}")
            raise
        classifier.load_state_dict(load_checkpoint(place / "best.pt")["model"])
        report = reduce(Report.merged, [before, run.measured("after", history)])
        if splits.test is splits.validation:
            journal.say(f"WARNING: {_SELECTED_BY}")
            report = replace(report, warnings=(*report.warnings, _SELECTED_BY))
        return report


@dataclass(frozen=True)
class _Run:
    """A training, with a report before and after it."""

    objective: Objective
    splits: ImageSplits
    data: Data
    plan: TrainingPlan
    mode: Mode
    threat: ThreatModel
    accelerator: Accelerator
    description: dict[str, Any]
    journal: Journal
    folder: Path

    @property
    def perturb(self) -> Attack | None:
        """The attack on training images, if the loss has perturbed ones."""
        if self.mode.loss == "certified" and self.objective.rho == 0:
            return None
        return training_attack(self.mode.name, eps=self.threat.eps)

    def check(self) -> None:
        """Refuse what cannot be trained."""
        classifier = self.objective.classifier
        device = device_of(classifier)
        attacks = [self.perturb, *final_attacks(self.threat.eps).values()]
        classifier.cpu()  # where the images are
        try:
            check_training(self.objective, self.splits, self.plan, self.accelerator, attacks)
        finally:
            classifier.to(device)

    def train(self) -> list[EpochRecord]:
        """Train, or go on where the folder ends."""
        return train(
            self.objective,
            self.splits,
            self.plan,
            perturb=self.perturb,
            validation_attacks=validation_attacks(self.threat.eps),
            accelerator=self.accelerator,
            folder=self.folder,
            journal=self.journal,
            description=self.description,
            resume=True,
        )

    def before(self, *, is_trained: bool) -> Report:
        """The report on the network before its training: that of the first call if the folder has
        it, else measured, with a warning if the network is trained already.
        """
        path = self.folder / _BEFORE
        if path.is_file() and (self.folder / "last.pt").is_file():
            earlier = Report.load(path)
            if earlier.data == self.data.fingerprint:
                self.journal.say(f"before: the figures of the first call, from {path}")
                return replace(earlier, environment=environment(self.accelerator.device))
        report = self.measured("before", [])
        if not is_trained:
            report.save(path)
            return report
        warning = (
            f"before: measured on weights that were trained by an earlier call, since {path} is "
            "missing or of other test images; for the figures before the training, give the "
            "network with the weights of its start"
        )
        self.journal.say(f"WARNING: {warning}")
        return replace(report, warnings=(*report.warnings, warning))

    def measured(self, name: str, history: list[EpochRecord]) -> Report:
        """The report on the network as it is."""
        return final_report(
            name,
            self.objective.classifier,
            history,
            self.splits,
            self.data,
            final_attacks(self.threat.eps),
            self.threat,
            self.journal,
            seed=self.plan.seed,
            single_step=self.mode.single_step,
            verified=self.plan.verified is not None,
            verified_method=self.plan.verified_method,
            dataset=self.splits.name,
            configuration=self.description["finetune"],
            environment=environment(self.accelerator.device),
        )


def _with_classes(splits: ImageSplits, classifier: SpikingClassifier) -> ImageSplits:
    """The images, with the number of classes that the network tells apart."""
    subject = Subject(type(classifier.net).__name__, classifier, "")
    image = splits.train[0][0].unsqueeze(0).to(device_of(classifier))
    with evaluation_mode(classifier), uncompiled(classifier):
        classes = check_fits(subject, image, splits.classes or None, splits.name)
    return replace(splits, classes=classes)


def _splits(
    data: ImageSplits | Images,
    test: Images | None,
    *,
    fraction: float,
    seed: int,
    mean: Channels,
    std: Channels,
) -> ImageSplits:
    """Images to train on, to select by and to report on."""
    splits = data if isinstance(data, ImageSplits) else _held_out(data, fraction, seed)
    image = splits.train[0][0].unsqueeze(0)
    if test is not None:
        splits = replace(splits, test=_images("test", test))
        other = splits.test[0][0].unsqueeze(0)
        if other.shape != image.shape or other.dtype != image.dtype:
            raise ValueError(
                f"test must hold images like those of data, {image.dtype} {list(image.shape[1:])}, "
                f"got {other.dtype} {list(other.shape[1:])}; resize or convert them"
            )
    if image.ndim == 5:
        raise ValueError(
            f"data must be images [C, H, W], got event frames {list(image.shape[1:])}; train on "
            "events with sj-robust train --dataset saccade:digits --flips 5"
        )
    check_images(image)
    check_number_of_channels(
        image, mean=check_channels("mean", mean), std=check_channels("std", std, positive=True)
    )
    return splits


def _held_out(data: Images, fraction: float, seed: int) -> ImageSplits:
    """Splits of images that have none; the number of classes is left to the network."""
    images = _images("data", data)
    count = int(fraction * len(images))
    if not 0 < count < len(images):
        raise ValueError(
            f"validation_fraction must leave images on both sides, got {fraction} of "
            f"{len(images)} images; give another share, or more images"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator).tolist()
    held_out = Subset(images, order[:count])
    image = images[0][0]
    if image.ndim < 3:
        raise ValueError(
            f"data must be images [C, H, W], got {list(image.shape)}; give features as images "
            "[F, 1, 1], and begin the network with Flatten"
        )
    height, width = image.shape[-2:]
    return ImageSplits(
        name="images",
        train=Subset(images, order[count:]),
        validation=held_out,
        test=held_out,
        image_shape=(len(image), height, width),
        classes=0,
    )


def _images(name: str, given: Images) -> Subset[tuple[Tensor, ...]]:
    """The data set of what was given."""
    if isinstance(given, tuple) and len(given) == 2:
        x, y = given
        check_images(x)
        check_labels(y, x)
        given = TensorDataset(x, y)
    found = given.dataset if isinstance(given, DataLoader) else given
    if not isinstance(found, Dataset) or not isinstance(found, Sized):
        raise TypeError(
            f"{name} must be a data set with a length, its DataLoader or two tensors (x, y), got "
            f"{type(given).__name__}; give torch.utils.data.TensorDataset(x, y)"
        )
    return Subset(CheckedImages(name, found), range(len(found)))


def _classifier(
    net: nn.Module, splits: ImageSplits, *, T: int | None, mean: Channels, std: Channels
) -> SpikingClassifier:
    """The network as a function of images, which shares its weights."""
    image = splits.train[0][0].unsqueeze(0)
    classifier = as_classifier(net, check_steps(T), mean=mean, std=std, images=image)
    if not isinstance(classifier, SpikingClassifier):
        raise ValueError(
            f"net must be a spiking network, got {type(net).__name__} without spiking neurons; "
            "give a network of SpikingJelly's neurons"
        )
    return classifier


def _digest_of_images(splits: ImageSplits) -> str:
    """Digest of the images to train on and to select by, with their labels, in order; of the
    labels alone if the data set may draw other images in every pass.
    """
    parts = []
    with seeded_network(None, 0, torch.device("cpu")):
        for images in (splits.train, splits.validation):
            source: object = images
            while isinstance(source, Subset | CheckedImages):
                source = source.dataset
            repeats = type(source) in (TensorDataset, StoredImages, FileImages)
            pairs = (images[index] for index in range(len(images)))
            parts.append([(int(y), fingerprint(x) if repeats else "") for x, y in pairs])
    return fingerprint(parts)


def _weights_before(folder: Path, classifier: SpikingClassifier) -> tuple[str, bool]:
    """Digest of the weights before the training of a folder, and whether the network has those of
    one of its checkpoints by now, as after an interruption.
    """
    own = classifier.state_dict()
    for path in (folder / "last.pt", folder / "best.pt"):
        content = load_checkpoint(path) if path.is_file() else {"model": {}}
        weights = content["model"]
        if own.keys() == weights.keys() and all(
            torch.equal(value.cpu(), weights[name]) for name, value in own.items()
        ):
            return content["description"].get("network", {}).get("weights", ""), True
    return fingerprint(own), False


@contextmanager
def _folder(kept: Path | None, net: nn.Module, accelerator: Accelerator) -> Iterator[Path]:
    """The folder, which the main process keeps others out of, or one that is gone afterwards, by
    whose name progress calls the network.
    """
    if kept is None:
        with tempfile.TemporaryDirectory() as temporary:
            place = Path(temporary, type(net).__name__)
            place.mkdir()
            yield place
    else:
        kept.mkdir(parents=True, exist_ok=True)
        alone: AbstractContextManager[None] = nullcontext()
        if accelerator.is_main_process:
            alone = locked(
                kept / ".lock",
                f"another process trains in {kept}; wait until it has ended, or train into another "
                "folder",
            )
        with alone:
            yield kept
