"""Figures, drawn from reports; drawing needs matplotlib (extra ``recipes``)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sj_robust.core.eps import eps_text, parse_eps
from sj_robust.core.shown import (
    BLUE,
    COLOURS,
    GREY,
    ORANGE,
    common_scale,
    heat_map,
    new_figure,
    print_style,
    without_formulas,
)
from sj_robust.evaluation.intervals import wilson_interval
from sj_robust.evaluation.report.levels import WHATS, What, intact, kinds, levels, levels_budget
from sj_robust.evaluation.report.verdict import budget
from sj_robust.evaluation.result import Accuracy, Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["figures"]

_OF_EVENTS = {"L0": "events added or removed", "moves": "events moved in time"}


@dataclass(frozen=True)
class _Line:
    """How a line looks; ``style`` is matplotlib's text for marker and dashes."""

    color: str
    style: str


@dataclass(frozen=True)
class _Bar:
    """How a bar looks; without a hatch it is filled more strongly."""

    color: str
    hatch: str = ""

    @property
    def alpha(self) -> float:
        """How opaque its inside is."""
        return 0.5 if self.hatch else 0.8


_LEVEL_LOOKS: dict[What, _Line] = {
    "clean": _Line(BLUE, "o-"),
    "attacked": _Line(ORANGE, "s--"),
}
_BAR_LOOKS = {
    "clean": _Bar(GREY),
    "member": _Bar(BLUE),
    "control": _Bar(GREY, "////"),
    "worst case": _Bar(ORANGE, "xxxx"),
    "verified": _Bar(GREY, "\\\\\\\\"),
}
_OTHER_BAR = _Bar(ORANGE, "....")
_SHOWN_ATTACKS = 6
"""Heat maps of further attacks."""


@print_style()
def figures(report: Evaluation, *, columns: int = 2) -> dict[str, "Figure"]:
    """The figures of a report by name, not yet written. 报告的图。

    Args:
        report: What to draw.
        columns: Panels side by side in the figure of several panels.

    Returns:
        Of a suite ``accuracy_over_eps``, ``attacks``, ``potential`` (of the first attack within the
        threat) and ``potential_more`` (of the others), as far as the report holds numbers for them;
        of a stress test, a vote or a training the one figure ``""``.

    Raises:
        ValueError: If the report holds no figures at all.
    """
    if report.of_levels:
        return {"": _levels(report)}
    if report.suite == "vote":
        return {"": _vote(report)}
    if report.suite == "training":
        return {"": _training(report)}
    found = {}
    if report.over_eps:
        found["accuracy_over_eps"] = _accuracy_over_eps(report)
    found["attacks"] = _attacks(report)
    if report.potential:
        first, others = _attacks_with_potential(report)
        found["potential"] = _potential([first], 1)
        if others:
            found["potential_more"] = _potential(others, columns)
    return found


def _attacks_with_potential(
    report: Evaluation,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The row of the first attack within the threat, or of the first one at all, and some of the
    others.
    """
    within = {row.member for row in report.attacks if report.within(row)}
    rows = [row for row in report.potential if not row["member"].startswith("control/")]
    first = next((row for row in rows if row["member"] in within), rows[0])
    others = [row for row in rows if row is not first]
    return first, _different(others)


def _accuracy_over_eps(report: Evaluation) -> "Figure":
    """The curve over the radius, what is proved below it, and both ends of the suite."""
    figure = new_figure(3.8, 2.8)
    axes = figure.subplots()
    radii = [point.eps for point in report.over_eps]
    here = 0.0 if report.threat is None else report.threat.eps
    in_255ths = any(text.endswith("/255") for text in [*radii, eps_text(here)])
    unit = 255 if in_255ths else 1
    places = [unit * parse_eps(radius) for radius in radii]
    _attacked_curve(axes, report, places)
    _verified_curve(axes, report, places, unit)
    aside = 0.015 * max(places)  # none of the two covers the other, or the curve
    if report.control is not None:
        _summary(axes, unit * here - aside, report.control, "control", marker="s", color=GREY)
    label = "worst case of suite and control"
    _summary(axes, unit * here + aside, report.everything, label, marker="D", color=ORANGE)
    axes.set_xlabel(_radius_label(report, unit))
    axes.set_ylabel("accuracy, %")
    axes.set_xlim(left=0)
    axes.set_ylim(-2, 102)
    axes.legend()
    return figure


def _radius_label(report: Evaluation, unit: int) -> str:
    """What the axis of radii shows: eps of a norm in a unit, or a number of events."""
    norm = "" if report.threat is None else report.threat.norm
    if norm in _OF_EVENTS:
        return _OF_EVENTS[norm]
    return f"eps, {norm}, in 1/255" if unit == 255 else f"eps, {norm}"


def _attacked_curve(axes: "Axes", report: Evaluation, places: Sequence[float]) -> None:
    """Accuracy under the attack at every radius, with its interval."""
    low = []
    high = []
    for point in report.over_eps:
        ends = wilson_interval(point.correct, point.total)
        low.append(100 * ends[0])
        high.append(100 * ends[1])
    axes.fill_between(places, low, high, color=BLUE, alpha=0.2, linewidth=0)
    label = report.over_eps[-1].attack
    axes.plot(places, _shares(report), "o-", color=BLUE, markersize=4, label=label)


def _verified_curve(axes: "Axes", report: Evaluation, places: Sequence[float], unit: int) -> None:
    """What is proved where it is known; hatched up to the attack if that is everywhere."""
    within = []
    lowest = []
    for point in report.over_eps:
        if point.verified is not None:
            within.append(unit * parse_eps(point.eps))
            lowest.append(100 * point.verified.accuracy)
    if not within:
        return
    axes.plot(within, lowest, "--", color=GREY, label="verified")
    if within == places:
        _hatched(axes, places, lowest, _shares(report))


def _shares(report: Evaluation) -> list[float]:
    """Accuracy in per cent at every radius of the curve."""
    return [100 * point.correct / point.total for point in report.over_eps]


def _hatched(
    axes: "Axes", places: Sequence[float], low: Sequence[float], high: Sequence[float]
) -> None:
    axes.fill_between(places, low, high, facecolor="none", edgecolor=GREY, hatch="///", linewidth=0)


def _summary(
    axes: "Axes", place: float, one: Accuracy, label: str, *, marker: str, color: str
) -> None:
    """One accuracy at a radius with its interval."""
    low, high = (100 * end for end in one.interval)
    middle = 100 * one.accuracy
    whiskers = [[middle - low], [high - middle]]
    axes.errorbar(
        place,
        middle,
        whiskers,
        fmt=marker,
        capsize=4,
        label=label,
        color=color,
        ms=5,
    )


def _attacks(report: Evaluation) -> "Figure":
    """Bars of the attacks, hollow outside the threat model; totals below, hatched."""
    beyond = {row.member for row in report.attacks if not report.within(row)}
    shown = [one for one in report.accuracies if _is_shown(one.name)]
    figure = new_figure(4.2, 0.6 + 0.2 * len(shown))
    axes = figure.subplots()
    for place, one in enumerate(shown):
        _bar(axes, place, one, hollow=one.name in beyond)
    names = [without_formulas(one.name) for one in shown]
    axes.set_yticks(range(len(shown)), names, fontsize=7)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, 112)
    axes.set_xticks(range(0, 101, 25))
    axes.grid(visible=False)
    axes.set_xlabel(f"accuracy, % ({budget(report.threat)}; whiskers: 95 % CI)")
    return figure


def _is_shown(name: str) -> bool:
    """Whether an accuracy gets a bar: not a part of the control, and not that of another radius."""
    return not name.startswith("control/") and "@" not in name


def _bar(axes: "Axes", place: int, one: Accuracy, *, hollow: bool) -> None:
    """A bar with its outline, its interval and its number."""
    look = _BAR_LOOKS.get(one.kind, _OTHER_BAR)
    share = 100 * one.accuracy
    low, high = (100 * end for end in one.interval)
    inside = 0.0 if hollow else look.alpha
    axes.barh(place, share, 0.72, color=look.color, alpha=inside, linewidth=0)
    axes.barh(
        place,
        share,
        0.72,
        facecolor="none",
        edgecolor=look.color,
        hatch=look.hatch,
        linewidth=1.0,
    )
    whiskers = [[share - low], [high - share]]
    ink = axes.spines["left"].get_edgecolor()
    axes.errorbar(share, place, xerr=whiskers, fmt="none", ecolor=ink, capsize=2)
    axes.annotate(
        f"{share:.1f}",
        xy=(high, place),
        xytext=(3, 0),
        textcoords="offset points",
        va="center",
        fontsize=7,
    )


def _potential(rows: Sequence[Mapping[str, Any]], columns: int) -> "Figure":
    """A heat map per attack, one scale for all."""
    columns = min(columns, len(rows))
    down = math.ceil(len(rows) / columns)
    layers = max(len(row["layers"]) for row in rows)
    height_of_panel = 0.65 + 0.24 * layers
    figure = new_figure(0.4 + 4.2 * columns, 0.8 + height_of_panel * down)
    panels = figure.subplots(down, columns, squeeze=False)
    scale = common_scale(_values(rows))
    for axes, row in zip(panels.flat, rows, strict=False):
        mesh = heat_map(axes, row["layers"], scale)
        member = without_formulas(row["member"])
        axes.set_title(f"{member} ({row['samples']} images)")
    for axes in panels.flat[len(rows) :]:
        axes.set_axis_off()
    for axes in panels[-1]:
        axes.set_xlabel("time step")
    bar = figure.colorbar(mesh, ax=list(panels.flat), shrink=min(1.0, 2.0 / down))
    bar.set_label("MS-MPPD")
    bar.ax.tick_params(which="both", labelsize=7)
    return figure


def _values(rows: Sequence[Mapping[str, Any]]) -> Iterable[float]:
    for row in rows:
        for steps in row["layers"].values():
            yield from steps


def _different(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of different attacks first, then the ones with most images; in their own order."""
    kinds_seen: set[str] = set()
    first: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for row in rows:
        kind = row["member"].split("/")[0].split("@")[0]
        if kind in kinds_seen:
            others.append(row)
        else:
            first.append(row)
        kinds_seen.add(kind)
    ranked = [*_by_samples(first), *_by_samples(others)]
    shown = ranked[:_SHOWN_ATTACKS]
    return [row for row in rows if row in shown]


def _by_samples(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: -row["samples"])


def _levels(report: Evaluation) -> "Figure":
    """A panel per kind of fault: accuracy over its levels, clean and attacked."""
    names = kinds(report)
    columns = min(4, max(1, len(names)))
    down = max(1, math.ceil(len(names) / columns))
    figure = new_figure(0.6 + 2.4 * columns, 0.5 + 2.1 * down)
    panels = figure.subplots(down, columns, squeeze=False, sharey=True)
    for axes, kind in zip(panels.flat, names, strict=False):
        _levels_of(axes, report, kind)
    for axes in panels.flat[len(names) :]:
        axes.set_axis_off()
    for axes in panels[:, 0]:
        axes.set_ylabel("accuracy, %", fontsize=8)
    attack = f"{report.description} at {levels_budget(report.threat)}"
    name = without_formulas(report.name)
    title = f"{name}: clean (circles), {attack} (squares), no fault (dotted)"
    figure.suptitle(title, size=8)
    return figure


def _levels_of(axes: "Axes", report: Evaluation, kind: str) -> None:
    found = levels(report, kind)
    places = range(len(found))
    whole = intact(report)
    for what in WHATS:
        look = _LEVEL_LOOKS[what]
        low = []
        high = []
        shares = []
        for one in found:
            ends = one.interval(what)
            low.append(ends[0])
            high.append(ends[1])
            shares.append(100 * one.mean(what) / one.images)
        axes.fill_between(places, low, high, color=look.color, alpha=0.2, lw=0)
        axes.plot(places, shares, look.style, color=look.color, ms=4)
        middle = 100 * whole.mean(what) / whole.images
        axes.axhline(middle, color=GREY, lw=0.8, ls=":")
    axes.set_title(kind, fontsize=8)
    axes.set_xticks(places, [f"{one.level:g}" for one in found], fontsize=7)
    axes.set_ylim(-2, 102)
    axes.tick_params(axis="y", labelsize=7)
    axes.grid(alpha=0.3)


def _vote(report: Evaluation) -> "Figure":
    """Both ends of the bracket over the radius."""
    radii = [row.eps or 0.0 for row in report.rows if row.kind == "proof"]
    low = []
    high = []
    for radius in radii:
        certified, attacked = report.bracket_at(radius)
        low.append(100 * certified.accuracy)
        high.append(100 * attacked.accuracy)
    figure = new_figure(4.6, 3.4)
    axes = figure.subplots()
    axes.plot(radii, high, "o-", color=BLUE, markersize=4, label="under attack")
    axes.plot(radii, low, "v--", color=GREY, markersize=4, label="certified")
    _hatched(axes, radii, low, high)
    axes.set_xlabel("eps, L2")
    axes.set_ylabel(f"accuracy, smoothing sigma {report.network['vote']['sigma']:.6g}, %")
    axes.set_xlim(left=0)
    axes.set_ylim(-2, 102)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _training(report: Evaluation) -> "Figure":
    """Bars of accuracy per attack and network, and validation curves if the report has them."""
    if not report.curves:
        figure = new_figure(3.25, 2.6)
        _bars(figure.subplots(), report)
        return figure
    figure = new_figure(6.75, 2.6)
    left, right = figure.subplots(1, 2)
    _bars(left, report)
    _curves(right, report)
    return figure


def _bars(axes: "Axes", report: Evaluation) -> None:
    networks = report.variants
    found = {network: report.single_accuracies(network) for network in networks}
    attacks: list[str] = []
    for figures in found.values():
        for one in figures:
            if one.name not in attacks:
                attacks.append(one.name)
    width = 0.8 / len(networks)
    middle = (len(networks) - 1) / 2
    for index, (network, figures) in enumerate(found.items()):
        shift = (index - middle) * width
        places = [attacks.index(one.name) + shift for one in figures]
        shares = [100 * one.accuracy for one in figures]
        color = COLOURS[index % len(COLOURS)]
        bars = axes.bar(places, shares, width, label=without_formulas(network), color=color)
        for bar, one in zip(bars, figures, strict=True):
            if one.kind == "verified":
                bar.set(hatch=_BAR_LOOKS["verified"].hatch, edgecolor="white")
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    axes.set_xticks(range(len(attacks)), [*map(without_formulas, attacks)])
    axes.set_ylim(0, 112)
    axes.set_ylabel("test accuracy, %")
    if report.threat is not None:
        axes.set_title(f"{report.threat.norm} {report.threat.eps:.4g}")
    axes.grid(visible=False, axis="x")
    if len(networks) > 1:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)


def _curves(axes: "Axes", report: Evaluation) -> None:
    from matplotlib.ticker import MaxNLocator

    styles = {"clean": "--", "fgsm": ":", "verified": "-."}
    for index, (network, records) in enumerate(report.curves.items()):
        epochs = [record["epoch"] for record in records]
        color = COLOURS[index % len(COLOURS)]
        name = without_formulas(network)
        for attack in records[0]["validation"] if records else ():
            values = [100 * record["validation"][attack] for record in records]
            style = styles.get(attack, "-")
            label = f"{name}, {without_formulas(attack)}"
            axes.plot(epochs, values, style, color=color, label=label)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("validation accuracy, %")
    axes.set_ylim(0, 105)
    axes.set_title("training")
    axes.legend(loc="lower right")
