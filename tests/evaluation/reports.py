"""Reports made by hand."""

from sj_robust.attacks import ThreatModel
from sj_robust.evaluation import Report
from sj_robust.evaluation.result import OVER_EPS, Row

LINF = ThreatModel("Linf", 0.1)
DEAD = {"layer": "net.5", "neuron": "LIFNode", "rate": 0.0, "silent": 1.0, "saturated": 0.0}


def member(name, fell=(), *, seen=range(8), group="suite", eps=0.1, norm="Linf", **more):
    """The row of an attack."""
    given = {
        "group": group,
        "threat": None if eps is None else ThreatModel(norm, eps),
        "estimator": "atan:4",
        "largest": max(eps or 0, 0.05),
        "seconds": 1.0,
    }
    kind = "control" if group == "control" else "attack"
    return Row(name, kind, seen, fell, **given | more)


def clean(right=range(8), total=10, variant=""):
    """The row of images without an attack."""
    wrong = sorted({*range(total)} - {*right})
    return Row("clean", "clean", range(total), wrong, variant=variant, estimator="")


def proof(verified, total=10, *, eps=0.1, variant="", **more):
    """The row of a proof."""
    left = sorted({*range(total)} - {*verified})
    threat = ThreatModel("Linf", eps)
    return Row("verify", "proof", range(total), left, variant=variant, threat=threat, **more)


def over_eps(counts=((0.05, 6), (0.1, 4), (0.2, 0))):
    """Rows of accuracy over eps: so many images are left at each radius."""
    rows = [clean(variant=OVER_EPS)]
    left = [7, 4, 6, 3, 5, 2, 1, 0]
    for eps, right in counts:
        more = {"variant": OVER_EPS, "group": "over_eps"}
        rows.append(member(f"apgd20@{eps}", left[right:], seen=left, eps=eps, **more))
        left = left[:right]
    return rows


MEMBERS = (
    member("gaussian", (7,), group="", eps=None, outside=(7,), estimator="training"),
    member("apgd_ce/atan:4/r0", (0, 1)),
    member("apgd_ce/atan:4/r1", (2, 3), seen=range(2, 8), seconds=2.0),
    member("control/apgd_ce/r0", (0, 1), group="control", estimator="training"),
    member("control/apgd_ce/r1", (6,), seen=range(2, 8), group="control", estimator="training"),
)


def report(*, members=MEMBERS, right=range(8), verified=None, curve=(), total=10, **changes):
    """Ten images, eight right; the suite breaks 0, 1, 2, 3, the control 0, 1, 6; noise beyond the
    threat 7.
    """
    proofs = [] if verified is None else [proof(verified, total)]
    layers = [
        {"layer": "net.1", "neuron": "DLIFNode", "surrogate": "PiecewiseQuadratic(alpha=1.0)"}
    ]
    moved = {"net.1": [0.1, 0.4], "net.5": [0.0, 0.2]}
    trial = {"estimator": "atan:4", "robust_accuracy": 0.5, "margin": 0.2, "seconds": 1.0}
    fields = {
        "name": "dlif_at",
        "dataset": "digits",
        "threat": LINF,
        "suite": "fast",
        "classes": 5,
        "labels": tuple(number % 5 for number in range(total)),
        "rows": (clean(right, total), *members, *proofs, *curve),
        "seed": 3,
        "network": {
            "architecture": "small, dlif",
            "fingerprint": "abc",
            "T": 2,
            "layers": layers,
        },
        "data": "0123",
        "estimators": (trial | {"chosen": True},),
        "firing": (
            {"layer": "net.1", "neuron": "DLIFNode", "rate": 0.2, "silent": 0.1, "saturated": 0.0},
        ),
        "findings": (finding("zero_gradients"), finding("flat_loss")),
        "potential": ({"member": "apgd_ce/atan:4/r0", "samples": 6, "layers": moved},),
        "configuration": {"suite": "fast", "mean": None, "limits": [1, 2]},
        "environment": {"torch": "2"},
    }
    return Report(**(fields | changes))


def finding(name, *, passed=True):
    return {
        "name": name,
        "value": 0.1 if passed else 0.9,
        "threshold": 0.5,
        "passed": passed,
        "meaning": "It was measured.",
        "remedy": "Do something.",
    }


def stress_report(suite="stress", **changes):
    """A hundred images: lost spikes at two levels of two draws, and weight bits."""
    rows = []
    levels = {
        "none": (91, 49),
        "lost_spikes:0.1/draw0": (88, 50),
        "lost_spikes:0.1/draw1": (90, 46),
        "lost_spikes:0.2/draw0": (82, 50),
        "lost_spikes:0.2/draw1": (84, 46),
        "weight_bits:4": (91, 30),
    }
    for variant, (right, attacked) in levels.items():
        rows.append(clean(range(right), 100, variant))
        fell = range(attacked, right)
        rows.append(member("short", fell, seen=range(right), variant=variant))
    fields = {"description": "APGD-CE 20", "labels": (0,) * 100, "rows": rows}
    return Report("mine", "digits", suite, threat=LINF, **(fields | changes))
