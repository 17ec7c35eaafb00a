"""sj_robust: robustness of spiking neural networks, on SpikingJelly.

Every name and part of the package can be reached from here and is imported on first use:
``sj_robust.attacks.pgd`` needs no other import than ``import sj_robust``, and parts that do not
need torch start without it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sj_robust._version import __version__

if TYPE_CHECKING:  # for type checkers and editors, which do not run __getattr__
    from sj_robust import attacks as attacks
    from sj_robust import classifier as classifier
    from sj_robust import data as data
    from sj_robust import defences as defences
    from sj_robust import doctor as doctor
    from sj_robust import estimators as estimators
    from sj_robust import evaluation as evaluation
    from sj_robust import models as models
    from sj_robust import neuron as neuron
    from sj_robust import ops as ops
    from sj_robust import perturbation as perturbation
    from sj_robust import proofs as proofs
    from sj_robust import training as training
    from sj_robust.classifier import SpikingClassifier
    from sj_robust.core import randomness as randomness
    from sj_robust.evaluation import evaluate
    from sj_robust.neuron import DLIFNode, replace_neurons
    from sj_robust.perturbation import MPPDMonitor, compare_potentials
    from sj_robust.proofs import verify
    from sj_robust.proofs.gains import perturbation_gains
    from sj_robust.training import finetune

__all__ = [
    "DLIFNode",
    "MPPDMonitor",
    "SpikingClassifier",
    "__version__",
    "compare_potentials",
    "evaluate",
    "finetune",
    "perturbation_gains",
    "replace_neurons",
    "verify",
]

_HOMES = {
    "DLIFNode": "neuron",
    "MPPDMonitor": "perturbation",
    "SpikingClassifier": "classifier",
    "compare_potentials": "perturbation",
    "evaluate": "evaluation",
    "finetune": "training",
    "perturbation_gains": "proofs.gains",
    "replace_neurons": "neuron",
    "verify": "proofs",
}
_PARTS = frozenset(
    {
        "attacks",
        "classifier",
        "data",
        "defences",
        "doctor",
        "estimators",
        "evaluation",
        "models",
        "neuron",
        "ops",
        "perturbation",
        "proofs",
        "training",
    }
)


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return importlib.import_module(f"sj_robust.{name}")
    if name in _HOMES:
        globals()[name] = getattr(importlib.import_module(f"sj_robust.{_HOMES[name]}"), name)
        return globals()[name]
    raise AttributeError(f"module 'sj_robust' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PARTS, *_HOMES})
