"""Figures, drawn from saved results; needs matplotlib (extra ``recipes``)."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sj_robust.evaluation.report import Report

__all__ = ["plot_report"]


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
    axes.set_ylabel("validation accuracy, %")
    axes.set_ylim(0, 105)
    axes.set_title("training", fontsize=10)
    axes.legend(loc="lower right", fontsize=8)
