"""A training run: its parts, one step of it, its checkpoints; every run can be stopped and
continued.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sj_robust.attacks import Attack
from sj_robust.core.preserved import from_reset, seeded_network
from sj_robust.core.randomness import SampleSeeds
from sj_robust.core.weights import weights
from sj_robust.data import ImageSplits, ShuffledBatches, image_loader
from sj_robust.defences import deflate_
from sj_robust.models.checkpoint import check_same_run, save_checkpoint
from sj_robust.training.journal import EpochRecord, Journal
from sj_robust.training.objective import Losses, Objective
from sj_robust.training.penalties import project_parameters_, retract_
from sj_robust.training.plan import TrainingPlan
from sj_robust.training.processes import (
    TrainingInterrupted,
    mixed,
    random_state,
    set_random_state,
    share_buffers,
    store_channels_last,
)
from sj_robust.training.validation import Validation

__all__ = ["NonFiniteLossError", "TrainingRun", "check_outputs"]


class NonFiniteLossError(RuntimeError):
    """The loss or a weight became NaN or infinite; the previous checkpoint is intact."""


class TrainingRun:
    def __init__(
        self,
        objective: Objective,
        splits: ImageSplits,
        plan: TrainingPlan,
        accelerator: Accelerator,
        folder: Path,
        description: dict[str, Any],
    ) -> None:
        self.plan = plan
        self.accelerator = accelerator
        self.folder = folder
        self.description = description
        self.batches = ShuffledBatches(
            len(splits.train),
            plan.batch_size,
            seed=plan.seed,
            rank=accelerator.process_index,
            processes=accelerator.num_processes,
        )
        on_gpu = accelerator.device.type == "cuda"
        self.training_loader = image_loader(
            splits.train, self.batches, plan.workers, pin_memory=on_gpu
        )
        self.validation = Validation(
            splits.validation, accelerator, seed=plan.seed, pin_memory=on_gpu
        )
        self.augmentation = splits.augmentation
        self.classes = splits.classes
        self.objective = objective
        self.classifier = objective.classifier
        self.channels_last = on_gpu if plan.channels_last is None else plan.channels_last
        if self.channels_last:
            store_channels_last(self.classifier)
        optimizer = _optimizer(objective, plan, accelerator.device)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, plan.epochs)
        self.step_module, self.optimizer = accelerator.prepare(objective, optimizer)
        if isinstance(self.step_module, DistributedDataParallel):
            # shared once per step, so that attacks see the same ones too
            self.step_module.broadcast_buffers = False
        image = splits.train[0][0].unsqueeze(0).to(accelerator.device)
        check_outputs(self.classifier, image, self.classes, plan.seed)
        with accelerator.autocast():
            objective.check_layers(image)
        self.epoch = 0
        self.batch = 0
        self.loss_names = (
            *Losses._fields,
            *(f"penalty/{penalty.name}" for penalty in objective.penalties),
        )
        self.stepped = False  # of the present epoch, not counting steps that a scaler left out
        self.sums = torch.zeros(len(self.loss_names), dtype=torch.float64)
        self.history: list[EpochRecord] = []

    def train_epoch(self, perturb: Attack | None, journal: Journal, received: list[int]) -> None:
        """The rest of the present epoch."""
        self.batches.epoch = self.epoch
        self.batches.first_batch = self.batch
        self.objective.train()
        before = [weight.detach().clone() for weight in self._trained()]
        self.stepped = False
        for x, y in self.training_loader:
            self._check_labels(y)
            losses, signal_number = self._step(self._moved(x), self._moved(y), perturb, received)
            self.sums += losses
            self.batch += 1
            journal.on_step(self._by_name(losses))
            due = self.plan.checkpoint_steps and self.batch % self.plan.checkpoint_steps == 0
            if due or signal_number is not None:
                self.checkpoint("last.pt")
            self.raise_if_interrupted(signal_number)
        if self.stepped and all(map(torch.equal, before, self._trained())):
            raise ValueError(
                f"no weight changed in epoch {self.epoch + 1}: gradients are zero, or steps "
                f"smaller than rounding; raise lr, {self._lr:g} here, or see that neurons fire"
            )

    def finish_epoch(self, validation_attacks: Mapping[str, Attack]) -> EpochRecord:
        """Validate, record and write the checkpoints of an epoch whose batches are done."""
        with self._explained():
            validation = self.validation.accuracy(
                self.classifier,
                validation_attacks,
                verified=self.plan.verified,
                verified_method=self.plan.verified_method,
            )
        record = EpochRecord(
            epoch=self.epoch + 1,
            losses=self._by_name(self.sums / self.batch),
            validation=validation,
            lr=self._lr,
        )
        best = max((earlier.validation[self.plan.select] for earlier in self.history), default=-1.0)
        self.history.append(record)
        with warnings.catch_warnings():
            # a run resumed after the last batch of an epoch has not stepped the optimizer of this
            # process yet
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            self.scheduler.step()
        self.epoch += 1
        self.batch = 0
        self.sums.zero_()
        if self.objective.monitor is not None:
            self.objective.monitor.clear_recorded_data()
        if validation[self.plan.select] > best:
            self.checkpoint("best.pt")
        self.checkpoint("last.pt")
        return record

    def _trained(self) -> list[Tensor]:
        """The weights that are trained."""
        return [weight for weight in self.objective.parameters() if weight.requires_grad]

    @property
    def _lr(self) -> float:
        """Learning rate of the present epoch."""
        return float(self.scheduler.get_last_lr()[0])

    def raise_if_interrupted(self, signal_number: int | None) -> None:
        """Stop where a checkpoint was just written, if a signal asked for it."""
        if signal_number is not None:
            raise TrainingInterrupted(signal_number, self.folder / "last.pt")

    def checkpoint(self, name: str) -> None:
        """Write everything that :meth:`load` needs; on the main process, with the random states of
        all.
        """
        self._check_weights()
        states = gather_object([random_state()])
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            content = {
                "description": self.description,
                "model": self.classifier.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "epoch": self.epoch,
                "batch": self.batch,
                "sums": self.sums,
                "history": [asdict(record) for record in self.history],
                "random": states,
            }
            save_checkpoint(self.folder / name, content)
        self.accelerator.wait_for_everyone()

    def load(self, content: dict[str, Any], journal: Journal) -> None:
        """Stand where a checkpoint was written."""
        if unrecorded := check_same_run(content["description"], self.description):
            journal.say(
                f"the checkpoint does not record {', '.join(unrecorded)}: resumed without a "
                "comparison"
            )
        self.classifier.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scheduler.load_state_dict(content["scheduler"])
        if self.accelerator.scaler is not None and content["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(content["scaler"])
        self.epoch = content["epoch"]
        self.batch = content["batch"]
        self.sums = content["sums"]
        self.history = [EpochRecord(**record) for record in content["history"]]
        if self.accelerator.process_index < len(content["random"]):
            set_random_state(content["random"][self.accelerator.process_index])

    def agreed_signal(self, received: list[int]) -> int | None:
        """The signal that some process got."""
        no_losses = torch.zeros(len(self.loss_names), device=self.accelerator.device)
        _, signal_number = self._agreed(received, no_losses)
        return signal_number

    def _by_name(self, losses: Tensor) -> dict[str, float]:
        """Losses by their names."""
        return dict(zip(self.loss_names, losses.tolist(), strict=True))

    def _step(
        self, x: Tensor, y: Tensor, perturb: Attack | None, received: list[int]
    ) -> tuple[Tensor, int | None]:
        """One step of the optimizer; the losses on the CPU, means over all processes, and the
        signal some process got.

        The host waits for the device once, when it reads the losses behind the backward pass: no
        step of the optimizer is taken with a loss that is not finite.
        """
        indices = self.batches.indices(self.epoch, self.batch)
        # An image has its own seed in every epoch, so that it meets the same noise on any number of
        # processes.
        seeds = SampleSeeds(indices).derived("training", self.plan.seed, self.epoch)
        if self.augmentation is not None:
            x = self.augmentation(x, seeds.derived("augmentation").seeds)
        self.optimizer.zero_grad()
        self._say_progress()
        size = len(x) // self.plan.accumulate
        values = []
        seed = mixed(self.plan.seed, self.epoch, self.batch, self.accelerator.process_index)
        with seeded_network(self.classifier, seed, x.device):
            for start in range(0, len(x), size):
                rows = slice(start, start + size)
                more_to_come = rows.stop < len(x)
                waits = (
                    self.accelerator.no_sync(self.step_module) if more_to_come else nullcontext()
                )
                with waits:
                    own = SampleSeeds(seeds.seeds[rows])
                    values.append(self._part(x[rows], y[rows], own, perturb))
        losses, signal_number = self._agreed(received, torch.stack(values).mean(0))
        if self.plan.deflation:
            deflate_(weights(self.classifier))
        self.optimizer.step()
        self.stepped |= not self.optimizer.step_was_skipped
        project_parameters_(self.classifier)
        if self.plan.retraction > 0:
            seed = mixed(self.plan.seed, self.epoch, self.batch)
            draws = torch.Generator().manual_seed(seed)
            retract_(self.classifier, self.plan.retraction, draws)
        share_buffers(self.classifier)
        return losses, signal_number

    def _say_progress(self) -> None:
        """Tell the parts of the loss that grow over the training how much of it is done."""
        progress = (self.epoch + self.batch / len(self.batches)) / self.plan.epochs
        if self.objective.certified is not None:
            self.objective.certified.progress = progress
        for penalty in self.objective.penalties:
            penalty.progress = progress

    def _part(self, x: Tensor, y: Tensor, seeds: SampleSeeds, perturb: Attack | None) -> Tensor:
        """Forward and backward pass of a part of this process's images; the losses, on their
        device.
        """
        x_perturbed = None
        if perturb is not None:
            with self._explained(), self.accelerator.autocast():
                x_perturbed = perturb(self.classifier, x, y, generator=seeds)
        losses = self.step_module(x, y, x_perturbed)
        self.accelerator.backward(losses.total / self.plan.accumulate)
        every = (*losses, *self.objective.penalty_values.values())
        return torch.stack([value.detach().double() for value in every])

    def _agreed(self, received: list[int], values: Tensor) -> tuple[Tensor, int | None]:
        """Means of ``values`` over the processes and a signal of one; raises on all if a value of
        one is not finite.
        """
        own_signal = received[0] if received else 0
        row = torch.cat([values, values.new_full((1,), own_signal)])
        rows = self.accelerator.gather(row[None]).cpu()
        losses = rows[:, :-1]
        signals = rows[:, -1]
        for of_process in losses:
            if not bool(torch.isfinite(of_process).all()):
                named = self._by_name(of_process).items()
                shown = ", ".join(f"{name}={value:.6g}" for name, value in named)
                self._fail(f"the loss is not finite ({shown})")
        return losses.mean(0), int(signals.max()) or None

    def _moved(self, values: Tensor) -> Tensor:
        """Images or labels on the device, images in the memory order of the run."""
        layout = torch.preserve_format
        if self.channels_last and values.ndim == 4:
            layout = torch.channels_last
        return values.to(self.accelerator.device, non_blocking=True, memory_format=layout)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What an attack or evaluation refuses to work on may be the fault of the weights, which
        then is the error.
        """
        try:
            yield
        except ValueError as error:
            self._check_weights()
            if isinstance(error, FloatingPointError):
                self._fail(str(error).partition(";")[0])
            raise

    def _check_labels(self, y: Tensor) -> None:
        """Before the labels reach the device, where a wrong one ends the process, or is left out if
        it is -100.
        """
        if y.dtype != torch.int64 or y.ndim != 1:
            raise ValueError(
                f"labels must be int64 [N], got {str(y.dtype).removeprefix('torch.')} "
                f"{list(y.shape)}"
            )
        outside = y[(y < 0) | (y >= self.classes)]
        if len(outside):
            raise ValueError(
                f"labels must be classes from 0 to {self.classes - 1}, got {int(outside[0])} "
                f"among the training images at epoch {self.epoch + 1}, step {self.batch + 1}; "
                "correct the data, or the classes of the splits"
            )

    def _check_weights(self) -> None:
        for name, value in self.classifier.state_dict().items():
            if not bool(torch.isfinite(value).all()):
                self._fail(f"{name} holds NaN or infinity")

    def _fail(self, what: str) -> NoReturn:
        last = self.folder / "last.pt"
        intact = "no checkpoint was written yet"
        if last.exists():
            intact = f"the last good checkpoint, {last}, is intact"
        raise NonFiniteLossError(
            f"{what} at epoch {self.epoch + 1}, step {self.batch + 1}; {intact}. Lower lr, or "
            "check rho and the data"
        )


def _optimizer(
    objective: Objective, plan: TrainingPlan, device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer of a plan."""
    common: dict[str, Any] = {
        "lr": plan.lr,
        "weight_decay": plan.weight_decay,
        "fused": device.type in ("cpu", "cuda"),  # the same step in one pass over the weights
    }
    groups = _groups(objective)
    if plan.optimizer == "adam":
        return torch.optim.Adam(groups, **common)
    return torch.optim.SGD(groups, momentum=plan.momentum, **common)


def _groups(objective: Objective) -> list[dict[str, Any]]:
    """Parameters of the optimizer; weight decay leaves those alone that a module names in
    ``undecayed``.
    """
    kept = []
    for module in objective.modules():
        kept += [getattr(module, name) for name in getattr(module, "undecayed", ())]
    if not kept:
        return [{"params": list(objective.parameters())}]
    known = set(map(id, kept))
    others = [one for one in objective.parameters() if id(one) not in known]
    return [{"params": others}, {"params": kept, "weight_decay": 0.0}]


def check_outputs(classifier: nn.Module, image: Tensor, classes: int, seed: int) -> None:
    """Check that the network distinguishes as many classes as there are; it is not changed."""
    with from_reset(classifier, seed, image.device), torch.no_grad():
        outputs = classifier(image).shape[1]
    if outputs != classes:
        raise ValueError(
            f"the network must give a logit for each of the {classes} classes, got {outputs}; "
            "build it for as many classes as the data has"
        )
