"""Figures, drawn from saved results; drawing needs matplotlib (extra ``recipes``)."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sj_robust.attacks.threat import ThreatModel, eps_text, parse_eps
from sj_robust.core.shown import (
    BLUE,
    COLOURS,
    GREY,
    ORANGE,
    common_scale,
    heat_map,
    new_figure,
    print_style,
    write_figure,
)
from sj_robust.evaluation.intervals import wilson_interval
from sj_robust.evaluation.outcome import MemberOutcome
from sj_robust.evaluation.pictures import Gallery
from sj_robust.evaluation.report import Accuracy, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_report", "plot_robustness", "robustness_figures"]

_Rows = Sequence[dict[str, Any]]


class _DrawnReport(Protocol):
    """What is drawn of a robustness report, which itself draws by this module."""

    @property
    def threat(self) -> ThreatModel: ...
    @property
    def budget(self) -> str: ...
    @property
    def members(self) -> Sequence[MemberOutcome]: ...
    @property
    def accuracies(self) -> Sequence[Accuracy]: ...
    @property
    def over_eps(self) -> _Rows: ...
    @property
    def verified_over_eps(self) -> _Rows: ...
    @property
    def potential(self) -> _Rows: ...
    def within(self, member: MemberOutcome) -> bool: ...


@print_style()
def plot_report(report: Report, path: Path) -> None:
    """Bars of accuracy per attack and network, and validation curves if the report has them.
    绘制评估报告。

    Args:
        report: What to draw.
        path: File to write; its ending decides the format.

    Raises:
        ValueError: If the report has no scores.

    Examples:
        >>> import tempfile
        >>> from sj_robust.attacks import ThreatModel
        >>> from sj_robust.evaluation import Score
        >>> path = Path(tempfile.mkdtemp()) / "report.png"
        >>> plot_report(Report(ThreatModel("Linf", 0.1), (Score("dlif", "clean", 9, 10),)), path)
        >>> path.is_file()
        True
    """
    if not report.scores:
        raise ValueError("a report without scores cannot be drawn; evaluate at least one network")
    figure = new_figure(6.75 if report.curves else 3.25, 2.6)
    panels = figure.subplots(1, 2 if report.curves else 1, squeeze=False)[0]
    _bars(panels[0], report)
    if report.curves:
        _curves(panels[1], report)
    write_figure(figure, path)


def plot_robustness(
    report: _DrawnReport, folder: Path, gallery: Gallery | None = None
) -> tuple[Path, ...]:
    """Every figure of a robustness report, each as PNG and PDF. 绘制鲁棒性报告的全部图。

    Args:
        report: What to draw.
        folder: Where the figures of :func:`robustness_figures` are written; those that the report
            holds no numbers for are left out.
        gallery: Images under attack to draw as well.

    Examples:
        >>> import tempfile
        >>> from sj_robust.attacks import ThreatModel
        >>> from sj_robust.evaluation import RobustnessReport
        >>> report = RobustnessReport(
        ...     "mine", "digits", ThreatModel("Linf", 0.1), "fast", 2, (0, 1), (0,), ()
        ... )
        >>> [file.name for file in plot_robustness(report, Path(tempfile.mkdtemp()))]
        ['attacks.png', 'attacks.pdf']
    """
    paths = []
    figures = robustness_figures(report) | ({} if gallery is None else gallery.figures())
    for name, figure in figures.items():
        for ending in ("png", "pdf"):
            paths.append(folder / f"{name}.{ending}")
            write_figure(figure, paths[-1])
    return tuple(paths)


@print_style()
def robustness_figures(report: _DrawnReport, *, columns: int = 2) -> dict[str, "Figure"]:
    """The figures of a robustness report by name, not yet written. 鲁棒性报告的图。

    Args:
        report: What to draw.
        columns: Panels side by side in the figure of several panels.

    Returns:
        ``accuracy_over_eps``, ``attacks``, ``potential`` (of the first attack within the threat)
        and ``potential_more`` (of the others), as far as the report holds numbers for them.

    Examples:
        >>> from sj_robust.attacks import ThreatModel
        >>> from sj_robust.evaluation import RobustnessReport
        >>> report = RobustnessReport(
        ...     "mine", "digits", ThreatModel("Linf", 0.1), "fast", 2, (0, 1), (0,), ()
        ... )
        >>> list(robustness_figures(report))
        ['attacks']
    """
    figures = {}
    if report.over_eps:
        figures["accuracy_over_eps"] = _accuracy_over_eps(report)
    figures["attacks"] = _attacks(report)
    if report.potential:
        kept = {member.name for member in report.members if report.within(member)}
        rows = [row for row in report.potential if not row["member"].startswith("control/")]
        first = next((row for row in rows if row["member"] in kept), rows[0])
        figures["potential"] = _potential([first], 1)
        if others := _different([row for row in rows if row is not first], 6):
            figures["potential_more"] = _potential(others, columns)
    return figures


def _accuracy_over_eps(report: _DrawnReport) -> "Figure":
    figure = new_figure(3.8, 2.8)
    axes = figure.subplots()
    texts = [str(row["eps"]) for row in report.over_eps]
    unit = (
        255 if any(text.endswith("/255") for text in [*texts, eps_text(report.threat.eps)]) else 1
    )
    places = [unit * parse_eps(text) for text in texts]
    shares = [100 * row["correct"] / row["total"] for row in report.over_eps]
    ends = [wilson_interval(row["correct"], row["total"]) for row in report.over_eps]
    low, high = ([100 * end[side] for end in ends] for side in (0, 1))
    axes.fill_between(places, low, high, color=BLUE, alpha=0.2, linewidth=0)
    axes.plot(places, shares, "o-", color=BLUE, markersize=4, label=report.over_eps[-1]["attack"])
    if report.verified_over_eps:
        lowest = [100 * row["verified"] / row["total"] for row in report.verified_over_eps]
        within = [unit * parse_eps(row["eps"]) for row in report.verified_over_eps]
        axes.plot(within, lowest, "v--", color=GREY, markersize=4, label="verified")
        if within == places:
            axes.fill_between(
                places, lowest, shares, facecolor="none", edgecolor=GREY, hatch="///", linewidth=0
            )
    here = unit * report.threat.eps
    summaries = {one.kind: one for one in report.accuracies}
    for kind, marker, color in (("control", "s", GREY), ("everything", "D", ORANGE)):
        if kind in summaries:
            low_end, high_end = (100 * end for end in summaries[kind].interval)
            middle = 100 * summaries[kind].accuracy
            name = "worst case of everything" if kind == "everything" else kind
            size, filled = (
                (9, "none") if marker == "s" else (5, color)
            )  # the one shows around the other
            spread = [[middle - low_end], [high_end - middle]]
            axes.errorbar(
                here,
                middle,
                spread,
                fmt=marker,
                capsize=4,
                label=name,
                color=color,
                ms=size,
                markerfacecolor=filled,
            )
    in_units = ", in 1/255" if unit == 255 else ""
    what = {"L0": "events added or removed", "moves": "events moved in time"}
    axes.set_xlabel(what.get(report.threat.norm, f"eps, {report.threat.norm}{in_units}"))
    axes.set_ylabel("accuracy, %")
    axes.set_xlim(left=0)
    axes.set_ylim(-2, 102)
    axes.legend()
    return figure


def _attacks(report: _DrawnReport) -> "Figure":
    """Bars from the first attack to the last, hollow beyond the threat; control and worst case
    below, hatched.
    """
    beyond = {member.name for member in report.members if not report.within(member)}
    curve = {member.name for member in report.members if "@" in member.name}
    rows = [
        row
        for row in report.accuracies
        if not row.name.startswith("control/") and row.name not in curve
    ]
    figure = new_figure(4.2, 0.6 + 0.2 * len(rows))
    axes = figure.subplots()
    looks = {
        "clean": (GREY, ""),
        "member": (BLUE, ""),
        "control": (GREY, "////"),
        "worst case": (ORANGE, "xxxx"),
    }
    looks["verified"] = (GREY, "\\\\\\\\")
    ink = axes.spines["left"].get_edgecolor()
    for place, row in enumerate(rows):
        color, hatch = looks.get(row.kind, (ORANGE, "...."))
        share = 100 * row.accuracy
        low, high = (100 * end for end in row.interval)
        axes.barh(
            place,
            share,
            0.72,
            color=color,
            alpha=0.5 if hatch else 0.0 if row.name in beyond else 0.8,
            linewidth=0,
        )
        axes.barh(place, share, 0.72, facecolor="none", edgecolor=color, hatch=hatch, linewidth=1.0)
        axes.errorbar(
            share, place, xerr=[[share - low], [high - share]], fmt="none", ecolor=ink, capsize=2
        )
        axes.annotate(
            f"{share:.1f}",
            (high, place),
            (3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 112)
    axes.set_xticks(range(0, 101, 25))
    axes.grid(visible=False)
    axes.set_xlabel(f"accuracy left, % ({report.budget}; whiskers 95 %)")
    return figure


def _potential(rows: _Rows, columns: int) -> "Figure":
    """A heat map per attack, one scale for all."""
    columns = min(columns, len(rows))
    down = math.ceil(len(rows) / columns)
    layers = max(len(row["layers"]) for row in rows)
    figure = new_figure(0.4 + 4.2 * columns, 0.8 + (0.65 + 0.24 * layers) * down)
    panels = figure.subplots(down, columns, squeeze=False)
    scale = common_scale(
        value for row in rows for steps in row["layers"].values() for value in steps
    )
    for axes, row in zip(panels.flat, rows, strict=False):
        mesh = heat_map(axes, row["layers"], scale)
        axes.set_title(f"{row['member']} ({row['samples']} images)")
    for axes in panels.flat[len(rows) :]:
        axes.set_axis_off()
    for axes in panels[-1]:
        axes.set_xlabel("time step")
    bar = figure.colorbar(mesh, ax=list(panels.flat), shrink=min(1.0, 2.0 / down))
    bar.set_label("MS-MPPD")
    bar.ax.tick_params(which="both", labelsize=7)
    return figure


def _different(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Rows of different attacks first, then the ones with most images; in their own order."""
    first = {row["member"].split("/")[0].split("@")[0]: row for row in reversed(rows)}
    ranked = sorted(rows, key=lambda row: (row not in first.values(), -row["samples"]))[:count]
    return [row for row in rows if row in ranked]


def _bars(axes: "Axes", report: Report) -> None:
    width = 0.8 / len(report.networks)
    for index, network in enumerate(report.networks):
        scores = [score for score in report.scores if score.network == network]
        shift = (index - (len(report.networks) - 1) / 2) * width
        places = [report.attacks.index(score.attack) + shift for score in scores]
        shares = [100 * score.accuracy for score in scores]
        bars = axes.bar(places, shares, width, label=network, color=COLOURS[index % len(COLOURS)])
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    axes.set_xticks(range(len(report.attacks)), report.attacks)
    axes.set_ylim(0, 112)
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"{report.threat.norm}, eps = {report.threat.eps:.4g}")
    axes.grid(visible=False, axis="x")
    axes.legend(loc="upper right")


def _curves(axes: "Axes", report: Report) -> None:
    from matplotlib.ticker import MaxNLocator

    styles = {"clean": "--", "fgsm": ":"}
    for index, (network, records) in enumerate(report.curves.items()):
        epochs = [record["epoch"] for record in records]
        color = COLOURS[index % len(COLOURS)]
        for attack in records[0]["validation"] if records else ():
            values = [100 * record["validation"][attack] for record in records]
            axes.plot(
                epochs, values, styles.get(attack, "-"), color=color, label=f"{network}, {attack}"
            )
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("validation accuracy, %")
    axes.set_ylim(0, 105)
    axes.set_title("training")
    axes.legend(loc="lower right")
