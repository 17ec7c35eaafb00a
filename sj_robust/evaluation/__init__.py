"""Accuracy of a classifier under attack, as a typed report."""

from sj_robust.attacks.threat import ThreatModel, eps_text, parse_eps
from sj_robust.core.environment import environment
from sj_robust.core.saved import write_whole
from sj_robust.evaluation.activity import LayerActivity, firing
from sj_robust.evaluation.comparison import Comparison, Difference, compare_reports
from sj_robust.evaluation.corruptions import CORRUPTIONS, Corruption
from sj_robust.evaluation.estimator_search import (
    CANDIDATES,
    EstimatorSearch,
    EstimatorTrial,
    search_estimators,
)
from sj_robust.evaluation.faults import FAULTS, Fault, faulty
from sj_robust.evaluation.intervals import wilson_interval
from sj_robust.evaluation.masking import Finding, diagnose
from sj_robust.evaluation.member import Member, craft, fools
from sj_robust.evaluation.outcome import MemberOutcome, SuiteOutcome
from sj_robust.evaluation.own_network import evaluate, stress
from sj_robust.evaluation.pictures import Gallery, gallery
from sj_robust.evaluation.report import Accuracy, Report, Score
from sj_robust.evaluation.robustness import accuracy, evaluate_attacks
from sj_robust.evaluation.robustness_report import RobustnessReport
from sj_robust.evaluation.runner import run_suite
from sj_robust.evaluation.smoothed import SmoothedBracket, smoothed_bracket
from sj_robust.evaluation.stress_card import StressCard, StressRow
from sj_robust.evaluation.suites import Suite, SuiteName, make_suite
from sj_robust.evaluation.worst_case import WorstCase, worst_case

__all__ = [
    "CANDIDATES",
    "CORRUPTIONS",
    "FAULTS",
    "Accuracy",
    "Comparison",
    "Corruption",
    "Difference",
    "EstimatorSearch",
    "EstimatorTrial",
    "Fault",
    "Finding",
    "Gallery",
    "LayerActivity",
    "Member",
    "MemberOutcome",
    "Report",
    "RobustnessReport",
    "Score",
    "SmoothedBracket",
    "StressCard",
    "StressRow",
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
    "faulty",
    "firing",
    "fools",
    "gallery",
    "make_suite",
    "parse_eps",
    "run_suite",
    "search_estimators",
    "smoothed_bracket",
    "stress",
    "wilson_interval",
    "worst_case",
    "write_whole",
]
