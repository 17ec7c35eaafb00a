"""What the suites gradient and standard leave of the networks that come with the package, and of
those of the study on CIFAR-10.

python recipes/studies/standard.py                      # runs/standard keeps what is finished
python recipes/studies/standard.py --names digits/lif   # only these
python recipes/studies/standard.py --names cifar10-4/lif-at  # of the study on CIFAR-10, at 4/255

It writes standard.csv and the tables of pretrained.md. Networks for the digits take minutes each on
one core, those for CIFAR-10 half an hour without a control, and pictures in data/cifar10_pictures.
"""

from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import tyro
from tables import RESULTS, ROOT, Row, groups, once, read_table, run_recipe, write_page

from sj_robust.core.saved import markdown_table
from sj_robust.evaluation import Report

PAGE = "pretrained.md"
SUITES = ("gradient", "standard")
CIFAR10 = "--dataset image_folder:data/cifar10_pictures --test-limit 500 --no-control"
DIGITS = ("lif", "lif-at", "dlif-at", "dlif-at-mppd", "dlif-twin", "dlif-certified")
IN_L2 = ("lif-at", "dlif-at", "dlif-at-mppd")
SHIPPED = ("dlif-at", "dlif-at-mppd")
OF_STUDY = ("lif-at", "lif-at-mppd", *SHIPPED, "dlif-at-l1", "dlif-gaussian", "dlif")
"""Networks of the study on CIFAR-10 that come with the package; cifar10/networks has the others."""


def commands() -> dict[str, str]:
    """Network and options of evaluate.py, by the names of the rows."""
    found = {f"digits/{name}": f"digits/{name} --eps 0.1" for name in DIGITS}
    for name in IN_L2:
        found[f"digits-l2/{name}"] = f"digits/{name} --norm L2 --eps 0.4 --no-control"
    for (data, eps), name in product({"cifar10": "8/255", "cifar10-4": "4/255"}.items(), OF_STUDY):
        kept = f"docs/results/cifar10/networks/{name}.pt"
        network = f"cifar10/{name}" if name in SHIPPED else kept
        found[f"{data}/{name}"] = f"{network} --eps {eps} {CIFAR10} --name cifar10/{name}"
    return found


@dataclass(frozen=True)
class Options:
    """What is evaluated."""

    names: tuple[str, ...] = tuple(commands())
    suites: tuple[str, ...] = SUITES
    more: str = ""
    """Further options of evaluate.py."""
    runs: Path = ROOT / "runs" / "standard"
    output: Path = RESULTS


def main(options: Options) -> None:
    """Evaluate what is not in the table."""
    pairs = product(options.names, options.suites)
    grid = ({"network": name, "suite": suite} for name, suite in pairs)
    once(options.output / "standard.csv", grid, partial(measured, options=options))
    write_page(options.output / PAGE, tables(options.output))


def measured(network: str, suite: str, options: Options) -> dict[str, object]:
    """The figures of a report."""
    run = options.runs / network / suite
    words = f"{commands()[network]} --suite {suite} {options.more}".split()
    run_recipe("evaluate.py", words, run)
    report = Report.load(run / "report.json")
    verified, control = report.verified, report.control
    return {
        "threat": report.budget,
        "images": len(report.labels),
        "clean": report.clean.percent,
        "proved": "" if verified is None else verified.percent,
        "worst_case": report.worst_case.percent,
        "control": "" if control is None else control.percent,
        "at_most": report.everything.percent,
        "seconds": f"{report.everything.seconds:.0f}",
    }


def tables(folder: Path) -> dict[str, str]:
    """Both suites beside each other, in Linf with the control and in L2."""
    rows = groups(read_table(folder / "standard.csv"), "network")
    pairs: dict[str, dict[str, Row]] = {}
    for (name,), found in rows.items():
        pairs[name] = {row["suite"]: row for row in found}
    linf, l2 = [], []
    for name, by_suite in pairs.items():
        if len(by_suite) < len(SUITES) or not name.startswith("digits"):
            continue
        gradient, standard = by_suite["gradient"], by_suite["standard"]
        line = [f"`digits/{name.partition('/')[2]}`"]
        line += [gradient["worst_case"], standard["worst_case"]]
        if name.startswith("digits-l2/"):
            l2.append(line)
            continue
        seconds = f"{gradient['seconds']} / {standard['seconds']}"
        linf.append([*line, standard["control"], standard["at_most"], seconds])
    heads = ["digits, Linf 0.1, all 360 test images", "`gradient`, %", "`standard`, %"]
    more = ["its control, %", "both, %", "seconds, `gradient` / `standard`"]
    in_l2 = ["digits, L2 0.4, all 360 test images", *heads[1:]]
    return {"Linf": markdown_table([*heads, *more], linf), "L2": markdown_table(in_l2, l2)}


if __name__ == "__main__":
    main(tyro.cli(Options))
