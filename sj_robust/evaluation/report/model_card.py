"""Fields of RobustBench's model cards, computed from a report."""

from dataclasses import asdict
from typing import Any

from sj_robust.attacks.threat import eps_text
from sj_robust.core.saved import plain
from sj_robust.evaluation.report.verdict import alarms, masked
from sj_robust.evaluation.result import Evaluation

__all__ = ["COUNTED", "DERIVED", "derived", "footnote"]

COUNTED = ("clean_acc", "autoattack_acc", "external", "figures", "outcome")
"""What a file holds that must follow from the rows when it is read."""
DERIVED = ("norm", "eps", "architecture", "unreliable", "footnote", *COUNTED)
"""All that a file of a suite of attacks holds beside the fields."""


def derived(report: Evaluation) -> dict[str, Any]:
    """Accuracies and names of RobustBench: ``external`` is the lowest accuracy known, ``outcome``
    per image the first attack that broke it; a report of several networks has no card.

    Source: ``model_info`` of RobustBench (Croce et al., NeurIPS 2021 Datasets and Benchmarks).
    """
    if not report.is_suite:
        return {}
    figures = [
        asdict(one) | {"accuracy": one.accuracy, "interval": list(one.interval)}
        for one in report.accuracies
    ]
    of_autoattack = report.suite == "autoattack"
    card = {
        "norm": None if report.threat is None else report.threat.norm,
        "eps": None if report.threat is None else eps_text(report.threat.eps),
        "architecture": str(report.network.get("architecture", "unknown")),
        "clean_acc": f"{100 * report.clean.accuracy:.2f}",
        "autoattack_acc": f"{100 * report.worst_case.accuracy:.2f}" if of_autoattack else None,
        "external": f"{100 * report.everything.accuracy:.2f}",
        "unreliable": bool(footnote(report)),
        "footnote": footnote(report),
        "figures": figures,
        "outcome": report.outcome,
    }
    found: dict[str, Any] = plain(card)
    return found


def footnote(report: Evaluation) -> str:
    """The first alarm, if there is one."""
    return next(iter((*alarms(report), *masked(report))), "")
