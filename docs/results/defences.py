"""The study of published defences: table, figures and one CSV from what its sweeps came to.

python docs/results/defences.py                      # the two sweeps in runs
python docs/results/defences.py runs/mine            # these sweeps; the CSV is not written
python docs/results/defences.py --page               # the page again, from the CSV that is kept

The sweeps are recipes/configs/sweeps/defences_fashion_mnist_sweep.yaml and
defences_cifar10_sweep.yaml; a stopped one goes on by the same command, and one that is not finished
is shown as far as it is. This writes defences/defences.csv, the figures beside it, and everything
between the two marks in defences.md.
"""

import csv
import json
import math
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import yaml
from defences_cost import PLAIN, Cost
from defences_cost import TABLE as COSTS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rows import read_rows, write_rows

from sj_robust.attacks.threat import eps_text, parse_eps
from sj_robust.core.saved import markdown_table, write_whole
from sj_robust.core.shown import COLOURS, GREY, print_style
from sj_robust.evaluation import Report
from sj_robust.perturbation.association import spearman

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FOLDER = HERE / "defences"
TABLE = FOLDER / "defences.csv"
PAGE = HERE / "defences.md"
SWEEPS = ("runs/defences_fashion_mnist_sweep", "runs/defences_cifar10_sweep")
RESULTS = "results.csv"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
NO_SPIKE_SEARCH = "no spike search"
"""Name here of accuracy under all attacks but those that follow spikes."""
SPIKE_SEARCHES = ("spike_search", "program")
"""Kinds of attacks that follow spikes, in suite and control."""
PGD, MPPD = "pgd20/last", "pgd20/ms_mppd"
NAMES = {
    PLAIN: "no defence",
    "at": "AT",
    "ms_mppd_at": "DLIF + MS-MPPD, AT",
    "mppd_tv_at": "MPPD-TV, AT",
    "tgo": "TGO",
    "feel": "FEEL-SNN",
    "hosnn": "HoSNN",
    "stog": "StoG",
    "mpd_sgr": "MPD-SGR",
    "rsc": "RSC",
    "poisson": "rate coding",
    "stod": "STOD",
    "dsd": "DSD",
}
"""What the cells of the sweeps are called; NAME_at is NAME with adversarial training."""
STOCHASTIC = ("tgo", "stog", "rsc", "poisson")
"""Cells whose networks draw random numbers."""
DATA = {"fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10", "cifar10_pictures": "CIFAR-10"}

CLAIMS = {
    "ms_mppd_at": "PGD-10 at 8/255, CIFAR-10, beside AT: 29.1 to 37.6 % "
    "([paper](https://arxiv.org/abs/2405.20694))",
    "mppd_tv_at": "the absolute value beats the square (Lai et al., ICLR 2026)",
    "tgo": "significantly more robust, at no cost in inference "
    "([abstract](https://arxiv.org/abs/2602.20548))",
    "feel": "more robust to noise, FGSM, PGD, BIM, CW "
    "([reviews](https://openreview.net/forum?id=TuCQdBo4NC))",
    "hosnn": "PGD-7 at 8/255, with FGSM training: Fashion-MNIST 30.5 to 74.9 %, CIFAR-10 0.6 to "
    "42.6 % ([abstract](https://arxiv.org/abs/2308.10373))",
    "stog": "helps alone and with AT under FGSM and PGD-7 "
    "([paper](https://ojs.aaai.org/index.php/AAAI/article/view/27804))",
    "mpd_sgr": "significantly more robust ([abstract](https://arxiv.org/abs/2511.12199))",
    "rsc": "more robust ([abstract](https://arxiv.org/abs/2407.20099))",
    "poisson": "random codes are inherently more robust (Sharmin et al., ECCV 2020)",
    "stod": "more robust to FGSM and PGD ([paper](https://openreview.net/forum?id=udTDFAshNM))",
    "dsd": "significantly more robust ([abstract](https://openreview.net/forum?id=EIYltBaUzL))",
}
"""What each paper claims in its own setting, where that could be read."""


@dataclass(frozen=True)
class Row:
    """A defence at one radius: means over seeds in per cent, their standard deviations, and the
    time of training relative to no defence. Empty where there is no figure.
    ``no_spike_search`` is accuracy under all attacks of suite and control but those that follow
    spikes.
    """

    data: str
    radius: str
    cell: str
    seeds: int
    clean: str
    clean_sd: str
    pgd: str
    pgd_sd: str
    control: str
    control_sd: str
    no_spike_search: str
    no_spike_search_sd: str
    at_most: str
    at_most_sd: str
    proved: str
    ms_mppd: str
    chosen: str = ""
    cost: str = ""

    @property
    def name(self) -> str:
        """What a reader calls it."""
        alone = self.cell.removesuffix("_at")
        with_at = f"{NAMES.get(alone, alone)}, AT"
        return NAMES.get(self.cell, with_at if self.cell.endswith("_at") else self.cell)

    @property
    def starred(self) -> str:
        """The name with a star if it draws random numbers."""
        return f"{self.name}*" if self.stochastic else self.name

    @property
    def stochastic(self) -> bool:
        """Whether it draws random numbers."""
        return self.cell.removesuffix("_at") in STOCHASTIC

    @property
    def attacked(self) -> bool:
        """Whether it was trained on attacked images."""
        return self.cell == "at" or self.cell.endswith("_at")


def main() -> None:
    """Read the sweeps, or the CSV, and write the page."""
    words = sys.argv[1:]
    FOLDER.mkdir(exist_ok=True)
    if words == ["--page"]:
        rows = read_rows(TABLE, Row)
    else:
        folders = [Path(word) for word in words] or [ROOT / name for name in SWEEPS]
        begun = [folder for folder in folders if (folder / RESULTS).is_file()]
        rows = [row for folder in begun for row in rows_of(folder)]
    if not rows:
        sys.exit(
            f"no sweep has {RESULTS} yet; run recipes/sweep.py, with --report if it is not finished"
        )
    text = shown(rows)
    if words and words != ["--page"]:
        print(text)
        return
    write_rows(TABLE, rows)
    draw_brackets(rows)
    draw_mppd(rows)
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    write_whole(PAGE, f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}")
    print(text)


def rows_of(folder: Path) -> list[Row]:
    """Every defence of a sweep at every radius where its evaluation is done, in the order of the
    cells.
    """
    sweep = yaml.safe_load((folder / "sweep.yaml").read_text(encoding="utf-8"))
    figures = figures_in(folder / RESULTS)
    evaluations = radii(sweep)
    for suites in evaluations.values():
        if "standard" in suites:
            add_no_spike_search(figures, folder, suites["standard"])
    costs = {row.cell: f"{row.relative:.2f}" for row in read_rows(COSTS, Cost)}
    chosen = chosen_in(folder / "search.csv")
    rows = []
    for radius, suites in evaluations.items():
        for cell in sweep["cells"]:
            found = figures.get(cell, {})
            if f"{suites.get('standard')}/everything" in found:
                row = row_of(sweep["options"]["dataset"], radius, cell, found, suites)
                rows.append(replace(row, chosen=chosen.get(cell, ""), cost=costs.get(cell, "")))
    return rows


@dataclass(frozen=True)
class Figures:
    """Mean, spread over seeds and number of seeds of one column."""

    mean: float
    spread: float | None
    seeds: int


def row_of(
    data: str,
    radius: str,
    cell: str,
    found: dict[str, Figures],
    suites: dict[str, str],
) -> Row:
    """The row of one cell; suites are the names of its evaluations by suite."""
    paper, standard = suites.get("paper", ""), suites.get("standard", "")
    columns = {
        "clean": f"{paper}/clean",
        "pgd": f"{paper}/{PGD}",
        "control": f"{standard}/control",
        "no_spike_search": f"{standard}/{NO_SPIKE_SEARCH}",
        "at_most": f"{standard}/everything",
    }
    texts: dict[str, str] = {}
    for name, column in columns.items():
        figure = found.get(column)
        texts[name] = "" if figure is None else f"{100 * figure.mean:.1f}"
        spread = None if figure is None else figure.spread
        texts[f"{name}_sd"] = "" if spread is None else f"{100 * spread:.1f}"
    proved = found.get(f"{standard}/verified")
    mppd = found.get(f"{paper}/{MPPD}")
    return Row(
        data=data.rpartition("/")[2] if ":" in data else data,
        radius=radius,
        cell=cell,
        seeds=max(found[name].seeds for name in columns.values() if name in found),
        proved="" if proved is None else f"{100 * proved.mean:.1f}",
        ms_mppd="" if mppd is None else f"{mppd.mean:.4g}",
        **texts,
    )


def radii(sweep: dict[str, Any]) -> dict[str, dict[str, str]]:
    """By radius the name of each suite's evaluation."""
    found: dict[str, dict[str, str]] = {}
    for name, own in sweep["evaluations"].items():
        options = {"suite": name} | sweep["evaluation_options"] | own
        radius = eps_text(parse_eps(options["eps"]))
        found.setdefault(radius, {})[options["suite"]] = name
    return found


def figures_in(path: Path) -> dict[str, dict[str, Figures]]:
    """By cell and column what a sweep's results.csv says."""
    found: dict[str, dict[str, Figures]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            spread = line["standard_deviation"]
            figures = Figures(
                float(line["mean"]), float(spread) if spread else None, int(line["seeds"])
            )
            found.setdefault(line["cell"], {})[line["figure"]] = figures
    return found


def add_no_spike_search(
    figures: dict[str, dict[str, Figures]], folder: Path, evaluation: str
) -> None:
    """Add to the figures of a sweep what an evaluation leaves without its search over spikes, which
    is not run on networks that draw random numbers.
    """
    reports: dict[str, list[Report]] = {}
    for path in sorted(folder.glob(f"runs/*/{evaluation}/report.json")):
        record = json.loads((path.parents[1] / "run.json").read_text(encoding="utf-8"))
        reports.setdefault(record["cell"], []).append(Report.load(path))
    for cell, found in reports.items():
        at_most = statistics.mean(report.everything.accuracy for report in found)
        listed = figures.get(cell, {}).get(f"{evaluation}/everything")
        if listed is None or not math.isclose(listed.mean, at_most, abs_tol=1e-6):
            sys.exit(
                f"{folder / RESULTS} does not have the mean of the reports of {cell}; run "
                f"recipes/sweep.py --output {folder} --report first"
            )
        shares = [accuracy_without_spike_search(report) for report in found]
        spread = statistics.stdev(shares) if len(shares) > 1 else None
        without = Figures(statistics.mean(shares), spread, len(shares))
        figures[cell][f"{evaluation}/{NO_SPIKE_SEARCH}"] = without


def accuracy_without_spike_search(report: Report) -> float:
    """Share of images that stand against all attacks but those that follow spikes."""
    standing = report.standing("clean")
    for row in report.attacks:
        if not follows_spikes(row.member):
            standing -= report.broken(row)
    return len(standing) / len(report.labels)


def follows_spikes(member: str) -> bool:
    """Whether an attack of this name follows spikes instead of gradients."""
    return member.removeprefix("control/").partition("/")[0] in SPIKE_SEARCHES


def chosen_in(path: Path) -> dict[str, str]:
    """By cell the value that its search chose."""
    with path.open(encoding="utf-8", newline="") as file:
        return {
            line["cell"]: line["value"] for line in csv.DictReader(file) if line["chosen"] == "True"
        }


def by_threat(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """Rows of one data set and radius together."""
    groups = groupby(rows, key=lambda row: f"{DATA.get(row.data, row.data)}, {row.radius}")
    return [(title, list(found)) for title, found in groups]


def shown(rows: list[Row]) -> str:
    """The tables and figures of the page."""
    parts = []
    for title, found in by_threat(rows):
        parts += [f"### {title} ({seeds_text(found)})", table(found), correlation_text(found)]
    parts += ["### What is left of the claims", claims(rows)]
    parts += [
        "![Of every defence the bracket with its spread over seeds, accuracy without the spike "
        "search, PGD-20 and clean accuracy](defences/brackets.png)",
        "![MS-MPPD under attack and robust accuracy of every defence](defences/ms_mppd.png)",
    ]
    return "\n\n".join(parts)


def seeds_text(rows: list[Row]) -> str:
    """Number of seeds of all rows."""
    least, most = min(row.seeds for row in rows), max(row.seeds for row in rows)
    if least < most:
        return f"{least} to {most} seeds"
    return "one seed so far" if most == 1 else f"{most} seeds"


def claims(rows: list[Row]) -> str:
    """What each paper claims, and what its defence adds here to robust accuracy, in points."""
    groups = by_threat(rows)
    lines = []
    for cell, claim in CLAIMS.items():
        alone = cell.removesuffix("_at")
        cells = [NAMES[cell].removesuffix(", AT"), claim]
        for _, found in groups:
            rows_by_cell = {row.cell: row for row in found}
            pairs = ((alone, PLAIN), (f"{alone}_at", "at"))
            gains = [gain(rows_by_cell.get(name), rows_by_cell.get(base)) for name, base in pairs]
            cells.append(" / ".join("–" if math.isnan(one) else f"{one:+.1f}" for one in gains))
        lines.append(cells)
    heads = ["defence", "claim in its own setting", *(f"left at {title}" for title, _ in groups)]
    note = (
        "Left: *at most* with the defence minus *at most* without it, in points, alone / with AT; "
        "for defences with a star, both without the spike search."
    )
    return f"{markdown_table(heads, lines, words=2)}\n\n{note}"


def gain(row: Row | None, base: Row | None) -> float:
    """What a defence adds to robust accuracy, by the attacks that both rows had; NaN if it is not
    known.
    """
    if row is None or base is None:
        return math.nan
    if row.stochastic:
        return number(row.no_spike_search) - number(base.no_spike_search)
    return number(row.at_most) - number(base.at_most)


def table(rows: list[Row]) -> str:
    """One data set and radius, the most robust defence first."""
    heads = [
        "defence",
        "clean, %",
        "PGD-20, %",
        "control, %",
        "no spike search, %",
        "at most, %",
        "overlooked",
        "MS-MPPD",
        "cost",
    ]
    cells = []
    for row in sorted(rows, key=lambda one: -number(one.at_most)):
        hidden = number(row.pgd) - number(row.at_most)
        cells.append(
            [
                row.starred,
                row.clean,
                row.pgd,
                row.control,
                row.no_spike_search,
                f"**{with_spread(row.at_most, row.at_most_sd)}**" if row.at_most else "",
                "" if math.isnan(hidden) else f"{hidden:+.1f}",
                row.ms_mppd,
                row.cost,
            ]
        )
    return markdown_table(heads, cells)


def number(text: str) -> float:
    """A figure, NaN where there is none."""
    return float(text) if text else math.nan


def with_spread(mean: str, spread: str) -> str:
    """Mean and standard deviation."""
    return f"{mean} ± {spread}" if spread else mean


def rank_correlation(rows: list[Row]) -> tuple[float, int]:
    """Spearman's correlation of MS-MPPD under attack with robust accuracy without the spike search,
    and the number of defences.
    """
    pairs = [
        (float(row.ms_mppd), float(row.no_spike_search))
        for row in rows
        if row.ms_mppd and row.no_spike_search
    ]
    if len(pairs) < 3:
        return math.nan, len(pairs)
    first, second = torch.tensor(pairs, dtype=torch.float64).T
    return float(spearman(first, second)), len(pairs)


def correlation_text(rows: list[Row]) -> str:
    """The correlations in a line: over all defences, and over those with adversarial training."""
    texts = []
    groups = {"all": rows, "with AT": [row for row in rows if row.attacked]}
    for name, group in groups.items():
        value, count = rank_correlation(group)
        if not math.isnan(value):
            texts.append(f"{value:+.2f} over {count} rows ({name})")
    found = ", ".join(texts) or "not defined"
    return f"Rank correlation of MS-MPPD under PGD-20 with *no spike search*: {found}."


def draw_brackets(rows: list[Row]) -> None:
    """From what is proved to what attacks leave, with the standard deviation of that, what they
    leave without the search over spikes, the paper's PGD and clean accuracy.
    """
    groups = by_threat(rows)
    with print_style():
        tallest = max(len(found) for _, found in groups)
        figure = Figure((3.4 * len(groups), 0.8 + 0.24 * tallest), layout="constrained")
        panels = figure.subplots(1, len(groups), squeeze=False)[0]
        for panel, (title, found) in zip(panels, groups, strict=True):
            ordered = sorted(found, key=lambda one: number(one.at_most))
            for place, row in enumerate(ordered):
                low, high = number(row.proved or "0"), number(row.at_most)
                panel.barh(place, high - low, left=low, height=0.6, color=COLOURS[0])
                spread = number(row.at_most_sd or "0")
                ends = [high - spread, high + spread]
                panel.plot(ends, [place, place], lw=1, color=GREY, label="± over seeds")
                without = number(row.no_spike_search)
                panel.plot(without, place, "x", ms=4, color=GREY, label="no spike search")
                panel.plot(number(row.pgd), place, "o", ms=3, color=COLOURS[1], label="PGD-20")
                panel.plot(number(row.clean), place, "|", color=GREY, label="clean")
            panel.set_yticks(range(len(ordered)), [row.starred for row in ordered])
            panel.set_xlim(0, 100)
            panel.set_xlabel("accuracy, %")
            panel.set_title(title)
        add_legend(figure, panels[0])
        figure.savefig(FOLDER / "brackets.png", dpi=130)


def draw_mppd(rows: list[Row]) -> None:
    """MS-MPPD under attack against robust accuracy, a point per defence."""
    groups = by_threat(rows)
    with print_style():
        figure = Figure((3.4 * len(groups), 3.2), layout="constrained")
        panels = figure.subplots(1, len(groups), squeeze=False)[0]
        for panel, (title, found) in zip(panels, groups, strict=True):
            for row in found:
                if row.ms_mppd and row.no_spike_search:
                    x, y = float(row.ms_mppd), float(row.no_spike_search)
                    kind = "with AT" if row.attacked else "without"
                    mark = "o" if row.attacked else "s"
                    panel.plot(x, y, mark, color=COLOURS[row.attacked], label=kind)
                    panel.annotate(row.starred, (x, y), (3, 3), textcoords="offset points", size=5)
            value, _ = rank_correlation(found)
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.margins(x=0.2)
            panel.set_xlabel("MS-MPPD under PGD-20")
            panel.set_ylabel("accuracy without spike search, %")
            panel.set_title(f"{title}: rank correlation {value:+.2f}")
        add_legend(figure, panels[0])
        figure.savefig(FOLDER / "ms_mppd.png", dpi=130)


def add_legend(figure: Figure, panel: Axes) -> None:
    """Name every kind of mark of a panel once, below the figure."""
    handles, labels = panel.get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    figure.legend(by_label.values(), by_label, loc="outside lower center", ncols=2)


if __name__ == "__main__":
    main()
