"""The figures of a report as a Markdown table."""

from collections.abc import Sequence

from sj_robust.core.saved import markdown_table
from sj_robust.evaluation.report.levels import levels_table
from sj_robust.evaluation.report.verdict import remarks
from sj_robust.evaluation.result import Accuracy, Evaluation

__all__ = ["accuracies_table", "table"]


def table(report: Evaluation) -> str:
    """Markdown table of all figures: of the attacks, or as the suite asks for."""
    if report.of_levels:
        return levels_table(report)
    if report.suite == "vote":
        return _of_the_vote(report)
    if report.suite == "training":
        return _of_a_training(report)
    return accuracies_table(report.accuracies)


def accuracies_table(accuracies: Sequence[Accuracy]) -> str:
    """A row per accuracy."""
    rows = [
        [one.name, one.percent, one.interval_text, str(one.total), f"{one.seconds:.1f}"]
        for one in accuracies
    ]
    return markdown_table(["accuracy", "%", "95 % CI", "images", "seconds"], rows)


def _of_the_vote(report: Evaluation) -> str:
    """A row per radius, and the images that are contradicted."""
    rows = []
    for row in report.rows:
        if row.kind == "proof":
            low, high = report.bracket_at(row.eps or 0.0)
            rows.append([f"{row.eps:.6g}", low.percent, high.percent])
    found = markdown_table(["L2", "certified, %", "under attack, %"], rows)
    return "\n\n".join([found, *remarks(report)])


def _of_a_training(report: Evaluation) -> str:
    """A row per attack, a column per network."""
    shares: dict[str, dict[str, str]] = {}
    for network in report.variants:
        for one in report.single_accuracies(network):
            shares.setdefault(one.name, {})[network] = one.percent
    rows = []
    for name, by_network in shares.items():
        cells = [by_network.get(network, "") for network in report.variants]
        rows.append([name, *cells])
    return markdown_table(["accuracy, %", *report.variants], rows)
