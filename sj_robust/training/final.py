"""What a trained network is measured by in the end."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

from sj_robust.attacks import Attack
from sj_robust.classifier import SpikingClassifier
from sj_robust.data import ImageSplits, image_loader
from sj_robust.evaluation import Report, ThreatModel, evaluate
from sj_robust.training.history import EpochRecord, catastrophic_overfitting
from sj_robust.training.journal import Journal

__all__ = ["final_report"]


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
) -> Report:
    """Report of a trained network on the test images, with the curves of its training. 训练结束后的评估。

    Args:
        name: Name of the network in the report.
        classifier: The network.
        history: Records of its epochs; the report's notes are the warnings about them.
        splits: The data set, of which the test images count.
        attacks: Attacks by name, budgets inside.
        threat: The budget, for the report.
        journal: Shows how far it is.
        seed: Seeds the attacks.
        single_step: Whether it was trained with a single-step attack, so that catastrophic overfitting is looked for.
    """
    loader = image_loader(splits.test, 32 if splits.frames else 512)
    with journal.steps(f"evaluating {name} on {len(splits.test)} test images", len(loader)) as step:
        report = evaluate(classifier, loader, attacks, threat=threat, network=name, seed=seed, on_batch=step)
    heads = [history[: end + 1] for end in range(len(history))] if single_step else []
    notes = tuple(f"{name}: {warning}" for warning in map(catastrophic_overfitting, heads) if warning)
    return replace(report, curves={name: [asdict(record) for record in history]}, notes=notes)
