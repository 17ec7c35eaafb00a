"""A report is compared with its network: fingerprint and size, clean predictions, and some images
that are evaluated again.
"""

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lab.leaderboard.check import Check
from sj_robust.core.environment import environment
from sj_robust.evaluation import Report
from sj_robust.evaluation.assess import assess
from sj_robust.evaluation.request import Request
from sj_robust.evaluation.run.data import Data
from sj_robust.evaluation.run.draws import settled_draws
from sj_robust.evaluation.run.identity import identify
from sj_robust.evaluation.subject import Subject, describe_network

__all__ = ["compared", "evaluated_again"]

_IMAGES = 16
"""Number of images that are attacked again, and of those that are proved again."""
_DIFFERENT = 0.25
"""Share of the images that are not proved that may fall although the report says that they stand;
one may in any case. An attack has other random numbers here, and a spike may flip by rounding.
"""
_SURPASSED = ("paper", "autoattack", "gradients")
"""Suites that may honestly leave what ``fast`` breaks."""
_ROUNDED = 0.03
"""Share of clean predictions that may differ by rounding."""
_DRAWN = 0.25
"""Share of clean predictions that may differ if the network draws random numbers."""
_BATCH = 64
_RELEASES = ("python", "torch", "spikingjelly", "sj_robust", "commit")
"""What a fingerprint depends on beside the network."""


def compared(report: Report, network: Subject, data: Data) -> Iterator[Check]:
    """Whether the network is that of the report, as far as it can be seen without an attack."""
    model = network.model
    yield _same_network(report, model, data)
    yield _built_alike(report, model)
    try:
        draws = settled_draws(model, data, None)
    except ValueError as error:
        yield Check(False, f"draws: {error}")
        return
    found = "draws random numbers" if draws > 1 else "draws no random numbers"
    yield Check(
        draws == 1 or report.draws >= draws,
        f"draws: the network {found}; in the report, an image is judged by {report.draws}",
    )
    yield _clean(report, model, data, _ROUNDED if draws == 1 else _DRAWN)


def evaluated_again(report: Report, network: Subject, data: Data) -> Iterator[Check]:
    """Attacks on images that stand in the report, and proofs of images that it proves.

    They are chosen at random, so that nobody can prepare for them.
    """
    threat = report.threat
    proved = frozenset() if report.verified is None else report.standing("verified")
    undecided = _some(report.standing("everything") - proved)
    again = _some(proved)
    numbers = undecided + again
    if threat is None or not numbers:
        yield Check(None, "attack again: no image is still correct")
        return
    x, y = data.tensors(torch.device("cpu"))
    with torch.no_grad():
        classes = network.model(x[:1]).shape[-1]
    asked = Request(
        "events" if threat.of_events else "fast",
        threat,
        report.dataset,
        classes,
        proofs=bool(again),
        control=False,
        checks=False,
    )
    found = assess(network, [(x[numbers], y[numbers])], asked)
    yield _attacked(report, found, undecided=len(undecided))
    if again:
        yield _proved(found, len(again))


def _attacked(report: Report, found: Report, *, undecided: int) -> Check:
    """Whether few of the undecided images fell, which come first in ``found``, and none of the
    proved ones.
    """
    total = len(found.labels)
    fell = set(range(total)) - found.standing("everything")
    of_proved = sum(place >= undecided for place in fell)
    said = f", {of_proved} of them proved" if of_proved else ""
    is_weaker = report.suite in _SURPASSED
    remedy = "; a leaderboard wants the suite standard" if is_weaker else ""
    return Check(
        len(fell) <= max(1, _DIFFERENT * undecided) and not of_proved,
        f"attack again: the suite {found.suite} breaks {len(fell)} of {total} random images that "
        f"the report leaves correct{said}{remedy}",
        required=not is_weaker or of_proved > 0,
    )


def _proved(found: Report, tried: int) -> Check:
    """Whether the proofs of the report can be made here; those of undecided images do not count."""
    total = len(found.labels)
    verified = frozenset() if found.verified is None else found.standing("verified")
    made = len(verified.intersection(range(total - tried, total)))
    return Check(
        tried - made <= tried // _IMAGES,  # one may be lost by rounding
        f"proofs again: {made} of {tried} random images that the report proves are proved here",
    )


def _some(numbers: frozenset[int]) -> list[int]:
    """A few of them at random."""
    return random.sample(sorted(numbers), min(_IMAGES, len(numbers)))


def _clean(report: Report, model: nn.Module, data: Data, tolerance: float) -> Check:
    """Whether the network is right and wrong where the report has it so."""
    x, y = data.tensors(torch.device("cpu"))
    with torch.no_grad():
        right = torch.cat([model(images).argmax(-1) for images in torch.split(x, _BATCH)]) == y
    clean = report.standing("clean")
    agreeing = sum(bool(here) == (number in clean) for number, here in enumerate(right.tolist()))
    return Check(
        agreeing >= (1 - tolerance) * len(y),
        f"clean predictions: {agreeing} of {len(y)} as the report has them",
    )


def _same_network(report: Report, model: nn.Module, data: Data) -> Check:
    """Whether the fingerprint is that of the network here, where the releases are the same."""
    found = identify(model, data).fingerprint
    told = str(report.network.get("fingerprint", ""))
    here = environment()
    others = [name for name in _RELEASES if here[name] != report.environment.get(name)]
    text = f"network: fingerprint {told}, here {found}"
    if found != told and others:
        return Check(None, f"{text} (cannot be compared: other {', '.join(others)})")
    return Check(found == told, text)


def _built_alike(report: Report, model: nn.Module) -> Check:
    """Whether time steps, number of parameters and neurons are those of the report."""
    here, there = describe_network(model), report.network
    differ = [name for name in ("T", "parameters") if there.get(name) != here[name]]
    if _neurons(there.get("layers", [])) != _neurons(here["layers"]):
        differ.append("neurons")
    said = f"other {' and '.join(differ)}" if differ else "as in the report"
    return Check(not differ, f"T, number of parameters, neurons: {said}")


def _neurons(layers: list[dict[str, Any]]) -> list[str]:
    """Classes of the neurons; their names are others in other releases."""
    return [str(row.get("neuron")) for row in layers]
