"""Train a spiking network adversarially, with MS-MPPD, and measure it beside an undefended one.

python recipes/adv_train.py                                              # digits, under a minute
python recipes/adv_train.py --output runs/mine --resume                  # continue a stopped run
torchrun --nproc-per-node 2 recipes/adv_train.py                         # or accelerate launch
"""

import re
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from jsonargparse import auto_cli

from sj_robust import SpikingClassifier, training
from sj_robust.attacks import fgsm, gaussian, pgd, rfgsm
from sj_robust.data import ImageSplits, image_loader, load_images
from sj_robust.evaluation import Attack, Report, ThreatModel, environment, evaluate
from sj_robust.models import NetworkSpec, build_network
from sj_robust.ops import keep_heap
from sj_robust.plotting import plot_report


@dataclass(frozen=True)
class Options:
    """Options of adv_train.

    Attributes:
        dataset: Images to train on.
        data_root: Folder with the IDX files of Fashion-MNIST, or torchvision's folder that holds FashionMNIST/raw.
        train_limit: Training images to use at most, the validation split included; null for all.
        test_limit: Test images to use at most; null for all.
        validation_fraction: Share of the training images held out to select the epoch by.
        neuron: Spiking neuron of the trained network.
        T: Time steps.
        tau: Membrane time constant in steps; the decay is 1 - 1 / tau.
        channels: Output channels of the convolutions.
        mode: none trains on clean images, gaussian on clean and noisy ones, at on clean and adversarial ones.
        eps: Linf radius of the training attack in [0, 1] images; for gaussian the standard deviation.
        step_size: Step of the training attack; null means eps.
        noise_std: Noise at the start of the training attack.
        project: Whether the training attack is projected back onto the ball (the published code does not).
        eval_eps: Radius of the attacks in validation and test; null means eps.
        kappa: Weight of the clean cross entropy; the perturbed one has 1 - kappa.
        rho: Weight of MS-MPPD.
        layers: Spiking layers of MS-MPPD, last, all, or a list of names such as [stages.1, stages.5].
        norm: l2 for the mean square of the perturbation, l1 for its mean absolute value.
        epochs: Passes over the training images.
        batch_size: Images per step, over all processes together.
        lr: Learning rate of SGD, which falls to 0 (cosine).
        momentum: Momentum of SGD.
        weight_decay: Weight decay on all parameters.
        select: Validation accuracy that the epoch is chosen by; null means pgd, and clean for mode none.
        reference: Whether an undefended LIF network is trained and measured beside it.
        seed: Seed of everything.
        device: auto takes a GPU if there is one.
        mixed_precision: Accelerate's precision; fp16 needs a GPU.
        workers: Processes that load images in the background.
        checkpoint_steps: Steps between checkpoints within an epoch; null for one per epoch.
        output: Folder of the run; null makes a new one under runs/.
        resume: Go on with the run in output (null: the newest of this kind) from its last checkpoint.
    """

    dataset: Literal["digits", "fashion_mnist"] = "digits"
    data_root: str = "data"
    train_limit: int | None = None
    test_limit: int | None = None
    validation_fraction: float = 0.1
    neuron: Literal["dlif", "lif", "if"] = "dlif"
    T: int = 4
    tau: float = 100.0
    channels: tuple[int, ...] = (16, 32)
    mode: Literal["none", "gaussian", "at"] = "at"
    eps: float = 0.1
    step_size: float | None = None
    noise_std: float = 0.001
    project: bool = True
    eval_eps: float | None = None
    kappa: float = 0.5
    rho: float = 1.0
    layers: Literal["last", "all"] | list[str] = "last"
    norm: Literal["l2", "l1"] = "l2"
    epochs: int = 15
    batch_size: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    select: Literal["clean", "fgsm", "pgd"] | None = None
    reference: bool = True
    seed: int = 0
    device: Literal["auto", "cpu"] = "auto"
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    workers: int = 0
    checkpoint_steps: int | None = None
    output: str | None = None
    resume: bool = False


def main(arguments: list[str]) -> None:
    """Train, evaluate, report."""
    options = parse(arguments)
    if not (on_gpu := options.device == "auto" and torch.cuda.is_available()):
        keep_heap()
    accelerator = Accelerator(cpu=not on_gpu, mixed_precision=options.mixed_precision)
    splits = load_images(
        options.dataset,
        root=options.data_root,
        validation_fraction=options.validation_fraction,
        seed=options.seed,
        train_limit=options.train_limit,
        test_limit=options.test_limit,
    )
    configuration = asdict(replace(options, output=None, resume=False))
    folder = training.open_run_folder(options.output, stem(options), configuration, accelerator, resume=options.resume)
    journal = training.Journal(folder if accelerator.is_main_process else None)
    where = environment(accelerator.device) | {"processes": str(accelerator.num_processes)}
    journal.header("environment", where)
    journal.header("configuration", configuration)
    networks = {f"{options.neuron} {options.mode}": options}
    if options.reference:
        networks["lif undefended"] = replace(options, neuron="lif", mode="none", select="clean")
    report = Report(ThreatModel("Linf", attack_eps(options)), (), configuration=configuration, environment=where)
    for name, choice in networks.items():
        classifier, history = train_network(name, choice, splits, accelerator, folder, journal)
        if accelerator.is_main_process:
            journal.say(f"evaluating {name} on {len(splits.test)} test images")
            result = evaluate(
                classifier,
                image_loader(splits.test, 512),
                final_attacks(attack_eps(options)),
                threat=report.threat,
                network=name,
                seed=options.seed,
            )
            heads = [history[: epoch + 1] for epoch in range(len(history)) if choice.mode == "at"]
            notes = tuple(f"{name}: {warning}" for warning in map(training.catastrophic_overfitting, heads) if warning)
            report = report.merged(replace(result, curves={name: [asdict(record) for record in history]}, notes=notes))
    if accelerator.is_main_process:
        report.save(folder / "report.json")
        plot_report(report, folder / "report.png")
        journal.say("\n".join([report.table(), *report.notes, f"report.json and report.png are in {folder}"]))
    accelerator.end_training()


def train_network(
    name: str, options: Options, splits: ImageSplits, accelerator: Accelerator, folder: Path, journal: training.Journal
) -> tuple[SpikingClassifier, list[training.EpochRecord]]:
    """Train one network and return it as it was at its best epoch."""
    shape, classes = splits.image_shape, splits.classes
    spec = NetworkSpec("small", options.neuron, shape, classes, options.T, options.tau, options.channels)
    set_seed(options.seed)
    classifier = SpikingClassifier(build_network(spec), options.T)
    rho = 0.0 if options.mode == "none" else options.rho
    plan = training.TrainingPlan(
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        seed=options.seed,
        select=options.select or ("clean" if options.mode == "none" else "pgd"),
        checkpoint_steps=options.checkpoint_steps,
        workers=options.workers,
        single_step_attack=options.mode == "at",
    )
    (network_folder := folder / name.replace(" ", "_")).mkdir(exist_ok=True)
    history = training.train(
        training.Objective(classifier, kappa=options.kappa, rho=rho, layers=options.layers, norm=options.norm),
        splits,
        plan,
        perturb=training_attack(options),
        validation_attacks=validation_attacks(attack_eps(options)),
        accelerator=accelerator,
        folder=network_folder,
        journal=journal,
        description={"network": asdict(spec), "options": decisive(options)},
        resume=options.resume,
    )
    classifier.load_state_dict(training.load_checkpoint(network_folder / "best.pt")["model"])
    return classifier, history


def training_attack(options: Options) -> Attack | None:
    """How perturbed training images are made."""
    if options.mode == "none":
        return None
    if options.mode == "gaussian":
        return partial(gaussian, std=options.eps, clamp=False)
    attack = partial(rfgsm, eps=options.eps, step_size=options.step_size)
    return partial(attack, noise_std=options.noise_std, project=options.project)


def validation_attacks(eps: float) -> dict[str, Attack]:
    """Attacks after every epoch: PGD of 7 steps selects, FGSM beside it shows catastrophic overfitting."""
    return {"fgsm": partial(fgsm, eps=eps), "pgd": partial(pgd, eps=eps, step_size=eps / 3, steps=7)}


def final_attacks(eps: float) -> dict[str, Attack]:
    """Attacks of the table at the end."""
    pgd20 = partial(pgd, eps=eps, step_size=eps / 8, steps=20)
    return {"gaussian": partial(gaussian, std=eps), "fgsm": partial(fgsm, eps=eps), "pgd20": pgd20}


def attack_eps(options: Options) -> float:
    """Radius of the attacks in validation and test."""
    return options.eps if options.eval_eps is None else options.eval_eps


def stem(options: Options) -> str:
    """Name of a run's folder, up to its number."""
    return f"{options.dataset}-{options.neuron}-{options.mode}"


def decisive(options: Options) -> dict[str, Any]:
    """The options that decide the weights: a run is resumed with the same ones."""
    free = ("data_root", "test_limit", "reference", "device", "workers", "checkpoint_steps", "output", "resume")
    return {name: value for name, value in asdict(options).items() if name not in free}


def parse(arguments: list[str]) -> Options:
    """Options from the command line; --data-root is --data_root, and --resume is --resume=true."""
    arguments = [re.sub(r"^--[\w-]+", lambda name: "--" + name[0][2:].replace("-", "_"), text) for text in arguments]
    for index, text in enumerate(arguments):
        if text == "--resume" and (index + 1 == len(arguments) or arguments[index + 1].startswith("--")):
            arguments[index] = "--resume=true"
    options: Options = auto_cli(Options, args=arguments)
    if not options.resume:
        return options
    folder = training.run_to_resume(options.output, stem(options))
    resumed: Options = auto_cli(Options, args=["--config", str(folder / "config.yaml"), *arguments])
    return replace(resumed, output=str(folder))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except training.TrainingInterrupted as interruption:
        print(interruption, file=sys.stderr)
        sys.exit(128 + interruption.signal_number)
    except KeyboardInterrupt:
        print("stopped; finished epochs are kept, continue with --resume", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError, ModuleNotFoundError, training.NonFiniteLossError) as error:
        sys.exit(f"error: {error}")
