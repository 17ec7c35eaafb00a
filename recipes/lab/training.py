"""What a training says of its network before it begins and after it has ended."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from sj_robust.attacks import Attack, ThreatModel, fgsm, gaussian, pgd
from sj_robust.classifier import SpikingClassifier
from sj_robust.core.environment import device_of
from sj_robust.core.eps import eps_text
from sj_robust.core.preserved import evaluation_mode
from sj_robust.core.randomness import SampleSeeds
from sj_robust.data import ImageSplits, image_loader
from sj_robust.evaluation import Member, Report, gallery
from sj_robust.evaluation.intervals import wilson_interval
from sj_robust.evaluation.run.data import Data
from sj_robust.evaluation.run.loop import Asked, alone, run
from sj_robust.evaluation.run.progress import Position, Watch
from sj_robust.evaluation.run.variant import Variant
from sj_robust.proofs import verify
from sj_robust.training import Journal
from sj_robust.training.history import EpochRecord, catastrophic_overfitting

__all__ = ["check_start", "final_attacks", "final_report"]

_START = 256
"""Validation images that a network is looked at with before its training."""

_SHOWN = 128
"""Validation images of which some are shown under attack."""


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
    device = device_of(classifier)
    x, y = next(iter(image_loader(splits.validation, _START)))
    x, y = x.to(device), y.to(device)
    clean = _right(classifier, x, y)
    journal.say(f"starting from {origin}: {clean / len(y):.1%} of {len(y)} validation images right")
    low, high = wilson_interval(clean, len(y))
    lost = _lost_normalisation(classifier, splits, x)
    if lost is not None:
        normalising = SpikingClassifier(
            classifier.net, classifier.T, mean=lost.mean, std=lost.std, takes=classifier.takes
        )
        lifted = _right(normalising.to(device), x, y)
        if wilson_interval(lifted, len(y))[0] > high:
            journal.say(
                f"WARNING: with {lost.options}, those of these images, {lifted / len(y):.1%} are: "
                "the network expects normalised images"
            )
            return
    if low <= 1 / splits.classes:
        journal.say(
            "WARNING: that is no better than guessing; check the weights, --mean, --std and --tau"
        )


@dataclass(frozen=True)
class _Normalisation:
    """Mean and standard deviation per channel."""

    mean: list[float]
    std: list[float]

    @property
    def options(self) -> str:
        """The options of the recipe that set them."""
        means = " ".join(map(str, self.mean))
        stds = " ".join(map(str, self.std))
        return f"--mean {means} --std {stds}"


def _right(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """How many images are classified right."""
    seeds = SampleSeeds(range(len(y))).derived("validation", 0)
    return alone(model, x, y, {}, seeds=seeds)["clean"]


def _lost_normalisation(
    classifier: SpikingClassifier, splits: ImageSplits, x: Tensor
) -> _Normalisation | None:
    """That of the images, where the network has none and could have one."""
    given = (classifier.encoder, classifier.mean, classifier.std)
    if splits.frames or any(part is not None for part in given):
        return None
    dims = [0, *range(2, x.ndim)]
    mean = [round(value, 3) for value in x.mean(dims).tolist()]
    std = [round(value, 3) for value in x.std(dims).tolist()]
    return _Normalisation(mean, std) if min(std) > 0 else None


def final_attacks(eps: float) -> dict[str, Attack]:
    """Attacks of the table at the end of a training. 训练结束后报告的攻击。

    Args:
        eps: Linf radius in units of [0, 1] images, and the standard deviation of the noise.

    Returns:
        ``"gaussian"``, ``"fgsm"``, and ``"pgd20"`` with steps of eps / 8.

    Source: attacks of Ding et al. (ICML 2024), section 5, in the same proportions.

    Examples:
        >>> list(final_attacks(8 / 255))
        ['gaussian', 'fgsm', 'pgd20']
    """
    pgd20 = partial(pgd, eps=eps, step_size=eps / 8, steps=20)
    return {"gaussian": partial(gaussian, std=eps), "fgsm": partial(fgsm, eps=eps), "pgd20": pgd20}


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
        verified_eps: Linf radius at which the test images are proved as well; None proves none.
        dataset: Name of the data set.
        configuration: Options of the run.
        environment: Versions, device, commit.
    """
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
        x, y = next(iter(image_loader(splits.validation, _SHOWN)))
        with suppress(ValueError):  # no image is right
            shown = gallery(classifier, x, y, eps=threat.eps, norm="Linf", seed=seed)
            journal.show_gallery(name.replace(" ", "_"), shown, len(history))
    notes = list(outcome.warnings)
    if single_step:
        for end in range(1, len(history) + 1):
            warning = catastrophic_overfitting(history[:end])
            if warning:
                notes.append(f"{name}: {warning}")
    if verified_eps is not None:
        device = device_of(classifier)
        proofs = 0
        text = f"verifying {name} on {len(splits.test)} test images"
        with journal.steps(text, len(loader)) as step, evaluation_mode(classifier):
            for x, y in loader:
                proved = verify(classifier, x.to(device), y.to(device), verified_eps).verified
                proofs += sum(proved)
                step()
        share = f"{proofs} of {len(splits.test)} test images ({proofs / len(splits.test):.1%})"
        notes.append(f"{name}: {share} verified at Linf {eps_text(verified_eps)}")
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
        warnings=tuple(notes),
    )


def _stepped(step: Callable[[], None], position: Position) -> None:
    step()
