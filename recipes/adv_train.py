"""Train a robust spiking network and compare it with an undefended one.

Examples:
    python recipes/adv_train.py  # digits, one to two minutes
    python recipes/adv_train.py --dataset image_folder:PATH --model vgg5 --T 8
    python recipes/adv_train.py --output runs/mine --resume  # resume an interrupted run
    torchrun --nproc-per-node 2 recipes/adv_train.py  # or accelerate launch
"""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from lab.command_line import (
    DatasetName,
    Decides,
    Idle,
    NamesCode,
    Needs,
    NonNegativeInt,
    Often,
    OpenUnitInterval,
    OutputFolder,
    PositiveInt,
    Radius,
    YamlDict,
    check_options,
    checked,
    deciding,
    describe_folder,
    parse_options,
    plain,
    run_recipe,
    unused,
)

from sj_robust.core.datasets import AUGMENTED
from sj_robust.core.extras import check_tracker

if TYPE_CHECKING:
    from sj_robust.training.modes import ModeName  # brings torch


def of_events(options: "Options") -> bool:
    """Whether events are changed or moved, and not values."""
    return options.flips is not None or options.moves is not None


WITHOUT_PERTURBATION_TERM = Idle(lambda options: options.rho == 0)
BESIDE_EVENTS = Idle(of_events)


def has_no_leak(options: "Options") -> bool:
    """Whether no network that is trained has a time constant; the reference is one of LIF."""
    without = options.neuron in ("if", "relu", "clipped_relu") or options.mode == "twin_at"
    return without and not options.reference


def is_augmented(options: "Options") -> bool:
    """Whether training images are augmented."""
    if options.augment is None:
        return options.dataset in AUGMENTED or bool(options.augment_options)
    return options.augment


def crafts_no_images(options: "Options") -> bool:
    """Whether a training follows no gradient to perturbed images: events have attacks of their own,
    and bounds alone need none.
    """
    if options.mode in ("at", "rat", "pgd_at"):
        return of_events(options)
    needs_none = options.box == 1 and not options.attacked and options.rho == 0
    return options.mode == "certified" and needs_none


OF_CRAFTING = Idle(crafts_no_images)


def is_eps_idle(options: "Options") -> bool:
    """Whether no images are attacked at eps, neither in training nor in validation and test."""
    evaluated = options.eval_eps is None and not of_events(options)
    return options.mode == "none" and not evaluated


@dataclass(frozen=True)
class Options:
    """Options of adv_train; the marks are explained in :mod:`lab.command_line`."""

    # data
    dataset: Annotated[DatasetName, Often()] = "digits"
    """digits, mnist, fashion_mnist, cifar10, cifar100, svhn, image_folder:PATH; event data:
    cifar10_dvs, dvs128_gesture, n_mnist, saccade:digits (mnist, fashion_mnist)."""
    data_root: Annotated[str, Often(), Decides("nothing")] = "data"
    """Folder of the data set and of downloads."""
    download: Annotated[bool, Often(), Decides("nothing")] = False
    """Download missing files."""
    augment: bool | None = None
    """Augment training images: crop, flip and Cutout, or Cutout and augment_options. None: only
    for CIFAR, or with augment_options."""
    augment_options: Annotated[YamlDict, Idle(lambda options: not is_augmented(options))] = field(
        default_factory=dict
    )
    """padding (largest shift in pixels), flip, rotation (largest angle in degrees) and scale
    (largest relative change of size) of training images; what is not named is off."""
    cutout: Annotated[NonNegativeInt, Idle(lambda options: not is_augmented(options))] = 16
    """Side of the square that Cutout sets to zero, in pixels; 0: no Cutout."""
    on_unreadable: Literal["error", "skip"] = "error"
    """What to do with unreadable pictures."""
    train_limit: PositiveInt | None = None
    """Largest number of training images, including validation; None: all."""
    test_limit: Annotated[PositiveInt | None, Decides("figures")] = None
    """Largest number of test images; None: all."""
    validation_fraction: OpenUnitInterval = 0.1
    """Share of the training images held out to select the epoch."""

    # network
    model: Annotated[str, Often(), NamesCode()] = "small"
    """small, mlp, vgg5 (11, 13, 16, 19), wrn16_4, wrn28_10, zoo:FUNCTION of SpikingJelly, or your
    own module:function."""
    model_options: YamlDict = field(default_factory=dict)
    """Additional keyword arguments of the network."""
    neuron: Annotated[
        Literal[
            "dlif", "lif", "plif", "if", "relu", "clipped_relu", "tgo", "feel", "hosnn", "stog"
        ],
        Often(),
    ] = "dlif"
    """Spiking neuron of the trained network; relu, clipped_relu: no spikes (needs --T 1); tgo,
    feel, hosnn, stog: neurons of defences."""
    learn_gain: Annotated[bool, Idle(lambda options: options.neuron != "dlif")] = True
    """Learn the input gain of DLIF; False: fix it at 1, as in LIF."""
    T: Annotated[PositiveInt, Often()] = 4
    """Time steps per image; frames per sample of event data."""
    tau: Annotated[float, Idle(has_no_leak)] = 100.0
    """Membrane time constant in time steps; the decay is 1 - 1 / tau."""
    channels: Annotated[
        tuple[int, ...], Idle(lambda options: options.model not in ("small", "mlp"))
    ] = (16, 32)
    """For model small: output channels of the convolutions; for mlp: layer widths."""
    hidden: Annotated[
        tuple[int, ...], Idle(lambda options: not options.model.startswith("vgg"))
    ] = (4096, 4096)
    """Widths of the hidden layers of VGG; for model small, use --model-options."""
    encoder: Literal["direct", "poisson", "feel", "rsc", "stod"] = "direct"
    """How an image becomes T frames: direct repeats it, poisson draws spikes, feel removes more
    high frequencies with each step, rsc adds noise, stod multiplies patches by an orthogonal kernel
    per step."""
    encoder_options: Annotated[YamlDict, Idle(lambda options: options.encoder == "direct")] = field(
        default_factory=dict
    )
    """Keyword arguments of the encoder."""
    mean: list[float] | None = None
    """Mean per channel to subtract from the images; None: that of the data set."""
    std: list[float] | None = None
    """Standard deviation per channel to divide the images by; None: that of the data set."""
    pretrained: Annotated[str | None, Often()] = None
    """Checkpoint to start from; None: random weights."""

    # training attack
    mode: Annotated[
        Literal["none", "gaussian", "at", "rat", "pgd_at", "trades", "certified", "twin_at"],
        Often(),
    ] = "at"
    """Training mode: none, gaussian, at (single step), rat (at with weight retraction), pgd_at,
    trades, certified; twin_at: pgd_at of a network of clipped ReLUs, whose weights DLIF neurons
    then run in T steps."""
    levels: Annotated[PositiveInt, Idle(lambda options: options.mode != "twin_at")] = 4
    """For mode twin_at: in training, activations are as uncertain as counts of so many steps."""
    gain_fall: Annotated[float, Idle(lambda options: options.mode != "twin_at")] = 0.0
    """For mode twin_at: how far the gains behind the first layer fall to either side of 1; try 0.3
    for few steps."""
    eps: Annotated[Radius, Often(), Idle(is_eps_idle)] = Radius(0.1)
    """Linf radius of the training attack, such as 8/255; in mode gaussian, the standard
    deviation."""
    flips: PositiveInt | None = None
    """For event data: changed events per sample (L0) in validation, test, proofs and the training
    attack of at, rat and pgd_at, instead of --eval-eps and --eps; None: Linf."""
    moves: PositiveInt | None = None
    """For event data: events moved in time per sample in validation, test, proofs and the training
    attack of at, rat and pgd_at, instead of --eval-eps and --eps; None: Linf."""
    counts: bool = False
    """For event data: frames hold numbers of events, of which a change adds or removes one; False:
    0 or 1."""
    largest_shift: Annotated[PositiveInt | None, Idle(lambda options: options.moves is None)] = None
    """With --moves: largest number of frames by which an event may move; None: no limit."""
    certified_flips: PositiveInt | None = None
    """For mode certified: changed or moved events per time step in the bounds; None: as --flips or
    --moves."""
    certified_eps: Annotated[Radius | None, BESIDE_EVENTS] = None
    """For mode certified: Linf radius of the bounds; None: as --eps."""
    bounds: Literal["ibp", "joint"] = "ibp"
    """For mode certified: bounds in training, selection and final proofs. ibp, or joint over time,
    which is tighter at T 8 but slower."""
    surrogate_width: float = 1.0
    """For mode certified: surrogate width in the bounds, relative to the neuron's; 0.5 was better
    in short runs."""
    ramp: float = 0.6
    """For mode certified: share of training over which the radius and the weight of the bounds
    increase."""
    box: float = 1.0
    """For mode certified: box around an attacked image, as a share of the radius; 1: the whole ball
    (SABR: 0.1 to 0.7)."""
    attacked: bool = False
    """For mode certified: apply --kappa to the attacked images instead of the clean ones
    (MTL-IBP)."""
    step_size: Annotated[Radius | None, OF_CRAFTING] = None
    """Step size of the attack; None: eps for one step, eps / 4 for several."""
    attack_steps: PositiveInt | None = None
    """Attack steps in the modes pgd_at and trades; None: 7 and 10."""
    noise_std: Annotated[float, OF_CRAFTING] = 0.001
    """Standard deviation of the initial noise in the modes at, rat and trades."""
    project: Annotated[bool, OF_CRAFTING] = True
    """Project the training attack onto the ball (the published code does not)."""
    eval_eps: Annotated[Radius | None, BESIDE_EVENTS] = None
    """Radius of the attacks in validation and test; None: as --eps."""

    # loss
    kappa: float | None = None
    """Weight of the clean cross entropy (in mode certified: at the end); 1 - kappa is the weight of
    the perturbed one or of the bounds. None: 0.5, or 0 in the modes pgd_at and certified."""
    rho: Annotated[float | None, Often()] = None
    """Weight of MS-MPPD (or another indicator); None: 1 in the modes gaussian, at and rat,
    else 0."""
    layers: Annotated[Literal["last", "all"] | list[str], WITHOUT_PERTURBATION_TERM] = "last"
    """Spiking layers of MS-MPPD: last, all, or names such as stages.0.node stages.2.node."""
    norm: Annotated[Literal["l2", "l1"], WITHOUT_PERTURBATION_TERM] = "l2"
    """Norm of the perturbation: l2 (mean square) or l1 (mean absolute value)."""
    indicator: Annotated[Literal["mppd", "tasad", "std"], WITHOUT_PERTURBATION_TERM] = "mppd"
    """Perturbation measure in the loss."""
    input_gain: Annotated[
        bool, Idle(lambda options: options.rho == 0 or options.indicator != "mppd")
    ] = False
    """Include DLIF's learnable gain in the perturbation (the paper does not)."""
    beta: float | None = None
    """Step size of the weight retraction in mode rat; None: 1e-3."""
    trades_weight: float = 6.0
    """Weight of the divergence in mode trades."""
    gradient_sparsity: float = 0.0
    """Weight of the penalty on the input gradient; 0: none."""
    threshold_guard: float = 0.0
    """Weight of the penalty on potentials near the threshold; 0: none."""
    guard_margin: Annotated[float, Idle(lambda options: options.threshold_guard == 0)] = 0.5
    """Distance from the threshold at which the penalty of --threshold-guard starts, in units of the
    threshold."""
    guard_rising: Annotated[bool, Idle(lambda options: options.threshold_guard == 0)] = False
    """Increase the weight --threshold-guard from 0 during training (TGO)."""
    gain_penalty: float = 0.0
    """Weight of the penalty on the gain of DLIF layers over time; 0: none."""
    l1: float = 0.0
    """Weight of the L1 norm of the weights; 0: none."""
    mpd_sgr: float = 0.0
    """Weight of the penalty on potentials within reach of the surrogate; 0: none."""
    gate_rates: float = 0.0
    """For neuron stog: weight of the squared rates of its gates (5e-6 in the paper); 0: none."""
    temporal_orthogonality: Annotated[float, Idle(lambda options: options.encoder != "stod")] = 0.0
    """Weight of the penalty on similar frames, for encoder stod; 0: none."""
    deflation: bool = False
    """Remove the largest singular component from every gradient (DSD)."""

    # training
    epochs: Annotated[PositiveInt, Often()] = 15
    """Number of epochs."""
    batch_size: Annotated[PositiveInt, Often()] = 64
    """Images per step, over all processes."""
    accumulate: PositiveInt = 1
    """Gradient accumulation steps."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """Optimizer."""
    lr: Annotated[float, Often()] = 0.1
    """Initial learning rate; it decays to 0 (cosine)."""
    momentum: Annotated[float, Idle(lambda options: options.optimizer == "adam")] = 0.9
    """Momentum of SGD."""
    weight_decay: float | None = None
    """Weight decay of all parameters; None: 5e-4, or 0 in the modes rat and certified."""
    select: Literal["clean", "fgsm", "pgd", "flips", "moves", "verified"] | None = None
    """Validation accuracy that selects the epoch; None: pgd, or flips or moves if --flips or
    --moves is given; clean in mode none, verified in mode certified."""
    reference: Annotated[bool, Often(), Decides("nothing")] = True
    """Also train and evaluate an undefended LIF network."""
    judged: Annotated[NonNegativeInt, Often(), Decides("nothing")] = 64
    """Number of test images on which the suite fast (with events: the suite events) is run at the
    end; 0: none."""
    seed: Annotated[NonNegativeInt, Often()] = 0
    """Random seed."""

    # machine
    device: Annotated[Literal["auto", "cpu"], Decides("nothing")] = "auto"
    """auto: a GPU if available."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Mixed precision of Accelerate; fp16 needs a GPU. Proofs are of the network in float32."""
    compile: Annotated[bool, Decides("figures")] = False
    """Compile the network with torch.compile."""
    channels_last: Annotated[bool | None, Decides("figures")] = None
    """Use the channels-last format; None: on a GPU alone."""
    workers: Annotated[NonNegativeInt, Decides("nothing")] = 0
    """Worker processes that load images."""

    # output
    checkpoint_steps: Annotated[PositiveInt | None, Decides("nothing")] = None
    """Steps between checkpoints; None: one checkpoint per epoch."""
    trackers: Annotated[
        tuple[Literal["wandb", "mlflow"], ...],
        Often(),
        Decides("nothing"),
        Needs(check_tracker),
    ] = ()
    """Experiment trackers, through Accelerate, to which every epoch is logged; TensorBoard files
    are always written."""
    output: Annotated[OutputFolder | None, Often(), Decides("nothing")] = None
    """Output folder; None: a new folder runs/DATASET-NEURON-MODE-NUMBER."""
    resume: Annotated[bool, Often(), Decides("nothing")] = False
    """Resume the run in the folder given by --output; without --output, the newest run."""

    @property
    def trained_mode(self) -> "ModeName":
        """The mode of the training itself."""
        return "pgd_at" if self.mode == "twin_at" else self.mode


if __name__ == "__main__":
    check_options(Options)  # --help and wrong options end here: what follows imports torch

from accelerate import Accelerator
from accelerate.utils import set_seed
from lab.processes import first_process_first, make_accelerator, tracked
from lab.run_folder import open_run_folder

from sj_robust import SpikingClassifier, training
from sj_robust.attacks import Attack, ThreatModel
from sj_robust.core.checks import check_choice
from sj_robust.core.digest import fingerprint
from sj_robust.core.folders import locked
from sj_robust.data import Augmentation, ImageSplits, load_images
from sj_robust.data.stored import contents
from sj_robust.defences import SurrogateOverlap
from sj_robust.defences.stog import GateRates
from sj_robust.evaluation import Report, evaluate
from sj_robust.evaluation.run.data import Data
from sj_robust.models import NetworkSpec, build_classifier, start_from
from sj_robust.models.build import NETWORKS, check_has_neuron, code_of, options_for_lif
from sj_robust.models.checkpoint import check_same_run, load_run
from sj_robust.proofs.differentiable import TrainedMethod
from sj_robust.training.engine import check_training
from sj_robust.training.journal import EpochRecord
from sj_robust.training.modes import Mode, event_attacks, event_training_attack, final_attacks
from sj_robust.training.validation import (
    check_start,
    final_report,
    read_test_images,
    seen_before,
)

ValueT = TypeVar("ValueT")

TWIN: Literal["clipped_relu"] = "clipped_relu"
"""What takes the place of the neurons in a training of mode twin_at."""
RUN_BY_SPIKES = "dlif twin_at"
"""Name of the network that runs the weights of such a training."""


def main(arguments: list[str]) -> None:
    """Train, evaluate, report."""
    options = parse_options(Options, arguments, stem)
    accelerator = make_accelerator(options.device, options.mixed_precision, options.trackers)
    with checked():
        augment = augmentation(options)
    with first_process_first(accelerator, f"loading {options.dataset}"):  # which downloads
        splits = load_images(
            options.dataset,
            root=options.data_root,
            validation_fraction=options.validation_fraction,
            T=options.T,
            counts=options.counts,
            seed=options.seed,
            train_limit=options.train_limit,
            test_limit=options.test_limit,
            download=options.download,
            on_unreadable=options.on_unreadable,
            augment=augment,
        )
    with checked():
        trained = twin_of(options) if options.mode == "twin_at" else options
    networks = {f"{trained.neuron} {trained.trained_mode}": trained}
    if options.reference:
        networks["lif undefended"] = undefended(options)
    with checked():  # before there is a folder
        threat = evaluation_threat(options)
        check_events(options, splits)
        code = code_of(network_spec(options, splits))
        for choice in networks.values():
            objective, plan, attack = prepared(choice, splits)
            if is_twin(choice, options):
                run_by_spikes(objective.classifier, options, splits)
            attacks = [attack, *attacks_of_report(options).values()]
            check_training(objective, splits, plan, accelerator, attacks)
            plan.check_select(validation_attacks(choice))
    descriptions = described(networks, splits, code)
    if options.resume:
        assert options.output is not None  # where to resume was found before
        check_resumed(Path(options.output), descriptions)
    configuration = plain(replace(options, output=None, resume=False))
    folder = open_run_folder(
        options.output, stem(options), configuration, accelerator, resume=options.resume
    )
    alone: AbstractContextManager[None] = nullcontext()
    if accelerator.is_main_process:
        alone = locked(
            folder / ".lock",
            f"another process trains in {folder}; wait until it has ended, or give another "
            "--output",
        )
    with alone:
        if accelerator.is_main_process:
            describe_folder(folder, "adv_train", arguments)
        train_all(
            networks,
            options,
            splits,
            threat,
            accelerator,
            folder,
            configuration,
            code=code,
            descriptions=descriptions,
        )
    accelerator.end_training()


def described(
    networks: Mapping[str, Options], splits: ImageSplits, code: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """By name of a network, the description that its checkpoints hold and that a resumed run
    must share; ``code`` is the digest of the code that builds it.
    """
    images = fingerprint([contents(splits.train), contents(splits.validation)])
    return {
        name: {
            "network": asdict(network_spec(options, splits)),
            "options": deciding(completed(options)),
            "images and labels": images,
            **code,
        }
        for name, options in networks.items()
    }


def check_resumed(folder: Path, descriptions: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError if checkpoints in the folder are of a run with other options."""
    for name, description in descriptions.items():
        last = folder_of(name, folder) / "last.pt"
        if last.is_file():
            check_same_run(load_run(last)["description"], description)


def folder_of(network: str, folder: Path) -> Path:
    """Where the files of one of the networks are."""
    return folder / network.replace(" ", "_")


def train_all(
    networks: Mapping[str, Options],
    options: Options,
    splits: ImageSplits,
    threat: ThreatModel,
    accelerator: Accelerator,
    folder: Path,
    configuration: Mapping[str, Any],
    *,
    code: Mapping[str, str],
    descriptions: Mapping[str, Mapping[str, Any]],
) -> None:
    """Train the networks, and write the report on all of them."""
    journal = training.Journal(
        folder if accelerator.is_main_process else None, track=accelerator.log
    )
    defaults = plain(Options())
    where = journal.begin(configuration, defaults, accelerator)
    where |= code
    if names := unused(options, completed(options)):
        journal.say(f"ignored with the other options given: {', '.join(names)}")
    warning = None
    if options.pretrained is not None:
        warning = seen_before(Path(options.pretrained), splits)
    if warning is not None:
        journal.say(f"WARNING: {warning}")
    reports = []
    verdicts = []
    data = None
    for name, choice in networks.items():
        classifier, history = train_network(
            name, choice, splits, accelerator, folder, journal, description=descriptions[name]
        )
        if not accelerator.is_main_process:
            continue
        if data is None:
            data = read_test_images(splits)
        judged = {name: classifier}
        if is_twin(choice, options):
            spiking = run_by_spikes(classifier, options, splits)
            save_spiking(spiking, options, splits, folder, descriptions[name])
            judged[RUN_BY_SPIKES] = spiking
        for judged_name, network in judged.items():
            report = final_report(
                judged_name,
                network,
                history,
                splits,
                data,
                attacks_of_report(options),
                threat,
                journal,
                seed=options.seed,
                single_step=is_single_step(choice),
                verified=mode_of(choice).select == "verified",
                verified_method=verified_method(choice),
                dataset=options.dataset,
                configuration=configuration,
                environment=where,
            )
            reports.append(report)
            if options.judged:
                verdicts.append(verdict_on(judged_name, network, data, threat, options, journal))
    if accelerator.is_main_process:
        report = reduce(Report.merged, reports)
        if warning is not None:
            report = replace(report, warnings=(*report.warnings, warning))
        report.save(folder / "report.json")
        report.plot(path=folder / "report.png")
        ended = f"report.json and report.png are in {folder}"
        journal.say("\n".join([report.table(), *report.warnings, ended]))
    for verdict in verdicts:
        verdict.save(folder_of(verdict.name, folder) / "left.json")
        journal.say(f"{verdict.name}: {verdict.verdict}")


def verdict_on(
    name: str,
    network: SpikingClassifier,
    data: Data,
    threat: ThreatModel,
    options: Options,
    journal: training.Journal,
) -> Report:
    """What a quick suite leaves of a trained network, on the first test images."""
    few = data.first(options.judged)
    suite: Literal["events", "fast"] = "events" if threat.of_events else "fast"
    journal.say(f"evaluating {name} with suite {suite} on {len(few.labels)} images")
    return evaluate(
        network,
        few,
        eps=threat,
        suite=suite,
        seed=options.seed,
        name=name,
        dataset=options.dataset,
        progress=False,
    )


def train_network(
    name: str,
    options: Options,
    splits: ImageSplits,
    accelerator: Accelerator,
    folder: Path,
    journal: training.Journal,
    *,
    description: Mapping[str, Any],
) -> tuple[SpikingClassifier, list[EpochRecord]]:
    """Train one network and return it as it was at its best epoch; see :func:`described`."""
    objective, plan, perturb = prepared(options, splits)
    module, _, _ = options.model.rpartition(":")
    origin = options.pretrained or module.removeprefix("zoo")  # empty for random weights
    if origin and accelerator.is_main_process and not options.resume:
        check_start(objective.classifier, splits, journal, origin)
    network_folder = folder_of(name, folder)
    network_folder.mkdir(exist_ok=True)
    with tracked(accelerator, folder, network_folder.name, plain(options)):
        history = training.train(
            objective,
            splits,
            plan,
            perturb=perturb,
            accelerator=accelerator,
            folder=network_folder,
            journal=journal,
            validation_attacks=validation_attacks(options),
            description=description,
            resume=options.resume,
        )
    best = training.load_checkpoint(network_folder / "best.pt")
    objective.classifier.load_state_dict(best["model"])
    return objective.classifier, history


def prepared(
    options: Options, splits: ImageSplits
) -> tuple[training.Objective, training.TrainingPlan, Any]:
    """Loss with a fresh network, numbers and attack of a training."""
    mode = mode_of(options)
    set_seed(options.seed)
    spec = network_spec(options, splits)
    classifier = build_classifier(spec)
    check_has_neuron(classifier, spec)
    if options.pretrained is not None:
        start_from(classifier, Path(options.pretrained))
    certified = mode.loss == "certified"
    plan = training.TrainingPlan(
        epochs=options.epochs,
        momentum=options.momentum,
        workers=options.workers,
        compile=options.compile,
        batch_size=options.batch_size,
        single_step_attack=is_single_step(options),
        channels_last=options.channels_last,
        accumulate=options.accumulate,
        lr=options.lr,
        optimizer=options.optimizer,
        weight_decay=mode.weight_decay,
        select=mode.select,
        retraction=mode.retraction,
        deflation=options.deflation,
        checkpoint_steps=options.checkpoint_steps,
        seed=options.seed,
        verified=evaluation_threat(options) if mode.select == "verified" else None,
        verified_method=verified_method(options),
    )
    bounds = training.CertifiedOptions(
        bounds=options.bounds,
        surrogate_width=options.surrogate_width,
        ramp=options.ramp,
        box=options.box,
        attacked=options.attacked,
    )
    attack = None
    if not certified or mode.rho != 0 or bounds.needs_perturbed:
        attack = attack_in_training(options, bounds)
    penalties = (
        training.GradientSparsity(options.gradient_sparsity),
        training.ThresholdGuarding(
            options.threshold_guard, margin=options.guard_margin, rising=options.guard_rising
        ),
        training.StabilityGain(options.gain_penalty),
        training.WeightMagnitude(options.l1),
        SurrogateOverlap(options.mpd_sgr),
        GateRates(options.gate_rates),
        training.TemporalOrthogonality(
            options.temporal_orthogonality if options.encoder == "stod" else 0.0
        ),
    )
    objective = training.Objective(
        classifier,
        kappa=mode.kappa,
        rho=mode.rho,
        layers=options.layers,
        norm=options.norm,
        input_gain=options.input_gain,
        loss=mode.loss,
        trades_weight=options.trades_weight,
        penalties=penalties,
        certified_eps=certified_threat(options) if certified else None,
        certified_options=bounds,
        indicator=options.indicator,
    )
    return objective, plan, attack


def attack_in_training(options: Options, bounds: training.CertifiedOptions) -> Attack | None:
    """What makes the perturbed images of a batch: changed or moved events where the mode attacks
    such.
    """
    if of_events(options) and options.mode in ("at", "rat", "pgd_at"):
        threat = evaluation_threat(options)
        return event_training_attack(options.mode, threat, steps=options.attack_steps)
    attacks_bounds = options.mode == "certified" and bounds.needs_perturbed
    return training.training_attack(
        options.trained_mode,
        eps=certified_eps(options) if attacks_bounds else options.eps,
        noise_std=options.noise_std,
        project=options.project,
        step_size=options.step_size,
        steps=options.attack_steps,
    )


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
        encoder=options.encoder,
        encoder_options=options.encoder_options,
    )


def twin_of(options: Options) -> Options:
    """The training of the network of clipped ReLUs whose weights are to be run by spikes."""
    if options.neuron != "dlif":
        raise ValueError(f"mode twin_at needs neuron dlif, which runs it, got {options.neuron}")
    if of_events(options) or options.rho:
        raise ValueError("mode twin_at trains without spikes; omit --rho, --flips and --moves")
    model_options = options.model_options | {"levels": options.levels}
    return replace(options, neuron=TWIN, mode="pgd_at", T=1, model_options=model_options)


def is_twin(choice: Options, options: Options) -> bool:
    """Whether this training of a run is that of a twin."""
    return options.mode == "twin_at" and choice.neuron == TWIN


def spiking_spec(options: Options, splits: ImageSplits) -> NetworkSpec:
    """The network that runs a twin's weights."""
    model_options = options.model_options | {"v_reset": None, "v_init": 0.5}
    spiking = replace(options, tau=math.inf, learn_gain=False, model_options=model_options)
    return network_spec(spiking, splits)


def run_by_spikes(
    twin: SpikingClassifier, options: Options, splits: ImageSplits
) -> SpikingClassifier:
    """The network of spikes with the weights of a twin."""
    like = next(twin.parameters())
    image, _ = splits.train[0]  # for the shapes alone: thresholds are the scales
    image = image.unsqueeze(0).to(like)
    converted = training.convert(twin, image, T=options.T, gain_fall=options.gain_fall)
    spiking = build_classifier(spiking_spec(options, splits))
    spiking.load_state_dict(converted.state_dict())
    return spiking.to(like.device).eval()


def save_spiking(
    classifier: SpikingClassifier,
    options: Options,
    splits: ImageSplits,
    folder: Path,
    description: Mapping[str, Any],
) -> None:
    """Save it where the networks of a run are; ``description`` is that of the twin's training."""
    place = folder_of(RUN_BY_SPIKES, folder)
    place.mkdir(exist_ok=True)
    network = asdict(spiking_spec(options, splits))
    content = {"model": classifier.state_dict(), "description": {**description, "network": network}}
    training.save_checkpoint(place / "best.pt", content)


def augmentation(options: Options) -> Augmentation | bool:
    """What is done to the training images, False for nothing."""
    if not is_augmented(options):
        return False
    chosen = options.augment_options
    for name in chosen:
        if name == "cutout":
            raise ValueError("augment_options must not contain cutout; use --cutout")
        check_choice("augment_options", name, ("padding", "flip", "rotation", "scale"))
    if chosen:
        chosen = {"padding": 0, "flip": False} | chosen
    try:
        return Augmentation(cutout=options.cutout, **chosen)
    except (TypeError, ValueError) as error:
        raise ValueError(f"wrong augmentation of training images: {error}") from error


def undefended(options: Options) -> Options:
    """The same training of a LIF network without a defence."""
    model_options = options.model_options
    if options.model in NETWORKS:
        model_options = options_for_lif(options.neuron, model_options)
    return replace(
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
        mpd_sgr=0.0,
        gate_rates=0.0,
        encoder="direct",
        encoder_options={},
        temporal_orthogonality=0.0,
        deflation=False,
        model_options=model_options,
    )


def mode_of(options: Options) -> Mode:
    """The mode of a training, with the options' values where they are given."""
    mode = training.MODES[options.trained_mode]
    retraction = given(options.beta, mode.retraction)
    if of_events(options) and mode.select == "pgd":
        mode = replace(mode, select="moves" if options.flips is None else "flips")
    return replace(
        mode,
        kappa=given(options.kappa, mode.kappa),
        rho=mode.rho if options.mode == "none" else given(options.rho, mode.rho),
        weight_decay=given(options.weight_decay, mode.weight_decay),
        select=given(options.select, mode.select),
        retraction=retraction if mode.retraction else 0.0,
    )


def completed(options: Options) -> Options:
    """The options with what the mode and the others decide where they are None."""
    mode = mode_of(options)
    return replace(
        options,
        kappa=mode.kappa,
        rho=mode.rho,
        weight_decay=mode.weight_decay,
        select=mode.select,
        beta=given(options.beta, mode.retraction),
        certified_eps=certified_eps(options),
        certified_flips=given(options.certified_flips, given(options.flips, options.moves)),
    )


def check_events(options: Options, splits: ImageSplits) -> None:
    """Only event data have events to change or to move, and a training does one of both."""
    if options.counts and not splits.frames:
        raise ValueError(
            f"counts says what event frames hold, got it for {options.dataset}; use event data, "
            "such as --dataset saccade:digits, or omit it"
        )
    if options.counts and not of_events(options):
        raise ValueError(
            "counts needs a number of events that may be changed or moved, got none; give --flips "
            "or --moves"
        )
    counted = {"flips": "changed", "moves": "moved"}
    for name, what in counted.items():
        number = getattr(options, name)
        if number is not None and not splits.frames:
            raise ValueError(
                f"{name} counts {what} events, got {number} for {options.dataset}; use event "
                "data, such as --dataset saccade:digits, or omit it"
            )
    if options.flips is not None and options.moves is not None:
        raise ValueError(
            f"flips and moves exclude each other, got {options.flips} and {options.moves}; omit one"
        )
    if options.certified_flips is not None and not of_events(options):
        raise ValueError(
            f"certified_flips goes with flips or moves, got {options.certified_flips} alone; give "
            "--flips or --moves"
        )


def is_single_step(options: Options) -> bool:
    """Whether catastrophic overfitting is looked for, which attacks by FGSM and PGD show."""
    return training.MODES[options.trained_mode].single_step and not of_events(options)


def evaluation_threat(options: Options) -> ThreatModel:
    """What validation and test attack and prove."""
    if options.flips is not None:
        return ThreatModel("L0", options.flips, counts=options.counts)
    if options.moves is not None:
        return ThreatModel("moves", options.moves, options.largest_shift, counts=options.counts)
    return ThreatModel("Linf", evaluation_eps(options))


def validation_attacks(options: Options) -> dict[str, Attack]:
    """Attacks after every epoch."""
    if of_events(options):
        return event_attacks(evaluation_threat(options), final=False)
    return training.validation_attacks(evaluation_eps(options))


def attacks_of_report(options: Options) -> dict[str, Attack]:
    """Attacks of the table at the end."""
    if of_events(options):
        return event_attacks(evaluation_threat(options), final=True)
    return final_attacks(evaluation_eps(options))


def certified_threat(options: Options) -> ThreatModel:
    """What the bounds in training are about."""
    if not of_events(options):
        return ThreatModel("Linf", certified_eps(options))
    threat = evaluation_threat(options)
    return replace(threat, eps=given(options.certified_flips, threat.eps))


def certified_eps(options: Options) -> Radius:
    """Radius of the bounds that a certified training is under."""
    return given(options.certified_eps, options.eps)


def evaluation_eps(options: Options) -> Radius:
    """Radius of the attacks in validation and test."""
    return given(options.eval_eps, options.eps)


def verified_method(options: Options) -> TrainedMethod:
    """Method of the proofs in validation and test: that of the bounds that are trained."""
    return options.bounds if options.mode == "certified" else "joint"


def given(value: ValueT | None, otherwise: ValueT) -> ValueT:
    """A value, or what None stands for."""
    return otherwise if value is None else value


def stem(options: Options) -> str:
    """Name of a run's folder, up to its number."""
    dataset = options.dataset.replace(":", "-").replace("/", "-")
    return f"{dataset}-{options.neuron}-{options.mode}"


if __name__ == "__main__":
    run_recipe(main)
