"""Accuracy of a classifier under attack, as a typed report."""

from sj_robust.evaluation.activity import LayerActivity, firing
from sj_robust.evaluation.environment import environment
from sj_robust.evaluation.masking import Finding, diagnose
from sj_robust.evaluation.report import Report, Score
from sj_robust.evaluation.robustness import Attack, accuracy, evaluate
from sj_robust.evaluation.suites import Suite, SuiteName, SweepSettings, make_suite
from sj_robust.evaluation.threat import ThreatModel

__all__ = [
    "Attack",
    "Finding",
    "LayerActivity",
    "Report",
    "Score",
    "Suite",
    "SuiteName",
    "SweepSettings",
    "ThreatModel",
    "accuracy",
    "diagnose",
    "environment",
    "evaluate",
    "firing",
    "make_suite",
]
