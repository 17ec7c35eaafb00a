"""The checked arguments of an evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from sj_robust.core.environment import device_of, environment
from sj_robust.core.threat import ThreatModel
from sj_robust.evaluation.run.data import Data
from sj_robust.evaluation.run.faults import Corruption, Fault
from sj_robust.evaluation.run.progress import Watch, rank_and_world_size
from sj_robust.evaluation.subject import Subject, describe_network

__all__ = ["Request", "described"]


@dataclass(frozen=True)
class Request:
    """What to evaluate: a network on images. 评估请求。

    Attributes:
        suite: Name of the suite of attacks, or ``"stress"`` or ``"corruptions"``.
        threat: Norm and radius, > 0; for the suite ``"events"`` ``ThreatModel("L0", k)`` or one of
            moves.
        dataset: Name of the data set.
        classes: Number of classes.
        seed: Random seed.
        draws: Forwards, in more than half of which a stochastic network must be wrong, and over a
            third of which its gradients are averaged; None finds out whether it needs several.
            Every image is asked twice for that, and to find out whether the network carries state.
            Of a stress test, draws of a fault that is random.
        surrogate_model: A differentiable stand-in for the same images, on which some attacks of the
            suite are crafted; None takes the network's own rates, if it has them.
        proofs: Whether images are verified, where threat and network have bounds.
        control: Whether the control of the suite runs too.
        checks: Whether accuracy over eps and signs of gradient masking are measured too.
        radii: Radii of accuracy over eps; none for a quarter of the threat's to four times it.
        rounds: How many times the attacks of the suite are run.
        faults: What a stress test measures; None takes every kind at its usual levels.
        steps: Steps of the attack of a stress test.
        folder: Where progress is kept; None keeps none.
        configuration: Options of the run, for the report.
        watch: Who watches.
    """

    suite: str
    threat: ThreatModel
    dataset: str
    classes: int = 0
    seed: int = 0
    draws: int | None = None
    surrogate_model: nn.Module | None = None
    proofs: bool = True
    control: bool = True
    checks: bool = True
    radii: tuple[float, ...] = ()
    rounds: int = 1
    faults: Sequence[Fault | Corruption] | None = None
    steps: int = 20
    folder: Path | None = None
    configuration: Mapping[str, Any] = field(default_factory=dict)
    watch: Watch = field(default_factory=Watch)


def described(subject: Subject, data: Data, request: Request, fingerprint: str) -> dict[str, Any]:
    """What every report says of network, images and request."""
    network = {"architecture": subject.architecture, "fingerprint": fingerprint}
    processes = str(rank_and_world_size()[1])
    return {
        "name": subject.name,
        "dataset": request.dataset,
        "suite": request.suite,
        "labels": data.labels,
        "threat": request.threat,
        "classes": request.classes,
        "seed": request.seed,
        "network": network | describe_network(subject.model),
        "data": data.fingerprint,
        "configuration": dict(request.configuration),
        "environment": environment(device_of(subject.model)) | {"processes": processes},
    }
