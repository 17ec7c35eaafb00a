"""Train a robust spiking network, and measure it beside an undefended one.

python recipes/adv_train.py                                              # digits, under a minute
python recipes/adv_train.py --dataset image_folder:PATH --model vgg5 --T 8
python recipes/adv_train.py --output runs/mine --resume                  # continue a stopped run
torchrun --nproc-per-node 2 recipes/adv_train.py                         # or accelerate launch
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from lab.command_line import (
    check_options,
    checked,
    deciding,
    describe_folder,
    idle,
    option,
    parse_options,
    run_recipe,
)
from lab.command_line.declared import (
    DatasetName,
    NonNegativeInt,
    OpenUnitInterval,
    OutputFolder,
    PositiveInt,
    Radius,
    often,
)


@dataclass(frozen=True)
class Options:
    """Options of adv_train; what ``decides`` and ``idle`` say is read at
    :class:`lab.command_line.declared.Option`.
    """

    dataset: DatasetName = often(
        "digits",
        "digits, mnist, fashion_mnist, cifar10, cifar100, svhn, image_folder:PATH; "
        "event data: cifar10_dvs, dvs128_gesture, n_mnist.",
        group="data",
        metavar="NAME",
    )
    data_root: str = often(
        "data", "Folder of the data set, and of downloads.", metavar="FOLDER", decides="nothing"
    )
    download: bool = often(False, "Download what is missing.", decides="nothing")
    augment: bool | None = option(
        None, "Crop, flip and Cutout of training images; null does so for CIFAR only."
    )
    cutout: NonNegativeInt = option(
        16,
        "Side in pixels of the square that Cutout sets to zero; 0 for none.",
        idle=lambda given: (
            not (
                given.dataset in ("cifar10", "cifar100") if given.augment is None else given.augment
            )
        ),
    )
    on_unreadable: Literal["error", "skip"] = option(
        "error", "Unreadable pictures: error stops, skip leaves them out."
    )
    train_limit: PositiveInt | None = option(
        None, "Training images at most, validation included; null for all."
    )
    test_limit: PositiveInt | None = option(
        None, "Test images to use at most; null for all.", decides="figures"
    )
    validation_fraction: OpenUnitInterval = option(
        0.1, "Share of the training images to select the epoch by."
    )
    model: str = often(
        "small",
        "small, vgg5 (11, 13, 16, 19), wrn16_4, wrn28_10, zoo:FUNCTION of SpikingJelly, "
        "module:function of yours.",
        group="network",
        metavar="NAME",
        runs_code=True,
    )
    model_options: dict[str, Any] = option({}, "Further keyword arguments of the network.")
    neuron: Literal["dlif", "lif", "plif", "if", "relu"] = often(
        "dlif", "Spiking neuron of the trained network; relu: the ordinary network (T 1)."
    )
    learn_gain: bool = option(
        True, "False leaves DLIF's gain at 1, as LIF.", idle=lambda given: given.neuron != "dlif"
    )
    T: PositiveInt = often(4, "Time steps per image; frames per sample of event data.")
    tau: float = option(100.0, "Membrane time constant in time steps; the decay is 1 - 1 / tau.")
    channels: tuple[int, ...] = option((16, 32), "Output channels of the convolutions of small.")
    hidden: tuple[int, ...] = option(
        (4096, 4096), "Widths of a VGG's hidden layers; small: in model_options."
    )
    mean: list[float] | None = option(
        None, "Mean per channel that the network subtracts; null: the data set's."
    )
    std: list[float] | None = option(
        None, "Standard deviation per channel that it divides by; null likewise."
    )
    pretrained: str | None = often(
        None, "Checkpoint to start from; null for random weights.", metavar="CHECKPOINT"
    )
    mode: Literal["none", "gaussian", "at", "rat", "pgd_at", "trades", "certified"] = often(
        "at",
        "none, gaussian, at "
        "(single step), rat (at and retraction of the weights), pgd_at, trades, certified.",
        group="training attack",
    )
    eps: Radius = often(
        0.1,
        "Linf radius of the training attack, as 8/255; for gaussian the standard deviation.",
        idle=lambda options: options.mode == "none" and options.eval_eps is not None,
    )
    certified_eps: Radius | None = option(
        None, "Linf radius of the bounds of certified; null means eps."
    )
    surrogate_width: float = option(
        1.0,
        "Width of the surrogate in the bounds of certified, in units of the neuron's; 0.5 proves "
        "about a point more.",
    )
    ramp: float = option(
        0.6, "Share of a certified training in which radius and weight of the bounds rise."
    )
    box: float = option(
        1.0,
        "Share of the radius that the bounds of certified are over, around an attacked image; 1 "
        "is the whole ball (SABR: 0.1 to 0.7).",
    )
    attacked: bool = option(
        False,
        "Whether kappa weighs the attacked images in certified, not the clean ones (MTL-IBP).",
    )
    step_size: Radius | None = option(
        None, "Step of the attack; null is eps for one step, eps / 4 for several."
    )
    attack_steps: PositiveInt | None = option(
        None, "Steps of pgd_at and trades; null means 7 and 10."
    )
    noise_std: float = option(
        0.001, "Standard deviation of the noise at the start of at, rat and trades."
    )
    project: bool = option(
        True, "Project the training attack onto the ball (the published code does not)."
    )
    eval_eps: Radius | None = option(
        None, "Radius of the attacks in validation and test; null means eps."
    )
    kappa: float | None = option(
        None,
        "Weight of the clean cross entropy (certified: at the end), 1 - kappa is that "
        "of the perturbed one or the bounds; null means 0.5, and 0 for pgd_at and certified.",
        group="loss",
    )
    rho: float | None = often(
        None, "Weight of MS-MPPD or the indicator; null means 1 for gaussian, at, rat, else 0."
    )
    layers: Literal["last", "all"] | list[str] = option(
        "last",
        "Spiking layers of MS-MPPD, last, all, or a list of names such as "
        "[stages.0.node, stages.2.node].",
        idle=lambda options: options.rho == 0,
    )
    norm: Literal["l2", "l1"] = option(
        "l2", "l2: mean square, l1: mean absolute value.", idle=lambda o: o.rho == 0
    )
    indicator: Literal["mppd", "tasad", "std"] = option(
        "mppd", "Perturbation kept small.", idle=lambda o: o.rho == 0
    )
    input_gain: bool = option(
        False,
        "Make DLIF's learnable gain part of the perturbation in the loss (the paper "
        "leaves it out).",
        idle=lambda options: options.rho == 0 or options.indicator != "mppd",
    )
    beta: float | None = option(None, "Length of rat's step of retraction; null means 1e-3.")
    trades_weight: float = option(6.0, "Weight of the divergence of trades.")
    gradient_sparsity: float = option(
        0.0, "Weight of the penalty on the input gradient; 0 leaves it out."
    )
    threshold_guard: float = option(
        0.0, "Weight of the penalty on potentials near the threshold; 0 leaves it out."
    )
    guard_margin: float = option(
        0.5, "How near; threshold: 1.", idle=lambda options: options.threshold_guard == 0
    )
    gain_penalty: float = option(
        0.0, "Weight of the penalty on the gain of DLIF layers over time; 0 leaves it out."
    )
    l1: float = option(0.0, "Weight of the sum of absolute weights; 0 leaves it out.")
    epochs: PositiveInt = often(15, "Passes over the training images.", group="training")
    batch_size: PositiveInt = often(64, "Images per step, over all processes together.")
    accumulate: PositiveInt = option(
        1, "Parts that each process computes its share of a step in, one after the other."
    )
    optimizer: Literal["sgd", "adam"] = option("sgd", "sgd or adam.")
    lr: float = often(0.1, "Learning rate at the start; it falls to 0 (cosine).")
    milestones: tuple[float, ...] = option(
        (), "Shares of the epochs after which it falls to a fifth, in the place of the cosine."
    )
    precise_statistics: NonNegativeInt = option(
        0,
        "Training batches over which batch norm's statistics are taken anew before a validation; "
        "0 keeps the moving average.",
    )
    gradient_clip: float | None = option(None, "Largest L2 norm of the gradient; null for any.")
    momentum: float = option(
        0.9, "Momentum of SGD.", idle=lambda options: options.optimizer == "adam"
    )
    weight_decay: float | None = option(
        None, "Weight decay on all parameters; null means 5e-4, 0 for rat, certified."
    )
    select: Literal["clean", "fgsm", "pgd", "verified"] | None = option(
        None,
        "Validation accuracy that the epoch is "
        "chosen by; null means pgd, clean for none, verified for certified.",
    )
    reference: bool = often(
        True, "Train and measure an undefended LIF network beside it.", decides="nothing"
    )
    seed: NonNegativeInt = often(0, "Seed of everything.")
    device: Literal["auto", "cpu"] = option(
        "auto", "auto: a GPU if there is one.", group="machine", decides="nothing"
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = option(
        "no", "Accelerate's precision; fp16 needs a GPU."
    )
    compile: bool = option(False, "Compile the network with torch.compile.", decides="figures")
    channels_last: bool | None = option(
        None, "Channels last; null: on a GPU, in bf16 if faster.", decides="figures"
    )
    sync_batch_norm: bool = option(False, "Let batch norm see the images of all processes.")
    workers: NonNegativeInt = option(
        0, "Processes that load images in the background.", decides="nothing"
    )
    checkpoint_steps: PositiveInt | None = option(
        None,
        "Steps between checkpoints within an epoch; null for one per epoch.",
        group="output",
        decides="nothing",
    )
    log_bounds: bool = option(
        False, "L2 bound of all layers in TensorBoard (VGG-11: 9 s an epoch).", decides="nothing"
    )
    output: OutputFolder | None = often(
        None,
        "Folder of the run; null makes runs/DATASET-NEURON-MODE-NUMBER.",
        metavar="FOLDER",
        decides="nothing",
    )
    resume: bool = often(
        False, "Go on with the run in output (null: the newest of its kind).", decides="nothing"
    )


if __name__ == "__main__":
    check_options(Options)  # --help and wrong options end here: what follows imports torch

from accelerate import Accelerator
from accelerate.utils import set_seed

from sj_robust import SpikingClassifier, training
from sj_robust.data import ImageSplits, load_images
from sj_robust.evaluation import Report, ThreatModel, parse_eps
from sj_robust.models import NetworkSpec, build_classifier, start_from

ValueT = TypeVar("ValueT")


def main(arguments: list[str]) -> None:
    """Train, evaluate, report."""
    options = parse_options(Options, arguments, stem)
    accelerator = training.make_accelerator(options.device, options.mixed_precision)
    with training.first_process_first(accelerator, f"loading {options.dataset}"):  # which downloads
        splits = load_images(
            options.dataset,
            root=options.data_root,
            validation_fraction=options.validation_fraction,
            T=options.T,
            seed=options.seed,
            train_limit=options.train_limit,
            test_limit=options.test_limit,
            cutout=options.cutout,
            download=options.download,
            on_unreadable=options.on_unreadable,
            augment=options.augment,
        )
    networks = {f"{options.neuron} {options.mode}": options}
    if options.reference:
        networks["lif undefended"] = replace(
            options,
            neuron="lif",
            mode="none",
            select="clean",
            attack_steps=None,
            project=True,
            pretrained=None,
            gradient_sparsity=0.0,
            threshold_guard=0.0,
            gain_penalty=0.0,
            l1=0.0,
        )
    eps = known(radius(options.eval_eps, options.eps))
    with checked():  # before there is a folder
        networks = {name: completed(choice) for name, choice in networks.items()}
        for choice in networks.values():
            objective, plan, attack = prepared(choice, splits)
            attacks = [attack, *training.final_attacks(eps).values()]
            training.check_training(objective, splits, plan, accelerator, attacks)
    configuration = asdict(replace(options, output=None, resume=False))
    folder = training.open_run_folder(
        options.output, stem(options), configuration, accelerator, resume=options.resume
    )
    if accelerator.is_main_process:
        describe_folder(folder, "adv_train", arguments)
    journal = training.Journal(folder if accelerator.is_main_process else None)
    where = journal.begin(configuration, defaults := asdict(Options()), accelerator)
    if unused := sorted(
        name for name in idle(completed(options)) if configuration[name] != defaults[name]
    ):
        journal.say(f"without effect beside the other options: {', '.join(unused)}")
    report = Report(ThreatModel("Linf", eps), (), configuration=configuration, environment=where)
    for name, choice in networks.items():
        classifier, history = train_network(name, choice, splits, accelerator, folder, journal)
        if accelerator.is_main_process:
            report = report.merged(
                training.final_report(
                    name,
                    classifier,
                    history,
                    splits,
                    training.final_attacks(eps),
                    report.threat,
                    journal,
                    seed=options.seed,
                    single_step=training.MODES[choice.mode].single_step,
                    verified_eps=eps if choice.select == "verified" else None,
                )
            )
    if accelerator.is_main_process:
        from sj_robust.evaluation.drawings import plot_report  # imports matplotlib

        report.save(folder / "report.json")
        plot_report(report, folder / "report.png")
        journal.say(
            "\n".join(
                [report.table(), *report.notes, f"report.json and report.png are in {folder}"]
            )
        )
    accelerator.end_training()


def train_network(
    name: str,
    options: Options,
    splits: ImageSplits,
    accelerator: Accelerator,
    folder: Path,
    journal: training.Journal,
) -> tuple[SpikingClassifier, list[training.EpochRecord]]:
    """Train one network and return it as it was at its best epoch."""
    objective, plan, perturb = prepared(options, splits)
    origin = options.pretrained or options.model.rpartition(":")[0].removeprefix(
        "zoo"
    )  # empty for random weights
    if origin and accelerator.is_main_process and not options.resume:
        training.check_start(objective.classifier, splits, journal, origin)
    (network_folder := folder / name.replace(" ", "_")).mkdir(exist_ok=True)
    description = {
        "network": asdict(network_spec(options, splits)),
        "options": deciding(options, "result"),
    }
    history = training.train(
        objective,
        splits,
        plan,
        perturb=perturb,
        accelerator=accelerator,
        folder=network_folder,
        journal=journal,
        validation_attacks=training.validation_attacks(
            known(radius(options.eval_eps, options.eps))
        ),
        description=description,
        resume=options.resume,
    )
    objective.classifier.load_state_dict(
        training.load_checkpoint(network_folder / "best.pt")["model"]
    )
    return objective.classifier, history


def prepared(
    options: Options, splits: ImageSplits
) -> tuple[training.Objective, training.TrainingPlan, Any]:
    """Loss with a fresh network, numbers and attack of a training; the options are completed
    ones.
    """
    mode = training.MODES[options.mode]
    set_seed(options.seed)
    classifier = build_classifier(network_spec(options, splits))
    if options.pretrained is not None:
        start_from(classifier, Path(options.pretrained))
    plan = training.TrainingPlan(
        epochs=options.epochs,
        momentum=options.momentum,
        workers=options.workers,
        compile=options.compile,
        batch_size=options.batch_size,
        single_step_attack=mode.single_step,
        channels_last=options.channels_last,
        accumulate=options.accumulate,
        lr=options.lr,
        milestones=options.milestones,
        gradient_clip=options.gradient_clip,
        precise_statistics=options.precise_statistics,
        optimizer=options.optimizer,
        log_bounds=options.log_bounds,
        weight_decay=known(options.weight_decay),
        select=known(options.select),
        sync_batch_norm=options.sync_batch_norm,
        retraction=known(options.beta) if mode.retraction else 0.0,
        checkpoint_steps=options.checkpoint_steps,
        seed=options.seed,
        verified_eps=radius(options.eval_eps, options.eps)
        if options.select == "verified"
        else None,
    )
    bounds = training.CertifiedOptions(
        surrogate_width=options.surrogate_width,
        ramp=options.ramp,
        box=options.box,
        attacked=options.attacked,
    )
    attack = None
    if mode.loss != "certified" or options.rho != 0 or bounds.needs_perturbed:
        attacks_bounds = mode.loss == "certified" and bounds.needs_perturbed
        attack = training.training_attack(
            options.mode,
            eps=known(radius(options.certified_eps if attacks_bounds else options.eps)),
            noise_std=options.noise_std,
            project=options.project,
            step_size=radius(options.step_size),
            steps=options.attack_steps,
        )
    penalties = training.make_penalties(
        gradient_sparsity=options.gradient_sparsity,
        threshold_guard=options.threshold_guard,
        guard_margin=options.guard_margin,
        gain_penalty=options.gain_penalty,
        l1=options.l1,
    )
    objective = training.Objective(
        classifier,
        kappa=known(options.kappa),
        rho=known(options.rho),
        layers=options.layers,
        norm=options.norm,
        input_gain=options.input_gain,
        loss=mode.loss,
        trades_weight=options.trades_weight,
        penalties=penalties,
        certified_eps=radius(options.certified_eps) if mode.loss == "certified" else None,
        certified_options=bounds,
        indicator=options.indicator,
    )
    return objective, plan, attack


def network_spec(options: Options, splits: ImageSplits) -> NetworkSpec:
    """What the network is built from; the checkpoint keeps it."""
    return NetworkSpec(
        options.model,
        options.neuron,
        splits.image_shape,
        splits.classes,
        T=options.T,
        tau=options.tau,
        channels=options.channels,
        hidden=options.hidden,
        options=options.model_options,
        frames=splits.frames,
        mean=splits.mean if options.mean is None else tuple(options.mean),
        std=splits.std if options.std is None else tuple(options.std),
        learn_gain=options.learn_gain,
    )


def completed(options: Options) -> Options:
    """The options with those of the mode where they are null, and radii as numbers."""
    mode = training.MODES[options.mode]
    return replace(
        options,
        eps=parse_eps(options.eps),
        certified_eps=radius(options.certified_eps, options.eps),
        step_size=radius(options.step_size),
        kappa=mode.kappa if options.kappa is None else options.kappa,
        eval_eps=radius(options.eval_eps),
        beta=mode.retraction if options.beta is None else options.beta,
        rho=mode.rho if options.rho is None or options.mode == "none" else options.rho,
        weight_decay=mode.weight_decay if options.weight_decay is None else options.weight_decay,
        select=mode.select if options.select is None else options.select,
    )


def radius(value: float | str | None, null: float | str | None = None) -> float | None:
    """A radius as a number, or the one that null stands for."""
    return None if (given := null if value is None else value) is None else parse_eps(given)


def known(value: ValueT | None) -> ValueT:
    """A value that :func:`completed` has given."""
    assert value is not None
    return value


def stem(options: Options) -> str:
    """Name of a run's folder, up to its number."""
    return f"{options.dataset.replace(':', '-').replace('/', '-')}-{options.neuron}-{options.mode}"


if __name__ == "__main__":
    run_recipe(main)
