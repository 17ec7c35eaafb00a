"""The study of published defences: table, figures and CSV files from what its sweeps came to.

python docs/results/defences.py                      # the sweeps runs/defences_*
python docs/results/defences.py runs/mine            # these sweeps; no file is written
python docs/results/defences.py --page               # the page again, from the files that are kept

The sweeps are recipes/configs/sweeps/defences_fashion_mnist_sweep.yaml and
defences_cifar10_sweep.yaml, or parts of them under other names; a stopped one goes on by the same
command, and one that is not finished is shown as far as it is. This writes defences/networks.csv, a
line per network and radius, to which seeds that were trained on other machines may be added;
defences/defences.csv, a line per defence and radius, where rows of more seeds than there are
networks stay; the figures beside them, and everything between the two marks in defences.md.
"""

import json
import math
import statistics
import sys
from collections import ChainMap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby, product
from pathlib import Path
from typing import Any

import torch
import yaml
from defences_cost import PLAIN, Cost
from defences_cost import TABLE as COSTS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import Bbox
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
NETWORKS = FOLDER / "networks.csv"
PAGE = HERE / "defences.md"
RUNS = ROOT / "runs"
SWEEPS = "defences_*"
SEARCHES = ROOT / "recipes/configs/sweeps/defences_fashion_mnist_sweep.yaml"
"""Says what is searched in each cell, also for sweeps that take the values from there."""
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
SPIKE_SEARCHES = ("spike_search", "program")
"""Kinds of attacks that follow spikes, in suite and control."""
PGD, MPPD = "pgd20/last", "pgd20"
"""The paper's attack among the figures of a run and among its MS-MPPD."""
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
ACROSS = (3, -3)
"""Points to the right at which a label may stand, the nearest first; to the left where below 0."""
UP = (3, -7, 9, -13, 15, -19)
"""Points above at which it may stand."""
STOCHASTIC = ("tgo", "stog", "rsc", "poisson")
"""Cells whose networks draw random numbers."""
DATA = {
    "fashion_mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "cifar10_pictures": "CIFAR-10 (JPEG)",
}

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


@dataclass(frozen=True)
class Network:
    """One network of the study at one radius: shares in [0, 1], and MS-MPPD under the paper's PGD;
    NaN where there is no figure.
    """

    data: str
    radius: str
    cell: str
    seed: int
    clean: float
    pgd: float
    control: float
    no_spike_search: float
    at_most: float
    proved: float
    ms_mppd: float
    images: int
    chosen: str
    """Its value of the option that is searched in its cell."""

    @property
    def row_key(self) -> tuple[str, str, str]:
        """The row that it belongs to."""
        return self.data, self.radius, self.cell

    @property
    def key(self) -> tuple[str, str, str, int]:
        """Identifies a network at one radius."""
        return (*self.row_key, self.seed)


def main() -> None:
    """Read the sweeps, or the CSV files, and write the page."""
    words = sys.argv[1:]
    FOLDER.mkdir(exist_ok=True)
    only_page = words == ["--page"]
    other_sweeps = bool(words) and not only_page
    folders = [Path(word) for word in words] if other_sweeps else sorted(RUNS.glob(SWEEPS))
    found = {} if only_page else networks_in(folders)
    if other_sweeps:
        kept: list[Network] = []
        kept_rows: list[Row] = []
    else:
        kept = read_rows(NETWORKS, Network)
        kept_rows = read_rows(TABLE, Row)
    networks = list(({one.key: one for one in kept} | found).values())
    rows = rows_of(networks, kept_rows)
    if not rows:
        sys.exit(
            f"no network has been evaluated in {' and '.join(map(str, folders)) or RUNS}; run "
            "recipes/sweep.py with a sweep of the study first"
        )
    text = shown(rows)
    if other_sweeps:
        print(text)
        return
    if networks:
        write_rows(NETWORKS, networks)
    write_rows(TABLE, rows)
    draw_brackets(rows)
    draw_mppd(rows)
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    write_whole(PAGE, f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}")
    print(text)


def networks_in(folders: Iterable[Path]) -> dict[tuple[str, str, str, int], Network]:
    """By its key every network of sweeps, at every radius where both of its evaluations are
    done.
    """
    found: dict[tuple[str, str, str, int], Network] = {}
    runs: dict[tuple[str, str, str, int], Path] = {}
    for folder in dict.fromkeys(folders):
        sweep_file = folder / "sweep.yaml"
        if not sweep_file.is_file():
            continue
        sweep = yaml.safe_load(sweep_file.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("runs/*/run.json")):
            for network in networks_of(path, sweep):
                before = runs.setdefault(network.key, path.parent)
                if before != path.parent:
                    sys.exit(
                        f"{before} and {path.parent} are both {network.cell} with seed "
                        f"{network.seed} at {network.radius}; move away the one that is not of the "
                        "study"
                    )
                found[network.key] = network
    return found


def networks_of(path: Path, sweep: dict[str, Any]) -> list[Network]:
    """A run of a sweep, by its record, at every radius where both of its evaluations are done; none
    if its cell is not of the sweep.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    if record.get("cell") not in sweep["cells"]:
        return []
    data = str(sweep["options"]["dataset"])
    found = []
    for radius, suites in radii(sweep).items():
        both = {"paper", "standard"} <= suites.keys()
        if both and all(name in record["evaluations"] for name in suites.values()):
            report = Report.load(path.parent / suites["standard"] / "report.json")
            network = network_of(
                record,
                report,
                data=data,
                radius=radius,
                suites=suites,
                chosen=chosen_for(record, sweep),
            )
            found.append(network)
    return found


def network_of(
    record: dict[str, Any],
    report: Report,
    *,
    data: str,
    radius: str,
    suites: dict[str, str],
    chosen: str,
) -> Network:
    """A run of a sweep at one radius; suites are the names of its evaluations by suite, and the
    report is that of the suite standard.
    """

    def share(suite: str, name: str) -> float:
        counts = record["evaluations"][suites[suite]]["figures"].get(name)
        return math.nan if counts is None else counts["correct"] / counts["total"]

    return Network(
        data=data.rpartition("/")[2] if ":" in data else data,
        radius=radius,
        cell=record["cell"],
        seed=record["options"]["seed"],
        clean=share("paper", "clean"),
        pgd=share("paper", PGD),
        control=share("standard", "control"),
        no_spike_search=accuracy_without_spike_search(report),
        at_most=share("standard", "everything"),
        proved=share("standard", "verified"),
        ms_mppd=record.get("ms_mppd", {}).get(suites["paper"], {}).get(MPPD, math.nan),
        images=len(report.labels),
        chosen=chosen,
    )


def rows_of(networks: Iterable[Network], kept: Iterable[Row]) -> list[Row]:
    """Every defence at every radius, in the order of the table of names.

    A row that was kept stays where it is of more seeds than there are networks.
    """
    rows = {(row.data, row.radius, row.cell): row for row in kept}
    groups: dict[tuple[str, str, str], list[Network]] = {}
    for one in networks:
        groups.setdefault(one.row_key, []).append(one)
    for key, group in groups.items():
        if key in rows and rows[key].seeds > len(group):
            print(f"kept: {', '.join(key)}, of {rows[key].seeds} seeds instead of {len(group)}")
        else:
            rows[key] = row_of(group)
    costs = {row.cell: f"{row.relative:.2f}" for row in read_rows(COSTS, Cost)}
    with_costs = [replace(row, cost=costs.get(row.cell, "")) for row in rows.values()]
    return sorted(with_costs, key=order)


def order(row: Row) -> tuple[int, str, float, int, bool]:
    """Data sets and defences as they are named here, radii by size, alone before AT."""
    cells = list(NAMES)
    alone = row.cell if row.cell in cells else row.cell.removesuffix("_at")
    number_of_data = list(DATA).index(row.data) if row.data in DATA else len(DATA)
    number_of_cell = cells.index(alone) if alone in cells else len(cells)
    return number_of_data, row.data, parse_eps(row.radius), number_of_cell, row.cell != alone


def row_of(networks: Sequence[Network]) -> Row:
    """The row of networks that differ in their seeds."""
    first = networks[0]
    settings = {(one.images, one.chosen) for one in networks}
    if len(settings) > 1:
        sys.exit(
            f"the networks of {first.cell} at {first.radius} differ in images or in what was "
            f"chosen: {sorted(settings)}; take those of one setting out of {NETWORKS}"
        )
    clean, clean_sd = percent(one.clean for one in networks)
    pgd, pgd_sd = percent(one.pgd for one in networks)
    control, control_sd = percent(one.control for one in networks)
    no_spike_search, no_spike_search_sd = percent(one.no_spike_search for one in networks)
    at_most, at_most_sd = percent(one.at_most for one in networks)
    proved, _ = percent(one.proved for one in networks)
    mppd = known(one.ms_mppd for one in networks)
    return Row(
        data=first.data,
        radius=first.radius,
        cell=first.cell,
        seeds=len(networks),
        clean=clean,
        clean_sd=clean_sd,
        pgd=pgd,
        pgd_sd=pgd_sd,
        control=control,
        control_sd=control_sd,
        no_spike_search=no_spike_search,
        no_spike_search_sd=no_spike_search_sd,
        at_most=at_most,
        at_most_sd=at_most_sd,
        proved=proved,
        ms_mppd=f"{statistics.fmean(mppd):.4g}" if mppd else "",
        chosen=first.chosen,
    )


def percent(shares: Iterable[float]) -> tuple[str, str]:
    """Mean and standard deviation of the shares that are known, in per cent with one digit; nothing
    where there is none.
    """
    values = [100 * share for share in known(shares)]
    mean = f"{statistics.fmean(values):.1f}" if values else ""
    spread = f"{statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return mean, spread


def known(values: Iterable[float]) -> list[float]:
    """Those that are not NaN."""
    return [value for value in values if not math.isnan(value)]


def radii(sweep: dict[str, Any]) -> dict[str, dict[str, str]]:
    """By radius the name of each suite's evaluation."""
    found: dict[str, dict[str, str]] = {}
    for name, own in sweep["evaluations"].items():
        options = {"suite": name} | sweep["evaluation_options"] | own
        radius = eps_text(parse_eps(options["eps"]))
        found.setdefault(radius, {})[options["suite"]] = name
    return found


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


def chosen_for(record: dict[str, Any], sweep: dict[str, Any]) -> str:
    """Name and value of the option of a run that its cell searches, in this sweep or in the one of
    :data:`SEARCHES`; empty if there is none.
    """
    cells = [cells.get(record["cell"], {}) for cells in (sweep["cells"], cells_with_searches())]
    searches = [cell["search"] for cell in cells if "search" in cell]
    if not searches:
        return ""
    ((option, values),) = searches[0].items()
    value = record["options"][option]
    as_written = [one for one in values if one == value]
    return f"{option} {(as_written or [value])[0]}"


@cache
def cells_with_searches() -> dict[str, Any]:
    """The cells of :data:`SEARCHES`, read once."""
    cells: dict[str, Any] = yaml.safe_load(SEARCHES.read_text(encoding="utf-8"))["cells"]
    return cells


def by_threat(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """Rows of one data set and radius together."""
    groups = groupby(rows, key=lambda row: f"{DATA.get(row.data, row.data)}, {row.radius}")
    return [(title, list(found)) for title, found in groups]


def shown(rows: list[Row]) -> str:
    """The tables and figures of the page."""
    parts = []
    for data, of_data in groupby(rows, key=lambda row: row.data):
        groups = [found for _, found in by_threat(of_data)]
        radii = " and ".join(found[0].radius for found in groups)
        seeds = seeds_text([row for found in groups for row in found])
        cost = not parts  # measured once, so shown once
        parts += [f"### {DATA.get(data, data)}, {radii} ({seeds})", table(groups, cost=cost)]
    parts += ["### Rank correlation", correlations(rows)]
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
    """What each paper claims, and what its defence adds here to robust accuracy, in points, at the
    radii where no defence and plain AT have been measured.
    """
    groups = [
        (title, found)
        for title, found in by_threat(rows)
        if {PLAIN, "at"} <= {row.cell for row in found}
    ]
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


def table(groups: list[list[Row]], *, cost: bool) -> str:
    """One data set, the most robust defence first, with a group of rows for every radius, and
    perhaps with the cost of training.
    """
    heads = ["defence", "clean, %"]
    for found in groups:
        at = f" at {found[0].radius}, %" if len(groups) > 1 else ", %"
        heads += [f"{name}{at}" for name in ("PGD-20", "control", "no spike search", "at most")]
    by_radius = [{row.cell: row for row in found} for found in groups]
    known = ChainMap(*by_radius)  # of a defence, the row at the smallest radius
    cells = []
    for row in sorted(known.values(), key=lambda one: -number(one.at_most)):
        line = [row.starred, row.clean]
        for rows in by_radius:
            line += attacked_cells(rows.get(row.cell))
        cells.append([*line, row.cost] if cost else line)
    return markdown_table([*heads, "cost"] if cost else heads, cells)


def attacked_cells(row: Row | None) -> list[str]:
    """What attacks of four kinds leave at one radius."""
    if row is None:
        return [""] * 4
    worst = f"**{with_spread(row.at_most, row.at_most_sd)}**" if row.at_most else ""
    return [row.pgd, row.control, row.no_spike_search, worst]


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


def correlations(rows: list[Row]) -> str:
    """Rank correlations of every data set and radius, over all defences and over those with
    adversarial training.
    """
    lines = []
    for title, found in by_threat(rows):
        line = [title]
        for group in (found, [row for row in found if row.attacked]):
            value, count = rank_correlation(group)
            line.append("–" if math.isnan(value) else f"{value:+.2f} ({count} rows)")
        lines.append(line)
    return markdown_table(["MS-MPPD under PGD-20, *no spike search*", "all", "with AT"], lines)


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
        labels = []
        for panel, (title, found) in zip(panels, groups, strict=True):
            for row in found:
                if row.ms_mppd and row.no_spike_search:
                    x, y = float(row.ms_mppd), float(row.no_spike_search)
                    kind = "with AT" if row.attacked else "without"
                    mark = "o" if row.attacked else "s"
                    panel.plot(x, y, mark, color=COLOURS[row.attacked], label=kind)
                    options = {"xytext": (3, 3), "textcoords": "offset points", "size": 5}
                    labels.append(panel.annotate(row.starred, (x, y), **options))
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
        move_apart(figure, labels)
        figure.savefig(FOLDER / "ms_mppd.png", dpi=130)


def move_apart(figure: Figure, labels: Iterable[Annotation]) -> None:
    """Put each label near its point where it does not cover an earlier one."""
    figure.draw_without_rendering()
    taken: list[Bbox] = []
    for label in labels:
        for across, up in product(ACROSS, UP):
            label.xyann = (across, up)
            label.set_horizontalalignment("left" if across > 0 else "right")
            box = label.get_window_extent()
            if not any(map(box.overlaps, taken)):
                break
        taken.append(box)


def add_legend(figure: Figure, panel: Axes) -> None:
    """Name every kind of mark of a panel once, below the figure."""
    handles, labels = panel.get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    figure.legend(by_label.values(), by_label, loc="outside lower center", ncols=2)


if __name__ == "__main__":
    main()
