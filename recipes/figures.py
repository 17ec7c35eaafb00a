"""Draw the figures of the paper for your own networks, as PDF and PNG.

Examples:
    python recipes/figures.py runs/digits-dlif-at-1           # every figure of a run of adv_train
    python recipes/figures.py runs/digits-dlif-at-1 --which gains curves  # some of them
    python recipes/figures.py --which neuron --output figures  # one neuron; needs no run
    python recipes/figures.py --redraw runs/digits-dlif-at-1/figures  # from the saved numbers alone

The numbers of every figure are saved as NAME.json, and the figure is drawn from that file.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from lab.command_line import (
    DatasetName,
    NonNegativeInt,
    OutputFolder,
    PositiveInt,
    Radius,
    WrongUse,
    check_options,
    checked,
    describe_folder,
    read_options,
    run_recipe,
)
from tyro.conf import Positional

_Figure = Literal["all", "neuron", "gains", "curves", "intensity"]


@dataclass(frozen=True)
class Options:
    """Options of figures."""

    # figures
    run: Annotated[str | None, Positional] = None
    """Folder of a run of adv_train, or of one of its networks; the figure neuron needs none."""
    which: tuple[_Figure, ...] = ("all",)
    """Figures to draw:
    - neuron: one LIF neuron (figure 1 of the paper).
    - gains: learned input gains (figure 4).
    - curves: training curves (figure 5).
    - intensity: heat maps of MS-MPPD over eps, and a table of all indicators.
    - all: every figure for which the folder has numbers."""

    # intensity
    eps: tuple[Radius, ...] = tuple(map(Radius, (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)))
    """Perturbation sizes in increasing order, for images in [0, 1], such as 0.1 or 8/255."""
    steps: PositiveInt = 10
    """Number of attack steps."""
    images: PositiveInt = 360
    """Largest number of test images."""
    resamples: PositiveInt = 200
    """Number of bootstrap samples for its confidence intervals."""
    dataset: DatasetName | None = None
    """Data set, as in adv_train.py; None: that of the checkpoint."""
    data_root: str = "data"
    """Folder of the data set."""

    # machine
    batch_size: PositiveInt = 64
    """Images per batch."""
    seed: NonNegativeInt = 0
    """Random seed."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: a GPU if available."""

    # output
    output: OutputFolder | None = None
    """Output folder; None: the subfolder figures/ of the run."""
    redraw: str | None = None
    """Redraw the figures from the saved numbers in this folder."""


if __name__ == "__main__":
    check_options(Options)  # --help and wrong options end here: what follows imports torch

import torch
from lab.figures.data import input_gains, one_neuron, training_curves
from lab.run_folder import removed_if_unused
from torch import Tensor

from sj_robust import DLIFNode
from sj_robust.attacks import ThreatModel, pgd
from sj_robust.core.console import working
from sj_robust.data import load_images
from sj_robust.evaluation.subject import Subject, check_fits, from_checkpoint
from sj_robust.ops import keep_heap
from sj_robust.perturbation import IntensityCorrelation, intensity_correlation
from sj_robust.perturbation.intensity import Perturbation


def main(arguments: list[str]) -> None:
    """Compute and draw, or draw again."""
    options = read_options(Options, arguments)
    if options.redraw is not None:
        paths = saved_numbers(Path(options.redraw))
        with working("drawing", total=len(paths)) as step:
            for path in paths:
                draw(path)
                step()
        return
    if not (options.device == "auto" and torch.cuda.is_available()):
        keep_heap()
    makers: dict[str, Callable[[Options, Path], None]] = {
        "gains": gains,  # the first, which needs a run
        "curves": curves,
        "intensity": intensity,
        "neuron": neuron,
    }
    chosen = [name for name in makers if {name, "all"}.intersection(options.which)]
    if options.run is None and chosen != ["neuron"]:
        raise WrongUse("give the folder of a run of adv_train; --which neuron alone needs none")
    if options.run is None and options.output is None:
        raise WrongUse(
            "give --output, the folder to write to, since there is no run whose folder could be "
            "taken"
        )
    with checked():
        check_budgets(options, chosen)
    folder = Path(options.output or Path(str(options.run)) / "figures")
    if options.run is not None and not Path(options.run).is_dir():
        raise FileNotFoundError(
            f"{options.run} does not exist; give the folder of a run of recipes/adv_train.py"
        )
    with removed_if_unused(folder, resume=folder.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        describe_folder(folder, "figures", arguments)
        for name in chosen:
            with working(name):
                makers[name](options, folder)


def check_budgets(options: Options, chosen: Sequence[str]) -> None:
    """Raise ValueError for a radius before the first figure is drawn, not after."""
    for size in options.eps if "intensity" in chosen else ():
        if ThreatModel("Linf", size).eps <= 0:
            raise ValueError(f"--eps must be > 0 to attack at all, got {size}")


def neuron(options: Options, folder: Path) -> None:
    """Figure 1: one LIF neuron under a constant and a Gaussian perturbation."""
    finish(one_neuron(seed=options.seed), folder / "neuron.json")


def gains(options: Options, folder: Path) -> None:
    """Figure 4: p[t] of every DLIF layer."""
    models = {subject.name: subject.model for subject in subjects(options)}
    if "all" in options.which and not any(map(has_dlif, models.values())):
        print("gains skipped: no network has a DLIF neuron")
        return
    finish(input_gains(models), folder / "gains.json")


def has_dlif(model: torch.nn.Module) -> bool:
    """Whether a network has a DLIF neuron."""
    return any(isinstance(module, DLIFNode) for module in model.modules())


def curves(options: Options, folder: Path) -> None:
    """Figure 5: accuracy and MS-MPPD over the epochs."""
    finish(training_curves(Path(str(options.run))), folder / "curves.json")


def intensity(options: Options, folder: Path) -> None:
    """Indicators of every layer under growing noise and growing attacks, and heat maps of
    MS-MPPD.
    """
    for subject in subjects(options):
        print(f"intensity of {subject.name}")
        result = correlate(options, subject)
        finish(result, folder / f"intensity_{subject.name}.json")
        for direction in result.directions:
            print(
                f"{direction}, {result.samples} images, {result.left_out} already "
                f"misclassified\n{result.table(direction)}"
            )


def images_for(options: Options, subject: Subject) -> tuple[Tensor, Tensor]:
    """Test images [N, C, H, W] for a network, and labels [N], all moved to the device."""
    if subject.spec is not None and subject.spec.frames:
        raise ValueError(
            f"{subject.name} takes event frames, which noise and PGD do not keep binary; omit "
            "intensity"
        )
    on_gpu = options.device == "auto" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dataset = options.dataset or str(subject.options.get("dataset", "digits"))
    splits = load_images(dataset, root=options.data_root, test_limit=options.images)
    samples = [splits.test[index] for index in range(len(splits.test))]
    x = torch.stack([image for image, _ in samples]).to(device)
    y = torch.tensor([int(label) for _, label in samples], device=device)
    subject.model.to(device)
    check_fits(subject, x, splits.classes, dataset)
    return x, y


def correlate(options: Options, subject: Subject) -> IntensityCorrelation:
    """Perturb test images at every size, by noise and by attack."""
    x, y = images_for(options, subject)
    model = subject.model
    generator = torch.Generator().manual_seed(options.seed)

    def gaussian(x: Tensor, y: Tensor, eps: float) -> Tensor:
        return x + eps * torch.randn(x.shape, generator=generator).to(x)

    def adversarial(x: Tensor, y: Tensor, eps: float) -> Tensor:
        step_size = 2.5 * eps / options.steps
        return pgd(
            model, x, y, eps=eps, step_size=step_size, steps=options.steps, generator=generator
        )

    perturb: dict[str, Perturbation] = {"gaussian": gaussian, "adversarial": adversarial}
    return intensity_correlation(
        model,
        x,
        y,
        perturb=perturb,
        eps=options.eps,
        batch_size=options.batch_size,
        resamples=options.resamples,
        seed=options.seed,
        say=print,
    )


def subjects(options: Options) -> list[Subject]:
    """The networks of the run."""
    folder = Path(str(options.run))
    paths = [*folder.glob("best.pt"), *sorted(folder.glob("*/best.pt"))]
    if not paths:
        raise FileNotFoundError(
            f"no best.pt in {options.run} or its folders; give a run of adv_train that is finished"
        )
    return [from_checkpoint(path) for path in paths]


def finish(data: Any, path: Path) -> None:
    """Save the numbers, then draw from the file."""
    data.save(path)
    draw(path)


def draw(path: Path) -> None:
    """Draw a file of numbers and say what came of it."""
    from lab.figures.draw import redraw  # imports matplotlib

    print(f"{path} drawn as {', '.join(file.name for file in redraw(path))}")


def saved_numbers(folder: Path) -> list[Path]:
    """Files of numbers that an earlier call left in a folder."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} does not exist; --redraw takes the folder that an earlier call wrote to"
        )
    found = sorted(folder.glob("*.json"))
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no numbers (*.json); compute them first, without --redraw"
        )
    return found


if __name__ == "__main__":
    run_recipe(main, stopped="the same command draws what is missing")
