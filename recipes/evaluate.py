"""Measure the robustness of a spiking network: attacks, control, proofs and diagnosis.

Examples:
    python recipes/evaluate.py runs/digits-dlif-at-1/dlif_at  # suite standard, eps as in training
    python recipes/evaluate.py CHECKPOINT --suite fast --test-limit 200 --eps 8/255
    python recipes/evaluate.py --network mynet.py:build --T 8 --eps 8/255  # your own network
    python recipes/evaluate.py CHECKPOINT --output runs/mine --resume  # resume after a stop
    python recipes/evaluate.py --compare A/report.json B/report.json
    python recipes/evaluate.py CHECKPOINT --smooth 0.25  # randomised smoothing, L2
    python recipes/evaluate.py CHECKPOINT_OF_EVENT_NETWORK --eps 20  # up to 20 changed events
    python recipes/evaluate.py CHECKPOINT --suite stress  # hardware faults, clean and attacked
    python recipes/evaluate.py --leaderboard runs --output runs/leaderboard  # table of all reports
    python recipes/evaluate.py CHECKPOINT --leaderboard add report.json  # checked, then added
    torchrun --nproc-per-node 2 recipes/evaluate.py CHECKPOINT  # or accelerate launch
"""

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

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
    Radii,
    Radius,
    WrongUse,
    changed,
    check_options,
    checked,
    describe_folder,
    parse_options,
    plain,
    run_recipe,
    unused,
)
from tyro.conf import Positional

from sj_robust.core.extras import check_extra

USED_TO_COMPARE = {"compare"}
USED_BY_LEADERBOARD = {"leaderboard", "output"}
USED_TO_ADD = USED_BY_LEADERBOARD | {
    "checkpoint",
    "network",
    "trust_code",
    "data_root",
    "T",
    "mean",
    "std",
}


def is_stress_test(options: "Options") -> bool:
    """Whether faults or corruptions are measured, which has one attack and no proofs."""
    return options.suite in ("stress", "corruptions")


def is_without_suite(options: "Options") -> bool:
    """Whether no suite of attacks is run."""
    return options.smooth is not None or is_stress_test(options)


def is_not_smoothed(options: "Options") -> bool:
    """Whether the network itself is evaluated."""
    return options.smooth is None


def is_never_proved(options: "Options") -> bool:
    """Whether there are no proofs."""
    return is_without_suite(options) or options.norm == "L2"


def is_uncertified(options: "Options") -> bool:
    """Whether there are no proofs in Linf."""
    return is_never_proved(options) or not options.proofs or options.norm in ("L0", "moves")


@dataclass(frozen=True)
class Options:
    """Options of evaluate."""

    # what is evaluated
    checkpoint: Annotated[str | None, Often(), Decides("nothing"), Positional] = None
    """Checkpoint of adv_train, folder of a network or run, or a shipped network such as
    digits/dlif-at-mppd; omit it for your own network."""
    network: Annotated[str | None, Often(), NamesCode()] = None
    """Your own network: module:function or file.py:function that returns a SpikingJelly network
    with its weights loaded, bare or in a SpikingClassifier."""
    name: Annotated[str | None, Decides("nothing")] = None
    """Name of the network in the report; None: that of the checkpoint or function."""
    surrogate_model: Annotated[str | None, Idle(is_stress_test)] = None
    """Checkpoint of another network for the same images, on which some attacks are crafted; None:
    the network of its own rates, if it was converted."""
    trust_code: Annotated[bool, NamesCode()] = False
    """Run the function of your own code that a checkpoint names."""
    compare: Annotated[list[str] | None, Often()] = None
    """Compare two saved reports instead of evaluating a network."""
    leaderboard: Annotated[list[str] | None, Decides("nothing")] = None
    """Make one table of all reports in these folders instead of evaluating a network; or, with the
    words add REPORT, check a report and add it to the table in the folder given by --output."""

    # attacks
    suite: Annotated[
        Literal[
            "paper",
            "fast",
            "standard",
            "gradient",
            "long",
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
    """What to run (None: standard, or events for event data):
    - fast: quick check.
    - standard: full evaluation; use this in papers.
    - gradient: gradient attacks and Square, without the search over spikes.
    - long: SA-PGD for 1,000 steps, with ASSG and with alternating surrogates.
    - paper: protocol of Ding et al.
    - autoattack: standard AutoAttack.
    - gradients: comparison of gradient estimators.
    - events: full evaluation on event frames.
    - stress: hardware faults, clean and attacked.
    - corruptions: common corruptions at five severities, clean and attacked."""
    eps: Annotated[Radii | None, Often()] = None
    """Radius for images in [0, 1], such as 0.1 or 8/255; None: that of the checkpoint. Several, as
    in 2/255,4/255,8/255: accuracy over eps has them, and the suite runs at the largest. For norm
    L0, the number of changed elements per sample; for norm moves, the number of moved events."""
    norm: Annotated[Literal["Linf", "L2", "L0", "moves"] | None, Often()] = None
    """Norm of the perturbation; None: Linf; for event data, L0, or moves if the network was
    trained for moves. moves: events moved in time."""
    largest_shift: PositiveInt | None = None
    """For norm moves: largest number of frames by which an event may move; None: as in training, or
    no limit."""
    total_shift: PositiveInt | None = None
    """For norm moves: largest number of frames by which the events of a sample may move in total;
    None: no limit."""
    counts: bool | None = None
    """For event data: frames hold numbers of events, of which a change adds or removes one; None:
    as in training."""
    fault_draws: Annotated[PositiveInt, Idle(lambda options: options.suite != "stress")] = 5
    """For suite stress: number of draws of each random fault."""
    draws: Annotated[PositiveInt | None, Idle(is_without_suite)] = None
    """For stochastic networks: an image counts as broken if more than half of this number of draws
    misclassify it, and gradients are averaged over a third as many; None: 10 if the network is
    stochastic."""
    proofs: Annotated[bool, Idle(is_never_proved)] = True
    """For the norms Linf, L0 and moves: prove robustness by bounds of every spike, and attack only
    the images that are not proved robust."""
    certificate: Annotated[bool, Idle(is_uncertified)] = False
    """For the norm Linf: also write certificate.npz of what is proved, for check_certificate.py."""
    rounds: PositiveInt = 1
    """How many times the attacks of the suites fast, standard, gradient, long or events are run,
    each time with other random numbers and at the same cost."""
    control: Annotated[bool, Idle(is_without_suite)] = True
    """Run the control: as many attacks with the training gradient only."""

    # randomised smoothing
    smooth: Radius | None = None
    """Evaluate the smoothed classifier with this noise standard deviation instead of the network:
    certified accuracy and accuracy under attack up to an L2 radius of twice this value."""
    smooth_draws: Annotated[PositiveInt, Idle(is_not_smoothed)] = 1000
    """Noisy copies per image."""
    smooth_alpha: Annotated[OpenUnitInterval, Idle(is_not_smoothed)] = 0.001
    """Error probability of a certificate."""

    # data
    dataset: Annotated[DatasetName | None, Often()] = None
    """Data set: digits, fashion_mnist, mnist, cifar10, cifar100, svhn, image_folder:PATH,
    cifar10_dvs, dvs128_gesture, n_mnist or saccade:digits (mnist, fashion_mnist); None: that of
    the checkpoint, or digits."""
    data_root: Annotated[str | None, Often(), Decides("nothing")] = None
    """Folder of the data set and of downloads; None: that of the checkpoint's run, or data."""
    download: Annotated[bool, Often(), Decides("nothing")] = False
    """Download missing files."""
    on_unreadable: Literal["error", "skip"] = "error"
    """What to do with unreadable files."""
    test_limit: Annotated[PositiveInt | None, Often()] = None
    """Largest number of test images; None: all."""
    batch_size: Annotated[PositiveInt, Decides("nothing")] = 256
    """Images per batch; it changes results only for stochastic networks and the estimator pdsg."""

    # network of your own
    T: Annotated[PositiveInt | None, Often()] = None
    """Time steps of your own bare network; for a checkpoint, None: as in training."""
    mean: Annotated[list[float] | None, Often()] = None
    """Mean per channel to subtract from the images of a bare network."""
    std: Annotated[list[float] | None, Often()] = None
    """Standard deviation per channel to divide the images of a bare network by."""

    # machine
    seed: NonNegativeInt = 0
    """Random seed."""
    device: Annotated[Literal["auto", "cpu"], Decides("nothing")] = "auto"
    """auto: a GPU if available."""

    # output
    output: Annotated[OutputFolder | None, Often(), Decides("nothing")] = None
    """Output folder; None: a new folder runs/evaluate-NETWORK-SUITE-NUMBER."""
    resume: Annotated[bool, Often(), Decides("nothing")] = False
    """Resume the evaluation in the folder given by --output; without --output, the newest one."""


if __name__ == "__main__":
    check_options(Options)  # --help and wrong options end here: what follows imports torch

import torch
import yaml
from lab.evaluating import bracket_of_the_vote, read_once, two_reports
from lab.leaderboard.submission import check_report, checklist, take
from lab.leaderboard.tables import elsewhere, make_leaderboard
from rich.console import Console

from sj_robust.attacks import ThreatModel
from sj_robust.classifier import SpikingClassifier
from sj_robust.core.console import working
from sj_robust.core.datasets import EVENT_DATASETS
from sj_robust.core.eps import parse_eps, parse_radii
from sj_robust.core.folders import read_text
from sj_robust.data import load_images
from sj_robust.evaluation import Report, compare_reports
from sj_robust.evaluation.assess import assess, stress_network
from sj_robust.evaluation.report.pictures import gallery_of
from sj_robust.evaluation.report.terminal import Display, show_comparison, show_report
from sj_robust.evaluation.request import Request
from sj_robust.evaluation.run.data import Data
from sj_robust.evaluation.run.progress import Watch
from sj_robust.evaluation.run.suites import check_radius, check_rounds, check_suite
from sj_robust.evaluation.subject import Subject, check_fits, from_checkpoint, from_function
from sj_robust.proofs import verify
from sj_robust.proofs.soundness import UnprovableError

if TYPE_CHECKING:
    from sj_robust.training import Journal


def main(arguments: list[str]) -> None:
    """Evaluate a network, compare two reports, or make a table of all reports."""
    options = parse_options(Options, arguments, stem, mark="progress")
    if options.compare is not None:
        say_ignored(options, USED_TO_COMPARE)
        show_comparison(compare_reports(*two_reports(options.compare)), Console())
    elif options.leaderboard is not None:
        update_leaderboard(options, options.leaderboard)
    else:
        evaluate_network(options, arguments)


def update_leaderboard(options: Options, words: list[str]) -> None:
    """Make the tables of all reports, to which ``words`` may first add one."""
    board = Path(options.output or "runs/leaderboard")
    adds = words[:1] == ["add"]
    say_ignored(options, USED_TO_ADD if adds else USED_BY_LEADERBOARD)
    if adds:
        add_to_leaderboard(options, board)
        words = [board.as_posix(), *elsewhere(board)]
    make_leaderboard(words, board, asdict(Options()))


@dataclass(frozen=True)
class Settled:
    """The options, completed by what the network was trained on.

    Attributes:
        options: The options, with suite and norm.
        suite: Name of the suite.
        dataset: Name of the data set.
        threat: What the adversary may change.
        radii: Radii of accuracy over eps; none where one is asked for.
        counts: Whether frames of events hold numbers of events.
        T: Frames per sample of event data; None for images.
    """

    options: Options
    suite: str
    dataset: str
    threat: ThreatModel
    radii: tuple[float, ...]
    counts: bool
    T: int | None

    @classmethod
    def of(cls, options: Options, subject: Subject) -> "Settled":
        """Settle the options for a network.

        Raises:
            ValueError: If they contradict it or each other.
        """
        dataset = options.dataset or subject.options.get("dataset", "digits")
        events = dataset in EVENT_DATASETS
        suite = options.suite or ("events" if events else "standard")
        norm = options.norm or norm_of(options, subject, events=events)
        complete = replace(options, suite=suite, norm=norm)
        shift = options.largest_shift
        if shift is None and norm == "moves":
            shift = subject.options.get("largest_shift")  # that of the training
        counts = counts_of(options, subject, events=events)
        *smaller, largest = radii_of(options, norm, subject)
        threat = ThreatModel(
            norm,
            largest,
            largest_shift=shift,
            total_shift=options.total_shift,
            counts=counts if norm in ("L0", "moves") else bool(options.counts),
        )
        for eps in (*smaller, largest):
            check_radius(replace(threat, eps=eps))
        if smaller and is_without_suite(complete):
            raise ValueError(f"eps must be one radius for this suite, got {options.eps}; give one")
        if not is_without_suite(complete):
            check_suite(suite, threat)  # type: ignore[arg-type]  # those of a stress test are out
        check_rounds(suite, options.rounds)
        T = getattr(subject.model, "T", None) if events else None
        radii = (*smaller, largest) if smaller else ()
        return cls(complete, suite, dataset, threat, radii, counts, T)


def evaluate_network(options: Options, arguments: list[str]) -> None:
    """Measure a network on the test images, and save and show the report."""
    from lab.processes import first_process_first, make_accelerator
    from lab.run_folder import open_run_folder, removed_if_unused

    from sj_robust.training import Journal  # these import what a leaderboard does not wait for

    accelerator = make_accelerator(options.device)
    with checked():
        subject = load_subject(options)
        subject = replace(subject, name=options.name or subject.name)
        settled = Settled.of(options, subject)
        other = options.surrogate_model and Path(options.surrogate_model)
        source = from_checkpoint(other, settled.T, trust_code=options.trust_code) if other else None
    complete, dataset = settled.options, settled.dataset
    if options.proofs and not is_never_proved(complete):
        compute_in_float32()
    with first_process_first(accelerator, f"loading {dataset}"):  # which downloads and prepares
        splits = load_images(
            dataset,
            root=data_root(options),
            test_limit=options.test_limit,
            download=options.download,
            on_unreadable=options.on_unreadable,
            T=settled.T,
            counts=settled.counts,
        )
    data = read_once(splits.test, options.batch_size)
    first = data[0][0].to(accelerator.device)
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
    journal = Journal(folder if accelerator.is_main_process else None)
    journal.begin(configuration, asdict(Options()), accelerator)
    if names := unused(options, complete):
        journal.say(f"ignored with the other options given: {', '.join(names)}")
    with (
        removed_if_unused(folder, resume=options.resume),
        Display(journal.console, journal.say) as display,
    ):
        for remark in subject.remarks:
            display.say(f"NOTE: {remark}")
        if isinstance(subject.model, SpikingClassifier):
            display.say(f"{subject.name} {subject.model.convention}")
        request = Request(
            settled.suite,
            settled.threat,
            dataset,
            splits.classes,
            seed=options.seed,
            draws=options.fault_draws if is_stress_test(complete) else options.draws,
            surrogate_model=None if source is None else source.model,
            proofs=options.proofs,
            control=options.control,
            rounds=options.rounds,
            radii=settled.radii,
            folder=folder / "progress",
            configuration=configuration,
            watch=Watch(display.say, display.on_step),
        )
        report = make_report(subject, data, request, complete)
    if accelerator.is_main_process:
        save_report(report, subject, data, folder, journal, splits.class_names)
        if options.certificate and not is_uncertified(complete):
            save_certificate(subject, data, settled.threat, folder, journal)
    accelerator.end_training()


def make_report(subject: Subject, data: Data, request: Request, options: Options) -> Report:
    """The report of the kind of evaluation that the options ask for."""
    if options.smooth is not None:
        return bracket_of_the_vote(
            subject, data, request, n=options.smooth_draws, alpha=options.smooth_alpha
        )
    measure = stress_network if is_stress_test(options) else assess
    return measure(subject, data, request)


def compute_in_float32() -> None:
    """Switch off faster arithmetic: proofs are of float32, which attacks then have to run in."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.nnpack.set_flags(False)  # type: ignore[no-untyped-call]  # untyped in torch


def say_ignored(options: Options, used: set[str]) -> None:
    """Print the options that are given and not among those used."""
    if names := [name for name in changed(options) if name not in used]:
        print(f"ignored with the other options given: {', '.join(names)}")


def add_to_leaderboard(options: Options, board: Path) -> None:
    """Check a report, print the checklist, and copy it into the folder of a leaderboard."""
    words = options.leaderboard or []
    if len(words) != 2:
        raise WrongUse(f"--leaderboard add takes one report, got {len(words) - 1}")
    path = Path(words[1])
    network = network_of(options)
    with working(f"checking {path}; if its network is here, some images are evaluated again"):
        found = check_report(path, network, options.data_root or "data")
    print(checklist(found))
    with checked():
        print(f"added as {take(path, found, board)}")


def network_of(options: Options) -> Subject | None:
    """The network that a report to be added is of, where the command line gives it."""
    if options.checkpoint is None and options.network is None:
        return None
    with checked():
        return load_subject(options)


def save_report(
    report: Report,
    subject: Subject,
    data: Data,
    folder: Path,
    journal: "Journal",
    class_names: tuple[str, ...],
) -> None:
    """Write and show what the evaluation came to."""
    with working("drawing", journal.console):
        shown = gallery_of(report, subject.model, data, class_names) if report.is_suite else None
        names = report.write(folder, shown)
    if report.is_suite:
        show_report(report, journal.console, journal.say)
    else:
        journal.say(f"{report.table()}\n{report.verdict}")
    journal.say(f"{', '.join(names)} are in {folder}")


def save_certificate(
    subject: Subject, data: Data, threat: ThreatModel, folder: Path, journal: "Journal"
) -> None:
    """Write what is proved, or say why that cannot be written."""
    x, y = data.tensors(torch.device("cpu"))
    try:
        with working("writing a certificate", journal.console):
            network = verify(subject.model, x, y, threat).save_certificate(
                folder / "certificate.npz"
            )
    except (NotImplementedError, UnprovableError) as error:
        journal.say(f"no certificate: {error}")
    else:
        journal.say(f"certificate.npz is of the network with the SHA-256 {network}")


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
        raise ValueError("a checkpoint contains its mean and std: omit --mean and --std")
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


def norm_of(
    options: Options, subject: Subject, *, events: bool
) -> Literal["Linf", "L2", "L0", "moves"]:
    """Norm of the threat, if none is asked for."""
    if options.smooth is not None:
        return "L2"
    if not events:
        return "Linf"
    return "moves" if subject.options.get("moves") else "L0"


def counts_of(options: Options, subject: Subject, *, events: bool) -> bool:
    """Whether frames hold numbers of events: as in the training, which nobody may contradict."""
    of_training = subject.options.get("dataset") in EVENT_DATASETS
    trained = bool(subject.options.get("counts"))
    if options.counts is None:
        return events and trained
    if of_training and options.counts != trained:
        held = "numbers of events" if trained else "0 or 1"
        raise ValueError(
            f"counts must be {trained} for {subject.name}, which was trained on frames of {held}, "
            f"got --counts {options.counts}; omit it"
        )
    return options.counts


def radii_of(options: Options, norm: str, subject: Subject) -> list[float]:
    """Radii, that of the threat last: those asked for, or that of the checkpoint's evaluation."""
    if options.smooth is not None:
        beside = (options.eps, options.norm, options.suite, options.surrogate_model, options.resume)
        if parse_eps(options.smooth) <= 0 or any(beside) or options.rounds > 1:
            raise ValueError(
                "--smooth needs SIGMA > 0 and attacks the vote on images in L2, in one run: omit "
                "--eps, --norm, --suite, --surrogate-model, --resume and --rounds"
            )
        return [2 * parse_eps(options.smooth)]
    trained = subject.options
    of_events = {"L0": "flips", "moves": "moves"}.get(norm, "")
    if options.eps is None and trained.get(of_events):
        return [float(trained[of_events])]
    eps = options.eps or trained.get("eval_eps") or trained.get("eps")
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
    return parse_radii(eps)


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
