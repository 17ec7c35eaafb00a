"""Accuracy of a classifier under attack, as a typed report."""

from sj_robust._environment import environment
from sj_robust._saved import write_whole
from sj_robust.attacks.threat import ThreatModel, eps_text, parse_eps
from sj_robust.evaluation.activity import LayerActivity, firing
from sj_robust.evaluation.comparison import Comparison, Difference, compare_reports
from sj_robust.evaluation.estimator_search import CANDIDATES, EstimatorSearch, EstimatorTrial, search_estimators
from sj_robust.evaluation.intervals import wilson_interval
from sj_robust.evaluation.masking import Finding, diagnose
from sj_robust.evaluation.member import Member, craft, fools
from sj_robust.evaluation.outcome import MemberOutcome, SuiteOutcome
from sj_robust.evaluation.own_network import evaluate
from sj_robust.evaluation.report import Report, Score
from sj_robust.evaluation.robustness import accuracy, evaluate_attacks
from sj_robust.evaluation.robustness_report import Accuracy, RobustnessReport
from sj_robust.evaluation.runner import run_suite
from sj_robust.evaluation.smoothed import SmoothedBracket, smoothed_bracket
from sj_robust.evaluation.suites import Suite, SuiteName, make_suite
from sj_robust.evaluation.worst_case import WorstCase, worst_case

__all__ = [
    "CANDIDATES",
    "Accuracy",
    "Comparison",
    "Difference",
    "EstimatorSearch",
    "EstimatorTrial",
    "Finding",
    "LayerActivity",
    "Member",
    "MemberOutcome",
    "Report",
    "RobustnessReport",
    "Score",
    "SmoothedBracket",
    "Suite",
    "SuiteName",
    "SuiteOutcome",
    "ThreatModel",
    "WorstCase",
    "accuracy",
    "compare_reports",
    "craft",
    "diagnose",
    "environment",
    "eps_text",
    "evaluate",
    "evaluate_attacks",
    "firing",
    "fools",
    "make_suite",
    "parse_eps",
    "run_suite",
    "search_estimators",
    "smoothed_bracket",
    "wilson_interval",
    "worst_case",
    "write_whole",
]
