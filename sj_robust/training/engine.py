"""The epoch loop with Accelerate: CPU, GPU, DDP, mixed precision."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sj_robust.attacks import Attack
from sj_robust.classifier import SpikingClassifier
from sj_robust.core.preserved import preserved
from sj_robust.core.randomness import SampleSeeds
from sj_robust.core.threat import ThreatModel
from sj_robust.data import ImageSplits, ShuffledBatches
from sj_robust.models.checkpoint import load_run
from sj_robust.proofs import verify
from sj_robust.proofs.soundness import UnprovableError
from sj_robust.training._run import NonFiniteLossError, TrainingRun, check_outputs
from sj_robust.training.journal import EpochRecord, Journal, catastrophic_overfitting
from sj_robust.training.objective import Objective
from sj_robust.training.plan import TrainingPlan
from sj_robust.training.processes import TrainingInterrupted, collected_signals, compiled

__all__ = [
    "NonFiniteLossError",
    "TrainingInterrupted",
    "TrainingPlan",
    "check_training",
    "train",
]


def train(
    objective: Objective,
    splits: ImageSplits,
    plan: TrainingPlan,
    *,
    perturb: Attack | None,
    validation_attacks: Mapping[str, Attack],
    accelerator: Accelerator,
    folder: Path,
    journal: Journal,
    description: Mapping[str, Any],
    resume: bool = False,
) -> list[EpochRecord]:
    """Train the objective's classifier and write ``last.pt`` and ``best.pt`` into ``folder``.
    训练并保存检查点。

    The perturbed images are crafted on the bare network, so nothing is reduced between processes
    inside an attack. The random numbers of an image depend only on seed, epoch and image; those of
    the network itself (dropout) on seed, epoch, batch and process. On an interrupt signal (SIGINT,
    SIGTERM), the current step is completed and a checkpoint is written; a second signal stops at
    once. A run may be resumed with a different number of processes.

    Args:
        objective: Loss and classifier; trained in place.
        splits: Training and validation images; the test images are not touched.
        plan: Epochs, learning rate and the other numbers of the run.
        perturb: Makes the perturbed training images; None trains on clean images only.
        validation_attacks: One or more attacks, of which ``plan.select`` may name one; the first
            gives the scalars in TensorBoard. Catastrophic overfitting is detected from ``"fgsm"``
            and ``"pgd"``.
        accelerator: Device, processes and precision.
        folder: Existing folder for the checkpoints.
        journal: Records every step and epoch.
        description: Network and options as plain data, stored in every checkpoint; a run can only
            be resumed with the same description.
        resume: Whether to continue from ``last.pt`` if there is one.

    Returns:
        One :class:`EpochRecord` per epoch, including the earlier epochs of a resumed run.

    Raises:
        NonFiniteLossError: If the loss or a weight becomes NaN or infinite.
        TrainingInterrupted: After a signal.
        OSError: If a checkpoint cannot be written; the previous one is then intact.
        ValueError: If a checkpoint is damaged, is from another program or from a run with other
            options, a label is not one of the classes, the batch cannot be shared equally, the
            network is wrapped in ``nn.DataParallel`` or cannot be compiled, ``plan.select`` is not
            an accuracy of the validation, or no weight changes in an epoch.

    Source: training of Ding et al. (ICML 2024), section 5, with selection on validation images.
    """
    _check_use(objective, plan, accelerator)
    plan.check_select(validation_attacks)
    net = objective.classifier.net
    with ExitStack() as stack:
        stack.callback(objective.zero_grad)  # nothing is left on the user's network
        last = folder / "last.pt"
        content = load_run(last) if resume and last.exists() else None
        run = TrainingRun(
            objective=objective,
            splits=splits,
            plan=plan,
            accelerator=accelerator,
            folder=folder,
            description=dict(description),
        )
        if content is not None:
            run.load(content, journal)
        if plan.compile:
            first = splits.train[0][0].unsqueeze(0).to(accelerator.device)
            found = objective.classifier.find_convention(first)
            stack.enter_context(compiled(net, takes=found.takes))
        received = stack.enter_context(collected_signals())
        sizes = {"epochs": plan.epochs, "batches": len(run.batches), "images": plan.batch_size}
        stack.enter_context(journal.follow(folder.name, **sizes, epoch=run.epoch, batch=run.batch))
        while run.epoch < plan.epochs:
            run.train_epoch(perturb, journal, received)
            journal.show_status("validation")
            record = run.finish_epoch(validation_attacks)
            if accelerator.is_main_process:
                journal.show_status("perturbation and gain of every layer")
                attack = next(iter(validation_attacks.values()))
                scalars = run.validation.scalars(run.classifier, attack)
                warning = catastrophic_overfitting(run.history) if plan.single_step_attack else None
                journal.on_epoch(record, scalars, warning)
            run.raise_if_interrupted(run.agreed_signal(received))
    return run.history


def check_training(
    objective: Objective,
    splits: ImageSplits,
    plan: TrainingPlan,
    accelerator: Accelerator,
    attacks: Iterable[Attack | None] = (),
) -> None:
    """Refuse a training that cannot start, before anything of it is written. 训练前检查。

    Args:
        objective: Loss and classifier, on the CPU as the images are.
        splits: Training images, on one of which everything is tried.
        plan: Epochs, learning rate and the other numbers of the run.
        accelerator: The processes.
        attacks: Attacks of the run; None is none.

    Raises:
        ValueError: As :func:`train`, for errors that show before the first step.
    """
    _check_use(objective, plan, accelerator)
    ShuffledBatches(
        len(splits.train), plan.batch_size, seed=plan.seed, processes=accelerator.num_processes
    )
    image = splits.train[0][0].unsqueeze(0)
    check_outputs(objective.classifier, image, splits.classes, plan.seed)
    with accelerator.autocast():
        objective.check_layers(image)
    label = torch.tensor([int(splits.train[0][1])])
    for attack in attacks:
        if attack is not None:
            with preserved(objective.classifier):
                attack(objective.classifier, image, label, generator=SampleSeeds([0]))
    if plan.verified is not None:
        _check_provable(objective.classifier, image, label, plan.verified)


def _check_provable(
    classifier: SpikingClassifier, image: Tensor, label: Tensor, threat: ThreatModel
) -> None:
    """Refuse a network of which the validation could prove nothing."""
    try:
        with preserved(classifier):
            # the quickest; a network with these bounds also has joint ones
            verify(classifier, image, label, threat, method="ibp")
    except (NotImplementedError, UnprovableError) as error:
        raise ValueError(
            f"{error}; for such a network, omit verified and select another accuracy than "
            "'verified'"
        ) from error


def _check_use(objective: Objective, plan: TrainingPlan, accelerator: Accelerator) -> None:
    """Refuse what would train something else than asked for."""
    plan.check_processes(accelerator.num_processes)
    for name, module in objective.named_modules():
        if isinstance(module, nn.DataParallel | DistributedDataParallel):
            raise ValueError(
                f"{name} is wrapped in {type(module).__name__}, which loses neuron states or is "
                "done here: give train the bare network, and start it with torchrun or "
                "accelerate launch for several devices"
            )
    if objective.certified is not None:
        if accelerator.mixed_precision not in ("no", "bf16"):
            raise ValueError(
                "mixed_precision must be no or bf16 for certified training, got "
                f"{accelerator.mixed_precision}, which has not been tried; use bf16"
            )
        if plan.compile:
            raise ValueError(
                "compile must be False for certified training, as a compiled network takes no "
                "bounds"
            )
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            "the accelerator must have gradient_accumulation_steps 1, got "
            f"{accelerator.gradient_accumulation_steps}; set accumulate in the plan, which the "
            "loss is divided by as well"
        )
