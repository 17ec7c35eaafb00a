"""Figures, drawn from saved results; needs matplotlib (extra ``recipes``)."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sj_robust.evaluation.report import Report

if TYPE_CHECKING:
    from sj_robust.benchmarking import Measurement

__all__ = ["plot_benchmark", "plot_report"]


def plot_report(report: Report, path: Path) -> None:
    """Bars of accuracy per attack and network, and validation curves if the report has them. 绘制评估报告。

    Args:
        report: What to draw.
        path: File to write; its ending decides the format.

    Raises:
        ValueError: If the report has no scores.
    """
    if not report.scores:
        raise ValueError("a report without scores cannot be drawn; evaluate at least one network")
    figure = Figure(figsize=(11.0 if report.curves else 5.5, 4.2), layout="constrained")
    panels = figure.subplots(1, 2 if report.curves else 1, squeeze=False)[0]
    _bars(panels[0], report)
    if report.curves:
        _curves(panels[1], report)
    figure.savefig(path, dpi=150)


def plot_benchmark(measurements: "Sequence[Measurement]", path: Path) -> None:
    """Time of every method at every shape, beside the time that moving the tensors takes. 绘制基准测试结果。

    Args:
        measurements: What to draw, one panel per allocator.
        path: File to write; its ending decides the format.

    Raises:
        ValueError: If there is nothing to draw.
    """
    if not measurements:
        raise ValueError("there are no measurements to draw; run recipes/benchmark.py first")
    allocators, shapes, methods = (
        list(dict.fromkeys(getattr(m, name) for m in measurements)) for name in ("allocator", "shape", "method")
    )
    figure = Figure(figsize=(5.5 * len(allocators), 1.0 + 0.22 * len(shapes) * len(methods)), layout="constrained")
    panels = figure.subplots(1, len(allocators), squeeze=False, sharey=True)[0]
    for axes, allocator in zip(panels, allocators, strict=True):
        here = [m for m in measurements if m.allocator == allocator]
        height = 0.8 / len(methods)
        for index, method in enumerate(methods):
            rows = [m for m in here if m.method == method]
            places = [shapes.index(m.shape) + index * height for m in rows]
            spread = [[m.median - m.quartile1 for m in rows], [m.quartile3 - m.median for m in rows]]
            axes.barh(places, [m.median for m in rows], height, xerr=spread, label=method, color=f"C{index}")
        for place, shape in enumerate(shapes):
            floor = min(m.floor for m in here if m.shape == shape)
            if not math.isnan(floor):
                axes.plot([floor, floor], [place - height / 2, place + 0.8 - height / 2], color="black", linewidth=1.2)
        axes.set_xscale("log")
        axes.set_yticks(
            [place + 0.4 - height / 2 for place in range(len(shapes))], [s.replace("x", ", ") for s in shapes]
        )
        axes.invert_yaxis()
        axes.set_xlabel("forward + backward, ms (bar: median, whisker: quartiles, line: memory's speed)", fontsize=8)
        axes.set_title(allocator, fontsize=10)
    panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=150)


def _bars(axes: Axes, report: Report) -> None:
    width = 0.8 / len(report.networks)
    for index, network in enumerate(report.networks):
        scores = [score for score in report.scores if score.network == network]
        places = [
            report.attacks.index(score.attack) + (index - (len(report.networks) - 1) / 2) * width for score in scores
        ]
        bars = axes.bar(places, [100 * score.accuracy for score in scores], width, label=network, color=f"C{index}")
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks(range(len(report.attacks)), report.attacks)
    axes.set_ylim(0, 112)
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"{report.threat.norm}, eps = {report.threat.eps:.4g}", fontsize=10)
    axes.legend(loc="upper right", fontsize=8)


def _curves(axes: Axes, report: Report) -> None:
    styles = {"clean": "--", "fgsm": ":"}
    for index, (network, records) in enumerate(report.curves.items()):
        epochs = [record["epoch"] for record in records]
        for attack in records[0]["validation"] if records else ():
            values = [100 * record["validation"][attack] for record in records]
            axes.plot(epochs, values, styles.get(attack, "-"), color=f"C{index}", label=f"{network}, {attack}")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("validation accuracy, %")
    axes.set_ylim(0, 105)
    axes.set_title("training", fontsize=10)
    axes.legend(loc="lower right", fontsize=8)
