"""The picture of the front page: images before and after an attack, and the robust accuracy of two
networks.

python recipes/studies/before_after.py FOLDER   # pictures of CIFAR-10, FOLDER/test/CLASS/*
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib.axes import Axes
from tables import RESULTS, read_table

from sj_robust.core.shown import BLUE, GREY, ORANGE, new_figure, print_style
from sj_robust.data import image_loader, load_images
from sj_robust.evaluation import Report, gallery
from sj_robust.models import pretrained

EPS = "8/255"
COUNT = 3
REPORTS = {
    "adversarial\ntraining": "dlif-at-8-standard.json",
    "certified\ntraining": "dlif-certified-8-fast.json",
}
CELL = "learn_gain=True, mode=at, eps=4/255, rho=0.0, norm="
"""Of the first network in sweeps.csv."""


@dataclass(frozen=True)
class Options:
    """What is shown."""

    folder: tyro.conf.Positional[Path]
    network: str = "cifar10/dlif-at"
    output: Path = RESULTS.parent / "figures" / "before_after.png"


@print_style()
def main(options: Options) -> None:
    """Attack the first images of every class, read the stored reports, draw."""
    test = load_images(f"image_folder:{options.folder}").test
    names = sorted(path.name for path in (options.folder / "test").iterdir())
    x, y = next(iter(image_loader(test, len(test))))
    chosen = torch.cat([(y == label).nonzero()[:COUNT, 0] for label in range(len(names))])
    model = pretrained(options.network)
    shown = gallery(model, x[chosen], y[chosen], eps=EPS, count=2 * len(names))
    figure = new_figure(6.6, 2.9)
    parts: Any = figure.subfigures(1, 2, width_ratios=(1.35, 1))
    left, right = parts
    draw_images(left.subplots(2, COUNT, squeeze=False), shown, names)
    draw_brackets(right.subplots())
    figure.savefig(options.output, dpi=160, pil_kwargs={"optimize": True})


def draw_images(panels: Any, shown: Any, names: list[str]) -> None:
    """The first fooled image of each class, clean and attacked, with the predicted class above."""
    fooled: dict[int, int] = {}
    for number, (label, seen) in enumerate(zip(shown.labels, shown.predicted_adv, strict=True)):
        if label != seen:
            fooled.setdefault(int(label), number)
    rows = ((shown.x, shown.predicted), (shown.x_adv, shown.predicted_adv))
    for column, number in enumerate(list(fooled.values())[:COUNT]):
        for row, (images, seen) in enumerate(rows):
            axes = panels[row, column]
            axes.imshow(images[number].permute(1, 2, 0).numpy(), interpolation="bicubic")
            axes.set(xticks=[], yticks=[])
            axes.set_title(names[int(seen[number])], color=ORANGE if row else "black", fontsize=10)
            axes.grid(visible=False)
    panels[0, 0].set_ylabel("clean", fontsize=10)
    panels[1, 0].set_ylabel(f"attacked, {EPS}", fontsize=10)


def draw_brackets(axes: Axes) -> None:
    """Robust accuracy, from proved to under attack, of a usual and a certified network."""
    for place, file in enumerate(REPORTS.values()):
        report = Report.load(RESULTS / "leaderboard" / "cifar10" / file)
        if report.verified is None:
            raise ValueError(f"{file} has no proofs")
        ends = (report.verified, report.everything, report.clean)
        low, high, clean = (100 * one.accuracy for one in ends)
        axes.plot([low, high], [place, place], color=BLUE, linewidth=9, solid_capstyle="butt")
        axes.plot(clean, place, "o", color=GREY, markersize=6)
        label: Any = {"textcoords": "offset points"}
        axes.annotate(f"{low:.1f} to {high:.1f} %", (low, place), (0, 9), **label)
        axes.annotate(f"{clean:.1f} % clean", (clean, place), (-18, -15), **label)
    wanted = {"study": "cifar10", "cell": CELL, "figure": "paper/worst case"}
    rows = read_table(RESULTS / "sweeps.csv")
    (row,) = [row for row in rows if wanted.items() <= row.items()]
    claimed = 100 * float(row["mean"])
    axes.plot(claimed, 0, "D", color=ORANGE, markersize=6)
    text = f"{claimed:.1f} %,\npaper's attacks"
    axes.annotate(text, (claimed, 0), (2, -25), textcoords="offset points", color=ORANGE)
    axes.set_yticks(range(len(REPORTS)), list(REPORTS), fontsize=10)
    axes.set(ylim=(1.5, -0.5), xlim=(-2, 85), xlabel="accuracy on CIFAR-10, %")
    axes.set_title(f"bars: robust accuracy at {EPS}", fontsize=10)


if __name__ == "__main__":
    main(tyro.cli(Options))
