"""Reports made by hand."""

from sj_robust.attacks import ThreatModel
from sj_robust.evaluation.outcome import MemberOutcome
from sj_robust.evaluation.robustness_report import RobustnessReport

DEAD = {"layer": "net.5", "neuron": "LIFNode", "rate": 0.0, "silent": 1.0, "saturated": 0.0}


def member(
    name,
    fooled=(),
    *,
    attacked=range(8),
    group="suite",
    eps=0.1,
    outside=(),
    seconds=1.0,
    estimator="atan:4",
):
    return MemberOutcome(
        name,
        estimator,
        group,
        eps,
        tuple(attacked),
        tuple(fooled),
        tuple(outside),
        max(eps or 0, 0.05),
        seconds,
    )


def report(**changes):
    """Ten images, eight right; the suite breaks 0, 1, 2, 3, the control 0, 1, 6; noise beyond the
    threat 7.
    """
    members = (
        member("gaussian", (7,), group="", eps=None, outside=(7,), estimator="training"),
        member("apgd_ce/atan:4/r0", (0, 1)),
        member("apgd_ce/atan:4/r1", (2, 3), attacked=range(2, 8), seconds=2.0),
        member("control/apgd_ce/r0", (0, 1), group="control", estimator="training"),
        member(
            "control/apgd_ce/r1", (6,), attacked=range(2, 8), group="control", estimator="training"
        ),
    )
    fields = {
        "name": "dlif_at",
        "dataset": "digits",
        "threat": ThreatModel("Linf", 0.1),
        "suite": "fast",
        "classes": 5,
        "labels": (0, 1, 2, 3, 4) * 2,
        "correct": tuple(range(8)),
        "members": members,
        "seed": 3,
        "network": {
            "architecture": "small, dlif",
            "fingerprint": "abc",
            "T": 2,
            "layers": [
                {
                    "layer": "net.1",
                    "neuron": "DLIFNode",
                    "surrogate": "PiecewiseQuadratic(alpha=1.0)",
                }
            ],
        },
        "data": "0123",
        "estimators": (
            {
                "estimator": "atan:4",
                "robust_accuracy": 0.5,
                "margin": 0.2,
                "seconds": 1.0,
                "chosen": True,
            },
        ),
        "over_eps": tuple(
            {"eps": eps, "attack": "APGD-CE 20", "correct": right, "total": 10}
            for eps, right in (("0", 8), ("0.05", 6), ("0.1", 4), ("0.2", 0))
        ),
        "firing": (
            {"layer": "net.1", "neuron": "DLIFNode", "rate": 0.2, "silent": 0.1, "saturated": 0.0},
        ),
        "findings": (finding("zero_gradients"), finding("flat_loss")),
        "potential": (
            {
                "member": "apgd_ce/atan:4/r0",
                "samples": 6,
                "layers": {"net.1": [0.1, 0.4], "net.5": [0.0, 0.2]},
            },
        ),
        "configuration": {"suite": "fast", "mean": None, "limits": [1, 2]},
        "environment": {"torch": "2"},
    }
    return RobustnessReport(**(fields | changes))


def finding(name, *, passed=True):
    return {
        "name": name,
        "value": 0.1 if passed else 0.9,
        "threshold": 0.5,
        "passed": passed,
        "meaning": "It was measured.",
        "remedy": "Do something.",
    }
