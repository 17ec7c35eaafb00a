"""Accuracy of a classifier under attack, as a typed report."""

from sj_robust.evaluation.activity import LayerActivity, firing
from sj_robust.evaluation.environment import environment
from sj_robust.evaluation.report import Report, Score
from sj_robust.evaluation.robustness import Attack, accuracy, evaluate
from sj_robust.evaluation.threat import ThreatModel

__all__ = [
    "Attack",
    "LayerActivity",
    "Report",
    "Score",
    "ThreatModel",
    "accuracy",
    "environment",
    "evaluate",
    "firing",
]
