"""How good a network in training is: validation of every epoch, and the report at the end."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from sj_robust.attacks import Attack, eps_text
from sj_robust.classifier import SpikingClassifier
from sj_robust.core.environment import device_of
from sj_robust.core.host import is_neuron
from sj_robust.core.preserved import evaluation_mode
from sj_robust.core.randomness import SampleSeeds
from sj_robust.data import ImageSplits, image_loader
from sj_robust.evaluation import Member, Report, ThreatModel, gallery, wilson_interval
from sj_robust.evaluation.run.data import Data
from sj_robust.evaluation.run.loop import Asked, alone, run
from sj_robust.evaluation.run.progress import Position, Watch
from sj_robust.evaluation.run.variant import Variant
from sj_robust.perturbation import MPPDMonitor
from sj_robust.perturbation.gains import gain_scalars, perturbation_gains
from sj_robust.proofs import verify
from sj_robust.training.history import EpochRecord, catastrophic_overfitting
from sj_robust.training.journal import Journal
from sj_robust.training.processes import mixed

__all__ = ["Validation", "check_start", "final_report"]

_BATCH = 128
_START = 256
"""Validation images that a network is looked at with before its training."""


class Validation:
    """Accuracy on the validation images, the same figure on any number of processes.
    多进程分担的验证。

    The images come in fixed batches, each with its own seed, of which process r of P takes r, r +
    P, ...; the counts are summed. ``seed`` is that of the attacks; ``pin_memory`` as in
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
        self._numbers = range(
            accelerator.process_index, -(-self._size // _BATCH), accelerator.num_processes
        )
        mine = [
            i
            for number in self._numbers
            for i in range(number * _BATCH, min(self._size, (number + 1) * _BATCH))
        ]
        self._loader = image_loader(Subset(images, mine), _BATCH, pin_memory=pin_memory)

    def accuracy(
        self,
        model: nn.Module,
        attacks: Mapping[str, Attack],
        verified_eps: float | None = None,
        *,
        verified_norm: Literal["Linf", "L0"] = "Linf",
    ) -> dict[str, float]:
        """Accuracy in [0, 1] on clean images and under each attack; every process gets the same
        figures.

        With ``verified_eps`` also the share of images that are ``"verified"`` at that radius of
        ``verified_norm``.
        """
        names = ("clean", *attacks, *(() if verified_eps is None else ("verified",)))
        correct = torch.zeros(len(names), dtype=torch.int64)
        for number, (x, y) in zip(self._numbers, self._batches(), strict=True):
            seeds = _seeds(len(y), mixed(self._seed, number))
            counts = alone(model, x, y, attacks, seeds=seeds)
            correct += torch.tensor([counts.get(name, 0) for name in names])
        if verified_eps is not None and self._numbers:
            assert isinstance(model, SpikingClassifier)
            x, y = (torch.cat(parts) for parts in zip(*self._batches(), strict=True))
            with evaluation_mode(model):  # of all batches at once: the network is checked once
                proofs = verify(model, x, y, verified_eps, norm=verified_norm, batch_size=_BATCH)
                correct[-1] = sum(proofs.verified)
        total = self._accelerator.reduce(correct.to(self._accelerator.device), "sum")
        return dict(zip(names, (count / self._size for count in total.tolist()), strict=True))

    def scalars(
        self, classifier: SpikingClassifier, attack: Attack, *, bounds: bool = False
    ) -> dict[str, float]:
        """Scalars for the log: MS-MPPD per layer under ``attack`` on this process's first images,
        and every gain; of a network without spiking neurons there are none.

        With ``bounds`` so is the exact L2 bound of every covered layer, its gain times the norm of
        the map before it.
        """
        net = classifier.net
        x, y = next(self._batches())
        if not any(map(is_neuron, net.modules())):
            return {}
        x_adv = attack(classifier, x, y, generator=torch.Generator().manual_seed(self._seed))
        with MPPDMonitor(net) as monitor:
            stats = monitor.compare(x, x_adv, forward=classifier)
        scalars = {f"ms_mppd/{name}": float(layer.ms_mppd.mean()) for name, layer in stats.items()}
        for name, module in net.named_modules():
            gains = getattr(module, "input_gain", None)
            if isinstance(gains, nn.Parameter):
                scalars |= {
                    f"input_gain/{name}/t{t}": gain for t, gain in enumerate(gains.tolist())
                }
        if bounds:  # a log needs no more than two digits
            for layer in perturbation_gains(classifier, x[:1], tolerance=1e-2).layers:
                if layer.l2 is not None and layer.l2.value is not None:
                    scalars[f"l2_bound/{layer.name}"] = layer.l2.value
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
    """Say how good a network is that does not begin at random, and warn of a lost normalisation.
    训练前检查初始准确率。

    It is warned of if no more than guessing is left, and if the network is better on images that
    are normalised with their own mean and standard deviation.

    Args:
        classifier: The network.
        splits: The data set, of which some validation images count.
        journal: Where it is said.
        origin: Where the weights are from.
    """
    x, y = (
        part.to(device_of(classifier))
        for part in next(iter(image_loader(splits.validation, _START)))
    )

    def right(model: nn.Module) -> int:
        return alone(model, x, y, {}, seeds=_seeds(len(y), 0))["clean"]

    clean = right(classifier)
    journal.say(f"starting from {origin}: {clean / len(y):.1%} of {len(y)} validation images right")
    low, high = wilson_interval(clean, len(y))
    if (
        not splits.frames
        and classifier.encoder is None
        and classifier.mean is None
        and classifier.std is None
    ):
        dims = [0, *range(2, x.ndim)]
        mean, std = (
            [round(value, 3) for value in part.tolist()] for part in (x.mean(dims), x.std(dims))
        )
        if min(std) > 0:
            net, takes = classifier.net, classifier.takes
            normalising = SpikingClassifier(net, classifier.T, mean=mean, std=std, takes=takes)
            lifted = right(normalising.to(x.device))
            if wilson_interval(lifted, len(y))[0] > high:
                means, stds = (" ".join(map(str, values)) for values in (mean, std))
                journal.say(
                    f"WARNING: with --mean {means} --std {stds}, those of these images, "
                    f"{lifted / len(y):.1%} are: the network expects normalised images"
                )
                return
    if low <= 1 / splits.classes:
        journal.say(
            "WARNING: that is no better than guessing; check the weights, --mean, --std and --tau"
        )


def final_report(
    name: str,
    classifier: SpikingClassifier,
    history: Sequence[EpochRecord],
    splits: ImageSplits,
    attacks: Mapping[str, Attack],
    threat: ThreatModel,
    journal: Journal,
    *,
    seed: int,
    single_step: bool,
    verified_eps: float | None = None,
    dataset: str = "images",
    configuration: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Report:
    """Report of a trained network on the test images, with the curves of its training.
    训练结束后的评估。

    Every attack is a figure for itself. The network is a variant of the report, so that those of
    several networks can be merged.

    TensorBoard gets pictures of an attack on validation images.

    Args:
        name: Name of the network in the report.
        classifier: The network.
        history: Records of its epochs; the report's warnings are those about them, and how many
            are verified.
        splits: The data set, of which the test images count.
        attacks: Attacks by name, budgets inside.
        threat: The budget, for the report.
        journal: Shows how far it is.
        seed: Seeds the attacks.
        single_step: Whether it was trained with a single-step attack, so that catastrophic
            overfitting is looked for.
        verified_eps: Radius of the threat's norm at which the test images are proved as well; None
            proves none.
        dataset: Name of the data set.
        configuration: Options of the run.
        environment: Versions, device, commit.
    """
    norm: Literal["Linf", "L0"] = "L0" if threat.norm == "L0" else "Linf"
    loader = image_loader(splits.test, 32 if splits.frames else 512)
    data = Data.of(loader)
    members = [Member(attack_name, attack, group="") for attack_name, attack in attacks.items()]
    variant = Variant(members, name, seed)
    steps = len(data) * (1 + len(members))
    with journal.steps(f"evaluating {name} on {len(splits.test)} test images", steps) as step:
        watch = Watch(on_step=partial(_stepped, step))
        outcome = run(
            classifier,
            data,
            [variant],
            asked=Asked(),
            network=name,
            watch=watch,
            shared=False,  # the first process reports alone
        )
    if threat.eps > 0 and len(splits.validation):
        x, y = next(iter(image_loader(splits.validation, _BATCH)))
        with suppress(ValueError):  # no image is right
            shown = gallery(classifier, x, y, eps=threat.eps, norm=norm, seed=seed)
            journal.show_gallery(name.replace(" ", "_"), shown, len(history))
    heads = [history[: end + 1] for end in range(len(history))] if single_step else []
    notes = tuple(
        f"{name}: {warning}" for warning in map(catastrophic_overfitting, heads) if warning
    )
    if verified_eps is not None:
        device, proofs = device_of(classifier), 0
        text = f"verifying {name} on {len(splits.test)} test images"
        with journal.steps(text, len(loader)) as step, evaluation_mode(classifier):
            for x, y in loader:
                found = verify(classifier, x.to(device), y.to(device), verified_eps, norm=norm)
                proofs += sum(found.verified)
                step()
        share = f"{proofs} of {len(splits.test)} test images ({proofs / len(splits.test):.1%})"
        notes += (f"{name}: {share} verified at {norm} {eps_text(verified_eps)}",)
    return Report(
        name=name,
        dataset=dataset,
        suite="training",
        labels=data.labels,
        rows=outcome.rows,
        threat=threat,
        classes=splits.classes,
        seed=seed,
        data=data.fingerprint,
        curves={name: [asdict(record) for record in history]},
        configuration=dict(configuration or {}),
        environment=dict(environment or {}),
        warnings=(*outcome.warnings, *notes),
    )


def _stepped(step: Callable[[], None], position: Position) -> None:
    step()
