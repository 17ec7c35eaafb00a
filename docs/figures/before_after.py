"""Draws the picture of the front page: images before and after an attack, and the robust accuracy
of two networks.

python docs/figures/before_after.py FOLDER  # pictures of CIFAR-10, FOLDER/test/CLASS/*
"""

import csv
import sys
from pathlib import Path

import torch

from sj_robust.core.shown import BLUE, GREY, ORANGE, new_figure, print_style
from sj_robust.data import image_loader, load_images
from sj_robust.evaluation import Report, gallery
from sj_robust.models import pretrained

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
EPS = "8/255"
COUNT = 3


def attacked(folder):
    """A gallery of the first images of as many classes, and the names of the classes."""
    test = load_images(f"image_folder:{folder}").test
    names = sorted(path.name for path in (Path(folder) / "test").iterdir())
    x, y = next(iter(image_loader(test, len(test))))
    chosen = torch.cat([(y == label).nonzero()[:3, 0] for label in range(len(names))])
    model = pretrained("cifar10/dlif-at")
    return gallery(model, x[chosen], y[chosen], eps=EPS, count=2 * len(names)), names


def columns_of(shown):
    """The first fooled image of each class."""
    found = {}
    for number, (label, seen) in enumerate(zip(shown.labels, shown.predicted_adv, strict=True)):
        if label != seen:
            found.setdefault(int(label), number)
    return list(found.values())[:COUNT]


def draw_images(panels, shown, names):
    """Two rows: clean and attacked, with the predicted class above each."""
    rows = ((shown.x, shown.predicted), (shown.x_adv, shown.predicted_adv))
    for column, number in enumerate(columns_of(shown)):
        for row, (images, seen) in enumerate(rows):
            axes = panels[row, column]
            axes.imshow(images[number].permute(1, 2, 0).numpy(), interpolation="bicubic")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(
                names[int(seen[number])],
                color=ORANGE if row else "black",
                fontweight="bold" if row else "normal",
                fontsize=10,
            )
            axes.grid(visible=False)
    panels[0, 0].set_ylabel("clean", fontsize=10)
    panels[1, 0].set_ylabel(f"attacked, {EPS}", fontsize=10)


def under_the_paper_attacks():
    """Accuracy of cifar10/dlif-at under the attacks of the paper."""
    with (RESULTS / "cifar10" / "results.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            of_this = (row["mode"], row["rho"], row["learn_gain"]) == ("at", "0.0", "True")
            if of_this and row["figure"] == "paper/worst case":
                return 100 * float(row["mean"])
    raise LookupError("no such row")


def draw_brackets(axes):
    """Robust accuracy, from proved to under attack, of a usual and a certified network."""
    stored = RESULTS / "leaderboard" / "cifar10"
    reports = {
        "adversarial\ntraining": Report.load(stored / "dlif-at-8-standard.json"),
        "certified\ntraining": Report.load(stored / "dlif-certified-8-fast.json"),
    }
    for place, report in enumerate(reports.values()):
        low, high = 100 * report.verified.accuracy, 100 * report.everything.accuracy
        clean = 100 * report.clean.accuracy
        axes.plot([low, high], [place, place], color=BLUE, linewidth=9, solid_capstyle="butt")
        axes.plot(clean, place, "o", color=GREY, markersize=6)
        axes.annotate(
            f"{low:.1f} to {high:.1f} %", (low, place), (0, 9), textcoords="offset points"
        )
        axes.annotate(
            f"{clean:.1f} % clean", (clean, place), (-18, -15), textcoords="offset points"
        )
    claimed = under_the_paper_attacks()
    axes.plot(claimed, 0, "D", color=ORANGE, markersize=6)
    axes.annotate(
        f"{claimed:.1f} %,\npaper's attacks",
        (claimed, 0),
        (2, -25),
        textcoords="offset points",
        color=ORANGE,
    )
    axes.set_yticks(range(len(reports)), list(reports), fontsize=10)
    axes.set_ylim(1.5, -0.5)
    axes.set_xlim(-2, 85)
    axes.set_xlabel("accuracy on CIFAR-10, %")
    axes.set_title(f"bars: robust accuracy at {EPS}", fontsize=10)


@print_style()
def main():
    """Attack the images, read the stored reports, draw."""
    shown, names = attacked(sys.argv[1])
    figure = new_figure(6.6, 2.9)
    left, right = figure.subfigures(1, 2, width_ratios=(1.35, 1))
    draw_images(left.subplots(2, COUNT, squeeze=False), shown, names)
    draw_brackets(right.subplots())
    figure.savefig(HERE / "before_after.png", dpi=160, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()
