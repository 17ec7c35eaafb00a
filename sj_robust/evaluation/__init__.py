"""Accuracy of a classifier under attack, as a typed report."""

from sj_robust.evaluation.assess import worst_case
from sj_robust.evaluation.diagnosis.activity import firing
from sj_robust.evaluation.diagnosis.masking import diagnose
from sj_robust.evaluation.own_network import evaluate, stress
from sj_robust.evaluation.report.comparison import compare_reports
from sj_robust.evaluation.report.pictures import gallery
from sj_robust.evaluation.report.report import Report
from sj_robust.evaluation.run.estimator_search import EstimatorSearch, search_estimators
from sj_robust.evaluation.run.faults import Corruption, Fault, faulty
from sj_robust.evaluation.run.member import Member
from sj_robust.evaluation.run.suites import make_suite
from sj_robust.evaluation.smoothing import smoothed_bracket
from sj_robust.evaluation.subject import from_checkpoint

__all__ = [
    "Corruption",
    "EstimatorSearch",
    "Fault",
    "Member",
    "Report",
    "compare_reports",
    "diagnose",
    "evaluate",
    "faulty",
    "firing",
    "from_checkpoint",
    "gallery",
    "make_suite",
    "search_estimators",
    "smoothed_bracket",
    "stress",
    "worst_case",
]
