"""Measure how robust a spiking network is, with everything a sceptical reader asks for.

Examples:
    python recipes/evaluate.py runs/digits-dlif-at-1/dlif_at  # suite standard, eps of its training
    python recipes/evaluate.py CHECKPOINT --suite fast --test-limit 200 --eps 8/255
    python recipes/evaluate.py --network mynet.py:build --T 8 --eps 8/255  # a network of your own
    python recipes/evaluate.py CHECKPOINT --output runs/mine --resume  # continue after a stop
    python recipes/evaluate.py --compare A/report.json B/report.json
    python recipes/evaluate.py CHECKPOINT --smooth 0.25  # a vote over Gaussian noise, in L2
    python recipes/evaluate.py CHECKPOINT_OF_EVENT_NETWORK --eps 20  # at most 20 events changed
    python recipes/evaluate.py CHECKPOINT --suite stress  # faults of deployment, clean and attacked
    python recipes/evaluate.py --leaderboard runs --output runs/leaderboard  # one table of all
    torchrun --nproc-per-node 2 recipes/evaluate.py CHECKPOINT  # or accelerate launch
"""

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from lab.command_line import (
    check_options,
    checked,
    describe_folder,
    parse_options,
    plain,
    run_recipe,
)
from lab.command_line.declared import (
    DatasetName,
    Decides,
    NamesCode,
    Needs,
    NonNegativeInt,
    Often,
    OpenUnitInterval,
    OutputFolder,
    PositiveInt,
    Radius,
)
from tyro.conf import Positional

from sj_robust.core.extras import check_extra


@dataclass(frozen=True)
class Options:
    """Options of evaluate."""

    # what is evaluated
    checkpoint: Annotated[str | None, Often(), Decides("nothing"), Positional] = None
    """A checkpoint of adv_train, a network's or a run's folder, or a network that ships, as
    digits/dlif-at-mppd; None for a network of your own."""
    network: Annotated[str | None, Often(), NamesCode()] = None
    """Instead of a checkpoint, module:function or file.py:function that returns a SpikingJelly
    network with its weights, bare or in a SpikingClassifier; None for a checkpoint."""
    name: Annotated[str | None, Decides("nothing")] = None
    """What the report calls the network; None takes the name of checkpoint or function."""
    transfer: str | None = None
    """Checkpoint of another network for the same images; attacks crafted on it join the suite;
    None: none."""
    trust_code: Annotated[bool, NamesCode()] = False
    """Allow a function of your own code that a checkpoint names to be run."""
    compare: Annotated[list[str] | None, Often()] = None
    """Two saved reports to compare, instead of an evaluation; None to evaluate."""
    leaderboard: Annotated[list[str] | None, Decides("nothing")] = None
    """Folders with saved reports, which become one table, instead of an evaluation; None to
    evaluate."""

    # attacks
    suite: Annotated[
        Literal[
            "paper",
            "fast",
            "standard",
            "gradient",
            "autoattack",
            "gradients",
            "events",
            "stress",
            "corruptions",
        ]
        | None,
        Often(),
        Needs(check_extra),
    ] = None
    """paper is the protocol of Ding et al., fast a first impression, standard the figure to report,
    gradient many gradient attacks without its search over spikes, autoattack AutoAttack standard,
    gradients every estimator for itself, events the one for event data; all with their control.
    stress is faults of deployment, corruptions the common corruptions at five severities, both
    clean and under a short attack. None means standard, and events for event data."""
    eps: Annotated[Radius | None, Often()] = None
    """Radius for images in [0, 1], a number or a fraction such as 8/255; None takes that of the
    checkpoint. For L0 the number of changed elements per sample, for moves that of moved events."""
    norm: Annotated[Literal["Linf", "L2", "L0", "moves"] | None, Often()] = None
    """Norm of the adversary; None means Linf, and L0 for event data; moves is events moved in
    time."""
    largest_shift: PositiveInt | None = None
    """For moves, frames by which an event may be moved; None: any."""
    total_shift: PositiveInt | None = None
    """For moves, frames by which all events of a sample may be moved together; None: any."""
    fault_draws: PositiveInt = 5
    """For stress, draws of every fault that is random."""
    draws: PositiveInt = 1
    """Fresh forwards in each of which a stochastic network must be wrong for an image to count as
    broken."""
    proofs: bool = True
    """For Linf and L0, prove by bounds of every spike which images no attack can break, and attack
    the others; networks with parts that have no bounds are named in the report."""
    control: bool = True
    """Run the suite's control, which shows what its estimators are worth."""

    # randomised smoothing
    smooth: Radius | None = None
    """Evaluate a smoothed classifier instead of the network (None): the vote over Gaussian noise of
    this standard deviation; what it certifies up to an L2 radius of 2 SIGMA, beside what an attack
    on it leaves."""
    smooth_draws: PositiveInt = 1000
    """Noisy copies of an image in a vote."""
    smooth_alpha: OpenUnitInterval = 0.001
    """Probability of error of a vote."""

    # data
    dataset: Annotated[DatasetName | None, Often()] = None
    """What to test on, digits, fashion_mnist, mnist, cifar10, cifar100, svhn, image_folder:PATH,
    cifar10_dvs, dvs128_gesture, n_mnist or saccade:digits (mnist, fashion_mnist); None takes what
    the checkpoint was trained on, or digits."""
    data_root: Annotated[str | None, Often(), Decides("nothing")] = None
    """Folder with the data set's files, or where they are downloaded to; None takes that of the
    checkpoint's run, or data."""
    download: Annotated[bool, Often(), Decides("nothing")] = False
    """Download what is missing."""
    on_unreadable: Literal["error", "skip"] = "error"
    """Stop at files that cannot be read, or skip them."""
    test_limit: Annotated[PositiveInt | None, Often()] = None
    """Test images to use at most; None for all."""
    batch_size: Annotated[PositiveInt, Decides("nothing")] = 256
    """Images per batch; only random networks and the estimator pdsg depend on it."""

    # network of your own
    T: Annotated[PositiveInt | None, Often()] = None
    """Time steps of a bare network of your own; for a checkpoint, others than those it was trained
    with; None takes those."""
    mean: Annotated[list[float] | None, Often()] = None
    """Mean per channel that a bare network expects to be subtracted; None: none."""
    std: Annotated[list[float] | None, Often()] = None
    """Deviation per channel that it expects to be divided by; None: none."""

    # machine
    seed: NonNegativeInt = 0
    """Seed of everything."""
    device: Annotated[Literal["auto", "cpu"], Decides("nothing")] = "auto"
    """auto: a GPU if there is one."""

    # output
    output: Annotated[OutputFolder | None, Often(), Decides("nothing")] = None
    """Folder of the results; None makes runs/evaluate-NETWORK-SUITE-NUMBER."""
    resume: Annotated[bool, Often(), Decides("nothing")] = False
    """Go on with the evaluation in output (None: the newest one)."""


if __name__ == "__main__":
    check_options(Options)  # --help and wrong options end here: what follows imports torch

import torch
import yaml
from lab.evaluating import bracket_of_the_vote, read_once, two_reports
from lab.leaderboard import make_leaderboard
from lab.processes import first_process_first, make_accelerator
from lab.run_folder import open_run_folder, removed_if_unused
from rich.console import Console

from sj_robust import training
from sj_robust.attacks import ThreatModel
from sj_robust.classifier import SpikingClassifier
from sj_robust.core.console import working
from sj_robust.core.datasets import EVENT_DATASETS
from sj_robust.core.eps import parse_eps
from sj_robust.core.folders import read_text
from sj_robust.data import load_images
from sj_robust.evaluation import Report, compare_reports
from sj_robust.evaluation.assess import assess
from sj_robust.evaluation.report.pictures import gallery_of
from sj_robust.evaluation.report.terminal import Display, show_comparison, show_report
from sj_robust.evaluation.request import Request
from sj_robust.evaluation.run.progress import Watch
from sj_robust.evaluation.run.suites import check_suite
from sj_robust.evaluation.stressing import stress_network
from sj_robust.evaluation.subject import Subject, check_fits, from_checkpoint, from_function


def main(arguments: list[str]) -> None:
    """Evaluate a network, compare two reports, or put all into one table."""
    options = parse_options(Options, arguments, stem, mark="progress")
    if options.compare is not None:
        show_comparison(compare_reports(*two_reports(options.compare)), Console())
        return
    if options.leaderboard is not None:
        make_leaderboard(
            options.leaderboard, Path(options.output or "runs/leaderboard"), asdict(Options())
        )
        return
    accelerator = make_accelerator(options.device)
    if options.proofs:  # which are of float32, as the attacks then have to be
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.nnpack.set_flags(False)  # type: ignore[no-untyped-call]  # untyped in torch
    with checked():
        subject = load_subject(options)
        subject = replace(subject, name=options.name or subject.name)
    dataset = options.dataset or subject.options.get("dataset", "digits")
    events = dataset in EVENT_DATASETS
    suite = options.suite or ("events" if events else "standard")
    norm = options.norm or ("L2" if options.smooth else "L0" if events else "Linf")
    with checked():
        threat = ThreatModel(
            norm, radius(options, norm, subject), options.largest_shift, options.total_shift
        )
        if suite != "stress" and suite != "corruptions" and options.smooth is None:
            check_suite(suite, threat)
        T = getattr(subject.model, "T", None) if events else None
        other = options.transfer and Path(options.transfer)
        source = from_checkpoint(other, T, trust_code=options.trust_code) if other else None
    with first_process_first(accelerator, f"loading {dataset}"):  # which downloads and prepares
        splits = load_images(
            dataset,
            root=data_root(options),
            test_limit=options.test_limit,
            download=options.download,
            on_unreadable=options.on_unreadable,
            T=T,
        )
    batches = read_once(splits.test, options.batch_size)
    first = batches[0][0].to(accelerator.device)
    with checked():
        for network in (subject, *([source] if source else [])):
            network.model.to(accelerator.device)
            check_fits(network, first, splits.classes, dataset)
    configuration = plain(replace(options, output=None, resume=False))
    folder = open_run_folder(
        options.output, stem(options), configuration, accelerator, resume=options.resume
    )
    if accelerator.is_main_process:
        describe_folder(folder, "evaluate", arguments)
    journal = training.Journal(folder if accelerator.is_main_process else None)
    journal.begin(configuration, asdict(Options()), accelerator)
    with (
        removed_if_unused(folder, resume=options.resume),
        Display(journal.console, journal.say) as display,
    ):
        if isinstance(subject.model, SpikingClassifier):
            display.say(f"{subject.name} {subject.model.convention}")
        if options.smooth is not None:
            report = bracket_of_the_vote(
                subject,
                batches,
                threat.eps / 2,
                n=options.smooth_draws,
                alpha=options.smooth_alpha,
                seed=options.seed,
                say=display.say,
                dataset=dataset,
                configuration=configuration,
            )
        else:
            stressed = suite in ("stress", "corruptions")
            request = Request(
                suite,
                threat,
                dataset,
                splits.classes,
                seed=options.seed,
                draws=options.fault_draws if stressed else options.draws,
                source=None if source is None else source.model,
                proofs=options.proofs,
                control=options.control,
                folder=folder / "progress",
                configuration=configuration,
                watch=Watch(display.say, display.on_step),
            )
            measure = stress_network if stressed else assess
            report = measure(subject, batches, request)
    if accelerator.is_main_process:
        save_report(report, subject, batches, folder, journal)
    accelerator.end_training()


def save_report(
    report: Report, subject: Subject, batches: Any, folder: Path, journal: training.Journal
) -> None:
    """Write and show what the evaluation came to."""
    of_attacks = report.suite not in ("stress", "corruptions", "vote")
    with working("drawing", journal.console):
        shown = gallery_of(report, subject.model, batches) if of_attacks else None
        names = report.write(folder, shown)
    if of_attacks:
        show_report(report, journal.console, journal.say)
    else:
        journal.say(f"{report.table()}\n{report.verdict}")
    journal.say(f"{', '.join(names)} are in {folder}")


def load_subject(options: Options) -> Subject:
    """The network to evaluate."""
    if (options.checkpoint is None) == (options.network is None):
        raise ValueError(
            "give a checkpoint, or your own network with --network module:function, or --compare "
            "A B"
        )
    if options.network is not None:
        return from_function(options.network, T=options.T, mean=options.mean, std=options.std)
    if options.mean is not None or options.std is not None:
        raise ValueError("a checkpoint knows its own mean and std: leave --mean and --std out")
    return from_checkpoint(Path(str(options.checkpoint)), options.T, trust_code=options.trust_code)


def data_root(options: Options) -> str:
    """The folder asked for, or that of the run in which the checkpoint lies."""
    path = Path(options.checkpoint or "")
    for folder in (
        (path, *path.parents[:2])
        if options.data_root is None and options.checkpoint is not None
        else ()
    ):
        if (file := folder / "config.yaml").is_file():
            return str(yaml.safe_load(read_text(file)).get("data_root", "data"))
    return options.data_root or "data"


def radius(options: Options, norm: str, subject: Subject) -> float:
    """Radius of the threat: the one asked for, or the one of the checkpoint's own evaluation."""
    if options.smooth is not None:
        beside = (options.eps, options.norm, options.suite, options.transfer, options.resume)
        if parse_eps(options.smooth) <= 0 or any(beside):
            raise ValueError(
                "--smooth takes SIGMA > 0 and attacks its vote on images, in L2 and in one go: "
                "leave --eps, --norm, --suite, --transfer and --resume out"
            )
        return 2 * parse_eps(options.smooth)
    trained = subject.options
    if options.eps is None and norm == "L0" and trained.get("flips"):
        return float(trained["flips"])
    eps = options.eps if options.eps is not None else trained.get("eval_eps") or trained.get("eps")
    if options.eps is None and norm in ("L0", "moves"):
        raise ValueError(
            f"eps is the number of changed or moved events per sample for {norm}: give it, as in "
            "--eps 20"
        )
    if eps is None:
        raise ValueError("eps is not known for this network: give the radius, such as --eps 8/255")
    if options.eps is None and norm != "Linf":
        raise ValueError(
            f"the checkpoint's eps is one of Linf: give that of {norm}, such as --eps 0.5"
        )
    if parse_eps(eps) <= 0:
        raise ValueError(f"eps must be > 0 to attack at all, got {eps}")
    if norm == "Linf" and parse_eps(eps) > 1:
        raise ValueError(
            f"eps must be <= 1, since images lie in [0, 1], got {eps}; write 8/255 instead of 8"
        )
    return parse_eps(eps)


def stem(options: Options) -> str:
    """Name of the folder, up to its number."""
    path = Path(options.checkpoint or "")
    name = path.parent.name if path.suffix == ".pt" else path.name
    own = re.split(r"[:/]", options.network)[-1] if options.network else name
    return "-".join(
        filter(None, ("evaluate", own, options.suite or ("smooth" if options.smooth else "")))
    )


if __name__ == "__main__":
    run_recipe(main)
