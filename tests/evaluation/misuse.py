"""Misuse of evaluations, their parts and reports: rows of the table of ``misuse_rooms``."""

from dataclasses import replace
from functools import partial

import torch
from attacks.table import linear_model
from evaluation.reports import clean, member, report
from evaluation.suite_run import classifier, outcome_of
from evaluation.suite_run import members as own_members
from misuse_rooms import Misuse, rows
from spikingjelly.activation_based import neuron
from torch import nn

from sj_robust.attacks import SampleSeeds, ThreatModel, fgsm, pgd
from sj_robust.evaluation import (
    Corruption,
    EstimatorSearch,
    Fault,
    Member,
    diagnose,
    faulty,
    firing,
    make_suite,
    search_estimators,
    smoothed_bracket,
    worst_case,
)
from sj_robust.evaluation.intervals import paired_difference_interval, wilson_interval
from sj_robust.evaluation.run.member import crafted
from sj_robust.evaluation.run.suites import Suite
from sj_robust.proofs import smooth

LINEAR = linear_model(36)
X = torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(0))
Y = LINEAR(X).argmax(1)
LINF = ThreatModel("Linf", 0.1)
SEEDS = SampleSeeds(range(3))
PGD = Member("pgd", partial(pgd, eps=0.1, step_size=0.05, steps=2))
L2 = ThreatModel("L2", 1.0)
NEAR = replace(L2, eps=0.59)
"""In which no image is that was moved by 0.1 everywhere."""


def returned(change, threat=LINF):
    """An attack that returns the images changed."""
    attack = Member("bad", lambda model, x, y, *, generator: change(x), threat=threat)
    return crafted(LINEAR, X, Y, attack, seeds=SEEDS).x_adv


def bracket(**changes):
    model = nn.Linear(2, 2)
    x, y = torch.rand(2, 2), torch.tensor([0, 1])
    given = {"smoothing": smooth(model, x, 0.25, n0=5, n=5), "eps": [0.1]} | changes
    return smoothed_bracket(model, x, y, **given)


_suite = partial(make_suite, "fast", LINF, classes=10)
_suite_of = partial(make_suite, threat=LINF, classes=10)
_worst_case = partial(worst_case, model=LINEAR, x=X, y=Y, members=[PGD])
_diagnose = partial(diagnose, LINEAR, X, Y, threat=LINF, seed=0)
_member = partial(replace, PGD)
_search = partial(search_estimators, LINEAR, X, threat=LINF, seeds=SEEDS)

MISUSE = [
    *rows(_member, {"name": ""}, {"seed": -1}),
    *rows(_member, {"attack": 3}, {"seed": True}, {"takes_starts": 1}, error=TypeError),
    *rows(_member, {"threat": ("Linf", 0.1)}, error=TypeError),
    # what an attack returns
    Misuse(returned, {"change": lambda x: x + 0.5}, name="bad"),
    Misuse(returned, {"change": lambda x: x * float("nan")}, name="finite"),
    Misuse(returned, {"change": lambda x: x[:-1]}, name="shape"),
    Misuse(returned, {"change": lambda x: x.double()}, TypeError, "float64"),
    Misuse(returned, {"change": lambda x: (x, 0)}, TypeError, "tuple"),
    Misuse(returned, {"change": lambda x: (x + 0.101).clamp(0, 1)}, name="Linf"),
    Misuse(
        returned,
        {"change": lambda x: torch.where(x < 0.5, x + 0.1, x - 0.1), "threat": NEAR},
        ValueError,
        "L2",
    ),
    # the worst case
    *rows(_worst_case, {"seeds": SampleSeeds(range(2))}, {"draws": 0}),
    *rows(_worst_case, {"members": [PGD] * 2}),
    Misuse(_worst_case, {"model": lambda x: LINEAR(x) / 0}, name="logits"),
    Misuse(
        _worst_case,
        {"model": LINEAR.forward, "members": [replace(PGD, estimator="atan:4")]},
        TypeError,
        "estimator",
    ),
    Misuse(outcome_of, {"suite": own_members()[:1] * 2}, name="members"),
    Misuse(outcome_of, {"suite": [Member("clean", partial(fgsm, eps=0.1))]}, name="members"),
    Misuse(
        outcome_of,
        {"suite": [Member("pgd", partial(pgd, eps=-1.0, step_size=0.1, steps=2))]},
        name="eps",
    ),
    # suites and the search for estimators
    *rows(_suite, {"classes": 1}, {"eot_samples": 0}, {"rounds": 0}),
    Misuse(_suite_of, {"name": "quick"}, name="suite"),
    Misuse(_suite_of, {"name": "paper", "chosen": ["assg"]}, name="estimators"),
    Misuse(_suite_of, {"name": "gradients", "chosen": ["atan:4"]}, name="estimators"),
    Misuse(_suite_of, {"name": "paper", "threat": L2}, name="L2"),
    Misuse(_suite_of, {"name": "long", "threat": L2}, name="L2"),
    Misuse(_suite_of, {"name": "fast", "threat": replace(L2, eps=0.0)}, name="eps"),
    Misuse(_suite_of, {"name": "paper", "rounds": 2}, name="rounds"),
    Misuse(_suite_of, {"name": "events"}, name="Linf"),
    Misuse(lambda: Suite("mine", (PGD,), (PGD,), ""), {}, name="names"),
    *rows(EstimatorSearch, {"steps": 0}, {"images": 0}, {"count": 0}, {"final_steps": 0}),
    *rows(EstimatorSearch, {"finalists": -1}),
    Misuse(_search, {"y": (Y + 1) % 5}, name="images"),
    Misuse(_search, {"y": Y, "settings": EstimatorSearch(["atna:4"])}, name="estimator"),
    # diagnosis, firing, smoothing
    *rows(_diagnose, {"threat": replace(LINF, eps=0.0)}, {"threat": ThreatModel("L0", 10)}),
    *rows(_diagnose, {"steps": 0}),
    *rows(_diagnose, {"threat": 0.1}, {"eot_samples": 1.5}, error=TypeError),
    Misuse(_diagnose, {"estimators": ["no such"]}, name="estimator"),
    Misuse(partial(diagnose, None, X, Y, threat=LINF), {"seed": 0}, TypeError, "model"),
    *rows(partial(firing, x=X), {"model": lambda x: x}, error=TypeError),
    *rows(bracket, {"eps": []}, {"eps": [-1.0]}, {"steps": 0}, {"batch_size": 0}, {"seed": -1}),
    # faults and corruptions
    *rows(Fault, {"kind": "rust", "level": 1}),
    Misuse(Fault, {"kind": "weight_bits", "level": 1}, name="level"),
    Misuse(Fault, {"kind": "weight_bits", "level": 2.5}, name="level"),
    Misuse(Fault, {"kind": "stuck_at_zero", "level": 1.1}, name="level"),
    Misuse(Fault, {"kind": "lost_steps", "level": True}, name="level"),
    Misuse(Fault, {"kind": "first_steps", "level": 0}, name="level"),
    *rows(faulty, {"fault": Fault("weight_bits", 4), "model": nn.Flatten()}),
    Misuse(faulty, {"fault": Fault("lost_spikes", 0.1), "model": nn.Linear(2, 2)}, name="Linear"),
    Misuse(faulty, {"fault": Fault("lost_steps", 1), "model": nn.Linear(2, 2)}, name="T"),
    Misuse(faulty, {"fault": Fault("tau_drift", 0.1), "model": neuron.QIFNode()}, name="tau"),
    Misuse(faulty, {"fault": Fault("first_steps", 3), "model": classifier()}, name="steps"),
    Misuse(Corruption, {"kind": "rust", "level": 1}, name="corruption"),
    Misuse(Corruption, {"kind": "fog", "level": 6}, name="severity"),
    # rows of a report that contradict each other
    Misuse(report, {"rows": (clean(), member("a", (9,), seen=(9,)))}, name="a"),
    Misuse(report, {"rows": (clean(), member("a", (3,), seen=(2,)))}, name="a"),
    Misuse(report, {"rows": (clean(), member("a", (), seen=(10,)))}, name="numbers"),
    Misuse(report, {"rows": (clean(), member("a", (1, 2), digests="0" * 15))}, name="digests"),
    Misuse(report, {"rows": (clean(), member("a", outside=(1,)))}, name="a"),
    Misuse(report, {"rows": ()}, name="clean"),
    Misuse(report, {"rows": (member("a"),)}, name="clean"),
    Misuse(report, {"rows": (clean(), member("a", variant="other"))}, name="clean"),
    Misuse(report, {"labels": ()}, name="image"),
    Misuse(wilson_interval, {"count": 0, "total": 0}, name="total"),
    *rows(wilson_interval, {"count": 5, "total": 4}),
    Misuse(paired_difference_interval, {"gained": 3, "lost": 2, "total": 4}, name="count"),
]
