"""The epoch loop on Accelerate: CPU, GPU, DDP, mixed precision; every run can be stopped and continued."""

import random
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from sj_robust.attacks.randomness import SampleSeeds
from sj_robust.data import ImageSplits, ShuffledBatches, image_loader
from sj_robust.evaluation import Attack, accuracy
from sj_robust.perturbation import MPPDMonitor
from sj_robust.stability import gain_scalars
from sj_robust.training.checkpoint import load_checkpoint, save_checkpoint
from sj_robust.training.history import EpochRecord, catastrophic_overfitting
from sj_robust.training.journal import Journal
from sj_robust.training.objective import Losses, Objective
from sj_robust.training.regularization import retract_

__all__ = ["NonFiniteLossError", "TrainingInterrupted", "TrainingPlan", "train"]


@dataclass(frozen=True)
class TrainingPlan:
    """How long and how to step. 训练计划。

    Attributes:
        epochs: Passes over the training images; the learning rate falls to 0 over them (cosine).
        batch_size: Images per step over all processes together.
        lr: Learning rate of SGD at the start.
        momentum: Momentum of SGD.
        weight_decay: On all parameters, DLIF's input gains included.
        retraction: Length beta of the step of every weight towards orthonormal rows after the optimizer's; 0 for none.
        seed: Decides the order of the images and the noise of every step.
        select: Validation figure that the best epoch is chosen by.
        checkpoint_steps: Steps between checkpoints within an epoch; None writes one per epoch only.
        workers: Processes that load images in the background.
        single_step_attack: Whether training uses one, so that catastrophic overfitting is looked for.

    Raises:
        ValueError: If a number is out of range.

    Source: training recipe of Ding et al. (ICML 2024), section 5.
    """

    epochs: int
    batch_size: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    retraction: float = 0.0
    seed: int = 0
    select: Literal["clean", "fgsm", "pgd"] = "pgd"
    checkpoint_steps: int | None = None
    workers: int = 0
    single_step_attack: bool = True

    def __post_init__(self) -> None:
        for name, value in (("epochs", self.epochs), ("checkpoint_steps", self.checkpoint_steps or 1)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if not 0.0 < self.lr < float("inf"):
            raise ValueError(f"lr must be > 0 and finite, got {self.lr}")


class NonFiniteLossError(RuntimeError):
    """The loss or a weight became NaN or infinite; the checkpoint written before is intact."""


class TrainingInterrupted(Exception):  # noqa: N818  # an interruption asked for is not an error
    """A signal stopped the training after a whole step and a checkpoint.

    Attributes:
        signal_number: The signal; the conventional exit code is 128 plus this.
    """

    def __init__(self, signal_number: int, checkpoint: Path) -> None:
        """Keep the signal and say where the checkpoint is."""
        super().__init__(f"stopped by {signal.Signals(signal_number).name}; {checkpoint} continues with --resume")
        self.signal_number = signal_number


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
    """Train the objective's classifier and leave ``last.pt`` and ``best.pt`` in ``folder``. 训练并保存检查点。

    The perturbed images are crafted on the bare network, so nothing is reduced between processes inside an attack. All
    randomness of a step follows from seed, epoch, batch and process alone. An interrupt signal (SIGINT, SIGTERM)
    lets the step finish and writes a checkpoint; a second one stops at once.

    Args:
        objective: Loss and classifier; trained in place.
        splits: Training and validation images; the test images are not touched.
        plan: Numbers of the run.
        perturb: Makes the perturbed training images; None trains on clean images alone.
        validation_attacks: ``"fgsm"`` and ``"pgd"``, for selection and for detecting catastrophic overfitting.
        accelerator: Device, processes and precision.
        folder: Where the checkpoints go; it exists.
        journal: Is told of every step and epoch.
        description: Network and options in plain data, stored in every checkpoint; a run is resumed only with the same.
        resume: Whether to go on from ``last.pt`` if there is one.

    Returns:
        A record per epoch; :class:`EpochRecord` of a resumed run's earlier epochs included.

    Raises:
        NonFiniteLossError: If the loss or a weight becomes NaN or infinite.
        TrainingInterrupted: After a signal.
        ValueError: If a checkpoint is foreign or of a run with other options.

    Source: training of Ding et al. (ICML 2024), section 5, with selection on validation images.
    """
    run = _Run(objective, splits, plan, accelerator, folder, dict(description))
    if resume and (folder / "last.pt").exists():
        run.load(load_checkpoint(folder / "last.pt"))
    with _signals() as received, journal.network(folder.name, plan.epochs, len(run.batches), run.epoch, run.batch):
        while run.epoch < plan.epochs:
            run.train_epoch(perturb, journal, received)
            record = run.finish_epoch(validation_attacks)
            if accelerator.is_main_process:
                scalars = _probe(run, validation_attacks["fgsm"])
                warning = catastrophic_overfitting(run.history) if plan.single_step_attack else None
                journal.on_epoch(record, scalars, warning)
            run.raise_if_interrupted(run.agreed_signal(received))
    return run.history


class _Run:
    """A training run: what it is made of, and where it stands."""

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
        self.training_loader = image_loader(splits.train, self.batches, plan.workers)
        self.validation_loader = image_loader(splits.validation, 256)
        self.augmentation = splits.augmentation
        self.objective = objective
        self.classifier = objective.classifier
        optimizer = torch.optim.SGD(
            objective.parameters(), plan.lr, momentum=plan.momentum, weight_decay=plan.weight_decay
        )
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, plan.epochs)
        self.step_module, self.optimizer = accelerator.prepare(objective, optimizer)
        objective.prepare(splits.train[0][0].unsqueeze(0).to(accelerator.device))
        self.epoch = 0
        self.batch = 0
        self.sums = torch.zeros(len(Losses._fields), dtype=torch.float64)
        self.history: list[EpochRecord] = []

    def train_epoch(self, perturb: Attack | None, journal: Journal, received: list[int]) -> None:
        """The rest of the present epoch."""
        self.batches.epoch, self.batches.first_batch = self.epoch, self.batch
        self.objective.train()
        for x, y in self.training_loader:
            losses = self._step(x.to(self.accelerator.device), y.to(self.accelerator.device), perturb, received)
            self.sums += losses
            self.batch += 1
            journal.on_step(dict(zip(Losses._fields, losses.tolist(), strict=True)))
            if self._signal is not None:
                self.checkpoint("last.pt")
                self.raise_if_interrupted(self._signal)
            if self.plan.checkpoint_steps and self.batch % self.plan.checkpoint_steps == 0:
                self.checkpoint("last.pt")

    def finish_epoch(self, validation_attacks: Mapping[str, Attack]) -> EpochRecord:
        """Validate, record and write the checkpoints of an epoch whose batches are done."""
        sums = self.accelerator.reduce(self.sums.to(torch.get_default_dtype()).to(self.accelerator.device), "mean")
        validation = self._on_main(
            lambda: accuracy(self.classifier, self.validation_loader, validation_attacks, seed=self.plan.seed)
        )
        record = EpochRecord(
            epoch=self.epoch + 1,
            losses=dict(zip(Losses._fields, (sums / self.batch).tolist(), strict=True)),
            validation=validation,
            lr=float(self.scheduler.get_last_lr()[0]),
        )
        best = max((earlier.validation[self.plan.select] for earlier in self.history), default=-1.0)
        self.history.append(record)
        with warnings.catch_warnings():
            # a run resumed after the last batch of an epoch has not stepped the optimizer of this process yet
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            self.scheduler.step()
        self.epoch, self.batch = self.epoch + 1, 0
        self.sums.zero_()
        if self.objective.monitor is not None:
            self.objective.monitor.clear_recorded_data()
        if validation[self.plan.select] > best:
            self.checkpoint("best.pt")
        self.checkpoint("last.pt")
        return record

    def raise_if_interrupted(self, signal_number: int | None) -> None:
        """Stop where a checkpoint was just written, if a signal asked for it."""
        if signal_number is not None:
            raise TrainingInterrupted(signal_number, self.folder / "last.pt")

    def checkpoint(self, name: str) -> None:
        """Write everything that :meth:`load` needs; on the main process, with the random states of all."""
        self._check_weights()
        states = gather_object([_random_state()])
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

    def load(self, content: dict[str, Any]) -> None:
        """Stand where a checkpoint was written."""
        _check_same(content["description"], self.description)
        self.classifier.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scheduler.load_state_dict(content["scheduler"])
        if self.accelerator.scaler is not None and content["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(content["scaler"])
        self.epoch, self.batch, self.sums = content["epoch"], content["batch"], content["sums"]
        self.history = [EpochRecord(**record) for record in content["history"]]
        if self.accelerator.process_index < len(content["random"]):
            _set_random_state(content["random"][self.accelerator.process_index])

    def _step(self, x: Tensor, y: Tensor, perturb: Attack | None, received: list[int]) -> Tensor:
        """One step of the optimizer; the parts of the loss on the CPU."""
        x_perturbed = None
        # An image has its own seed in every epoch, so that it meets the same noise on any number of processes.
        seeds = SampleSeeds(self.batches.indices(self.epoch, self.batch)).derived(
            "training", self.plan.seed, self.epoch
        )
        if self.augmentation is not None:
            x = self.augmentation(x, seeds.derived("augmentation").seeds)
        if perturb is not None:
            with self._explained(), self.accelerator.autocast():
                x_perturbed = perturb(self.classifier, x, y, generator=seeds)
        losses = self.step_module(x, y, x_perturbed)
        values = torch.stack([value.detach().double() for value in losses]).cpu()
        self._signal = self.agreed_signal(received, values)
        self.optimizer.zero_grad()
        self.accelerator.backward(losses.total)
        self.optimizer.step()
        if self.plan.retraction > 0:
            draws = torch.Generator().manual_seed(_mixed(self.plan.seed, self.epoch, self.batch))
            retract_(self.classifier, self.plan.retraction, draws)
        return values

    def agreed_signal(self, received: list[int], values: Tensor | None = None) -> int | None:
        """The signal that some process got; raises on all of them if the loss of one is not finite."""
        values = torch.zeros(len(Losses._fields)) if values is None else values
        flags = torch.tensor([not bool(torch.isfinite(values).all()), received[0] if received else 0])
        if self.accelerator.num_processes > 1:
            flags = self.accelerator.gather(flags[None].to(self.accelerator.device)).amax(0)
        if flags[0]:
            self._fail(f"the loss is not finite ({Losses(*values.tolist())})")
        return int(flags[1]) or None

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What an attack or evaluation refuses to work on may be the fault of the weights, which then is the error."""
        try:
            yield
        except ValueError:
            self._check_weights()
            raise

    def _check_weights(self) -> None:
        for name, value in self.classifier.state_dict().items():
            if not bool(torch.isfinite(value).all()):
                self._fail(f"{name} holds NaN or infinity")

    def _fail(self, what: str) -> NoReturn:
        last = self.folder / "last.pt"
        intact = f"the last good checkpoint, {last}, is intact" if last.exists() else "no checkpoint was written yet"
        raise NonFiniteLossError(
            f"{what} at epoch {self.epoch + 1}, step {self.batch + 1}; {intact}. Lower lr, or check rho and the data"
        )

    def _on_main(self, work: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The result of the main process, on every process."""
        with self._explained():
            results = [work() if self.accelerator.is_main_process else {}]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(results)
        return results[0]


def _probe(run: _Run, attack: Attack) -> dict[str, float]:
    """MS-MPPD per followed layer under ``attack`` on the first validation images, and gains: of inputs, L2 and peak."""
    net = run.classifier.net
    x, y = next(iter(run.validation_loader))
    x, y = x.to(run.accelerator.device), y.to(run.accelerator.device)
    x_adv = attack(run.classifier, x, y, generator=torch.Generator().manual_seed(run.plan.seed))
    with MPPDMonitor(net) as monitor:
        stats = monitor.compare(x, x_adv, forward=run.classifier)
    scalars = {f"ms_mppd/{name}": float(layer.ms_mppd.mean()) for name, layer in stats.items()}
    for name, module in net.named_modules():
        gains = getattr(module, "input_gain", None)
        if isinstance(gains, nn.Parameter):
            scalars |= {f"input_gain/{name}/t{t}": gain for t, gain in enumerate(gains.tolist())}
    return scalars | gain_scalars(net, run.classifier.T)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM instead of stopping; a second one acts as it did before."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def receive(number: int, frame: object) -> None:
        received.append(number)
        restore()

    for number in previous:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()


def _check_same(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise ValueError if a checkpoint belongs to a run with other options."""
    old, new = _flat(saved), _flat(wanted)
    names = [name for name in (*new, *(old.keys() - new.keys())) if old.get(name) != new.get(name)]
    if names:
        differences = ", ".join(f"{name}: {old.get(name)!r} there, {new.get(name)!r} now" for name in names)
        raise ValueError(f"the checkpoint is of a run with other options ({differences}); resume with the same ones")


def _flat(description: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested groups of options as one level, with the groups in the names."""
    flat: dict[str, Any] = {}
    for name, value in description.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _mixed(*numbers: int) -> int:
    """A seed that differs for every tuple of numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def _random_state() -> dict[str, Any]:
    """State of every global random generator, in types that a checkpoint may hold."""
    # The global state of numpy is what other libraries draw from.
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002  # see above
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    return {
        "python": random.getstate(),
        "numpy": numpy,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002  # as above
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
