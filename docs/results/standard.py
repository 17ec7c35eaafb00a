"""What the suites gradient and standard leave of the networks that come with the package, and of
those of the study on CIFAR-10.

python docs/results/standard.py                 # runs/standard keeps what is finished
python docs/results/standard.py digits/lif      # only these
python docs/results/standard.py cifar10-4/lif-at  # a network of the study on CIFAR-10, at 4/255

After a stop, run the same command to continue. It writes standard.csv, network by
network, and prints it as a table. Networks for the digits take minutes each on one core, those for
CIFAR-10 half an hour without a control, and pictures in data/cifar10_pictures.
"""

import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path

from rows import read_rows, write_rows

from sj_robust.core.saved import markdown_table
from sj_robust.evaluation import Report

ROOT = Path(__file__).parents[2]
RUNS = Path("runs", "standard")
TABLE = Path(__file__).with_name("standard.csv")
SUITES = ("gradient", "standard")
CIFAR10 = "--dataset image_folder:data/cifar10_pictures --test-limit 500 --no-control"
STUDY = "docs/results/cifar10/networks"
DIGITS = ("lif", "lif-at", "dlif-at", "dlif-at-mppd", "dlif-certified")
OF_STUDY = {
    "lif-at": f"{STUDY}/lif-at.pt",
    "lif-at-mppd": f"{STUDY}/lif-at-mppd.pt",
    "dlif-at": "cifar10/dlif-at",
    "dlif-at-mppd": "cifar10/dlif-at-mppd",
    "dlif-at-l1": f"{STUDY}/dlif-at-l1.pt",
    "dlif-gaussian": f"{STUDY}/dlif-gaussian.pt",
    "dlif": f"{STUDY}/dlif.pt",
}
"""The networks of docs/results/cifar10.md, of which two come with the package."""
NETWORKS = {
    **{f"digits/{name}": (f"digits/{name}", "--eps 0.1") for name in DIGITS},
    "digits-l2/lif-at": ("digits/lif-at", "--norm L2 --eps 0.4 --no-control"),
    "digits-l2/dlif-at": ("digits/dlif-at", "--norm L2 --eps 0.4 --no-control"),
    "digits-l2/dlif-at-mppd": ("digits/dlif-at-mppd", "--norm L2 --eps 0.4 --no-control"),
    **{
        f"{data}/{name}": (
            network,
            f"--eps {pixels}/255 {CIFAR10} --name cifar10/{name}",
        )
        for data, pixels in (("cifar10", 8), ("cifar10-4", 4))
        for name, network in OF_STUDY.items()
    },
}
"""The network and the options of evaluate.py for each evaluation."""


@dataclass(frozen=True)
class Row:
    """What one suite found of a network, in per cent of the images."""

    network: str
    threat: str
    images: str
    suite: str
    clean: str
    proved: str
    worst_case: str
    control: str
    at_most: str
    seconds: str


def main() -> None:
    """Whatever is not there yet is evaluated; a row without a report in runs/standard is kept."""
    names = sys.argv[1:] or list(NETWORKS)
    order = list(product(NETWORKS, SUITES))
    rows = {(one.network, one.suite): one for one in read_rows(TABLE, Row)}
    for name, suite in order:
        run = RUNS / name / suite
        if name in names:
            network, options = NETWORKS[name]
            evaluate(network, suite, options, run)
        if (ROOT / run / "report.json").exists():
            rows[name, suite] = row(name, suite, Report.load(ROOT / run / "report.json"))
            write_rows(TABLE, [rows[key] for key in order if key in rows])
    heads = [field.name for field in fields(Row)]
    cells = [list(asdict(rows[key]).values()) for key in order if key in rows]
    print(markdown_table(heads, cells, words=4))


def evaluate(network: str, suite: str, options: str, run: Path) -> None:
    """Run the recipe from the root of the repository, or go on with it."""
    if (ROOT / run / "report.json").exists():
        return
    words = [
        "recipes/evaluate.py",
        network,
        "--suite",
        suite,
        *options.split(),
        "--output",
        str(run),
    ]
    if (ROOT / run).exists():
        words.append("--resume")
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)


def row(name: str, suite: str, report: Report) -> Row:
    """The figures of a report."""
    verified, control = report.verified, report.control
    return Row(
        network=name,
        threat=report.budget,
        images=str(len(report.labels)),
        suite=suite,
        clean=report.clean.percent,
        proved="" if verified is None else verified.percent,
        worst_case=report.worst_case.percent,
        control="" if control is None else control.percent,
        at_most=report.everything.percent,
        seconds=f"{report.everything.seconds:.0f}",
    )


if __name__ == "__main__":
    main()
