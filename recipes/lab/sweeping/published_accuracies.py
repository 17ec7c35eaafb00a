"""Accuracies of the paper and of a rerun of it, shown beside what a sweep finds; nothing is
computed from them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sj_robust.training.modes import MODES


@dataclass(frozen=True)
class PublishedAccuracy:
    """One published accuracy in per cent, the options that tell its setting, and the column that it
    belongs beside.
    """

    options: dict[str, Any]
    column: str
    percent: float
    source: str


def _published() -> tuple[PublishedAccuracy, ...]:
    text = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
    found = []
    for paper in yaml.safe_load(text):
        for setting in paper["settings"]:
            options = {"dataset": "cifar10"} | setting["options"]
            for column, percent in setting["percent"].items():
                found.append(PublishedAccuracy(options, column, percent, paper["source"]))
    return tuple(found)


PUBLISHED = _published()
"""What ``published_accuracies.yaml`` holds."""


def published_accuracy(options: Mapping[str, Any], column: str) -> PublishedAccuracy | None:
    """The published accuracy for a run's setting, whatever its length of training; None if none is
    known.

    The options are those of the run that have an effect.

    Examples:
        >>> setting = {
        ...     "dataset": "cifar10",
        ...     "model": "vgg11",
        ...     "neuron": "dlif",
        ...     "mode": "at",
        ...     "rho": 0.0,
        ... }
        >>> published_accuracy(setting, "paper/apgd_ce").percent
        23.05
    """
    mode = MODES.get(options.get("mode", ""))
    if mode is not None and options.get("rho") is None:
        options = {**options, "rho": mode.rho}
    for known in PUBLISHED:
        if known.column == column and known.options.items() <= options.items():
            return known
    return None
