"""Train a robust spiking network, and measure it beside an undefended one.

python recipes/adv_train.py                                              # digits, under a minute
python recipes/adv_train.py --dataset image_folder:PATH --model vgg5 --T 8
python recipes/adv_train.py --output runs/mine --resume                  # continue a stopped run
torchrun --nproc-per-node 2 recipes/adv_train.py                         # or accelerate launch
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.utils import set_seed

from sj_robust import SpikingClassifier, training
from sj_robust.command_line import named_arguments, parse_options, run_recipe, same_names
from sj_robust.data import ImageSplits, image_loader, load_images
from sj_robust.evaluation import Report, ThreatModel, environment, evaluate
from sj_robust.evaluation.eps import parse_eps
from sj_robust.models import NetworkSpec, build_classifier, start_from
from sj_robust.plotting import plot_report
from sj_robust.sweeping.grid import idle

# Options that a resumed run may change, since the weights do not depend on them.
FREE = {"data_root", "download", "test_limit", "reference", "device", "workers", "checkpoint_steps", "compile",
        "channels_last", "log_bounds", "output", "resume"}  # fmt: skip
UNDEFENDED: dict[str, Any] = {
    "neuron": "lif", "mode": "none", "select": "clean", "attack_steps": None, "project": True, "pretrained": None,
    "gradient_sparsity": 0.0, "threshold_guard": 0.0, "gain_penalty": 0.0}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Options of adv_train. A radius is a number or a fraction such as 8/255.

    Attributes:
        dataset: digits, (fashion_)mnist, cifar10, cifar100, svhn, image_folder:PATH, or event data by name.
        data_root: Folder with the data set's files, or where they are downloaded to.
        download: Whether to download what is missing.
        augment: Random crop, flip and Cutout; null for the paper's choice (CIFAR only).
        on_unreadable: error stops at pictures that cannot be read, skip leaves them out with a warning.
        train_limit: Training images to use at most, the validation split included; null for all.
        test_limit: Test images to use at most; null for all.
        validation_fraction: Share of the training images held out to select the epoch by.
        model: small, vgg5 (11, 13, 16, 19), wrn16_4, wrn28_10, zoo:FUNCTION of SpikingJelly, module:function of yours.
        model_options: Further keyword arguments of the network.
        neuron: Spiking neuron of the trained network, dlif, lif, plif or if.
        T: Time steps.
        tau: Membrane time constant in steps; the decay is 1 - 1 / tau.
        channels: Output channels of the convolutions of small.
        hidden: Widths of the hidden linear layers of a VGG.
        pretrained: Checkpoint whose weights the network starts from.
        mode: none, gaussian, at (single step), rat (at and retraction of the weights), pgd_at, trades.
        eps: Linf radius of the training attack in [0, 1] images; for gaussian the standard deviation.
        step_size: Step of the training attack; null means eps for one step, eps / 4 for several.
        attack_steps: Steps of the training attack of pgd_at and trades; null means 7 and 10.
        noise_std: Noise at the start of the training attack of at, rat and trades.
        project: Whether the training attack is projected back onto the ball (the published code does not).
        eval_eps: Radius of the attacks in validation and test; null means eps.
        kappa: Weight of the clean cross entropy, the perturbed one has 1 - kappa; null means 0.5, and 0 for pgd_at.
        rho: Weight of MS-MPPD, or of the indicator in its place; null means 1, and 0 for pgd_at and trades.
        layers: Spiking layers of MS-MPPD, last, all, or a list of names such as [stages.1, stages.5].
        norm: l2 for the mean square of the perturbation, l1 for its mean absolute value.
        indicator: Perturbation that is kept small, mppd, or tasad or std in its place.
        input_gain: Whether DLIF's learnable gain is part of the perturbation in the loss (the paper leaves it out).
        beta: Strength of rat's retraction; null means 1e-3.
        trades_weight: Weight of the divergence of trades.
        gradient_sparsity: Weight of the penalty on the input gradient; 0 leaves it out.
        threshold_guard: Weight of the penalty on potentials nearer to the threshold than guard_margin; 0 leaves it out.
        guard_margin: That distance.
        gain_penalty: Weight of the penalty on the gain of every DLIF layer over time; 0 leaves it out.
        epochs: Passes over the training images.
        batch_size: Images per step, over all processes together.
        accumulate: Parts that each process computes its share of a step in.
        lr: Learning rate of SGD, which falls to 0 (cosine).
        momentum: Momentum of SGD.
        weight_decay: Weight decay on all parameters; null means 5e-4, and 0 for rat.
        select: Validation accuracy that the epoch is chosen by; null means pgd, and clean for mode none.
        reference: Whether an undefended LIF network is trained and measured beside it.
        seed: Seed of everything.
        device: auto takes a GPU if there is one.
        mixed_precision: Accelerate's precision; fp16 needs a GPU.
        compile: Whether the network is compiled with torch.compile.
        channels_last: Memory order of the images; null where it pays.
        sync_batch_norm: Whether batch norm sees the images of all processes.
        log_bounds: Whether TensorBoard shows the exact L2 bound of every layer (a VGG-11 takes 9 s an epoch for it).
        workers: Processes that load images in the background.
        checkpoint_steps: Steps between checkpoints within an epoch; null for one per epoch.
        output: Folder of the run; null makes a new one under runs/.
        resume: Go on with the run in output (null: the newest of this kind) from its last checkpoint.
    """

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
    log_bounds: bool = False
    workers: int = 0
    checkpoint_steps: int | None = None
    output: str | None = None
    resume: bool = False


def main(arguments: list[str]) -> None:
    """Train, evaluate, report."""
    options = parse_options(Options, named_arguments(arguments), stem)
    accelerator = training.make_accelerator(options.device, options.mixed_precision)
    with accelerator.main_process_first():  # what one downloads or prepares is there for the others
        splits = load_images(options.dataset, root=options.data_root, **same_names(load_images, options))
    configuration = asdict(replace(options, output=None, resume=False))
    folder = training.open_run_folder(options.output, stem(options), configuration, accelerator, resume=options.resume)
    journal = training.Journal(folder if accelerator.is_main_process else None)
    journal.header(
        "environment", where := environment(accelerator.device) | {"processes": str(accelerator.num_processes)}
    )
    journal.header("configuration", configuration)
    if unused := sorted(name for name in idle(configuration) if configuration[name] != asdict(Options())[name]):
        journal.say(f"without effect beside the other options: {', '.join(unused)}")
    networks = {f"{options.neuron} {options.mode}": options}
    if options.reference:
        networks["lif undefended"] = replace(options, **UNDEFENDED)
    eps = parse_eps(options.eps if options.eval_eps is None else options.eval_eps)
    report = Report(ThreatModel("Linf", eps), (), configuration=configuration, environment=where)
    for name, choice in networks.items():
        classifier, history = train_network(name, completed(choice), splits, accelerator, folder, journal)
        if accelerator.is_main_process:
            journal.say(f"evaluating {name} on {len(splits.test)} test images")
            loader = image_loader(splits.test, 32 if splits.frames else 512)
            result = evaluate(
                classifier, loader, training.final_attacks(eps), threat=report.threat, network=name, seed=options.seed
            )
            heads = [history[: end + 1] for end in range(len(history)) if training.MODES[choice.mode].single_step]
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
    mode = training.MODES[options.mode]
    eps = parse_eps(options.eps if options.eval_eps is None else options.eval_eps)
    spec = network_spec(options, splits)
    set_seed(options.seed)
    classifier = build_classifier(spec)
    if options.pretrained is not None:
        start_from(classifier, Path(options.pretrained))
    chosen = {"single_step_attack": mode.single_step, "retraction": options.beta if mode.retraction else 0.0}
    plan = training.TrainingPlan(**same_names(training.TrainingPlan, options) | chosen)
    decisive = {name: value for name, value in asdict(options).items() if name not in FREE}
    (network_folder := folder / name.replace(" ", "_")).mkdir(exist_ok=True)
    history = training.train(
        make_objective(options, classifier),
        splits,
        plan,
        perturb=training.training_attack(**same_names(training.training_attack, options), steps=options.attack_steps),
        validation_attacks=training.validation_attacks(eps),
        accelerator=accelerator,
        folder=network_folder,
        journal=journal,
        description={"network": asdict(spec), "options": decisive},
        resume=options.resume,
    )
    classifier.load_state_dict(training.load_checkpoint(network_folder / "best.pt")["model"])
    return classifier, history


def network_spec(options: Options, splits: ImageSplits) -> NetworkSpec:
    """What the network is built from; the checkpoint keeps it."""
    given = same_names(NetworkSpec, options) | same_names(NetworkSpec, splits)
    return NetworkSpec(**given | {"name": options.model, "options": options.model_options})


def make_objective(options: Options, classifier: SpikingClassifier) -> training.Objective:
    """The loss of the training mode."""
    chosen: dict[str, Any] = {"loss": training.MODES[options.mode].loss}
    chosen["penalties"] = training.make_penalties(**same_names(training.make_penalties, options))
    return training.Objective(classifier, **same_names(training.Objective, options) | chosen)


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
