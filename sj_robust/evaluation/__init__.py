"""Accuracy of a classifier under attack, as a typed report."""

from sj_robust.attacks.threat import ThreatModel
from sj_robust.evaluation.diagnosis.activity import firing
from sj_robust.evaluation.diagnosis.masking import diagnose
from sj_robust.evaluation.intervals import wilson_interval
from sj_robust.evaluation.own_network import evaluate, stress
from sj_robust.evaluation.report.comparison import compare_reports
from sj_robust.evaluation.report.pictures import gallery
from sj_robust.evaluation.report.report import Report
from sj_robust.evaluation.result import Row
from sj_robust.evaluation.run.corruptions import CORRUPTIONS, Corruption
from sj_robust.evaluation.run.estimator_search import (
    CANDIDATES,
    EstimatorSearch,
    search_estimators,
)
from sj_robust.evaluation.run.faults import FAULTS, Fault, faulty
from sj_robust.evaluation.run.member import Member, craft, fools
from sj_robust.evaluation.run.suites import Suite, make_suite
from sj_robust.evaluation.smoothing import smoothed_bracket
from sj_robust.evaluation.worst_case import worst_case

__all__ = [
    "CANDIDATES",
    "CORRUPTIONS",
    "FAULTS",
    "Corruption",
    "EstimatorSearch",
    "Fault",
    "Member",
    "Report",
    "Row",
    "Suite",
    "ThreatModel",
    "compare_reports",
    "craft",
    "diagnose",
    "evaluate",
    "faulty",
    "firing",
    "fools",
    "gallery",
    "make_suite",
    "search_estimators",
    "smoothed_bracket",
    "stress",
    "wilson_interval",
    "worst_case",
]
