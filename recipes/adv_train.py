"""Train a robust spiking network, and measure it beside an undefended one.

python recipes/adv_train.py                                              # digits, under a minute
python recipes/adv_train.py --dataset image_folder:PATH --model vgg5 --T 8
python recipes/adv_train.py --output runs/mine --resume                  # continue a stopped run
torchrun --nproc-per-node 2 recipes/adv_train.py                         # or accelerate launch
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import sj_robust._recipes_installed  # noqa: F401  # isort: skip  # first: names what to install
from accelerate import Accelerator
from accelerate.utils import set_seed
from lab.command_line import checked, describe_folder, named_arguments, parse_options, run_recipe, same_names
from lab.sweeping import idle

from sj_robust import SpikingClassifier, training
from sj_robust.data import ImageSplits, load_images
from sj_robust.evaluation import Report, ThreatModel, parse_eps
from sj_robust.evaluation.drawings import plot_report
from sj_robust.models import NetworkSpec, build_classifier, start_from

# Options that a resumed run may change, since the weights do not depend on them.
FREE = {"data_root", "download", "test_limit", "reference", "device", "workers", "checkpoint_steps", "compile",
        "channels_last", "log_bounds", "output", "resume"}  # fmt: skip
UNDEFENDED: dict[str, Any] = {
    "neuron": "lif", "mode": "none", "select": "clean", "attack_steps": None, "project": True, "pretrained": None,
    "gradient_sparsity": 0.0, "threshold_guard": 0.0, "gain_penalty": 0.0}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Options of adv_train. A radius is a number or a fraction such as 8/255, for images in [0, 1].

    Attributes:
        dataset: digits, mnist, fashion_mnist, cifar10, cifar100, svhn, image_folder:PATH; event data: cifar10_dvs,
            dvs128_gesture, n_mnist.
        data_root: Folder with the data set's files, or where they are downloaded to.
        download: Download what is missing.
        augment: Random crop, flip and Cutout of the training images; null does so for CIFAR only, as the paper.
        on_unreadable: error stops at pictures that cannot be read, skip leaves them out with a warning.
        train_limit: Training images to use at most, those for validation included; null for all.
        test_limit: Test images to use at most; null for all.
        validation_fraction: Share of the training images, from 0 to 1, that is held out to select the epoch by.
        model: small, vgg5 (11, 13, 16, 19), wrn16_4, wrn28_10, zoo:FUNCTION of SpikingJelly, module:function of yours.
        model_options: Further keyword arguments of the network.
        neuron: Spiking neuron of the trained network.
        T: Time steps per image; frames per sample of event data.
        tau: Membrane time constant in time steps; the decay is 1 - 1 / tau.
        channels: Output channels of the convolutions of small.
        hidden: Widths of the hidden linear layers of a VGG.
        pretrained: Checkpoint whose weights the network starts from; null for random ones.
        mode: none, gaussian, at (single step), rat (at and retraction of the weights), pgd_at, trades.
        eps: Linf radius of the training attack; for gaussian the standard deviation.
        step_size: Step of the training attack; null means eps for one step, eps / 4 for several.
        attack_steps: Steps of the training attack of pgd_at and trades; null means 7 and 10.
        noise_std: Standard deviation of the noise at the start of the training attack of at, rat and trades.
        project: Whether the training attack is projected back onto the ball (the published code does not).
        eval_eps: Radius of the attacks in validation and test; null means eps.
        kappa: Weight of the clean cross entropy, the perturbed one has 1 - kappa; null means 0.5, and 0 for pgd_at.
        rho: Weight of MS-MPPD, or of the indicator in its place; null means 1, and 0 for pgd_at and trades.
        layers: Spiking layers of MS-MPPD, last, all, or a list of names such as [stages.1, stages.5].
        norm: l2 for the mean square of the perturbation, l1 for its mean absolute value.
        indicator: Perturbation that is kept small, mppd, or tasad or std in its place.
        input_gain: Make DLIF's learnable gain part of the perturbation in the loss (the paper leaves it out).
        beta: Length of rat's step of retraction; null means 1e-3.
        trades_weight: Weight of the divergence of trades.
        gradient_sparsity: Weight of the penalty on the input gradient; 0 leaves it out.
        threshold_guard: Weight of the penalty on potentials nearer to the threshold than guard_margin; 0 leaves it out.
        guard_margin: That distance, in units of the potential; the threshold is at 1.
        gain_penalty: Weight of the penalty on the gain of every DLIF layer over time; 0 leaves it out.
        epochs: Passes over the training images.
        batch_size: Images per step, over all processes together.
        accumulate: Parts that each process computes its share of a step in, one after the other.
        lr: Learning rate of SGD at the start; it falls to 0 (cosine).
        momentum: Momentum of SGD.
        weight_decay: Weight decay on all parameters; null means 5e-4, and 0 for rat.
        select: Validation accuracy that the epoch is chosen by; null means pgd, and clean for mode none.
        reference: Whether an undefended LIF network is trained and measured beside it.
        seed: Seed of everything.
        device: auto takes a GPU if there is one, cpu does not.
        mixed_precision: Accelerate's precision; fp16 needs a GPU.
        compile: Compile the network with torch.compile.
        channels_last: Whether the channels of the images are last in memory; null does so on a GPU only.
        sync_batch_norm: Let batch norm see the images of all processes.
        workers: Processes that load images in the background.
        checkpoint_steps: Steps between checkpoints within an epoch; null for one per epoch.
        log_bounds: Show the exact L2 bound of every layer in TensorBoard (a VGG-11 takes 9 s an epoch for it).
        output: Folder of the run; null makes runs/DATASET-NEURON-MODE-NUMBER.
        resume: Go on with the run in output (null: the newest of this kind) from its last checkpoint.
    """

    GROUPS: ClassVar = {"data": "dataset", "network": "model", "training attack": "mode", "loss": "kappa",
                        "training": "epochs", "machine": "device", "output": "checkpoint_steps"}  # fmt: skip
    dataset: str = "digits"
    data_root: str = "data"
    download: bool = False
    augment: bool | None = None
    on_unreadable: Literal["error", "skip"] = "error"
    train_limit: int | None = None
    test_limit: int | None = None
    validation_fraction: float = 0.1
    model: str = "small"
    model_options: dict[str, Any] = field(default_factory=dict)
    neuron: Literal["dlif", "lif", "plif", "if"] = "dlif"
    T: int = 4
    tau: float = 100.0
    channels: tuple[int, ...] = (16, 32)
    hidden: tuple[int, ...] = (4096, 4096)
    pretrained: str | None = None
    mode: Literal["none", "gaussian", "at", "rat", "pgd_at", "trades"] = "at"
    eps: float | str = 0.1
    step_size: float | str | None = None
    attack_steps: int | None = None
    noise_std: float = 0.001
    project: bool = True
    eval_eps: float | str | None = None
    kappa: float | None = None
    rho: float | None = None
    layers: Literal["last", "all"] | list[str] = "last"
    norm: Literal["l2", "l1"] = "l2"
    indicator: Literal["mppd", "tasad", "std"] = "mppd"
    input_gain: bool = False
    beta: float | None = None
    trades_weight: float = 6.0
    gradient_sparsity: float = 0.0
    threshold_guard: float = 0.0
    guard_margin: float = 0.5
    gain_penalty: float = 0.0
    epochs: int = 15
    batch_size: int = 64
    accumulate: int = 1
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float | None = None
    select: Literal["clean", "fgsm", "pgd"] | None = None
    reference: bool = True
    seed: int = 0
    device: Literal["auto", "cpu"] = "auto"
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    compile: bool = False
    channels_last: bool | None = None
    sync_batch_norm: bool = False
    workers: int = 0
    checkpoint_steps: int | None = None
    log_bounds: bool = False
    output: str | None = None
    resume: bool = False


def main(arguments: list[str]) -> None:
    """Train, evaluate, report."""
    options = parse_options(Options, named_arguments(arguments), stem)
    accelerator = training.make_accelerator(options.device, options.mixed_precision)
    with training.first_process_first(accelerator, f"loading {options.dataset}"):  # which downloads
        splits = load_images(options.dataset, root=options.data_root, **same_names(load_images, options))
    networks = {f"{options.neuron} {options.mode}": options}
    if options.reference:
        networks["lif undefended"] = replace(options, **UNDEFENDED)
    eps = parse_eps(options.eps if options.eval_eps is None else options.eval_eps)
    with checked():  # before there is a folder
        networks = {name: completed(choice) for name, choice in networks.items()}
        for choice in networks.values():
            objective, plan, attack = prepared(choice, splits)
            tried = [attack, *training.final_attacks(eps).values()]
            training.check_training(objective, splits, plan, accelerator, tried)
    configuration = asdict(replace(options, output=None, resume=False))
    folder = training.open_run_folder(options.output, stem(options), configuration, accelerator, resume=options.resume)
    if accelerator.is_main_process:
        describe_folder(folder, "adv_train", arguments)
    journal = training.Journal(folder if accelerator.is_main_process else None)
    where = journal.begin(configuration, defaults := asdict(Options()), accelerator)
    if unused := sorted(name for name in idle(configuration) if configuration[name] != defaults[name]):
        journal.say(f"without effect beside the other options: {', '.join(unused)}")
    report = Report(ThreatModel("Linf", eps), (), configuration=configuration, environment=where)
    for name, choice in networks.items():
        classifier, history = train_network(name, choice, splits, accelerator, folder, journal)
        if accelerator.is_main_process:
            attacks, once = training.final_attacks(eps), training.MODES[choice.mode].single_step
            report = report.merged(training.final_report(
                name, classifier, history, splits, attacks, report.threat, journal, seed=options.seed, single_step=once
            ))  # fmt: skip
    if accelerator.is_main_process:
        report.save(folder / "report.json")
        plot_report(report, folder / "report.png")
        journal.say("\n".join([report.table(), *report.notes, f"report.json and report.png are in {folder}"]))
    accelerator.end_training()


def train_network(
    name: str, options: Options, splits: ImageSplits, accelerator: Accelerator, folder: Path, journal: training.Journal
) -> tuple[SpikingClassifier, list[training.EpochRecord]]:
    """Train one network and return it as it was at its best epoch."""
    objective, plan, perturb = prepared(options, splits)
    decisive = {name: value for name, value in asdict(options).items() if name not in FREE}
    (network_folder := folder / name.replace(" ", "_")).mkdir(exist_ok=True)
    eps = options.eps if options.eval_eps is None else options.eval_eps
    description = {"network": asdict(network_spec(options, splits)), "options": decisive}
    history = training.train(
        objective, splits, plan, perturb=perturb, validation_attacks=training.validation_attacks(parse_eps(eps)),
        accelerator=accelerator, folder=network_folder, journal=journal, description=description,
        resume=options.resume,
    )  # fmt: skip
    objective.classifier.load_state_dict(training.load_checkpoint(network_folder / "best.pt")["model"])
    return objective.classifier, history


def prepared(options: Options, splits: ImageSplits) -> tuple[training.Objective, training.TrainingPlan, Any]:
    """Loss with a fresh network, numbers and attack of a training."""
    mode = training.MODES[options.mode]
    set_seed(options.seed)
    classifier = build_classifier(network_spec(options, splits))
    if options.pretrained is not None:
        start_from(classifier, Path(options.pretrained))
    chosen = {"single_step_attack": mode.single_step, "retraction": options.beta if mode.retraction else 0.0}
    plan = training.TrainingPlan(**same_names(training.TrainingPlan, options) | chosen)
    attack = training.training_attack(**same_names(training.training_attack, options), steps=options.attack_steps)
    loss = {"loss": mode.loss, "penalties": training.make_penalties(**same_names(training.make_penalties, options))}
    return training.Objective(classifier, **same_names(training.Objective, options) | loss), plan, attack


def network_spec(options: Options, splits: ImageSplits) -> NetworkSpec:
    """What the network is built from; the checkpoint keeps it."""
    given = same_names(NetworkSpec, options) | same_names(NetworkSpec, splits)
    return NetworkSpec(**given | {"name": options.model, "options": options.model_options})


def completed(options: Options) -> Options:
    """The options with those of the mode where they are null, and radii as numbers."""
    mode = training.MODES[options.mode]
    of_mode = {name: getattr(mode, name) for name in ("kappa", "rho", "weight_decay", "select")}
    of_mode |= {"beta": mode.retraction}
    options = replace(options, rho=0.0) if options.mode == "none" else options
    found = {name: value for name, value in of_mode.items() if getattr(options, name) is None}
    radii = ((name, getattr(options, name)) for name in ("eps", "step_size", "eval_eps"))
    return replace(options, **found | {name: parse_eps(radius) for name, radius in radii if radius is not None})


def stem(options: Options) -> str:
    """Name of a run's folder, up to its number."""
    return f"{options.dataset.replace(':', '-').replace('/', '-')}-{options.neuron}-{options.mode}"


if __name__ == "__main__":
    run_recipe(main)
